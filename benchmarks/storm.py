"""A reconnect storm: all members of a run lose their connections at once, and come back.

Claim: within seconds, each as the member it was, nobody refused for good, and the coordinator needs
no more memory than before. The workers are simulated (simulated_workers): they speak the protocol
over mutual TLS and answer at once. A proxy between them and the coordinator resets all connections;
then the coordinator is killed and started again. All of it shares this machine.

`back_s` is from the reset, or from the kill, until all are back and a round was committed with them
all; `grown_mb` is how much more memory the coordinator has after the resets than before.

    python -m benchmarks.storm --json > benchmarks/results/storm.json

About half a minute.
"""

import argparse
import asyncio
import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from experiments.provenance import provenance
from tests.fault_proxy import FaultProxy
from tests.journal import rows_of

from benchmarks.coordinator import LIMIT_S, connecting, made
from benchmarks.identity import IDENTITY, NAME, Coordinator, served
from benchmarks.simulated_workers import Federation
from lorand import ledger, transport
from lorand.config import RunConfig
from lorand.credentials import Credentials

WORKERS: Final = 500
RESETS: Final = 3


class Storms:
    """A federation behind a proxy, all of whose connections are lost at once."""

    def __init__(self, folder: Path, federation: Federation, proxy: FaultProxy) -> None:
        """Start the coordinator."""
        self._folder, self._federation, self._proxy = folder, federation, proxy
        self.coordinator: Coordinator = served(folder)

    async def all_back(self, connections: int) -> None:
        """Wait until all have connected again, and a round was committed with them all."""
        federation, proxy = self._federation, self._proxy
        count = len(federation)
        await federation.until(lambda: proxy.connections >= connections + count, LIMIT_S)
        await federation.until(lambda: federation.joined == count, LIMIT_S)
        last = max(federation.seen.commits, default=0)
        await federation.until(lambda: max(federation.seen.commits, default=0) > last, LIMIT_S)

    async def reset(self) -> float:
        """Reset all connections; return the seconds until all are back."""
        began, connections = time.monotonic(), self._proxy.connections
        await asyncio.to_thread(self._proxy.reset)
        await self.all_back(connections)
        return round(time.monotonic() - began, 2)

    async def kill(self) -> float:
        """Kill the coordinator and start it again; return the seconds until all are back."""
        began, connections = time.monotonic(), self._proxy.connections
        self.coordinator.process.send_signal(signal.SIGKILL)
        self.coordinator.process.wait()
        self.coordinator = await asyncio.to_thread(served, self._folder)
        await self.all_back(connections)
        return round(time.monotonic() - began, 2)


async def storms(
    folder: Path, config: RunConfig, members: dict[str, Credentials], resets: int
) -> dict[str, Any]:
    """Return what so many resets and a kill came to."""
    with FaultProxy(transport.split(config.service.address)) as proxy:
        federation = Federation(config, IDENTITY, connecting(proxy.address, members))
        lived = Storms(folder, federation, proxy)
        try:
            federation.start(list(members))
            await lived.all_back(0)
            before = lived.coordinator.memory_kb()
            back = [await lived.reset() for _ in range(resets)]
            grown = lived.coordinator.memory_kb() - before
            return {
                "back_s": {"resets": back, "kill": await lived.kill()},
                "rss_mb": round(lived.coordinator.memory_kb() / 1024, 1),
                "grown_mb": round(grown / 1024, 1),
                "rounds": federation.seen.committed,
                "refused_for_good": len(federation.seen.refused),
            }
        finally:
            await federation.stop()
            lived.coordinator.process.kill()
            lived.coordinator.process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--resets", type=int, default=RESETS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config, members = made(folder, given.workers, given.workers)
        result = {"workers": given.workers}
        result |= asyncio.run(storms(folder, config, members, given.resets))
        entries = [ledger.parse(body) for body, _ in rows_of(folder / f"{NAME}.ledger")]
        result["members"] = sum(entry.HasField("member") for entry in entries)
        result["tracebacks"] = (folder / "log").read_text().count("Traceback")
    result |= {"load": [round(each, 1) for each in os.getloadavg()], **provenance()}
    print(json.dumps(result, indent=1 if given.json else None), flush=True)
    os._exit(0)  # else gRPC ends a thousand channels in turn


if __name__ == "__main__":
    main()
