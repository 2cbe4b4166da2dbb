"""The sequencer has the same state after every restart, or refuses what was tampered with."""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runs import IDENTITY, OTHER_IDENTITY, config_of, contribution
from tests.unit.sequencer.room import Room, assert_same, evaluation, rejections

from lorand import ledger
from lorand.errors import LedgerError
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import StoreUnavailable

NAMES: Final = ["ada", "ben", "cleo"]


# ------------------------------------------------------------- reopening

Action = Callable[[Room], object]
WORKERS: Final = st.integers(1, 3)
REPORTS: Final[st.SearchStrategy[Action]] = st.builds(
    lambda worker, seed: lambda room: if_known(room, worker, lambda: room.report(worker, seed)),
    WORKERS,
    st.integers(1, 2),
)
ACTIONS: Final[st.SearchStrategy[Action]] = st.one_of(
    REPORTS,
    REPORTS,
    st.builds(lambda name: lambda room: room.join(name), st.sampled_from(NAMES)),
    st.builds(
        lambda worker: lambda room: if_known(room, worker, lambda: room.leave(worker)), WORKERS
    ),
    st.builds(lambda seconds: lambda room: room.wait(seconds), st.sampled_from([0.1, 5.0, 10.0])),
    st.just(lambda room: room.sequencer.post_evaluation(evaluation(), room.position.run_digest)),
    st.just(lambda room: setattr(room.store, "full", not room.store.full)),
)


def if_known(room: Room, worker: int, then: Callable[[], object]) -> None:
    if worker in room.sequencer.tally.accounts:
        then()


DIRECTIONS: Final[list[dict[str, Any]]] = [
    {"mode": "shared"},
    {"mode": "own"},
    {"mode": "own", "rotate_every": 1},
    {"mode": "shared", "rotate_every": 2},
    {"mode": "own", "drawing": "weighted"},
    {"mode": "shared", "drawing": "weighted-unbiased"},
]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["sgd", "adam"]),
    st.sampled_from(DIRECTIONS),
    st.sampled_from([0, 2]),
    st.sampled_from([1, 2, 50]),
    st.lists(ACTIONS, max_size=50),
)
def test_reopening_anywhere_gives_the_live_state(
    kind: str,
    directions: dict[str, Any],
    steps: int,
    checkpoint_every: int,
    actions: list[Action],
) -> None:
    """After every event, with checkpoints or without; writing nothing in between."""
    room = Room(
        config_of(
            optimizer={"kind": kind, "momentum": 0.9},
            directions=directions,
            local={"steps": steps},
            service={"checkpoint_every": checkpoint_every},
        )
    )
    with closing(room.store):
        for action in actions:
            try:
                action(room)
            except StoreUnavailable:
                assert room.store.full
            count = len(room.store)
            assert_same(room.restart(), room.sequencer)
            assert len(room.store) == count


@pytest.mark.parametrize("directions", DIRECTIONS, ids=str)
@pytest.mark.parametrize("checkpoint_every", [1, 2, 50])
def test_a_restarted_run_writes_the_same_bytes(
    checkpoint_every: int, directions: dict[str, Any]
) -> None:
    """Stopped and started anew after every round, or never: one history."""
    heads = []
    for restarts in (False, True):
        room = Room(
            config_of(directions=directions, service={"checkpoint_every": checkpoint_every})
        )
        with closing(room.store):
            for _ in range(4):
                room.join("ada")
                room.join("ben")
                room.commit()
                if restarts:
                    room.sequencer = room.restart()
            room.wait(0.1)
            assert room.position.finished
            has_checkpoint = room.store.newest_checkpoint() is not None
            assert has_checkpoint == (checkpoint_every <= 2 and not room.config.needs_history)
            heads.append(room.position.head)
    assert heads[0] == heads[1]


def test_a_walk_too_far_is_rejected_and_the_round_goes_on() -> None:
    """One participant's huge scale does not hold the run."""
    room = Room(config_of(local={"steps": 2}, rounds={"quorum": 2}))
    with closing(room.store):
        for name in ("ada", "ben", "eve"):
            room.join(name)
        request = contribution(room.config, 1, seed=1)
        for scale in (2**38, 2**55, 2**62, 2**64 - 1):
            request.contribution.scale = scale
            (why,) = rejections(room.send(3, request))
            assert "limit" in why
        room.report(1)
        room.report(2)
        room.wait(10.0)
        assert room.position.committed == 1
        assert room.sequencer.tally.accounts[3].rejected == 4


def test_what_an_operator_may_change_between_restarts(busy: Room) -> None:
    busy.commit()
    moved = busy.config.service.model_copy(update={"address": "0.0.0.0:1", "checkpoint_every": 3})
    changed = busy.config.model_copy(update={"service": moved})
    assert_same(Sequencer(changed, busy.store, IDENTITY), busy.sequencer)


def test_another_config_is_refused(busy: Room) -> None:
    other = config_of(run={"name": "other"}, optimizer={"learning_rate": 0.5})
    with pytest.raises(LedgerError, match=r"of run 'small' with another config than 'other': use"):
        Sequencer(other, busy.store, IDENTITY)


def test_another_lock_is_refused(busy: Room) -> None:
    with pytest.raises(LedgerError, match=r"run.lock names another base model.*restore the run"):
        Sequencer(busy.config, busy.store, OTHER_IDENTITY)


# ------------------------------------------------------------- tampering


@pytest.fixture
def old(busy: Room) -> Room:
    """Two committed rounds: entries 3 and 4."""
    busy.commit(2)
    return busy


def execute(room: Room, query: str, *parameters: object) -> None:
    room.store._database.execute(query, parameters)


def test_a_tampered_contribution_is_refused(old: Room) -> None:
    """Another scalar, one left out, one too many, another order."""
    body = old.store.contributions(4)[1]
    room_for = "INSERT INTO contribution VALUES (4, ?, ?)"
    cases: list[list[tuple[str, Sequence[object]]]] = [
        [("UPDATE contribution SET body = ? WHERE sequence = 4 AND position = 1", [flipped(body)])],
        [("DELETE FROM contribution WHERE sequence = 4 AND position = 1", [])],
        [(room_for, [2, body])],
        [
            ("UPDATE contribution SET position = -1 WHERE sequence = 4 AND position = 1", []),
        ],
    ]
    for case in cases:
        execute(old, "SAVEPOINT untouched")
        for query, parameters in case:
            execute(old, query, *parameters)
        with pytest.raises(LedgerError, match="stored with entry 4 are not those it was made of"):
            old.restart()
        execute(old, "ROLLBACK TO untouched")
        execute(old, "RELEASE untouched")
    assert_same(old.restart(), old.sequencer)


def flipped(body: bytes) -> bytes:
    stored = pb.StoredContribution.FromString(body)
    codes = stored.contribution.codes
    stored.contribution.codes = bytes([codes[0] ^ 1]) + codes[1:]
    return stored.SerializeToString(deterministic=True)


def test_a_commit_that_does_not_follow_from_its_contributions_is_refused(old: Room) -> None:
    """Contributions, digest and chain all rewritten to fit: ΔA gives it away."""
    parts = [flipped(body) for body in old.store.contributions(4)]
    entry = ledger.parse(next(old.store.entries(4, 1)))
    entry.commit.contributions_digest = ledger.contributions_digest(parts)
    body = entry.SerializeToString(deterministic=True)
    digest = ledger.entry_digest(old.store.digest(3), body)
    execute(old, "UPDATE entry SET body = ?, digest = ? WHERE sequence = 4", body, digest)
    for place, part in enumerate(parts):
        query = "UPDATE contribution SET body = ? WHERE sequence = 4 AND position = ?"
        execute(old, query, part, place)
    with pytest.raises(LedgerError, match="round 2 does not repeat to what the ledger holds"):
        old.restart()


@pytest.mark.parametrize("column", ["coefficients", "state", "head", "committed"])
def test_a_damaged_checkpoint_is_refused(column: str) -> None:
    """It would become the weights of those who join late."""
    room = Room(config_of(service={"checkpoint_every": 2}))
    with closing(room.store):
        room.join("ada")
        room.join("ben")
        room.commit(2)
        checkpoint = room.store.newest_checkpoint()
        assert checkpoint is not None
        value = getattr(checkpoint, column)
        wrong = value + 1 if column == "committed" else bytes([value[0] ^ 1]) + value[1:]
        execute(room, f"UPDATE checkpoint SET {column} = ?", wrong)
        with pytest.raises(LedgerError, match=r"a checkpoint (is damaged|does not belong)"):
            room.restart()
        execute(room, f"UPDATE checkpoint SET {column} = ?", value)
        assert_same(room.restart(), room.sequencer)
