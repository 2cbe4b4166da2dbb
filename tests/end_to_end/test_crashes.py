"""Random kill -9 of coordinator and workers: nothing is lost, nothing is applied twice.

LORAND_KILLS says how many; benchmarks/crashes.py writes the result of a thousand down.
"""

import os
import sys
import time
from typing import Final

import pytest
from tests.commands import MakeRoom, Nursery
from tests.crashes import STRIKES, campaign

KILLS: Final = int(os.environ.get("LORAND_KILLS", "50"))
SEED: Final = 20


@pytest.mark.slow
@pytest.mark.timeout(120 + 6 * KILLS)
def test_random_kills(
    make_room: MakeRoom, nursery: Nursery, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at any moment and started again by the same commands, runs end as replays say."""
    began = time.monotonic()
    outcome = campaign(make_room, nursery, KILLS, SEED)
    outcome.assert_unharmed()
    assert outcome.kills.total() >= KILLS
    assert outcome.acknowledged > outcome.rounds, "what is counted was seen at all"
    assert KILLS < 50 or set(outcome.strikes) == set(STRIKES)
    with capsys.disabled():
        sys.stdout.write(f"\n{time.monotonic() - began:.0f} s, {outcome}\n")
