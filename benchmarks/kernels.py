"""Perturb, apply, rebuild and project, against what peers do and against the memory's speed.

Claim: one pass over the weights at the speed of memory, whatever K is and however many scalars
were ever applied.

- peers: the loop of MeZO (Malladi et al., 2023, algorithm 1) and FedKSeed (Qin et al., 2024,
  algorithm 1), which regenerates a direction a scalar: seed a generator, draw a normal tensor, add
  it. Applying 64 scalars is run in full; a rebuild from K = 4,096 is 64 times that, not run.
- limit: reading and writing every weight in place, the faster of torch and a compiled loop.
- copy: torch's own copy of all weights to another place.
- ours: what a replica calls, over the tensors of a real model, with transform and tables. In place
  it moves as many bytes as peers and limit; `out_of_place` also keeps the base beside the weights,
  and is held against the copy.

All rows run interleaved in one process; a figure is the median of the turns, a ratio the median of
the turns' ratios. Command: python -m benchmarks.kernels --json > benchmarks/results/kernels.json
(five minutes; with --one-thread ten).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from experiments.provenance import provenance

from benchmarks import shapes, step
from benchmarks.limit import touch
from lorand.coefficients import Coefficients
from lorand.directions import Pool, seed_keys
from lorand.kernels import Place, zero_sums
from lorand.kernels.cpu import CpuBackend
from lorand.transform import fwht, table

TURNS = 7
KEY = (1, 2)
QUANTUM = 40
POOL_SIZES = (4096, 65536, 1 << 20)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LONG = ("peer_apply64_f32",)
Call = Callable[[], Any]
Times = dict[str, list[float]]
"""Nanoseconds a weight of each row, turn by turn."""


class Weights:
    """Tensors of a model's shapes, one after the other in memory, each on a cache line."""

    def __init__(self, model: shapes.Shapes, dtype: torch.dtype) -> None:
        """Fill them with numbers of a usual size."""
        places, total = [], 0
        for shape in model:
            places.append(total)
            total += -(-shapes.count([shape]) // 64) * 64
        total += -total % 4096
        generator = torch.Generator().manual_seed(0)
        self.memory = (torch.randn(total, generator=generator) * 0.03).to(dtype)
        self.tensors = [
            self.memory[at : at + shapes.count([shape])].reshape(shape)
            for at, shape in zip(places, model, strict=True)
        ]


def peer(weights: Weights, seeds: int = 1) -> None:
    """Some directions the peers' way."""
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        for tensor in weights.tensors:
            z = torch.empty_like(tensor).normal_(generator=generator)
            tensor.add_(z, alpha=1e-9)


class Ours:
    """The kernels over all tensors, as a replica calls them."""

    def __init__(self, base: Weights, live: Weights) -> None:
        """Weights are written to live, from base."""
        self._pairs = list(zip(base.tensors, live.tensors, strict=True))
        self._backend = CpuBackend()

    def materialise(self, coefficients: Coefficients) -> None:
        """w(A): transform, table, one pass."""
        values = table(fwht(coefficients), QUANTUM, 0)
        places = [Place(base, live, tid, 0) for tid, (base, live) in enumerate(self._pairs)]
        self._backend.materialise_all(places, [values], key=KEY)

    def independent(self, coefficients: Coefficients) -> None:
        """Family `independent`: one 64-bit seed a direction."""
        keys = seed_keys(Pool(KEY, coefficients.size, QUANTUM, "independent"))
        for tid, (base, live) in enumerate(self._pairs):
            self._backend.materialise_independent(
                base, keys, coefficients, live, tid=tid, exponent=-QUANTUM
            )

    def project(self, size: int) -> None:
        """Bucket sums of a gradient as large as the model."""
        sums = zero_sums(size, torch.device("cpu"))
        for tid, (_, gradient) in enumerate(self._pairs):
            self._backend.project(gradient, sums, key=KEY, tid=tid)


def kernel_rows(model: shapes.Shapes) -> dict[str, Call]:
    """Return what is timed on every model: limits, one direction, rebuild and project."""
    rng = np.random.default_rng(0)
    many = {k: rng.integers(-(10**6), 10**6, k) for k in POOL_SIZES}
    one = np.zeros(4096, np.int64)
    one[1234] = 10**6
    rows: dict[str, Call] = {}
    for word, dtype in DTYPES.items():
        live = Weights(model, dtype)
        base = Weights(model, dtype)
        inside, outside = Ours(live, live), Ours(base, live)
        if word != "f16":
            rows[f"limit_{word}"] = partial(touch, live.memory)
            rows[f"peer_{word}"] = partial(peer, live)
        if word == "f32":
            rows["torch_f32"] = partial(live.memory.mul_, 1.0)
        rows[f"perturb_{word}"] = partial(inside.materialise, one)
        rows[f"copy_{word}"] = partial(live.memory.copy_, base.memory)
        rows[f"perturb_{word}_out_of_place"] = partial(outside.materialise, one)
        for k in POOL_SIZES:
            rows[f"rebuild_{word}_k{k}"] = partial(inside.materialise, many[k])
            if word != "f16":
                rows[f"project_{word}_k{k}"] = partial(inside.project, k)
    return rows


def round_rows(model: shapes.Shapes) -> dict[str, Call]:
    """Return 64 scalars applied by peers and by us; seconds a turn for the peers."""
    live = Weights(model, torch.float32)
    ours = Ours(live, live)
    rng = np.random.default_rng(1)
    few = np.zeros(4096, np.int64)
    few[rng.choice(4096, 64, replace=False)] = rng.integers(-(10**6), 10**6, 64)
    return {
        "peer_apply64_f32": lambda: peer(live, 64),
        "apply64_f32": lambda: ours.materialise(few),
        "rebuild_beside_f32": lambda: ours.materialise(rng.integers(-(10**6), 10**6, 4096)),
        "independent64_f32": lambda: ours.independent(few[few != 0]),
    }


def measure(rows: dict[str, Call], weights: int) -> Times:
    """Run all rows in turn; the first turn compiles and warms up.

    What ran before a row would count: a peer's minutes on one core leave the other asleep and the
    caches full of its numbers. So each row is run twice, and the second time counts; but for rows
    of seconds, of which the start is no part worth mentioning.
    """
    times: Times = {name: [] for name in rows}
    for turn in range(TURNS + 1):
        for name, call in rows.items():
            if name not in LONG:
                call()
            began = time.perf_counter()
            call()
            if turn:
                times[name].append((time.perf_counter() - began) / weights * 1e9)
    return times


def ratio(times: Times, above: str, below: str) -> float:
    """Return the median over turns of one row's time over another's."""
    pairs = zip(times[above], times[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def ratios(times: Times) -> dict[str, float]:
    """Return the figures that the claims are made of."""
    times = dict(times)
    if "torch_f32" in times:
        pairs = zip(times["limit_f32"], times["torch_f32"], strict=True)
        times["limit_f32"] = [min(pair) for pair in pairs]
    result: dict[str, float] = {}
    for word in ("f32", "bf16"):
        result[f"perturb_{word}_vs_peer"] = ratio(times, f"peer_{word}", f"perturb_{word}")
        for row in ("perturb", "rebuild"):
            name = f"{row}_{word}" + ("_k4096" if row == "rebuild" else "")
            result[f"{row}_{word}_vs_limit"] = ratio(times, name, f"limit_{word}")
        name = f"perturb_{word}_out_of_place"
        result[f"{name}_vs_copy"] = ratio(times, name, f"copy_{word}")
        for k in POOL_SIZES[1:]:
            name = f"rebuild_{word}_k{k}"
            result[f"{name}_vs_limit"] = ratio(times, name, f"limit_{word}")
    for k in POOL_SIZES:
        name = "project" + ("" if k == 4096 else f"_k{k}")
        result[f"{name}_vs_limit"] = ratio(times, f"project_f32_k{k}", "limit_f32")
    return result


def round_ratios(times: Times) -> dict[str, float]:
    """Return our speed-up over peers for a round of 64 scalars and, times 64, for a rebuild."""
    return {
        "apply64_vs_peer": ratio(times, "peer_apply64_f32", "apply64_f32"),
        "rebuild4096_vs_peer": 64 * ratio(times, "peer_apply64_f32", "rebuild_beside_f32"),
        "independent64_vs_peer": ratio(times, "peer_apply64_f32", "independent64_f32"),
    }


def one_setting(threads: int, models: dict[str, shapes.Shapes]) -> dict[str, Any]:
    """Measure everything with this many threads; ratios at the top are of the first model."""
    torch.set_num_threads(threads)
    result: dict[str, Any] = {}
    for name, model in models.items():
        weights = shapes.count(model)
        times = measure(kernel_rows(model), weights)
        found = ratios(times)
        if not result:
            beside = measure(round_rows(model), weights)
            result |= found | round_ratios(beside) | step.overhead(TURNS)
            times |= beside
        medians = {row: round(statistics.median(t), 4) for row, t in times.items()}
        result[name] = {"weights": weights, "ratios": found, "ns_a_weight": medians}
    return result


def main() -> None:
    """Measure with one thread and with all, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--quick", action="store_true", help="the smaller model only")
    parser.add_argument("--one-thread", action="store_true", help="also with one thread")
    arguments = parser.parse_args()
    models: dict[str, shapes.Shapes] = {"minilm_22m": shapes.minilm()}
    if not arguments.quick:
        models["large_203m"] = shapes.large()
    threads = torch.get_num_threads()
    result: dict[str, Any] = one_setting(threads, models)
    if arguments.one_thread and threads > 1:
        result["one_thread"] = one_setting(1, models)
    result |= {"threads": threads, "turns": TURNS, "provenance": provenance()}
    result = json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 4))
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            if isinstance(value, float):
                print(f"{name:40} {value}")


if __name__ == "__main__":
    main()
