"""The kernels on the CPU, compiled by numba: one pass over memory, parallel over 4,096-tiles.

Bit-identical with the reference: no fast-math, so a product is never fused into an add, and the
products are in the table before a weight is touched.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from lorand.coefficients import Coefficients, check_magnitude
from lorand.kernels import Place, check_pair, jobs, loops, tiles
from lorand.kernels.reference import ReferenceBackend
from lorand.kernels.selfcheck import Trust
from lorand.philox import Key
from lorand.transform import Table

CHUNK: Final = 1 << 15
"""Places of a table, or buckets, that stay in a core's cache while tiles are walked by chunk."""
MATERIALISE_BY_CHUNK: Final = 1 << 18
"""Pool size from which that pays: a table of 1 MiB."""
PROJECT_BY_CHUNK: Final = 1 << 16
"""The same for bucket sums in float64; threads then need no sums of their own."""
STREAM_BYTES: Final = 1 << 20
"""Size from which weights are written past the cache: they would not stay in it anyway."""
_LIMB_BITS: Final = 28
LIMB: Final = 1 << _LIMB_BITS

_SIGNS: Final = 1 - 2 * (np.arange(16) >> np.arange(4).reshape(4, 1) & 1)
_BITS: Final = {
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
}
"""How weights are named to the compiled code (`simd`)."""


_trust = Trust("CPU", lambda: jobs.compiled_before("loops"))


class CpuBackend(ReferenceBackend):
    """numba on the CPU for float32, bfloat16 and float16."""

    name = "cpu"

    def materialise(
        self, base: torch.Tensor, table: Table, out: torch.Tensor, *, key: Key, tid: int
    ) -> None:
        """See `lorand.kernels.Backend.materialise`."""
        self.materialise_all([Place(base, out, tid, 0)], [table], key=key)

    def materialise_all(
        self, places: Sequence[Place], tables: Sequence[Table], *, key: Key
    ) -> None:
        """See `lorand.kernels.Backend.materialise_all`."""
        alike: dict[torch.dtype, list[Place]] = {}
        for place in places:
            check_pair(place.base, place.out)
            alike.setdefault(place.base.dtype, []).append(place)
        for some in alike.values():
            if self._trusted("hadamard", some[0].base):
                self._materialise_alike(some, tables, key)
            else:
                ReferenceBackend().materialise_all(some, tables, key=key)

    def _materialise_alike(
        self, places: Sequence[Place], tables: Sequence[Table], key: Key
    ) -> None:
        """Tensors of one dtype: a walk through all of them, shared among threads."""
        dtype = places[0].base.dtype
        bases = [_in_order(place.base) for place in places]
        outs = [_in_order(place.out) for place in places]
        values = [np.ascontiguousarray(table, np.float32) for table in tables]
        at, size = [table.ctypes.data for table in values], values[0].size
        chunk = CHUNK if size >= MATERIALISE_BY_CHUNK else 0
        counts = [base.numel() for base in bases]
        job = jobs.Job(
            loops.MATERIALISE,
            tensors=len(places),
            bases=np.array([base.data_ptr() for base in bases], np.int64),
            outs=np.array([out.data_ptr() for out in outs], np.int64),
            counts=np.array(counts, np.int64),
            tids=np.array([place.tid for place in places], np.uint32),
            tables=np.array([at[place.table] for place in places], np.int64),
            size=size,
            chunk=chunk,
            stream=STREAM_BYTES,
            k0=key[0],
            k1=key[1],
            paired=dtype == torch.bfloat16,
        )
        steps = sum(tiles.walk.py_func(count, size, chunk)[2] for count in counts)
        jobs.run(loops.materialise(_BITS[dtype]), job, steps, jobs.threads_for(sum(counts)))
        for place, out in zip(places, outs, strict=True):
            if out is not place.out:
                place.out.detach().copy_(out)

    def project(
        self,
        gradient: torch.Tensor,
        sums: torch.Tensor,
        *,
        key: Key,
        tid: int,
        factor: float = 1.0,
    ) -> None:
        """See `lorand.kernels.Backend.project`."""
        gradient = gradient if gradient.dtype in _BITS else gradient.float()
        if gradient.numel() == 0 or not self._trusted("hadamard", gradient):
            super().project(gradient, sums, key=key, tid=tid, factor=factor)
            return
        source, size = _in_order(gradient), sums.numel()
        threads = jobs.threads_for(source.numel())
        each = 1 << (size // threads).bit_length() - 1  # a power of two, at least one a thread
        chunk = min(CHUNK, each) if size >= PROJECT_BY_CHUNK else 0
        run, blocks, steps = tiles.walk.py_func(source.numel(), size, chunk)
        apart = threads == 1 or run > 0 or source.numel() <= size  # no bucket is in two parts
        total = sums if apart else sums.new_zeros(threads, size)
        job = jobs.Job(
            loops.PROJECT,
            gradient=source,
            count=source.numel(),
            sums=total,
            stride=0 if apart else size,
            size=size,
            run=run,
            blocks=blocks,
            factor=factor,
            tid=tid,
            k0=key[0],
            k1=key[1],
        )
        loop = loops.project(_BITS[source.dtype])
        jobs.run(loop, job, steps, threads, multiple=blocks * run or 1)
        if not apart:
            sums += total.sum(0)

    def materialise_independent(
        self,
        base: torch.Tensor,
        keys: Sequence[Key],
        coefficients: Coefficients,
        out: torch.Tensor,
        *,
        tid: int,
        exponent: int,
    ) -> None:
        """See `lorand.kernels.Backend.materialise_independent`."""
        check_pair(base, out)
        check_magnitude(coefficients)
        if len(keys) != len(coefficients):
            raise ValueError(f"{len(keys)} keys, but {len(coefficients)} coefficients")
        if base.numel() == 0 or not self._trusted("independent", base):
            super().materialise_independent(
                base, keys, coefficients, out, tid=tid, exponent=exponent
            )
            return
        source, target = _in_order(base), _in_order(out)
        seeds, tables, moved = _grouped(tuple(keys), coefficients.astype(np.int64).tobytes())
        job = jobs.Job(
            loops.INDEPENDENT,
            base=source,
            out=target,
            count=source.numel(),
            groups=moved.size,
            keys=seeds,
            tables=tables,
            moved=moved,
            factor=2.0**exponent,
            tid=tid,
        )
        steps, threads = -(-source.numel() // tiles.TILE), jobs.threads_for(source.numel())
        jobs.run(loops.independent(_BITS[source.dtype]), job, steps, threads)
        if target is not out:
            out.detach().copy_(target)

    def project_independent(
        self,
        gradient: torch.Tensor,
        keys: Sequence[Key],
        sums: torch.Tensor,
        *,
        tid: int,
        factor: float = 1.0,
    ) -> None:
        """See `lorand.kernels.Backend.project_independent`."""
        gradient = gradient if gradient.dtype in _BITS else gradient.float()
        if gradient.numel() == 0 or not self._trusted("independent", gradient):
            super().project_independent(gradient, keys, sums, tid=tid, factor=factor)
            return
        source = _in_order(gradient)
        job = jobs.Job(
            loops.PROJECT_INDEPENDENT,
            gradient=source,
            count=source.numel(),
            seeds=len(keys),
            keys=np.array(keys, np.uint32).reshape(-1, 2),
            sums=sums,
            factor=factor,
            tid=tid,
        )
        loop, threads = loops.project_independent(_BITS[source.dtype]), torch.get_num_threads()
        jobs.run(loop, job, len(keys), threads)

    def _trusted(self, family: str, tensor: torch.Tensor) -> bool:
        return _trust.of(self, family, tensor.dtype, tensor.device)


@lru_cache(maxsize=2)
def _grouped(
    keys: tuple[Key, ...], coefficients: bytes
) -> tuple[NDArray[np.uint32], NDArray[np.int32], NDArray[np.int64]]:
    """Groups of eight seeds: keys, 16 sums of signs of each four, and when int32 totals are moved.

    `coefficients` are bytes of int64. They are dealt in digits of LIMB, so that eight of them
    fit into int32. moved[g] ≥ 0:
    after group g the totals go to int64, shifted left so far; −1: they stay.
    """
    packed, shift = np.array(keys, np.uint32).reshape(-1, 2), 0
    rest = np.frombuffer(coefficients, np.int64)
    parts: list[tuple[NDArray[Any], ...]] = []
    while rest.any():
        digits = (rest + LIMB // 2) % LIMB - LIMB // 2
        used = np.flatnonzero(digits)
        groups = -(-len(used) // tiles.GROUP)
        room = groups * tiles.GROUP
        seeds, amounts = np.zeros((room, 2), np.uint32), np.zeros(room, np.int64)
        seeds[: len(used)], amounts[: len(used)] = packed[used], digits[used]
        moved = np.full(groups, -1)
        if groups:
            period = max(1, (2**31 - 1) // int(tiles.GROUP * np.abs(amounts).max()))
            moved[period - 1 :: period] = shift
            moved[-1] = shift
        parts.append((seeds, amounts.reshape(-1, 4) @ _SIGNS, moved))
        rest, shift = (rest - digits) // LIMB, shift + _LIMB_BITS
    if not parts:
        return packed[:0], np.zeros(0, np.int32), np.zeros(0, np.int64)
    seeds, tables, moved = (np.concatenate(column) for column in zip(*parts, strict=True))
    if shift == _LIMB_BITS and np.count_nonzero(moved >= 0) == 1:
        moved[:] = -1  # int32 holds every total
    return seeds, tables.reshape(-1).astype(np.int32), moved


def _in_order(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where its memory is not row-major and without gaps."""
    return tensor if tensor.is_contiguous() else tensor.detach().contiguous()
