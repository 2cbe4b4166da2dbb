"""Workers without models, many in one process: they speak the protocol and answer at once.

Each has a connection of its own. What it answers is made once a round and shared, so that the
load is the coordinator's: the messages are those of real workers, byte for byte in form.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, cast

import grpc
import numpy as np

from lorand import codec, ledger, transport
from lorand.config import PROTOCOL_VERSION, RunConfig
from lorand.ledger import Position
from lorand.manifest import Identity
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import coordination_pb2_grpc as coordination
from lorand.v1 import ledger_pb2 as pb
from lorand.v1 import ledger_pb2_grpc as ledger_service

BACKOFF_FIRST_S: Final = 0.2
BACKOFF_LARGEST_S: Final = 3.0

Connect = Callable[[str], grpc.aio.Channel]
"""Opens a channel for the worker of a name."""


@dataclass
class Seen:
    """What the workers of one process saw: moments by round, of this machine's monotonic clock."""

    last_sent: dict[int, float] = field(default_factory=dict)
    commits: dict[int, list[float]] = field(default_factory=dict)
    entries: int = 0
    refused: list[str] = field(default_factory=list)
    """Why workers were sent away for good."""

    @property
    def committed(self) -> int:
        """Rounds that somebody saw committed."""
        return len(self.commits)

    def latencies(self, first: int) -> list[float]:
        """Seconds from the last contribution of a round to its commit, at every worker."""
        return [
            moment - self.last_sent[index]
            for index, moments in self.commits.items()
            if index >= first and index in self.last_sent
            for moment in moments
        ]


class Federation:
    """Workers of one run, on this process's event loop."""

    def __init__(self, config: RunConfig, identity: Identity, connect: Connect) -> None:
        """`connect` opens a channel of its own for each."""
        self.seen = Seen()
        self.longest_measurement_s = 0.0
        """Each answer takes a uniform random time up to this long; 0: none."""
        self._config, self._connect = config, connect
        self._origin: Position = ledger.origin(config, identity)
        self._manifest_digest = identity.manifest.digest()
        self._bodies: list[bytes] = []
        self._heads: list[bytes] = [ledger.GENESIS]
        self._answers: dict[int, wire.ParticipateRequest] = {}
        self._rng = np.random.default_rng(1)
        self._tasks: list[asyncio.Task[None]] = []
        self._reading = asyncio.Lock()
        self.joined = 0

    def start(self, names: list[str]) -> None:
        """Start so many workers."""
        self._tasks += [asyncio.create_task(self._live(name)) for name in names]

    def __len__(self) -> int:
        """Number of workers."""
        return len(self._tasks)

    async def stop(self) -> None:
        """End all workers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def until(self, what: Callable[[], bool], limit_s: float) -> float:
        """Return the seconds until it is so. Raises TimeoutError."""
        began = time.monotonic()
        while not what():
            if time.monotonic() - began > limit_s:
                raise TimeoutError(f"not within {limit_s:.0f} s")
            await asyncio.sleep(0.01)
        return time.monotonic() - began

    async def _live(self, name: str) -> None:
        """Stay connected: who is sent away or loses its stream comes back with full jitter."""
        wait = BACKOFF_FIRST_S
        while True:
            channel = self._connect(name)
            try:
                if await self._take_part(name, channel):
                    wait = BACKOFF_FIRST_S
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass  # the latter: it ended while an answer was on its way out
            finally:
                await channel.close()
            await asyncio.sleep(float(self._rng.uniform(0, wait)))
            wait = min(2 * wait, BACKOFF_LARGEST_S)

    async def _take_part(self, name: str, channel: grpc.aio.Channel) -> bool:
        """One connection; whether it was welcome."""
        await self._catch_up(channel)
        applied = len(self._bodies)
        stream = coordination.CoordinationServiceStub(channel).Participate()
        await stream.write(wire.ParticipateRequest(hello=self._hello(name, applied)))
        welcome = False
        try:
            while (read := await stream.read()) is not grpc.aio.EOF:
                message = cast(wire.ParticipateResponse, read)
                for part in message.batch.messages or (message,):
                    kind = part.WhichOneof("message")
                    if kind == "welcome":
                        welcome = True
                        self.joined += 1
                    elif kind == "entry":
                        self._follow(applied, part.entry)
                        applied += 1
                    elif kind == "round_start":
                        if self.longest_measurement_s:
                            await asyncio.sleep(
                                float(self._rng.uniform(0, self.longest_measurement_s))
                            )
                        await stream.write(self._answer(part.round_start.round_index))
                    elif kind == "refusal":
                        if not part.refusal.retry:
                            self.seen.refused.append(part.refusal.reason)
                        return welcome
        finally:
            self.joined -= welcome
            stream.cancel()
        return welcome

    async def _catch_up(self, channel: grpc.aio.Channel) -> None:
        """Read what nobody here has read; one at a time, since all share it."""
        async with self._reading:
            at = len(self._bodies)
            request = pb.ReadEntriesRequest(from_sequence=at)
            async for page in ledger_service.LedgerServiceStub(channel).ReadEntries(request):
                for body in page.entries:
                    self._follow(at, body)
                    at += 1

    def _follow(self, sequence: int, body: bytes) -> None:
        if sequence == len(self._bodies):
            self._bodies.append(body)
            self._heads.append(ledger.entry_digest(self._heads[-1], body))
        assert self._bodies[sequence] == body, "two workers were shown different histories"
        self.seen.entries += 1
        entry = pb.Entry.FromString(body)
        if entry.HasField("commit"):
            self.seen.commits.setdefault(entry.round_index, []).append(time.monotonic())

    def _answer(self, round_index: int) -> wire.ParticipateRequest:
        count = self._config.num_directions
        if round_index not in self._answers:
            codes = self._rng.integers(-100, 100, count)
            packed = codec.pack(self._config.codec.up, codes)
            contribution = pb.Contribution(round_index=round_index, codes=packed)
            self._answers = {round_index: wire.ParticipateRequest(contribution=contribution)}
        self.seen.last_sent[round_index] = time.monotonic()
        return self._answers[round_index]

    def _hello(self, name: str, applied: int) -> wire.Hello:
        identity = self._origin.identity
        return wire.Hello(
            protocol_version=PROTOCOL_VERSION,
            name=name,
            run_digest=self._origin.run_digest,
            base_digest=identity.base_digest,
            tokenizer_digest=identity.tokenizer_digest,
            manifest_digest=self._manifest_digest,
            next_sequence=applied,
            head=self._heads[applied] if applied else b"",
            session=hash(name) & (2**63 - 1),
            features=[transport.BATCH],
        )


def options() -> list[tuple[str, int]]:
    """Return a channel's options: a worker's, and no connection shared with another."""
    return [*transport.channel_options(), ("grpc.use_local_subchannel_pool", 1)]
