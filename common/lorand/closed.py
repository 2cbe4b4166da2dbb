"""The seed pools that a run has left behind, of which only what is not zero is kept."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorand.coefficients import Coefficients, zeros

Narrow = NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True)
class Sparse:
    """Coefficients that are not zero, at their ascending indices, in 32 bits where they fit.

    Raises ValueError for arrays that are not the coefficients of a pool.
    """

    indices: NDArray[np.int32]
    values: Narrow

    def __post_init__(self) -> None:
        """Check what a file may hold."""
        if self.indices.shape != self.values.shape or self.indices.ndim != 1:
            raise ValueError("a closed pool has one index a coefficient")
        if self.indices.size and (self.indices[0] < 0 or np.any(np.diff(self.indices) <= 0)):
            raise ValueError("the indices of a closed pool ascend from 0")

    @staticmethod
    def of(coefficients: Coefficients) -> "Sparse":
        """Return what is not zero of A, shape (K,)."""
        indices = np.flatnonzero(coefficients).astype(np.int32)
        return Sparse(indices, narrow(coefficients[indices]))

    def dense(self, size: int) -> Coefficients:
        """Return A, shape (size,). Raises ValueError when an index is outside of it."""
        if self.indices.size and int(self.indices[-1]) >= size:
            raise ValueError(f"a closed pool has an index {int(self.indices[-1])} of {size}")
        result = zeros(size)
        result[self.indices] = self.values
        return result


def narrow(values: Coefficients) -> Narrow:
    """Return integers in 32 bits where all of them fit."""
    fits = bool(np.all(np.abs(values) < 2**31))
    return values.astype(np.int32) if fits else values


class Closed:
    """Pools in the order in which a run left them; a value that is never changed.

    Histories that continue one another share their memory, so that another pool costs O(1) also
    where each round has its own.

    >>> first = Closed().then(Sparse.of(zeros(64)))
    >>> len(first), len(first.then(first[0])), len(first)
    (1, 2, 1)
    """

    def __init__(self, pools: Iterable[Sparse] = ()) -> None:
        """Take them in order."""
        self._shared = list(pools)
        self._count = len(self._shared)

    def then(self, pool: Sparse) -> "Closed":
        """Return these pools and another one."""
        if len(self._shared) != self._count:  # continued elsewhere already
            return Closed([*self, pool])
        longer = Closed()
        longer._shared, longer._count = self._shared, self._count + 1
        self._shared.append(pool)
        return longer

    def __len__(self) -> int:
        """How many pools were left."""
        return self._count

    def __getitem__(self, number: int) -> Sparse:
        """Return the pool of a number from 0."""
        if not 0 <= number < self._count:
            raise IndexError(number)
        return self._shared[number]

    def __iter__(self) -> Iterator[Sparse]:
        """Yield them in order."""
        return (self._shared[number] for number in range(self._count))

    def __eq__(self, other: Any) -> bool:
        """Whether another run of pools holds the same numbers."""
        return (
            isinstance(other, Closed)
            and len(self) == len(other)
            and all(
                np.array_equal(ours.indices, theirs.indices)
                and np.array_equal(ours.values, theirs.values)
                for ours, theirs in zip(self, other, strict=True)
            )
        )

    __hash__ = None  # type: ignore[assignment]
