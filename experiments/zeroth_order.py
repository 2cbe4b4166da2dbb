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

from experiments import baselines, cells, settings, tasks
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
RATES = {MEZO: (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), LORAND: (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
POINTS = {"tune": 1, "report": 10}
ONE_SIDED = {"kind": "one-sided", "perturbation_scale": 0.001}
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
    name = f"{LORAND}, {forwards} passes" + (f", {variant}" if variant else "")
    config = config_of(task, rate, forwards, SEARCH[variant] if variant else {})

    def measure() -> Sequence[Point]:
        data = tasks.load(task, workers=1, seed=seed, held_out=purpose == "tune")
        marks = settings.marks(config, POINTS[purpose])
        return run(config, data.shards, data.scored, seed=seed, evaluate_at=marks, quick=True)

    return STORE.fill(Cell(name, task, rate, seed, purpose), settings.plain(config), measure)


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


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", default=list(tasks.LABELS))
    add("--methods", nargs="+", default=[MEZO, LORAND])
    add("--purposes", nargs="+", default=["tune", "report"])
    add("--seeds", type=int, nargs="+", default=list(SEEDS))
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
    for task in options.tasks:
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


if __name__ == "__main__":
    main()
