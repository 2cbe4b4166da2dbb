"""gRPC in front of the sequencer: one event loop, one bidirectional stream a worker."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lorand import transport
from lorand.config import PROTOCOL_VERSION
from lorand.errors import ConfigError, HandshakeError, LorandError
from lorand.ledger import coefficients_digest
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import coordination_pb2_grpc as coordination
from lorand.v1 import ledger_pb2 as pb
from lorand.v1 import ledger_pb2_grpc as ledger_service
from lorand.v1 import status_pb2 as status
from lorand.v1 import status_pb2_grpc as status_service
from lorand_coordinator import signing
from lorand_coordinator.hub import CatchUpFirst, Connection, Hub, NameInUse, log
from lorand_coordinator.sequencer import Message
from lorand_coordinator.store import StoreUnavailable

HELLO_TIMEOUT_S: Final = 10.0
FOLLOW_POLL_S: Final = 1.0
FEATURES: Final = ("checkpoint", "evaluation")
SIGNS: Final = "heads"
"""The feature of a coordinator that signs its ledger."""

Context = grpc.aio.ServicerContext[Any, Any]


class Coordination(coordination.CoordinationServiceServicer):
    """Rounds."""

    def __init__(self, hub: Hub) -> None:
        """Serve this hub."""
        self._hub = hub

    async def GetRun(self, request: wire.GetRunRequest, context: Context) -> wire.GetRunResponse:
        """See coordination.proto."""
        identity = self._hub.sequencer.identity
        return wire.GetRunResponse(
            protocol_version=PROTOCOL_VERSION,
            config=self._hub.config.to_json(),
            identity=identity.to_lock() if identity else "",
            features=(*FEATURES, SIGNS) if self._hub.sequencer.key else FEATURES,
        )

    async def Participate(
        self, request_iterator: AsyncIterator[wire.ParticipateRequest], context: Context
    ) -> AsyncIterator[Message]:
        """See coordination.proto."""
        try:
            connection = await self._hello(request_iterator)
        except LorandError as error:
            retry = isinstance(error, StoreUnavailable | CatchUpFirst | NameInUse)
            log.warning("a worker was refused: %s", error)
            yield Message(refusal=wire.Refusal(reason=str(error), retry=retry))
            return
        reader = asyncio.create_task(self._read(connection, request_iterator))
        traffic = self._hub.count(connection.worker)
        try:
            while (message := await connection.outbox.get()) is not None:
                traffic.sent += message.ByteSize()
                yield message
            yield Message(refusal=wire.Refusal(reason=connection.closing, retry=True))
        finally:
            reader.cancel()
            self._hub.drop(connection, "its connection ended")

    async def _hello(self, requests: AsyncIterator[wire.ParticipateRequest]) -> Connection:
        try:
            first = await asyncio.wait_for(anext(requests), HELLO_TIMEOUT_S)
        except (TimeoutError, StopAsyncIteration) as error:
            raise HandshakeError(f"no Hello came within {HELLO_TIMEOUT_S:.0f} s") from error
        if not first.HasField("hello"):
            raise HandshakeError("the first message of a stream must be Hello")
        if self._hub.draining:
            raise CatchUpFirst("the coordinator is shutting down")
        connection = self._hub.join(first.hello)
        self._hub.count(connection.worker).received += first.ByteSize()
        return connection

    async def _read(
        self, connection: Connection, requests: AsyncIterator[wire.ParticipateRequest]
    ) -> None:
        try:
            async for request in requests:
                if connection.closing:
                    return
                self._hub.take(connection, request)
        except Exception:  # a fault of ours: it must be seen, and end only this connection
            log.exception("worker %d: its message could not be handled", connection.worker)
        finally:
            self._hub.drop(connection, "it closed its stream")


class Ledger(ledger_service.LedgerServiceServicer):
    """History."""

    def __init__(self, hub: Hub) -> None:
        """Serve this hub's store."""
        self._hub = hub

    async def ReadEntries(
        self, request: pb.ReadEntriesRequest, context: Context
    ) -> AsyncIterator[pb.ReadEntriesResponse]:
        """See ledger.proto."""
        store = self._hub.sequencer.store
        at = request.from_sequence
        while True:
            grown = self._hub.grown
            while at < len(store):
                page = self._page(at, request.with_contributions)
                at += len(page.entries)
                yield page
            if not request.follow:
                return
            if self._hub.draining:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator is shutting down")
            try:
                await asyncio.wait_for(grown.wait(), FOLLOW_POLL_S)
            except TimeoutError:
                continue

    def _page(self, start: int, with_contributions: bool) -> pb.ReadEntriesResponse:
        """Entries up to about CHUNK_BYTES, at least one."""
        store = self._hub.sequencer.store
        page = pb.ReadEntriesResponse()
        size = 0
        for sequence, body in enumerate(store.entries(start), start):
            page.entries.append(body)
            size += len(body)
            if with_contributions:
                for part in store.contributions(sequence):
                    if not page.contributions or page.contributions[-1].sequence != sequence:
                        page.contributions.add(sequence=sequence)
                    page.contributions[-1].contributions.append(
                        pb.StoredContribution.FromString(part)
                    )
                    size += len(part)
            if size >= transport.CHUNK_BYTES:
                break
        return page

    async def GetCheckpoint(
        self, request: pb.GetCheckpointRequest, context: Context
    ) -> AsyncIterator[pb.GetCheckpointResponse]:
        """See ledger.proto."""
        checkpoint = self._hub.sequencer.store.newest_checkpoint()
        if checkpoint is None:
            yield pb.GetCheckpointResponse()
            return
        data = checkpoint.coefficients
        header = pb.CheckpointHeader(
            sequence=checkpoint.sequence,
            head=checkpoint.head,
            committed=checkpoint.committed,
            coefficients_digest=hashlib.sha256(data).digest(),
            tree=self._hub.sequencer.store.tree.frontier(checkpoint.sequence + 1).peaks,
        )
        yield pb.GetCheckpointResponse(header=header)
        for start in range(0, len(data), transport.CHUNK_BYTES):
            yield pb.GetCheckpointResponse(chunk=data[start : start + transport.CHUNK_BYTES])

    async def GetHead(self, request: pb.GetHeadRequest, context: Context) -> pb.GetHeadResponse:
        """See ledger.proto."""
        sequencer = self._hub.sequencer
        try:
            return signing.head_for(request, sequencer.store, sequencer.position, sequencer.key)
        except HandshakeError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def PostEvaluation(
        self, request: pb.PostEvaluationRequest, context: Context
    ) -> pb.PostEvaluationResponse:
        """See ledger.proto."""
        try:
            outgoing = self._hub.sequencer.post_evaluation(request.evaluation, request.run_digest)
        except StoreUnavailable as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except HandshakeError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        self._hub.deliver(outgoing)
        return pb.PostEvaluationResponse(sequence=len(self._hub.sequencer.store) - 1)


class Status(status_service.StatusServiceServicer):
    """What people and scripts ask."""

    def __init__(self, hub: Hub) -> None:
        """Report on this hub."""
        self._hub = hub

    async def GetStatus(
        self, request: status.GetStatusRequest, context: Context
    ) -> status.GetStatusResponse:
        """See status.proto."""
        sequencer = self._hub.sequencer
        engine, position, tally = sequencer.engine, sequencer.position, sequencer.tally
        answer = status.GetStatusResponse(
            name=sequencer.config.run.name,
            phase=engine.phase,
            reason=sequencer.reason or "waiting for the first worker to join",
            round_index=engine.round_index,
            committed=engine.committed,
            rounds=sequencer.config.run.rounds,
            entries=len(sequencer.store),
            head=sequencer.store.head(),
            abandoned=engine.abandoned,
            loss=tally.loss,
            findings=[finding.text for finding in sequencer.findings()],
        )
        if position is not None:
            answer.coefficients_digest = coefficients_digest(position.coefficients)
        for number, account in tally.accounts.items():
            traffic = self._hub.count(number)
            answer.workers.add(
                worker=number,
                name=account.name,
                connected=number in self._hub.connections,
                contributions=account.contributions,
                rejected=account.rejected,
                bytes_received=traffic.received,
                bytes_sent=traffic.sent,
            )
        for evaluation in tally.evaluations:
            answer.evaluations.add(
                evaluator=evaluation.evaluator,
                committed=evaluation.committed,
                accuracy=evaluation.accuracy,
                loss=evaluation.loss,
                examples=evaluation.examples,
            )
        return answer


async def serve(hub: Hub, *, on_ready: Callable[[str], None], until: asyncio.Event) -> None:
    """Serve until the event is set, then drain: no new work, streams end, nothing is lost.

    Raises ConfigError when the address cannot be bound.
    """
    server = grpc.aio.server(options=transport.server_options(hub.config))
    coordination.add_CoordinationServiceServicer_to_server(Coordination(hub), server)
    ledger_service.add_LedgerServiceServicer_to_server(Ledger(hub), server)
    status_service.add_StatusServiceServicer_to_server(Status(hub), server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    address = hub.config.service.address
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address}: the port is in use or the address is not this machine's; "
            "set service.address"
        ) from error
    await server.start()
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    ticker = asyncio.create_task(hub.tick())
    on_ready(f"{address.rsplit(':', 1)[0]}:{port}")
    try:
        await _first_of(ticker, until.wait())
    finally:
        hub.draining = True
        ticker.cancel()
        await healthy.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        for connection in list(hub.connections.values()):
            hub.drop(connection, "the coordinator is shutting down")
        await server.stop(hub.config.service.drain_s)


async def _first_of(ticker: asyncio.Task[None], wait: Coroutine[Any, Any, bool]) -> None:
    """Return when asked to stop; a ticker that failed ends the service with its error."""
    waiting = asyncio.create_task(wait)
    done, _ = await asyncio.wait({ticker, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if ticker in done:
        ticker.result()
