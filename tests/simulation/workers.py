"""Workers: real sessions on a bench of a few numbers, and a link without a network."""

from collections.abc import AsyncIterator, Awaitable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc
import numpy as np
from tests.runs import IDENTITY
from tests.simulation.disk import Crash
from tests.simulation.network import Stream

from lorand.codec import Floats
from lorand.directions import Indices
from lorand.ledger import Position, coefficients_digest
from lorand.privacy.mechanism import Integers
from lorand.privacy.primitives import KEY_BYTES, IdentityKey
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import coordination_pb2_grpc as coordination
from lorand.v1 import ledger_pb2 as pb
from lorand.v1 import ledger_pb2_grpc as ledger_service
from lorand_coordinator import service
from lorand_coordinator.hub import Hub
from lorand_worker import link as links
from lorand_worker.estimators import Measurement, NonFiniteLoss, Order
from lorand_worker.session import Session

if TYPE_CHECKING:
    from tests.simulation.world import World

_Item = TypeVar("_Item")


class Worker:
    """The process of `lr-worker join`, started again whenever it ends."""

    def __init__(self, world: "World", index: int) -> None:
        self._world = world
        self.name = f"worker-{index}"
        self.session: Session | None = None
        self.stream: Stream | None = None
        self.done = False
        self.busy_until = 0.0
        self.paused_until = 0.0
        self._life = 0

    @property
    def number(self) -> int | None:
        """The number it was given, in this life."""
        return self.session.participant.worker if self.session else None

    def start(self) -> None:
        """Begin without any memory of a life before, but for the file of error feedback."""
        world = self._world
        self._life += 1
        link = LocalLink(world)
        bench = Quadratic(world, self.name, self._life)
        self.session = Session(
            *(link, world.config, IDENTITY, bench, self.name, Silence(), world.state),
            key=key_of(self.name) if world.config.service.statements_every else None,
        )
        self.session._session = world.rng.getrandbits(63)  # Session's own is not from the seed
        self._connect(self._life)

    def crash(self) -> None:
        """End the process where it is; it is started again later."""
        if self.session is None or self.done:
            return
        if self.stream is not None:
            self.stream.hang_up(politely=self._world.rng.random() < 0.5)
        self.session = self.stream = None
        self.busy_until = self.paused_until = 0.0
        self._life += 1
        self._world.after(self._world.rng.uniform(0.2, 4), self.start)

    def pause(self, seconds: float) -> None:
        """Do nothing for a while, heartbeats included."""
        self.paused_until = self._world.now + seconds
        self.busy_until = max(self.busy_until, self.paused_until)

    def reconnect(self, why: str) -> None:
        """Come back after a while, as Link.persist does."""
        self._world.tell(f"{self.name} comes back: {why}")
        self.stream = None
        life = self._life
        self._world.after(self._world.rng.uniform(0.05, 1), lambda: self._connect(life))

    def _connect(self, life: int) -> None:
        """Session._once up to the Hello; time passes between catching up and joining."""
        if life != self._life or self.session is None or self.done:
            return
        hub = self._world.coordinator.hub
        if hub is None:
            self.reconnect("nobody answers")
            return
        session = self.session
        if session._has_ledger():
            session._catch_up()
        session._check_history()
        try:
            session._hand_in_what_waits()
        except grpc.RpcError as error:
            self.reconnect(str(error))
            return
        self._note_position()
        if self.done:
            return
        self.stream = Stream(self._world, self, hub)
        self._world.coordinator.streams.append(self.stream)
        self.stream.send(wire.ParticipateRequest(hello=session._hello()))

    def work(self) -> None:
        """Handle what has arrived, one message after the other."""
        stream, world = self.stream, self._world
        while stream is not None and stream is self.stream and stream.inbox:
            if world.now < self.busy_until:
                world.at(self.busy_until, self.work)
                return
            self._handle(stream, stream.read())

    def _handle(self, stream: Stream, message: wire.ParticipateResponse) -> None:
        assert self.session is not None
        measured = self.session.participant.counts.measured
        if message.HasField("round_start"):
            self.busy_until = self._world.now + self._world.rng.uniform(0.05, 0.8)
        try:
            self.session._handle(cast(links.Stream, stream), message)
        except (links.Retry, grpc.RpcError) as error:
            stream.hang_up()
            self.reconnect(str(error))
            return
        if self.session.participant.counts.measured > measured:
            self._note_weights(message.round_start.round_index)
        if message.HasField("welcome"):
            self._world.tell(f"{self.name} joins as {self.number}")
            self._repeat_itself(stream)
        self._note_position()
        if self.done:
            stream.hang_up()

    def _repeat_itself(self, stream: Stream) -> None:
        """After a reconnect, sometimes send the last answer again, asked or not."""
        assert self.session is not None
        answer = self.session.participant._answer
        if answer is not None and self._world.rng.random() < 0.3:
            self._world.faults["stale answer"] += 1
            stream.send(answer[1])

    def _note_weights(self, round_index: int) -> None:
        """Everyone measures a round at the same weights, in whichever life."""
        assert self.session is not None
        bench = cast(Quadratic, self.session.bench)
        digest = coefficients_digest(bench.coefficients) + bytes(bench.pool)
        assert self._world.measured_at.setdefault(round_index, digest) == digest, (
            f"I5: {self.name} measured round {round_index} at other weights than others did"
        )

    def note_owed(self, contribution: pb.Contribution) -> None:
        """Who keeps error feedback never says two things in a round, in whichever life."""
        assert self.session is not None
        if self._world.config.keeps_feedback:
            memory = self.session.participant._memory
            if memory.awaited is not None and memory.awaited.contribution == contribution:
                place = (contribution.round_index, memory.awaited.worker)
                owed = memory.feedback.tobytes(), memory.awaited.feedback.tobytes()
                assert self._world.owed.setdefault(place, owed) == owed, (
                    f"I8: {self.name} contributed to round {place[0]} in two ways"
                )

    def _note_position(self) -> None:
        assert self.session is not None
        position = self.session.participant.position
        self._world.see(position.next_sequence - 1, position.head)
        stating = self.session._stating
        owes = position.finished and stating is not None and stating.next is not None
        self.done = position.finished and not owes
        if owes:  # its owner gives the same command again, as it asks for
            self._life += 1
            self._world.after(0.5, partial(self._start_again, self._life))

    def _start_again(self, life: int) -> None:
        """Start, unless that has happened meanwhile."""
        if life == self._life:
            self.start()


def key_of(name: str) -> IdentityKey:
    """What a worker signs its statements with, in every life."""
    return IdentityKey(name.encode().ljust(KEY_BYTES))


class Silence:
    """Takes what a session says."""

    def note(self, text: str) -> None:
        """Take a sentence."""

    def progress(self, committed: int, total: int, text: str) -> None:
        """Take progress."""


class Quadratic:
    """A bench: the loss is |A − target|²/2 in weight units, measured with a batch's noise."""

    def __init__(self, world: "World", name: str, life: int) -> None:
        """Take noise from the seed; another life has other batches."""
        self._world = world
        self._noise = np.random.default_rng([world.seed, life, *name.encode()])
        self._target = np.random.default_rng(world.seed).normal(0, 0.05, 64)
        self.examples = len(name) * life
        self.coefficients = np.zeros(64, np.int64)
        self.pool = 0

    def adopt(self, position: Position) -> None:
        """See Bench."""
        self.coefficients, self.pool = position.coefficients, len(position.closed)

    def measure(self, order: Order) -> Measurement:
        """Return a noisy gradient; now and then the loss is no number."""
        if not self._world.calm and self._world.rng.random() < 0.04:
            self._world.faults["loss is nan"] += 1
            raise NonFiniteLoss("the loss of this batch is nan")
        away: Floats = self.coefficients * 2.0**-32 - self._target
        noise = self._noise.normal(0, 0.01, len(order.indices))
        return Measurement(away[order.indices] + noise, float(away @ away / 2))

    def release(self, indices: Indices) -> Integers:
        """No simulated run is private."""
        raise NotImplementedError


class Ended:
    """The context of a call: how it ends where it is not answered."""

    @staticmethod
    async def abort(code: grpc.StatusCode, details: str) -> None:
        """Have the call end so. Nothing that a worker says is refused for good."""
        assert code is grpc.StatusCode.UNAVAILABLE, f"I9: {details}"
        raise grpc.RpcError(details)


class LocalLink(links.Link):
    """The worker's link, its calls answered by the coordinator's services in this process."""

    def __init__(self, world: "World") -> None:
        """Reach the coordinator of this world."""
        self._world = world
        super().__init__("here", give_up_s=1.0)

    def _open(self) -> None:
        self._coordination = cast(coordination.CoordinationServiceStub, self)
        self._ledger = cast(ledger_service.LedgerServiceStub, self)

    def _hub(self) -> Hub:
        hub = self._world.coordinator.hub
        assert hub is not None
        return hub

    def GetRun(self, request: wire.GetRunRequest, timeout: float) -> wire.GetRunResponse:
        """See coordination.proto."""
        return _result(service.Coordination(self._hub()).GetRun(request, cast(Any, None)))

    def GetCheckpoint(
        self, request: pb.GetCheckpointRequest, timeout: float
    ) -> Iterator[pb.GetCheckpointResponse]:
        """See ledger.proto."""
        return _items(service.Ledger(self._hub()).GetCheckpoint(request, cast(Any, None)))

    def GetHead(self, request: pb.GetHeadRequest, timeout: float) -> pb.GetHeadResponse:
        """See ledger.proto. A worker asks in the middle of a stream, whoever is gone by then."""
        if self._world.coordinator.hub is None:
            raise grpc.RpcError("nobody answers")
        return _result(service.Ledger(self._hub()).GetHead(request, cast(Any, None)))

    def PostStatement(
        self, request: pb.PostStatementRequest, timeout: float
    ) -> pb.PostStatementResponse:
        """See ledger.proto. It is written to the disk, where all may go wrong."""
        coordinator = self._world.coordinator
        if coordinator.hub is None:
            raise grpc.RpcError("nobody answers")
        answered = service.Ledger(coordinator.hub).PostStatement(request, cast(Any, Ended))
        try:
            return _result(answered)
        except Crash as error:
            coordinator.end(str(error))
            raise grpc.RpcError("nobody answers any more") from error
        finally:
            self._world.disk.blind = False  # nobody looks it up: it is handed in again

    def ReadEntries(
        self, request: pb.ReadEntriesRequest, timeout: float | None
    ) -> Iterator[pb.ReadEntriesResponse]:
        """See ledger.proto."""
        return _items(service.Ledger(self._hub()).ReadEntries(request, cast(Any, None)))


def _result(answer: Awaitable[_Item]) -> _Item:
    """Return what a coroutine returns that never waits."""
    try:
        next(answer.__await__())
    except StopIteration as result:
        return cast(_Item, result.value)
    raise AssertionError("it waits")


def _items(answers: AsyncIterator[_Item]) -> Iterator[_Item]:
    """Yield what an asynchronous generator yields that never waits."""
    while True:
        try:
            item = _result(anext(answers))
        except StopAsyncIteration:
            return
        yield item
