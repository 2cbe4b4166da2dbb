"""The contract of `project`: a gradient to K scalars, in no more than rounding off exact."""

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.contracts.kernel_cases import (
    KEY,
    LARGEST,
    SHAPES,
    SIZES,
    direction,
    gradient_of,
    placed,
    projected,
)

from lorand.kernels import Backend, zero_sums
from lorand.kernels.reference import ReferenceBackend
from lorand.transform import fwht_float

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def explicit_direction(k: int, size: int) -> NDArray[np.float64]:
    return np.array([direction(k, i, KEY, 3, size) for i in range(9001)], np.float64)


@pytest.mark.parametrize("size", [64, 128, 4096, 65536])
def test_project_is_the_dot_product_with_each_direction(
    backend: Backend, dtype: torch.dtype, size: int
) -> None:
    """Zᵀg by the transform of the bucket sums equals z_k · g spelled out."""
    gradient = gradient_of(9001, dtype)
    scalars = fwht_float(projected(backend, placed(backend, gradient), size))
    assert scalars.shape == (size,)
    for k in [0, size - 1, *np.random.default_rng(size).integers(0, size, 4).tolist()]:
        expected = explicit_direction(k, size) @ gradient.double().numpy()
        assert scalars[k] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_agrees_with_the_reference(
    other: Backend, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    gradient = gradient_of(int(np.prod(shape)), dtype).reshape(shape)
    live = placed(other, gradient)
    for size in SIZES:
        expected = projected(ReferenceBackend(), gradient, size, tid=0)
        sums = projected(other, live, size, tid=0)
        np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "count"), [(65536, 3 * 65536 + 11), (4096, 70 * 4096), (LARGEST, 70_001)]
)
def test_project_to_a_large_pool(other: Backend, size: int, count: int) -> None:
    gradient = gradient_of(count, torch.bfloat16)
    expected = projected(ReferenceBackend(), gradient, size)
    sums = projected(other, placed(other, gradient), size)
    np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-9)


def test_project_of_a_transposed_gradient(backend: Backend, dtype: torch.dtype) -> None:
    turned = placed(backend, gradient_of(43 * 157, dtype).reshape(43, 157).t())
    plain = turned.contiguous()

    def sums(gradient: torch.Tensor) -> NDArray[np.float64]:
        return projected(backend, gradient, 256, tid=0)

    np.testing.assert_allclose(sums(turned), sums(plain), rtol=0, atol=1e-9)


def test_project_of_a_part_of_a_tensor(backend: Backend, dtype: torch.dtype) -> None:
    """Gaps and offsets in memory are not summed."""
    gradient = gradient_of(9001, dtype)
    live = placed(backend, gradient)
    for part in (slice(1, 8200), slice(0, 9001, 2)):
        expected = projected(ReferenceBackend(), gradient[part].clone(), 4096, tid=0)
        sums = projected(backend, live[part], 4096, tid=0)
        np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [256, 1 << 16])
def test_project_adds_to_what_is_there(backend: Backend, size: int) -> None:
    """The sums of all tensors of a model are one array, each tensor with its direction scale."""
    first, second = gradient_of(70_001, torch.float32), gradient_of(900, torch.bfloat16)
    sums = zero_sums(size, placed(backend, first).device)
    backend.project(placed(backend, first), sums, key=KEY, tid=0)
    backend.project(placed(backend, second), sums, key=KEY, tid=1, factor=16.0)
    apart = [projected(ReferenceBackend(), g, size, tid) for tid, g in enumerate((first, second))]
    np.testing.assert_allclose(sums.cpu(), apart[0] + 16 * apart[1], rtol=0, atol=1e-9)
