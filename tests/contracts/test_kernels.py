"""The contract of the kernels: every backend gives the bits of the reference (DESIGN §2, §5.4).

The reference defines the result, and is itself held against an evaluation of DESIGN §2 steps 3–7
in Python integers and fractions, written from the design's text: `kernel_cases` shares no code
with the library there. A new backend joins the suite by joining `kernel_cases.BACKENDS`.
"""

from functools import cache

import numpy as np
import pytest
import torch
from tests.contracts.kernel_cases import (
    COUNT,
    DTYPES,
    KEY,
    LARGEST,
    LOOKED_AT,
    QUANTUM_EXPONENT,
    SCALE_EXPONENTS,
    SHAPES,
    SIZES,
    awkward,
    bits,
    by_reference,
    direction,
    explicit_weights,
    gradient_of,
    looked_at,
    materialised,
    placed,
    random_coefficients,
    random_table,
    sign,
)

from lorand.kernels import Backend, Place, reference
from lorand.transform import fwht, table

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------- the definition


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
    base = gradient_of(COUNT, dtype)
    values = table(fwht(random_coefficients(size, 40)), 40, scale_exponent)
    live = placed(backend, base)
    out = materialised(backend, live, values, torch.empty_like(live))
    assert looked_at(out) == explicit_weights(base, explicit_sums(size), scale_exponent - 40)


@pytest.mark.parametrize("size", [1024, 4096, 65536, LARGEST])
def test_one_direction_of_a_large_pool(backend: Backend, size: int) -> None:
    """A = c·e_k moves zero weights to ±c·2^-q: the signs are z_k, k of every number of bits."""
    k = size - 1 - size // 5
    values = table(fwht(3 * np.eye(1, size, k, dtype=np.int64)[0]), QUANTUM_EXPONENT, 0)
    base = placed(backend, torch.zeros(COUNT))
    moved = materialised(backend, base, values, torch.empty_like(base))[LOOKED_AT].cpu()
    signs = torch.tensor([direction(k, i, KEY, 3, size) for i in LOOKED_AT])
    assert torch.equal(moved, 3.0 * signs * 2.0**-QUANTUM_EXPONENT)


# ------------------------------------------------------------- bit equality of all backends


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_materialise_has_the_bits_of_the_reference(
    other: Backend, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Invariant 4: awkward shapes, every K, every direction scale, other tensor numbers."""
    base = placed(other, awkward(shape, dtype))
    for number, size in enumerate(SIZES):
        scale_exponent, tid = SCALE_EXPONENTS[number % 3], (0, 3, 99_999)[number // 2]
        values = random_table(size, scale_exponent)
        out = materialised(other, base, values, torch.empty_like(base), tid)
        expected = by_reference(base, values, tid)
        assert torch.equal(bits(out), bits(expected)), f"K = {size}, scale 2^{scale_exponent}"
        assert torch.equal(bits(base), bits(awkward(shape, dtype))), "the base was written to"


@pytest.mark.parametrize("count", [4097, 70_001])
def test_the_largest_pool(other: Backend, dtype: torch.dtype, count: int) -> None:
    """K = 2^20: far more places in the table than weights."""
    base = placed(other, awkward((count,), dtype))
    values = random_table(LARGEST, 0)
    out = materialised(other, base, values, torch.empty_like(base))
    assert torch.equal(bits(out), bits(by_reference(base, values)))


@pytest.mark.parametrize(("size", "count"), [(65536, 3 * 65536 + 11), (4096, 17 * 4096)])
def test_many_blocks_of_a_large_pool(
    other: Backend, dtype: torch.dtype, size: int, count: int
) -> None:
    """Every block has a shift of its own; the last may be ragged."""
    base = placed(other, awkward((count,), dtype))
    out = materialised(other, base, random_table(size, 0), torch.empty_like(base))
    assert torch.equal(bits(out), bits(by_reference(base, random_table(size, 0))))


@pytest.mark.parametrize("shape", [(), (65,), (5, 23, 43)], ids=str)
@pytest.mark.parametrize("size", [64, 4096])
def test_materialise_in_place(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], size: int
) -> None:
    """Out may be base itself."""
    values = random_table(size, 0)
    live = placed(backend, awkward(shape, dtype))
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
    base, out = placed(backend, base), placed(backend, out)
    materialised(backend, base, values, out)
    assert torch.equal(bits(out), bits(by_reference(base, values)))


def test_in_place_on_transposed_memory(backend: Backend, dtype: torch.dtype) -> None:
    values = random_table(256, 0)
    expected = by_reference(awkward((43, 157), dtype).t(), values)
    live = placed(backend, awkward((43, 157), dtype).t())
    materialised(backend, live, values, live)
    assert torch.equal(bits(live), bits(expected))


def test_every_other_element_of_a_larger_tensor(backend: Backend) -> None:
    """A strided view is written where it lies, and nothing beside it is touched."""
    values = random_table(64, 0)
    base = placed(backend, awkward((10_000,), torch.float32)[::2])
    memory = placed(backend, torch.full((10_000,), 7.0))
    materialised(backend, base, values, memory[::2])
    assert torch.equal(bits(memory[::2]), bits(by_reference(base, values)))
    assert bool((memory[1::2] == 7).all())


@pytest.mark.parametrize(("base_at", "out_at"), [(0, 1), (1, 0), (3, 5), (8, 16)])
def test_a_tensor_may_lie_anywhere_in_its_memory(
    backend: Backend, dtype: torch.dtype, base_at: int, out_at: int
) -> None:
    """Offsets into the storage change neither bits nor neighbours."""
    values = random_table(4096, 0)
    base = placed(backend, awkward((9000,), dtype))[base_at : base_at + 8200]
    memory = placed(backend, torch.full((9000,), 7.0, dtype=dtype))
    out = materialised(backend, base, values, memory[out_at : out_at + 8200])
    assert torch.equal(bits(out), bits(by_reference(base, values)))
    assert bool((memory[:out_at] == 7).all() & (memory[out_at + 8200 :] == 7).all())


@pytest.mark.parametrize("size", [64, 65536])
def test_chunks_of_the_reference_do_not_show(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    base = awkward((70001,), torch.float32)
    expected = by_reference(base, random_table(size, 0))
    monkeypatch.setattr(reference, "CHUNK", 1 << 14)
    assert torch.equal(bits(by_reference(base, random_table(size, 0))), bits(expected))


def test_infinite_weights_stay_infinite(backend: Backend, dtype: torch.dtype) -> None:
    base = placed(backend, torch.tensor([float("inf"), float("-inf")] * 40).to(dtype))
    out = materialised(backend, base, random_table(64, 0), torch.empty_like(base))
    assert torch.equal(bits(out), bits(base))


def test_bfloat16_rounds_ties_to_even(backend: Backend) -> None:
    """A move of half a unit in the last place: the result is even, as in torch's own cast."""
    base = (1 + torch.arange(1, 128) / 128).to(torch.bfloat16)
    values = np.full(64, 2.0**-8, np.float32)
    live = placed(backend, base)
    out = materialised(backend, live, values, torch.empty_like(live))
    signs = torch.tensor([sign(i, KEY, 3) for i in range(127)])
    assert torch.equal(bits(out), bits((base.float() + signs * 2.0**-8).to(torch.bfloat16)))
    assert bool((bits(out) & 1 == 0).all())


@pytest.mark.parametrize("narrow", DTYPES[1:], ids=["bfloat16", "float16"])
def test_a_sum_rounds_as_torch_casts(backend: Backend, narrow: torch.dtype) -> None:
    """Any float32 sum, subnormal, tiny or near overflow, is cast as torch casts it."""
    patterns = np.random.default_rng(5).integers(0, 2**32, 4096, dtype=np.uint32).view(np.float32)
    values = patterns[np.isfinite(patterns)]
    base = torch.zeros(4096, dtype=narrow)
    padded = np.concatenate([values, np.zeros(4096 - len(values), np.float32)])
    wide = by_reference(base.float(), padded)
    live = placed(backend, base)
    out = materialised(backend, live, padded, torch.empty_like(live))
    assert torch.equal(bits(out), bits(wide.to(narrow)))


# ------------------------------------------------------------- many tensors at once


def places_of(backend: Backend, dtype: torch.dtype) -> list[Place]:
    """Tensors of all sorts: in place, transposed, with gaps, unaligned, empty, another dtype."""

    def made(tensor: torch.Tensor) -> torch.Tensor:
        return placed(backend, tensor)

    def like(shape: tuple[int, ...], chosen: torch.dtype = dtype) -> torch.Tensor:
        return made(torch.full(shape, 7.0, dtype=chosen))

    live, wide = made(awkward((4099,), dtype)), made(awkward((9001,), dtype))
    other = torch.float32 if dtype != torch.float32 else torch.float16
    return [
        Place(made(awkward((64, 48), dtype, 1)), like((64, 48)), 0, 1),
        Place(live, live, 1, 0),
        Place(made(awkward((43, 157), dtype).t()), like((157, 43)), 2, 0),
        Place(made(awkward((43, 157), dtype)), like((157, 43)).t(), 5, 1),
        Place(wide[1:4098], like((9000,))[3:4100], 7, 1),
        Place(wide[::2], like((9002,))[::2], 8, 0),
        Place(like((0,)), like((0,)), 9, 0),
        Place(made(awkward((8193,), other)), like((8193,), other), 10, 1),
        Place(made(awkward((768,), dtype)), like((768,)), 70_000, 0),
    ]


@pytest.mark.parametrize("size", [64, 4096, 65536])
def test_many_tensors_at_once_have_the_bits_of_each_alone(
    backend: Backend, dtype: torch.dtype, size: int
) -> None:
    """Whatever tensors share a call, with the table that each one's place names."""
    tables = [random_table(size, 0), random_table(size, 4)]
    places = places_of(backend, dtype)
    expected = [by_reference(p.base, tables[p.table], p.tid) for p in places]
    backend.materialise_all(places, tables, key=KEY)
    for place, wanted in zip(places, expected, strict=True):
        assert torch.equal(bits(place.out), bits(wanted)), f"tensor {place.tid}"
    gaps = places[5].out.as_strided((4500,), (2,), places[5].out.storage_offset() + 1)
    assert bool((gaps == 7).all())
    backend.materialise_all([], tables, key=KEY)


def test_a_large_tensor_beside_small_ones(other: Backend) -> None:
    """Larger than what shares a launch or a thread's walk."""
    shapes = [(300,), (1 << 20,), (17, 16)]
    bases = [placed(other, awkward(shape, torch.bfloat16)) for shape in shapes]
    places = [Place(base, torch.empty_like(base), tid, 0) for tid, base in enumerate(bases)]
    other.materialise_all(places, [random_table(4096, 0)], key=KEY)
    for place in places:
        wanted = by_reference(place.base, random_table(4096, 0), place.tid)
        assert torch.equal(bits(place.out), bits(wanted))


def test_one_tensor_that_does_not_fit_is_refused(backend: Backend) -> None:
    place = Place(torch.zeros(4), torch.zeros(5), 0, 0)
    with pytest.raises(ValueError, match="must agree"):
        backend.materialise_all([place], [random_table(64, 0)], key=KEY)


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
