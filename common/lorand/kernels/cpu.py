"""The kernels on the CPU, compiled by numba: one pass over memory, parallel over 4,096-tiles.

Bit-identical with the reference: no fast-math, so a product is never fused into an add, and the
products are in the table before a weight is touched. float16 goes through the reference.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit, prange, uint32, uint64
from numpy.typing import NDArray

from lorand.coefficients import Coefficients, Table, check_magnitude
from lorand.kernels import check_pair
from lorand.kernels.reference import ReferenceBackend
from lorand.philox import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1, Key

TILE = 4096

_M0, _M1 = np.uint64(MULTIPLIER_0), np.uint64(MULTIPLIER_1)
_W0, _W1 = np.uint32(WEYL_0), np.uint32(WEYL_1)
_LOW = np.uint64(0xFFFFFFFF)


@njit(inline="always")
def _philox(c0: Any, c1: Any, c2: Any, k0: Any, k1: Any) -> Any:
    x0, x1, x2, x3 = uint32(c0), uint32(c1), uint32(c2), uint32(0)
    for _ in range(ROUNDS):
        p0 = uint64(x0) * _M0
        p1 = uint64(x2) * _M1
        y0 = uint32(uint32(p1 >> uint64(32)) ^ x1 ^ k0)
        y2 = uint32(uint32(p0 >> uint64(32)) ^ x3 ^ k1)
        x0, x1, x2, x3 = y0, uint32(p1 & _LOW), y2, uint32(p0 & _LOW)
        k0, k1 = uint32(k0 + _W0), uint32(k1 + _W1)
    return x0, x1, x2, x3


@njit(cache=True)
def _tile_words(words: Any, tile: Any, tid: Any, k0: Any, k1: Any) -> None:
    """The 128 words of a tile: element e = 128·j + m takes bit j of word m."""
    for block in range(32):
        w0, w1, w2, w3 = _philox(tile * 32 + block, 0, tid, k0, k1)
        words[4 * block] = w0
        words[4 * block + 1] = w1
        words[4 * block + 2] = w2
        words[4 * block + 3] = w3


@njit(cache=True)
def _shift(block: Any, mask: Any, tid: Any, k0: Any, k1: Any) -> Any:
    """r_b: word b mod 4 of counter (b div 4, 1, tid, 0), masked with K − 1."""
    w0, w1, w2, w3 = _philox(block >> 2, 1, tid, k0, k1)
    lane = block & 3
    word = w0 if lane == 0 else (w1 if lane == 1 else (w2 if lane == 2 else w3))
    return np.int64(word) & mask


@njit(cache=True)
def _row_f32(base: Any, out: Any, row: Any, words: Any, j: Any, low: Any) -> None:
    for m in range(base.shape[0]):
        bits = row[np.uint32(m) ^ low]
        flip = uint32(uint32(words[m] >> j) << uint32(31))
        out[m] = base[m] + np.uint32(bits ^ flip).view(np.float32)


@njit(cache=True)
def _row_bf16(base: Any, out: Any, row: Any, words: Any, j: Any, low: Any) -> None:
    for m in range(base.shape[0]):
        bits = row[np.uint32(m) ^ low]
        flip = uint32(uint32(words[m] >> j) << uint32(31))
        wide = np.uint32(uint32(base[m]) << uint32(16)).view(np.float32)
        total = np.float32(wide + np.uint32(bits ^ flip).view(np.float32)).view(np.uint32)
        even = uint32(uint32(total >> uint32(16)) & uint32(1))
        out[m] = np.uint16(uint32(total + uint32(0x7FFF) + even) >> uint32(16))


@njit(parallel=True, cache=True)
def _materialise(base: Any, out: Any, table: Any, tid: Any, k0: Any, k1: Any, wide: Any) -> None:
    size = np.int64(table.shape[0])
    width = min(np.int64(128), size)
    mask = size - 1
    for tile in prange((base.shape[0] + TILE - 1) // TILE):
        words = np.empty(128, np.uint32)
        _tile_words(words, tile, tid, k0, k1)
        start = np.int64(tile) * TILE
        stop = min(start + TILE, base.shape[0])
        block, shift = np.int64(-1), np.int64(0)
        for at in range(start, stop, width):
            if at // size != block:
                block = at // size
                shift = _shift(block, mask, tid, k0, k1)
            end = min(at + width, stop)
            first = (at & mask) ^ (shift & ~(width - 1))
            row = table[first : first + width]
            lane = at & 127
            word = words[lane : lane + end - at]
            j, low = uint32((at - start) >> 7), np.uint32(shift & (width - 1))
            if wide:
                _row_f32(base[at:end], out[at:end], row, word, j, low)
            else:
                _row_bf16(base[at:end], out[at:end], row, word, j, low)


@njit(parallel=True, cache=True)
def _project(gradient: Any, sums: Any, tid: Any, k0: Any, k1: Any) -> None:
    """Add each lane's tiles into its own row of sums, shape (lanes, K)."""
    lanes, size = sums.shape
    width = min(128, size)
    mask = np.int64(size - 1)
    tiles = (gradient.shape[0] + TILE - 1) // TILE
    for worker in prange(lanes):
        words = np.empty(128, np.uint32)
        mine = sums[worker]
        for tile in range(worker * tiles // lanes, (worker + 1) * tiles // lanes):
            _tile_words(words, tile, tid, k0, k1)
            start = np.int64(tile) * TILE
            stop = min(start + TILE, gradient.shape[0])
            for at in range(start, stop, width):
                shift = _shift(at // size, mask, tid, k0, k1)
                end = min(at + width, stop)
                first = (at & mask) ^ (shift & ~np.int64(width - 1))
                row = mine[first : first + width]
                part = gradient[at:end]
                j, low = uint32((at - start) >> 7), np.int64(shift & (width - 1))
                lane = at & 127
                for m in range(end - at):
                    sign = 1.0 - 2.0 * np.float64((words[lane + m] >> j) & uint32(1))
                    row[m ^ low] += sign * part[m]


@njit(parallel=True, cache=True)
def _independent(
    base: Any, out: Any, keys: Any, coefficients: Any, tid: Any, factor: Any, wide: Any
) -> None:
    for tile in prange((base.shape[0] + TILE - 1) // TILE):
        words = np.empty(128, np.uint32)
        total = np.zeros(TILE, np.int64)
        for s in range(keys.shape[0]):
            _tile_words(words, tile, tid, keys[s, 0], keys[s, 1])
            step = coefficients[s]
            for j in range(32):
                row = total[128 * j : 128 * j + 128]
                for m in range(128):
                    negative = np.int64((words[m] >> uint32(j)) & uint32(1))
                    row[m] += (step ^ -negative) + negative
        start = np.int64(tile) * TILE
        for e in range(min(TILE, base.shape[0] - start)):
            move = np.float32(factor * np.float32(total[e]))
            if wide:
                out[start + e] = base[start + e] + move
            else:
                value = np.uint32(uint32(base[start + e]) << uint32(16)).view(np.float32)
                bits = np.float32(value + move).view(np.uint32)
                even = uint32(uint32(bits >> uint32(16)) & uint32(1))
                out[start + e] = np.uint16(uint32(bits + uint32(0x7FFF) + even) >> uint32(16))


@njit(parallel=True, cache=True)
def _project_independent(gradient: Any, keys: Any, sums: Any, tid: Any) -> None:
    for s in prange(keys.shape[0]):
        words = np.empty(128, np.uint32)
        total = 0.0
        for tile in range((gradient.shape[0] + TILE - 1) // TILE):
            _tile_words(words, tile, tid, keys[s, 0], keys[s, 1])
            start = tile * TILE
            for e in range(min(TILE, gradient.shape[0] - start)):
                bit = (words[e & 127] >> uint32(e >> 7)) & uint32(1)
                total += (1.0 - 2.0 * np.float64(bit)) * gradient[start + e]
        sums[s] = total


class CpuBackend(ReferenceBackend):
    """numba on the CPU for float32 and bfloat16."""

    name = "cpu"

    def materialise(
        self, base: torch.Tensor, table: Table, out: torch.Tensor, *, key: Key, tid: int
    ) -> None:
        """See `lorand.kernels.Backend.materialise`."""
        if base.dtype == torch.float16:
            super().materialise(base, table, out, key=key, tid=tid)
            return
        check_pair(base, out)
        if base.numel() == 0:
            return
        target = _array(out)
        _materialise(
            _array(base),
            target,
            table.view(np.uint32),
            *_key(tid, key),
            base.dtype == torch.float32,
        )
        _store(target, out)

    def project(
        self, gradient: torch.Tensor, size: int, *, key: Key, tid: int
    ) -> NDArray[np.float64]:
        """See `lorand.kernels.Backend.project`."""
        sums = np.zeros((torch.get_num_threads(), size))
        if gradient.numel():
            _project(_array(gradient.float()), sums, *_key(tid, key))
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
        if base.dtype == torch.float16 or base.numel() == 0:
            super().materialise_independent(
                base, keys, coefficients, out, tid=tid, exponent=exponent
            )
            return
        check_pair(base, out)
        check_magnitude(coefficients)
        if len(keys) != len(coefficients):
            raise ValueError(f"{len(keys)} keys, but {len(coefficients)} coefficients")
        target = _array(out)
        factor = np.float32(2.0**exponent)
        wide = base.dtype == torch.float32
        packed = np.array(keys, np.uint32).reshape(-1, 2)
        _independent(_array(base), target, packed, coefficients, np.uint32(tid), factor, wide)
        _store(target, out)

    def project_independent(
        self, gradient: torch.Tensor, keys: Sequence[Key], *, tid: int
    ) -> NDArray[np.float64]:
        """See `lorand.kernels.Backend.project_independent`."""
        sums = np.zeros(len(keys))
        packed = np.array(keys, np.uint32).reshape(-1, 2)
        _project_independent(_array(gradient.float()), packed, sums, np.uint32(tid))
        return sums


def _key(tid: int, key: Key) -> tuple[np.uint32, np.uint32, np.uint32]:
    return np.uint32(tid), np.uint32(key[0]), np.uint32(key[1])


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's memory in row-major order (a copy where it is ordered otherwise)."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype == torch.bfloat16:
        flat = flat.view(torch.uint16)
    array: NDArray[Any] = flat.numpy()
    return array


def _store(target: NDArray[Any], out: torch.Tensor) -> None:
    """Copy back where `_array` had to make a copy of out."""
    if not out.is_contiguous():
        flat = torch.from_numpy(target).view(out.dtype)
        out.detach().copy_(flat.reshape(out.shape))
