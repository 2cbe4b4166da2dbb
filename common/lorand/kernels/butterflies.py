"""The compiled Walsh–Hadamard transform, in pieces that stay in a core's cache.

The levels of the transform may be computed in any order. Seen as rows of 2^14 numbers (128 KB),
the lower levels stay within a row, the upper ones within a strip of columns: two passes over
memory, where a level at a time makes twenty for K = 2^20.
"""

from functools import cache
from typing import Any, Final

import numpy as np
from numba import carray, cfunc, njit

from lorand.kernels import jobs
from lorand.kernels.jobs import SIGNATURE, layout, next_part
from lorand.kernels.simd import pointer_to

ROW: Final = 1 << 14
STRIP: Final = 64

_JOB: Final = layout(values=np.int64, size=np.int64)


@njit
def _pair(one: Any, two: Any) -> None:
    for i in range(one.shape[0]):
        a, b = one[i], two[i]
        one[i], two[i] = a + b, a - b


@njit
def _four(one: Any, two: Any, three: Any, four: Any) -> None:
    """Two levels at once: half the trips to the cache."""
    for i in range(one.shape[0]):
        a, b = one[i] + two[i], one[i] - two[i]
        c, d = three[i] + four[i], three[i] - four[i]
        one[i], two[i], three[i], four[i] = a + c, b + d, a - c, b - d


@njit
def _eights(values: Any) -> None:
    """The three lowest levels."""
    for i in range(0, values.shape[0], 8):
        a, b = values[i] + values[i + 1], values[i] - values[i + 1]
        c, d = values[i + 2] + values[i + 3], values[i + 2] - values[i + 3]
        e, f = values[i + 4] + values[i + 5], values[i + 4] - values[i + 5]
        g, h = values[i + 6] + values[i + 7], values[i + 6] - values[i + 7]
        a, b, c, d = a + c, b + d, a - c, b - d
        e, f, g, h = e + g, f + h, e - g, f - h
        values[i], values[i + 1], values[i + 2], values[i + 3] = a + e, b + f, c + g, d + h
        values[i + 4], values[i + 5], values[i + 6], values[i + 7] = a - e, b - f, c - g, d - h


@njit
def _within_rows(values: Any, first: Any, last: Any) -> None:
    size = min(ROW, values.shape[0])
    for r in range(first, last):
        row = values[r * size : (r + 1) * size]
        _eights(row)
        half = 8
        while 4 * half <= size:
            for at in range(0, size, 4 * half):
                two, three, four = at + half, at + 2 * half, at + 3 * half
                _four(row[at:two], row[two:three], row[three:four], row[four : four + half])
            half *= 4
        if half < size:
            _pair(row[:half], row[half:])


@njit
def _within_strips(values: Any, first: Any, last: Any) -> None:
    rows = values.shape[0] // ROW
    for strip in range(first, last):
        half = 1
        while half < rows:
            for top in range(0, rows, 2 * half):
                for row in range(top, top + half):
                    one = row * ROW + strip * STRIP
                    two = one + half * ROW
                    _pair(values[one : one + STRIP], values[two : two + STRIP])
            half *= 2


@cache
def _loops(dtype: Any) -> Any:
    """Both passes, compiled for numbers of a numpy dtype."""

    @cfunc(SIGNATURE, cache=True)
    def rows(address: Any) -> None:
        job = carray(pointer_to(address), (1,), _JOB)[0]
        values = carray(pointer_to(job.values), (job.size,), dtype)
        first, last = next_part(address, job)
        while first >= 0:
            _within_rows(values, first, last)
            first, last = next_part(address, job)

    @cfunc(SIGNATURE, cache=True)
    def strips(address: Any) -> None:
        job = carray(pointer_to(address), (1,), _JOB)[0]
        values = carray(pointer_to(job.values), (job.size,), dtype)
        first, last = next_part(address, job)
        while first >= 0:
            _within_strips(values, first, last)
            first, last = next_part(address, job)

    return rows, strips


def compiled_before() -> bool:
    """Whether the loops, compiled by an earlier process, are at hand."""
    return jobs.compiled_before("butterflies")


def transform(values: Any) -> None:
    """Replace int64 or float64 values, shape (K,), by H·values."""
    size = values.shape[0]
    rows, strips = _loops(values.dtype.type)
    passes = [(rows, max(1, size // ROW))] + [(strips, ROW // STRIP)] * (size > ROW)
    for loop, steps in passes:
        job = jobs.Job(_JOB, values=values, size=size)
        jobs.run(loop, job, steps, jobs.threads_for(size))
