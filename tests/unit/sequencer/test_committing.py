"""The sequencer's rounds on a store: contributions, commits, full disks, evaluations."""

from contextlib import closing
from typing import Any

import numpy as np
import pytest
from tests.runs import config_of, contribution, hello
from tests.unit.sequencer.room import (
    OTHERS_RUN,
    OURS,
    Room,
    adopting,
    assert_same,
    entries,
    evaluation,
    rejections,
)

from lorand import ledger
from lorand.errors import HandshakeError
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import folding, optimizer

# ------------------------------------------------------------- contributions


@pytest.mark.parametrize("size", [0, 2, 4, 1000])
def test_a_contribution_of_the_wrong_length_is_rejected_and_counted(busy: Room, size: int) -> None:
    wrong = contribution(busy.config, 1, 0)
    wrong.contribution.codes = bytes(size)
    assert rejections(busy.send(1, wrong)) == [f"3 int8 codes take 3 bytes, not {size}"]
    assert busy.sequencer.tally.accounts[1].rejected == 1
    assert busy.sequencer.engine.contributions == {}
    busy.report(1)
    assert set(busy.sequencer.engine.contributions) == {1}


def test_rejections_of_the_engine_are_counted_too(busy: Room) -> None:
    busy.report(1)
    assert len(rejections(busy.report(1, seed=5))) == 1
    assert len(rejections(busy.send(2, contribution(busy.config, 9, 0)))) == 1
    assert [busy.sequencer.tally.accounts[w].rejected for w in (1, 2)] == [1, 1]


def test_messages_that_do_not_belong_here_are_rejected(busy: Room) -> None:
    assert rejections(busy.send(1, wire.ParticipateRequest())) == [
        "a worker does not send nothing here"
    ]
    again = wire.ParticipateRequest(hello=hello(busy.position, "ada"))
    assert rejections(busy.send(1, again)) == ["a worker does not send hello here"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_telemetry_that_is_no_number_is_dropped(busy: Room, loss: float) -> None:
    """The scalars count all the same."""
    busy.report(1, loss=loss)
    busy.report(2, loss=0.25)
    stored = stored_contributions(busy, 3)
    assert [c.contribution.HasField("loss") for c in stored] == [False, True]
    assert busy.sequencer.tally.loss == 0.25


def stored_contributions(room: Room, sequence: int) -> list[pb.StoredContribution]:
    return [pb.StoredContribution.FromString(b) for b in room.store.contributions(sequence)]


def test_without_telemetry_no_loss_is_kept() -> None:
    """Invariant 6: what leaves a worker is a setting of the run, not of who sends it."""
    room = Room(config_of(rounds={"telemetry": "none"}))
    with closing(room.store):
        room.join("ada")
        room.join("ben")
        room.commit()
        assert [c.contribution.HasField("loss") for c in stored_contributions(room, 3)] == [
            False,
            False,
        ]
        assert room.sequencer.tally.loss is None


def test_fields_of_another_version_are_not_kept(busy: Room) -> None:
    """A contribution has the size of the run's codes, and no room to carry anything else."""
    smuggled = contribution(busy.config, 1, 0)
    data = smuggled.contribution.SerializeToString() + b"\xfa\x3e\x05hello"
    smuggled.contribution.MergeFromString(data)
    busy.send(1, smuggled)
    busy.report(2)
    assert all(b"hello" not in body for body in busy.store.contributions(3))


# ------------------------------------------------------------- rounds on the store


def test_a_round_from_start_to_commit(busy: Room) -> None:
    starts = {w: [m.round_start for m in busy.sent[w] if m.HasField("round_start")] for w in (1, 2)}
    assert [s.round_index for s in starts[1] + starts[2]] == [1, 1]
    busy.report(1)
    outgoing = busy.report(2)
    assert entries(outgoing) == [(1, "commit"), (2, "commit")]
    kinds = [item.message.WhichOneof("message") for item in outgoing]
    assert kinds == ["entry", "entry", "round_start", "round_start"]
    entry = ledger.parse(outgoing[0].message.entry)
    assert entry.sequence == 3
    assert entry.round_index == 1
    assert list(entry.commit.workers) == [1, 2]
    ledger.check_contributions(entry, busy.store.contributions(3))
    assert [c.worker for c in stored_contributions(busy, 3)] == [1, 2]
    assert busy.position.coefficients.any()


def test_what_is_committed_is_the_optimizers_step(busy: Room) -> None:
    """Recomputed from the stored contributions, round after round."""
    busy.commit(3)
    state, position = optimizer.start(busy.config), OURS
    for body in busy.store.entries():
        entry = ledger.parse(body)
        if entry.HasField("commit"):
            stored = stored_contributions(busy, entry.sequence)
            reports = folding.reports(busy.config, stored, 0)
            assert entry.commit.scale_exponent == state.scale_exponent
            state, update = optimizer.advance(
                busy.config, OURS.draws, state, entry.round_index, reports
            )
            assert update.scale == entry.commit.scale
            assert update.codes.tolist() == np.frombuffer(entry.commit.codes, np.int8).tolist()
        position = ledger.apply(position, body)
    assert position.coefficients.tolist() == busy.position.coefficients.tolist()
    assert state.coefficients.tolist() == position.coefficients.tolist()


def test_every_worker_is_sent_the_whole_ledger_in_order(busy: Room) -> None:
    """What it had when it joined, and then each entry once."""
    busy.commit(4)
    assert busy.sequencer.engine.phase == "finished"
    ours = list(busy.store.entries())
    for worker, had in ((1, 2), (2, 3)):
        assert [m.entry for m in busy.sent[worker] if m.HasField("entry")] == ours[had:]
    kinds = [ledger.parse(body).WhichOneof("kind") for body in ours]
    assert kinds == ["start", "member", "member", *["commit"] * 4, "finish"]


def test_a_round_is_measured_at_the_scale_its_commit_names(busy: Room) -> None:
    """The public scale moves, and everyone is told before it measures."""
    busy.commit(4)
    told = [m.round_start.scale_exponent for m in busy.sent[1] if m.HasField("round_start")]
    commits = [ledger.parse(body).commit for body in busy.store.entries(3, 4)]
    assert told == [commit.scale_exponent for commit in commits]
    assert len(set(told)) > 1


def test_an_abandoned_round_is_an_entry_with_its_reason(busy: Room) -> None:
    busy.report(1)
    outgoing = busy.wait(10.0)
    assert entries(outgoing) == [(1, "abandon"), (2, "abandon")]
    entry = ledger.parse(outgoing[0].message.entry)
    assert entry.abandon.reason == "1 of 2 participants reported, the quorum is 2"
    assert busy.sequencer.engine.round_index == 2


def test_a_participant_that_comes_back_is_asked_again(busy: Room) -> None:
    busy.leave(1)
    outgoing = busy.sequencer.connect(1, busy.now)
    assert [(o.worker, o.message.round_start.round_index) for o in outgoing] == [(1, 1)]


def test_a_long_reason_is_cut(busy: Room) -> None:
    skip = wire.Skip(round_index=1, reason="x" * 100_000)
    outgoing = busy.send(1, wire.ParticipateRequest(skip=skip))
    assert entries(outgoing) == [(1, "abandon"), (2, "abandon")]
    assert all(len(body) < 1000 for body in busy.store.entries(1))


# ------------------------------------------------------------- a full disk


def test_a_commit_that_cannot_be_written_is_shown_to_nobody_and_tried_again(busy: Room) -> None:
    busy.report(1)
    before = busy.position
    busy.store.full = True
    for outgoing in (busy.report(2), busy.wait(1.0), busy.wait(4.5), busy.wait(1.0)):
        assert outgoing == []
        assert "the ledger cannot be written (disk full; free space)" in busy.sequencer.reason
        assert busy.sequencer.engine.phase == "committing"
        assert busy.position is before
        assert len(busy.store) == 3
    busy.store.full = False
    outgoing = busy.wait(5.0)
    assert entries(outgoing) == [(1, "commit"), (2, "commit")]
    assert busy.sequencer.tally.accounts[1].contributions == 1
    assert busy.sequencer.engine.committed == 1
    assert_same(busy.restart(), busy.sequencer)


def test_workers_may_come_and_go_meanwhile(busy: Room) -> None:
    """And evaluations be posted: entries take the place the commit did not."""
    busy.report(1)
    busy.store.full = True
    busy.report(2)
    busy.store.full = False
    busy.leave(1)
    assert busy.join("cleo") == 3
    busy.deliver(busy.sequencer.post_evaluation(evaluation(), busy.position.run_digest))
    outgoing = busy.wait(5.0)
    assert entries(outgoing) == [(2, "commit"), (3, "commit")]
    commit = ledger.parse(outgoing[0].message.entry)
    assert (commit.sequence, list(commit.commit.workers)) == (5, [1, 2])
    assert_same(busy.restart(), busy.sequencer)


@pytest.mark.parametrize("rate", [2e9, 1e12, 1e30])
def test_an_update_too_large_holds_the_run_and_says_so(rate: float) -> None:
    """It is no reason to hang without a word, nor to end the coordinator."""
    room = Room(config_of(optimizer={"learning_rate": rate}))
    with closing(room.store):
        room.join("ada")
        room.join("ben")
        room.report(1)
        assert room.report(2) == []
        assert "above the limit 2^62; lower the learning rate" in room.sequencer.reason
        assert len(room.store) == 3
        assert room.wait(5.0) == []
        assert "trying again in 5 s" in room.sequencer.reason


@pytest.mark.parametrize("outcome", ["abandon", "finish"])
def test_other_outcomes_are_tried_again_too(outcome: str) -> None:
    room = Room(config_of(run={"rounds": 1}))
    with closing(room.store):
        room.join("ada")
        room.join("ben")
        if outcome == "finish":
            room.store.appends_left = 1  # the commit's
            room.report(1)
            assert entries(room.report(2)) == [(1, "commit"), (2, "commit")]
        else:
            room.store.full = True
            assert room.wait(10.0) == []
        assert "cannot be written" in room.sequencer.reason
        room.store.full, room.store.appends_left = False, None
        assert entries(room.wait(5.0)) == [(1, outcome), (2, outcome)]
        assert_same(room.restart(), room.sequencer)


# ------------------------------------------------------------- evaluations


def test_an_evaluation_is_an_entry_for_everyone(busy: Room) -> None:
    posted = busy.deliver(busy.sequencer.post_evaluation(evaluation(), busy.position.run_digest))
    assert entries(posted) == [(1, "evaluation"), (2, "evaluation")]
    assert ledger.parse(posted[0].message.entry).evaluation == evaluation()
    assert busy.sequencer.tally.evaluations == [evaluation()]
    assert busy.sequencer.engine.phase == "reporting", "the round goes on"


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy": 1.01},
        {"accuracy": -0.01},
        {"accuracy": float("nan")},
        {"loss": float("nan")},
        {"loss": float("inf")},
        {"evaluator": "x" * 65},
    ],
)
def test_what_is_no_evaluation_is_refused(busy: Room, changes: dict[str, Any]) -> None:
    with pytest.raises(HandshakeError, match="evaluat"):
        busy.sequencer.post_evaluation(evaluation(**changes), busy.position.run_digest)
    assert len(busy.store) == 3


def test_an_evaluation_of_another_run_is_refused(busy: Room) -> None:
    with pytest.raises(HandshakeError, match="of another run"):
        busy.sequencer.post_evaluation(evaluation(), OTHERS_RUN)
    room = adopting()
    with closing(room.store), pytest.raises(HandshakeError, match="of another run"):
        room.sequencer.post_evaluation(evaluation(), OTHERS_RUN)


def test_evaluations_come_also_after_the_end(busy: Room) -> None:
    busy.commit(4)
    busy.sequencer.post_evaluation(evaluation(committed=4), busy.position.run_digest)
    assert busy.position.finished
    assert_same(busy.restart(), busy.sequencer)
