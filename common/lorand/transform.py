"""From coefficients to what is added to a weight: the Walsh–Hadamard transform and its tables.

For workers: large transforms are compiled where numba is installed. Exact in int64, so that the
order of the additions cannot change a bit.
"""

import logging
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from lorand.coefficients import Coefficients, check_magnitude

Table = NDArray[np.float32]

COMPILED: Final = 1 << 12
"""Pool size from which the compiled transform pays: below, numpy needs less than 0.1 ms."""

log = logging.getLogger("lorand.kernels")


def fwht(coefficients: Coefficients) -> Coefficients:
    """Return F = H·A, the Walsh–Hadamard transform in natural order, exactly in int64.

    F[e] = Σ_k A_k (−1)^popcount(e & k). Raises LedgerError when Σ|A| ≥ 2^62.

    >>> fwht(np.eye(1, 64, 1, dtype=np.int64)[0])[:4].tolist()
    [1, -1, 1, -1]
    """
    check_magnitude(coefficients)
    return _transformed(coefficients)


def fwht_float(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the same transform of float64 values (senders only: not bit-exact)."""
    return _transformed(values)


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


def _transformed(values: _Array) -> _Array:
    result = values.copy()
    compiled = _compiled() if values.shape[0] >= COMPILED else None
    (compiled or _butterfly)(result)
    return result


def _butterfly(values: Any) -> None:
    """Level by level, in place: the definition."""
    size = values.shape[0]
    half = 1
    while half < size:
        pairs = values.reshape(-1, 2, half)
        upper, lower = pairs[:, 0], pairs[:, 1]
        difference = upper - lower
        upper += lower
        lower[...] = difference
        half *= 2


@cache
def _compiled() -> Callable[[Any], None] | None:
    """The compiled transform, once it has agreed with the definition in this process."""
    try:
        from lorand.kernels import butterflies
    except ImportError:  # numba is optional
        return None
    if not butterflies.compiled_before():
        log.info("compiling the transform: some seconds, once on this machine")
    for dtype, size in product((np.int64, np.float64), (COMPILED, 1 << 16)):
        values = (np.arange(size) * 37 % 1009).astype(dtype)
        expected = values.copy()
        _butterfly(expected)
        butterflies.transform(values)
        if not np.array_equal(values, expected):
            log.error(
                "the compiled transform does not agree with numpy's, which is used instead. Delete"
                " the cache of compiled code (NUMBA_CACHE_DIR or lorand/kernels/__pycache__) and"
                " start again; please report it if it remains"
            )
            return None
    return butterflies.transform


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
