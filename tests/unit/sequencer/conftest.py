"""Rooms of a test's own."""

from collections.abc import Iterator
from contextlib import closing

import pytest
from tests.runs import config_of
from tests.unit.sequencer.room import Room


@pytest.fixture
def room() -> Iterator[Room]:
    opened = Room(config_of())
    with closing(opened.store):
        yield opened


@pytest.fixture
def busy(room: Room) -> Room:
    """Two workers, in the first round."""
    room.join("ada")
    room.join("ben")
    assert room.sequencer.engine.phase == "reporting"
    return room
