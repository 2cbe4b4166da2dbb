"""What the contract tests of the kernels share: backends, cases, and DESIGN §2 word for word."""

import os
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from typing import Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lorand.coefficients import Coefficients
from lorand.kernels import Backend, zero_sums
from lorand.kernels.cpu import CpuBackend
from lorand.kernels.reference import ReferenceBackend
from lorand.philox import Key
from lorand.transform import Table, fwht, table

# ------------------------------------------------------------- backends

TRITON: Final = find_spec("triton") is not None
INTERPRETED: Final = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""The GPU programs run on the CPU, each operation as one of numpy."""


def gpu_backend() -> Backend:
    """The GPU backend, on the device or interpreted; skips where there is neither."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if INTERPRETED:
        from tests import interpreter

        interpreter.mend()
    from lorand.kernels.gpu import GpuBackend

    return GpuBackend()


GPU: Final = (
    pytest.param(gpu_backend, id="interpreted")
    if INTERPRETED
    else pytest.param(gpu_backend, id="gpu", marks=pytest.mark.gpu)
)
OTHERS: Final = [pytest.param(CpuBackend, id="cpu"), GPU]
BACKENDS: Final = [pytest.param(ReferenceBackend, id="reference"), *OTHERS]
"""A new backend joins the suite here."""


def device_of(backend: Backend) -> torch.device:
    """Where the backend computes."""
    return torch.device("cuda" if backend.name == "gpu" and not INTERPRETED else "cpu")


def placed(backend: Backend, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where the backend computes: same memory order, offset and gaps."""
    if device_of(backend) == tensor.device:
        return tensor
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    there = memory.to(device_of(backend))
    return torch.as_strided(there, tensor.shape, tensor.stride(), tensor.storage_offset())


# ------------------------------------------------------------- cases

DTYPES: Final = [torch.float32, torch.bfloat16, torch.float16]
SHAPES: Final[list[tuple[int, ...]]] = [
    (), (0,), (1,), (63,), (64,), (65,), (4095,), (4096,), (4097,), (5, 123, 123), (70001,),
]  # fmt: skip
SIZES: Final = [64, 128, 256, 1024, 4096, 65536]
LARGEST: Final = 1 << 20
SCALE_EXPONENTS: Final = [-3, 0, 4]
KEY: Final = (0x9ABCDEF0, 0x12345678)
SEEDS: Final[list[Key]] = [(7, 1), (0xFFFFFFFF, 0), KEY]
QUANTUM_EXPONENT: Final = 32


def awkward(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Weights of a usual size, led by both zeros, subnormal numbers and very large ones."""
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    special = torch.tensor([-0.0, 0.0, 1e-40, -1e-45, 6e-8, -3e38, 6.5e4])[: weights.numel()]
    weights.reshape(-1)[: special.numel()] = special
    return weights.to(dtype)


def gradient_of(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)


def random_coefficients(size: int, log2_magnitude: int = 33) -> Coefficients:
    """Integers large enough that fl32(F) really rounds."""
    limit = 1 << log2_magnitude
    return np.random.default_rng(size).integers(-limit, limit, size, dtype=np.int64)


@cache
def random_table(size: int, scale_exponent: int) -> Table:
    return table(fwht(random_coefficients(size)), QUANTUM_EXPONENT, scale_exponent)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns, so that −0.0 differs from 0.0; in row-major order, on the CPU."""
    plain = tensor.detach().cpu().contiguous()
    return plain.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def materialised(
    backend: Backend, base: torch.Tensor, values: Table, out: torch.Tensor, tid: int = 3
) -> torch.Tensor:
    backend.materialise(base, values, out, key=KEY, tid=tid)
    return out


def projected(
    backend: Backend, gradient: torch.Tensor, size: int, tid: int = 3
) -> NDArray[np.float64]:
    """Bucket sums of one gradient, shape (size,)."""
    sums = zero_sums(size, gradient.device)
    backend.project(gradient, sums, key=KEY, tid=tid)
    result: NDArray[np.float64] = sums.cpu().numpy()
    return result


def by_reference(base: torch.Tensor, values: Table, tid: int = 3) -> torch.Tensor:
    plain = base.cpu().clone(memory_format=torch.contiguous_format)
    return materialised(ReferenceBackend(), plain, values, torch.full_like(plain, 7), tid)


# ------------------------------------------------------------- DESIGN §2, word for word


@cache
def philox(c0: int, c1: int, c2: int, key: Key) -> tuple[int, int, int, int]:
    """Step 3: Philox4x32-10 of the counter (c0, c1, c2, 0)."""
    counter, (k0, k1) = (c0, c1, c2, 0), key
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * counter[0], 1 << 32)
        high_1, low_1 = divmod(0xCD9E8D57 * counter[2], 1 << 32)
        counter = (high_1 ^ counter[1] ^ k0, low_1, high_0 ^ counter[3] ^ k1, low_0)
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return counter


def sign(i: int, key: Key, tid: int) -> int:
    """Step 4: D[tid, i]."""
    tile, e = i >> 12, i & 4095
    j, m = e >> 7, e & 127
    word = philox(32 * tile + (m >> 2), 0, tid, key)[m & 3]
    return 1 - 2 * ((word >> j) & 1)


def direction(k: int, i: int, key: Key, tid: int, size: int) -> int:
    """Steps 5 and 6: z_k[i]."""
    block, e = divmod(i, size)
    shift = philox(block >> 2, 1, tid, key)[block & 3] & (size - 1)
    return sign(i, key, tid) * (1 - 2 * (((e ^ shift) & k).bit_count() & 1))


FORMATS: Final = {torch.float32: (24, -126), torch.bfloat16: (8, -126), torch.float16: (11, -14)}


def rounded(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The nearest number of a floating-point format, ties to even."""
    if value == 0:
        return value
    precision, smallest = FORMATS[dtype]
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    spacing = Fraction(2) ** (max(exponent, smallest) - precision + 1)
    return round(value / spacing) * spacing


COUNT: Final = 4096 + 300
LOOKED_AT: Final = [*range(40), *range(500, 540), *range(4076, 4116), *range(COUNT - 40, COUNT)]
"""Elements worked out by hand: both tiles of COUNT, block boundaries, the ragged end."""


def explicit_weights(base: torch.Tensor, sums: Sequence[int], exponent: int) -> list[Fraction]:
    """Step 7: cast(fl32(fl32(w0) + 2^exponent · fl32(sum))), each rounding done by itself."""
    factor = Fraction(2) ** exponent
    moves = [rounded(Fraction(total), torch.float32) * factor for total in sums]
    starts = looked_at(base)
    exact = [start + move for start, move in zip(starts, moves, strict=True)]
    return [rounded(rounded(w, torch.float32), base.dtype) for w in exact]


def looked_at(weights: torch.Tensor) -> list[Fraction]:
    return [Fraction(w) for w in weights[LOOKED_AT].tolist()]
