"""A seeded world around the real parts: sessions, participants, links, hub, sequencer, store.

One virtual clock and one agenda; everything random comes from the seed, so a seed is a history.
Simulated are the network (streams that break, delay and repeat), the processes (crashes that lose
all memory, pauses), the disk (tests/simulation/disk.py) and the bench (a noisy quadratic).
Faults end at `calm_at`; from then on the run has to finish.
"""

import heapq
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np
from tests.runs import IDENTITY, config_of
from tests.simulation.disk import CRASHES, Crash, Disk, SimulatedStore

from lorand.codec import Floats
from lorand.coefficients import Coefficients
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.errors import LorandError
from lorand.ledger import coefficients_digest
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import coordination_pb2_grpc as coordination
from lorand.v1 import ledger_pb2 as pb
from lorand.v1 import ledger_pb2_grpc as ledger_service
from lorand_coordinator import service
from lorand_coordinator.hub import CatchUpFirst, Connection, Hub, NameInUse
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import StoreUnavailable
from lorand_worker import link as links
from lorand_worker.estimators import Measurement, NonFiniteLoss
from lorand_worker.session import Session

TICK_S: Final = 0.25
WINDOW: Final = 3
"""Messages on the way to a worker that does not read; the others stay in its outbox."""
FINISH_WITHIN_S: Final = 90.0
"""Of calm, virtual: ten deadlines, reconnecting, and a heartbeat's timeout."""

MISFORTUNES: Final = (
    "coordinator crashes",
    "coordinator crashes as it writes",
    "coordinator pauses",
    "worker crashes",
    "worker pauses",
    "worker computes long",
    "connection breaks",
    "disk is full",
    "disk lies",
    "evaluations",
)

_Item = TypeVar("_Item")


def config_for(rng: random.Random) -> RunConfig:
    """A small run, different from seed to seed."""
    quorum = rng.choice([1, 2, 2, 3])
    return config_of(
        run={"rounds": rng.randint(6, 10), "adopt_first_worker": True},
        directions={"mode": rng.choice(["shared", "own"])},
        estimator={"directions_per_round": rng.choice([3, 8, 40])},
        codec={"up": rng.choice(["int8", "sign"]), "down": rng.choice(["int8", "sign"])},
        optimizer={"kind": rng.choice(["sgd", "adam"]), "momentum": 0.5},
        rounds={
            "quorum": quorum,
            "start_with": rng.choice([0, 3]),
            "deadline_s": 3.0,
            "weighting": rng.choice(["equal", "examples"]),
            "telemetry": rng.choice(["loss", "none"]),
        },
        service={
            "checkpoint_every": rng.choice([1, 2, 3]),
            "tail_entries": rng.choice([1, 4, 512]),
            "outbox_messages": 8,
            "commit_retry_s": 0.5,
            "heartbeat_s": 0.5,
            "heartbeat_timeout_s": 2.0,
        },
    )


class World:
    """One run. `run` lives it to its end; what it saw is checked by tests/simulation/checks.py."""

    def __init__(self, seed: int, folder: Path, template: Path, *, faults: bool = True) -> None:
        """Make everything, and put the first events on the agenda."""
        self.rng = random.Random(seed)
        self.seed = seed
        self.now = 0.0
        self.told: deque[str] = deque(maxlen=80)
        self.faults: Counter[str] = Counter()
        self.config = config_for(self.rng)
        self.calm_at = self.rng.uniform(8, 30) if faults else 0.0
        self._misfortunes_per_s = self.rng.choice([0.3, 0.7, 1.5])
        self.disk = Disk(folder, template, self.rng)
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._ties = 0
        # What must never change: digests by sequence, weights by round, scalars by worker.
        self.heads: dict[int, bytes] = {}
        self.measured_at: dict[int, bytes] = {}
        self.reported: set[tuple[int, int, bytes]] = set()
        self.coordinator = Coordinator(self)
        self.workers = [Worker(self, number) for number in range(self.rng.choice([3, 4]))]
        self.after(0.0, self.coordinator.start)
        for worker in self.workers:
            self.after(self.rng.uniform(0, 3), worker.start)
        if faults:
            self.after(self.rng.expovariate(self._misfortunes_per_s), self._misfortune)

    def at(self, moment: float, action: Callable[[], None]) -> None:
        """Put something on the agenda; what is due at the same time happens in this order."""
        self._ties += 1
        heapq.heappush(self._agenda, (moment, self._ties, action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Put something on the agenda, so many seconds from now."""
        self.at(self.now + seconds, action)

    def run(self) -> None:
        """Live until every worker has the whole run."""
        while not all(worker.done for worker in self.workers):
            self.now, _, action = heapq.heappop(self._agenda)
            action()
            assert self.now < self.calm_at + FINISH_WITHIN_S, (
                f"I7: not finished {FINISH_WITHIN_S:.0f} s after the last fault; the coordinator "
                f"says: {self.coordinator.reason}"
            )

    def tell(self, text: str) -> None:
        """Note what happened, for those who look into a failure."""
        self.told.append(f"{self.now:7.3f} {text}")

    def delay(self) -> float:
        """How long a message travels."""
        spike = self.calm_at > self.now and self.rng.random() < 0.03
        return self.rng.uniform(0.5, 4) if spike else self.rng.uniform(0.005, 0.1)

    @property
    def calm(self) -> bool:
        """Whether the time of faults is over."""
        return self.now >= self.calm_at

    def _misfortune(self) -> None:
        """Let one of the things happen that do happen, and plan the next."""
        if self.calm:
            return
        kind = self.rng.choice(MISFORTUNES)
        self.faults[kind] += 1
        self.tell(f"-- {kind}")
        worker = self.rng.choice(self.workers)
        match kind:
            case "coordinator crashes":
                self.coordinator.crash()
            case "coordinator crashes as it writes":
                self.disk.next_crash = self.rng.choice(CRASHES)
            case "coordinator pauses":
                self.coordinator.pause(self.rng.uniform(0.5, 6))
            case "worker crashes":
                worker.crash()
            case "worker pauses":
                worker.pause(self.rng.uniform(0.5, 8))
            case "worker computes long":
                worker.busy_until = self.now + self.rng.uniform(3, 15)
            case "connection breaks":
                if worker.stream is not None:
                    worker.stream.break_()
            case "disk is full":
                self.disk.full = True
                self.after(self.rng.uniform(0.2, 3), lambda: setattr(self.disk, "full", False))
            case "disk lies":
                self.disk.lying = True
                self.after(self.rng.uniform(0.2, 3), lambda: setattr(self.disk, "lying", False))
            case "evaluations":
                for _ in range(self.rng.randint(1, 8)):
                    self.after(self.rng.uniform(0, 1), self.coordinator.evaluate)
        self.after(self.rng.expovariate(self._misfortunes_per_s), self._misfortune)

    def see(self, sequence: int, head: bytes) -> None:
        """Somebody has a history that ends so: it is everybody's for ever."""
        if sequence >= 0:
            assert self.heads.setdefault(sequence, head) == head, (
                f"I4: entry {sequence} is not what another saw, or the same one before"
            )


class Coordinator:
    """The process of `lr-coordinator serve`, started again whenever it ends."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.hub: Hub | None = None
        self.store: SimulatedStore | None = None
        self.streams: list[Stream] = []
        self.restarts = 0
        self._inbox: deque[Callable[[Hub], None]] = deque()
        self._paused_until = 0.0

    @property
    def reason(self) -> str:
        """What the status page says."""
        return self.hub.sequencer.reason if self.hub else "(it is down)"

    def start(self) -> None:
        """Open the ledger and listen; tried again when the disk does not let it."""
        world = self._world
        self.restarts += 1
        adopts = world.seed % 4 == 0
        self.store = world.disk.open()
        try:
            sequencer = Sequencer(world.config, self.store, None if adopts else IDENTITY)
        except (StoreUnavailable, Crash) as error:
            self._end(str(error))
            return
        for sequence, head in world.heads.items():
            assert sequence < len(self.store), f"I1: entry {sequence} was seen and lost"
            assert self.store.digest(sequence) == head, f"I4: entry {sequence} is another"
        self.hub = Hub(sequencer, clock=lambda: world.now)
        world.tell(f"coordinator starts with {len(self.store)} entries")
        world.after(TICK_S, partial(self._next_tick, self.hub))

    def crash(self) -> None:
        """End the process where it is."""
        if self.hub is not None:
            self._end("")

    def _end(self, why: str) -> None:
        world, store = self._world, self.store
        assert store is not None
        world.tell(f"coordinator ends {why}")
        world.disk.crash(store, "crash during" if why == "crash during" else None)
        self.hub = self.store = None
        self._inbox.clear()
        for stream in self.streams:
            stream.coordinator_is_gone()
        self.streams = []
        world.after(world.rng.uniform(0.1, 3), self.start)

    def pause(self, seconds: float) -> None:
        """Do nothing for a while, as when stopped or swapped out; messages wait."""
        self._paused_until = self._world.now + seconds
        self._world.at(self._paused_until, self._work)

    def do(self, action: Callable[[Hub], None]) -> None:
        """Let the process do something, in the order of arrival."""
        if self.hub is not None:
            self._inbox.append(action)
            self._work()

    def _work(self) -> None:
        while self.hub is not None and self._inbox and self._world.now >= self._paused_until:
            try:
                self._inbox.popleft()(self.hub)
                for stream in list(self.streams):
                    stream.pump()
            except Crash as error:
                self._end(str(error))

    def _next_tick(self, hub: Hub) -> None:
        if self.hub is hub:
            self.do(self._tick)

    def _tick(self, hub: Hub) -> None:
        """One turn of Hub.tick, which sleeps on a real clock."""
        now, timeout = self._world.now, hub.config.service.heartbeat_timeout_s
        self._world.after(TICK_S, partial(self._next_tick, hub))
        for connection in list(hub.connections.values()):
            if now - connection.last_seen > timeout:
                hub.drop(connection, "no heartbeat")
        hub.deliver(hub.sequencer.tick(now))

    def accept(self, stream: "Stream", hello: wire.Hello) -> None:
        """Answer a Hello, as service.Coordination does."""
        assert self.hub is not None
        try:
            stream.connection = self.hub.join(hello)
        except LorandError as error:
            retry = isinstance(error, StoreUnavailable | CatchUpFirst | NameInUse)
            stream.send_down(_refusal(str(error), retry))

    def evaluate(self) -> None:
        """Let an evaluator post a result."""
        self.do(self._take_evaluation)

    def _take_evaluation(self, hub: Hub) -> None:
        """Answer a PostEvaluation, as service.Ledger does."""
        position = hub.sequencer.position
        if position is not None:
            posted = pb.Evaluation(sequence=position.next_sequence - 1, accuracy=0.5, loss=1.0)
            try:
                hub.deliver(hub.sequencer.post_evaluation(posted, position.run_digest))
            except StoreUnavailable:
                return  # the evaluator hears of it


def _refusal(why: str, retry: bool) -> wire.ParticipateResponse:
    return wire.ParticipateResponse(refusal=wire.Refusal(reason=why, retry=retry))


@dataclass(eq=False)
class Stream:
    """One Participate call. Messages of one direction keep their order; the ends differ."""

    world: World
    worker: "Worker"
    hub: Hub
    connection: Connection | None = None
    open_here: bool = True
    open_there: bool = True
    broken: bool = False
    lost: bool = False
    inbox: deque[wire.ParticipateResponse] = field(default_factory=deque)
    _on_the_way: int = 0
    _last_up: float = 0.0
    _last_down: float = 0.0

    # -- the worker's end: what a Session calls -------------------------------------------------

    def send(self, request: wire.ParticipateRequest) -> None:
        """Send, once this worker's computation is done; sometimes the network repeats it."""
        data, copies = request.SerializeToString(), 1
        if request.HasField("contribution"):
            part = request.contribution
            assert self.worker.number is not None
            self.world.reported.add((part.round_index, self.worker.number, part.codes))
            copies += self.world.rng.random() < 0.1
        for _ in range(copies):
            done_at = max(self.world.now, self.worker.busy_until)
            self.world.at(done_at, lambda: self._depart(data))

    def keep_alive(self, interval_s: float, timeout_s: float) -> None:
        """Send heartbeats from now on, but for the time of a pause."""

        def beat() -> None:
            if self.open_here:
                if self.world.now >= self.worker.paused_until:
                    self._depart(
                        wire.ParticipateRequest(heartbeat=wire.Heartbeat()).SerializeToString()
                    )
                self.world.after(interval_s, beat)

        self.world.after(interval_s, beat)

    def hang_up(self, *, politely: bool = True) -> None:
        """Close the worker's end; the other hears of it, or only misses heartbeats."""
        self.open_here = False
        self.inbox.clear()
        if politely:
            self.world.after(self.world.delay(), lambda: self._end_there("it closed its stream"))

    def _depart(self, data: bytes) -> None:
        if self.open_here:
            self._last_up = max(self._last_up, self.world.now + self.world.delay())
            self.world.at(self._last_up, lambda: self._arrive(data))

    # -- on the way ------------------------------------------------------------------------------

    def break_(self) -> None:
        """Break the connection: each end notices sooner or later; what is under way may arrive."""
        if self.broken:
            return
        rng, self.broken = self.world.rng, True
        self.lost = rng.random() < 0.5
        noticed = [rng.choice([0.01, 0.3, 2.0]) for _ in range(2)]
        self.world.after(noticed[0], self._end_here)
        self.world.after(noticed[1], lambda: self._end_there("its connection ended"))

    def _end_here(self) -> None:
        if self.open_here:
            self.hang_up(politely=False)
            self.worker.reconnect("connection lost")

    def _end_there(self, why: str) -> None:
        if self.open_there:
            self.open_there = False
            coordinator = self.world.coordinator
            connection = self.connection
            if connection is not None and coordinator.hub is self.hub:
                coordinator.do(lambda hub: hub.drop(connection, why))

    def coordinator_is_gone(self) -> None:
        """The process at the other end died; the network says so at once or not at all."""
        self.open_there = False
        self.world.after(self.world.rng.choice([0.01, 0.2, 2.0]), self._end_here)

    def _arrive(self, data: bytes) -> None:
        """Deliver to the coordinator; also late, on the connection that replaced this one."""
        coordinator = self.world.coordinator
        if self.lost or coordinator.hub is None:
            return
        request = wire.ParticipateRequest.FromString(data)
        target: Stream | None = self
        if not self.open_there or coordinator.hub is not self.hub:
            target = self.worker.stream if not request.HasField("hello") else None
            self.world.faults["late on another connection"] += target is not None
        if target is not None:
            coordinator.do(lambda hub: target._take(hub, request))

    # -- the coordinator's end -------------------------------------------------------------------

    def _take(self, hub: Hub, request: wire.ParticipateRequest) -> None:
        if request.HasField("hello"):
            self.world.coordinator.accept(self, request.hello)
        elif self.connection is not None and not self.connection.closing and hub is self.hub:
            hub.take(self.connection, request)

    def pump(self) -> None:
        """Send what waits in the outbox, as far as the worker reads."""
        connection = self.connection
        while connection and self.open_there and self._on_the_way < WINDOW:
            if connection.outbox.empty():
                return
            message = connection.outbox.get_nowait()
            if message is None:
                self.send_down(_refusal(connection.closing, retry=True))
                self.open_there = False
                return
            self.send_down(message)

    def send_down(self, message: wire.ParticipateResponse) -> None:
        """Send to the worker."""
        data = message.SerializeToString()
        self._on_the_way += 1
        self._last_down = max(self._last_down, self.world.now + self.world.delay())
        self.world.at(self._last_down, lambda: self._reach(data))

    def _reach(self, data: bytes) -> None:
        if self.open_here and not self.lost:
            self.inbox.append(wire.ParticipateResponse.FromString(data))
            self.worker.work()

    def read(self) -> wire.ParticipateResponse:
        """Take the next message in; there is room for another on the way."""
        self._on_the_way -= 1
        message = self.inbox.popleft()
        coordinator = self.world.coordinator
        if coordinator.hub is self.hub:
            self.world.after(0.0, lambda: coordinator.do(lambda hub: self.pump()))
        return message


class Worker:
    """The process of `lr-worker join`, started again whenever it ends."""

    def __init__(self, world: World, index: int) -> None:
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
        """Begin without any memory of a life before."""
        world = self._world
        self._life += 1
        link = LocalLink(world)
        bench = Quadratic(world, self.name, self._life)
        self.session = Session(link, world.config, IDENTITY, bench, self.name, Silence())
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
            position = session.link.catch_up(session.participant.position)
            session.participant.catch_up(position)
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
        if message.HasField("round_start"):
            self.busy_until = self._world.now + self._world.rng.uniform(0.05, 0.8)
        try:
            self.session._handle(cast(links.Stream, stream), message)
        except links.Retry as error:
            stream.hang_up()
            self.reconnect(str(error))
            return
        if message.HasField("round_start"):
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
            stream.send(answer[2])

    def _note_weights(self, round_index: int) -> None:
        """Everyone measures a round at the same weights, in whichever life."""
        assert self.session is not None
        bench = cast(Quadratic, self.session.bench)
        digest = coefficients_digest(bench.coefficients)
        assert self._world.measured_at.setdefault(round_index, digest) == digest, (
            f"I5: {self.name} measured round {round_index} at other weights than others did"
        )

    def _note_position(self) -> None:
        assert self.session is not None
        position = self.session.participant.position
        self._world.see(position.next_sequence - 1, position.head)
        self.done = position.finished


class Silence:
    """Takes what a session says."""

    def note(self, text: str) -> None:
        """Take a sentence."""

    def progress(self, committed: int, total: int, text: str) -> None:
        """Take progress."""


class Quadratic:
    """A bench: the loss is |A − target|²/2 in weight units, measured with a batch's noise."""

    def __init__(self, world: World, name: str, life: int) -> None:
        """Take noise from the seed; another life has other batches."""
        self._world = world
        self._noise = np.random.default_rng([world.seed, life, *name.encode()])
        self._target = np.random.default_rng(world.seed).normal(0, 0.05, 64)
        self.examples = len(name) * life
        self.coefficients = np.zeros(64, np.int64)

    def adopt(self, coefficients: Coefficients) -> None:
        """Make the weights w(A)."""
        self.coefficients = coefficients

    def measure(self, indices: Indices) -> Measurement:
        """Return a noisy gradient; now and then the loss is no number."""
        if not self._world.calm and self._world.rng.random() < 0.04:
            self._world.faults["loss is nan"] += 1
            raise NonFiniteLoss("the loss of this batch is nan")
        away: Floats = self.coefficients * 2.0**-32 - self._target
        noise = self._noise.normal(0, 0.01, len(indices))
        return Measurement(away[indices] + noise, float(away @ away / 2))


class LocalLink(links.Link):
    """The worker's link, its calls answered by the coordinator's services in this process."""

    def __init__(self, world: World) -> None:
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
