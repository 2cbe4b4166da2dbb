"""Weights in 8 bits, bases in 4: codes in groups with a scale and a zero, alike everywhere.

The quantiser is Q-GaLore's (Zhang et al., 2024, arXiv 2407.08296), on groups of 256 elements of the
flattened row-major tensor:

    s = max(max - min, 1e-5) / 255        z = round(-min / s)        q = round(w / s) + z in 0..255
    dense: w = (q - z) · s

Differences, each for a reason:

- z is any integer, not one of 0..255: the paper's clamp cuts off groups whose weights all have one
  sign, such as those of a normalisation layer near 1.
- s is at least 2^-23 of the largest magnitude, so that q, z and q - z are exact in float32.
- Rounded stochastically, s has one step less (254) and z is -floor(min / s): no code falls outside
  and is clamped, which would make the ends of a group biased.

Codes of a tensor are the same bits on every machine, thread count and device: only elementwise IEEE
operations, rounded one by one, and minima and maxima, which are exact in any order.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Literal, Self

import torch

from lorand.errors import ModelError
from lorand.kernels.reference import philox
from lorand.philox import Key

GROUP: Final = 256
"""Elements that share a scale and a zero."""
LEAST_RANGE: Final = 1e-5
EXACT_STEPS: Final = 2.0**23
"""Scales from zero to the largest magnitude of a group, at most: float32 counts so far exactly."""
CHUNK: Final = 1 << 16
"""Elements a step: whole groups, whole blocks of noise. On a CPU they keep float64 temporaries in
cache; elsewhere `LARGE_CHUNK` keeps launches few."""
LARGE_CHUNK: Final = 1 << 22
NOISE: Final = 1 << 31
"""Second counter word of fold 0's noise. Directions have the small ones (DESIGN §2)."""
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Stochastic:
    """Round up with the fraction for probability: unbiased. The noise follows from the run.

    It is keyed with the pool, the number of the fold, the tensor and the element, and so is the
    same on all replicas. It hides nothing: it is no privacy noise.
    """

    key: Key
    fold: int
    tid: int

    def __post_init__(self) -> None:
        """Raise ValueError for a fold or a tensor that a counter word does not hold."""
        if not (0 <= self.fold < NOISE and 0 <= self.tid < 2**32):
            raise ValueError(f"no noise for fold {self.fold} of tensor {self.tid}")

    def uniform(self, start: int, count: int, device: torch.device) -> torch.Tensor:
        """Return the noise of elements [start, start+count): float64 in [0, 1), multiples of 2^-32.

        start is a multiple of 4. Element i has word i mod 4 of the block with the counter
        (i div 4, 2^31 + fold, tid, 0).
        """
        blocks = torch.arange(start >> 2, (start + count + 3) >> 2, device=device)
        words = torch.stack(philox(self.key, blocks, NOISE + self.fold, self.tid), dim=-1)
        return words.reshape(-1)[:count].double() * 2.0**-32


Rounding = Literal["nearest"] | Stochastic
"""`nearest` is half to even."""


@dataclass(frozen=True, eq=False)
class Int8:
    """A tensor as 8-bit codes (see the module's docstring): 8.25 bits an element.

    codes: uint8, shape (elements,). scales, zeros: float32, shape (groups,); a zero is an integer.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype

    bits: ClassVar[int] = 8

    @classmethod
    def of(cls, tensor: torch.Tensor, rounding: Rounding = "nearest") -> Self:
        """Return a tensor's codes, on its device; within s/2 of it, or s where stochastic.

        Raises ModelError when the tensor is of another dtype than weights have, or not finite.
        """
        if tensor.dtype not in _DTYPES:
            raise ModelError(
                f"a tensor of {tensor.dtype} cannot be kept in {cls.bits} bits: set model.dtype to "
                '"float32", "bfloat16" or "float16"'
            )
        if rounding != "nearest" and not isinstance(rounding, Stochastic):
            raise ValueError(
                f'rounding is "nearest" or Stochastic(key, fold, tid), not {rounding!r}'
            )
        flat, device = tensor.detach().reshape(-1), tensor.device
        groups = -(-flat.numel() // GROUP)
        codes = torch.empty(-(-flat.numel() * cls.bits // 8), dtype=torch.uint8, device=device)
        scales, zeros = torch.empty((2, groups), dtype=torch.float32, device=device).unbind()
        for start, count, width in _chunks(flat.numel(), device):
            first, last = start // GROUP, -(-(start + count) // GROUP)
            weights = flat[start : start + count].reshape(-1, width).double()
            scale, zero = _grid(weights, 2**cls.bits - 1, rounding == "nearest")
            scales[first:last], zeros[first:last] = scale.flatten(), zero.flatten()
            noise = None
            if isinstance(rounding, Stochastic):
                noise = rounding.uniform(start, count, device).reshape(-1, width)
            found = _rounded(weights / scale, noise).add_(zero).clamp_(0, 2**cls.bits - 1)
            packed = cls._packed(found.to(torch.uint8).flatten())
            place = start * cls.bits // 8
            codes[place : place + packed.numel()] = packed
        if not bool(torch.isfinite(scales).all()):
            raise ModelError(
                f"weights that are not finite cannot be kept in {cls.bits} bits: check the base "
                "model, or lower optimizer.learning_rate"
            )
        return cls(codes, scales, zeros, tensor.shape, tensor.dtype)

    def dense(self) -> torch.Tensor:
        """Return the tensor that the codes stand for (see `lorand.layerwise.Stored`)."""
        out = torch.empty(self.shape.numel(), dtype=self.dtype, device=self.codes.device)
        for start, count, width in _chunks(out.numel(), out.device):
            first, last = start // GROUP, -(-(start + count) // GROUP)
            scale, zero = (each[first:last].unsqueeze(1) for each in (self.scales, self.zeros))
            place = slice(start * self.bits // 8, -(-(start + count) * self.bits // 8))
            codes = self._unpacked(self.codes[place])[:count].reshape(-1, width)
            out[start : start + count] = codes.float().sub_(zero).mul_(scale).flatten()
        return out.reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Memory of codes, scales and zeros."""
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    def on(self, device: torch.device) -> Self:
        """Return the same tensor on another device."""
        moved = (each.to(device) for each in (self.codes, self.scales, self.zeros))
        codes, scales, zeros = moved
        return replace(self, codes=codes, scales=scales, zeros=zeros)

    @staticmethod
    def _packed(codes: torch.Tensor) -> torch.Tensor:
        return codes

    @staticmethod
    def _unpacked(codes: torch.Tensor) -> torch.Tensor:
        return codes


@dataclass(frozen=True, eq=False)
class Int4(Int8):
    """A tensor as 4-bit codes, two a byte, the earlier element in the low half: for a stored basis.

    codes: uint8, shape (⌈elements / 2⌉,); an odd element out leaves the high half 0. Otherwise as
    `Int8`, with 15 steps for 255.
    """

    bits: ClassVar[int] = 4

    @staticmethod
    def _packed(codes: torch.Tensor) -> torch.Tensor:
        if codes.numel() % 2:
            codes = torch.cat([codes, codes.new_zeros(1)])
        low, high = codes.reshape(-1, 2).unbind(1)
        return low | (high << 4)

    @staticmethod
    def _unpacked(codes: torch.Tensor) -> torch.Tensor:
        return torch.stack([codes & 15, codes >> 4], dim=1).flatten()


def _chunks(size: int, device: torch.device) -> Iterator[tuple[int, int, int]]:
    """Yield (start, elements, elements a group): whole groups, and then what is left."""
    whole = size - size % GROUP
    chunk = CHUNK if device.type == "cpu" else LARGE_CHUNK
    for start in range(0, whole, chunk):
        yield start, min(chunk, whole - start), GROUP
    if whole < size:
        yield whole, size - whole, size - whole


def _grid(weights: torch.Tensor, steps: int, nearest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of each group, float64 of float32's values, shape (groups, 1).

    weights: float64, shape (groups, width).
    """
    low, high = weights.aminmax(dim=1, keepdim=True)
    most = torch.maximum(high.abs(), low.abs())
    reach = (high - low).clamp(min=LEAST_RANGE)
    # Stochastically, float32's rounding must not make the last step reach beyond the codes.
    scale = reach / steps if nearest else reach / (steps - 1) * (1 + 2.0**-23)
    scale = torch.maximum(scale, most / EXACT_STEPS).float().double()
    offset = low / scale
    return scale, -(offset.round() if nearest else offset.floor())


def _rounded(values: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Round to integers: to nearest, or up where the noise is below the fraction."""
    if noise is None:
        return values.round()
    floor = values.floor()
    # Compared, not added: the sum of a large value and noise near 1 would round up by itself.
    return floor + (noise < values - floor)
