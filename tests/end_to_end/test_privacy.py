"""A private run: what is spent is counted, nothing else leaves, and starting over gives no more."""

from pathlib import Path
from typing import Any, Final

import pytest
from tests import tiny
from tests.commands import MakeRoom, Room

from lorand import ledger
from lorand.config import EstimatorKind
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.store import SqliteStore
from lorand_worker import budget

NAMES: Final = ("hotels", "gadgets", "restaurants")
ROUNDS: Final = 6


def settings(kind: EstimatorKind = "one-sided", **privacy: Any) -> tiny.Settings:
    made: tiny.Settings = tiny.settings(
        kind,
        run={"rounds": ROUNDS},
        estimator={"directions_per_round": 4, "batch_size": 16},
        rounds={"quorum": 3, "start_with": 3, "deadline_s": 60.0, "telemetry": "none"},
        privacy={"mode": "worker", "sample_rate": 0.1, "clip_bound": 4.0, **privacy},
        service={"heartbeat_timeout_s": 60.0},
    )
    return made


def contributions(path: Path) -> list[pb.Contribution]:
    """All that workers ever sent, as the coordinator's ledger holds it."""
    store = SqliteStore(path, read_only=True)
    try:
        return [
            pb.StoredContribution.FromString(body).contribution
            for entry in map(ledger.parse, store.entries())
            if entry.HasField("commit")
            for body in store.contributions(entry.sequence)
        ]
    finally:
        store.close()


def taken_part(room: Room, *arguments: object) -> list[dict[str, Any]]:
    """Run it to its end with three workers; return what they say."""
    with room.coordinator() as (_, address):
        workers = [room.join(address, name, *arguments) for name in NAMES]
        try:
            return [worker.result() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()


@pytest.mark.slow
def test_a_private_run_and_what_it_spends(make_room: MakeRoom) -> None:
    room = make_room(settings(target_epsilon=3.0)).lock()
    results = taken_part(room, "--require-privacy", "--max-epsilon", "3")
    replayed = room.once("lr-worker", "replay", room.export(), "--model", room.model)
    assert {result["weights_digest"] for result in results} == {replayed["weights_digest"]}
    assert [(r["rounds"], r["skipped"]) for r in results] == [(ROUNDS, 0)] * 3

    accounts = budget.accounts(room.state)
    assert sorted(account.worker for account in accounts) == sorted(NAMES)
    assert [(a.charged, a.limit, a.scalars) for a in accounts] == [(ROUNDS, ROUNDS, 4)] * 3
    said = room.once("lr-worker", "privacy", "--state", room.state)
    for run in said["runs"]:
        assert 2.9 < run["epsilon_spent"] <= 3.0
        assert (run["releases_left"], run["scalars"], run["delta"]) == (0, 24, 1e-5)
    planned = room.once("lr-worker", "privacy", room.run)
    assert planned["noise_multiplier"] == accounts[0].release.multiplier

    sent = contributions(room.ledger)
    assert len(sent) == 3 * ROUNDS
    assert {f.name for part in sent for f, _ in part.ListFields()} == {"round_index", "codes"}

    for path in room.ledger.parent.glob(f"{room.ledger.name}*"):
        path.unlink()
    for path in room.state.glob("*head.json"):  # else they refuse a history that begins anew
        path.unlink()
    with room.coordinator() as (_, address):
        workers = [room.join(address, name) for name in NAMES]
        for worker in workers:
            code, output = worker.end()
            assert (code, output) == (9, "")
            assert "6 of 6 releases" in worker.errors()
            assert "this worker sends nothing more" in worker.errors()
    assert contributions(room.ledger) == []
    assert budget.accounts(room.state) == accounts


@pytest.mark.slow
def test_a_run_that_releases_differences(make_room: MakeRoom) -> None:
    """DIFF2, experimental: of whole data, with restarts after three rounds and six."""
    content = settings(
        "backprop",
        target_epsilon=3.0,
        sample_rate=1.0,
        estimator="diff2",
        restart_every=3,
    )
    content["codec"] = {"up": "int32", "down": "int32"}
    content["optimizer"] = {"learning_rate": 0.01, "normalise": False}
    room = make_room(content).lock()
    results = taken_part(room, "--max-epsilon", "3")
    replayed = room.once("lr-worker", "replay", room.export(), "--model", room.model)
    assert {result["weights_digest"] for result in results} == {replayed["weights_digest"]}
    accounts = budget.accounts(room.state)
    assert [(a.charged, a.left) for a in accounts] == [(ROUNDS, 0)] * 3
    assert [(a.restarts.charged if a.restarts else 0) for a in accounts] == [2] * 3
    planned = room.once("lr-worker", "privacy", room.run)
    assert (planned["releases"], planned["releases_of_restarts"]) == (ROUNDS, 2)
    said = room.once("lr-worker", "privacy", "--state", room.state)
    spent = [run["epsilon_spent"] for run in said["runs"]]
    assert spent == pytest.approx([planned["epsilon"]] * 3)
    sent = contributions(room.ledger)
    assert {f.name for part in sent for f, _ in part.ListFields()} == {"round_index", "codes"}


def test_pure_epsilon_and_its_refusals(make_room: MakeRoom) -> None:
    """Of first-order sketches, one an example, in one bit; Laplace noise has a closed form."""
    laplace = {"mechanism": "laplace", "delta": 0.0, "target_epsilon": 2.0}
    content = settings("backprop", **laplace)
    content["codec"] = {"up": "sign", "down": "sign"}
    room = make_room(content).lock()
    with room.coordinator() as (_, address):
        arguments = room.join_arguments(address, "hotels")[:-2]
        state = ("--state", room.folder / "elsewhere")
        code, said = room.failure("lr-worker", *arguments, *state, "--max-epsilon", "1.5")
        assert code == 5
        assert "the run's epsilon is 2, this worker allows 1.5" in said
        evaluate = ("evaluate", address, "--data", room.data["test"], "--model", room.model)
        code, said = room.failure("lr-worker", *evaluate, "--follow")
        assert code == 2
        assert "say so with --public-data" in said
    results = taken_part(room)
    assert len({result["weights_digest"] for result in results}) == 1
    assert [account.charged for account in budget.accounts(room.state)] == [ROUNDS] * 3


def test_runs_without_privacy_are_refused_where_it_is_required(make_room: MakeRoom) -> None:
    room = make_room(settings(mode="none")).lock()
    with room.coordinator() as (_, address):
        arguments = room.join_arguments(address, "hotels")
        code, said = room.failure("lr-worker", *arguments, "--require-privacy")
        assert code == 5
        assert "takes part only in private runs" in said
