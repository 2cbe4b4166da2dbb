"""What one coordinator bears: rounds, how long a commit takes, a crash, how many may be connected.

Targets: 3,000 worker-rounds a second and commits within 250 ms (p99) with 1,000 workers; 10 s from
a kill -9 of the coordinator to its next committed round; 5,000 connected in 0.7 GB. All over mutual
TLS, every entry durable before it is seen (SQLite, synchronous=FULL).

One coordinator process and one process of workers without models (simulated_workers), each with a
connection and a certificate of its own, share the machine, so that the workers take much of it. A
round is a contribution of eight int8 scalars, and starts when the last was committed. Workers
that answer at once show the most that it bears (`worker_rounds_per_s`). How long a commit takes,
from the last contribution that is sent to the commit's arrival at each worker, is measured there
(`…_at_most`: much of it is the workers' own queue), and with workers whose measurements take up to
MEASUREMENT_S each, so that rounds come at about the target's rate (`p99_commit_ms`).

    python -m benchmarks.coordinator --json > benchmarks/results/coordinator.json

About five minutes.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import grpc
from experiments.provenance import provenance
from tests.commands import free_port

from benchmarks.identity import IDENTITY, Coordinator, enrolled, served
from benchmarks.simulated_workers import Connect, Federation, options
from lorand.config import RunConfig
from lorand.credentials import Credentials

WORKERS: Final = 1000
CONNECTED: Final = 5000
MEASURED_S: Final = 20.0
MEASUREMENT_S: Final = 0.2
KILLS: Final = 7
LIMIT_S: Final = 600.0
RUN: Final = """
[run]
name = "many"
rounds = 1000000
[model]
name = "none"
[task]
labels = ["a", "b"]
[estimator]
kind = "spsa"
directions_per_round = 8
[optimizer]
learning_rate = 0.001
schedule = "constant"
[rounds]
quorum = {quorum}
telemetry = "none"
[service]
address = "{address}"
heartbeat_timeout_s = 600.0
max_workers = 6000
tail_entries = 10000
"""


def made(folder: Path, workers: int, quorum: int) -> tuple[RunConfig, dict[str, Credentials]]:
    """Write a run that these workers may join."""
    address = f"127.0.0.1:{free_port()}"
    (folder / "run.toml").write_text(RUN.format(quorum=quorum, address=address))
    (folder / "run.lock").write_text(IDENTITY.to_lock())
    names = [f"worker-{number}" for number in range(workers)]
    return RunConfig.parse((folder / "run.toml").read_text()), enrolled(folder, names)


def connecting(address: str, members: dict[str, Credentials]) -> Connect:
    """Return what opens a member's connection."""
    shown = {name: member.channel_credentials() for name, member in members.items()}
    return lambda name: grpc.aio.secure_channel(address, shown[name], options())


async def rounds(folder: Path, workers: int) -> dict[str, Any]:
    """Return what rounds as fast as they come make of it, and what kills do."""
    config, members = made(folder, workers, workers)
    coordinator = served(folder)
    federation = Federation(config, IDENTITY, connecting(config.service.address, members))
    try:
        federation.start(list(members))
        joined = await federation.until(lambda: federation.joined == workers, LIMIT_S)
        await federation.until(lambda: federation.seen.committed > 2, LIMIT_S)
        most = await _measured(coordinator, federation)
        federation.longest_measurement_s = MEASUREMENT_S
        paced = await _measured(coordinator, federation)
        result = {
            "workers": workers,
            "joined_s": joined,
            "worker_rounds_per_s": most.worker_rounds_per_s,
            "coordinator_us_a_worker_round": most.coordinator_us,
            "p50_commit_ms_at_most": most.milliseconds(0.5),
            "p99_commit_ms_at_most": most.milliseconds(0.99),
            "paced_worker_rounds_per_s": paced.worker_rounds_per_s,
            "p50_commit_ms": paced.milliseconds(0.5),
            "p99_commit_ms": paced.milliseconds(0.99),
            "rss_mb_of_rounds": coordinator.memory_kb() / 1024,
        }
        kills = []
        for _ in range(KILLS):
            coordinator, took = await _killed(folder, coordinator, federation)
            kills.append(took)
        return result | {"recovery_s": statistics.median(kills), "recoveries_s": kills}
    finally:
        await federation.stop()
        coordinator.process.kill()
        coordinator.process.wait()


@dataclass(frozen=True)
class _Measured:
    """Rounds of a while; `latencies` are sorted seconds, one a worker and round."""

    worker_rounds_per_s: float
    coordinator_us: float
    latencies: list[float]

    def milliseconds(self, quantile: float) -> float:
        return 1e3 * self.latencies[int(quantile * len(self.latencies))]


async def _measured(coordinator: Coordinator, federation: Federation) -> _Measured:
    seen, workers = federation.seen, len(federation)
    first, began, used = seen.committed, time.monotonic(), coordinator.seconds()
    await asyncio.sleep(MEASURED_S)
    done, lasted = seen.committed - first, time.monotonic() - began
    return _Measured(
        done * workers / lasted,
        (coordinator.seconds() - used) / done / workers * 1e6,
        sorted(seen.latencies(max(seen.commits) - done + 2)),
    )


async def _killed(
    folder: Path, coordinator: Coordinator, federation: Federation
) -> tuple[Coordinator, float]:
    """Kill and start the coordinator; return it with the seconds to the next round's commit."""
    coordinator.process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    coordinator.process.wait()
    last = max(federation.seen.commits)
    again = await asyncio.to_thread(served, folder)
    await federation.until(lambda: max(federation.seen.commits) > last, LIMIT_S)
    took = time.monotonic() - began
    await federation.until(lambda: federation.joined == len(federation), LIMIT_S)
    return again, took


async def connected(folder: Path, workers: int) -> dict[str, Any]:
    """Return the memory that so many connected workers take; no round begins."""
    config, members = made(folder, workers, workers + 1)
    coordinator = served(folder)
    federation = Federation(config, IDENTITY, connecting(config.service.address, members))
    try:
        before = coordinator.memory_kb()
        names = list(members)
        for start in range(0, workers, 500):
            federation.start(names[start : start + 500])
            await federation.until(lambda: federation.joined == len(federation), LIMIT_S)
        after = coordinator.memory_kb()
        return {
            "connected_workers": federation.joined,
            "rss_mb": after / 1024,
            "kb_a_worker": (after - before) / workers,
        }
    finally:
        await federation.stop()
        coordinator.process.kill()
        coordinator.process.wait()


Part = Callable[[Path, int], Coroutine[Any, Any, dict[str, Any]]]


def _apart(part: Part, workers: int) -> dict[str, Any]:
    """Run a part in a process of its own: gRPC may not return from a second event loop in one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, part, workers).result()


def _run(part: Part, workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(part(Path(folder), workers))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--connected", type=int, default=CONNECTED)
    given = parser.parse_args()
    result = _apart(rounds, given.workers) | _apart(connected, given.connected)
    result = {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}
    result |= {"load": [round(each, 1) for each in os.getloadavg()], **provenance()}
    result["cryptography"] = version("cryptography")
    if given.json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result.items():
        print(f"{name:32} {value}")


if __name__ == "__main__":
    main()
