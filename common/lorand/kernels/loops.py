"""The loops of `tiles` and `butterflies` as jobs (`jobs.run`), one for each dtype of weights.

A job holds the addresses of its arrays, row-major and without gaps.
"""

from functools import cache
from typing import Any, Final

import numpy as np
from numba import carray, cfunc

from lorand.kernels import tiles
from lorand.kernels.jobs import SIGNATURE, enter, layout, next_part
from lorand.kernels.simd import pointer_to

MATERIALISE: Final = layout(
    tensors=np.int64, bases=np.int64, outs=np.int64, counts=np.int64, tids=np.int64,
    tables=np.int64, size=np.int64, chunk=np.int64, stream=np.int64, k0=np.uint32, k1=np.uint32,
    paired=np.bool_,
)  # fmt: skip
"""bases, outs, counts and tables: addresses of int64 arrays, shape (tensors,); tids of uint32."""
PROJECT: Final = layout(
    gradient=np.int64, count=np.int64, sums=np.int64, stride=np.int64, size=np.int64,
    run=np.int64, blocks=np.int64, factor=np.float64, tid=np.uint32, k0=np.uint32, k1=np.uint32,
)  # fmt: skip
"""Thread n adds to the sums, shape (size,), at n · stride numbers from `sums`."""
INDEPENDENT: Final = layout(
    base=np.int64, out=np.int64, count=np.int64, groups=np.int64, keys=np.int64, tables=np.int64,
    moved=np.int64, factor=np.float32, tid=np.uint32,
)  # fmt: skip
PROJECT_INDEPENDENT: Final = layout(
    gradient=np.int64, count=np.int64, seeds=np.int64, keys=np.int64, sums=np.int64,
    factor=np.float64, tid=np.uint32,
)  # fmt: skip


@cache
def materialise(dtype: Any, stored: bool = True) -> Any:
    """Return `tiles.materialise` for weights of a numpy dtype (`simd`); stored: as machine code."""

    @cfunc(SIGNATURE, cache=stored)
    def loop(address: Any) -> None:
        job = carray(pointer_to(address), (1,), MATERIALISE)[0]
        shape = (job.tensors,)
        bases = carray(pointer_to(job.bases), shape, np.int64)
        outs = carray(pointer_to(job.outs), shape, np.int64)
        counts = carray(pointer_to(job.counts), shape, np.int64)
        tids = carray(pointer_to(job.tids), shape, np.uint32)
        tables = carray(pointer_to(job.tables), shape, np.int64)
        like = carray(pointer_to(address), (1,), dtype)
        first, last = next_part(address, job)
        while first >= 0:
            tiles.materialise(
                like, bases, outs, counts, tids, tables, job.size, job.k0, job.k1, job.paired,
                job.chunk, job.stream, first, last,
            )  # fmt: skip
            first, last = next_part(address, job)

    return loop


@cache
def project(dtype: Any, stored: bool = True) -> Any:
    """Return `tiles.project` for gradients of a numpy dtype."""

    @cfunc(SIGNATURE, cache=stored)
    def loop(address: Any) -> None:
        job = carray(pointer_to(address), (1,), PROJECT)[0]
        gradient = carray(pointer_to(job.gradient), (job.count,), dtype)
        place = job.sums + enter(address) * job.stride * 8
        sums = carray(pointer_to(place), (job.size,), np.float64)
        first, last = next_part(address, job)
        while first >= 0:
            tiles.project(
                gradient, sums, job.factor, job.tid, job.k0, job.k1, job.run, job.blocks, first,
                last,
            )  # fmt: skip
            first, last = next_part(address, job)

    return loop


@cache
def independent(dtype: Any, stored: bool = True) -> Any:
    """Return `tiles.independent` for weights of a numpy dtype."""

    @cfunc(SIGNATURE, cache=stored)
    def loop(address: Any) -> None:
        job = carray(pointer_to(address), (1,), INDEPENDENT)[0]
        base = carray(pointer_to(job.base), (job.count,), dtype)
        out = carray(pointer_to(job.out), (job.count,), dtype)
        keys = carray(pointer_to(job.keys), (tiles.GROUP * job.groups, 2), np.uint32)
        tables = carray(pointer_to(job.tables), (32 * job.groups,), np.int32)
        moved = carray(pointer_to(job.moved), (job.groups,), np.int64)
        first, last = next_part(address, job)
        while first >= 0:
            tiles.independent(base, out, keys, tables, moved, job.tid, job.factor, first, last)
            first, last = next_part(address, job)

    return loop


@cache
def project_independent(dtype: Any, stored: bool = True) -> Any:
    """Return `tiles.project_independent` for gradients of a numpy dtype; a step is a seed."""

    @cfunc(SIGNATURE, cache=stored)
    def loop(address: Any) -> None:
        job = carray(pointer_to(address), (1,), PROJECT_INDEPENDENT)[0]
        gradient = carray(pointer_to(job.gradient), (job.count,), dtype)
        keys = carray(pointer_to(job.keys), (job.seeds, 2), np.uint32)
        sums = carray(pointer_to(job.sums), (job.seeds,), np.float64)
        first, last = next_part(address, job)
        while first >= 0:
            for s in range(first, last):
                sums[s] += job.factor * tiles.project_independent(gradient, keys[s], job.tid)
            first, last = next_part(address, job)

    return loop
