"""What an attacker makes of released scalars: linear algebra on public directions.

Z, the K directions as columns, is H with rows repeated and signed (DESIGN §2 step 6): coordinate i
meets the pool in one **bucket** e(i), with one sign D(i). So Zᵀg is the transform of K bucket sums,
and the back-projection Zs is a look-up. Both maps are read off the library's own replica.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, lsqr  # type: ignore[import-untyped]

from experiments import cells
from lorand import codec
from lorand.codec import Codec, Floats
from lorand.directions import Indices, Pool
from lorand.manifest import Manifest
from lorand.replica import CopyReplica
from lorand.transform import fwht, fwht_float

Places = NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """Bucket and factor (sign times direction scale) of each coordinate, both of shape (d,)."""

    size: int
    buckets: NDArray[np.int32]
    factors: NDArray[np.float32]

    @staticmethod
    def of(manifest: Manifest, pool: Pool) -> "View":
        """Read the map off a replica of zeros: A whose transform is e + 1 at e writes it out.

        Exact: H·H·(e + 1) = K·(e + 1), an integer below 2^24 times a power of two.
        """
        assert pool.family == "hadamard"
        tensors = {spec.name: torch.zeros(spec.shape) for spec in manifest.tensors}
        attacker = CopyReplica(tensors, manifest, pool)
        attacker.set(fwht(np.arange(1, pool.size + 1, dtype=np.int64)))
        parts, factors = [], []
        unit = pool.size * 2.0**-pool.quantum_exponent
        for spec, (_, weights) in zip(manifest.tensors, attacker.weights(), strict=True):
            factor = 2.0**spec.scale_exponent
            written = weights.reshape(-1).numpy() / np.float32(unit * factor)
            parts.append((np.abs(written) - 1).astype(np.int32))
            factors.append(np.sign(written) * np.float32(factor))
        return View(pool.size, np.concatenate(parts), np.concatenate(factors))

    @property
    def dimension(self) -> int:
        """d, the number of coordinates."""
        return len(self.buckets)

    def scalars(self, gradient: Floats, indices: Indices, support: Places | None = None) -> Floats:
        """Return z_k·g for k in `indices`; of a gradient on a `support` where one is given."""
        buckets, factors = self._on(support)
        sums: Floats = np.bincount(buckets, gradient * factors, self.size).astype(np.float64)
        return fwht_float(sums)[indices]

    def back(self, values: Floats, indices: Indices, support: Places | None = None) -> Floats:
        """Return Σ_k values_k z_k, on the support: Z s, the transpose of `scalars`."""
        spread = np.zeros(self.size)
        spread[indices] = values
        buckets, factors = self._on(support)
        found: Floats = fwht_float(spread)[buckets] * factors
        return found

    def _on(self, support: Places | None) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        if support is None:
            return self.buckets, self.factors
        return self.buckets[support], self.factors[support]

    def solve(
        self,
        values: Floats,
        indices: Indices,
        support: Places | None = None,
        *,
        expand: tuple[int, Callable[[Floats], Floats], Callable[[Floats], Floats]] | None = None,
        iterations: int = 200,
    ) -> Floats:
        """Return the shortest g on the support with z_k·g = values_k, in least squares (LSQR).

        With `expand` (n, E, Eᵀ) the shortest x of n numbers for g = E x.
        """
        count = self.dimension if support is None else len(support)
        size, forth, back = expand or (count, lambda x: x, lambda g: g)
        operator = LinearOperator(
            (len(indices), size),
            matvec=lambda x: self.scalars(forth(x), indices, support),
            rmatvec=lambda s: back(self.back(s, indices, support)),
            dtype=np.float64,
        )
        found: Floats = lsqr(operator, values, atol=1e-9, btol=1e-9, iter_lim=iterations)[0]
        return found


def coded(name: Codec | None, values: Floats) -> Floats:
    """Return values as codes tell them, at the scale where a run's coordinator holds them.

    None: as measured. The sender is told the scale, and so is everyone.
    """
    if name is None:
        return values
    exponent, before = codec.first_scale_exponent(name), None
    for _ in range(100):
        codes = codec.encode(name, values, exponent)
        after = codec.next_scale_exponent(name, exponent, codes)
        if after in (exponent, before):
            break
        before, exponent = exponent, after
    return codec.decode(name, codec.encode(name, values, exponent), exponent)


def mean_and_error(values: Sequence[float]) -> list[float]:
    """Return mean and standard error, rounded for a results file."""
    return [round(number, 4) for number in cells.mean_and_error(values)]


def relative_error(found: Floats, true: Floats) -> float:
    """Return ‖found − true‖/‖true‖."""
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def cosine(found: Floats, true: Floats) -> float:
    """Return the cosine of two vectors, 0 where one is zero."""
    lengths = float(np.linalg.norm(found) * np.linalg.norm(true))
    return float(found @ true) / lengths if lengths else 0.0


def fitted(found: Floats, true: Floats) -> float:
    """Return the relative error of the estimate at its best length: √(1 − cos²)."""
    return float(np.sqrt(max(0.0, 1 - cosine(found, true) ** 2)))
