"""What a hop costs: workers at the leader itself, and through a coordinator that stands by.

Claim: a coordinator that passes calls on takes connections and handshakes off the leader, and
lengthens a round by little. Two coordinators on one PostgreSQL server (fsync on) and one process of
workers without models (simulated_workers), each with a connection and a certificate of its own,
share this machine. All workers are at the leader, or all at the other, in turn, PAIRS times, so
that what else the machine does comes to both; every figure is the median of the pairs.

`connect_ms` is a coordinator's processor time for a worker that joins. Rounds then come at a pace
that leaves the processors time: each worker's measurement takes up to MEASUREMENT_S.
`worker_round_us` is a coordinator's processor time for one worker's part in a round, and
`p50_commit_ms` the time from the last contribution of a round to its commit's arrival at a worker.

    python -m benchmarks.relay > benchmarks/results/relay.json

About ten minutes.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from experiments.provenance import provenance
from tests.commands import free_port
from tests.postgres import programs, serving

from benchmarks.coordinator import LIMIT_S, connecting, made
from benchmarks.identity import IDENTITY, Coordinator, served
from benchmarks.simulated_workers import Federation

WORKERS: Final = 300
PAIRS: Final = 7
MEASURED_S: Final = 20.0
MEASUREMENT_S: Final = 0.5
WAYS: Final = ("direct", "passed_on")


def started(folder: Path, database: str) -> tuple[Coordinator, Coordinator]:
    """Start a leader at the run file's address, and one that stands by."""
    leader = served(folder, "--ledger", database)
    assert leader.process.stdout is not None
    while json.loads(leader.process.stdout.readline())["event"] != "leading":
        pass
    return leader, served(folder, "--ledger", database, "--address", f"127.0.0.1:{free_port()}")


async def measure(folder: Path, workers: int, way: str, database: str) -> dict[str, float]:
    """Return what both coordinators used, and how long commits took."""
    config, members = made(folder, workers, workers)
    coordinators = started(folder, database)
    leader, other = coordinators
    at = leader if way == "direct" else other
    federation = Federation(config, IDENTITY, connecting(at.address, members))
    federation.longest_measurement_s = MEASUREMENT_S
    try:
        before = [each.seconds() for each in coordinators]
        federation.start(list(members))
        await federation.until(lambda: federation.joined == workers, LIMIT_S)
        joined = [each.seconds() for each in coordinators]
        await federation.until(lambda: federation.seen.committed > 5, LIMIT_S)
        seen = federation.seen
        first, began = seen.committed, time.monotonic()
        used = [each.seconds() for each in coordinators]
        await asyncio.sleep(MEASURED_S)
        rounds, lasted = seen.committed - first, time.monotonic() - began
        after = [each.seconds() for each in coordinators]
        latencies = sorted(seen.latencies(max(seen.commits) - rounds + 2))
    finally:
        await federation.stop()
        for each in coordinators:
            each.process.kill()
            each.process.wait()
    found = {
        "worker_rounds_per_s": rounds * workers / lasted,
        "p50_commit_ms": 1e3 * latencies[len(latencies) // 2],
        "p99_commit_ms": 1e3 * latencies[int(0.99 * len(latencies))],
    }
    for name, *moments in zip(("leader", "other"), before, joined, used, after, strict=True):
        found[f"{name}_connect_ms"] = 1e3 * (moments[1] - moments[0]) / workers
        found[f"{name}_worker_round_us"] = 1e6 * (moments[3] - moments[2]) / rounds / workers
    return found


def _run(workers: int, way: str, database: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(measure(Path(folder), workers, way, database))


def apart(workers: int, way: str, database: str) -> dict[str, float]:
    """Measure in a process of its own: gRPC may not return from a second event loop in one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, workers, way, database).result()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    given = parser.parse_args()
    binaries = programs()
    if binaries is None:
        raise SystemExit("PostgreSQL's programs are not installed: no initdb on PATH")
    load = os.getloadavg()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with serving(binaries, "fsync = on\n") as server:
        for _ in range(given.pairs):
            for way in WAYS:
                found[way].append(apart(given.workers, way, server.url))
                server.execute("DROP SCHEMA lorand CASCADE")
        postgresql = str(server.execute("SHOW server_version")[0][0])
    result: dict[str, Any] = {"workers": given.workers, "pairs": given.pairs}
    for way, each in found.items():
        result[way] = {name: round(statistics.median(e[name] for e in each), 3) for name in each[0]}
    result["leader_worker_round_ratio"] = round(
        statistics.median(
            there["leader_worker_round_us"] / here["leader_worker_round_us"]
            for here, there in zip(found["direct"], found["passed_on"], strict=True)
        ),
        3,
    )
    result["all"] = {
        w: [{k: round(v, 3) for k, v in e.items()} for e in r] for w, r in found.items()
    }
    result["load_at_start"] = [round(each, 1) for each in load]
    result["provenance"] = provenance() | {
        "cryptography": version("cryptography"),
        "postgresql": postgresql,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
