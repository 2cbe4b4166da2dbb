"""A thousand random kill -9 of coordinator and workers: what is lost, and what is applied twice.

Claim: nothing. Runs of one coordinator (SQLite, signed, mutual TLS) and three workers with a tiny
model, as processes on this machine; processes are killed at random moments, one at a time and
several at once, and started again by the same commands until each run is over. What workers saw and
sent is compared with the ledger, and their weights with a replay's (tests/crashes.py).

    python -m benchmarks.crashes --json > benchmarks/results/crashes.json

About fifteen minutes.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from experiments.provenance import provenance
from tests import tiny
from tests.commands import MakeRoom, Nursery
from tests.crashes import Outcome, campaign

KILLS: Final = 1000
SEED: Final = 100


def measure(kills: int, seed: int) -> Outcome:
    """Kill so many processes in runs of a folder of their own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "data").mkdir()
        model, data = tiny.write_model(folder / "model"), tiny.write_data(folder / "data")
        nursery = Nursery(folder)
        try:
            return campaign(MakeRoom(folder, model, data, nursery), nursery, kills, seed)
        finally:
            nursery.close()


def main() -> None:
    """Measure and print; exit status 1 where something was lost, twice, forked or different."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=SEED, help="of the first run")
    given = parser.parse_args()
    began = time.monotonic()
    outcome = measure(given.kills, given.seed)
    seconds = round(time.monotonic() - began)
    result: dict[str, Any] = {"kills": outcome.kills.total(), "kills_by_kind": outcome.kills}
    result |= {name: value for name, value in vars(outcome).items() if name != "kills"}
    result["longest_standstill_s"] = round(outcome.longest_standstill_s, 2)
    result |= {"seconds": seconds, "load": [round(each, 1) for each in os.getloadavg()]}
    result |= provenance()
    if given.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            print(f"{name:24} {value}")
    outcome.assert_unharmed()


if __name__ == "__main__":
    main()
