"""The kernels on the CPU, compiled by numba: one pass over memory, parallel over 4,096-tiles.

Bit-identical with the reference: no fast-math, so a product is never fused into an add, and the
products are in the table before a weight is touched.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from lorand.coefficients import Coefficients, check_magnitude
from lorand.kernels import Place, check_pair, tiles
from lorand.kernels.reference import ReferenceBackend
from lorand.kernels.selfcheck import Trust
from lorand.kernels.threads import share, threads_for
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
LIMB: Final = 1 << 28

_LIMB_BITS: Final = 28
_SIGNS: Final = 1 - 2 * (np.arange(16) >> np.arange(4).reshape(4, 1) & 1)
_BITS: Final = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
}
"""How weights are named to the compiled code (`simd`)."""
_LIKE: Final = {dtype: torch.empty(0, dtype=bits).numpy() for dtype, bits in _BITS.items()}


def _compiled_before() -> bool:
    return any(Path(tiles.project.stats.cache_path).glob("tiles.project-*.nbi"))


_trust = Trust("CPU", _compiled_before)


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
        bases = [place.base.detach().contiguous() for place in places]
        outs = [place.out.detach().contiguous() for place in places]
        values = [np.ascontiguousarray(table, np.float32) for table in tables]
        size = values[0].size
        counts = np.array([base.numel() for base in bases], np.int64)
        columns = (
            np.array([base.data_ptr() for base in bases], np.int64),
            np.array([out.data_ptr() for out in outs], np.int64),
            counts,
            np.array([place.tid for place in places], np.uint32),
            np.array([values[place.table].ctypes.data for place in places], np.int64),
        )
        chunk = CHUNK if size >= MATERIALISE_BY_CHUNK else 0
        setting = (size, *_words(*key), dtype == torch.bfloat16, chunk, STREAM_BYTES)

        def part(first: int, last: int) -> None:
            tiles.materialise(_LIKE[dtype], *columns, *setting, first, last)

        steps = sum(tiles.walk.py_func(count, size, chunk)[2] for count in counts.tolist())
        share(part, steps, threads_for(int(counts.sum())))
        for place, out in zip(places, outs, strict=True):
            if not place.out.is_contiguous():
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
        array, total, size = _array(gradient), sums.numpy(), sums.numel()
        threads = threads_for(array.size)
        each = 1 << (size // threads).bit_length() - 1  # a power of two, at least one a thread
        chunk = min(CHUNK, each) if size >= PROJECT_BY_CHUNK else 0
        run, blocks, steps = tiles.walk.py_func(array.size, size, chunk)
        apart = threads == 1 or run > 0 or array.size <= size  # no bucket is in two parts
        place = np.uint32(tid), *_words(*key), run, blocks
        lock = threading.Lock()

        def part(first: int, last: int) -> None:
            own = total if apart else np.zeros(size)
            tiles.project(array, own, factor, *place, first, last)
            if not apart:
                with lock:
                    np.add(total, own, out=total)

        share(part, steps, threads, multiple=blocks * run or 1)

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
        source, target = _array(base), _array(out)
        grouped = _grouped(keys, coefficients)
        place = np.uint32(tid), np.float32(2.0**exponent)

        def part(first: int, last: int) -> None:
            tiles.independent(source, target, *grouped, *place, first, last)

        share(part, -(-source.size // tiles.TILE), threads_for(source.size))
        _store(target, out)

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
        total, packed = sums.numpy(), np.array(keys, np.uint32).reshape(-1, 2)
        array = _array(gradient if gradient.dtype in _BITS else gradient.float())

        def part(first: int, last: int) -> None:
            for s in range(first, last):
                total[s] += factor * tiles.project_independent(array, packed[s], np.uint32(tid))

        share(part, len(keys), threads_for(array.size))

    def _trusted(self, family: str, tensor: torch.Tensor) -> bool:
        return _trust.of(self, family, tensor.dtype, tensor.device)


def _grouped(
    keys: Sequence[Key], coefficients: Coefficients
) -> tuple[NDArray[np.uint32], NDArray[np.int32], NDArray[np.int64]]:
    """Groups of four seeds: keys, 16 sums of signs a group, and when int32 totals are moved.

    Coefficients are dealt in digits of LIMB, so that four of them fit into int32. moved[g] ≥ 0:
    after group g the totals go to int64, shifted left so far; −1: they stay.
    """
    packed, rest, shift = np.array(keys, np.uint32).reshape(-1, 2), coefficients, 0
    parts: list[tuple[NDArray[Any], ...]] = []
    while rest.any():
        digits = (rest + LIMB // 2) % LIMB - LIMB // 2
        used = np.flatnonzero(digits)
        groups = -(-len(used) // tiles.GROUP)
        seeds, amounts = np.zeros((groups * 4, 2), np.uint32), np.zeros(groups * 4, np.int64)
        seeds[: len(used)], amounts[: len(used)] = packed[used], digits[used]
        moved = np.full(groups, -1)
        if groups:
            period = max(1, (2**31 - 1) // int(4 * np.abs(amounts).max()))
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


def _words(*words: int) -> tuple[np.uint32, ...]:
    return tuple(np.uint32(word) for word in words)


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's memory in row-major order (a copy where it is ordered otherwise)."""
    flat = tensor.detach().contiguous().reshape(-1)
    array: NDArray[Any] = flat.view(_BITS[flat.dtype]).numpy()
    return array


def _store(target: NDArray[Any], out: torch.Tensor) -> None:
    """Copy back where `_array` had to make a copy of out."""
    if not out.is_contiguous():
        flat = torch.from_numpy(target).view(out.dtype)
        out.detach().copy_(flat.reshape(out.shape))
