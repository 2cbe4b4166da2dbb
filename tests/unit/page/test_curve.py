"""The curve of a run: bounded, evenly spaced, and the same when it is read from the ledger."""

import pytest
from tests.unit.page.conftest import MakeStage

from lorand_coordinator.page import curve
from lorand_coordinator.page.curve import Curve
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.tally import Outcome


def outcome(committed: int) -> Outcome:
    return Outcome(committed, committed, 10 * committed, 2, 1.0 / committed, None)


@pytest.mark.parametrize("rounds", [1, 7, 8, 9, 16, 17, 100])
def test_points_are_few_and_evenly_spaced(rounds: int) -> None:
    made = Curve(points=8)
    for number in range(1, rounds + 1):
        made.add(outcome(number))
    committed = made.columns()["committed"]
    assert len(committed) <= 9
    assert made.stride == curve.stride_of(rounds, 8)
    assert committed[:-1] == list(range(1, rounds, made.stride))
    assert committed[-1] == rounds, "the newest round is always there"


def test_a_round_that_is_there_is_not_taken_again() -> None:
    made = Curve()
    for number in (1, 2, 2, 1, 3):
        made.add(outcome(number))
    assert made.columns()["committed"] == [1, 2, 3]


@pytest.mark.parametrize("points", [400, 4])
def test_a_restarted_coordinator_shows_what_the_old_one_did(
    make_stage: MakeStage, points: int
) -> None:
    stage = make_stage(run={"rounds": 20})
    live = Curve(points)
    stage.hub.sequencer.observers.append(live.add)
    stage.join("ada")
    stage.join("ben")
    stage.commit(rounds=7)
    stage.wait(60.0)  # nobody answers: an abandoned round is no point
    stage.wait(60.0)
    stage.commit(rounds=6)
    assert live.columns()["committed"][-1] == 13
    read = Curve(points)
    for each in curve.read(stage.config, stage.store, points):
        read.add(each)
    assert read.points() == live.points()
    again = Sequencer(stage.config, stage.store, None)
    assert again.tally.code_bytes == live.points()[-1].code_bytes
