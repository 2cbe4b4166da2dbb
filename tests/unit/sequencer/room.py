"""A sequencer with workers that have every entry.

Its stores are in memory; files are the business of tests/contracts, crashes of tests/simulation.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Final

import numpy as np
from tests.runs import IDENTITY, config_of, contribution, hello

from lorand import ledger
from lorand.config import RunConfig
from lorand.ledger import Position
from lorand.manifest import Identity
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import optimizer
from lorand_coordinator.rounds import State
from lorand_coordinator.sequencer import Message, Outgoing, Sequencer
from lorand_coordinator.store import SqliteStore, StoreUnavailable


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


def entries(outgoing: list[Outgoing]) -> list[tuple[int, str | None]]:
    """To whom which kind of entry went."""
    return [
        (item.worker, ledger.parse(item.message.entry).WhichOneof("kind"))
        for item in outgoing
        if item.message.HasField("entry")
    ]


def rejections(outgoing: list[Outgoing]) -> list[str]:
    return [i.message.rejection.reason for i in outgoing if i.message.HasField("rejection")]


OURS: Final = ledger.origin(config_of(), IDENTITY)
OTHERS_RUN: Final = ledger.origin(config_of(run={"rounds": 5}), IDENTITY).run_digest


def adopting() -> Room:
    return Room(config_of(run={"adopt_first_worker": True}), None)


def evaluation(**changes: Any) -> pb.Evaluation:
    given = {"sequence": 0, "evaluator": "eve", "accuracy": 0.75, "loss": 0.5, "examples": 9}
    return pb.Evaluation(**{**given, **changes})


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
