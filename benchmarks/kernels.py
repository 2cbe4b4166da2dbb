"""Perturb, rebuild and project against memory bandwidth and against what peers do.

Claim: one pass over the weights, whatever K is. Peers (MeZO, FedKSeed) seed a generator, draw a
normal a weight and add it, once a direction. All rows run interleaved in one process on one thread;
figures are medians. Command: python -m benchmarks.kernels --json > benchmarks/results/kernels.json
(about two minutes).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from experiments.provenance import provenance

from lorand.coefficients import fwht, table
from lorand.kernels.cpu import CpuBackend

REPEATS = 7
KEY = (1, 2)
POOL_SIZES = (4096, 65536, 1 << 20)


def rows(size: int) -> dict[str, Callable[[], Any]]:
    """Return what is timed, each on `size` weights."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(size, generator=generator) * 0.03
    live, half = base.clone(), base.bfloat16()
    half_live = half.clone()
    backend = CpuBackend()
    rng = np.random.default_rng(0)
    tables = {k: table(fwht(rng.integers(-(10**6), 10**6, k)), 40, 0) for k in POOL_SIZES}

    def peer(weights: torch.Tensor) -> None:
        drawn = torch.Generator().manual_seed(1)
        z = torch.empty_like(weights).normal_(generator=drawn)
        weights.add_(z, alpha=1e-9)

    def rebuild(weights: torch.Tensor, out: torch.Tensor, k: int) -> Callable[[], None]:
        return lambda: backend.materialise(weights, tables[k], out, key=KEY, tid=0)

    result: dict[str, Callable[[], Any]] = {
        "limit_f32": lambda: live.mul_(1.0),
        "peer_f32": lambda: peer(live),
        "peer_bf16": lambda: peer(half_live),
        "rebuild_bf16_k4096": rebuild(half, half_live, 4096),
        "project_k4096": lambda: backend.project(base, 4096, key=KEY, tid=0),
        "project_k65536": lambda: backend.project(base, 65536, key=KEY, tid=0),
    }
    for k in POOL_SIZES:
        result[f"rebuild_f32_k{k}"] = rebuild(base, live, k)
    return result


def measure(size: int) -> dict[str, float]:
    """Return the median nanoseconds a weight of each row, interleaved."""
    work = rows(size)
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(REPEATS + 1):
        for name, call in work.items():
            began = time.perf_counter()
            call()
            if turn:  # the first turn compiles and warms up
                times[name].append((time.perf_counter() - began) / size * 1e9)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--weights", type=int, default=22_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    times = measure(arguments.weights)
    result: dict[str, Any] = {f"{name}_ns": round(value, 4) for name, value in times.items()}
    result["rebuild_f32_vs_limit"] = round(times["rebuild_f32_k4096"] / times["limit_f32"], 2)
    result["perturb_f32_vs_peer"] = round(times["peer_f32"] / times["rebuild_f32_k4096"], 1)
    result["perturb_bf16_vs_peer"] = round(times["peer_bf16"] / times["rebuild_bf16_k4096"], 1)
    # A peer's rebuild from K scalars is its perturbation K times over (not run: hours).
    result["rebuild4096_vs_peer_extrapolated"] = round(4096 * result["perturb_f32_vs_peer"])
    result |= {"weights": arguments.weights, "repeats": REPEATS, "provenance": provenance()}
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            print(f"{name:36} {value}")


if __name__ == "__main__":
    main()
