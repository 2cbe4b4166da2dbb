"""The sequencer: handshakes, rounds on a store, and the same state after every restart (DESIGN §4).

Its stores are in memory; files are the business of tests/contracts, crashes of tests/simulation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields, replace
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runs import IDENTITY, OTHER_IDENTITY, config_of, contribution, hello

from lorand import ledger
from lorand.config import RunConfig
from lorand.errors import HandshakeError, LedgerError, LorandError
from lorand.ledger import Position
from lorand.manifest import Identity
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import folding, optimizer
from lorand_coordinator.rounds import State
from lorand_coordinator.sequencer import Message, Outgoing, Sequencer
from lorand_coordinator.store import SqliteStore, StoreUnavailable

NAMES: Final = ["ada", "ben", "cleo"]


class FickleStore(SqliteStore):
    """A store in memory whose disk can be full."""

    def __init__(self) -> None:
        super().__init__(":memory:")
        self.full = False
        self.appends_left: int | None = None

    def append(self, entry: pb.Entry, contributions: Sequence[bytes] = ()) -> tuple[bytes, bytes]:
        if self.full or self.appends_left == 0:
            raise StoreUnavailable("disk full; free space")
        if self.appends_left is not None:
            self.appends_left -= 1
        return super().append(entry, contributions)


class Room:
    """A sequencer with workers that have every entry, and what each was sent."""

    def __init__(self, config: RunConfig, identity: Identity | None = IDENTITY) -> None:
        self.config = config
        self.store = FickleStore()
        self.now = 0.0
        self.sent: dict[int, list[Message]] = {}
        self.sequencer = Sequencer(config, self.store, identity)

    def restart(self) -> Sequencer:
        """Another sequencer on the same ledger, as after a crash."""
        return Sequencer(self.config, self.store, None)

    @property
    def position(self) -> Position:
        assert self.sequencer.position is not None
        return self.sequencer.position

    def deliver(self, outgoing: list[Outgoing]) -> list[Outgoing]:
        for item in outgoing:
            self.sent.setdefault(item.worker, []).append(item.message)
        return outgoing

    def join(self, name: str) -> int:
        number, outgoing = self.sequencer.admit(hello(self.position, name))
        self.deliver(outgoing)
        self.deliver(self.sequencer.connect(number, self.now))
        return number

    def leave(self, worker: int) -> None:
        self.deliver(self.sequencer.disconnect(worker, self.now))

    def send(self, worker: int, request: wire.ParticipateRequest) -> list[Outgoing]:
        return self.deliver(self.sequencer.receive(worker, request, self.now))

    def report(self, worker: int, seed: int = 0, **changes: Any) -> list[Outgoing]:
        round_index = self.sequencer.engine.round_index
        return self.send(worker, contribution(self.config, round_index, seed + worker, **changes))

    def wait(self, seconds: float) -> list[Outgoing]:
        self.now += seconds
        return self.deliver(self.sequencer.tick(self.now))

    def commit(self, rounds: int = 1) -> None:
        """Commit rounds of the workers that take part."""
        for _ in range(rounds):
            for worker in sorted(self.sequencer.engine.participants):
                self.report(worker, seed=100 * self.sequencer.engine.round_index)


@pytest.fixture
def room() -> Iterator[Room]:
    opened = Room(config_of())
    with closing(opened.store):
        yield opened


def entries(outgoing: list[Outgoing]) -> list[tuple[int, str | None]]:
    """To whom which kind of entry went."""
    return [
        (item.worker, ledger.parse(item.message.entry).WhichOneof("kind"))
        for item in outgoing
        if item.message.HasField("entry")
    ]


def rejections(outgoing: list[Outgoing]) -> list[str]:
    return [i.message.rejection.reason for i in outgoing if i.message.HasField("rejection")]


# ------------------------------------------------------------- handshake

OURS: Final = ledger.origin(config_of(), IDENTITY)
OTHERS_RUN: Final = ledger.origin(config_of(run={"rounds": 5}), IDENTITY).run_digest


@pytest.mark.parametrize(
    ("change", "theirs", "ours", "advice"),
    [
        ({"protocol_version": 9}, "speaks protocol version 9", "coordinator 1", "same release"),
        ({"base_digest": b"\7" * 32}, "base weights (0707", "(0101", "same model and revision"),
        ({"base_digest": b""}, "base weights (none)", "(0101", "same model and revision"),
        ({"tokenizer_digest": b"\7" * 32}, "tokenizer (0707", "(0202", "with the run's model"),
        (
            {"manifest_digest": b"\7" * 32},
            "parameter manifest (0707",
            f"({IDENTITY.manifest.digest().hex()[:16]})",
            "same release of lorand",
        ),
        (
            {"run_digest": OTHERS_RUN},
            f"run ({OTHERS_RUN.hex()[:16]})",
            f"({OURS.run_digest.hex()[:16]})",
            "the coordinator's run file",
        ),
    ],
    ids=["protocol", "base", "no base", "tokenizer", "manifest", "run"],
)
def test_a_mismatch_names_both_sides_and_the_way_out(
    room: Room, change: dict[str, Any], theirs: str, ours: str, advice: str
) -> None:
    wrong = hello(room.position, "ada")
    for name, value in change.items():
        setattr(wrong, name, value)
    with pytest.raises(HandshakeError) as error:
        room.sequencer.admit(wrong)
    assert "worker" in str(error.value)
    assert "coordinator" in str(error.value)
    for text in (theirs, ours, advice):
        assert text in str(error.value)
    assert len(room.store) == 1, "nobody was made a member"


@pytest.mark.parametrize("name", ["", "x" * 65])
def test_a_name_has_1_to_64_characters(room: Room, name: str) -> None:
    with pytest.raises(HandshakeError, match=r"1 to 64 characters; choose one with --name"):
        room.sequencer.admit(hello(room.position, name))


def test_a_new_name_becomes_a_member_and_keeps_its_number(room: Room) -> None:
    assert [room.join(name) for name in ("ada", "ben", "ada", "cleo", "ben")] == [1, 2, 1, 3, 2]
    members = [ledger.parse(body).member for body in room.store.entries(1)]
    assert [(m.worker, m.name) for m in members] == [(1, "ada"), (2, "ben"), (3, "cleo")]


def test_the_number_of_workers_has_a_limit() -> None:
    full = Room(config_of(service={"max_workers": 2}))
    with closing(full.store):
        assert [full.join(name) for name in ("ada", "ben", "ada")] == [1, 2, 1]
        with pytest.raises(HandshakeError, match="has its 2 workers already"):
            full.join("cleo")


def test_a_member_that_cannot_be_written_may_try_again(room: Room) -> None:
    room.store.full = True
    with pytest.raises(StoreUnavailable):
        room.join("ada")
    room.store.full = False
    assert room.join("ben") == 1
    assert room.join("ada") == 2


def test_everyone_connected_hears_of_a_member_before_it_is_welcomed(room: Room) -> None:
    room.join("ada")
    _, outgoing = room.sequencer.admit(hello(room.position, "ben"))
    assert entries(outgoing) == [(1, "member")]


def test_a_rolled_back_ledger_is_noticed(room: Room) -> None:
    """The worker has seen more than the coordinator holds: it must not be overwritten."""
    ahead = replace(room.position, next_sequence=5, head=b"\7" * 32)
    with pytest.raises(HandshakeError, match=r"applied 5 entries, .* holds 1: .*rolled back"):
        room.sequencer.admit(hello(ahead, "ada"))


def test_a_forked_history_is_noticed(room: Room) -> None:
    room.join("ada")
    forked = replace(room.position, head=b"\7" * 32)
    with pytest.raises(HandshakeError) as error:
        room.sequencer.admit(hello(forked, "ada"))
    assert "the histories differ at entry 1: the worker has 0707070707070707" in str(error.value)
    assert room.position.head.hex()[:16] in str(error.value)


@pytest.mark.parametrize("behind", [0, 1, 2])
def test_any_true_prefix_is_welcome(room: Room, behind: int) -> None:
    room.join("ada")
    room.join("ben")
    bodies = list(room.store.entries())
    position = OURS
    for body in bodies[: len(bodies) - behind]:
        position = ledger.apply(position, body)
    assert room.sequencer.admit(hello(position, "ada")) == (1, [])


# ------------------------------------------------------------- the first worker's identity


def adopting() -> Room:
    return Room(config_of(run={"adopt_first_worker": True}), None)


def first_hello(room: Room, name: str, identity: Identity = IDENTITY) -> wire.Hello:
    return hello(ledger.origin(room.config, identity), name)


def test_the_first_workers_identity_is_adopted_where_the_run_allows_it() -> None:
    room = adopting()
    with closing(room.store):
        assert (room.sequencer.position, room.sequencer.identity) == (None, None)
        assert room.wait(1.0) == []
        assert room.sequencer.admit(first_hello(room, "ada", OTHER_IDENTITY)) == (1, [])
        assert room.sequencer.identity == OTHER_IDENTITY
        assert ledger.origin_of(next(room.store.entries())).identity == OTHER_IDENTITY
        with pytest.raises(HandshakeError, match="base weights"):
            room.sequencer.admit(first_hello(room, "ben"))
        assert room.restart().identity == OTHER_IDENTITY


def test_without_a_lock_and_a_permission_nobody_is_admitted() -> None:
    room = Room(config_of(), None)
    with closing(room.store):
        with pytest.raises(HandshakeError, match=r"run.lock.*prepare.*adopt_first_worker"):
            room.sequencer.admit(first_hello(room, "ada"))
        assert len(room.store) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"run_digest": b"\7" * 32},
        {"base_digest": b""},
        {"tokenizer_digest": b"\7"},
        {"manifest": ""},
        {"manifest": "[]"},
        {"manifest": "?"},
        {"manifest_digest": b"\7" * 32},
        {"protocol_version": 9},
        {"name": ""},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_worker_that_is_refused_leaves_no_identity_behind(change: dict[str, Any]) -> None:
    """Else one worker with the wrong run file would decide over everybody's base model."""
    room = adopting()
    with closing(room.store):
        wrong = first_hello(room, "ada", OTHER_IDENTITY)
        for name, value in change.items():
            setattr(wrong, name, value)
        with pytest.raises(LorandError):
            room.sequencer.admit(wrong)
        assert len(room.store) == 0
        assert room.sequencer.admit(first_hello(room, "ben")) == (1, [])
        assert room.sequencer.identity == IDENTITY


# ------------------------------------------------------------- contributions


@pytest.fixture
def busy(room: Room) -> Room:
    """Two workers, in the first round."""
    room.join("ada")
    room.join("ben")
    assert room.sequencer.engine.phase == "reporting"
    return room


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


def evaluation(**changes: Any) -> pb.Evaluation:
    given = {"sequence": 0, "evaluator": "eve", "accuracy": 0.75, "loss": 0.5, "examples": 9}
    return pb.Evaluation(**{**given, **changes})


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


# ------------------------------------------------------------- reopening


def assert_same(one: Sequencer, other: Sequencer) -> None:
    """The same place, optimizer state, counters and figures; connections are not kept."""
    assert one.position is not None
    assert other.position is not None
    for name in ("next_sequence", "head", "committed", "finished", "identity", "run_digest"):
        assert getattr(one.position, name) == getattr(other.position, name), name
    assert one.position.coefficients.tolist() == other.position.coefficients.tolist()
    assert one.position.closed == other.position.closed
    for worker in (1, 2):
        drawn = [s.position.draws.of(99, worker).tolist() for s in (one, other) if s.position]
        assert drawn[0] == drawn[1]
    for each in fields(optimizer.State):
        ours, theirs = (getattr(s._optimizer, each.name) for s in (one, other))
        assert np.array_equal(ours, theirs), each.name
    assert counters(one.engine) == counters(other.engine)
    assert known(one) == known(other)
    assert one.tally.evaluations == other.tally.evaluations


def counters(state: State) -> tuple[int, int, int, bool]:
    return state.round_index, state.committed, state.abandoned, state.phase == "finished"


def known(sequencer: Sequencer) -> dict[int, tuple[str, int]]:
    return {w: (a.name, a.contributions) for w, a in sequencer.tally.accounts.items()}


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
