"""The command: measures the parts, keeps each with its origin, writes tables and plots."""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, Final

import numba
import torch

from experiments.cells import RESULTS
from experiments.privacy_audit import (
    __doc__ as ABOUT,
)
from experiments.privacy_audit import (
    guesses,
    measurement,
    mechanisms,
    membership,
    recovery,
    report,
    tokens,
)
from experiments.provenance import provenance

PARTS: Final[dict[str, Callable[[int], dict[str, Any]]]] = {
    "A1": recovery.run,
    "A2": tokens.run,
    "A3": guesses.run,
    "A4": membership.run,
    "A5": mechanisms.run,
    "R": measurement.run,
}
PATH: Final = RESULTS / "privacy_audit.json"


def read() -> dict[str, Any]:
    """Return the results so far, by part."""
    if not PATH.exists():
        return {}
    found: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))["parts"]
    return found


def write(parts: dict[str, Any]) -> None:
    """Write the results, one row a line, and what is made of them."""
    about = str(ABOUT).split("\n\n    python", maxsplit=1)[0]
    text = json.dumps({"experiment": "privacy_audit", "about": about, "parts": parts}, indent=1)
    PATH.write_text(report.compact(text) + "\n", encoding="utf-8")
    if set(parts) == set(PARTS):
        PATH.with_suffix(".md").write_text(report.page(about, parts), encoding="utf-8")
        report.plot(PATH, parts)


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=ABOUT)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3, help="of what is drawn, from 0 on")
    parser.add_argument("--write", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    for name in () if options.write else options.only:
        started, started_cpu = time.monotonic(), time.process_time()
        result = PARTS[name](options.seeds)
        spent = {
            "wall_s": round(time.monotonic() - started),
            "cpu_s": round(time.process_time() - started_cpu),
        }
        print(f"{name}: {spent['wall_s']} s", flush=True)
        part = {"seeds": options.seeds, **spent, "provenance": provenance(), **result}
        parts = read() | {name: part}
        write({key: parts[key] for key in PARTS if key in parts})
    if options.write:
        write(read())


if __name__ == "__main__":
    main()
