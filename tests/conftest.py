"""What tests of several folders share: a tiny model and its data, made once a session."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests import tiny
from tests.commands import MakeRoom, Nursery

if TYPE_CHECKING:
    from tests.postgres import Server


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors; on a busy machine, threads that wait for each other cost a minute."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT encoder of three layers without a head."""
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that was saved with its own classification head."""
    return tiny.write_model(tmp_path_factory.mktemp("own"), "own")


@pytest.fixture(scope="session")
def roberta_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Roberta encoder; its own head has two layers, and the checkpoint has none of them."""
    return tiny.write_model(tmp_path_factory.mktemp("roberta"), "roberta")


@pytest.fixture(scope="session")
def masked_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that fills masks."""
    return tiny.write_model(tmp_path_factory.mktemp("masked"), "masked")


@pytest.fixture(scope="session")
def causal_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2, whose output layer is its embedding."""
    return tiny.write_model(tmp_path_factory.mktemp("causal"), "causal")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Training files of three domains, and `test`."""
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts workers without their seconds of imports."""
    starter = Nursery(tmp_path_factory.mktemp("nursery"))
    yield starter
    starter.close()


@pytest.fixture
def make_room(
    tmp_path: Path, tiny_model: Path, tiny_data: dict[str, Path], nursery: Nursery
) -> MakeRoom:
    """Makes rooms in this test's folder: run file, model, data and processes of a run."""
    return MakeRoom(tmp_path, tiny_model, tiny_data, nursery)


@pytest.fixture(scope="session")
def postgres() -> Iterator["Server"]:
    """A PostgreSQL server of the tests' own."""
    from tests.postgres import programs, serving

    binaries = programs()
    if binaries is None:
        pytest.skip("PostgreSQL's programs are not installed: no initdb on PATH")
    with serving(binaries) as server:
        yield server
