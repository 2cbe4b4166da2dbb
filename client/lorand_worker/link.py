"""The worker's connection: a synchronous gRPC channel, reconnects and bounded waits."""

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeVar

import grpc
from google.protobuf.message import Message

from lorand import credentials, ledger, transport
from lorand.config import PROTOCOL_VERSION, RunConfig
from lorand.credentials import Credentials
from lorand.errors import (
    Behind,
    ConfigError,
    ConnectionLost,
    HandshakeError,
    LedgerError,
    LorandError,
)
from lorand.ledger import Position
from lorand.manifest import Identity
from lorand.merkle import Frontier
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import coordination_pb2_grpc as coordination
from lorand.v1 import ledger_pb2 as pb
from lorand.v1 import ledger_pb2_grpc as ledger_service
from lorand_worker.inbox import Inbox

BACKOFF_FIRST_S: Final = 0.2
BACKOFF_LARGEST_S: Final = 3.0
BEHIND_S: Final = 30.0
"""Of several coordinators, how long one that has too few entries is taken for one that slept."""
CALL_TIMEOUT_S: Final = 30.0
READ_TIMEOUT_S: Final = 600.0
EXIT_POLL_S: Final = 1.0
REQUESTS_QUEUED: Final = 64
FEATURES: Final = ("checkpoint", "evaluation", transport.BATCH)
SIGNS: Final = "heads"
"""The feature of a coordinator that signs its ledger."""
STATES: Final = "statements"
"""The feature of a coordinator that takes what workers sign of their contributions."""
REFUSALS: Final = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
)

_Result = TypeVar("_Result")


class Retry(Exception):
    """The coordinator asked to come back later."""


class Stopped(LorandError):
    """Who started this worker stopped it."""


@dataclass
class Traffic:
    """Protobuf bytes of this process, both ways."""

    sent: int = 0
    received: int = 0


class Link:
    """A channel to a coordinator. `give_up_s` bounds how long it is tried to be reached.

    Of several addresses, separated by commas, the next is tried where one is away or stands by.
    """

    def __init__(self, address: str, give_up_s: float, shown: Credentials | None = None) -> None:
        """Open the channel; nothing is sent yet. Without credentials: on this machine alone.

        Raises ConfigError without an address.
        """
        self.address, self.shown = address, shown
        self._addresses = transport.several(address)
        self.traffic = Traffic()
        self.signs = False
        """Whether the coordinator signs its ledger, as it said last."""
        self._several = len(self._addresses) > 1
        """Whether the run has several coordinators."""
        self.states = False
        """Whether it takes statements of workers, as it said last."""
        self._give_up_s = give_up_s
        self._stopped = threading.Event()
        self._channel: grpc.Channel | None = None
        self._open()

    def _open(self) -> None:
        """Open a channel, in place of one that failed.

        That would connect again while somebody calls, and at no other time: between calls nothing
        reads its sockets, so that the handshakes it begins run out of time.
        """
        self.close()
        self._take_renewed()
        self._channel = credentials.channel(self._addresses[0], self.shown)
        self._coordination = coordination.CoordinationServiceStub(self._channel)
        self._ledger = ledger_service.LedgerServiceStub(self._channel)

    def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            self._channel.close()

    def stop(self) -> None:
        """End what is under way, from another thread: `persist` raises Stopped."""
        self._stopped.set()
        self.close()

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise Stopped("this worker was stopped; the same settings go on where it was")

    def _turn(self, *, failed: bool) -> None:
        """Go on with the next address, or with another channel in place of one that failed."""
        if failed or len(self._addresses) > 1:
            self._addresses = [*self._addresses[1:], self._addresses[0]]
            self._open()

    def persist(self, attempt: Callable[[], _Result], on_wait: Callable[[str], None]) -> _Result:
        """Return the result of `attempt`, repeated with full jitter while the coordinator is away.

        Raises ConnectionLost after give_up_s without success, HandshakeError when the coordinator
        answered but kept sending this worker away, Stopped after `stop`; the time starts anew after
        an attempt that lasted. Raises Behind at once where there is one coordinator. One of several
        may have led before it slept, and not know yet who leads now: the next is tried, or the same
        again, for BEHIND_S.
        """
        tries, since = 0, time.monotonic()
        behind_since: float | None = None
        while True:
            began, answered, behind = time.monotonic(), False, False
            try:
                return attempt()
            except Retry as error:
                why, answered = str(error), True
            except Behind:
                behind_since = behind_since or began
                if not self._several or began - behind_since > BEHIND_S:
                    raise
                why = f"{self._addresses[0]} shows an older history than was seen"
                answered = behind = True
            except grpc.RpcError as error:
                self._check_stopped()
                why = _explain(self._addresses[0], error)
            except ValueError:  # gRPC's word for a channel that was closed
                self._check_stopped()
                raise
            now = time.monotonic()
            if now - began > BACKOFF_LARGEST_S:
                tries, since = 0, now
                behind_since = behind_since if behind else None
            if now - since > self._give_up_s:
                if answered:
                    raise HandshakeError(
                        f"the coordinator at {self.address} did not let this worker in for "
                        f"{self._give_up_s:.0f} s: {why}"
                    )
                raise ConnectionLost(
                    f"the coordinator at {self.address} could not be reached for "
                    f"{self._give_up_s:.0f} s ({why}); check the address and that "
                    f"`lr-coordinator serve` runs{self._doubt()}, then give the same command again"
                )
            on_wait(why)
            self._turn(failed=not answered)
            limit = min(BACKOFF_LARGEST_S, BACKOFF_FIRST_S * 2 ** (tries // len(self._addresses)))
            self._stopped.wait(random.SystemRandom().uniform(0, limit))
            self._check_stopped()
            tries += 1

    def _take_renewed(self) -> None:
        """Go on with the credentials that `lr-worker enrol --renew` has written meanwhile."""
        if self.shown is None:
            return
        with suppress(ConfigError):  # the file is gone: what was read serves while it is good
            self.shown = Credentials.read(self.shown.path)

    def _doubt(self) -> str:
        """Return what else may be wrong: TLS closes a connection without a word."""
        if self.shown is None:
            return " with --insecure, too"
        return f", whether {self.shown.path} has expired ({self.shown.expires:%Y-%m-%d})"

    def get_run(self) -> tuple[RunConfig, Identity | None]:
        """Return the run's config, and the identity unless the first worker's is awaited."""
        request = wire.GetRunRequest(protocol_version=PROTOCOL_VERSION)
        answer = self._coordination.GetRun(request, timeout=CALL_TIMEOUT_S)
        self._count(request, answer)
        if answer.protocol_version != PROTOCOL_VERSION:
            raise HandshakeError(
                f"the coordinator speaks protocol version {answer.protocol_version}, this worker "
                f"{PROTOCOL_VERSION}; install the same release of lorand on both"
            )
        self.signs, self.states = SIGNS in answer.features, STATES in answer.features
        self._several = len(self._addresses) > 1 or transport.SEVERAL in answer.features
        identity = Identity.from_lock(answer.identity) if answer.identity else None
        return RunConfig.from_json(answer.config), identity

    def catch_up(self, position: Position) -> Position:
        """Return the newest position: from a checkpoint where that is nearer, then the tail."""
        position = self.from_checkpoint(position)
        for body in self.entries(position.next_sequence):
            position = ledger.apply(position, body)
        return position

    def from_checkpoint(self, position: Position) -> Position:
        """Return the coordinator's position, or this one where entries lead on in fewer bytes."""
        size = position.config.directions.pool_size
        header, data = pb.CheckpointHeader(), bytearray()
        request = pb.GetCheckpointRequest(next_sequence=position.next_sequence, present=True)
        self.traffic.sent += request.ByteSize()
        for part in self._ledger.GetCheckpoint(request, timeout=READ_TIMEOUT_S):
            self.traffic.received += part.ByteSize()
            if part.HasField("header"):
                header = part.header
                if header.sequence < position.next_sequence or not header.tree:
                    return position  # without a tree, an older coordinator's: entries tell all
            data += part.chunk
            if len(data) > 8 * size:
                raise LedgerError("the coordinator's checkpoint is larger than this run's pool")
        if not data:
            return position
        coefficients = ledger.unpack_coefficients(bytes(data), size, header.width)
        if ledger.coefficients_digest(coefficients) != header.coefficients_digest:
            raise LedgerError("the coordinator's checkpoint was damaged on the way; join again")
        return Position(
            position.config,
            position.identity,
            position.draws,
            coefficients,
            header.sequence + 1,
            header.head,
            header.committed,
            header.finished,
            tree=Frontier.of(header.sequence + 1, header.tree),
        )

    def entries(self, start: int, *, follow: bool = False) -> Iterator[bytes]:
        """Yield entries from a sequence on; with `follow`, without end."""
        request = pb.ReadEntriesRequest(from_sequence=start, follow=follow)
        timeout = None if follow else READ_TIMEOUT_S
        self.traffic.sent += request.ByteSize()
        for page in self._ledger.ReadEntries(request, timeout=timeout):
            self.traffic.received += page.ByteSize()
            yield from page.entries

    def get_head(self, size: int, known_size: int) -> pb.GetHeadResponse:
        """Return the signed head of so many entries, with the proof from a known one.

        Raises Behind when the coordinator has fewer.
        """
        request = pb.GetHeadRequest(size=size, known_size=known_size)
        try:
            answer = self._ledger.GetHead(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.OUT_OF_RANGE:
                raise Behind(error.details()) from error
            raise
        self._count(request, answer)
        return answer

    def post_evaluation(self, evaluation: pb.Evaluation, run_digest: bytes) -> int:
        """Append an evaluation; return its sequence."""
        request = pb.PostEvaluationRequest(evaluation=evaluation, run_digest=run_digest)
        answer = self._ledger.PostEvaluation(request, timeout=CALL_TIMEOUT_S)
        self._count(request, answer)
        return int(answer.sequence)

    def post_statement(self, statement: pb.Statement, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Hand in a statement of this worker. Raises HandshakeError when it is refused for good."""
        request = pb.PostStatementRequest(statement=statement)
        try:
            answer = self._ledger.PostStatement(request, timeout=timeout_s)
        except grpc.RpcError as error:
            refused = grpc.StatusCode.FAILED_PRECONDITION
            if isinstance(error, grpc.Call) and error.code() is refused:
                raise HandshakeError(error.details()) from error
            raise
        self._count(request, answer)

    def _count(self, request: Message, answer: Message) -> None:
        self.traffic.sent += request.ByteSize()
        self.traffic.received += answer.ByteSize()

    def participate(self, hello: wire.Hello) -> "Stream":
        """Open the stream of rounds with a Hello."""
        return Stream(self._coordination, hello, self.traffic)


def outgoing(
    requests: "queue.Queue[wire.ParticipateRequest | None]",
) -> Iterator[wire.ParticipateRequest]:
    """Yield requests until None comes, or this process ends.

    gRPC reads them in a thread that an exit waits for. Interrupted before a Stream is made, nobody
    is left to put None there.
    """
    while True:
        try:
            request = requests.get(timeout=EXIT_POLL_S)
        except queue.Empty:
            if not threading.main_thread().is_alive():
                return
            continue
        if request is None:
            return
        yield request


class Stream:
    """One open Participate call: iterate over messages, `send` requests, `close` it.

    A thread of its own sends heartbeats, and ends the call when the coordinator has been silent
    for heartbeat_timeout_s.
    """

    def __init__(
        self, stub: coordination.CoordinationServiceStub, hello: wire.Hello, traffic: Traffic
    ) -> None:
        """Start the call."""
        self._traffic = traffic
        self._requests: queue.Queue[wire.ParticipateRequest | None] = queue.Queue(REQUESTS_QUEUED)
        self._done = threading.Event()
        self.send(wire.ParticipateRequest(hello=hello))
        self._call = stub.Participate(outgoing(self._requests))
        self._inbox = Inbox(self._call, self._received)

    def __iter__(self) -> Iterator[wire.ParticipateResponse]:
        """Yield the coordinator's messages until it ends the stream."""
        return iter(self._inbox)

    def is_over(self, round_index: int) -> bool:
        """Return whether a round has ended by what came while this worker measured."""
        return self._inbox.is_over(round_index)

    def send(self, request: wire.ParticipateRequest) -> None:
        """Queue a request."""
        self._traffic.sent += request.ByteSize()
        self._requests.put(request, timeout=CALL_TIMEOUT_S)

    def keep_alive(self, interval_s: float, timeout_s: float) -> None:
        """Send heartbeats from now on."""

        def beat() -> None:
            while not self._done.wait(interval_s):
                if self._inbox.silent_s() > timeout_s:
                    self._call.cancel()
                    return
                if self._requests.empty():
                    self.send(wire.ParticipateRequest(heartbeat=wire.Heartbeat()))

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()

    def close(self) -> None:
        """End the call; safe to call twice."""
        self._done.set()
        self._call.cancel()
        self._inbox.close()
        try:
            self._requests.put_nowait(None)
        except queue.Full:
            # The call is cancelled, so gRPC no longer drains the queue: make room for the end.
            self._requests.get_nowait()
            self._requests.put_nowait(None)

    def _received(self, size: int) -> None:
        self._traffic.received += size


def _explain(address: str, error: grpc.RpcError) -> str:
    """Return a gRPC failure in a few words; raise it when coming back cannot help."""
    code = error.code() if isinstance(error, grpc.Call) else None
    detail = (error.details() if isinstance(error, grpc.Call) else "") or str(error)
    if code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT):
        raise HandshakeError(
            f"the server there is no lorand coordinator of this version: {detail}"
        ) from error
    if code in REFUSALS and not _comes_back(error):
        raise HandshakeError(f"the coordinator refused: {detail}") from error
    if (distrust := credentials.distrust(address, detail)) is not None:
        raise distrust from error
    return f"{code.name.lower() if code else 'error'}: {_first_line(detail)[:160]}"


def _comes_back(error: grpc.RpcError) -> bool:
    """Return whether a refusal is for now alone."""
    trailers = error.trailing_metadata() if isinstance(error, grpc.Call) else None
    return transport.PUSHBACK in dict(trailers or ())


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
