"""The kernels on the CPU, compiled by numba: one pass over memory, parallel over 4,096-tiles.

Bit-identical with the reference: no fast-math, so a product is never fused into an add, and the
products are in the table before a weight is touched.
"""

from collections.abc import Sequence
from typing import Any, Final

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from lorand.coefficients import Coefficients, Table, check_magnitude
from lorand.kernels import check_pair, tiles
from lorand.kernels.reference import ReferenceBackend
from lorand.kernels.simd import STREAM_ALIGN
from lorand.philox import Key

BY_CHUNK: Final = 1 << 17
"""Pool size from which tiles are walked by chunk of the table (`tiles._tile_of`)."""
PARALLEL: Final = 1 << 16
"""Weights from which threads pay: starting them costs as much as ten thousand weights."""
STREAM_BYTES: Final = 1 << 20
"""Size from which weights are written past the cache: they would not stay in it anyway."""
PARTS: Final = 4
"""Parts a thread: a core that is taken away for a while holds up a quarter of the work."""
LIMB: Final = 1 << 28

_LIMB_BITS: Final = 28
_SIGNS: Final = 1 - 2 * (np.arange(16) >> np.arange(4).reshape(4, 1) & 1)
_BITS: Final = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""How 16-bit weights are named to the compiled code (`simd`)."""


class CpuBackend(ReferenceBackend):
    """numba on the CPU for float32, bfloat16 and float16."""

    name = "cpu"

    def materialise(
        self, base: torch.Tensor, table: Table, out: torch.Tensor, *, key: Key, tid: int
    ) -> None:
        """See `lorand.kernels.Backend.materialise`."""
        check_pair(base, out)
        if base.numel() == 0:
            return
        source, target = _array(base), _array(out)
        stream = (
            source.nbytes >= STREAM_BYTES
            and target.ctypes.data % STREAM_ALIGN == 0
            and target.ctypes.data != source.ctypes.data
        )
        paired = base.dtype == torch.bfloat16
        walk = _walk(source.size, table.size)
        values = np.ascontiguousarray(table, np.float32).view(np.uint32)
        arguments = (source, target, values, *_key(tid, key), paired, stream, *walk)
        parts = _parts(source.size)
        if parts == 1:
            tiles.materialise(*arguments)
        else:
            tiles.materialise_parallel(*arguments, parts)
        _store(target, out)

    def project(
        self, gradient: torch.Tensor, size: int, *, key: Key, tid: int
    ) -> NDArray[np.float64]:
        """See `lorand.kernels.Backend.project`."""
        array = _array(gradient)
        sums = np.zeros((1 if array.size < PARALLEL else numba.get_num_threads(), size))
        if array.size:
            tiles.project(array, sums, *_key(tid, key), *_walk(array.size, size))
        total: NDArray[np.float64] = sums.sum(axis=0)
        return total

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
        if base.numel() == 0:
            return
        target = _array(out)
        tiles.independent(
            _array(base),
            target,
            *_grouped(keys, coefficients),
            np.uint32(tid),
            np.float32(2.0**exponent),
            _parts(target.size),
        )
        _store(target, out)

    def project_independent(
        self, gradient: torch.Tensor, keys: Sequence[Key], *, tid: int
    ) -> NDArray[np.float64]:
        """See `lorand.kernels.Backend.project_independent`."""
        sums = np.zeros(len(keys))
        packed = np.array(keys, np.uint32).reshape(-1, 2)
        tiles.project_independent(_array(gradient), packed, sums, np.uint32(tid))
        return sums


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


def _walk(count: int, size: int) -> tuple[int, int]:
    """Blocks and steps of a walk over tiles: see `tiles._tile_of`."""
    steps = -(-count // tiles.TILE)
    if size < BY_CHUNK or count <= size:
        return 1, steps
    chunks = size // tiles.TILE
    blocks = -(-steps // chunks)
    return blocks, blocks * chunks


def _parts(count: int) -> int:
    threads = numba.get_num_threads()
    return 1 if threads == 1 or count < PARALLEL else PARTS * threads


def _key(tid: int, key: Key) -> tuple[np.uint32, np.uint32, np.uint32]:
    return np.uint32(tid), np.uint32(key[0]), np.uint32(key[1])


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's memory in row-major order (a copy where it is ordered otherwise)."""
    flat = tensor.detach().contiguous().reshape(-1)
    bits = _BITS.get(flat.dtype)
    array: NDArray[Any] = (flat if bits is None else flat.view(bits)).numpy()
    return array


def _store(target: NDArray[Any], out: torch.Tensor) -> None:
    """Copy back where `_array` had to make a copy of out."""
    if not out.is_contiguous():
        flat = torch.from_numpy(target).view(out.dtype)
        out.detach().copy_(flat.reshape(out.shape))
