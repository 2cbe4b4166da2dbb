"""Question: how long is a round, and how many bytes, with 1 to 1,000 workers and with a million?

Workers without models (benchmarks/simulated_workers.py), each with a connection and a certificate
of its own, answer at once over real gRPC and mutual TLS to one coordinator process on the same
machine; every round is durable before it is seen. `ms a round` is the time between commits, much of
it the workers' own; the coordinator's processor time a worker and round is beside it. Bytes are
what the kernel counted on the coordinator's sockets, TLS and HTTP/2 included. A million workers are
calculated (experiments/tree.py): nobody ran them.

    python -m experiments.scale          # about three minutes; wants a machine with nothing else
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.coordinator import connecting, made
from benchmarks.identity import IDENTITY, served
from benchmarks.simulated_workers import Federation

from experiments.provenance import provenance
from experiments.wire_bytes import Row, counted, run_file
from lorand import wire_size
from lorand.config import RunConfig

RESULTS: Final = Path(__file__).resolve().parent / "results"
WORKERS: Final = (1, 10, 100, 1000)
MEASURED_S: Final = 5.0
ROUNDS: Final = 20
"""At least so many are measured."""
FIRST: Final = 3
LIMIT_S: Final = 300.0
KINDS: Final = (
    ("zeroth order, 8 scalars, int8", 8, "int8", "spsa"),
    ("first order, K = 4,096, int8", 4096, "int8", "backprop"),
)


async def _measure(row: Row, folder: Path) -> dict[str, Any]:
    _, members = made(folder, row.workers, row.workers)
    path = folder / "run.toml"
    path.write_text(run_file(row, path.read_text()))
    config = RunConfig.parse(path.read_text())
    port = config.service.address.split(":")[1]
    coordinator = served(folder)
    federation = Federation(config, IDENTITY, connecting(config.service.address, members))
    try:
        federation.start(list(members))
        await federation.until(lambda: federation.joined == row.workers, LIMIT_S)
        await federation.until(lambda: federation.seen.committed > FIRST, LIMIT_S)
        before, counted = await _commit(federation), _socket_bytes(port)
        began, used = time.monotonic(), coordinator.seconds()
        await asyncio.sleep(MEASURED_S)
        await federation.until(lambda: federation.seen.committed >= before + ROUNDS, LIMIT_S)
        rounds, lasted = await _commit(federation) - before, time.monotonic() - began
        used, after = coordinator.seconds() - used, _socket_bytes(port)
    finally:
        await federation.stop()
        coordinator.process.kill()
        coordinator.process.wait()
    each = rounds * row.workers
    size = wire_size.of_round(config, row.workers, committed=before + rounds // 2)
    return {
        **asdict(row),
        "rounds": rounds,
        "ms_a_round": round(1e3 * lasted / rounds, 2),
        "worker_rounds_per_s": round(each / lasted),
        "coordinator_us_a_worker_round": round(1e6 * used / each, 1),
        "bytes_up": round((after[0] - counted[0]) / each, 1),
        "bytes_down": round((after[1] - counted[1]) / each, 1),
        "predicted_up": size.up.socket,
        "predicted_down": size.down.socket,
    }


async def _commit(federation: Federation) -> int:
    """Return the rounds committed as soon as one more is, so that both ends see the same."""
    now = federation.seen.committed
    await federation.until(lambda: federation.seen.committed > now, LIMIT_S)
    return federation.seen.committed


def _socket_bytes(port: str) -> tuple[int, int]:
    """Return what the coordinator's open connections received and had acknowledged so far."""
    shown = counted(port)
    received, sent = (
        sum(int(count) for count in re.findall(rf"\bbytes_{way}:(\d+)", shown))
        for way in ("received", "acked")
    )
    return received, sent


def measure(row: Row) -> dict[str, Any]:
    """Return what a round takes; in this process, of which gRPC wants one a measurement."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_measure(row, Path(folder)))


def main() -> None:
    """Measure all rows, and write experiments/results/scale.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    parser.add_argument("--print", action="store_true", help="write no file")
    given = parser.parse_args()
    load, rows = [round(each, 1) for each in os.getloadavg()], []
    for name, directions, codec, kind in KINDS:
        for workers in given.workers:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                row = Row(name, workers, directions, codec, kind)
                rows.append(pool.submit(measure, row).result())
            print(rows[-1], flush=True)
    content = {"question": __doc__.split("\n\n")[0], "rows": rows, "load": load, **provenance()}
    if not given.print:
        (RESULTS / "scale.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
