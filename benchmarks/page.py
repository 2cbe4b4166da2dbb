"""What the live page costs a coordinator with many workers, and how soon it shows a commit.

Claims: with 1,000 workers and rounds as fast as they come, the page shows a commit within a second,
and takes at most 5 % of the coordinator's processor time.

One coordinator process that serves the page, one process of workers without models
(simulated_workers, --insecure), and in every second phase one of viewers, who follow the events and
ask for the table of workers every two seconds as browsers do, while a scraper reads /metrics every
five. The cost is the coordinator's processor time a worker-round in a phase with viewers over that
in the phase beside it without, less one: the median of pairs. A second coordinator without --page
shows that a page nobody watches costs nothing to be seen. `shown_ms` is from a commit's arrival at
the first worker to a status with it at a viewer, by the machine's monotonic clock.

    python -m benchmarks.page --json > benchmarks/results/page.json

About four minutes.
"""

import argparse
import asyncio
import http.client
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import grpc
from experiments.provenance import provenance
from tests.commands import free_port

from benchmarks.coordinator import LIMIT_S, RUN
from benchmarks.identity import IDENTITY, served
from benchmarks.simulated_workers import Federation, options
from lorand.config import RunConfig

WORKERS: Final = 1000
VIEWERS: Final = 3
PHASE_S: Final = 8.0
PAIRS: Final = 8
TABLE_S: Final = 2.0
SCRAPE_S: Final = 5.0


class Viewers:
    """Threads that follow a page as browsers do; `shown` is when one saw so many commits first."""

    def __init__(self, port: int, count: int) -> None:
        """Start following."""
        self.shown: dict[int, float] = {}
        self.received = self.events = 0
        self._port, self._over = port, threading.Event()
        self._threads = [threading.Thread(target=self._follow) for _ in range(count)]
        table = "/workers.json?order=contributions&descending=1"
        asked = [(table, TABLE_S)] * count + [("/metrics", SCRAPE_S)]
        self._threads += [threading.Thread(target=self._ask, args=each) for each in asked]
        for thread in self._threads:
            thread.start()

    def stop(self) -> dict[str, Any]:
        """Stop following; return what was seen."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        return {"shown": self.shown, "received": self.received, "events": self.events}

    def _follow(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=LIMIT_S)
        connection.request("GET", "/events")
        answer, kind = connection.getresponse(), b""
        while not self._over.is_set() and (line := answer.readline()):
            self.received += len(line)
            if line.startswith(b"event: "):
                kind = line[7:].strip()
                self.events += 1
            elif kind == b"status" and line.startswith(b"data: "):
                self.shown.setdefault(json.loads(line[6:])["committed"], time.monotonic())
        connection.close()

    def _ask(self, path: str, every_s: float) -> None:
        while not self._over.wait(every_s):
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=LIMIT_S)
            connection.request("GET", path)
            connection.getresponse().read()
            connection.close()


async def rounds(folder: Path, workers: int, pairs: int, page: bool) -> dict[str, Any]:
    """Return the coordinator's processor time a worker-round in each phase, and what was seen."""
    address, port = f"127.0.0.1:{free_port()}", free_port()
    (folder / "run.toml").write_text(RUN.format(quorum=workers, address=address))
    (folder / "run.lock").write_text(IDENTITY.to_lock())
    config = RunConfig.parse((folder / "run.toml").read_text())
    flags = ("--page", f"127.0.0.1:{port}") if page else ()
    coordinator = served(folder, "--insecure", *flags)
    federation = Federation(
        config, IDENTITY, lambda _: grpc.aio.insecure_channel(address, options())
    )
    seen = federation.seen
    alone: list[float] = []
    watched: list[float] = []
    delays: list[float] = []
    sent = {"events": 0, "received": 0}

    async def phase() -> float:
        # Entries that workers saw: one a worker-round, and finer than rounds.
        first, used = seen.entries, coordinator.seconds()
        await asyncio.sleep(PHASE_S)
        return (coordinator.seconds() - used) / (seen.entries - first) * 1e6

    try:
        federation.start([f"worker-{number}" for number in range(workers)])
        await federation.until(lambda: federation.joined == workers, LIMIT_S)
        await federation.until(lambda: seen.committed > 2, LIMIT_S)
        for _ in range(pairs):
            alone.append(await phase())
            if page:
                viewers = viewing(port)
                watched.append(await phase())
                found = json.loads((await asyncio.to_thread(viewers.communicate))[0])
                arrived = {index: min(moments) for index, moments in seen.commits.items()}
                delays += delays_of(found["shown"], arrived)
                sent = {kind: sent[kind] + found[kind] for kind in sent}
    finally:
        coordinator.process.kill()
        coordinator.process.wait()
    return {"alone": alone, "watched": watched, "delays": delays, **sent}


def viewing(port: int) -> subprocess.Popen[bytes]:
    """Start viewers in a process of their own, which end with their input."""
    command = [sys.executable, "-m", "benchmarks.page", "--view", str(port)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def delays_of(shown: dict[str, float], arrived: dict[int, float]) -> list[float]:
    """Return the milliseconds until a viewer saw each commit: the first status with it or more.

    Rounds of this benchmark are never abandoned, so that a round's index is its number.
    """
    seen = sorted((int(committed), moment) for committed, moment in shown.items())
    first, last = seen[0][0], seen[-1][0]
    return [
        1e3 * (next(when for count, when in seen if count >= committed) - moment)
        for committed, moment in sorted(arrived.items())
        if first < committed <= last
    ]


def apart(workers: int, pairs: int, page: bool) -> dict[str, Any]:
    """Measure in a process of its own, which leaves a thousand channels to its end."""
    command = [sys.executable, "-m", "benchmarks.page", "--workers", str(workers)]
    command += ["--pairs", str(pairs), "--once", "page" if page else "none"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def measured(workers: int, pairs: int) -> dict[str, Any]:
    """Return the medians of phases."""
    without = apart(workers, max(1, pairs // 2), page=False)
    found = apart(workers, pairs, page=True)
    ratios = [
        with_it / alone for with_it, alone in zip(found["watched"], found["alone"], strict=True)
    ]
    seconds = pairs * PHASE_S * VIEWERS
    return {
        "workers": workers,
        "viewers": VIEWERS,
        "us_a_worker_round_without_page": statistics.median(without["alone"]),
        "us_a_worker_round_unwatched": statistics.median(found["alone"]),
        "us_a_worker_round_watched": statistics.median(found["watched"]),
        "page_share": statistics.median(ratios) - 1,
        "page_share_of_pairs": [round(ratio - 1, 3) for ratio in ratios],
        "shown_ms_median": statistics.median(found["delays"]),
        "shown_ms_most": max(found["delays"]),
        "commits_seen": len(found["delays"]),
        "events_a_second": found["events"] / seconds,
        "kb_a_second": found["received"] / seconds / 1e3,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--view", type=int, help="follow the page at this port until input ends")
    parser.add_argument("--once", choices=("page", "none"), help="measure one coordinator alone")
    given = parser.parse_args()
    if given.view:
        viewers = Viewers(given.view, VIEWERS)
        sys.stdin.read()
        print(json.dumps(viewers.stop()))
        return
    if given.once:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        with tempfile.TemporaryDirectory() as folder:
            # No asyncio.run: it would take long to end a thousand calls in turn.
            loop = asyncio.new_event_loop()
            asked = rounds(Path(folder), given.workers, given.pairs, given.once == "page")
            print(json.dumps(loop.run_until_complete(asked)), flush=True)
        os._exit(0)
    load = [round(each, 1) for each in os.getloadavg()]
    result = measured(given.workers, given.pairs)
    result = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}
    result |= {"load_at_start": load, **provenance(), "starlette": version("starlette")}
    if given.json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result.items():
        print(f"{name:32} {value}")


if __name__ == "__main__":
    main()
