"""Claim: who joins late reads at most 4 bytes a direction and 1 KB, after any number of rounds.

A first-order run of K = 4,096 directions, a byte each way, over real gRPC and mutual TLS, with
three workers without models. After so many rounds a newcomer asks for the run as `lr-worker join`
does (`Link.get_run`, `Link.catch_up`, the signed head); a relay counts what it receives. Of that,
handshakes and the run itself (settings, and the names of trainable tensors) are the same after any
number of rounds and are shown apart. A is the same size whatever the model's.

    python -m experiments.late_join          # about a minute
"""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks.coordinator import connecting, made
from benchmarks.identity import IDENTITY, served
from benchmarks.simulated_workers import Federation
from deploy.demo.relay import Relay

from experiments.provenance import provenance
from experiments.wire_bytes import Row, run_file
from lorand import ledger
from lorand.config import RunConfig
from lorand.credentials import Credentials
from lorand_worker.link import Link

RESULTS: Final = Path(__file__).resolve().parent / "results"
SIZE: Final = 4096
AFTER: Final = (10, 100, 1000, 5000)
WORKERS: Final = 3
LIMIT_S: Final = 300.0
TARGET: Final = 4 * SIZE + 1024


def newcomer(address: str, shown: Credentials) -> dict[str, int]:
    """Join as far as the history goes; return the bytes of messages that were read for it."""
    link = Link(address, give_up_s=30.0, shown=shown)
    try:
        config, identity = link.get_run()
        before = link.traffic.received
        assert identity is not None
        position = link.catch_up(ledger.origin(config, identity))
        link.get_head(position.next_sequence, 0)
        return {
            "committed": position.committed,
            "run": before,
            "history": link.traffic.received - before,
        }
    finally:
        link.close()


async def measure(folder: Path) -> list[dict[str, Any]]:
    """Return what newcomers read after so many rounds."""
    _, members = made(folder, WORKERS + 1, WORKERS)
    path = folder / "run.toml"
    row = Row("first order", WORKERS, SIZE, "int8", "backprop")
    path.write_text(run_file(row, path.read_text()))
    config = RunConfig.parse(path.read_text())
    coordinator = served(folder)
    host, port = config.service.address.split(":")
    relay = Relay((host, int(port)))
    await relay.start()
    late, *names = members
    rows = []
    try:
        for after in AFTER:
            federation = Federation(config, IDENTITY, connecting(config.service.address, members))
            federation.start(names)
            await _reached(federation, after)
            await federation.stop()  # so that no round is committed while the newcomer reads
            before = relay.received
            address = f"127.0.0.1:{relay.port}"
            row_of = await asyncio.to_thread(newcomer, address, members[late])
            rows.append({**row_of, "socket": relay.received - before})
            print(rows[-1], flush=True)
    finally:
        coordinator.process.kill()
        coordinator.process.wait()
        await relay.stop()
    return rows


async def _reached(federation: Federation, rounds: int) -> None:
    await federation.until(lambda: federation.seen.committed >= rounds, LIMIT_S)


def main() -> None:
    """Measure, and write experiments/results/late_join.json and .md."""
    with tempfile.TemporaryDirectory() as folder:
        rows = asyncio.run(measure(Path(folder)))
    met = all(row["history"] <= TARGET for row in rows)
    origins = provenance()
    content = {"claim": __doc__.split("\n\n")[0], "target": TARGET, "met": met, "rows": rows}
    (RESULTS / "late_join.json").write_text(json.dumps({**content, **origins}, indent=1) + "\n")
    lines = [
        "# late_join",
        "",
        *__doc__.split("\n\n")[:2],
        "",
        "| after rounds | history, bytes | settings and names | all on the socket, with TLS |",
        "|---|---|---|---|",
        *(
            f"| {r['committed']:,} | {r['history']:,} | {r['run']:,} | {r['socket']:,} |"
            for r in rows
        ),
        "",
        f"At most {TARGET:,}: {'met' if met else 'missed'}. "
        + "; ".join(f"{name} {value}" for name, value in origins.items())
        + ".",
    ]
    (RESULTS / "late_join.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
