"""A coordinator with members in this process: real gRPC over TLS on loopback."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from tests.runs import IDENTITY, config_of

from lorand import credentials
from lorand.config import RunConfig
from lorand.credentials import Credentials, Role, Subject
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import coordination_pb2_grpc as coordination
from lorand_coordinator import service, standby
from lorand_coordinator.hub import Hub
from lorand_coordinator.identity.admission import Admission
from lorand_coordinator.identity.authority import Authority
from lorand_coordinator.identity.members import Peer
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import SqliteStore

LIMIT_S: Final = 20.0
RUN: Final = "small"
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Office:
    """A served run; `admission` is `served` opened a second time, as another process would."""

    address: str
    enrolment: str
    served: Admission
    admission: Admission
    hub: Hub
    loop: asyncio.AbstractEventLoop

    @property
    def authority(self) -> Authority:
        """The run's."""
        return self.admission.authority

    def member(self, folder: Path, name: str, role: Role = Role.WORKER) -> Credentials:
        """Make a member without the network."""
        made = certified(folder / f"{name}.pem", self.authority, Subject(RUN, role, name))
        self.admission.members.admit(Peer.of(made.certificate))
        return made


def certified(
    path: Path,
    authority: Authority,
    subject: Subject,
    key: ec.EllipticCurvePrivateKey | None = None,
) -> Credentials:
    """Return credentials that an authority made and no coordinator knows of."""
    key = key or credentials.new_key()
    certificate = authority.issue(subject, key.public_key())
    return Credentials.write(path, key, certificate, authority.certificate)


@contextmanager
def opened(folder: Path, config: RunConfig | None = None) -> Iterator[Office]:
    """Serve a run of IDENTITY in a thread, as `lr-coordinator serve` does."""
    config = config or config_of(
        service={"address": "127.0.0.1:0", "drain_s": 0.1, "statements_every": 3}
    )
    admission = Admission.create_or_open(folder, config.run.name)
    admission.certify(config.service.address, [])
    store = SqliteStore(":memory:")
    hub = Hub(Sequencer(config, store, IDENTITY))
    ready: list[tuple[str, str]] = []
    served = threading.Event()
    loop, until = asyncio.new_event_loop(), asyncio.Event()

    def on_ready(address: str, enrolment: str) -> None:
        ready.append((address, enrolment))
        served.set()

    def run() -> None:
        task = service.serve(
            hub, on_ready=on_ready, until=until, admission=admission, enrol_at="127.0.0.1:0"
        )
        try:
            loop.run_until_complete(task)
        finally:
            served.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert served.wait(LIMIT_S)
        assert ready, "the coordinator ended"
        elsewhere = Admission.open(folder, config.run.name)
        yield Office(*ready[0], admission, elsewhere, hub, loop)
        elsewhere.close()
    finally:
        loop.call_soon_threadsafe(until.set)
        thread.join(LIMIT_S)
        loop.close()
        admission.close()
        store.close()


@contextmanager
def standing_by(
    office: Office, admission: Admission | None = None, leader: str = ""
) -> Iterator[str]:
    """Pass calls on to an office's coordinator, or another's, as one that stands by does.

    Yields the address.

    With its identity folder, opened once more, or with another `admission`, closed at the end.

    On the same event loop: those of gRPC get into each other's way.
    """
    config = office.hub.config
    admission = admission or Admission.open(office.admission.folder, config.run.name)
    waiting, stack = standby._Waiting(config, admission), AsyncExitStack()

    async def serve() -> str:
        address = await stack.enter_async_context(waiting.served())
        await waiting.hear("another leads", leader or office.address)
        return address

    def do(work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, office.loop).result(LIMIT_S)

    yield do(serve())
    do(stack.aclose())
    admission.close()


def get_run(channel: grpc.Channel) -> wire.GetRunResponse:
    """Make the simplest call that every member may make."""
    stub = coordination.CoordinationServiceStub(channel)
    answer: wire.GetRunResponse = stub.GetRun(wire.GetRunRequest(), timeout=LIMIT_S)
    return answer
