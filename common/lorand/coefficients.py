"""The K integers that are the model of a run, and their exact arithmetic (numpy).

A run's weights are w(A) = cast(w0 + u · Σ_k A_k z_k), u = 2^-q. Everything here is integer
arithmetic or a single rounding, so the order of summation, the number of threads and the machine
cannot change a bit.
"""

from collections.abc import Iterable
from typing import Final, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lorand.errors import LedgerError

Coefficients = NDArray[np.int64]
Table = NDArray[np.float32]

MIN_LOG2_SIZE: Final = 6
MAX_LOG2_SIZE: Final = 20
MAGNITUDE_LIMIT: Final = 1 << 62
"""Σ|A| stays below this, so no partial sum of the transform can leave int64."""


def zeros(size: int) -> Coefficients:
    """Return the coefficients of an untrained run.

    Raises ValueError unless size is a power of two in 2^6 … 2^20.
    """
    check_size(size)
    return np.zeros(size, np.int64)


def check_size(size: int) -> None:
    """Raise ValueError unless size is a power of two in 2^6 … 2^20."""
    if size not in [1 << log2 for log2 in range(MIN_LOG2_SIZE, MAX_LOG2_SIZE + 1)]:
        raise ValueError(f"the pool size must be a power of two from 64 to 1048576, not {size}")


def total_magnitude(coefficients: Coefficients) -> int:
    """Return Σ|A| without overflow (Python integers of partial sums)."""
    # np.abs(-2^63) is negative and a plain sum may wrap: add the two 32-bit halves apart.
    magnitude = np.where(coefficients < 0, -(coefficients + 1), coefficients).astype(np.uint64)
    low = int((magnitude & np.uint64(0xFFFFFFFF)).sum())
    high = int((magnitude >> np.uint64(32)).sum())
    return (high << 32) + low + int(np.count_nonzero(coefficients < 0))


def check_magnitude(coefficients: Coefficients) -> None:
    """Raise LedgerError if Σ|A| ≥ 2^62: a sum inside the transform could then overflow."""
    check_total(total_magnitude(coefficients))


def check_total(total: int) -> None:
    """Raise LedgerError unless a Σ|A| of `total` is below 2^62."""
    if total >= MAGNITUDE_LIMIT:
        raise LedgerError(
            f"the coefficients have grown to a total of {total:.3e} quanta, above the limit 2^62;"
            " lower the learning rate or quantum_exponent and start a new run"
        )


def add(coefficients: Coefficients, indices: ArrayLike, delta: Coefficients) -> Coefficients:
    """Return A with delta[i] added at indices[i] (distinct), checked against the limit.

    Raises LedgerError when the sum could overflow later.
    """
    check_magnitude(delta)
    result = coefficients.copy()
    result[np.asarray(indices, dtype=np.intp)] += delta
    check_magnitude(result)
    return result


def fwht(coefficients: Coefficients) -> Coefficients:
    """Return F = H·A, the Walsh–Hadamard transform in natural order, exactly in int64.

    F[e] = Σ_k A_k (−1)^popcount(e & k). Raises LedgerError when Σ|A| ≥ 2^62.

    >>> fwht(np.eye(1, 64, 1, dtype=np.int64)[0])[:4].tolist()
    [1, -1, 1, -1]
    """
    check_magnitude(coefficients)
    return _butterfly(coefficients.copy())


def fwht_float(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the same transform of float64 values (senders only: not bit-exact)."""
    return _butterfly(values.copy())


def hadamard_column(index: int, size: int) -> Coefficients:
    """Return H[:, index], shape (size,): (−1)^popcount(e & index) for e in [0, size).

    F + c·H[:, index] is the transform of A + c·e_index, so a perturbation needs no second fwht.

    >>> hadamard_column(3, 64)[:4].tolist()
    [1, -1, -1, 1]
    """
    column = np.empty(size, np.int64)
    column[0] = 1
    half = 1
    while half < size:
        np.multiply(column[:half], -1 if index & half else 1, out=column[half : 2 * half])
        half *= 2
    return column


_Array = TypeVar("_Array", NDArray[np.int64], NDArray[np.float64])


def _butterfly(values: _Array) -> _Array:
    size = values.shape[0]
    half = 1
    while half < size:
        pairs = values.reshape(-1, 2, half)
        upper, lower = pairs[:, 0], pairs[:, 1]
        difference = upper - lower
        upper += lower
        lower[...] = difference
        half *= 2
    return values


def table(transform: Coefficients, quantum_exponent: int, scale_exponent: int) -> Table:
    """Return T[e] = fl32(2^(s−q) · fl32(F[e])): what is added to (or taken from) a weight.

    A power of two only moves the exponent, so fl32(F) is the single rounding.
    Shape (K,); quantum_exponent is q, scale_exponent the tensor's direction scale s.
    """
    return tables(transform, quantum_exponent, [scale_exponent])[scale_exponent]


def tables(
    transform: Coefficients, quantum_exponent: int, scale_exponents: Iterable[int]
) -> dict[int, Table]:
    """Return the table of each direction scale: F is rounded once for all of them."""
    rounded = transform.astype(np.float32)
    return {s: rounded * np.float32(2.0 ** (s - quantum_exponent)) for s in scale_exponents}


def quanta(value: float, quantum_exponent: int) -> int:
    """Return value in units of the quantum 2^-q, rounded to the nearest integer."""
    return round(value * 2.0**quantum_exponent)
