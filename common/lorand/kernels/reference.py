"""The definition of both kernels in plain torch, in chunks, on any device torch knows."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lorand.coefficients import Coefficients, check_magnitude
from lorand.kernels import Place, check_pair
from lorand.philox import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1, Key
from lorand.transform import Table

CHUNK = 1 << 16
"""Elements a step: a multiple of the 4,096-element sign tile; keeps temporaries in cache."""

_LOW = 0xFFFFFFFF


def philox(
    key: Key, c0: torch.Tensor, c1: int, c2: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 of the counters (c0, c1, c2, 0); int64 tensors that hold 32-bit words."""
    x0, x1 = c0, torch.full_like(c0, c1)
    x2, x3 = torch.full_like(c0, c2), torch.zeros_like(c0)
    k0, k1 = key
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(x0, MULTIPLIER_0)
        high_1, low_1 = _multiply(x2, MULTIPLIER_1)
        x0, x1, x2, x3 = high_1 ^ x1 ^ k0, low_1, high_0 ^ x3 ^ k1, low_0
        k0, k1 = (k0 + WEYL_0) & _LOW, (k1 + WEYL_1) & _LOW
    return x0, x1, x2, x3


def _multiply(x: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of a 32 x 32-bit product, without leaving int64's positive range."""
    low_part = x * (constant & 0xFFFF)  # below 2^48
    middle = x * (constant >> 16) + (low_part >> 16)  # below 2^49
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_part & 0xFFFF)


def signs(start: int, count: int, *, key: Key, tid: int, device: torch.device) -> torch.Tensor:
    """D[tid, start … start+count) as a float32 tensor of ±1 (DESIGN §2 step 4).

    start is a multiple of 4,096. Within a tile, element e = 128·j + m takes bit j of word m.
    """
    tiles = -(-count // 4096)
    blocks = torch.arange(start >> 7, (start >> 7) + 32 * tiles, device=device)
    words = torch.stack(philox(key, blocks, 0, tid), dim=-1).reshape(tiles, 1, 128)
    bits = (words >> torch.arange(32, device=device).reshape(1, 32, 1)) & 1
    return (1 - 2 * bits).reshape(-1)[:count].to(torch.float32)


def buckets(
    start: int, count: int, *, key: Key, tid: int, size: int, device: torch.device
) -> torch.Tensor:
    """(i mod K) xor r_b for i in [start, start+count), b = i div K (DESIGN §2 steps 5 and 7)."""
    index = torch.arange(start, start + count, device=device)
    block = index // size
    first, last = start // size, (start + count - 1) // size
    counters = torch.arange(first >> 2, (last >> 2) + 1, device=device)
    shifts = torch.stack(philox(key, counters, 1, tid), dim=-1).reshape(-1)
    return (index % size) ^ (shifts[block - (first & ~3)] & (size - 1))


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, CHUNK):
        yield start, min(CHUNK, count - start)


class ReferenceBackend:
    """The definition. Slow, exact, and alike on every device."""

    name = "reference"

    def materialise(
        self, base: torch.Tensor, table: Table, out: torch.Tensor, *, key: Key, tid: int
    ) -> None:
        """See `lorand.kernels.Backend.materialise`."""
        check_pair(base, out)
        values = torch.from_numpy(np.asarray(table, np.float32)).to(base.device)
        source, target = base.reshape(-1), _flat(out)
        for start, count in _chunks(source.numel()):
            place = buckets(start, count, key=key, tid=tid, size=values.numel(), device=base.device)
            move = signs(start, count, key=key, tid=tid, device=base.device) * values[place]
            target[start : start + count] = source[start : start + count].float() + move
        _write_back(target, out)

    def materialise_all(
        self, places: Sequence[Place], tables: Sequence[Table], *, key: Key
    ) -> None:
        """See `lorand.kernels.Backend.materialise_all`."""
        for place in places:
            self.materialise(place.base, tables[place.table], place.out, key=key, tid=place.tid)

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
        size, source = sums.numel(), gradient.detach().reshape(-1)
        for start, count in _chunks(source.numel()):
            place = buckets(start, count, key=key, tid=tid, size=size, device=gradient.device)
            part = signs(start, count, key=key, tid=tid, device=gradient.device)
            part = part * source[start : start + count].float()
            place, part = place.to(sums.device), part.to(sums.device).double()
            sums.index_add_(0, place, part, alpha=factor)

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
        source, target = base.reshape(-1), _flat(out)
        for start, count in _chunks(source.numel()):
            total = torch.zeros(count, dtype=torch.int64, device=base.device)
            for key, coefficient in zip(keys, coefficients.tolist(), strict=True):
                one = signs(start, count, key=key, tid=tid, device=base.device)
                total += one.to(torch.int64) * coefficient
            move = total.to(torch.float32) * 2.0**exponent
            target[start : start + count] = source[start : start + count].float() + move
        _write_back(target, out)

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
        source = gradient.detach().reshape(-1)
        for start, count in _chunks(source.numel()):
            part = source[start : start + count].to(sums.device).double()
            for s, key in enumerate(keys):
                one = signs(start, count, key=key, tid=tid, device=sums.device)
                sums[s] += factor * torch.dot(one.double(), part)


def _flat(out: torch.Tensor) -> torch.Tensor:
    """The row-major view of out, or a copy where its memory is ordered otherwise."""
    return out.detach().reshape(-1)


def _write_back(target: torch.Tensor, out: torch.Tensor) -> None:
    if target.data_ptr() != out.data_ptr() and out.numel():
        out.detach().copy_(target.reshape(out.shape))
