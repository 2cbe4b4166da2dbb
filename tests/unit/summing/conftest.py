"""What all tests of sums have: parties, and no library that counts epsilon."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.summing.party import Party, run

from lorand.privacy import accountant


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """What noise costs is tested elsewhere, and takes seconds to calculate."""
    monkeypatch.setattr(accountant, "epsilon_together", lambda *_: 1.0)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Party]]:
    """Parties whose workers 1 to 3 are connected, and through with the run unless `joined` is 0."""
    made: list[Party] = []

    def build(mode: str, joined: int = 3, **changes: Any) -> Party:
        party = Party(run(mode, **changes), tmp_path / str(len(made)))
        made.append(party)
        for number in range(1, joined + 1):
            party.connect(party.start(f"worker-{number}"))
        return party

    yield build
    for party in made:
        for life in party.lives:
            life.budget.close()
