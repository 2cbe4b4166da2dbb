"""The contract of the kernels, family `independent` (DESIGN §2 step 8); see `test_kernels`."""

from typing import Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.contracts.kernel_cases import (
    COUNT,
    LOOKED_AT,
    SEEDS,
    SHAPES,
    awkward,
    bits,
    explicit_weights,
    gradient_of,
    looked_at,
    placed,
    sign,
)

from lorand.errors import LedgerError
from lorand.kernels import Backend, zero_sums
from lorand.kernels.reference import ReferenceBackend
from lorand.philox import Key

pytestmark = pytest.mark.usefixtures("one_thread")

AMOUNTS: Final = np.array([2**40 + 1, -3, 77], np.int64)


def seeded(backend: Backend, base: torch.Tensor, out: torch.Tensor, used: int) -> torch.Tensor:
    amounts = AMOUNTS[:used]
    backend.materialise_independent(base, SEEDS[:used], amounts, out, tid=9, exponent=-42)
    return out


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
    base = gradient_of(COUNT, dtype)
    live = placed(backend, base)
    out = torch.empty_like(live)
    values = np.array(amounts, np.int64)
    backend.materialise_independent(live, SEEDS, values, out, tid=2, exponent=exponent)
    assert looked_at(out) == explicit_weights(base, sums, exponent)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_independent_has_the_bits_of_the_reference(
    other: Backend, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Awkward shapes, from no direction at all to three."""
    base = awkward(shape, dtype)
    live = placed(other, base)
    for used in (0, 1, 3):
        expected = seeded(ReferenceBackend(), base, torch.empty_like(base), used)
        out = seeded(other, live, torch.empty_like(live), used)
        assert torch.equal(bits(out), bits(expected)), f"{used} directions"


def test_many_seeds_a_pass(other: Backend, dtype: torch.dtype) -> None:
    """A round of 70 directions, coefficients of both signs and every size."""
    rng = np.random.default_rng(3)
    keys = [(int(a), int(b)) for a, b in rng.integers(0, 2**32, (70, 2))]
    amounts = (rng.integers(-(2**55), 2**55, 70) >> rng.integers(0, 55, 70)).astype(np.int64)
    base = awkward((4600,), dtype)
    live = placed(other, base)
    expected, out = torch.empty_like(base), torch.empty_like(live)
    ReferenceBackend().materialise_independent(base, keys, amounts, expected, tid=1, exponent=-55)
    other.materialise_independent(live, keys, amounts, out, tid=1, exponent=-55)
    assert torch.equal(bits(out), bits(expected))


def test_independent_in_place_and_transposed(backend: Backend, dtype: torch.dtype) -> None:
    base = awkward((43, 157), dtype)
    expected = bits(seeded(ReferenceBackend(), base, torch.empty_like(base), 3))
    live = placed(backend, base.clone())
    assert torch.equal(bits(seeded(backend, live, live, 3)), expected)
    turned = placed(backend, base.t().contiguous().t())
    other = placed(backend, base.clone())
    assert torch.equal(bits(seeded(backend, turned, other, 3)), expected)
    assert torch.equal(bits(seeded(backend, turned, turned, 3)), expected)


def seed_scalars(
    backend: Backend, gradient: torch.Tensor, seeds: list[Key] = SEEDS, factor: float = 1.0
) -> NDArray[np.float64]:
    sums = zero_sums(len(seeds), gradient.device)
    backend.project_independent(gradient, seeds, sums, tid=4, factor=factor)
    result: NDArray[np.float64] = sums.cpu().numpy()
    return result


def test_project_independent_is_the_dot_product(backend: Backend, dtype: torch.dtype) -> None:
    gradient = gradient_of(4200, dtype)
    live = placed(backend, gradient)
    scalars = seed_scalars(backend, live)
    signs = np.array([[sign(i, key, 4) for i in range(4200)] for key in SEEDS], np.float64)
    np.testing.assert_allclose(scalars, signs @ gradient.double().numpy(), rtol=0, atol=1e-6)
    assert seed_scalars(backend, live, factor=4.0).tolist() == (4 * scalars).tolist()
    assert seed_scalars(backend, live[:0]).tolist() == [0.0] * 3
    assert seed_scalars(backend, live, seeds=[]).shape == (0,)


@pytest.mark.parametrize("shape", [(1,), (4096,), (4097,), (5, 123, 123)], ids=str)
def test_project_independent_agrees_with_the_reference(
    other: Backend, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    gradient = gradient_of(int(np.prod(shape)), dtype).reshape(shape)
    expected = seed_scalars(ReferenceBackend(), gradient)
    np.testing.assert_allclose(
        seed_scalars(other, placed(other, gradient)), expected, rtol=0, atol=1e-9
    )


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
