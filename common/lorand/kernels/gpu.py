"""The kernels on a GPU, in Triton: one pass over memory, on CUDA and ROCm devices.

Bit-identical with the reference: products are in the table before a weight is touched, and fusing
a multiply into an add is off. A pool of K < 4,096 costs four times the instructions a weight of a
larger one; sums are float64, which a consumer card adds more slowly than it reads.
"""

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl

from lorand.coefficients import Coefficients, check_magnitude, check_size
from lorand.kernels import Place, check_pair, gpu_programs
from lorand.kernels.reference import ReferenceBackend
from lorand.kernels.selfcheck import Trust
from lorand.philox import Key
from lorand.transform import Table

TILE: Final = 4096
LANES: Final = 256
"""Lanes of a `materialise` program: eight tiles, so eight warps share a chunk of the table."""
FEW_LANES: Final = 32
"""For a tensor of fewer than eight spans, where most of the lanes would idle."""
ROWS: Final = 8
"""Rows a lane has in flight: enough outstanding bytes to hide the latency of memory."""
SUM_LANES: Final = 128
"""Lanes of the other programs: 32 sums each."""
ALONE: Final = 1 << 20
"""Weights from which a tensor has a launch of its own; smaller ones share one."""
PROGRAMS: Final = 512
"""Programs that fill the largest device; each of `project` writes 32 KB of sums."""
SPANS_A_PROGRAM: Final = 8
"""`project` reads at least this many tiles a program, so that its sums stay the smaller part."""

_WARP: Final = 64 if torch.version.hip else 32
_TYPES: Final = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16
}  # fmt: skip


def _compiled_before() -> bool:
    return any(Path(triton.knobs.cache.dir).glob("*/materialise.json"))


_trust = Trust("GPU", _compiled_before)


class GpuBackend(ReferenceBackend):
    """Triton on a GPU for float32, bfloat16 and float16."""

    name = "gpu"

    def __init__(self) -> None:
        """Nothing is compiled before the first call."""
        self._tables: dict[tuple[int, torch.device], tuple[weakref.ref[Table], torch.Tensor]] = {}

    def materialise(
        self, base: torch.Tensor, table: Table, out: torch.Tensor, *, key: Key, tid: int
    ) -> None:
        """See `lorand.kernels.Backend.materialise`."""
        check_pair(base, out)
        size = len(table)
        check_size(size)
        if base.numel() == 0 or not self.trusted("hadamard", base):
            super().materialise(base, table, out, key=key, tid=tid)
            return
        chunks, spans = _spans(base, size)
        lanes = LANES if spans >= LANES // 32 else FEW_LANES
        target = _flat(out)
        with _device_of(base):
            gpu_programs.materialise[(chunks * -(-spans // (lanes // 32)),)](
                _flat(base), target, self._on_device(table, base.device), tid, _seed(key),
                *divmod(base.numel(), TILE), SIZE=size, LANES=lanes, ROWS=ROWS, **_options(lanes),
            )  # fmt: skip
        _write_back(target, out)

    def materialise_all(
        self, places: Sequence[Place], tables: Sequence[Table], *, key: Key
    ) -> None:
        """See `lorand.kernels.Backend.materialise_all`."""
        alike: dict[tuple[torch.dtype, torch.device, bool], list[_Pair]] = {}
        for place in places:
            check_pair(place.base, place.out)
            if not 0 < place.base.numel() < ALONE or not self.trusted("hadamard", place.base):
                table = tables[place.table]
                self.materialise(place.base, table, place.out, key=key, tid=place.tid)
                continue
            pair = _Pair(place, _flat(place.base), _flat(place.out))
            group = place.base.dtype, place.base.device, pair.aligned
            alike.setdefault(group, []).append(pair)
        for (dtype, device, aligned), pairs in alike.items():
            values = [self._on_device(table, device) for table in tables]
            with _device_of(values[0]):
                _materialise_many(pairs, values, key, DTYPE=_TYPES[dtype], ALIGNED=aligned)
            for pair in pairs:
                _write_back(pair.target, pair.place.out)

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
        size = sums.numel()
        check_size(size)
        gradient = gradient if gradient.dtype in _TYPES else gradient.float()
        if gradient.numel() == 0 or not self.trusted("hadamard", gradient):
            super().project(gradient, sums, key=key, tid=tid, factor=factor)
            return
        chunks, spans = _spans(gradient, size)
        splits = max(1, min(spans // SPANS_A_PROGRAM, PROGRAMS // chunks))
        parts = gradient.new_empty(splits * chunks * TILE, dtype=torch.float64)
        with _device_of(gradient):
            gpu_programs.project[(splits * chunks,)](
                _flat(gradient), parts, tid, _seed(key), *divmod(gradient.numel(), TILE), spans,
                splits, SIZE=size, LANES=SUM_LANES, **_options(SUM_LANES),
            )  # fmt: skip
        sums.add_(parts.reshape(-1, size).sum(0), alpha=factor)

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
        if base.numel() == 0 or not self.trusted("independent", base):
            super().materialise_independent(
                base, keys, coefficients, out, tid=tid, exponent=exponent
            )
            return
        tiles, rest = divmod(base.numel(), TILE)
        amounts = torch.tensor(coefficients.tolist(), dtype=torch.int64, device=base.device)
        target = _flat(out)
        with _device_of(base):
            gpu_programs.materialise_independent[(tiles + (rest > 0),)](
                _flat(base), target, _seeds(keys, base.device), amounts, len(keys), 2.0**exponent,
                tid, tiles, rest, LANES=SUM_LANES, **_options(SUM_LANES),
            )  # fmt: skip
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
        if gradient.numel() == 0 or not keys:
            return
        tiles, rest = divmod(gradient.numel(), TILE)
        splits = max(1, min(tiles, PROGRAMS // len(keys)))
        parts = gradient.new_empty(splits * len(keys), dtype=torch.float64)
        with _device_of(gradient):
            gpu_programs.project_independent[(splits * len(keys),)](
                _flat(gradient), parts, _seeds(keys, gradient.device), len(keys), tid, tiles, rest,
                splits, LANES=SUM_LANES, **_options(SUM_LANES),
            )  # fmt: skip
        sums.add_(parts.reshape(splits, len(keys)).sum(0), alpha=factor)

    def trusted(self, family: str, tensor: torch.Tensor) -> bool:
        """Whether the compiled programs agree with the definition; the first call compiles them.

        If not, the reference takes their place, and the log says so.
        """
        return _trust.of(self, family, tensor.dtype, tensor.device)

    def _on_device(self, table: Table, device: torch.device) -> torch.Tensor:
        """The table's copy on a device, made once while the array lives: not once a tensor."""
        place = (id(table), device)
        known = self._tables.get(place)
        if known is not None and known[0]() is table:
            return known[1]
        values = torch.tensor(np.asarray(table, np.float32), device=device)
        tables = self._tables
        self._tables[place] = weakref.ref(table, lambda _: tables.pop(place, None)), values
        return values


@dataclass(frozen=True, slots=True)
class _Pair:
    """A place and its memory in row-major order."""

    place: Place
    source: torch.Tensor
    target: torch.Tensor

    @property
    def aligned(self) -> bool:
        """Whether vectors of four fit, from the first weight to the last."""
        starts = self.source.data_ptr() | self.target.data_ptr() | self.source.numel()
        return starts % 16 == 0


def _materialise_many(
    pairs: list[_Pair], tables: list[torch.Tensor], key: Key, **constants: Any
) -> None:
    """One launch for tensors of one dtype on one device."""
    size, device = tables[0].numel(), tables[0].device
    check_size(size)
    rows = np.zeros((len(pairs), 7), np.int64)
    programs = np.zeros(len(pairs), np.int64)
    for row, pair in enumerate(pairs):
        chunks, spans = _spans(pair.source, size)
        programs[row] = chunks * spans
        addresses = (pair.source, pair.target, tables[pair.place.table])
        rows[row, :3] = [tensor.data_ptr() for tensor in addresses]
        rows[row, 3:6] = pair.place.tid, *divmod(pair.source.numel(), TILE)
    rows[1:, 6] = programs.cumsum()[:-1]
    owners = torch.from_numpy(np.repeat(np.arange(len(pairs)), programs)).to(device)
    gpu_programs.materialise_many[(len(owners),)](
        owners, torch.from_numpy(rows).to(device), _seed(key),
        SIZE=size, LANES=FEW_LANES, ROWS=ROWS, **constants, **_options(FEW_LANES),
    )  # fmt: skip


def _device_of(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Launches go to this tensor's device, whichever is current."""
    chosen: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return chosen


def _spans(tensor: torch.Tensor, size: int) -> tuple[int, int]:
    """Chunks of the table, and spans of the tensor (see `gpu_programs`)."""
    chunks = max(size // TILE, 1)
    return chunks, -(-tensor.numel() // (chunks * TILE))


def _options(lanes: int) -> dict[str, Any]:
    return {"num_warps": max(1, lanes // _WARP), "enable_fp_fusion": False}


def _seed(key: Key) -> int:
    """The key as one signed 64-bit integer."""
    value = key[1] << 32 | key[0]
    return value - (value >> 63 << 64)


def _seeds(keys: Sequence[Key], device: torch.device) -> torch.Tensor:
    return torch.tensor([_seed(key) for key in keys], dtype=torch.int64, device=device)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory in row-major order, without gaps (a copy where it lies otherwise)."""
    return tensor.detach().contiguous().reshape(-1)


def _write_back(target: torch.Tensor, out: torch.Tensor) -> None:
    if not out.is_contiguous():
        out.detach().copy_(target.reshape(out.shape))
