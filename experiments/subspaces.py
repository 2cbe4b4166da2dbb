"""Claim: what a GaLore-style subspace costs and what it gains, when only scalars are exchanged.

Three workers: UCI by its three domains, Subj dealt out at random. all-MiniLM-L6-v2, the last two
layers and a zero head trained. Zeroth-order rows are the preset `lorand-zo` for 300 forward passes
a worker; first-order rows six rounds of 20 local AdamW steps, reported in int8. A method's learning
rate is the best of three (zeroth-order) or two on a tenth of the training data, one seed; then
three seeds on 500 test examples (300 of UCI). Full space is tuned alike.

    python -m experiments.subspaces                      # whatever is not in the results yet
    python -m experiments.subspaces --orders zo --tasks uci
    python -m experiments.subspaces --write              # the page from the results alone

Memory is what a worker keeps beside the live weights; optimizer state is that of its local steps,
or what every replica keeps (M2). A refresh is timed on one thread, the median of seven.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
import torch

from experiments import cells, federation, settings, tasks
from experiments.cells import Cell, Purpose, Store
from experiments.federation import Point, run
from experiments.provenance import provenance
from lorand import ledger
from lorand.config import RunConfig
from lorand.subspaces import elections, periods
from lorand.subspaces.basis import drawn
from lorand.subspaces.replica import SubspaceReplica
from lorand_worker import bench, model
from lorand_worker import tasks as tasks_of_a_model
from lorand_worker.votes import energy

STORE = Store("subspaces", __doc__.split("\n\n")[0])
MEASURED = cells.RESULTS / "subspaces_measured.json"
WORKERS: Final = 3
FORWARDS: Final = 300
STEPS, ROUNDS = 20, 6
SEEDS: Final = range(3)
TUNING_SEED: Final = 100
TASKS: Final = ("uci", "subj")
Order = Literal["zo", "fo"]


@dataclass(frozen=True)
class Row:
    """A method: the learning rates that are tried, its subspace, and the size of the pool."""

    rates: tuple[float, ...]
    subspace: dict[str, Any] = field(default_factory=dict)
    rotate_every: int = 0
    pool_size: int = 4096
    server_rate: float = 1.0


def zeroth(kind: str, rank: int, rotate: int = 4, **more: Any) -> Row:
    """Return a zeroth-order row that has a fresh subspace every four rounds."""
    subspace = {"kind": kind, "rank": rank, "refresh_every": 4, **more}
    return Row((1e-4, 3e-4, 1e-3), subspace, rotate)


def first(kind: str, rank: int, pool_size: int = 16384, rotate: int = 0, **more: Any) -> Row:
    """Return a first-order row in one subspace, or in another one every so many rounds."""
    return Row((5e-4, 1.5e-3), {"kind": kind, "rank": rank, **more}, rotate, pool_size)


VOTED: Final[dict[str, Any]] = {"selection": "voted"}
ROWS: Final[dict[Order, dict[str, Row]]] = {
    "zo": {
        "full space": Row((1e-4, 3e-4, 1e-3)),
        "M1 dct, rank 32": zeroth("dct", 32),
        "M1 columns, rank 32": zeroth("coordinate", 32),
        "M1 dct, rank 8": zeroth("dct", 8),
        "M2 Adam, dct, rank 32": zeroth("dct", 32, 1, state="adam"),
        "M2 Adam, columns, rank 32": zeroth("coordinate", 32, 1, state="adam"),
        "M2 FRUGAL, rank 32": zeroth("coordinate", 32, 1, state="frugal"),
        "M2 Fira, rank 32": zeroth("coordinate", 32, 1, state="fira"),
        "WeLore, columns, average rank 128": zeroth("coordinate", 128, rank_rule="welore"),
        "M4 int8, dct, rank 32": zeroth("dct", 32, weights="int8"),
        "M4 int8 stochastic, dct, rank 32": zeroth("dct", 32, weights="int8-stochastic"),
    },
    "fo": {
        "full space, K 16,384": Row((1e-4, 3e-4), pool_size=16384),
        "M3 columns, rank 4, K 16,384": first("coordinate", 4, **VOTED),
        "M3 columns, rank 1, K 16,384": first("coordinate", 1, **VOTED),
        "M3 dct, rank 4, K 16,384": first("dct", 4, **VOTED),
        "M3 columns, rank 4, K 65,536": first("coordinate", 4, 65536, **VOTED),
        "M3 columns, rank 4, K 65,536, voted each round": replace(
            first("coordinate", 4, 65536, 1, **VOTED), rates=(5e-4, 1e-3)
        ),
        "full space, K 65,536": Row((1e-4, 3e-4), pool_size=65536),
        "full space, K 4,096": Row((1e-4, 3e-4), pool_size=4096),
        "M3 columns, rank 4, K 4,096": first("coordinate", 4, 4096, **VOTED),
        "M3 columns, rank 4, K 4,096, least squares": replace(
            first("coordinate", 4, 4096, **VOTED), server_rate=4096 / 47618
        ),
        "drawn columns, rank 4, K 16,384": first("coordinate", 4),
        "own SVD (GaLore), rank 4, K 16,384": first("svd", 4),
        "M3 + M4 int8, rank 4, K 16,384": first("coordinate", 4, weights="int8", **VOTED),
    },
}


def config_of(order: Order, name: str, task: str, rate: float) -> RunConfig:
    """Return the run of a row; the rate is the local one where there are local steps."""
    row = ROWS[order][name]
    directions = {"rotate_every": row.rotate_every, "pool_size": row.pool_size}
    overrides: settings.Overrides = {"subspace": row.subspace, "directions": directions}
    if order == "fo":
        overrides |= {
            "directions": {**directions, "head_scale": 1.0},
            "local": {
                "steps": STEPS,
                "space": "weights",
                "optimizer": "AdamW",
                "options": {"weight_decay": 0.0},
                "learning_rate": rate,
            },
            "codec": {"up": "int8", "down": "int8"},
            "optimizer": {"kind": "sgd", "learning_rate": row.server_rate, "normalise": False},
            "rounds": {"weighting": "examples"},
        }
    return settings.of_preset(
        "lorand-fo" if order == "fo" else "lorand-zo",
        labels=tasks.LABELS[task],
        workers=WORKERS,
        forwards=ROUNDS * 3 * STEPS if order == "fo" else FORWARDS,
        learning_rate=rate if order == "zo" else None,
        overrides=overrides,
    )


def measure(
    order: Order, name: str, task: str, rate: float, seed: int, purpose: Purpose
) -> list[Point]:
    """Return the points of a cell."""
    config = config_of(order, name, task, rate)

    def go() -> Sequence[Point]:
        data = tasks.load(task, workers=WORKERS, seed=seed, held_out=purpose == "tune")
        rounds = [config.run.rounds]
        return run(config, data.shards, data.scored, seed=seed, evaluate_at=rounds, quick=True)

    return STORE.fill(Cell(f"{order}: {name}", task, rate, seed, purpose), _plain(config), go)


def _plain(config: RunConfig) -> dict[str, Any]:
    kept = settings.plain(config)
    return {part: kept[part] for part in ("directions", "estimator", "local", "subspace", "codec")}


def chosen(order: Order, name: str, task: str, fill: bool) -> float | None:
    """Return the learning rate with the lowest held-out loss."""
    losses = {}
    for rate in ROWS[order][name].rates:
        cell = Cell(f"{order}: {name}", task, rate, TUNING_SEED, "tune")
        points = STORE.points(cell)
        if points is None and not fill:
            return None
        points = points or measure(order, name, task, rate, TUNING_SEED, "tune")
        losses[rate] = points[-1].score.loss
    return cells.best(losses)


# -- what is measured once ------------------------------------------------------------------------


def measured() -> dict[str, Any]:
    """Return memory, refresh times and captured energy, measured now."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"provenance": provenance(), "rows": {}}
    for order, rows in ROWS.items():
        for name in rows:
            result["rows"][f"{order}: {name}"] = _costs(order, name)
    result["captured"] = _captured()
    return result


def _costs(order: Order, name: str) -> dict[str, Any]:
    config = config_of(order, name, "uci", ROWS[order][name].rates[0])
    loaded = model.load(config.model, 2, federation.minilm())
    identity = model.identity(loaded, config, prepares=True)
    pool = ledger.pool_of(config, identity, 0)
    replica = bench.replica_of(config, loaded.module, identity.manifest, pool)
    d = identity.manifest.num_weights
    costs: dict[str, Any] = {"weights": d, "coordinates": d}
    if isinstance(replica, SubspaceReplica):
        basis = drawn("coordinate", identity.manifest, (1, 2))
        replica.fold(replica.coefficients, replace(pool, basis=pool.basis or basis, index=1))
        costs["coordinates"] = replica.layout.size
        costs["kept_bytes"] = replica.kept_bytes - (replica.state.nbytes if replica.state else 0)
        costs["state_bytes"] = replica.state.nbytes if replica.state else 0
        ballot = elections.pack(basis.indices)
        costs["vote_bytes"] = sum(part.ByteSize() + 2 for part in ballot)
        costs["refresh_ms"] = _refresh_ms(replica, config, identity)
    else:
        costs["kept_bytes"] = sum(base.nbytes for base in replica.base.values())
        costs["state_bytes"] = 0
    if order == "fo":
        costs["state_bytes"] = 2 * 4 * (_svd_size(config, identity) or costs["coordinates"])
    return costs


def _svd_size(config: RunConfig, identity: Any) -> int:
    """Coordinates of a worker's own basis."""
    if config.subspace.kind != "svd":
        return 0
    rank = config.subspace.rank
    return sum(
        rank * max(spec.shape) if len(spec.shape) == 2 and min(spec.shape) > rank else spec.size
        for spec in identity.manifest.tensors
    )


def _refresh_ms(replica: SubspaceReplica, config: RunConfig, identity: Any) -> float:
    kind: Any = config.subspace.kind
    times = []
    for number in range(8):
        basis = drawn(kind, identity.manifest, (number, 7))
        pool = replace(ledger.pool_of(config, identity, 0), basis=basis, index=number)
        started = time.perf_counter()
        replica.fold(replica.coefficients, pool)
        times.append(1000 * (time.perf_counter() - started))
    return round(statistics.median(times[1:]), 2)


def _captured() -> dict[str, Any]:
    """Share of a gradient's energy in subspaces that another batch chose, at the base weights."""
    config = config_of("fo", "full space, K 16,384", "uci", 1e-4)
    loaded = model.load(config.model, 2, federation.minilm())
    identity = model.identity(loaded, config)
    shards = tasks.load("uci", workers=WORKERS, seed=0, held_out=True).shards
    trainable = {spec.name for spec in identity.manifest.tensors}
    device = torch.device("cpu")
    task = tasks_of_a_model.build(
        loaded, config, federation.pool(shards), trainable=trainable, device=device
    )
    rows = np.random.default_rng(0).permutation(len(task)).tolist()
    head: Any = loaded.module.head
    with torch.no_grad():  # a zero head has no gradient below it
        head.weight.copy_(torch.randn(2, 384, generator=torch.Generator().manual_seed(0)) * 0.3)
    gradients = [_gradients(loaded.module, trainable, task, rows[at : at + 64]) for at in (0, 64)]
    matrices = [s for s in identity.manifest.tensors if len(s.shape) == 2 and min(s.shape) > 64]
    found: dict[str, Any] = {}
    for rank in (4, 32):
        shares: dict[str, list[float]] = {"columns": [], "dct": [], "SVD": []}
        totals = []
        for spec in matrices:
            a, b = (
                g[spec.name] if spec.shape[0] >= spec.shape[1] else g[spec.name].T
                for g in gradients
            )
            square = type(spec)(spec.name, tuple(a.shape), spec.dtype, 0, rank)
            totals.append(float(b.square().sum()))
            for kind, column in (("columns", "coordinate"), ("dct", "dct")):
                scale = totals[-1] / float(energy(square, b, column).sum())
                best = energy(square, a, column).argsort(descending=True)[:rank]
                shares[kind].append(float(energy(square, b, column)[best].sum()) * scale)
            rows_of = torch.linalg.svd(a, full_matrices=False)[2][:rank]
            shares["SVD"].append(float((b @ rows_of.T).square().sum()))
        found[str(rank)] = {kind: round(sum(s) / sum(totals), 3) for kind, s in shares.items()}
    return found


def _gradients(module: Any, names: set[str], task: Any, batch: list[int]) -> dict[str, Any]:
    parameters = {n: p.requires_grad_(True) for n, p in module.named_parameters() if n in names}
    value = task.loss(batch)
    return dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))


# -- the page -------------------------------------------------------------------------------------

PAPERS: Final = """
| published (other models and tasks; their own figures) | |
|---|---|
| GaLore, arXiv 2403.03507: LLaMA 1B on C4, perplexity | 15.64, full rank 15.56; memory −65.5 % |
| GaLore: RoBERTa-base on GLUE, average | 85.93 against 86.28 full, 85.94 LoRA |
| Q-GaLore, arXiv 2407.08296: LLaMA 1B on C4 | 16.25 at 3.08 GB (GaLore 15.64 at 4.38 GB) |
| Fira, arXiv 2410.01623: LLaMA 1B on C4 | 14.31 (GaLore 15.64, full 15.56) |
| FFT-based subspaces, arXiv 2505.17967: 800M, perplexity | 13.69; LDAdamW 13.91, AdamW 11.73 |
| zeroth-order subspaces, arXiv 2501.19099 | a broad class of them converges alike |
"""


def write() -> None:
    """Write subspaces.md."""
    once = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else None
    lines = ["# subspaces", "", *__doc__.split("\n\n")[:2], ""]
    for order, title in (("zo", "Zeroth-order"), ("fo", "First-order, local steps")):
        for task in TASKS:
            lines += [f"## {title}, {task}", "", *_table(order, task, once), ""]  # type: ignore[arg-type]
    if once:
        lines += ["## Gradient energy kept, by columns that another batch chose", ""]
        lines += ["| rank of 384 | columns by index | dct | SVD |", "|---|---|---|---|"]
        for rank, shares in once["captured"].items():
            lines.append(f"| {rank} | {shares['columns']} | {shares['dct']} | {shares['SVD']} |")
        lines += ["", "MiniLM's last two layers, UCI, 64 examples each, random head.", ""]
    lines += ["## Published figures", PAPERS]
    STORE.write_text("\n".join([*lines, STORE.origin()]))


def _table(order: Order, task: str, once: dict[str, Any] | None) -> list[str]:
    lines = [
        "| method | rate | seeds | accuracy | loss | of full space | bytes up | optimizer state "
        "| kept beside weights | refresh |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ROWS[order]:
        rate = chosen(order, name, task, fill=False)
        points = _reported(order, name, task)
        if rate is None or not points:
            continue
        accuracy = cells.mean_and_error([p.score.accuracy for p in points])
        loss = cells.mean_and_error([p.score.loss for p in points])
        costs = (once or {"rows": {}})["rows"].get(f"{order}: {name}", {})
        config = config_of(order, name, task, rate)
        held = [n for n in range(config.run.rounds) if periods.elects(config, n)]
        votes = costs.get("vote_bytes", 0) * len(held)
        lines.append(
            f"| {name} | {rate:.2g} | {len(points)} | {accuracy[0]:.3f} ± {accuracy[1]:.3f} | "
            f"{loss[0]:.3f} ± {loss[1]:.3f} | {_against(order, name, task, loss[0])} | "
            f"{points[0].bytes_up + votes:,} | {_kb(costs, 'state_bytes')} | "
            f"{_kb(costs, 'kept_bytes')} | {costs.get('refresh_ms', '–')} ms |"
        )
    return lines


def _kb(costs: dict[str, Any], what: str) -> str:
    return f"{costs[what] / 1000:,.0f} KB" if what in costs else "–"


def _against(order: Order, name: str, task: str, loss: float) -> str:
    """Loss relative to full space at the same pool size."""
    size = ROWS[order][name].pool_size
    full = "full space" if order == "zo" else f"full space, K {size:,}"
    base = _reported(order, full, task)
    if not base:
        return "–"
    return f"{loss / statistics.fmean(p.score.loss for p in base):.3f}"


def _reported(order: Order, name: str, task: str) -> list[Point]:
    rate = chosen(order, name, task, fill=False)
    if rate is None:
        return []
    cells_of = [Cell(f"{order}: {name}", task, rate, seed, "report") for seed in SEEDS]
    return [points[-1] for cell in cells_of if (points := STORE.points(cell))]


def main() -> None:
    """Fill in what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orders", nargs="+", default=["zo", "fo"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--rows", nargs="+", default=None, help="names of methods, by their start")
    parser.add_argument("--measure", action="store_true", help="only memory, times and energy")
    parser.add_argument("--write", action="store_true", help="run nothing")
    options = parser.parse_args()
    if options.measure:
        MEASURED.write_text(json.dumps(measured(), indent=1) + "\n", encoding="utf-8")
    for task in options.tasks if not (options.write or options.measure) else []:
        for order in options.orders:
            for name in ROWS[order]:
                if options.rows and not name.startswith(tuple(options.rows)):
                    continue
                rate = chosen(order, name, task, fill=True)
                assert rate is not None
                for seed in SEEDS:
                    measure(order, name, task, rate, seed, "report")
                write()
    write()


if __name__ == "__main__":
    main()
