"""Streams between workers and the coordinator that break, delay, repeat and arrive late."""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from lorand.v1 import coordination_pb2 as wire
from lorand_coordinator.hub import Connection, Hub
from lorand_worker.inbox import ends

if TYPE_CHECKING:
    from tests.simulation.workers import Worker
    from tests.simulation.world import World

WINDOW: Final = 3
"""Messages on the way to a worker that does not read; the others stay in its outbox."""


def refusal(why: str, retry: bool) -> wire.ParticipateResponse:
    """A refusal, as service.Coordination sends it."""
    return wire.ParticipateResponse(refusal=wire.Refusal(reason=why, retry=retry))


@dataclass(eq=False)
class Stream:
    """One Participate call. Messages of one direction keep their order; the ends differ."""

    world: "World"
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
            self.world.reported.add((part.round_index, self.worker.number, part.codes, part.scale))
            self.worker.note_owed(part)
            copies += self.world.rng.random() < 0.1
        for _ in range(copies):
            done_at = max(self.world.now, self.worker.busy_until)
            self.world.at(done_at, lambda: self._depart(data))

    def is_over(self, round_index: int) -> bool:
        """Whether what came already ends a round; a batch was taken apart when it was read."""
        return any(ends(round_index, message) for message in self.inbox)

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
                self.send_down(refusal(connection.closing, retry=True))
                self.open_there = False
                return
            self.send_down(self.hub.together(connection, message))

    def send_down(self, message: wire.ParticipateResponse) -> None:
        """Send to the worker."""
        data = message.SerializeToString()
        self._on_the_way += 1
        self._last_down = max(self._last_down, self.world.now + self.world.delay())
        self.world.at(self._last_down, lambda: self._reach(data))

    def _reach(self, data: bytes) -> None:
        if self.open_here and not self.lost:
            message = wire.ParticipateResponse.FromString(data)
            self.world.faults["batches"] += message.HasField("batch")
            # It leaves the window once: with its last message.
            self._on_the_way += max(0, len(message.batch.messages) - 1)
            self.inbox.extend(message.batch.messages or (message,))
            self.worker.work()

    def read(self) -> wire.ParticipateResponse:
        """Take the next message in; there is room for another on the way."""
        self._on_the_way -= 1
        message = self.inbox.popleft()
        coordinator = self.world.coordinator
        if coordinator.hub is self.hub:
            self.world.after(0.0, lambda: coordinator.do(lambda hub: self.pump()))
        return message
