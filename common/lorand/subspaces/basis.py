"""Which columns or rows of each matrix span the subspace of a pool, as integers (numpy).

A matrix of m × n is projected along its smaller side, as in GaLore (Zhao et al., ICML 2024, §4): of
its n columns where m ≥ n, else of its m rows, `rank` span the subspace. For kind `coordinate` they
are the matrix's own, for `dct` those of a cosine transform along that side.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lorand.errors import LedgerError
from lorand.manifest import Manifest, TensorSpec
from lorand.philox import Key, philox4x32

Indices = NDArray[np.int64]
Kind = Literal["coordinate", "dct"]

DRAWN, SIGNS = 3, 4
"""Second word of the counters under a pool's key; 0, 1 and 2 are those of directions."""


def side(spec: TensorSpec) -> int:
    """Return the dimension of a matrix along which it is projected: 1 (columns) or 0 (rows)."""
    rows, columns = spec.shape
    return 1 if rows >= columns else 0


def length(spec: TensorSpec) -> int:
    """Return n, how many columns (or rows) there are to choose from."""
    return spec.shape[side(spec)]


def coordinates_shape(spec: TensorSpec) -> tuple[int, ...]:
    """Return the shape of a tensor's coordinates: (m, r) or (r, n); its own at rank 0."""
    if not spec.rank:
        return spec.shape
    return (spec.shape[0], spec.rank) if side(spec) == 1 else (spec.rank, spec.shape[1])


@dataclass(frozen=True, eq=False)
class Basis:
    """Ascending indices, shape (rank,), of each tensor with a rank, by its number.

    `signs` of a tensor, shape (n,), are ±1 before a cosine transform; none where indices were
    chosen for what they are, so that they stay the same from pool to pool.
    """

    kind: Kind
    indices: Mapping[int, Indices]
    signs: Mapping[int, NDArray[np.int8]] = field(default_factory=dict)

    def with_indices(self, newer: Mapping[int, Indices]) -> "Basis":
        """Return the basis with other indices for some tensors."""
        return Basis(self.kind, {**self.indices, **newer}, self.signs)


def same(one: Basis | None, other: Basis | None) -> bool:
    """Return whether two bases span the same subspaces by the same vectors."""
    if one is None or other is None or one is other:
        return one is other
    return (
        one.kind == other.kind
        and _equal(one.indices, other.indices)
        and _equal(one.signs, other.signs)
    )


def _equal(one: Mapping[int, NDArray[Any]], other: Mapping[int, NDArray[Any]]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[tid], other[tid]) for tid in one)


def drawn(kind: Kind, manifest: Manifest, key: Key) -> Basis:
    """Return the basis that everybody draws for a pool of this key.

    Indices are uniform without replacement, so that E[P Pᵀ] = (r/n)·I and steps in fresh subspaces
    are unbiased but for that factor; so are the signs of a cosine transform's inputs.
    """
    ranked = [(tid, spec) for tid, spec in enumerate(manifest.tensors) if spec.rank]
    indices = {tid: _drawn_of(key, tid, length(spec), spec.rank) for tid, spec in ranked}
    if kind == "coordinate":
        return Basis(kind, indices)
    return Basis(kind, indices, {tid: _signs_of(key, tid, length(spec)) for tid, spec in ranked})


def _drawn_of(key: Key, tid: int, n: int, rank: int) -> Indices:
    """The `rank` columns with the smallest of n 64-bit numbers; ties, if ever, by index."""
    words = philox4x32(key, np.arange((n + 1) // 2, dtype=np.uint32), DRAWN, tid)
    pairs = words.astype(np.uint64).reshape(-1, 2)[:n]
    order = np.argsort(pairs[:, 0] << np.uint64(32) | pairs[:, 1], kind="stable")
    return np.sort(order[:rank]).astype(np.int64)


def _signs_of(key: Key, tid: int, n: int) -> NDArray[np.int8]:
    words = philox4x32(key, np.arange((n + 127) // 128, dtype=np.uint32), SIGNS, tid)
    bits = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")[:n]
    return (1 - 2 * bits.astype(np.int8)).astype(np.int8)


def largest(values: NDArray[Any], rank: int) -> Indices:
    """Return the ascending indices of the `rank` largest numbers; of equal ones the lower index.

    >>> largest(np.array([3, 5, 3, 5, 3]), 3).tolist()
    [0, 1, 3]
    """
    order = np.argsort(-values, kind="stable")
    return np.sort(order[:rank]).astype(np.int64)


def check_indices(spec: TensorSpec, indices: Indices) -> None:
    """Raise LedgerError unless these are `rank` different columns (or rows) of a tensor."""
    fits = indices.shape == (spec.rank,) and spec.rank > 0
    if not fits or indices[0] < 0 or indices[-1] >= length(spec) or np.any(np.diff(indices) <= 0):
        raise LedgerError(
            f"{spec.name!r} has a subspace of {spec.rank} of {length(spec) if spec.rank else 0} "
            f"{'columns' if spec.rank and side(spec) else 'rows'}, each once and ascending; "
            f"these {indices.size} indices are none"
        )


def to_gaps(indices: Indices) -> list[int]:
    """Return ascending indices as the first and the steps to the next, which are small numbers."""
    return [int(gap) for gap in np.diff(indices, prepend=0)]


def from_gaps(gaps: Sequence[int]) -> Indices:
    """Return the indices of their gaps."""
    return np.cumsum(np.asarray(gaps, dtype=np.int64))


@dataclass(frozen=True)
class Layout:
    """Where the coordinates of each tensor lie in the one vector that directions act on.

    They follow one another in the manifest's order, so that up to K of them are in different
    buckets of the pool and Zᵀ is exactly K times the inverse of Z on them (DESIGN §2 step 6).
    """

    manifest: Manifest
    whole: bool = False
    """Directions act on whole tensors, whatever their ranks."""

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each tensor's coordinates."""
        specs = self.manifest.tensors
        return tuple(spec.shape if self.whole else coordinates_shape(spec) for spec in specs)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Where each tensor's coordinates end."""
        return tuple(int(end) for end in np.cumsum([_size(shape) for shape in self.shapes]))

    @property
    def size(self) -> int:
        """q, the number of coordinates."""
        return self.ends[-1]

    def places(self) -> Iterable[tuple[int, TensorSpec, slice, tuple[int, ...]]]:
        """Yield number and spec of each tensor, and the place and shape of its coordinates."""
        starts = (0, *self.ends[:-1])
        for tid, spec in enumerate(self.manifest.tensors):
            yield tid, spec, slice(starts[tid], self.ends[tid]), self.shapes[tid]


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
