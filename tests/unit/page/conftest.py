"""Stages of a test's own."""

from collections.abc import Callable, Iterator

import pytest
from tests.runs import IDENTITY, config_of
from tests.unit.page.staging import Stage

MakeStage = Callable[..., Stage]


@pytest.fixture
def make_stage() -> Iterator[MakeStage]:
    """Makes stages with some settings changed."""
    made: list[Stage] = []

    def make(**changes: dict[str, object]) -> Stage:
        made.append(Stage(IDENTITY, config_of(**changes)))
        return made[-1]

    yield make
    for stage in made:
        stage.close()


@pytest.fixture
def stage(make_stage: MakeStage) -> Stage:
    """The small run, two workers in its first round."""
    made = make_stage()
    made.join("ada")
    made.join("ben")
    return made
