"""The contract of the kernels: every backend gives the bits of the reference (DESIGN §2, §5.4).

The reference defines the result, and is itself held against an evaluation of DESIGN §2 steps 3–7
in Python integers and fractions, written here from the design's text: it shares no code with the
library. A new backend joins the suite by joining BACKENDS.
"""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from typing import Final

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lorand.coefficients import Coefficients, Table, fwht, fwht_float, table
from lorand.errors import LedgerError
from lorand.kernels import Backend, backend_for, reference
from lorand.kernels.cpu import CpuBackend
from lorand.kernels.reference import ReferenceBackend
from lorand.philox import Key

BACKENDS: Final[list[Callable[[], Backend]]] = [ReferenceBackend, CpuBackend]
DTYPES: Final = [torch.float32, torch.bfloat16, torch.float16]
SHAPES: Final[list[tuple[int, ...]]] = [
    (), (0,), (1,), (63,), (64,), (65,), (4095,), (4096,), (4097,), (5, 123, 123), (70001,),
]  # fmt: skip
SIZES: Final = [64, 128, 256, 1024, 4096, 65536]
SCALE_EXPONENTS: Final = [-3, 0, 4]
KEY: Final = (0x9ABCDEF0, 0x12345678)
QUANTUM_EXPONENT: Final = 32


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors; on a busy machine, threads that wait for each other cost a minute."""
    before = numba.get_num_threads(), torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    yield
    numba.set_num_threads(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture(params=BACKENDS, ids=lambda made: made().name)
def backend(request: pytest.FixtureRequest) -> Backend:
    made: Backend = request.param()
    return made


@pytest.fixture(params=BACKENDS[1:], ids=lambda made: made().name)
def other(request: pytest.FixtureRequest) -> Backend:
    """Any backend but the reference."""
    made: Backend = request.param()
    return made


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def awkward(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Weights of a usual size, led by both zeros, subnormal numbers and very large ones."""
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    special = torch.tensor([-0.0, 0.0, 1e-40, -1e-45, 6e-8, -3e38, 6.5e4])[: weights.numel()]
    weights.reshape(-1)[: special.numel()] = special
    return weights.to(dtype)


def random_coefficients(size: int, log2_magnitude: int = 33) -> Coefficients:
    """Integers large enough that fl32(F) really rounds."""
    limit = 1 << log2_magnitude
    return np.random.default_rng(size).integers(-limit, limit, size, dtype=np.int64)


@cache
def random_table(size: int, scale_exponent: int) -> Table:
    return table(fwht(random_coefficients(size)), QUANTUM_EXPONENT, scale_exponent)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns, so that −0.0 differs from 0.0."""
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def materialised(
    backend: Backend, base: torch.Tensor, values: Table, out: torch.Tensor, tid: int = 3
) -> torch.Tensor:
    backend.materialise(base, values, out, key=KEY, tid=tid)
    return out


def by_reference(base: torch.Tensor, values: Table, tid: int = 3) -> torch.Tensor:
    plain = base.clone(memory_format=torch.contiguous_format)
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


@cache
def explicit_sums(size: int) -> list[int]:
    """Σ_k A_k z_k[i] over all k, in Python integers."""
    values = list(enumerate(random_coefficients(size, 40).tolist()))
    return [sum(a * direction(k, i, KEY, 3, size) for k, a in values) for i in LOOKED_AT]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("scale_exponent", [0, 4, -2])
def test_materialise_is_the_definition(
    backend: Backend, dtype: torch.dtype, size: int, scale_exponent: int
) -> None:
    """DESIGN §2 steps 3–7, with nothing of the library on the expecting side."""
    base = torch.randn(COUNT, generator=torch.Generator().manual_seed(size)).to(dtype)
    values = table(fwht(random_coefficients(size, 40)), 40, scale_exponent)
    out = materialised(backend, base, values, torch.empty_like(base))
    assert looked_at(out) == explicit_weights(base, explicit_sums(size), scale_exponent - 40)


# ------------------------------------------------------------- bit equality of all backends


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_materialise_has_the_bits_of_the_reference(
    other: Backend, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Invariant 4: awkward shapes, every K, every direction scale, other tensor numbers."""
    base = awkward(shape, dtype)
    for number, size in enumerate(SIZES):
        scale_exponent, tid = SCALE_EXPONENTS[number % 3], (0, 3, 99_999)[number // 2]
        values = random_table(size, scale_exponent)
        out = materialised(other, base, values, torch.empty_like(base), tid)
        expected = by_reference(base, values, tid)
        assert torch.equal(bits(out), bits(expected)), f"K = {size}, scale 2^{scale_exponent}"
        assert torch.equal(bits(base), bits(awkward(shape, dtype))), "the base was written to"


@pytest.mark.parametrize("shape", [(), (65,), (5, 23, 43)], ids=str)
@pytest.mark.parametrize("size", [64, 4096])
def test_materialise_in_place(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], size: int
) -> None:
    """Out may be base itself."""
    values = random_table(size, 0)
    live = awkward(shape, dtype)
    materialised(backend, live, values, live)
    assert torch.equal(bits(live), bits(by_reference(awkward(shape, dtype), values)))


@pytest.mark.parametrize("ordered", ["base", "out", "neither"])
def test_elements_count_row_major_whatever_the_memory_order(
    backend: Backend, dtype: torch.dtype, ordered: str
) -> None:
    """DESIGN §2 step 1: a transposed tensor has the bits of its contiguous copy."""
    values = random_table(1024, 0)
    base = awkward((43, 157), dtype).t() if ordered != "base" else awkward((157, 43), dtype)
    out = torch.empty(157, 43, dtype=dtype)
    if ordered != "out":
        out = torch.empty(43, 157, dtype=dtype).t()
    materialised(backend, base, values, out)
    assert torch.equal(bits(out), bits(by_reference(base, values)))


def test_in_place_on_transposed_memory(backend: Backend, dtype: torch.dtype) -> None:
    values = random_table(256, 0)
    expected = by_reference(awkward((43, 157), dtype).t(), values)
    live = awkward((43, 157), dtype).t()
    materialised(backend, live, values, live)
    assert torch.equal(bits(live), bits(expected))


def test_every_other_element_of_a_larger_tensor(backend: Backend) -> None:
    """A strided view is written where it lies, and nothing beside it is touched."""
    values = random_table(64, 0)
    base, memory = awkward((10_000,), torch.float32)[::2], torch.full((10_000,), 7.0)
    materialised(backend, base, values, memory[::2])
    assert torch.equal(bits(memory[::2]), bits(by_reference(base, values)))
    assert bool((memory[1::2] == 7).all())


@pytest.mark.parametrize("size", [64, 65536])
def test_chunks_of_the_reference_do_not_show(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    base = awkward((70001,), torch.float32)
    expected = by_reference(base, random_table(size, 0))
    monkeypatch.setattr(reference, "CHUNK", 1 << 14)
    assert torch.equal(bits(by_reference(base, random_table(size, 0))), bits(expected))


def test_infinite_weights_stay_infinite(backend: Backend, dtype: torch.dtype) -> None:
    base = torch.tensor([float("inf"), float("-inf")] * 40).to(dtype)
    out = materialised(backend, base, random_table(64, 0), torch.empty_like(base))
    assert torch.equal(bits(out), bits(base))


def test_bfloat16_rounds_ties_to_even(backend: Backend) -> None:
    """A move of half a unit in the last place: the result is even, as in torch's own cast."""
    base = (1 + torch.arange(1, 128) / 128).to(torch.bfloat16)
    values = np.full(64, 2.0**-8, np.float32)
    out = materialised(backend, base, values, torch.empty_like(base))
    signs = torch.tensor([sign(i, KEY, 3) for i in range(127)])
    assert torch.equal(bits(out), bits((base.float() + signs * 2.0**-8).to(torch.bfloat16)))
    assert bool((bits(out) & 1 == 0).all())


def test_bfloat16_rounds_as_torch_casts(backend: Backend) -> None:
    """Any float32 sum, subnormal, tiny or near overflow, is cast as torch casts it."""
    patterns = np.random.default_rng(5).integers(0, 2**32, 4096, dtype=np.uint32).view(np.float32)
    values = patterns[np.isfinite(patterns)]
    base = torch.zeros(4096, dtype=torch.bfloat16)
    padded = np.concatenate([values, np.zeros(4096 - len(values), np.float32)])
    wide = by_reference(base.float(), padded)
    out = materialised(backend, base, padded, torch.empty_like(base))
    assert torch.equal(bits(out), bits(wide.to(torch.bfloat16)))


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one core")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_one_and_two_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    """Invariant 4: the number of threads cannot be seen in the weights (in scalars it may)."""
    base, gradient = awkward((70001,), dtype), gradient_of(70001, dtype)
    expected = ReferenceBackend().project(gradient, 4096, key=KEY, tid=3)
    results = []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        torch.set_num_threads(threads)
        sums = CpuBackend().project(gradient, 4096, key=KEY, tid=3)
        np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-9)
        pooled = materialised(CpuBackend(), base, random_table(4096, 0), torch.empty_like(base))
        results.append((bits(pooled), bits(seeded(CpuBackend(), base, base.clone(), 3))))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# ------------------------------------------------------------- family "independent" (step 8)

SEEDS: Final[list[Key]] = [(7, 1), (0xFFFFFFFF, 0), KEY]


@pytest.mark.parametrize(
    "amounts",
    [(1, -2, 5), (2**61, 12345, -(2**33) - 1), (0, 0, 0)],
    ids=["small", "rounded", "zero"],
)
def test_independent_is_the_definition(
    backend: Backend, dtype: torch.dtype, amounts: tuple[int, ...]
) -> None:
    """DESIGN §2 step 8: D of each seed, summed exactly, then rounded as a pool's are."""
    pairs = list(zip(SEEDS, amounts, strict=True))
    sums = [sum(a * sign(i, key, 2) for key, a in pairs) for i in LOOKED_AT]
    exponent = 4 - max(map(abs, amounts)).bit_length()
    base = torch.randn(COUNT, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = torch.empty_like(base)
    values = np.array(amounts, np.int64)
    backend.materialise_independent(base, SEEDS, values, out, tid=2, exponent=exponent)
    assert looked_at(out) == explicit_weights(base, sums, exponent)


AMOUNTS: Final = np.array([2**40 + 1, -3, 77], np.int64)


def seeded(backend: Backend, base: torch.Tensor, out: torch.Tensor, used: int) -> torch.Tensor:
    amounts = AMOUNTS[:used]
    backend.materialise_independent(base, SEEDS[:used], amounts, out, tid=9, exponent=-42)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_independent_has_the_bits_of_the_reference(
    other: Backend, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Awkward shapes, from no direction at all to three."""
    base = awkward(shape, dtype)
    for used in (0, 1, 3):
        expected = seeded(ReferenceBackend(), base, torch.empty_like(base), used)
        out = seeded(other, base, torch.empty_like(base), used)
        assert torch.equal(bits(out), bits(expected)), f"{used} directions"


def test_independent_in_place_and_transposed(backend: Backend, dtype: torch.dtype) -> None:
    base = awkward((43, 157), dtype)
    expected = bits(seeded(ReferenceBackend(), base, torch.empty_like(base), 3))
    live = base.clone()
    assert torch.equal(bits(seeded(backend, live, live, 3)), expected)
    turned = base.t().contiguous().t()
    assert torch.equal(bits(seeded(backend, turned, base.clone(), 3)), expected)
    assert torch.equal(bits(seeded(backend, turned, turned, 3)), expected)


# ------------------------------------------------------------- project


def gradient_of(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)


@cache
def explicit_direction(k: int, size: int) -> NDArray[np.float64]:
    return np.array([direction(k, i, KEY, 3, size) for i in range(9001)], np.float64)


@pytest.mark.parametrize("size", [64, 128, 4096, 65536])
def test_project_is_the_dot_product_with_each_direction(
    backend: Backend, dtype: torch.dtype, size: int
) -> None:
    """Zᵀg by the transform of the bucket sums equals z_k · g spelled out."""
    gradient = gradient_of(9001, dtype)
    scalars = fwht_float(backend.project(gradient, size, key=KEY, tid=3))
    assert scalars.shape == (size,)
    for k in [0, size - 1, *np.random.default_rng(size).integers(0, size, 4).tolist()]:
        expected = explicit_direction(k, size) @ gradient.double().numpy()
        assert scalars[k] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_agrees_with_the_reference(
    other: Backend, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    gradient = gradient_of(int(np.prod(shape)), dtype).reshape(shape)
    for size in SIZES[::2]:
        expected = ReferenceBackend().project(gradient, size, key=KEY, tid=0)
        sums = other.project(gradient, size, key=KEY, tid=0)
        np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-9)


def test_project_of_a_transposed_gradient(backend: Backend, dtype: torch.dtype) -> None:
    turned = gradient_of(43 * 157, dtype).reshape(43, 157).t()
    plain = turned.contiguous()

    def sums(gradient: torch.Tensor) -> NDArray[np.float64]:
        return backend.project(gradient, 256, key=KEY, tid=0)

    np.testing.assert_allclose(sums(turned), sums(plain), rtol=0, atol=1e-9)


def test_project_independent_is_the_dot_product(backend: Backend, dtype: torch.dtype) -> None:
    gradient = gradient_of(4200, dtype)
    scalars = backend.project_independent(gradient, SEEDS, tid=4)
    signs = np.array([[sign(i, key, 4) for i in range(4200)] for key in SEEDS], np.float64)
    np.testing.assert_allclose(scalars, signs @ gradient.double().numpy(), rtol=0, atol=1e-6)
    assert backend.project_independent(gradient[:0], SEEDS, tid=4).tolist() == [0.0] * 3
    assert backend.project_independent(gradient, [], tid=4).shape == (0,)


# ------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("base", "out", "message"),
    [
        (torch.zeros(4), torch.zeros(5), "must agree"),
        (torch.zeros(4), torch.zeros(2, 2), "must agree"),
        (torch.zeros(4), torch.zeros(4).bfloat16(), "must agree"),
        (torch.zeros(4).half(), torch.zeros(4), "must agree"),
        (torch.zeros(0), torch.zeros(1), "must agree"),
        (torch.zeros(4).double(), torch.zeros(4).double(), "float32, bfloat16 or float16"),
        (torch.zeros(4).int(), torch.zeros(4).int(), "float32, bfloat16 or float16"),
    ],
    ids=["length", "shape", "float32 to bfloat16", "float16 to float32", "empty", "64", "int"],
)
def test_mismatching_tensors_are_refused(
    backend: Backend, base: torch.Tensor, out: torch.Tensor, message: str
) -> None:
    """ValueError names both sides; nothing is written."""
    with pytest.raises(ValueError, match=message):
        backend.materialise(base, random_table(64, 0), out, key=KEY, tid=0)
    with pytest.raises(ValueError, match=message):
        backend.materialise_independent(base, [KEY], np.array([1]), out, tid=0, exponent=0)
    assert not out.any()


@pytest.mark.parametrize("amounts", [[1], [1, 2, 3]], ids=["too few", "too many"])
def test_one_coefficient_a_seed(backend: Backend, dtype: torch.dtype, amounts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"argument 2|2 keys"):
        backend.materialise_independent(
            torch.zeros(4, dtype=dtype), SEEDS[:2], np.array(amounts), torch.zeros(4, dtype=dtype),
            tid=0, exponent=0,
        )  # fmt: skip


def test_coefficients_that_could_overflow_are_refused(backend: Backend, dtype: torch.dtype) -> None:
    """DESIGN §2 step 7 refuses sum|A| ≥ 2^62; step 8 is held to the same."""
    out = torch.zeros(4, dtype=dtype)
    with pytest.raises(LedgerError, match="lower the learning rate"):
        backend.materialise_independent(
            out, SEEDS[:2], np.array([2**61, -(2**61)]), out, tid=0, exponent=-60
        )


def test_the_backend_of_a_device() -> None:
    assert backend_for(torch.device("cpu")).name == "cpu"
    assert backend_for(torch.device("meta")).name == "reference"
