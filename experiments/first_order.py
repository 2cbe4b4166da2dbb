"""Claim: one bit a scalar each way comes within a hundredth of peers that send float32 weights.

UCI sentiment (three domains, one a worker) and Banking77 (77 classes, ten workers, label-Dirichlet
0.5) on all-MiniLM-L6-v2, last two layers and a zero head trained. FedAvg sends float32 weights and
trains with AdamW; `adam` is Adam on the workers' whole gradients. Every method's learning rate is
the best of three (UCI) or two (Banking77) on a tenth of the training data, one seed; then five
seeds on the test data. A seed moves batches, draws and, for Banking77, the split.

    python -m experiments.first_order                    # all: about two hours on one core
    python -m experiments.first_order --tasks uci        # one task
    python -m experiments.first_order --tune             # only the tuning cells

Interrupted, the same command goes on. Bytes are codes, or weights, without framing.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from experiments import averaging, banking77, federation, plots, uci_sentiment
from experiments.cells import Cell, Store, best, mean_and_error
from experiments.federation import Point
from lorand.config import RunConfig
from lorand_coordinator import presets
from lorand_worker.data import Examples

TUNING_SEED = 100
SEEDS = range(5)
PEERS = ("fedavg", "adam")
STORE = Store("first_order", __doc__.split("\n\n", maxsplit=1)[0])
Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A data set, its workers, and the target rows of the table."""

    labels: tuple[str, ...]
    workers: int
    batch: int
    max_length: int


@dataclass(frozen=True)
class Method:
    """A row: its learning rates, and for LoRand what differs from the preset `lorand-fo`."""

    rates: tuple[float, ...]
    rounds: int
    changes: Settings | None = None
    batch: int = 0
    quick: bool = True


def local(rounds: int, up: str, size: int, **steps: int) -> Settings:
    """Return local AdamW steps on K coefficients, one code each way, the mean taken."""
    return {
        "run": {"rounds": rounds},
        "directions": {"pool_size": size},
        "local": {"optimizer": "AdamW", "options": {"weight_decay": 0.0}, **steps},
        "codec": {"up": up, "down": up},
        "optimizer": {"kind": "sgd", "learning_rate": 1.0, "normalise": False},
        "rounds": {"weighting": "examples"},
    }


def on_weights(changes: Settings) -> Settings:
    """Return the same with steps on all weights, as Ferret takes them; directions all alike."""
    directions = {**changes["directions"], "head_scale": 1.0}
    return {
        **changes,
        "directions": directions,
        "local": {**changes["local"], "space": "weights"},
    }


METHODS: dict[str, dict[str, Method]] = {
    "uci": {
        "fedavg": Method((1e-4, 3e-4, 1e-3), 5),
        "local steps, 1 bit": Method((1e-4, 3e-4, 1e-3), 5, local(5, "sign", 4096, epochs=1)),
        "local steps on weights, 1 bit": Method(
            (3e-5, 1e-4, 3e-4), 8, on_weights(local(8, "sign", 8192, steps=20)), batch=16
        ),
    },
    "banking77": {
        "adam": Method((3e-4, 1e-3), 120, batch=6),
        "no local steps, 1 bit": Method((1e-3, 3e-3), 120, {"run": {"rounds": 120}}, batch=6),
        "fedavg": Method((3e-4, 1e-3), 4),
        "local steps on weights, 1 bit": Method(
            (1e-4, 3e-4), 4, on_weights(local(4, "sign", 65536, epochs=1))
        ),
    },
}


def task_of(name: str) -> Task:
    """Return a task."""
    if name == "uci":
        return Task(("negative", "positive"), 3, 32, 64)
    _, labels = banking77.read("test.csv")
    return Task(labels, banking77.WORKERS, 64, 48)


def data_of(name: str, seed: int, held_out: bool) -> tuple[Sequence[Examples], Examples]:
    """Return the workers' shards and the scored examples."""
    if name == "uci":
        return uci_sentiment.shards_and_test(held_out)
    train, labels = banking77.read("train.csv")
    scored, _ = banking77.read("test.csv", labels)
    if held_out:
        train, scored = federation.shuffled_split(train)
    split = banking77.dirichlet(train, banking77.WORKERS, banking77.CONCENTRATION, seed)
    return split, scored


def config_of(task: Task, method: Method, rate: float) -> RunConfig:
    """Return the run of a LoRand row."""
    content = RunConfig.parse(presets.render("lorand-fo")).model_dump(mode="json")
    content["task"] = {"labels": task.labels}
    content["run"]["name"] = "first-order"
    content["model"] |= {"name": "all-MiniLM-L6-v2", "trainable": "last:2"}
    content["model"] |= {"max_length": task.max_length}
    for section, values in (method.changes or {}).items():
        content[section] |= values
    content["estimator"] |= {"batch_size": method.batch or task.batch}
    content["rounds"] |= {"quorum": task.workers}
    stepping = "local" if content["local"]["steps"] or content["local"]["epochs"] else "optimizer"
    content[stepping]["learning_rate"] = rate
    return RunConfig.model_validate(content)


def marks(rounds: int) -> list[int]:
    """Return the rounds that are scored: all of a few, or every twentieth part."""
    return sorted({math.ceil(rounds * at / 20) for at in range(21)})


def points(name: str, row: str, rate: float, seed: int, held_out: bool) -> list[Point]:
    """Return the curve of a cell, from the results or by running it."""
    task, method = task_of(name), METHODS[name][row]
    cell = Cell(row, name, rate, seed, "tune" if held_out else "report")
    settings: dict[str, Any] = {"rounds": method.rounds, "batch_size": method.batch or task.batch}
    if method.changes is not None:
        config = config_of(task, method, rate)
        settings = config.model_dump(mode="json", exclude={"service", "task"})

    def run() -> list[Point]:
        shards, scored = data_of(name, seed, held_out)
        if method.changes is not None:
            return federation.run(
                config,
                shards,
                scored,
                seed=seed % 100,
                evaluate_at=marks(method.rounds),
                quick=method.quick,
            )
        section = config_of(task, Method((), 1, {}), 1.0).model
        peer = (
            averaging.fedavg
            if row == "fedavg"
            else partial(averaging.adam, evaluate_at=marks(method.rounds))
        )
        return peer(
            section,
            shards,
            scored,
            labels=len(task.labels),
            learning_rate=rate,
            rounds=method.rounds,
            seed=seed,
            batch_size=method.batch or task.batch,
        )

    return STORE.fill(cell, settings, run)


def tuned(name: str, row: str) -> float:
    """Return the rate with the lowest held-out loss at the end of the tuning seed's run."""
    rates = METHODS[name][row].rates
    return best({r: points(name, row, r, TUNING_SEED, True)[-1].score.loss for r in rates})


def reported(name: str, row: str) -> list[list[Point]]:
    """Return the curves of the seeds that the results hold, at the rate that tuning chose."""
    cells = [c for c in STORE.read()["cells"] if (c["method"], c["task"]) == (row, name)]
    tried = {c["learning_rate"]: c["points"][-1][5] for c in cells if c["purpose"] == "tune"}
    if len(tried) < len(METHODS[name][row].rates):
        return []
    cell_of = partial(Cell, row, name, best(tried), purpose="report")
    found = (STORE.points(cell_of(seed=seed)) for seed in SEEDS)
    return [curve for curve in found if curve]


def peak(curves: Sequence[Sequence[Point]]) -> int:
    """Return the place of the round with the best mean accuracy."""
    means = [fmean(p.score.accuracy for p in at) for at in zip(*curves, strict=True)]
    return means.index(max(means))


def write() -> None:
    """Write the page and the plot from the results."""
    lines = ["# first_order", "", *__doc__.split("\n\n")[:2], ""]
    panels = []
    for name, methods in METHODS.items():
        found = {row: curves for row in methods if (curves := reported(name, row))}
        if not found:
            continue
        lines += [f"## {name}", "", *table(name, found), ""]
        drawn = [curve_of(row, curves) for row, curves in found.items()]
        across = "bytes a worker, up and down"
        panels.append(plots.Panel(name, across, "accuracy, test", drawn))
    if panels:
        plots.draw(STORE.path.with_suffix(".png"), [panels], height=3.4)
        lines += ["![accuracy against bytes](first_order.png)", ""]
    STORE.write_text("\n".join([*lines, STORE.origin()]))


def curve_of(row: str, curves: list[list[Point]]) -> plots.Curve:
    """Return mean accuracy and standard error against bytes."""
    both = [mean_and_error([p.score.accuracy for p in at]) for at in zip(*curves, strict=True)][1:]
    x = [p.bytes_up + p.bytes_down for p in curves[0][1:]]
    return plots.Curve(row, x, [mean for mean, _ in both], [error for _, error in both])


def table(name: str, found: dict[str, list[list[Point]]]) -> list[str]:
    """Return a line a method: its last and its best round, and its share of the peers' best."""
    peers = {row: _accuracy(found[row], peak(found[row])) for row in found if row in PEERS}
    lines = [
        "| method | seeds | last round | accuracy | best round | accuracy | bytes by then | "
        + " | ".join(f"of {peer}'s best" for peer in peers)
        + " |",
        "|---" * (7 + len(peers)) + "|",
    ]
    for row, curves in found.items():
        at = peak(curves)
        last, most = curves[0][-1], curves[0][at]
        shares = [f"{_accuracy(curves, at)[0] / best_of[0]:.3f}" for best_of in peers.values()]
        lines.append(
            f"| {row} | {len(curves)} | {last.committed} | {_show(_accuracy(curves, -1))} | "
            f"{most.committed} | {_show(_accuracy(curves, at))} | "
            f"{most.bytes_up + most.bytes_down:,} | " + " | ".join(shares) + " |"
        )
    return lines


def _accuracy(curves: list[list[Point]], at: int) -> tuple[float, float]:
    return mean_and_error([curve[at].score.accuracy for curve in curves])


def _show(found: tuple[float, float]) -> str:
    return f"{found[0]:.3f} ± {found[1]:.3f}"


def main() -> None:
    """Fill the cells and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(METHODS))
    parser.add_argument("--rows", nargs="+", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--write", action="store_true", help="run nothing")
    options = parser.parse_args()
    for name in options.tasks if not options.write else []:
        for row in options.rows or METHODS[name]:
            rate = tuned(name, row)
            print(f"{name}, {row}: rate {rate:g}", flush=True)
            for seed in () if options.tune else options.seeds:
                points(name, row, rate, seed, False)
            write()
    write()


if __name__ == "__main__":
    main()
