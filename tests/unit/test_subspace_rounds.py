"""Elections of subspaces at the coordinator: votes, what is committed, and the same after all."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Final

import numpy as np
import pytest
from tests import runs

from lorand import adapter, ledger
from lorand.errors import HandshakeError, LedgerError
from lorand.manifest import Identity, Manifest, TensorSpec
from lorand.subspaces import cosines, elections
from lorand.subspaces.basis import same
from lorand.subspaces.elections import Elections
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.sequencer import Outgoing, Sequencer
from lorand_coordinator.store import SqliteStore

MANIFEST: Final = Manifest(
    (
        TensorSpec("a", (9, 6), "float32", 0, 2),
        TensorSpec("b", (9,), "float32"),
        TensorSpec("c", (5, 8), "float32", 0, 2),
    )
)
IDENTITY: Final = Identity(b"\1" * 32, b"\2" * 32, MANIFEST)
CONFIG: Final = runs.config_of(
    run={"rounds": 7},
    directions={"pool_size": 64, "rotate_every": 2},
    estimator={"kind": "backprop"},
    subspace={"kind": "coordinate", "rank": 2, "selection": "voted", "refresh_every": 2},
)
VOTES: Final = {1: {0: [0, 3], 2: [1, 4]}, 2: {0: [3, 5], 2: [0, 4]}}


class Room:
    """A sequencer with two workers."""

    def __init__(self) -> None:
        self.store = SqliteStore(":memory:")
        self.sequencer = Sequencer(CONFIG, self.store, IDENTITY)
        for name in ("ada", "ben"):
            number, _ = self.sequencer.admit(runs.hello(self.position, name))
            self.sequencer.connect(number, 0.0)

    @property
    def position(self) -> ledger.Position:
        assert self.sequencer.position is not None
        return self.sequencer.position

    def report(self, worker: int, votes: Sequence[pb.Columns] | None = None) -> list[Outgoing]:
        """Contribute to the round, with the votes that it asks for unless others are given."""
        request = runs.contribution(CONFIG, self.sequencer.engine.round_index, worker)
        if votes is None:
            due = self.position.elections.due(CONFIG, MANIFEST, self.position.committed)
            votes = elections.pack({tid: np.array(VOTES[worker][tid]) for tid in due})
        request.contribution.votes.extend(votes)
        return self.sequencer.receive(worker, request, 0.0)

    def commit(self, rounds: int) -> None:
        for _ in range(rounds):
            self.report(1)
            self.report(2)


@pytest.fixture
def room() -> Iterator[Room]:
    made = Room()
    with closing(made.store):
        yield made


def test_the_first_round_and_the_last_of_each_period_elect() -> None:
    asked = [bool(Elections().due(CONFIG, MANIFEST, n)) for n in range(7)]
    assert asked == [True, False, True, False, True, False, False], "the last one leads nowhere"


def test_what_most_voted_for_is_committed_once_and_spans_the_next_pool(room: Room) -> None:
    room.commit(1)
    entry = ledger.parse(list(room.store.entries())[-1])
    chosen = elections.read(MANIFEST, entry.commit.basis, [0, 2])
    assert {tid: c.tolist() for tid, c in chosen.items()} == {0: [0, 3], 2: [0, 4]}
    assert room.position.pool(0).basis is None, "the first round is in full space"
    basis = room.position.pool(1).basis
    assert basis is not None
    assert basis.indices[2].tolist() == [0, 4]
    room.commit(1)
    assert not ledger.parse(list(room.store.entries())[-1]).commit.basis


@pytest.mark.parametrize(
    ("votes", "why"),
    [
        ([], "due"),
        ([pb.Columns(tensor=0, gaps=[0, 3])], "due"),
        ([pb.Columns(tensor=0, gaps=[0, 3]), pb.Columns(tensor=2, gaps=[0, 5])], "ascending"),
        ([pb.Columns(tensor=0, gaps=[3, 0]), pb.Columns(tensor=2, gaps=[0, 4])], "ascending"),
        ([pb.Columns(tensor=0, gaps=[0, 1]), pb.Columns(tensor=1, gaps=[0, 4])], "tensor 1"),
    ],
    ids=["none", "too few", "out of range", "repeated", "of a vector"],
)
def test_a_ballot_that_is_none_is_rejected_and_the_round_goes_on(
    room: Room, votes: list[pb.Columns], why: str
) -> None:
    (out,) = room.report(1, votes)
    assert why in out.message.rejection.reason
    room.commit(1)
    assert room.position.committed == 1


def test_votes_where_nothing_is_elected_are_rejected(room: Room) -> None:
    room.commit(1)
    (out,) = room.report(1, [pb.Columns(tensor=0, gaps=[0, 3])])
    assert "due" in out.message.rejection.reason


def test_a_restart_and_a_reader_know_the_same_subspaces(room: Room, tmp_path: object) -> None:
    room.commit(7)
    bodies = list(room.store.entries())
    again = Sequencer(CONFIG, room.store, None).position
    assert again is not None
    for position in (again, ledger.replay(bodies)):
        assert position.head == room.position.head
        for number in range(1, 4):
            ours, theirs = room.position.pool(number).basis, position.pool(number).basis
            assert ours is not None
            assert theirs is not None
            assert {t: i.tolist() for t, i in ours.indices.items()} == {
                t: i.tolist() for t, i in theirs.indices.items()
            }


def test_a_ledger_whose_subspaces_were_changed_is_refused(room: Room) -> None:
    room.commit(1)
    bodies = list(room.store.entries())
    entry = ledger.parse(bodies[-1])
    del entry.commit.basis[:]
    with pytest.raises(LedgerError, match="due"):
        ledger.replay([*bodies[:-1], entry.SerializeToString()])


def test_an_adapter_without_its_subspaces_is_refused(room: Room, tmp_path: object) -> None:
    from pathlib import Path

    from lorand.errors import ModelError

    room.commit(3)
    folder = Path(str(tmp_path))
    adapter.save(adapter.of(room.position), folder)
    kept = adapter.load(folder)
    assert [b.indices[0].tolist() for b in kept.elections.bases] == [[0, 3], [0, 3]]
    adapter.save(replace(kept, elections=Elections()), folder)
    with pytest.raises(ModelError, match="elect more than 0 subspaces"):
        adapter.load(folder)


def test_an_adapter_leads_to_the_pools_of_its_run(room: Room) -> None:
    room.commit(3)
    again = adapter.position(adapter.of(room.position))
    for number in range(3):
        assert same(again.pool(number).basis, room.position.pool(number).basis)
    assert again.pool(1).basis is not None


def test_a_worker_with_other_cosines_is_refused() -> None:
    config = runs.config_of(subspace={"kind": "dct", "rank": 2})
    with closing(SqliteStore(":memory:")) as store:
        sequencer = Sequencer(config, store, IDENTITY)
        assert sequencer.position is not None
        greeting: wire.Hello = runs.hello(sequencer.position, "ada")
        greeting.cosines_digest = cosines.digest([6, 7])
        with pytest.raises(HandshakeError, match="table of cosines") as caught:
            sequencer.admit(greeting)
        assert "subspace.kind" in str(caught.value)
        greeting.cosines_digest = cosines.digest_of(config, MANIFEST)
        assert sequencer.admit(greeting)[0] == 1
