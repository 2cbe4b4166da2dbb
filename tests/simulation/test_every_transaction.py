"""Every transaction of a run goes wrong once, in every way; the run must not notice.

A transaction fails before it is done; is done and reported as failed (so that the caller believes
it timed out); is done, reported as failed, and cannot be looked up; or is the last thing the
process does: before, during (torn) or after. Sessions, sequencer and store are the real ones, and
all invariants are checked after each run.
"""

import tempfile
from pathlib import Path
from typing import Final

import pytest
from tests.simulation.checks import check
from tests.simulation.disk import PLANNED, Fault
from tests.simulation.world import World

from lorand_coordinator.store import SqliteStore

SEED: Final = 3
SEEDS: Final = range(4)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty ledger."""
    path = tmp_path_factory.mktemp("template") / "empty.ledger"
    SqliteStore(path).close()
    return path


def live(seed: int, template: Path, plan: dict[int, Fault]) -> int:
    """Live a run with what is planned, and check it; return how many transactions it took."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(seed, Path(folder), template, faults=False)
        world.disk.plan = plan
        try:
            world.run()
            transactions = world.disk.transactions
            check(world)
        except AssertionError as error:
            last = "\n".join(world.told)
            raise AssertionError(f"seed {seed}, {plan}: {error}\n{last}") from error
        finally:
            if world.coordinator.store is not None:
                world.coordinator.store.close()
    assert world.disk.faults.total() == len(plan), "what was planned did not happen"
    return transactions


@pytest.mark.parametrize("fault", PLANNED)
def test_a_join_a_commit_and_a_statement_go_wrong(fault: Fault, template: Path) -> None:
    for index in (1, 4, 5):
        live(SEED, template, {index: fault})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", PLANNED)
def test_every_transaction_goes_wrong(fault: Fault, seed: int, template: Path) -> None:
    count = live(seed, template, {})
    assert count > 10
    for index in range(count):
        live(seed, template, {index: fault})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_two_in_a_row_go_wrong(template: Path) -> None:
    """What is tried again fails in another way."""
    count = live(SEED, template, {})
    for index in range(count - 1):
        for first in PLANNED:
            live(SEED, template, {index: first, index + 1: "told and blind"})
