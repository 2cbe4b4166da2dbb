"""The coordinator's half, without Flower: carries bytes between nodes and the sequencer."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from google.protobuf.message import DecodeError

from lorand.config import PROTOCOL_VERSION
from lorand.errors import HandshakeError
from lorand.ledger import Position
from lorand.v1 import coordination_pb2 as wire
from lorand_coordinator.sequencer import Outgoing, Sequencer

POLL_S: Final = 1.0
MOST_FAILURES: Final = 3
"""Failures in a row after which a node is left out."""

Kind = Literal["greet", "follow"]


@dataclass(frozen=True)
class Answer:
    """What came back from a node: a ParticipateRequest, or why there is none."""

    node: int
    body: bytes = b""
    failure: str = ""


class Network(Protocol):
    """What carries messages; Flower's Grid, or a test."""

    def nodes(self) -> Iterable[int]:
        """Return who is there now."""

    def send(self, node: int, kind: Kind, parts: list[bytes]) -> None:
        """Send without waiting; every message is answered once, be it by a failure."""

    def receive(self) -> list[Answer]:
        """Return what has been answered since the last call."""


@dataclass
class Fleet:
    """The nodes of a run. A node has one message at a time, so that a slow one gets no queue."""

    sequencer: Sequencer
    network: Network
    note: Callable[[str], None] = print
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    workers: dict[int, int] = field(default_factory=dict)
    """A worker's number, by node."""
    has: dict[int, int] = field(default_factory=dict)
    """How many entries were sent to a node."""
    asked: dict[int, wire.RoundStart] = field(default_factory=dict)
    busy: set[int] = field(default_factory=set)
    failures: Counter[int] = field(default_factory=Counter)

    def run(self) -> Position:
        """Carry messages until the run is finished, and everyone who is there has its end."""
        while self.sequencer.engine.phase != "finished":
            self._turn()
        until = self.clock() + self.sequencer.config.rounds.deadline_s
        while self.clock() < until and any(map(self._unsettled, self.workers)):
            self._turn()
        assert self.sequencer.position is not None
        return self.sequencer.position

    def _turn(self) -> None:
        here = set(self.network.nodes())
        for node in sorted(here - self.busy - self.workers.keys()):
            if self.failures[node] < MOST_FAILURES:
                self._send(node, "greet", [self._run()])
        for node in sorted(self.workers.keys() - here):
            self._lose(node)
        engine = self.sequencer.engine
        for node in self.workers.keys() - self.busy:
            start = self.asked.pop(self.workers[node], None)
            if start is not None and start.round_index == engine.round_index:
                self._send(node, "follow", self._news(node, start))
            elif engine.phase == "finished" and self._unsettled(node):
                self._send(node, "follow", self._news(node))
        answers = self.network.receive()
        for answer in sorted(answers, key=lambda a: a.node):
            self.busy.discard(answer.node)
            why = answer.failure or self._hear(answer)
            self.failures[answer.node] = self.failures[answer.node] + 1 if why else 0
            if why:
                self._lose(answer.node)
                self.note(f"node {answer.node}: {why}")
        self._take(self.sequencer.tick(self.clock()))
        if not answers:
            self.sleep(POLL_S)

    def _send(self, node: int, kind: Kind, parts: list[bytes]) -> None:
        self.busy.add(node)
        self.network.send(node, kind, parts)

    def _run(self) -> bytes:
        identity = self.sequencer.identity
        return wire.GetRunResponse(
            protocol_version=PROTOCOL_VERSION,
            config=self.sequencer.config.to_json(),
            identity=identity.to_lock() if identity else "",
        ).SerializeToString()

    def _unsettled(self, node: int) -> bool:
        return node in self.busy or self.has[node] < len(self.sequencer.store)

    def _news(self, node: int, start: wire.RoundStart | None = None) -> list[bytes]:
        """Return a node's number, the entries that it lacks, and what it is asked."""
        parts = [wire.ParticipateResponse(welcome=wire.Welcome(worker=self.workers[node]))]
        parts += [wire.ParticipateResponse(entry=e) for e in self.sequencer.tail(self.has[node])]
        self.has[node] = len(self.sequencer.store)
        if start is not None:
            parts.append(wire.ParticipateResponse(round_start=start))
        return [part.SerializeToString() for part in parts]

    def _hear(self, answer: Answer) -> str:
        """Take an answer; return why it cannot be taken, if so."""
        try:
            request = wire.ParticipateRequest.FromString(answer.body)
            if not request.HasField("hello"):
                worker = self.workers.get(answer.node)
                if worker is not None:  # else it was away meanwhile
                    self._take(self.sequencer.receive(worker, request, self.clock()))
                return ""
            worker, outgoing = self.sequencer.admit(request.hello)
        except (DecodeError, HandshakeError) as error:
            return str(error)
        for other in [n for n, w in self.workers.items() if w == worker and n != answer.node]:
            self.note(f"node {answer.node} is {request.hello.name!r} now, node {other} is left out")
            del self.workers[other]
            self.failures[other] = MOST_FAILURES
        self.workers[answer.node], self.has[answer.node] = worker, request.hello.next_sequence
        self._take(outgoing + self.sequencer.connect(worker, self.clock()))
        return ""

    def _take(self, outgoing: list[Outgoing]) -> None:
        """Keep what workers are asked; entries are read from the ledger when something is sent."""
        for item in outgoing:
            if item.message.HasField("round_start"):
                self.asked[item.worker] = item.message.round_start
            elif item.message.HasField("rejection"):
                self.note(f"worker {item.worker}: {item.message.rejection.reason}")

    def _lose(self, node: int) -> None:
        if (worker := self.workers.pop(node, None)) is not None:
            self._take(self.sequencer.disconnect(worker, self.clock()))
