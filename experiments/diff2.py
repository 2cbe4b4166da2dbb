"""Claim to test: DIFF2's differences take less noise than gradients do, at the same epsilon.

DP-ZO (each example's K scalars clipped together, noise on their sum) against DIFF2 (gradients at
restarts, noisy differences in between; `lorand.privacy.diff2`), both with K two-point scalars of
each example and 100 rounds, whole batches or Poisson samples of a tenth. `synthetic`: 4,000 rows of
30 numbers, a logistic loss with a regulariser that is not convex, K = 32, judged by ‖∇F‖² at the
end. `subj`: a linear head (385 weights) on MiniLM's features of Subj, K = 64, judged by loss and
accuracy on test data. DIFF2 keeps its directions from restart to restart; DP-ZO keeps them for the
run, or draws new ones each round, as LoRand does by default, or as often as DIFF2.

Settings are drawn at random (log-uniform learning rate, clip bound and slope bound, restarts every
5, 10, 25, 50 or 100 rounds), as many for each row as it says, and the best by other seeds (three
for `synthetic`; one for `subj`, by loss on a tenth held out of the training data) is run on the
seeds of the table. The number of rounds is DP-ZO's own way to take fewer gradients with less noise:
rows of any number of rounds choose 5, 10, 25, 50 or 100. Tuning is not private for anyone. `share`
is that of the restarts in the budget.

    python -m experiments.diff2                       # all: about an hour on one core
    python -m experiments.diff2 --cells subj-2-1      # one: problem, epsilon, sample rate

Interrupted, the same command goes on. Noise is of numpy's generator, in floats, to be repeatable.
"""

import argparse
import fcntl
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import cache
from statistics import fmean
from typing import Any, Final

import numpy as np

from experiments import linear_heads
from experiments.cells import RESULTS, mean_and_error
from experiments.linear_heads import Problem
from experiments.provenance import provenance
from lorand.codec import Floats
from lorand.privacy import diff2
from lorand.privacy.accountant import Release, calibrated
from lorand.schedules import restarts

ROUNDS: Final = 100
DELTA: Final = 1e-5
TUNING_SEEDS: Final = {"synthetic": (100, 101, 102), "subj": (100,)}
SEEDS: Final = range(10)
SETTINGS: Final = 32
"""Tried by a row."""
MANY: Final = 4
"""Rows of DIFF2, and how many times as many settings DP-ZO tries where it is compared with all."""
INTERVALS: Final = (5, 10, 25, 50, 100)
SHARES: Final = (0.3, 0.5, 0.7)
POOL: Final = {"synthetic": 32, "subj": 64}


@dataclass(frozen=True)
class Cell:
    """A problem at an epsilon and a sample rate."""

    problem: str
    epsilon: float
    rate: float

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.problem}-{self.epsilon:g}-{self.rate:g}"

    def of(self, seed: int) -> Problem:
        """Return the problem of a seed; that of tuning holds other examples out."""
        if self.problem == "synthetic":
            return linear_heads.synthetic(seed)
        return linear_heads.subj(held_out=seed in TUNING_SEEDS["subj"])


CELLS: Final = [
    Cell("synthetic", 0.5, 1.0),
    Cell("synthetic", 2.0, 1.0),
    Cell("synthetic", 2.0, 0.1),
    Cell("subj", 2.0, 1.0),
    Cell("subj", 0.5, 0.1),
]


@dataclass(frozen=True)
class Row:
    """A method: DIFF2 with a share (0: as large as that of its rounds), or DP-ZO without one.

    `rounds` of 0 are tuned. Directions are kept for the run by DP-ZO, new in each round where
    `fresh`, and new from restart to restart by DIFF2 and, as often, where `alike`.
    """

    name: str
    share: float | None = None
    rounds: int = ROUNDS
    fresh: bool = False
    settings: int = SETTINGS
    alike: bool = False


def rows(cell: Cell) -> list[Row]:
    """Return the rows of a cell; where K directions span all weights new ones add nothing."""
    fresh = [
        Row("DP-ZO, new directions each round", fresh=True),
        Row("DP-ZO, new directions, any number of rounds", None, 0, True, MANY * SETTINGS),
        Row("DP-ZO, new directions as often as DIFF2", alike=True),
    ]
    return [
        Row("DP-ZO"),
        Row("DP-ZO, as many forward passes as DIFF2", rounds=2 * ROUNDS),
        Row("DP-ZO, any number of rounds", None, 0, False, MANY * SETTINGS),
        *(fresh if cell.problem == "subj" else []),
        Row("DIFF2, equal noise", 0.0),
        *(Row(f"DIFF2, share {share:g}", share) for share in SHARES),
    ]


@dataclass(frozen=True)
class Setting:
    """What is tuned: the bounds in units of a median example's gradient at the start, squared."""

    learning_rate: float
    clip: float
    slope: float
    every: int


def settings(count: int) -> list[Setting]:
    """Return the settings that every row tries, the first so many."""
    drawn = np.random.default_rng(1).random((MANY * SETTINGS, 4))[:count]
    return [
        Setting(
            round(0.02 * 150 ** float(a), 4),
            round(0.03 * 100 ** float(b), 4),
            round(0.01 * 100 ** float(c), 4),
            INTERVALS[int(d * len(INTERVALS))],
        )
        for a, b, c, d in drawn
    ]


def lasting(row: Row, setting: Setting) -> tuple[int, int]:
    """Return the rounds of a run, and how many there are from restart to restart."""
    if row.share is None:
        return row.rounds or setting.every, 1
    return row.rounds, setting.every


def renewing(row: Row, setting: Setting) -> int:
    """Return for how many rounds directions are kept."""
    if row.share is not None or row.alike:
        return setting.every
    return 1 if row.fresh else 2 * ROUNDS


@cache
def multipliers(cell: Cell, rounds: int, share: float | None, every: int) -> tuple[float, float]:
    """Return the noise of restarts and of increments; of DP-ZO both are alike."""
    if share is None:
        release = calibrated(Release("gaussian", 1.0, cell.rate), rounds, cell.epsilon, DELTA)
        return release.multiplier, release.multiplier
    plan = diff2.planned(
        rounds,
        every,
        share or math.ceil(rounds / every) / rounds,
        rate=cell.rate,
        target_epsilon=cell.epsilon,
        delta=DELTA,
    )
    return plan.restart.multiplier, plan.increment.multiplier


def noisy_mean(
    vectors: Floats, bound: float, multiplier: float, divisor: float, source: np.random.Generator
) -> Floats:
    """Return what `Mechanism.release` does, in floats and with a generator that can be repeated."""
    if bound == 0:
        return np.zeros(vectors.shape[1])
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    total = np.minimum(1.0, bound / np.maximum(lengths, bound)) @ vectors
    noise = source.normal(0, multiplier * bound, vectors.shape[1])
    mean: Floats = (total + noise) / divisor
    return mean


def run(cell: Cell, row: Row, setting: Setting, seed: int) -> dict[str, float]:
    """Return what a run ends with."""
    problem, source = cell.of(seed), np.random.default_rng(seed)
    rounds, every = lasting(row, setting)
    noise = multipliers(cell, rounds, row.share, every)
    count, size = POOL[cell.problem], cell.rate * len(problem.rows)
    pool = problem.directions(count, source)
    weights = np.zeros(problem.rows.shape[1])
    typical = float(np.median(np.linalg.norm(pool.scalars(weights), axis=1)))
    gathered = step = np.zeros(count)
    kept = np.zeros((0, count))
    for at in range(rounds):
        anew = restarts(at, every)
        if at and at % renewing(row, setting) == 0:
            pool = problem.directions(count, source)
        batch = None
        if cell.rate < 1:
            batch = np.flatnonzero(source.random(len(problem.rows)) < cell.rate)
        here = pool.scalars(weights, batch)
        if anew:
            released = noisy_mean(here, setting.clip * typical, noise[0], size, source)
        else:
            # A whole batch was measured there in the round before.
            before = kept if batch is None else pool.scalars(weights - pool.signs @ step, batch)
            bound = setting.slope * typical**2 * float(np.linalg.norm(step))
            released = noisy_mean(diff2.changes(here, before), bound, noise[1], size, source)
        kept = here
        gathered = diff2.accumulated(gathered, released, restart=anew)
        step = -setting.learning_rate / count * gathered
        weights = weights + pool.signs @ step
        if not np.abs(weights).max() < 1e3:
            return {"squared_gradient": math.inf, "loss": math.inf, "accuracy": 0.5}
    return {
        "squared_gradient": problem.squared_gradient(weights),
        "loss": problem.loss(weights, problem.scored),
        "accuracy": problem.accuracy(weights),
    }


def judged_by(cell: Cell) -> str:
    """Return the figure that settings are chosen by: the smaller the better."""
    return "squared_gradient" if cell.problem == "synthetic" else "loss"


def measured(cell: Cell, row: Row) -> dict[str, Any]:
    """Tune a row and run its seeds."""
    started = time.monotonic()
    seeds, by = TUNING_SEEDS[cell.problem], judged_by(cell)
    tried = [
        (fmean(run(cell, row, setting, seed)[by] for seed in seeds), setting)
        for setting in settings(row.settings)
    ]
    value, chosen = min(tried, key=lambda pair: pair[0])
    finished = [value for value, _ in tried if math.isfinite(value)]
    rounds, every = lasting(row, chosen)
    noise = multipliers(cell, rounds, row.share, every)
    return {
        "cell": cell.name,
        **asdict(row),
        "rounds": rounds,
        "every": every,
        "chosen": asdict(chosen),
        "multipliers": noise,
        "tuned": value,
        "median_of_tried": float(np.median(finished)),
        "seeds": {str(seed): run(cell, row, chosen, seed) for seed in SEEDS},
        "wall_s": round(time.monotonic() - started),
        "provenance": provenance(),
    }


# ------------------------------------------------------------- results


PATH: Final = RESULTS / "diff2.json"


def read() -> list[dict[str, Any]]:
    """Return the rows that are there."""
    if not PATH.exists():
        return []
    found: list[dict[str, Any]] = json.loads(PATH.read_text(encoding="utf-8"))["rows"]
    return found


def present(cell: str, row: str) -> bool:
    """Return whether a row was run."""
    return any((made["cell"], made["name"]) == (cell, row) for made in read())


def keep(made: dict[str, Any]) -> None:
    """Add a row; several processes may, each row once."""
    with PATH.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if present(made["cell"], made["name"]):
            return
        content = {"experiment": __doc__, "rows": [*read(), made]}
        partial = PATH.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(PATH)


def figures(made: dict[str, Any], name: str) -> tuple[float, float]:
    """Return mean and standard error over seeds."""
    return mean_and_error(seed[name] for seed in made["seeds"].values())


def compared(cell: Cell, found: list[dict[str, Any]]) -> str:
    """Return the verdict of a cell in a sentence, DIFF2 with the share that tuning chose."""
    best = min((made for made in found if made["share"] is not None), key=_tuned)
    by, parts = judged_by(cell), []
    for other in found:
        if other["share"] is not None or other["rounds"] > ROUNDS:
            continue
        usual = figures(other, by)[0]
        pairs = [best["seeds"][seed][by] - other["seeds"][seed][by] for seed in other["seeds"]]
        mean, error = (part / usual for part in mean_and_error(pairs))
        word = "better" if mean < -2 * error else "worse" if mean > 2 * error else "no different"
        parts.append(f"- {word} than {other['name']}: {mean:+.0%} ± {error:.0%}")
    head = (
        f"{best['name']}, which tuning chose of all {MANY * SETTINGS} settings of DIFF2, ends with "
        f"{'a squared gradient' if by == 'squared_gradient' else 'a test loss'} that is"
    )
    return "\n".join([head, "", *parts])


def _tuned(made: dict[str, Any]) -> float:
    return float(made["tuned"])


def write() -> None:
    """Write the page from the results."""
    known = read()
    lines = ["# diff2", "", *__doc__.split("\n\n    python")[0].splitlines(), ""]
    for cell in CELLS:
        by_name = {made["name"]: made for made in known if made["cell"] == cell.name}
        found = [by_name[row.name] for row in rows(cell) if row.name in by_name]
        if len([made for made in found if made["share"] is not None]) < MANY:
            continue
        whole = "whole batches" if cell.rate == 1 else f"samples of {cell.rate:g}"
        lines += [f"## {cell.problem}, epsilon {cell.epsilon:g}, {whole}", ""]
        lines += table(cell, found)
        lines += ["", compared(cell, found), ""]
    made = [made["provenance"] for made in known]
    parts = [f"{key} {', '.join(sorted({m[key] for m in made}))}" for key in made[0]]
    lines.append("Means over ten seeds ± standard errors; one thread; " + "; ".join(parts) + ".")
    PATH.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(cell: Cell, found: list[dict[str, Any]]) -> list[str]:
    """Return a line a row."""
    names = ["squared_gradient", "loss"] if cell.problem == "synthetic" else ["loss", "accuracy"]
    heads = {"squared_gradient": "‖∇F‖²", "loss": "loss, test", "accuracy": "accuracy, test"}
    columns = ["method", "settings", *(heads[name] for name in names), "median of the settings"]
    columns += ["rounds", "restart every", "σ of both kinds", "forward passes an example"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for made in found:
        ours, rounds, every = made["share"] is not None, made["rounds"], made["every"]
        passes = 2 * POOL[cell.problem] * cell.rate * (2 * rounds - math.ceil(rounds / every))
        noise = [f"{multiplier:.3g}" for multiplier in made["multipliers"]]
        cells = [made["name"], str(made["settings"])]
        cells += [_shown(name, *figures(made, name)) for name in names]
        cells += [
            _shown(judged_by(cell), made["median_of_tried"]),
            str(rounds),
            str(every) if ours else "",
        ]
        cells += [", ".join(noise) if ours else noise[0], f"{passes:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _shown(name: str, *values: float) -> str:
    """Return a figure, with its error if there is one."""
    digits = 5 if name == "squared_gradient" else 4
    return " ± ".join(f"{value:.{digits}f}" for value in values)


def main() -> None:
    """Fill the rows that are missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", default=[cell.name for cell in CELLS])
    options = parser.parse_args()
    for cell in CELLS:
        for row in rows(cell) if cell.name in options.cells else []:
            if present(cell.name, row.name):
                continue
            print(cell.name, row.name, flush=True)
            keep(measured(cell, row))
    write()


if __name__ == "__main__":
    main()
