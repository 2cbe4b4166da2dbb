"""Weights in 8 bits and bases in 4."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorand.errors import ModelError
from lorand.layerwise import Stored
from lorand.philox import philox4x32
from lorand.subspaces.int8 import GROUP, NOISE, Int4, Int8, Rounding, Stochastic

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(), (1,), (255,), (256,), (257,), (3, 100), (2, 3, 128), (33, 31), (70_001,), (300, 512)]
KINDS: list[type[Int8]] = [Int8, Int4]
ROUNDINGS: list[Rounding] = ["nearest", Stochastic((1, 2), fold=3, tid=4)]


def normal(shape: tuple[int, ...], *, spread: float = 0.05, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def by_element(grouped: Int8, values: torch.Tensor) -> torch.Tensor:
    """One number a group as one an element, in the tensor's shape."""
    return values.repeat_interleave(GROUP)[: grouped.shape.numel()].reshape(grouped.shape)


def bits_of(grouped: Int8) -> str:
    content = (grouped.codes, grouped.scales, grouped.zeros, grouped.dense().float())
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in content)).hexdigest()


def check_errors(tensor: torch.Tensor, grouped: Int8, steps: float) -> None:
    """Off by so many scales at most, and by the dtype's own rounding."""
    dense = grouped.dense()
    assert dense.shape == tensor.shape
    assert dense.dtype == tensor.dtype
    error = (dense.double() - tensor.double()).abs()
    allowed = steps * by_element(grouped, grouped.scales).double() * (1 + 1e-4)
    own = tensor.double().abs() * torch.finfo(tensor.dtype).eps
    assert bool((error <= allowed + own).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_is_half_a_code_off_at_most(
    kind: type[Int8], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = normal(shape).to(dtype)
    check_errors(tensor, kind.of(tensor), 0.5)
    check_errors(tensor, kind.of(tensor, Stochastic((1, 2), 0, 0)), 1.0)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "values",
    [
        normal((600,)).abs() + 1,
        -normal((600,)).abs() - 7,
        normal((600,), spread=1e-4) + 1,
        torch.ones(300),
        torch.full((300,), -1e3),
        torch.zeros(300),
        normal((300,), spread=1e-9),
        torch.full((256,), 3e38) * torch.tensor([1.0, -1.0]).repeat(128) * 0.99,
    ],
    ids=["positive", "negative", "near one", "ones", "-1000", "zeros", "minute", "vast"],
)
def test_unusual_groups(kind: type[Int8], values: torch.Tensor, rounding: Rounding) -> None:
    """The published quantiser clamps the zero, and loses groups of one sign."""
    grouped = kind.of(values, rounding)
    check_errors(values, grouped, 0.5 if rounding == "nearest" else 1.0)
    assert torch.equal(grouped.zeros, grouped.zeros.round())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.sampled_from(KINDS),
    st.sampled_from(ROUNDINGS),
)
def test_any_finite_weights(values: list[float], kind: type[Int8], rounding: Rounding) -> None:
    tensor = torch.tensor(values) * 0.99  # at the very end of float32 half a code is beyond it
    check_errors(tensor, kind.of(tensor, rounding), 0.5 if rounding == "nearest" else 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_stays_zero(kind: type[Int8]) -> None:
    """Where a group has weights on both sides, or is all zero."""
    tensor = normal((512,))
    tensor[::7] = 0
    for rounding in ROUNDINGS:
        assert not kind.of(tensor, rounding).dense()[::7].any()
        assert not kind.of(torch.zeros(5), rounding).dense().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_again_is_the_same_within_a_code(kind: type[Int8], dtype: torch.dtype) -> None:
    first = kind.of(normal((40, 333)).to(dtype))
    again = kind.of(first.dense())
    apart = (again.dense().double() - first.dense().double()).abs()
    assert bool((apart <= by_element(first, first.scales) * 1.001).all())
    assert float((apart > 0).double().mean()) < (0.02 if dtype == torch.float32 else 0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_rounding_is_unbiased(kind: type[Int8]) -> None:
    """Over folds, the mean is the weight; at the ends of a group as well."""
    tensor = normal((300,))
    folds = 2000
    total = torch.zeros(300, dtype=torch.float64)
    for fold in range(folds):
        grouped = kind.of(tensor, Stochastic((5, 6), fold, tid=1))
        total += grouped.dense().double()
    scale = by_element(grouped, grouped.scales).double()
    z = (total / folds - tensor) / (scale * (0.25 / folds) ** 0.5)
    assert float(z.abs().max()) < 5
    assert float(z.square().mean()) < 1.2
    ends = torch.cat([tensor[:GROUP].argmin()[None], tensor[:GROUP].argmax()[None]])
    assert float(z[ends].abs().max()) < 4


def test_noise_is_the_counter_generators() -> None:
    """Element i takes word i mod 4 of block i div 4, under the pool's key, fold and tensor."""
    words = philox4x32((7, 8), np.arange(5, 8, dtype=np.uint32), NOISE + 9, 10).reshape(-1)[:11]
    found = Stochastic((7, 8), fold=9, tid=10).uniform(20, 11, torch.device("cpu"))
    assert found.tolist() == (words * 2.0**-32).tolist()
    others = [Stochastic((7, 9), 9, 10), Stochastic((7, 8), 8, 10), Stochastic((7, 8), 9, 11)]
    tensor = normal((2000,))
    codes = [Int8.of(tensor, each).codes for each in (Stochastic((7, 8), 9, 10), *others)]
    for other in codes[1:]:
        assert not torch.equal(codes[0], other)


def test_a_chunk_does_not_change_an_element() -> None:
    """Noise belongs to the element, wherever a pass begins."""
    noise = Stochastic((1, 2), 0, 0)
    whole = noise.uniform(0, 1000, torch.device("cpu"))
    assert torch.equal(whole[512:], noise.uniform(512, 488, torch.device("cpu")))


def test_codes_are_these_bits() -> None:
    """Written once: another machine, torch or thread count must find the same."""
    values = (torch.arange(1000).remainder(97).float() - 48) / 64
    found = {
        kind.__name__ + ("" if rounding == "nearest" else "s"): bits_of(kind.of(values, rounding))
        for kind in KINDS
        for rounding in ROUNDINGS
    }
    assert {name: digest[:16] for name, digest in found.items()} == {
        "Int8": "47001e43bd099277",
        "Int8s": "d13f0542fcddada9",
        "Int4": "829949c79da28842",
        "Int4s": "20c3d48458a926ea",
    }


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_matter(kind: type[Int8], rounding: Rounding) -> None:
    tensor = normal((411, 513))
    found = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.add(bits_of(kind.of(tensor, rounding)))
    assert len(found) == 1


def test_layout_of_codes() -> None:
    """As the docstring says; a transposed tensor counts row-major as it is seen."""
    tensor = torch.arange(6.0).reshape(2, 3)
    assert Int4.of(tensor).codes.tolist() == [0 | 3 << 4, 6 | 9 << 4, 12 | 15 << 4]
    assert Int4.of(tensor.T).codes.tolist() == [0 | 9 << 4, 3 | 12 << 4, 6 | 15 << 4]
    assert Int4.of(tensor[0]).codes.tolist() == [0 | 7 << 4, 15]
    assert Int8.of(tensor).codes.tolist() == [0, 51, 102, 153, 204, 255]
    assert torch.equal(Int8.of(tensor.T).dense(), Int8.of(tensor).dense().T)


def test_memory() -> None:
    tensor = normal((1000, 256))
    assert Int8.of(tensor).nbytes == tensor.numel() + 8 * 1000
    assert Int4.of(tensor).nbytes == tensor.numel() // 2 + 8 * 1000
    empty = Int8.of(torch.zeros(0, 5))
    assert (empty.nbytes, empty.dense().shape) == (0, (0, 5))


def test_it_is_a_stored_base() -> None:
    stored: Stored = Int8.of(normal((4, 4), seed=2).requires_grad_(True))
    assert not stored.dense().requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused(kind: type[Int8]) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match=r"not finite .* bits: check the base model"):
            kind.of(torch.tensor([0.0, value] * 300))
    with pytest.raises(ModelError, match=r"float64 cannot be kept .* set model\.dtype"):
        kind.of(torch.zeros(3, dtype=torch.float64))
    unkeyed: Any = "stochastic"
    with pytest.raises(ValueError, match=r"or Stochastic\(key, fold, tid\), not 'stochastic'"):
        kind.of(torch.zeros(3), unkeyed)
    with pytest.raises(ValueError, match="no noise for fold"):
        Stochastic((1, 2), fold=2**31, tid=0)


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_finds_the_same_codes(kind: type[Int8], rounding: Rounding) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = normal((411, 513)).to(dtype)
        ours = kind.of(tensor, rounding)
        theirs = kind.of(tensor.cuda(), rounding)
        assert torch.equal(theirs.dense().cpu(), ours.dense())
        assert bits_of(theirs.on(torch.device("cpu"))) == bits_of(ours)
