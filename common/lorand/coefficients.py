"""The K integers that are the model of a run, and their exact arithmetic (numpy).

A run's weights are w(A) = cast(w0 + u · Σ_k A_k z_k), u = 2^-q. Everything here is integer
arithmetic or a single rounding, so the order of summation, the number of threads and the machine
cannot change a bit.
"""

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lorand.errors import LedgerError

Coefficients = NDArray[np.int64]

MIN_LOG2_SIZE: Final = 6
MAX_LOG2_SIZE: Final = 20
MAGNITUDE_LIMIT: Final = 1 << 62
"""Σ|A| stays below this, so no partial sum of the transform can leave int64."""
MOVE_LIMIT: Final = 1024
"""How far one participant's local steps may move an unscaled weight in a round: u · Σ|ΔA|.

Far above any step that learns, and so far below the other limit that no participant can reach it.
"""


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
    # |-2^63| is right as an unsigned number. A plain sum may wrap: add the 32-bit halves apart.
    magnitude = np.abs(coefficients).view(np.uint64)
    low = int((magnitude & np.uint64(0xFFFFFFFF)).sum())
    high = int((magnitude >> np.uint64(32)).sum())
    return (high << 32) + low


def check_magnitude(coefficients: Coefficients) -> None:
    """Raise LedgerError if Σ|A| ≥ 2^62: a sum inside the transform could then overflow."""
    largest = max(abs(int(coefficients.min())), int(coefficients.max())) if len(coefficients) else 0
    if largest * len(coefficients) >= MAGNITUDE_LIMIT:
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


def quanta(value: float, quantum_exponent: int) -> int:
    """Return value in units of the quantum 2^-q, rounded to the nearest integer."""
    return round(value * 2.0**quantum_exponent)
