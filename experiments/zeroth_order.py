"""Claim: by forward passes alone LoRand takes half the passes to the loss of MeZO after 2,000.

One machine with all training data; Subj, MR and UCI (three domains pooled); all-MiniLM-L6-v2, the
last two layers and a zero head trained. MeZO as its paper has it: Gaussian directions, two passes a
step, constant learning rate (experiments/baselines.py). `lorand-zo` is the preset, with its own
decay over a run of 667, 1,000 or 2,000 passes. Both: batches of 16, five learning rates tried with
one seed on a tenth of the training data, then five seeds on 500 test examples (300 of UCI).

    python -m experiments.zeroth_order                      # whatever is not in the results yet
    python -m experiments.zeroth_order --tasks uci --purposes tune

Searching the defaults, on held-out data alone: `--search NAME ...` tries the settings of SEARCH.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from experiments import baselines, cells, plots, settings, tasks
from experiments.cells import Cell, Purpose, Store
from experiments.federation import Point, run
from experiments.settings import Overrides
from lorand.config import ModelSection, RunConfig

STORE = Store("zeroth_order", __doc__.split("\n\n")[0])
BUDGET = 2000
LENGTHS = (667, 1000, 2000)
TUNED_AT = 1000
SEEDS = range(5)
TUNING_SEED = 100
MEZO = "mezo"
LORAND = "lorand-zo"
RATES = {MEZO: (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), LORAND: (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)}
POINTS = {"tune": 1, "report": 10}
ONE_SIDED = {"kind": "one-sided", "perturbation_scale": 0.001}
AS_IT_WAS: Overrides = {
    "directions": {"head_scale": 16.0},
    "estimator": {"perturbation_scale": 0.01},
}
"""The preset before this search: what SEARCH varies."""
SEARCH: dict[str, Overrides] = {
    "as it was": {},
    "scale .001": {"estimator": {"perturbation_scale": 0.001}},
    "one-sided": {"estimator": {"kind": "one-sided"}},
    "one-sided .001": {"estimator": ONE_SIDED},
    "one-sided .001, 16": {"estimator": {**ONE_SIDED, "directions_per_round": 16}},
    "one-sided .001, 4": {"estimator": {**ONE_SIDED, "directions_per_round": 4}},
    "one-sided .001, head x4": {"estimator": ONE_SIDED, "directions": {"head_scale": 4.0}},
    "one-sided .001, head x64": {"estimator": ONE_SIDED, "directions": {"head_scale": 64.0}},
    "one-sided .001, head x256": {"estimator": ONE_SIDED, "directions": {"head_scale": 256.0}},
    "scale .001, head x64": {
        "estimator": {"perturbation_scale": 0.001},
        "directions": {"head_scale": 64.0},
    },
    "one-sided .0003, head x64": {
        "estimator": {"kind": "one-sided", "perturbation_scale": 0.0003},
        "directions": {"head_scale": 64.0},
    },
    "scale .001, head x64, 2": {
        "estimator": {"perturbation_scale": 0.001, "directions_per_round": 2},
        "directions": {"head_scale": 64.0},
    },
    "one-sided .001, 16, head x64": {
        "estimator": {**ONE_SIDED, "directions_per_round": 16},
        "directions": {"head_scale": 64.0},
    },
    "one-sided .001, 4, head x64": {
        "estimator": {**ONE_SIDED, "directions_per_round": 4},
        "directions": {"head_scale": 64.0},
    },
    "one-sided .001, momentum": {"estimator": ONE_SIDED, "optimizer": {"momentum": 0.9}},
    "one-sided .001, adam": {"estimator": ONE_SIDED, "optimizer": {"kind": "adam"}},
    "one-sided .001, cosine": {"estimator": ONE_SIDED, "optimizer": {"schedule": "cosine"}},
}


def mezo(task: str, rate: float, seed: int, purpose: Purpose) -> list[Point]:
    """Return the points of a MeZO run."""
    cell = Cell(MEZO, task, rate, seed, purpose)
    section = ModelSection.model_validate(settings.MODEL)
    step = BUDGET // POINTS[purpose]

    def measure() -> Sequence[Point]:
        data = tasks.load(task, workers=1, seed=seed, held_out=purpose == "tune")
        return baselines.mezo(
            section,
            data.shards[0],
            data.scored,
            labels=len(tasks.LABELS[task]),
            learning_rate=rate,
            forwards=BUDGET,
            seed=seed,
            evaluate_at=range(0, BUDGET + 1, step),
        )

    chosen = {"batch_size": 16, "perturbation_scale": 1e-3, "forwards": BUDGET}
    return STORE.fill(cell, chosen, measure)


def lorand(
    task: str,
    rate: float,
    seed: int,
    purpose: Purpose,
    *,
    forwards: int,
    variant: str = "",
) -> list[Point]:
    """Return the points of a run of the preset, or of a variant of it."""
    name = named(forwards) + (f", {variant}" if variant else "")
    config = config_of(task, rate, forwards, _varied(SEARCH[variant]) if variant else {})

    def measure() -> Sequence[Point]:
        data = tasks.load(task, workers=1, seed=seed, held_out=purpose == "tune")
        marks = settings.marks(config, POINTS[purpose])
        return run(config, data.shards, data.scored, seed=seed, evaluate_at=marks, quick=True)

    return STORE.fill(Cell(name, task, rate, seed, purpose), settings.plain(config), measure)


def _varied(changes: Overrides) -> Overrides:
    return {name: AS_IT_WAS.get(name, {}) | changes.get(name, {}) for name in AS_IT_WAS | changes}


def config_of(task: str, rate: float, forwards: int, overrides: Overrides) -> RunConfig:
    """Return the preset's run of this length."""
    return settings.of_preset(
        LORAND,
        labels=tasks.LABELS[task],
        workers=1,
        forwards=forwards,
        learning_rate=rate,
        overrides=overrides,
    )


def tune(method: str, task: str) -> float:
    """Return the learning rate with the lowest held-out loss at the end."""
    losses = {}
    for rate in RATES[method]:
        points = (
            mezo(task, rate, TUNING_SEED, "tune")
            if method == MEZO
            else lorand(task, rate, TUNING_SEED, "tune", forwards=TUNED_AT)
        )
        losses[rate] = points[-1].score.loss
    return cells.best(losses)


def write() -> None:
    """Write the page and the plots from the results."""
    title, *about = __doc__.split("\n\n")[:2]
    lines = ["# zeroth_order", "", title, "", *about, "", *HEAD]
    rows = []
    for task in tasks.LABELS:
        names = [name for name in (MEZO, *map(named, LENGTHS)) if _reports(name, task)]
        curves = {name: _mean_curve(name, task) for name in names}
        if MEZO not in curves:
            continue
        target = curves[MEZO].mean[-1]
        lines += [_line(task, name, curve, target) for name, curve in curves.items()]
        found = list(curves.values())
        rows.append(plots.Panel(task, "forward passes", "loss, test", found, level=target))
    if rows:
        plots.draw(STORE.path.with_suffix(".png"), [rows], height=3.4)
        lines += ["", "![loss against forward passes](zeroth_order.png)", ""]
        lines += ["The thin line is the loss that MeZO reached, the mean over seeds."]
    STORE.write_text("\n".join([*lines, "", *_search(), "", STORE.origin()]))


HEAD = [
    "| task | method | learning rate | seeds | loss at the end | accuracy | MeZO's loss after |",
    "|---|---|---|---|---|---|---|",
]


def named(forwards: int) -> str:
    """Return the preset's name in the results for a run of this length."""
    return f"{LORAND}, {forwards} passes"


def _reports(name: str, task: str) -> list[dict[str, Any]]:
    wanted = {"method": name, "task": task, "purpose": "report"}
    return [cell for cell in STORE.read()["cells"] if wanted.items() <= cell.items()]


def _mean_curve(name: str, task: str) -> plots.Curve:
    found = _reports(name, task)
    places = range(1, min(len(cell["points"]) for cell in found))
    stats = [cells.mean_and_error([cell["points"][at][5] for cell in found]) for at in places]
    x = [found[0]["points"][at][1] for at in places]
    return plots.Curve(name, x, [mean for mean, _ in stats], [error for _, error in stats])


def _line(task: str, name: str, curve: plots.Curve, target: float) -> str:
    found = _reports(name, task)
    accuracy = cells.mean_and_error([cell["points"][-1][4] for cell in found])
    there = [at for at, loss in zip(curve.x, curve.mean, strict=True) if loss <= target]
    after = f"{there[0]:.0f} passes" if there else "not reached"
    return (
        f"| {task} | {name} | {found[0]['learning_rate']:.2g} | {len(found)} | "
        f"{curve.mean[-1]:.3f} ± {curve.error[-1]:.3f} | {accuracy[0]:.3f} ± {accuracy[1]:.3f} | "
        f"{after} |"
    )


def _search() -> list[str]:
    """All cells on held-out data: how learning rates and the preset's settings were found."""
    lines = ["## Tuning, on a tenth of the training data, one seed", ""]
    lines += [
        "| task | setting | learning rate | passes | loss | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for cell in STORE.read()["cells"]:
        if cell["purpose"] == "tune":
            last = cell["points"][-1]
            lines.append(
                f"| {cell['task']} | {cell['method']} | {cell['learning_rate']:.2g} | {last[1]} | "
                f"{last[5]:.3f} | {last[4]:.3f} |"
            )
    return lines


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", default=list(tasks.LABELS))
    add("--methods", nargs="+", default=[MEZO, LORAND])
    add("--purposes", nargs="+", default=["tune", "report"])
    add("--seeds", type=int, nargs="+", default=list(SEEDS))
    add("--write", action="store_true", help="run nothing")
    add("--search", nargs="+", choices=list(SEARCH), default=[])
    add("--rates", type=float, nargs="+", default=[], help="of the search")
    add("--forwards", type=int, default=TUNED_AT, help="of the search")
    return parser.parse_args()


def main() -> None:
    """Fill in what is missing."""
    options = parse()
    if options.search:
        for variant in options.search:
            for task in options.tasks:
                for rate in options.rates or RATES[LORAND]:
                    length = options.forwards
                    lorand(task, rate, TUNING_SEED, "tune", forwards=length, variant=variant)
        return
    for task in options.tasks if not options.write else []:
        for method in options.methods:
            rate = tune(method, task)
            if "report" not in options.purposes:
                continue
            for seed in options.seeds:
                if method == MEZO:
                    mezo(task, rate, seed, "report")
                    continue
                for forwards in LENGTHS:
                    lorand(task, rate, seed, "report", forwards=forwards)
            write()
    write()


if __name__ == "__main__":
    main()
