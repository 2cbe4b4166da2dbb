"""What a ledger in PostgreSQL costs, and how long a run stands still when its leader is lost.

Appends: entries of first-order rounds (8 KB of codes and four contributions as large), one at a
time, each durable, into SQLite and into PostgreSQL on the same disk. Failover: three coordinators
and three workers as processes on this machine, the leader killed; counted from the kill until a
round's entry stands in the ledger under another leader. The server is a private one with `fsync`
on. Command: python -m benchmarks.failover
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import closing
from functools import partial
from pathlib import Path

from experiments.provenance import provenance
from tests import tiny
from tests.commands import Nursery, Room, wait_for
from tests.end_to_end.test_standby import Several, settings
from tests.postgres import Server, programs, serving

from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.store import SqliteStore, Store

RESULTS = Path(__file__).parent / "results" / "failover.json"
APPENDS = 300
CODES = bytes(range(256)) * 32
WORKERS = 4
KILLS = 10
ROUNDS_BETWEEN = 5


def appends(store: Store) -> dict[str, float]:
    """Return median and 99th percentile of an append, in milliseconds."""
    times = []
    for number in range(APPENDS):
        entry = pb.Entry(round_index=number, commit=pb.Commit(codes=CODES))
        began = time.perf_counter()
        store.append(entry, [CODES] * WORKERS)
        times.append(1000 * (time.perf_counter() - began))
    times.sort()
    return {
        "median_ms": round(statistics.median(times), 2),
        "p99_ms": round(times[int(0.99 * len(times))], 2),
    }


def failovers(server: Server, folder: Path) -> list[float]:
    """Return how long each loss of a leader held the run up, in seconds."""
    (folder / "data").mkdir()
    model, data = tiny.write_model(folder / "model"), tiny.write_data(folder / "data")
    nursery = Nursery(folder)
    room = Room(folder / "run", settings(100_000), model, data, nursery).lock()
    several = Several(room, nursery, server)
    waits = []
    try:
        for _ in range(KILLS):
            wait_for(partial(several.reached, several.look() + ROUNDS_BETWEEN), "the run goes on")
            leader, epoch = several.leaders[-1], several.epochs()[-1]
            began = time.monotonic()
            several.coordinators[leader].kill()
            wait_for(lambda e=epoch: several.epochs()[-1] > e, "another leads")  # type: ignore[misc]
            waits.append(round(time.monotonic() - began, 2))
            several.kill(leader)  # it is dead: start it again
    finally:
        several.close()
        nursery.close()
    return waits


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="also print the results")
    arguments = parser.parse_args()
    binaries = programs()
    if binaries is None:
        raise SystemExit("PostgreSQL's programs are not installed: no initdb on PATH")
    with tempfile.TemporaryDirectory() as name, serving(binaries, "fsync = on\n") as server:
        folder = Path(name)
        with closing(SqliteStore(folder / "run.ledger")) as store:
            sqlite = appends(store)
        with closing(server.store("appends")) as store:
            postgres = appends(store)
        waits = failovers(server, folder)
        version = str(server.execute("SHOW server_version")[0][0])
    content = {
        "provenance": {**provenance(), "postgresql": version, "load": os.getloadavg()},
        "appends": {"entries": APPENDS, "sqlite": sqlite, "postgresql": postgres},
        "failover_s": {"median": statistics.median(waits), "largest": max(waits), "all": waits},
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(content))


if __name__ == "__main__":
    main()
