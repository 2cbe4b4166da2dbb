"""gRPC in front of the sequencer: one event loop, one bidirectional stream a worker."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any, Final, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lorand import ledger, transport, wire_size
from lorand.config import PROTOCOL_VERSION, RunConfig
from lorand.errors import Behind, ConfigError, HandshakeError, LedgerError, LorandError
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import coordination_pb2_grpc as coordination
from lorand.v1 import enrolment_pb2_grpc as enrolment_service
from lorand.v1 import ledger_pb2 as pb
from lorand.v1 import ledger_pb2_grpc as ledger_service
from lorand.v1 import status_pb2 as status
from lorand.v1 import status_pb2_grpc as status_service
from lorand_coordinator import signing, stating
from lorand_coordinator.gate import Bounds, Gate
from lorand_coordinator.hub import CatchUpFirst, Connection, Hub, NameInUse, log
from lorand_coordinator.identity import access, enrolment
from lorand_coordinator.identity.access import REVOKED_WITHIN_S, Access
from lorand_coordinator.identity.admission import Admission
from lorand_coordinator.limits import Flow, TooMany
from lorand_coordinator.sequencer import Message
from lorand_coordinator.store import StoreUnavailable

HELLO_TIMEOUT_S: Final = 10.0
FOLLOW_POLL_S: Final = 1.0
FEATURES: Final = ("checkpoint", "evaluation")
SERVED: Final = "lorand.v1.CoordinationService"
"""Whose health says whether members are served here, by this coordinator or through it."""
SIGNS: Final = "heads"
"""The feature of a coordinator that signs its ledger."""
STATES: Final = "statements"
"""The feature of a coordinator that takes what workers sign of their contributions."""

Context = grpc.aio.ServicerContext[Any, Any]
_Result = TypeVar("_Result")


class Coordination(coordination.CoordinationServiceServicer):
    """Rounds."""

    def __init__(self, hub: Hub) -> None:
        """Serve this hub."""
        self._hub = hub

    async def GetRun(self, request: wire.GetRunRequest, context: Context) -> wire.GetRunResponse:
        """See coordination.proto."""
        identity = self._hub.sequencer.identity
        features = [*FEATURES]
        features += [SIGNS] * (self._hub.sequencer.key is not None)
        features += [STATES] * (self._hub.config.service.statements_every > 0)
        features += [transport.SEVERAL] * self._hub.several
        return wire.GetRunResponse(
            protocol_version=PROTOCOL_VERSION,
            config=self._hub.config.to_json(),
            identity=identity.to_lock() if identity else "",
            features=features,
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
            while (first := await connection.outbox.get()) is not None:
                message = self._hub.together(connection, first)
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
        first.hello.name = access.named(first.hello.name)
        connection = self._hub.join(first.hello)
        self._hub.count(connection.worker).received += first.ByteSize()
        return connection

    async def _read(
        self, connection: Connection, requests: AsyncIterator[wire.ParticipateRequest]
    ) -> None:
        flow = Flow(self._hub.config.service.messages_per_s, self._hub.clock())
        try:
            async for request in requests:
                if connection.closing:
                    return
                while wait := flow.take(self._hub.clock()):
                    await asyncio.sleep(wait)  # unread, so that its sender has to wait, too
                self._hub.take(connection, request)
        except TooMany as error:
            log.warning("worker %d is sent away: %s", connection.worker, error)
            self._hub.drop(connection, str(error))
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
        if request.with_contributions and not access.may_audit():
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                "single contributions tell more of a worker's data than the run does: they are for "
                "operators alone",
            )
        store = self._hub.sequencer.store
        at = request.from_sequence
        while True:
            grown = self._hub.grown
            while at < len(store):
                page = await _read(context, partial(self._page, at, request.with_contributions))
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
        sequencer = self._hub.sequencer
        position = sequencer.position
        if position is None or sequencer.config.needs_history or not request.present:
            yield pb.GetCheckpointResponse()
            return
        coefficients, entries = position.coefficients, position.next_sequence
        lacking = entries - request.next_sequence
        entry_bytes = wire_size.of_round(sequencer.config, participants=1).down.message
        width = ledger.width_of(coefficients)
        if lacking * entry_bytes < width * len(coefficients):
            yield pb.GetCheckpointResponse()
            return
        header = pb.CheckpointHeader(
            sequence=entries - 1,
            head=position.head,
            committed=position.committed,
            coefficients_digest=ledger.coefficients_digest(coefficients),
            tree=sequencer.store.tree.frontier(entries).peaks,
            width=width,
            finished=position.finished,
        )
        yield pb.GetCheckpointResponse(header=header)
        data = ledger.pack_coefficients(coefficients, width)
        for start in range(0, len(data), transport.CHUNK_BYTES):
            yield pb.GetCheckpointResponse(chunk=data[start : start + transport.CHUNK_BYTES])

    async def GetHead(self, request: pb.GetHeadRequest, context: Context) -> pb.GetHeadResponse:
        """See ledger.proto."""
        sequencer = self._hub.sequencer
        try:
            return signing.head_for(request, sequencer.store, sequencer.position, sequencer.key)
        except Behind as error:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, str(error))
        except HandshakeError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def PostEvaluation(
        self, request: pb.PostEvaluationRequest, context: Context
    ) -> pb.PostEvaluationResponse:
        """See ledger.proto."""
        evaluation = request.evaluation
        try:
            evaluation.evaluator = access.named(evaluation.evaluator)
            outgoing = self._hub.sequencer.post_evaluation(evaluation, request.run_digest)
        except StoreUnavailable as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except HandshakeError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        self._hub.deliver(outgoing)
        return pb.PostEvaluationResponse(sequence=len(self._hub.sequencer.store) - 1)

    async def PostStatement(
        self, request: pb.PostStatementRequest, context: Context
    ) -> pb.PostStatementResponse:
        """See ledger.proto."""
        statement = request.statement
        sequencer = self._hub.sequencer
        account = sequencer.tally.accounts.get(statement.worker)
        try:
            if account is None or sequencer.position is None:
                raise HandshakeError(f"nobody here has the number {statement.worker}")
            if not sequencer.config.service.statements_every:
                raise HandshakeError("this run takes no statements (service.statements_every)")
            access.named(account.name)
            stating.take(statement, sequencer.store, sequencer.position)
        except LedgerError as error:  # the store is away, or could not be read just now
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except HandshakeError as error:
            log.warning("a statement was refused: %s", error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return pb.PostStatementResponse()


async def _read(context: Context, read: Callable[[], _Result]) -> _Result:
    """Return what is read; where the store is away the caller is asked to come back."""
    try:
        return read()
    except StoreUnavailable as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))


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
            answer.coefficients_digest = ledger.coefficients_digest(position.coefficients)
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


async def serve(
    hub: Hub,
    *,
    on_ready: Callable[[str, str], None],
    until: asyncio.Event,
    admission: Admission | None = None,
    enrol_at: str = "",
) -> None:
    """Serve until the event is set, then drain: no new work, streams end, nothing is lost.

    With an `admission`, members alone are served, over TLS, and may enrol at HOST:PORT `enrol_at`;
    `on_ready` gets both addresses. Without one, anybody is. Raises ConfigError when an address
    cannot be bound.
    """
    admits = None if admission is None else admission.access()
    server = gated(hub.config, admits)
    coordination.add_CoordinationServiceServicer_to_server(Coordination(hub), server)
    ledger_service.add_LedgerServiceServicer_to_server(Ledger(hub), server)
    status_service.add_StatusServiceServicer_to_server(Status(hub), server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    address = hub.config.service.address
    servers, watches, enrolled_at = [server], [hub.tick], ""
    if admission is None or admits is None:
        port = bind(server, address)
    else:
        port = bind(server, address, admission.server_credentials(ask=True))
        enrolment_service.add_EnrolmentServiceServicer_to_server(admission.service(), server)
        servers.append(enrolment.server(admission.service()))
        enrolment_port = bind(servers[1], enrol_at, admission.server_credentials(ask=False))
        enrolled_at = admission.reached_at(enrolment_port)
        note = partial(_noted, admission, port, enrolment_port)
        watches.append(partial(_watch_members, admits, note, note()))
    for each in servers:
        await each.start()
    for name in ("", SERVED):
        await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    tasks = [asyncio.create_task(watch()) for watch in watches]
    on_ready(transport.join(transport.split(address)[0], port), enrolled_at)
    try:
        await _first_of(tasks, until.wait())
    finally:
        hub.draining = True
        for task in tasks:
            task.cancel()
        for name in ("", SERVED):
            await healthy.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        for connection in list(hub.connections.values()):
            hub.drop(connection, "the coordinator is shutting down")
        await asyncio.gather(*(each.stop(hub.config.service.drain_s) for each in servers))


def _noted(admission: Admission, port: int, enrolment_port: int) -> bool:
    """Write down where members are served; return whether that could be done."""
    try:
        admission.note_served(port, enrolment_port)
    except StoreUnavailable as error:  # members that are known are served all the same
        log.error("where members enrol is not written down yet: %s", error)
        return False
    return True


async def _watch_members(admits: Access, note: Callable[[], bool], noted: bool) -> None:
    """Watch over open streams, once it is written down where members are served."""
    while not noted:
        await asyncio.sleep(REVOKED_WITHIN_S)
        noted = note()
    await admits.watch()


def gated(config: RunConfig, admits: Access | None) -> grpc.aio.Server:
    """Return a server of a run; calls are bounded first, then checked."""
    gate = Gate(Bounds.of_run(config))
    interceptors = [gate] if admits is None else [gate, admits]
    return grpc.aio.server(interceptors=interceptors, options=transport.server_options(config))


def bind(
    server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None
) -> int:
    """Bind a server to HOST:PORT and return the port. Raises ConfigError."""
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address}: the port is in use or the address is not this machine's; "
            "set service.address"
        ) from error


async def _first_of(tasks: list[asyncio.Task[None]], wait: Coroutine[Any, Any, bool]) -> None:
    """Return when asked to stop; a task that failed ends the service with its error."""
    waiting = asyncio.create_task(wait)
    done, _ = await asyncio.wait({*tasks, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    for task in done - {waiting}:
        task.result()
