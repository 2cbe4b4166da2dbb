"""What the page shows of a hub's state."""

import json

import pytest
from tests.runs import evaluation_of
from tests.unit.page.conftest import MakeStage
from tests.unit.page.staging import Stage

from lorand_coordinator.page import view
from lorand_coordinator.page.view import Spent


def states(stage: Stage) -> dict[str, str]:
    return {row["name"]: row["state"] for row in view.workers(stage.hub)["rows"]}


def test_before_anybody_joined(make_stage: MakeStage) -> None:
    stage = make_stage()
    status = view.status(stage.hub)
    assert status["state"] == "waiting"
    assert status["reason"] == "waiting for the first worker to join"
    assert (status["loss"], status["accuracy"], status["signal"]) == (None, None, None)
    assert status["workers"]["known"] == 0
    assert status["privacy"] is None
    assert view.workers(stage.hub) == {"rows": [], "page": 0, "pages": 1, "known": 0}


def test_a_round_under_way_and_committed(stage: Stage) -> None:
    status = view.status(stage.hub)
    assert (status["state"], status["round"], status["committed"]) == ("running", 1, 0)
    assert "waiting for 2 of 2 participants" in status["reason"]
    stage.commit()
    status = view.status(stage.hub)
    assert (status["round"], status["committed"], status["loss"]) == (2, 1, 1.0)
    assert status["head"] == stage.store.head().hex()
    # Two participants: three int8 codes up and three down, each.
    assert status["bytes"]["codes"] == 2 * (3 + 3)
    assert status["signal"] is not None
    json.dumps(status, allow_nan=False)


def test_what_each_worker_is_doing(stage: Stage) -> None:
    assert states(stage) == {"ada": "measuring", "ben": "measuring"}
    ada, ben = stage.hub.connections[1], stage.hub.connections[2]
    stage.now += 2.5
    stage.answer(ada)
    assert states(stage) == {"ada": "answered", "ben": "measuring"}
    eve = stage.join("eve")
    assert states(stage)["eve"] == "connected", "it is asked from the next round on"
    stage.hub.drop(eve, "it went")
    assert states(stage)["eve"] == "away"
    rows = {row["name"]: row for row in view.workers(stage.hub)["rows"]}
    assert (rows["ada"]["answer_s"], rows["ben"]["answer_s"]) == (2.5, None)
    assert (rows["ada"]["seen_s"], rows["ben"]["seen_s"]) == (0.0, 2.5)
    stage.now += 5.0
    assert view.row(stage.hub, eve.worker, stage.now)["seen_s"] == 5.0, "also when it is away"
    stage.answer(ben)
    assert states(stage)["ada"] == "measuring", "the next round"


def test_a_rejected_message_is_counted(stage: Stage) -> None:
    stage.answer(stage.hub.connections[1])
    stage.answer(stage.hub.connections[1], loss=0.25)  # other bytes for the same round
    assert view.row(stage.hub, 1, stage.now)["rejected"] == 1
    assert stage.hub.sequencer.tally.rejected == {"untimely": 1}
    assert view.status(stage.hub)["rejected"] == 1


def test_a_ledger_that_cannot_be_written(stage: Stage) -> None:
    stage.store.full = True
    stage.commit()
    status = view.status(stage.hub)
    assert status["state"] == "failed"
    assert status["reason"].startswith("the ledger cannot be written (disk full")
    stage.store.full = False
    stage.wait(60.0)
    assert view.status(stage.hub)["state"] == "running"
    assert view.status(stage.hub)["committed"] == 1


def test_the_end_of_the_run(stage: Stage) -> None:
    stage.commit(rounds=4)
    assert view.status(stage.hub)["state"] == "finished"
    stage.hub.draining = True
    assert view.status(stage.hub)["state"] == "stopping"


def test_who_stands_by_shows_the_run_and_why(stage: Stage) -> None:
    status = view.standing_by(stage.config, "a:7700 leads")
    assert (status["state"], status["reason"]) == ("standing by", "a:7700 leads")
    assert (status["run"], status["rounds"]) == ("small", 4)


def test_evaluations_are_a_curve_an_evaluator(stage: Stage) -> None:
    for name, committed, accuracy in (("eve", 0, 0.5), ("mal", 0, 0.25), ("eve", 1, 0.75)):
        stage.hub.sequencer.tally.evaluations.append(evaluation_of(name, committed, accuracy))
    eve, mal = view.evaluations(stage.hub)
    assert (eve["evaluator"], eve["committed"], eve["accuracy"]) == ("eve", [0, 1], [0.5, 0.75])
    assert (mal["evaluator"], mal["committed"]) == ("mal", [0])
    assert view.status(stage.hub)["accuracy"] == 0.75


def test_workers_come_in_pages_in_any_order(make_stage: MakeStage) -> None:
    stage = make_stage(rounds={"quorum": 60})
    for number in range(60):
        stage.join(f"worker-{number:02}")
    for number in (7, 9):
        stage.hub.sequencer.tally.accounts[number].rejected = number
    first = view.workers(stage.hub, order="rejected", descending=True)
    assert [row["worker"] for row in first["rows"][:3]] == [9, 7, 1]
    assert (first["pages"], first["known"], len(first["rows"])) == (3, 60, view.ROWS)
    last = view.workers(stage.hub, page=99)
    assert (last["page"], [row["worker"] for row in last["rows"]]) == (2, list(range(51, 61)))
    assert view.workers(stage.hub, order="; DROP")["rows"][0]["worker"] == 1


def test_unknown_figures_come_last_in_both_directions(stage: Stage) -> None:
    stage.now += 1.0
    stage.answer(stage.hub.connections[2])
    for descending in (True, False):
        table = view.workers(stage.hub, order="answer_s", descending=descending)
        assert [row["name"] for row in table["rows"]] == ["ben", "ada"]


@pytest.mark.parametrize("spent", [None, Spent(3, 1.25)])
def test_the_budget_of_a_private_run(make_stage: MakeStage, spent: Spent | None) -> None:
    private = {"mode": "worker", "target_epsilon": 4.0, "spare_rounds": 2}
    config = make_stage().config
    section = config.privacy.model_copy(update=private)
    budget = view.privacy(config.model_copy(update={"privacy": section}), spent)
    assert budget is not None
    assert (budget["target_epsilon"], budget["releases"]) == (4.0, 6)
    assert budget["epsilon"] == (None if spent is None else 1.25)
    assert budget["rounds"] == (0 if spent is None else 3)


def test_rounds_released_are_those_that_were_begun(stage: Stage) -> None:
    assert view.rounds_released(stage.hub) == 1, "somebody may have answered"
    stage.commit(rounds=2)
    assert view.rounds_released(stage.hub) == 3
    stage.commit(rounds=2)
    assert view.rounds_released(stage.hub) == 4
