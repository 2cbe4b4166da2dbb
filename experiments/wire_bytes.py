"""Claim: what crosses the socket in a round is predicted from a run's settings within 5 %.

Workers without models speak the protocol over real gRPC and mutual TLS, through a relay that counts
the bytes of both ways; the operating system counts segments (`ss`). The formula is
`lorand.wire_size`, evaluated for loopback's segment size; its figures for Ethernet's are beside it.

    python -m experiments.wire_bytes         # about two minutes
"""

import asyncio
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.coordinator import connecting, made
from benchmarks.identity import IDENTITY, served
from benchmarks.simulated_workers import Federation
from deploy.demo.relay import Relay

from experiments.provenance import provenance
from lorand import wire_size
from lorand.config import RunConfig

RESULTS: Final = Path(__file__).resolve().parent / "results"
ROUNDS: Final = 400
FIRST: Final = 20
LIMIT_S: Final = 120.0
WITHIN: Final = 0.05


@dataclass(frozen=True)
class Row:
    """A kind of run: what its participants report, and how many there are."""

    name: str
    workers: int
    directions: int
    codec: str
    kind: str = "spsa"


ROWS: Final = (
    Row("zeroth order, 8 scalars, int8", 3, 8, "int8"),
    Row("zeroth order, 8 scalars, int8", 50, 8, "int8"),
    Row("zeroth order, 1 bit", 3, 1, "sign"),
    Row("first order, K = 4,096, 1 bit", 3, 4096, "sign", "backprop"),
    Row("first order, K = 4,096, int8", 3, 4096, "int8", "backprop"),
    Row("first order, K = 65,536, int32", 3, 65536, "int32", "backprop"),
)


def run_file(row: Row, before: str) -> str:
    """Return a row's run file, from that of the coordinator's benchmark."""
    estimator = f'kind = "{row.kind}"'
    if row.kind == "spsa":
        estimator += f"\ndirections_per_round = {row.directions}"
    text = re.sub(r'kind = "spsa"\ndirections_per_round = 8', estimator, before)
    size = row.directions if row.kind == "backprop" else 4096
    sections = f'\n[directions]\npool_size = {size}\n[codec]\nup = "{row.codec}"\n'
    return text + sections + f'down = "{row.codec}"\n'


@dataclass(frozen=True)
class Counted:
    """What passed since the workers joined."""

    committed: int
    sent: int
    received: int
    segments: int


async def measure(row: Row, folder: Path) -> dict[str, Any]:
    """Return measured and predicted bytes a participant and round."""
    _, members = made(folder, row.workers, row.workers)
    path = folder / "run.toml"
    path.write_text(run_file(row, path.read_text()))
    config = RunConfig.parse(path.read_text())
    coordinator = served(folder)
    host, port = config.service.address.split(":")
    relay = Relay((host, int(port)))
    await relay.start()
    connect = connecting(f"127.0.0.1:{relay.port}", members)
    federation = Federation(config, IDENTITY, connect)
    seen = federation.seen

    def counted() -> Counted:
        return Counted(seen.committed, relay.sent, relay.received, _segments(port))

    try:
        federation.start(list(members))
        await federation.until(lambda: seen.committed >= FIRST, LIMIT_S)
        before = counted()
        await federation.until(lambda: seen.committed >= FIRST + ROUNDS, LIMIT_S)
        after = counted()
    finally:
        await federation.stop()
        coordinator.process.kill()
        coordinator.process.wait()
        await relay.stop()
    return _result(row, config, before, after)


def _result(row: Row, config: RunConfig, before: Counted, after: Counted) -> dict[str, Any]:
    rounds = (after.committed - before.committed) * row.workers
    up, down = (after.sent - before.sent) / rounds, (after.received - before.received) / rounds
    size = wire_size.of_round(config, row.workers, committed=FIRST + ROUNDS // 2)
    return {
        **asdict(row),
        "rounds": after.committed - before.committed,
        "measured_up": round(up, 1),
        "predicted_up": size.up.socket,
        "error_up": round(size.up.socket / up - 1, 4),
        "measured_down": round(down, 1),
        "predicted_down": size.down.socket,
        "error_down": round(size.down.socket / down - 1, 4),
        "segments_a_round": round((after.segments - before.segments) / rounds, 2),
        "payload_up": size.up.payload,
        "payload_down": size.down.payload,
        "message_up": size.up.message,
        "message_down": size.down.message,
        "ethernet_up": size.up.wire,
        "ethernet_down": size.down.wire,
    }


def counted(port: str) -> str:
    """Return what the kernel has counted on the coordinator's open connections so far."""
    return subprocess.run(
        ["ss", "-tinH", "state", "established", f"( sport = :{port} )"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def _segments(port: str) -> int:
    """Return TCP segments that the coordinator's open connections sent and received so far."""
    return sum(int(count) for count in re.findall(r"\bsegs_(?:in|out):(\d+)", counted(port)))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the results as Markdown."""
    lines = [
        "| run | workers | way | payload | message | on the socket, measured | formula | error | "
        "with TCP and IPv4 on Ethernet |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for way in ("up", "down"):
            lines.append(
                f"| {row['name']} | {row['workers']} | {way} | {row[f'payload_{way}']:,} | "
                f"{row[f'message_{way}']:,} | {row[f'measured_{way}']:,.1f} | "
                f"{row[f'predicted_{way}']:,} | {row[f'error_{way}']:+.1%} | "
                f"{row[f'ethernet_{way}']:,} |"
            )
    return lines


def main() -> None:
    """Measure all rows, and write experiments/results/wire_bytes.json and .md."""
    rows = []
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(asyncio.run(measure(row, Path(folder))))
        print(rows[-1], flush=True)
    met = all(abs(row[f"error_{way}"]) <= WITHIN for row in rows for way in ("up", "down"))
    origins = provenance()
    content = {"claim": __doc__.split("\n\n")[0], "met": met, "rows": rows, **origins}
    (RESULTS / "wire_bytes.json").write_text(json.dumps(content, indent=1) + "\n")
    origin = "; ".join(f"{name} {value}" for name, value in origins.items())
    text = ["# wire_bytes", "", *__doc__.split("\n\n")[:2], "", *table(rows), ""]
    text += [f"Within 5 %: {'met' if met else 'missed'}. {origin}.", ""]
    (RESULTS / "wire_bytes.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
