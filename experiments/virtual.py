"""A federation in virtual time: workers that take long, go away and come back.

The coordinator's sequencer and ledger and every worker's participant are those of a run over the
network, and each worker has its bench, hence its replica, to itself. Time is virtual: a measurement
takes as long as its worker is said to take, a message none. Workers read what came for them in
order, as a session does, and leave out rounds that are over by then.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from lorand.config import RunConfig
from lorand.manifest import Identity
from lorand.v1 import coordination_pb2 as wire
from lorand_coordinator.hub import TICK_S
from lorand_coordinator.sequencer import Outgoing, Sequencer
from lorand_coordinator.store import SqliteStore
from lorand_coordinator.tally import Outcome
from lorand_worker.inbox import ends
from lorand_worker.participant import Participant, hello

HALF_S: Final = 0.5
"""After so long of a round, workers come back to take part in the next, or are cut off."""
LONGEST_S: Final = 100_000.0


@dataclass(eq=False)
class Member:
    """A worker: its participant, how long a measurement takes, and what it sent and read.

    Bytes are those of messages; `caught_up` are entries that it read when it came back.
    """

    name: str
    participant: Participant
    takes: Callable[[], float]
    number: int = 0
    present: bool = False
    leaves: bool = False
    sent: int = 0
    received: int = 0
    caught_up: int = 0
    returns: int = 0
    inbox: deque[wire.ParticipateResponse] = field(default_factory=deque)
    busy_until: float = 0.0
    lives: int = 0


@dataclass(frozen=True)
class Absence:
    """Who is away in a round, by index; whether they go with an answer unfinished."""

    of: Callable[[int], frozenset[int]] = lambda round_index: frozenset()
    cut_off: bool = False


class World:
    """One run, from start to finish; `observe` is told the time and each committed round."""

    def __init__(
        self,
        config: RunConfig,
        identity: Identity,
        members: Sequence[Member],
        absence: Absence,
        observe: Callable[[float, Outcome], None],
    ) -> None:
        """Have everyone join."""
        self.now, self.members = 0.0, members
        self._identity, self._absence = identity, absence
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = self._ties = 0
        self.store = SqliteStore(":memory:")
        self.sequencer = Sequencer(config, self.store, identity)
        self.sequencer.observers.append(lambda outcome: observe(self.now, outcome))
        for member in members:
            self._join(member)

    def run(self) -> None:
        """Live until the run is finished and everyone has read the whole ledger."""
        self._at(TICK_S, self._tick)
        while self.sequencer.engine.phase != "finished":
            self.now, _, action = heapq.heappop(self._agenda)
            action()
            assert self.now < LONGEST_S, self.sequencer.reason
        for member in self.members:
            self._catch_up(member)
            member.participant.settle()
        self.store.close()

    def _at(self, moment: float, action: Callable[[], None]) -> None:
        self._ties += 1
        heapq.heappush(self._agenda, (moment, self._ties, action))

    def _tick(self) -> None:
        self._deliver(self.sequencer.tick(self.now))
        self._at(self.now + TICK_S, self._tick)

    def _join(self, member: Member) -> None:
        """Come, or come back: catch up, greet, and be there for the next round."""
        read = self._catch_up(member)
        greeting = hello(member.name, member.participant.position, self._identity)
        member.number, heard = self.sequencer.admit(greeting)
        self._deliver(heard)
        read += self._catch_up(member)
        if member.lives:
            member.caught_up += read
            member.returns += 1
        member.participant.worker = member.number
        member.present = True
        self._deliver(self.sequencer.connect(member.number, self.now))

    def _catch_up(self, member: Member) -> int:
        """Read what the ledger has beyond this worker's position, and return its bytes."""
        bodies = list(self.sequencer.tail(member.participant.position.next_sequence))
        for body in bodies:
            member.participant.on_entry(body)
        return sum(map(len, bodies))

    def _come_back(self, member: Member) -> None:
        if not member.present:
            self._join(member)

    def _leave(self, member: Member) -> None:
        if member.present:
            member.present = member.leaves = False
            member.lives += 1
            member.busy_until = 0.0
            member.inbox.clear()
            self._deliver(self.sequencer.disconnect(member.number, self.now))

    def _deliver(self, outgoing: Sequence[Outgoing]) -> None:
        """Put messages into inboxes, and plan who comes and goes in a round that begins."""
        for item in outgoing:
            member = self.members[item.worker - 1]
            if member.present:
                member.received += item.message.ByteSize()
                member.inbox.append(item.message)
                self._at(self.now, partial(self._work, member))
            if item.message.HasField("round_start"):
                self._plan(item.message.round_start.round_index)

    def _plan(self, round_index: int) -> None:
        """Have those come back who are there in the next round, and those leave who are not."""
        if round_index <= self._planned:
            return
        self._planned = round_index
        away = self._absence.of(round_index + 1)
        for place, member in enumerate(self.members):
            if place not in away:
                self._at(self.now + HALF_S, partial(self._come_back, member))
            elif member.present:
                member.leaves = True
                if self._absence.cut_off:
                    self._at(self.now + HALF_S, partial(self._leave, member))

    def _work(self, member: Member) -> None:
        """Handle what has arrived, until a measurement takes its time."""
        while member.present and member.inbox and self.now >= member.busy_until:
            message = member.inbox.popleft()
            match message.WhichOneof("message"):
                case "entry":
                    member.participant.on_entry(message.entry)
                case "round_start":
                    self._answer_to(member, message.round_start)
                case "rejection":
                    member.participant.counts.rejected += 1

    def _answer_to(self, member: Member, start: wire.RoundStart) -> None:
        participant, takes = member.participant, 0.0
        if any(ends(start.round_index, later) for later in member.inbox):
            answer = participant.sit_out(start.round_index, "it is over")
        else:
            answer, takes = participant.on_round_start(start), member.takes()
        member.busy_until = self.now + takes
        self._at(member.busy_until, partial(self._answer, member, member.lives, answer))

    def _answer(self, member: Member, life: int, answer: wire.ParticipateRequest) -> None:
        if life != member.lives:
            return
        member.sent += answer.ByteSize()
        leaves = member.leaves
        self._deliver(self.sequencer.receive(member.number, answer, self.now))
        if leaves:
            self._leave(member)
        self._work(member)
