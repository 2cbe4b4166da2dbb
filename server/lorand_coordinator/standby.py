"""Several coordinators of one run: one leads, the others stand by and take over.

All of them serve the same addresses throughout. Who stands by answers calls for its status, and
passes all others on to the leader; where it knows none the answer is "unavailable", so that a
worker tries the next address it was given, or the same again. Once a second it tries to take the
run over, which succeeds when the leader's session with the database has ended. A leader that learns
that another took over stands by again.
"""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lorand import transport
from lorand.config import RunConfig
from lorand.v1 import status_pb2 as status
from lorand.v1 import status_pb2_grpc as status_service
from lorand_coordinator.hub import Hub, log
from lorand_coordinator.identity.admission import EVERYWHERE, Admission
from lorand_coordinator.identity_cli import enrolment_address
from lorand_coordinator.monitoring import Monitor
from lorand_coordinator.relay import Relay, connecting
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.service import SERVED, Context, bind, gated
from lorand_coordinator.service import serve as serve_hub
from lorand_coordinator.store import StoreUnavailable
from lorand_coordinator.store_postgres import LEASE_S, InUse, PostgresStore, TakenOver

POLL_S: Final = 1.0
PHASE: Final = "standing by"


class Tell(Protocol):
    """Where a coordinator says what it is now."""

    def __call__(self, event: str, address: str, text: str) -> None:
        """Say it: `listening` first, then `leading` and `standing by` in turn."""


@dataclass(frozen=True)
class Coordinator:
    """What one of several coordinators needs, whether it leads or not."""

    config: RunConfig
    take_over: Callable[[RunConfig, str], Sequencer]
    """Opens the run under a leader's name. Raises InUse or StoreUnavailable while it cannot."""
    tell: Tell
    admission: Admission | None = None
    """Lets members alone through, from an identity folder that all coordinators share."""
    monitor: Monitor | None = None
    """Shows what this coordinator does."""
    advertised: str = ""
    """HOST:PORT at which the other coordinators reach it; empty: where it is bound."""


async def serve(coordinator: Coordinator, until: asyncio.Event) -> None:
    """Stand by and lead in turn until the event is set.

    Raises ConfigError when the address cannot be bound, LedgerError when the ledger is damaged or
    of another run.
    """
    config, heard = coordinator.config, False
    while not until.is_set():
        waiting = _Waiting(config, coordinator.admission)
        async with waiting.served() as address:
            # From now on the port is known, if it was left to the system.
            section = config.service.model_copy(update={"address": address})
            config = config.model_copy(update={"service": section})
            if not heard:
                coordinator.tell("listening", address, "standing by until nobody leads")
            heard = True
            take_over = partial(coordinator.take_over, config, reached_at(coordinator, address))
            sequencer = await _turn(take_over, waiting, until, coordinator.monitor)
        if sequencer is not None:
            await _lead(sequencer, coordinator, until)


def reached_at(coordinator: Coordinator, bound: str) -> str:
    """Return the HOST:PORT at which others reach a coordinator that is bound to one."""
    host, port = transport.split(bound)
    this = socket.gethostname() if host in EVERYWHERE else host
    return coordinator.advertised or transport.join(this, port)


class _Waiting:
    """What a coordinator that stands by answers, and passes on."""

    def __init__(self, config: RunConfig, admission: Admission | None) -> None:
        self._config, self._admission = config, admission
        self.reason, self.leader = "asking the database who leads", ""
        self._relay = Relay(connecting(admission))
        self._health = health.aio.HealthServicer()

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        """Serve; yield the address."""
        admits = None if self._admission is None else self._admission.access()
        server = gated(self._config, admits)
        status_service.add_StatusServiceServicer_to_server(_Status(self, self._config), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        server.add_generic_rpc_handlers((self._relay,))
        asked = self._config.service.address
        shown = None if self._admission is None else self._admission.server_credentials(ask=True)
        address = transport.join(transport.split(asked)[0], bind(server, asked, shown))
        await self.hear(self.reason, "")
        await server.start()
        watching = [] if admits is None else [asyncio.create_task(admits.watch())]
        try:
            yield address
        finally:
            for task in watching:
                task.cancel()
            await server.stop(0)
            await self.hear(self.reason, "")

    async def hear(self, reason: str, leader: str) -> None:
        """Pass calls on to this leader from now on; empty: to nobody, and say why."""
        self.reason, self.leader = reason, leader
        await self._relay.follow(leader, reason)
        answer = health_pb2.HealthCheckResponse
        await self._health.set(SERVED, answer.SERVING if leader else answer.NOT_SERVING)


class _Status(status_service.StatusServiceServicer):
    def __init__(self, waiting: _Waiting, config: RunConfig) -> None:
        self._waiting, self._config = waiting, config

    async def GetStatus(
        self, request: status.GetStatusRequest, context: Context
    ) -> status.GetStatusResponse:
        """See status.proto."""
        run = self._config.run
        return status.GetStatusResponse(
            name=run.name, phase=PHASE, reason=self._waiting.reason, rounds=run.rounds
        )


async def _turn(
    take_over: Callable[[], Sequencer],
    waiting: _Waiting,
    until: asyncio.Event,
    monitor: Monitor | None = None,
) -> Sequencer | None:
    """Return the run, taken over and rebuilt, when it is this coordinator's turn; None to stop."""
    while not until.is_set():
        try:
            # In a thread, so that the status is there: the ledger is read and checked as a whole.
            return await asyncio.to_thread(take_over)
        except (InUse, StoreUnavailable) as error:
            if str(error) != waiting.reason:
                log.info("standing by: %s", error)
            # Who leads may be reached by members while the database is not by this coordinator.
            leader = error.leader if isinstance(error, InUse) else waiting.leader
            await waiting.hear(str(error), leader)
        if monitor is not None:
            monitor.rest(waiting.reason)
        await _pause(until)
    return None


async def _lead(sequencer: Sequencer, coordinator: Coordinator, until: asyncio.Event) -> None:
    """Serve the run until the event is set or another coordinator took over."""
    store, over = sequencer.store, asyncio.Event()
    assert isinstance(store, PostgresStore)
    config = sequencer.config
    done = f"{sequencer.engine.committed} of {config.run.rounds} rounds committed"
    key = sequencer.key.public.hex() if sequencer.key else "nobody"
    text = f"epoch {store.epoch}, {done}, {len(store)} entries, signed by {key}"
    watch = asyncio.create_task(_watch(store, until, over))
    hub = Hub(sequencer, several=True)
    admission = coordinator.admission
    if admission is not None:  # members enrol here now, not where another led
        host, _ = transport.split(reached_at(coordinator, config.service.address))
        admission = replace(admission, host=host)
    if coordinator.monitor is not None:
        coordinator.monitor.lead(hub)
    try:
        await serve_hub(
            hub,
            on_ready=lambda at, _: coordinator.tell("leading", at, text),
            until=over,
            admission=admission,
            enrol_at=enrolment_address(config),
        )
    finally:
        over.set()
        if coordinator.monitor is not None:
            coordinator.monitor.rest("this coordinator leads no longer")
        await watch
        store.close()
    if not until.is_set():
        coordinator.tell(PHASE, config.service.address, "this coordinator leads no longer")


async def _watch(store: PostgresStore, until: asyncio.Event, over: asyncio.Event) -> None:
    """Set `over` when the event is set, or when the store no longer leads.

    Without an answer for as long as the lease another coordinator may lead, which the database
    would tell, but cannot: who holds on to its workers keeps them from the one that can write.
    """
    told, heard = "", time.monotonic()
    while not (until.is_set() or over.is_set()):
        await _pause(until)
        try:
            store.confirm()
            told, heard = "", time.monotonic()
        except TakenOver as error:
            log.warning("%s", error)
            break
        except StoreUnavailable as error:
            if str(error) != told:
                log.warning("%s", error)
            told = str(error)
            if time.monotonic() - heard > LEASE_S:
                log.warning("no answer from the database for %d s: standing by", LEASE_S)
                break
    over.set()


async def _pause(until: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(until.wait(), POLL_S)
    except TimeoutError:
        return
