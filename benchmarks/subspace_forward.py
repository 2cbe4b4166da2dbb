"""What a perturbation in a subspace costs: written weights against layers that add a difference.

Claims: on a cosine basis and with up to half as many tokens as the smaller side of a matrix, x Wᵀ +
(x Rᵀ) Lᵀ is more than 1.2 times as fast as writing W + L R first (`factored_vs_written`, one
thread); with more tokens than that side, or with columns by index and more than a few, it is not. A
cosine lift of millions of numbers is written faster a tile at a time than as one product in float64
(`tiled_vs_whole`); float32, which would not be exact, would be two to four times as fast
(`exact_vs_float32`). `perturbation` is what a loss spends on all weights of MiniLM's last two
layers, and the memory beside them; `_few` is after losses of 16 tokens, and without the terms that
layers then add.

Layers are plain matrices, x (tokens, n), w (m, n), r columns or cosines; the table has ratios of
medians, interleaved in one process, on one torch thread and on two. Rows of two threads are wall
time, and scatter where the cores have other work (`load_average_at_start`).

    OMP_WAIT_POLICY=passive python -m benchmarks.subspace_forward --json \\
        > benchmarks/results/subspace_forward.json

About two minutes.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from experiments.federation import minilm
from experiments.provenance import provenance
from torch import nn
from torch.nn import functional

from lorand import ledger
from lorand.config import RunConfig
from lorand.manifest import Manifest, TensorSpec
from lorand.replica import CopyReplica, WholeReplica
from lorand.subspaces import lifts
from lorand.subspaces.basis import Kind, drawn
from lorand.subspaces.factored import TOKENS_A_COLUMN, Factors, added, pays
from lorand.subspaces.lifts import Coordinate, Cosine, lift
from lorand.subspaces.replica import SubspaceReplica
from lorand_worker import model
from lorand_worker.bench import replica_of

REPEATS: Final = 7
SECONDS: Final = 0.1
"""More turns than these, if they fit in this time."""
SHAPES: Final[dict[tuple[int, int], tuple[int, ...]]] = {
    (384, 384): (8, 32, 96),
    (1536, 384): (8, 32, 96),
    (1024, 1024): (32, 128),
    (4096, 1024): (32, 128),
}
TOKENS: Final = (1, 16, 64, 256, 1024)
KINDS: Final[tuple[Kind, ...]] = ("coordinate", "dct")
KEY: Final = (1, 2)
Work = dict[str, Callable[[], Any]]


def medians(work: Work) -> dict[str, float]:
    """Return the median milliseconds of each row, interleaved, without a first turn.

    On one torch thread the clock is that thread's own, which others on the machine do not disturb.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in work}
    until, turn = math.inf, 0
    while turn <= REPEATS or time.perf_counter() < until:
        for name, call in work.items():
            began = clock()
            call()
            if turn:
                times[name].append((clock() - began) * 1e3)
        until = until if turn else time.perf_counter() + SECONDS
        turn += 1
    return {name: statistics.median(values) for name, values in times.items()}


# -- one layer -------------------------------------------------------------------------------------


def layer(kind: Kind, shape: tuple[int, int], rank: int) -> tuple[Cosine | Coordinate, Factors]:
    """A lift bound to random weights, and coordinates U, (m, r), with their factor R, (r, n)."""
    torch.manual_seed(0)
    spec = TensorSpec("w", shape, "float32", rank=rank)
    part = lift(torch.randn(shape) * 0.05, spec, 0, drawn(kind, Manifest((spec,)), KEY))
    assert isinstance(part, Cosine | Coordinate)
    coordinates = torch.randn(shape[0], rank) * 1e-3
    if isinstance(part, Cosine):
        return part, (coordinates, part.factors(coordinates)[1])
    return part, (coordinates, torch.from_numpy(drawn(kind, Manifest((spec,)), KEY).indices[0]))


def passes(kind: Kind, shape: tuple[int, int], rank: int) -> list[dict[str, Any]]:
    """A perturbed layer for each number of tokens: written, factored, and without a perturbation.

    Columns by index take theirs out of x, (t, r), in place of a product with R.
    """
    part, (coordinates, right) = layer(kind, shape, rank)
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1])

        def written(x: torch.Tensor = x) -> None:
            part.write(coordinates)
            functional.linear(x, part.live)

        def factored(x: torch.Tensor = x) -> None:
            output = functional.linear(x, part.live)
            if isinstance(part, Cosine):
                added(output, x, part.factors(coordinates))
            else:
                torch.addmm(output, x.index_select(1, right), coordinates.T)

        plain = partial(functional.linear, x, part.live)
        times = medians({"written": written, "factored": factored, "plain": plain})
        rows.append(
            {
                "kind": kind,
                "shape": list(shape),
                "rank": rank,
                "tokens": tokens,
                "factored_vs_written": round(times["written"] / times["factored"], 2),
                "written_vs_plain": round(times["written"] / times["plain"], 2),
                "chosen": kind == "dct" and pays(tokens, shape),
            }
        )
    return rows


def writes(shape: tuple[int, int], rank: int) -> dict[str, Any]:
    """Ways to write a cosine lift: in tiles, in one product as before, in float32 (not exact)."""
    part, (coordinates, _) = layer("dct", shape, rank)
    assert isinstance(part, Cosine)
    base = part.live.clone()
    scaled, rows = part.factors(coordinates)

    def whole() -> None:
        part.live.copy_(base + part.lifted(coordinates))

    float32 = partial(torch.addmm, base, scaled, rows, out=part.live)
    work: Work = {
        "whole": whole,
        "tiled": partial(part.write, coordinates),
        "float32": float32,
    }
    times = medians(work)
    return {
        "shape": list(shape),
        "rank": rank,
        "tiled_vs_whole": round(times["whole"] / times["tiled"], 2),
        "exact_vs_float32": round(times["tiled"] / times["float32"], 2),
    }


# -- a whole perturbation --------------------------------------------------------------------------


def run_config(kind: str, rank: int) -> RunConfig:
    """A run that trains the last two layers of MiniLM, in full space at rank 0."""
    content: dict[str, Any] = {
        "run": {"name": "subspaces", "rounds": 1},
        "model": {"name": "all-MiniLM-L6-v2", "trainable": "last:2"},
        "task": {"labels": ["a", "b"]},
        "estimator": {"kind": "spsa"},
        "optimizer": {"learning_rate": 0.001},
        "rounds": {"quorum": 1},
    }
    if rank:
        content["subspace"] = {"kind": kind, "rank": rank}
        content["directions"] = {"rotate_every": 16}
    return RunConfig.model_validate(content)


def replica(kind: str, rank: int) -> tuple[nn.Module, WholeReplica]:
    """MiniLM and its replica in such a run."""
    config = run_config(kind, rank)
    loaded = model.load(config.model, 2, minilm())
    identity = model.identity(loaded, config)
    pool = ledger.pool_of(config, identity, 0)
    return loaded.module, replica_of(config, loaded.module, identity.manifest, pool)


def few_tokens(rank: int) -> WholeReplica:
    """A replica that knows its losses to have 16 tokens."""
    module, one = replica("dct", rank)
    ids = torch.arange(1000, 1016)[None]
    for _ in range(2):
        with one.perturbed(5, 1 << 20):
            module(ids, torch.ones_like(ids))
        one.set(one.coefficients)
    return one


def kept_bytes(one: WholeReplica) -> int:
    """Memory beside the live weights."""
    if isinstance(one, SubspaceReplica):
        return one.kept_bytes
    assert isinstance(one, CopyReplica)
    return sum(base.nbytes for base in one.base.values())


def perturbation() -> dict[str, Any]:
    """Writing all weights for one loss, against the full space, by kind and rank."""
    spaces = {"full": ("full", 0)}
    spaces |= {f"{kind}_{rank}": (kind, rank) for kind in KINDS for rank in (8, 32)}
    replicas = {name: replica(*space)[1] for name, space in spaces.items()}
    for rank in (8, 32):
        replicas[f"dct_{rank}_few"] = few_tokens(rank)

    def perturb(one: WholeReplica) -> None:
        with one.perturbed(5, 1 << 20):
            pass

    times = medians({name: partial(perturb, one) for name, one in replicas.items()})
    live = sum(tensor.nbytes for tensor in replicas["full"].live.values())
    return {
        "live_bytes": live,
        "kept_bytes": {name: kept_bytes(one) for name, one in replicas.items()},
        "time_vs_full": {name: round(ms / times["full"], 2) for name, ms in times.items()},
        "full_ms": round(times["full"], 2),
    }


@torch.no_grad()
def measure(threads: int) -> dict[str, Any]:
    """All rows on so many threads."""
    torch.set_num_threads(threads)
    cases = [(shape, rank) for shape, ranks in SHAPES.items() for rank in ranks]
    return {
        "layers": [row for kind in KINDS for case in cases for row in passes(kind, *case)],
        "writes": [writes(*case) for case in cases],
        "perturbation": perturbation(),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Least and median ratio where layers are factored, and the median where they are not."""
    ratio = [(row["kind"], row["chosen"], row["factored_vs_written"]) for row in rows]
    chosen = [value for _, is_chosen, value in ratio if is_chosen]
    others = [value for kind, is_chosen, value in ratio if kind == "dct" and not is_chosen]
    by_index = [value for kind, _, value in ratio if kind == "coordinate"]
    return {
        "chosen_min": min(chosen),
        "chosen_median": round(statistics.median(chosen), 2),
        "not_chosen_median": round(statistics.median(others), 2),
        "coordinate_median": round(statistics.median(by_index), 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one object on one line")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    result: dict[str, Any] = {f"threads_{threads}": measure(threads) for threads in (1, 2)}
    for part in result.values():
        part["summary"] = summary(part["layers"])
    result |= {"tokens_a_column": TOKENS_A_COLUMN, "tile": lifts.TILE, "repeats": REPEATS}
    result |= {"load_average_at_start": round(load, 1), "provenance": provenance()}
    print(json.dumps(result, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
