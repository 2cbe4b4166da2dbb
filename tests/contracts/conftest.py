"""Fixtures of the contract tests of the kernels. It needs no more than torch, numba and numpy."""

from collections.abc import Iterator

import numba
import pytest
import torch
from tests.contracts.kernel_cases import BACKENDS, DTYPES, OTHERS

from lorand.kernels import Backend


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors; on a busy machine, threads that wait for each other cost a minute."""
    before = numba.get_num_threads(), torch.get_num_threads()
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    yield
    numba.set_num_threads(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    made: Backend = request.param()
    return made


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest) -> Backend:
    """Any backend but the reference."""
    made: Backend = request.param()
    return made


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen
