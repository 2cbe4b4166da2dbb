"""What members' certificates cost the coordinator: opening streams, messages on them, memory.

Claim: a thousand streams of members stay cheap. A certificate is verified and looked up once a
call; a message on an open stream costs TLS's record and the step through one more generator.

One coordinator process and one client process with so many connections, each of a worker of its
own that has joined before; with mutual TLS, and with --insecure for comparison. `open_ms` is the
coordinator's processor time for a connection and its stream to Welcome, `beat_us` that for a
heartbeat and its answer, `memory_kb` its growth a stream. No round begins: workers are one too few.

    python -m benchmarks.identity --json > benchmarks/results/identity.json

About half a minute.
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import grpc
from experiments.provenance import provenance

from lorand import credentials, ledger
from lorand.config import PROTOCOL_VERSION, RunConfig
from lorand.credentials import Credentials, Role, Subject
from lorand.manifest import Identity, Manifest, TensorSpec
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import coordination_pb2_grpc as coordination
from lorand_coordinator.identity.admission import Admission
from lorand_coordinator.identity.members import Peer
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import SqliteStore

STREAMS: Final = 1000
WAYS: Final = ("insecure", "mutual_tls")
BEATS: Final = 20
OPENING: Final = 50
"""Connections that are being opened at a time."""
LIMIT_S: Final = 120.0
NAME: Final = "many"
IDENTITY: Final = Identity(bytes(32), bytes(32), Manifest((TensorSpec("w", (2, 3), "float32"),)))
SERVE: Final = "from lorand_coordinator.cli import main; main()"
TICKS: Final = os.sysconf("SC_CLK_TCK")
RUN: Final = """
[run]
name = "many"
rounds = 10
[model]
name = "none"
[task]
labels = ["a", "b"]
[estimator]
kind = "spsa"
[optimizer]
learning_rate = 0.01
[rounds]
quorum = {quorum}
[service]
address = "127.0.0.1:0"
heartbeat_timeout_s = 600.0
max_workers = {quorum}
"""


@dataclass
class Coordinator:
    """A process that serves, and what it used so far."""

    process: subprocess.Popen[str]
    address: str

    def seconds(self) -> float:
        """Return its processor time."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory_kb(self) -> int:
        """Return its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])


def hello(config: RunConfig, name: str, session: int) -> wire.Hello:
    """Return the Hello of a worker that has applied nothing yet."""
    return wire.Hello(
        protocol_version=PROTOCOL_VERSION,
        name=name,
        run_digest=ledger.origin(config, IDENTITY).run_digest,
        base_digest=IDENTITY.base_digest,
        tokenizer_digest=IDENTITY.tokenizer_digest,
        manifest_digest=IDENTITY.manifest.digest(),
        session=session,
    )


def prepare(folder: Path, names: list[str]) -> tuple[RunConfig, dict[str, Credentials], int, bytes]:
    """Write a run that all workers have joined; return where its ledger ends, too."""
    (folder / "run.toml").write_text(RUN.format(quorum=len(names) + 1))
    (folder / "run.lock").write_text(IDENTITY.to_lock())
    config = RunConfig.parse((folder / "run.toml").read_text())
    store = SqliteStore(folder / f"{NAME}.ledger")
    sequencer = Sequencer(config, store, IDENTITY)
    for name in names:
        sequencer.admit(hello(config, name, 0))
    entries, head = len(store), store.head()
    store.close()
    return config, enrolled(folder, names), entries, head


def enrolled(folder: Path, names: list[str]) -> dict[str, Credentials]:
    """Make members of the run in a folder, without invitations."""
    admission = Admission.create_or_open(folder / f"{NAME}.identity", NAME)
    made = {}
    for name in names:
        key = credentials.new_key()
        subject = Subject(NAME, Role.WORKER, name)
        certificate = admission.authority.issue(subject, key.public_key())
        admission.members.admit(Peer.of(certificate))
        path, authority = folder / name, admission.authority.certificate
        made[name] = Credentials(path, key, certificate, authority, subject)
    admission.close()
    return made


def served(folder: Path, *flags: str) -> Coordinator:
    """Start a coordinator of the run."""
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, "serve", str(folder / "run.toml"), "--json", *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said, f"the coordinator did not start: {(folder / 'log').read_text()[-2000:]}"
    return Coordinator(process, json.loads(said)["address"])


class Worker:
    """A connection with an open stream."""

    def __init__(self, address: str, shown: Credentials | None) -> None:
        """Open a connection of its own."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        self.channel = (
            grpc.aio.insecure_channel(address, options)
            if shown is None
            else grpc.aio.secure_channel(address, shown.channel_credentials(), options)
        )
        self._requests: asyncio.Queue[wire.ParticipateRequest] = asyncio.Queue()

    async def join(self, greeting: wire.Hello) -> None:
        """Say Hello and be welcomed."""

        async def requests() -> AsyncIterator[wire.ParticipateRequest]:
            while True:
                yield await self._requests.get()

        await self._requests.put(wire.ParticipateRequest(hello=greeting))
        self._call = coordination.CoordinationServiceStub(self.channel).Participate(requests())
        first: Any = await asyncio.wait_for(self._call.read(), LIMIT_S)
        assert first.HasField("welcome"), first

    async def beat(self) -> None:
        """Send a heartbeat and await its answer."""
        await self._requests.put(wire.ParticipateRequest(heartbeat=wire.Heartbeat()))
        answer: Any = await asyncio.wait_for(self._call.read(), LIMIT_S)
        assert answer.HasField("heartbeat"), answer


async def measure(
    coordinator: Coordinator,
    greetings: dict[str, wire.Hello],
    shown: dict[str, Credentials],
    workers: list[Worker],
) -> dict[str, float]:
    """Open a stream a worker, send heartbeats on all; return the coordinator's costs."""
    used, held = coordinator.seconds(), coordinator.memory_kb()
    gate = asyncio.Semaphore(OPENING)

    async def opened(name: str, greeting: wire.Hello) -> None:
        async with gate:
            worker = Worker(coordinator.address, shown.get(name))
            await worker.join(greeting)
            workers.append(worker)

    await asyncio.gather(*(opened(*pair) for pair in greetings.items()))
    joined, count = coordinator.seconds(), len(workers)
    memory = coordinator.memory_kb()
    for _ in range(BEATS):
        await asyncio.gather(*(worker.beat() for worker in workers))
    beaten = coordinator.seconds()
    return {
        "open_ms": round(1e3 * (joined - used) / count, 2),
        "beat_us": round(1e6 * (beaten - joined) / (count * BEATS), 1),
        "memory_kb": round((memory - held) / count, 1),
    }


def run(way: str, streams: int, workers: list[Worker]) -> dict[str, float]:
    """Measure one way; the workers' channels are the caller's to keep until its process ends."""
    names = [f"worker-{number:04}" for number in range(streams)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config, made, entries, head = prepare(folder, names)
        greetings = {name: hello(config, name, 1) for name in names}
        for greeting in greetings.values():
            greeting.next_sequence, greeting.head = entries, head
        insecure = way == "insecure"
        coordinator = served(folder, *(("--insecure",) if insecure else ()))
        try:
            # No asyncio.run: it would take many minutes to end a thousand calls in turn.
            loop = asyncio.new_event_loop()
            return loop.run_until_complete(
                measure(coordinator, greetings, {} if insecure else made, workers)
            )
        finally:
            coordinator.process.kill()
            coordinator.process.wait(LIMIT_S)


def apart(way: str, streams: int) -> dict[str, float]:
    """Measure one way in a process of its own, which leaves a thousand channels to its end."""
    command = [sys.executable, "-m", "benchmarks.identity", "--way", way, "--streams", str(streams)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one object on one line")
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--way", choices=WAYS, help="measure one way alone")
    options = parser.parse_args()
    if options.way:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        workers: list[Worker] = []
        print(json.dumps(run(options.way, options.streams, workers)), flush=True)
        os._exit(0)
    load = os.getloadavg()[0]
    result: dict[str, Any] = {
        "streams": options.streams,
        "beats": BEATS,
        "coordinator": {way: apart(way, options.streams) for way in WAYS},
        "load_average_at_start": round(load, 1),
        "provenance": provenance() | {"cryptography": version("cryptography")},
    }
    print(json.dumps(result, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
