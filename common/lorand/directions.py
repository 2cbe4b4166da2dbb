"""Which directions exist in a run and which a round measures (numpy).

Nobody picks a direction: the pool's key is a digest of the base model and the trainable set, and
the indices of a round come from a generator keyed with the run, the round and the worker. Indices
are recomputed everywhere and never sent.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from lorand.coefficients import check_size
from lorand.philox import Key, philox4x32
from lorand.subspaces.basis import Basis

Family = Literal["hadamard", "independent"]
Drawing = Literal["uniform", "weighted", "weighted-unbiased"]
Indices = NDArray[np.int64]
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

SHARED: Final = b"shared"


@dataclass(frozen=True)
class Pool:
    """K directions: family, key and size, and the quantum 2^-q of their coefficients.

    `index` counts the pools of a run, from 0. They act on whole tensors, or in the subspaces that a
    `basis` spans (`lorand.subspaces`). Raises ValueError when size is not a power of two in
    2^6 … 2^20.
    """

    key: Key
    size: int
    quantum_exponent: int
    family: Family = "hadamard"
    index: int = 0
    basis: Basis | None = None

    def __post_init__(self) -> None:
        """Check the size."""
        check_size(self.size)


def pool_key(base_digest: bytes, manifest_digest: bytes, pool_index: int) -> Key:
    """Return the Philox key of a pool (DESIGN §2 step 2).

    Both digests are 32 bytes. Runs on one base and one trainable set share their pools.
    """
    if len(base_digest) != 32 or len(manifest_digest) != 32:
        raise ValueError("the base-model digest and the manifest digest are 32 bytes each")
    digest = hashlib.sha256(
        b"lorand/pool/v1" + base_digest + manifest_digest + pool_index.to_bytes(4, "little")
    ).digest()
    return _key_of(digest)


def seed_keys(pool: Pool) -> list[Key]:
    """Return the K Philox keys of an `independent` pool: one 64-bit seed a direction."""
    counters = np.arange((pool.size + 1) // 2, dtype=np.uint32)
    words = philox4x32(pool.key, counters, 2).reshape(-1, 2)[: pool.size]
    return [(int(a), int(b)) for a, b in words]


def draw(run_digest: bytes, round_index: int, who: bytes, size: int, count: int) -> Indices:
    """Return `count` distinct direction indices in [0, size), uniformly without replacement.

    `who` is SHARED when all participants measure the same directions, else the worker's number
    as four little-endian bytes. When count equals size the whole pool is returned in order: a
    first-order participant reports every scalar.

    The generator is Philox keyed with SHA-256(run digest ‖ round ‖ who); size is a power of two,
    so masking a word is unbiased, and repeats are skipped.
    """
    if not 0 < count <= size:
        raise ValueError(f"a round measures 1 to {size} directions, not {count}")
    if count == size:
        return np.arange(size, dtype=np.int64)
    key = _round_key(run_digest, round_index, who)

    def candidates(block: int) -> Indices:
        counters = np.arange(block, block + count, dtype=np.uint32)
        return (philox4x32(key, counters).ravel() & np.uint32(size - 1)).astype(np.int64)

    return _distinct(candidates, count)


def draw_weighted(
    run_digest: bytes, round_index: int, who: bytes, weights: Integers, count: int
) -> Indices:
    """Return `count` distinct indices, drawn one after another in proportion to `weights`.

    weights: positive integers, shape (K,), of a sum below 2^53, so that every machine draws the
    same. An index that was drawn already is drawn again. Otherwise as `draw`.
    """
    size = len(weights)
    if count == size:
        return np.arange(size, dtype=np.int64)
    key = _round_key(run_digest, round_index, who)
    ends = np.cumsum(weights).astype(np.uint64)

    def candidates(block: int) -> Indices:
        counters = np.arange(block, block + count, dtype=np.uint32)
        words = philox4x32(key, counters).astype(np.uint64).reshape(-1, 2)
        at = (words[:, 0] << np.uint64(32) | words[:, 1]) % ends[-1]
        found: Indices = np.searchsorted(ends, at, side="right").astype(np.int64)
        return found

    return _distinct(candidates, count)


def _distinct(candidates: Callable[[int], Indices], count: int) -> Indices:
    """The first `count` different ones of candidates(0), candidates(count), …"""
    seen: dict[int, None] = {}
    block = 0
    while len(seen) < count:
        for index in candidates(block).tolist():
            seen.setdefault(index)
            if len(seen) == count:
                break
        block += count
    return np.fromiter(seen, dtype=np.int64, count=count)


@dataclass(frozen=True)
class Activity:
    """How much each direction has moved the model: the sum of |ΔA| and the commits, shape (K,)."""

    sums: Integers
    visits: Integers

    @staticmethod
    def none(size: int) -> "Activity":
        """Return that of a run that has not begun; as in FedKSeed's code each history holds a 0."""
        return Activity(np.zeros(size, np.int64), np.ones(size, np.int64))

    def after(self, indices: Indices, change: Integers) -> "Activity":
        """Return the activity after a commit of ΔA = `change` at `indices`."""
        sums, visits = self.sums.copy(), self.visits.copy()
        sums[indices] += np.minimum(np.abs(change), LARGEST_ACTIVITY)
        visits[indices] += 1
        return Activity(sums, visits)

    def weights(self) -> Integers:
        """Return FedKSeed-Pro's probabilities in units of 2^-20, times a constant; shape (K,).

        softmax((ψ − min ψ) / (max ψ − min ψ)) of the mean magnitudes ψ (Qin et al., ICML 2024,
        eq. 6 and 7), so that the likeliest is e times as likely as the least. ψ is taken of what
        the ledger commits: all participants have it, in the same bits.
        """
        mean = self.sums / self.visits
        low, high = mean.min(), mean.max()
        if low == high:
            return np.full(len(mean), WEIGHT_ONE, np.int64)
        return np.rint(_exp((mean - low) / (high - low)) * WEIGHT_ONE).astype(np.int64)


LARGEST_ACTIVITY: Final = 1 << 40
"""|ΔA| counts up to this, so that a million commits sum in 64 bits."""
WEIGHT_ONE: Final = 1 << 20


def _exp(x: Floats) -> Floats:
    """exp on [0, 1] by its series: additions and products alone, the same bits on every machine."""
    total = np.ones_like(x)
    for n in range(20, 0, -1):
        total = 1.0 + total * (x / n)
    return total


@dataclass(frozen=True)
class Draws:
    """The directions of a run's rounds, recomputed by everyone and never sent.

    `mode` says whether all participants measure the same `count` of `size` directions or each
    its own. Weighted ones follow the `activity`, which a commit moves on.
    """

    run_digest: bytes
    mode: Literal["shared", "own"]
    size: int
    count: int
    drawing: Drawing = "uniform"
    activity: Activity | None = field(default=None, compare=False)

    def after(self, indices: Indices, change: Integers) -> "Draws":
        """Return the draws after a commit of ΔA = `change` at `indices`."""
        if self.drawing == "uniform":
            return self
        activity = self.activity or Activity.none(self.size)
        return replace(self, activity=activity.after(indices, change))

    def of(self, round_index: int, worker: int, count: int = 0) -> Indices:
        """Return the directions that a worker measures in a round, shape (count,).

        `count` is given where it is another than usual: more of the same draw.
        """
        who = SHARED if self.mode == "shared" else worker.to_bytes(4, "little")
        count = count or self.count
        if self.drawing == "uniform":
            return draw(self.run_digest, round_index, who, self.size, count)
        return draw_weighted(self.run_digest, round_index, who, self._weights, count)

    def importance(self, indices: Indices) -> Floats:
        """Return the factors on these directions' scalars, 1/(K·p) for `weighted-unbiased`, else 1.

        With them the mean of scalars over a weighted draw estimates the mean over the pool
        (Hansen and Hurwitz, 1943; exactly so where drawn with replacement).
        """
        if self.drawing != "weighted-unbiased":
            return np.ones(len(indices))
        weights = self._weights
        factors: Floats = weights.sum() / (self.size * weights[indices])
        return factors

    @cached_property
    def _weights(self) -> Integers:
        return (self.activity or Activity.none(self.size)).weights()

    def committed(self, round_index: int, workers: tuple[int, ...], count: int = 0) -> Indices:
        """Return the distinct directions that a commit moves, in the order of its codes.

        Shared: the round's one draw, of `count` where that is another than usual. Own: the draws of
        the workers, in ascending order of their numbers, repeats left out.
        """
        if self.mode == "shared":
            return self.of(round_index, 0, count)
        drawn = np.concatenate([self.of(round_index, worker) for worker in sorted(workers)])
        return np.fromiter(dict.fromkeys(drawn.tolist()), dtype=np.int64)


def _round_key(run_digest: bytes, round_index: int, who: bytes) -> Key:
    return _key_of(hashlib.sha256(run_digest + round_index.to_bytes(4, "little") + who).digest())


def _key_of(digest: bytes) -> Key:
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
