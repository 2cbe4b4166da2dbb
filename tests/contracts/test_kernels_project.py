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
)

from lorand.coefficients import fwht_float
from lorand.kernels import Backend
from lorand.kernels.reference import ReferenceBackend

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
    scalars = fwht_float(backend.project(placed(backend, gradient), size, key=KEY, tid=3))
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
        expected = ReferenceBackend().project(gradient, size, key=KEY, tid=0)
        sums = other.project(live, size, key=KEY, tid=0)
        np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "count"), [(65536, 3 * 65536 + 11), (4096, 70 * 4096), (LARGEST, 70_001)]
)
def test_project_to_a_large_pool(other: Backend, size: int, count: int) -> None:
    gradient = gradient_of(count, torch.bfloat16)
    expected = ReferenceBackend().project(gradient, size, key=KEY, tid=3)
    sums = other.project(placed(other, gradient), size, key=KEY, tid=3)
    np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-9)


def test_project_of_a_transposed_gradient(backend: Backend, dtype: torch.dtype) -> None:
    turned = placed(backend, gradient_of(43 * 157, dtype).reshape(43, 157).t())
    plain = turned.contiguous()

    def sums(gradient: torch.Tensor) -> NDArray[np.float64]:
        return backend.project(gradient, 256, key=KEY, tid=0)

    np.testing.assert_allclose(sums(turned), sums(plain), rtol=0, atol=1e-9)


def test_project_of_a_part_of_a_tensor(backend: Backend, dtype: torch.dtype) -> None:
    """Gaps and offsets in memory are not summed."""
    gradient = gradient_of(9001, dtype)
    live = placed(backend, gradient)
    for part in (slice(1, 8200), slice(0, 9001, 2)):
        expected = ReferenceBackend().project(gradient[part].clone(), 4096, key=KEY, tid=0)
        sums = backend.project(live[part], 4096, key=KEY, tid=0)
        np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-9)
