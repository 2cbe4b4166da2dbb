"""Claim: a run on Banking77's head crosses a worker's socket in a thousandth of FedAvg's bytes.

What wire_bytes counts a round, here over a whole run: the TLS handshake, joining, and all rounds of
the row of grids/heterogeneous.toml with ten workers, who have no model and answer at once, through
the same relay. FedAvg's are its weights without framing, up and down (first_order: four rounds).

    python -m experiments.whole_run         # seconds
"""

import asyncio
import json
import re
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks.coordinator import connecting, made
from benchmarks.identity import IDENTITY, served
from benchmarks.simulated_workers import Federation
from deploy.demo.relay import Relay

from experiments import first_order, grid, skewed, wire_bytes
from experiments.cells import RESULTS
from experiments.provenance import provenance
from lorand import wire_size
from lorand.config import RunConfig

METHOD: Final = "LoRand, head alone, 1 bit"
GRID: Final = Path(__file__).resolve().parent / "grids" / f"{skewed.GRID}.toml"
FEWER: Final = 1000


def run_of() -> tuple[RunConfig, int]:
    """Return the run that is counted, and its workers."""
    read = grid.Grid.read(GRID)
    task = read.tasks[skewed.TARGET]
    return grid.config_of(task, read.methods[METHOD], 0.05), task.workers


async def measure(config: RunConfig, workers: int, folder: Path) -> tuple[float, float]:
    """Return the bytes that a worker sends and receives in all, in the mean of the workers."""
    _, members = made(folder, workers, workers)
    path = folder / "run.toml"
    size, code = config.directions.pool_size, config.codec.up
    assert code == config.codec.down
    row = wire_bytes.Row(METHOD, workers, size, code, config.estimator.kind)
    text = wire_bytes.run_file(row, path.read_text())
    path.write_text(re.sub(r"(?m)^rounds = \d+$", f"rounds = {config.run.rounds}", text))
    served_run = RunConfig.parse(path.read_text())
    assert served_run.run.rounds == config.run.rounds
    coordinator = served(folder)
    host, port = served_run.service.address.split(":")
    relay = Relay((host, int(port)))
    await relay.start()
    federation = Federation(served_run, IDENTITY, connecting(f"127.0.0.1:{relay.port}", members))
    try:
        federation.start(list(members))
        last = config.run.rounds
        await federation.until(lambda: federation.seen.committed >= last, wire_bytes.LIMIT_S)
        at_all = last * workers
        await federation.until(
            lambda: sum(map(len, federation.seen.commits.values())) >= at_all, wire_bytes.LIMIT_S
        )
        return relay.sent / workers, relay.received / workers
    finally:
        await federation.stop()
        coordinator.process.kill()
        coordinator.process.wait()
        await relay.stop()


def result() -> dict[str, Any]:
    """Return what was measured, the formula's bytes, and FedAvg's."""
    config, workers = run_of()
    with tempfile.TemporaryDirectory() as folder:
        up, down = asyncio.run(measure(config, workers, Path(folder)))
    size = wire_size.of_round(config, workers)
    rounds = config.run.rounds * (size.up.socket + size.down.socket)
    theirs = first_order.reported("banking77", "fedavg")[0][-1]
    weights = theirs.bytes_up + theirs.bytes_down
    return {
        "row": f"{skewed.TARGET}: {METHOD}",
        "rounds": config.run.rounds,
        "workers": workers,
        "measured_up": round(up),
        "measured_down": round(down),
        "measured": round(up + down),
        "rounds_by_formula": rounds,
        "handshake_and_joining": round(up + down) - rounds,
        "fedavg": weights,
        "times_fewer": round(weights / (up + down), 1),
        "met": FEWER * (up + down) <= weights,
    }


def main() -> None:
    """Measure, and write experiments/results/whole_run.json and .md."""
    found, origins = result(), provenance()
    content = {"claim": __doc__.split("\n\n")[0], **found, **origins}
    (RESULTS / "whole_run.json").write_text(json.dumps(content, indent=1) + "\n")
    text = ["# whole_run", "", *__doc__.split("\n\n")[:2], "", "| | bytes a worker |", "|---|---|"]
    for name, value in (
        (f"up, {found['rounds']} rounds", found["measured_up"]),
        ("down", found["measured_down"]),
        ("both", found["measured"]),
        ("of them rounds, by the formula", found["rounds_by_formula"]),
        ("and the rest: handshake, joining", found["handshake_and_joining"]),
        ("FedAvg of the last two layers", found["fedavg"]),
    ):
        text.append(f"| {name} | {value:,} |")
    met = "met" if found["met"] else "missed"
    origin = "; ".join(f"{name} {value}" for name, value in origins.items())
    text += ["", f"{found['times_fewer']:,.0f} times fewer: {met}. {origin}.", ""]
    (RESULTS / "whole_run.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
