"""The hub: who is connected, and the only place that talks to the sequencer."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from lorand.config import RunConfig
from lorand.errors import LorandError
from lorand.transport import BATCH, CHUNK_BYTES
from lorand.v1 import coordination_pb2 as wire
from lorand_coordinator.limits import OUTBOX_BYTES
from lorand_coordinator.sequencer import Message, Outgoing, Sequencer

TICK_S: Final = 0.1
BATCH_MESSAGES: Final = 64

log = logging.getLogger("lorand.coordinator")


class CatchUpFirst(LorandError):
    """The worker is too far behind for a join; it reads the ledger and comes back."""


class NameInUse(LorandError):
    """Another live worker has the name."""


class Outbox(asyncio.Queue[Message | None]):
    """What waits for a worker, bounded in messages and in bytes."""

    def __init__(self, messages: int, size: int) -> None:
        """Take so many messages, and one more while they are not of `size` bytes."""
        super().__init__(messages)
        self._limit, self._size = size, 0

    def full(self) -> bool:
        """Return whether nothing more may be put."""
        return super().full() or self._size >= self._limit

    def _put(self, item: Message | None) -> None:
        self._size += 0 if item is None else item.ByteSize()
        super()._put(item)

    def _get(self) -> Message | None:
        item = super()._get()
        self._size -= 0 if item is None else item.ByteSize()
        return item


@dataclass(eq=False)
class Connection:
    """One worker's open stream. `outbox` is bounded: a reader that falls behind is dropped."""

    worker: int
    session: int
    outbox: Outbox
    last_seen: float
    batches: bool = False
    closing: str = ""
    held: list[Message] = field(default_factory=list)
    """What can wait for the next message that cannot."""


@dataclass
class Traffic:
    """Protobuf bytes exchanged with a worker since this process began, and when it was heard of."""

    received: int = 0
    sent: int = 0
    last_seen: float | None = None
    answer_s: float | None = None
    """How long its last contribution took, from the round's start."""


class Hub:
    """Connections, and the only place that talks to the sequencer."""

    def __init__(
        self,
        sequencer: Sequencer,
        clock: Callable[[], float] = time.monotonic,
        *,
        several: bool = False,
    ) -> None:
        """`clock` is monotonic seconds; wall clocks are never compared.

        `several` says that other coordinators stand by.
        """
        self.several = several
        self.sequencer = sequencer
        self.config: RunConfig = sequencer.config
        self.clock = clock
        self.connections: dict[int, Connection] = {}
        self.traffic: dict[int, Traffic] = {}
        self.grown = asyncio.Event()
        self.draining = False
        self.stepped = clock()
        """When the event that is being handled came in."""
        self._last_reason = ""
        self._told: dict[str, int] = {}

    def join(self, hello: wire.Hello) -> Connection:
        """Admit a worker, queue Welcome and the entries it lacks, and count it as connected.

        All in one step of the loop, so no entry can fall between the tail and the broadcasts.
        Raises HandshakeError, or StoreUnavailable (the worker may try again).
        """
        number, outgoing = self.sequencer.admit(hello)
        self.deliver(outgoing)
        missing = len(self.sequencer.store) - hello.next_sequence
        limit = self.config.service.tail_entries
        if missing > limit:
            raise CatchUpFirst(
                f"{missing} entries are missing, at most {limit} come with a join; "
                "read the ledger first"
            )
        old = self.connections.get(number)
        if old is not None:
            if old.session != hello.session:
                raise NameInUse(
                    f"a worker named {hello.name!r} is connected; choose another --name, or wait "
                    f"{self.config.service.heartbeat_timeout_s:.0f} s if it is gone"
                )
            self.drop(old, "the worker connected again")
        tail = self._tail(hello.next_sequence)  # may fail: before anybody is connected
        service = self.config.service
        # Room for the tail beside the bound on what may pile up later.
        size = sum(map(len, tail)) + OUTBOX_BYTES
        outbox = Outbox(service.outbox_messages + missing + 2, size)
        batches = BATCH in hello.features
        connection = Connection(number, hello.session, outbox, self.clock(), batches)
        self.connections[number] = connection
        welcome = wire.Welcome(
            worker=number,
            heartbeat_s=service.heartbeat_s,
            heartbeat_timeout_s=service.heartbeat_timeout_s,
        )
        outbox.put_nowait(Message(welcome=welcome))
        for body in tail:
            outbox.put_nowait(Message(entry=body))
        self.deliver(self.sequencer.connect(number, self.clock()))
        return connection

    def _tail(self, start: int) -> list[bytes]:
        tail: list[bytes] = []
        size = 0
        for body in self.sequencer.tail(start):
            size += len(body)
            if size > OUTBOX_BYTES and tail:
                raise CatchUpFirst(
                    f"the entries that are missing have more than {OUTBOX_BYTES >> 20} MiB; "
                    "read the ledger first"
                )
            tail.append(body)
        return tail

    def drop(self, connection: Connection, why: str) -> None:
        """End a connection; safe to call twice."""
        if connection.closing:
            return
        connection.closing = why
        if self.connections.get(connection.worker) is connection:
            del self.connections[connection.worker]
            self.count(connection.worker).last_seen = connection.last_seen
            log.info("worker %d left: %s", connection.worker, why)
            if not self.draining:  # else the round goes on with the next process
                self.stepped = self.clock()
                self.deliver(self.sequencer.disconnect(connection.worker, self.stepped))
        if connection.outbox.full():
            # Never a history with a hole: the worker reads what it lacks when it comes back.
            while not connection.outbox.empty():
                connection.outbox.get_nowait()
        connection.outbox.put_nowait(None)

    def deliver(self, outgoing: list[Outgoing]) -> None:
        """Queue messages; a full outbox ends its connection (the worker catches up later)."""
        slow: list[Connection] = []
        for item in outgoing:
            connection = self.connections.get(item.worker)
            if connection is None or connection.closing:
                continue
            if item.can_wait and connection.batches:
                connection.held.append(item.message)
                if len(connection.held) < BATCH_MESSAGES:
                    continue
                messages = []
            else:
                messages = [item.message]
            if connection.held:
                # When a thousand workers join, each hears of all others, but not one by one.
                messages = [Message(batch=wire.Batch(messages=connection.held)), *messages]
                connection.held = []
            try:
                for message in messages:
                    connection.outbox.put_nowait(message)
            except asyncio.QueueFull:
                slow.append(connection)
        if outgoing:
            self.grown.set()
            self.grown = asyncio.Event()
        for connection in slow:
            self.drop(connection, "it does not read its messages")
        self._log_reason()

    def together(self, connection: Connection, first: Message) -> Message:
        """Return a message of a connection's outbox, with those behind it.

        A call costs more than a message, and a frame and a TLS record more bytes than a batch.
        """
        waiting = connection.outbox
        if waiting.empty() or not connection.batches:
            return first
        messages, size = list(first.batch.messages or (first,)), first.ByteSize()
        while not waiting.empty() and len(messages) < BATCH_MESSAGES:
            message = waiting.get_nowait()
            if message is None:
                waiting.put_nowait(None)
                break
            messages += message.batch.messages or (message,)
            size += message.ByteSize()
            if size > CHUNK_BYTES:
                break
        return Message(batch=wire.Batch(messages=messages))

    def take(self, connection: Connection, request: wire.ParticipateRequest) -> None:
        """Handle a message of a connected worker."""
        connection.last_seen = self.stepped = self.clock()
        traffic = self.count(connection.worker)
        traffic.received += request.ByteSize()
        if request.HasField("heartbeat"):
            beat = Message(heartbeat=wire.Heartbeat())
            self.deliver([Outgoing(connection.worker, beat)])
            return
        if request.HasField("skip"):
            log.info("worker %d sits a round out: %s", connection.worker, request.skip.reason)
        engine = self.sequencer.engine
        if request.contribution.round_index == engine.round_index:
            traffic.answer_s = self.stepped - engine.began
        self.deliver(self.sequencer.receive(connection.worker, request, self.clock()))

    def count(self, worker: int) -> Traffic:
        """Return the traffic counters of a worker."""
        return self.traffic.setdefault(worker, Traffic())

    async def tick(self) -> None:
        """Let time pass for the engine, and give up silent workers, until cancelled."""
        timeout = self.config.service.heartbeat_timeout_s
        while True:
            await asyncio.sleep(TICK_S)
            now = self.stepped = self.clock()
            for connection in list(self.connections.values()):
                if now - connection.last_seen > timeout:
                    self.drop(connection, f"no heartbeat for {timeout:.0f} s")
            self.deliver(self.sequencer.tick(now))

    def _log_reason(self) -> None:
        """Log where the run is, once a round and whenever it waits for something else."""
        engine = self.sequencer.engine
        text = self.sequencer.reason.split("; trying again")[0]
        if engine.phase == "reporting":
            loss = self.sequencer.tally.loss
            known = f"; loss of the last {loss:.4f}" if loss is not None else ""
            text = f"measuring with {len(engine.participants)} workers{known}"
        line = f"round {engine.round_index}: {text}"
        if line != self._last_reason:
            self._last_reason = line
            log.info("%s", line)
            self._log_findings()

    def _log_findings(self) -> None:
        """Log what the scalars tell of the run; a finding that stays comes once a window."""
        position, recent = self.sequencer.position, self.sequencer.recent
        committed = 0 if position is None else position.committed
        for finding in self.sequencer.findings():
            if committed >= self._told.get(finding.kind, 0):
                self._told[finding.kind] = committed + recent.window
                log.log(logging.WARNING if finding.warning else logging.INFO, "%s", finding.text)
