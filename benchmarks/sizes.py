"""A pass over the weights of models of a million to a billion weights, and what its bytes take.

Claim: of a hundred million weights and more, all weights of any history are made in hardly more
time than reading and writing them takes.

Weights are float32 in tensors of 1,000 x 1,000; `limit` reads and writes every weight in place.
Rows of a size run in turn; a figure is the median of the turns, a ratio that of the turns' ratios.
Command: python -m benchmarks.sizes --json > benchmarks/results/sizes.json (a minute, 8 GB).
"""

import argparse
import json
import statistics
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from experiments.provenance import provenance

from benchmarks import shapes
from benchmarks.kernels import TURNS, Call, Ours, Weights, measure, ratio
from benchmarks.limit import touch

SIZES: Final = (10**6, 10**7, 10**8, 10**9)
POOL_SIZES: Final = (4096, 65536)
TENSOR: Final = (1000, 1000)


def model(size: int) -> shapes.Shapes:
    """Return tensors of so many weights, a multiple of a million."""
    return [TENSOR] * (size // shapes.count([TENSOR]))


def rows(of: shapes.Shapes) -> dict[str, Call]:
    """Return what is timed: the limit, a rebuild of any history, and a gradient's projection."""
    live = Weights(of, torch.float32)
    ours, rng = Ours(live, live), np.random.default_rng(0)
    found: dict[str, Call] = {"limit": partial(touch, live.memory)}
    for k in POOL_SIZES:
        found[f"rebuild_k{k}"] = partial(ours.materialise, rng.integers(-(10**6), 10**6, k))
        found[f"project_k{k}"] = partial(ours.project, k)
    return found


def one(size: int) -> dict[str, Any]:
    """Return milliseconds a pass and their ratio to the limit."""
    of = model(size)
    weights = shapes.count(of)
    times = measure(rows(of), weights)
    return {
        "weights": weights,
        "ms": {row: round(statistics.median(t) * weights / 1e6, 3) for row, t in times.items()},
        "vs_limit": {row: round(ratio(times, row, "limit"), 3) for row in times if row != "limit"},
    }


def main() -> None:
    """Measure every size and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--most", type=int, default=SIZES[-1], help="leave larger sizes out")
    given = parser.parse_args()
    found = [one(size) for size in SIZES if size <= given.most]
    result = {
        "sizes": found,
        "threads": torch.get_num_threads(),
        "turns": TURNS,
        "provenance": provenance(),
    }
    if given.json:
        print(json.dumps(result, indent=1))
        return
    for row in found:
        print(f"{row['weights']:,}", *(f"{name} {ms} ms" for name, ms in row["ms"].items()))


if __name__ == "__main__":
    main()
