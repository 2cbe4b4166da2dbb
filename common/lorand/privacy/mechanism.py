"""Per-example vectors → a noisy mean that bounds what it shows of any one of them.

Each example's vector is put on a grid of integers, then clipped there, so that no rounding can
lengthen it again; the sum and its noise are integers. Codes, averages and every later step only
see the result: whatever they do costs no more (post-processing).
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lorand.codec import Floats
from lorand.privacy import sampler
from lorand.privacy.accountant import Noise
from lorand.privacy.sampler import Below

GRID: Final = 1 << 30
"""The clip bound in grid steps.

So fine that discrete Gaussian noise is accounted for as continuous noise rounded to the grid, which
is post-processing of it: a number of the two differs in total variation by about 0.02/σ², σ in grid
steps, 2e-16 at a multiplier of 0.01. A release of K numbers adds (1 + e^ε)·K times that to delta.
"""
LEAST_MULTIPLIER: Final = 0.01
_LARGEST: Final = 2.0**52
"""Grid steps of a coordinate before it is clipped: longer vectors are shortened in floats first."""

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Mechanism:
    """How a round's vectors are released; every number here is public.

    Vectors are clipped to `clip_bound`, in L2 (gaussian) or in L1 (laplace); `multiplier` is the
    scale of the noise over it, and `divisor` what the noisy sum is divided by: a number of the run,
    never the size of the batch at hand, which is private. Where another party adds the noise,
    `adds_noise` is False here. Numbers of the sum are kept within `largest` grid steps (0: as they
    are), before the noise: that shortens distances between sums, so it costs nothing.
    """

    noise: Noise
    clip_bound: float
    multiplier: float
    divisor: int
    adds_noise: bool = True
    largest: int = 0

    def __post_init__(self) -> None:
        """Check what the noise's proof rests on."""
        assert self.multiplier >= LEAST_MULTIPLIER
        assert self.clip_bound > 0
        assert self.divisor >= 1

    @property
    def noise_steps(self) -> int:
        """The scale of the noise in grid steps: σ or b, rounded up."""
        return ceil(self.multiplier * GRID)

    def release(self, vectors: Floats, below: Below = secrets.randbelow) -> Floats:
        """Return (Σ_i clip(v_i) + noise) / divisor of vectors (batch, K): shape (K,), float64.

        A batch without examples releases noise like any other. `below` is for tests.
        """
        return self.mean(self.steps(vectors, below))

    def steps(self, vectors: Floats, below: Below = secrets.randbelow) -> Integers:
        """Return Σ_i clip(v_i) + noise in grid steps, shape (K,)."""
        total: Integers = self.clipped(vectors).sum(axis=0, dtype=np.int64)
        if self.largest:
            total = np.clip(total, -self.largest, self.largest)
        return self.noisy(total, below) if self.adds_noise else total

    def noisy(self, total: Integers, below: Below = secrets.randbelow) -> Integers:
        """Return a sum in grid steps with noise, shape (K,)."""
        draw = sampler.gaussian if self.noise == "gaussian" else sampler.laplace
        return np.array([int(part) + draw(self.noise_steps, below) for part in total], np.int64)

    def mean(self, total: Integers, parties: int = 1) -> Floats:
        """Return what a sum in grid steps over so many parties stands for, shape (K,)."""
        return total * (self.clip_bound / GRID) / (self.divisor * parties)

    def clipped(self, vectors: Floats) -> Integers:
        """Return each vector on the grid, shape (batch, K), none longer than GRID steps.

        A function of each vector alone; one that holds no finite numbers becomes zero.
        """
        assert vectors.ndim == 2
        rows = [clip(row, self.noise) for row in _on_grid(vectors, self.clip_bound)]
        return np.array(rows, np.int64).reshape(vectors.shape)


def _on_grid(vectors: Floats, clip_bound: float) -> list[list[int]]:
    """Return vectors in grid steps, rounded, the longest shortened to where integers are exact."""
    with np.errstate(all="ignore"):
        steps = vectors * (GRID / clip_bound)
        largest = np.abs(steps).max(axis=1, initial=0.0, keepdims=True)
        steps = np.where(largest > _LARGEST, steps / largest * _LARGEST, steps)
    fine = np.isfinite(largest) & np.isfinite(steps).all(axis=1, keepdims=True)
    rounded: list[list[int]] = np.rint(np.where(fine, steps, 0.0)).astype(np.int64).tolist()
    return rounded


def clip(vector: Sequence[int], noise: Noise) -> list[int]:
    """Return v, or v·GRID/‖v‖ rounded towards zero: of norm GRID at most, exactly.

    ‖v‖ is L2 for Gaussian noise, L1 for Laplace; rounded up, so that Σ (|v_j|·GRID/‖v‖)² ≤ GRID².

    >>> clip([3 * GRID, -4 * GRID], "gaussian") == [3 * GRID // 5, -(4 * GRID // 5)]
    True
    """
    if noise == "laplace":
        norm = sum(map(abs, vector))
    else:
        square = sum(part * part for part in vector)
        norm = isqrt(square)
        norm += norm * norm < square
    if norm <= GRID:
        return list(vector)
    return [abs(part) * GRID // norm * (1 if part >= 0 else -1) for part in vector]
