"""Claim: every preset trains; how far each gets for its forward passes and for its bytes.

Three workers: Subj and MR dealt out at random, UCI by its three domains. all-MiniLM-L6-v2, the last
two layers and a zero head trained, batches of 16, runs of as many forward passes a worker for all
(a backward pass counts as two). A preset's learning rate is one of three, a factor of three apart,
tried with one seed on a tenth of the training data; then five seeds on 500 test examples (300 of
UCI). All else is the preset's, but for what the table of `ROWS` says.

    python -m experiments.presets                       # whatever is not in the results yet
    python -m experiments.presets --only mezo --tasks subj --purposes tune
    python -m experiments.presets --write               # tables and plots from the results alone
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from experiments import cells, plots, settings, tasks
from experiments.cells import Cell, Purpose, Store
from experiments.federation import Point, run
from experiments.settings import Overrides
from lorand.config import RunConfig

STORE = Store("presets", __doc__.split("\n\n")[0])
WORKERS: Final = 3
FORWARDS: Final = 300
SEEDS = range(5)
TUNING_SEED: Final = 100
TRIED: Final = tuple(3.0**power for power in (-1, 0, 1))
MARKS: Final = (0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)


@dataclass(frozen=True)
class Row:
    """A preset: the middle of the learning rates that are tried, and what a short run needs."""

    rate: float
    overrides: Overrides = field(default_factory=dict)
    why: str = ""


FEW_STEPS: Final[Overrides] = {"local": {"steps": 15}}
FEW_DIRECTIONS: Final[Overrides] = {"estimator": {"directions_per_round": 5}}
ROWS: Final = {
    "mezo": Row(1e-3),
    "just-one-byte": Row(
        3e-3, FEW_DIRECTIONS, "5 directions of a worker a round, not 30: a run has 30 rounds"
    ),
    "fedkseed": Row(1e-3, FEW_STEPS, "15 local steps a round, not 200: a run has 10 rounds"),
    "fedkseed-pro": Row(1e-3, FEW_STEPS, "15 local steps a round, not 200: a run has 10 rounds"),
    "decomfl": Row(3e-3),
    "feedsign": Row(3e-4),
    "fzoo": Row(1e-3),
    "ferret": Row(1e-4),
    "lorand-zo": Row(3e-4),
    "lorand-fo": Row(1e-3),
}

ORDERINGS: Final = (
    ("fzoo", "mezo", "FZOO: fewer forward passes than MeZO"),
    ("fedkseed-pro", "fedkseed", "FedKSeed-Pro: weighted drawing is no worse than uniform"),
    ("ferret", "fedkseed", "Ferret: first-order steps get further than FedKSeed's"),
    ("feedsign", "mezo", "FeedSign: a vote of one bit comes close to whole scalars"),
    ("decomfl", "mezo", "DeComFL: several directions a step, at equal forward passes"),
    ("lorand-zo", "mezo", "ours, zeroth-order"),
    ("lorand-fo", "ferret", "ours, first-order"),
)
"""What papers say of two presets: (this one, is better than, the claim)."""


def config_of(name: str, task: str, rate: float) -> RunConfig:
    """Return a preset's run on a task; the rate is the local one where there are local steps."""
    row = ROWS[name]
    overrides = {section: dict(values) for section, values in row.overrides.items()}
    local = settings.takes_local_steps(name)
    if local:
        overrides.setdefault("local", {})["learning_rate"] = rate
    return settings.of_preset(
        name,
        labels=tasks.LABELS[task],
        workers=WORKERS,
        forwards=FORWARDS,
        learning_rate=None if local else rate,
        overrides=overrides,
    )


def measure(name: str, task: str, rate: float, seed: int, purpose: Purpose) -> list[Point]:
    """Return the points of a cell."""
    config = config_of(name, task, rate)

    def go() -> Sequence[Point]:
        data = tasks.load(task, workers=WORKERS, seed=seed, held_out=purpose == "tune")
        shares = MARKS if purpose == "report" else (1,)
        return run(
            config,
            data.shards,
            data.scored,
            seed=seed,
            evaluate_at=sorted({round(config.run.rounds * share) for share in shares}),
            quick=True,
        )

    return STORE.fill(Cell(name, task, rate, seed, purpose), settings.plain(config), go)


def tune(name: str, task: str) -> float:
    """Return the learning rate with the lowest held-out loss."""
    losses = {}
    for factor in TRIED:
        rate = float(f"{ROWS[name].rate * factor:.3g}")
        losses[rate] = measure(name, task, rate, TUNING_SEED, "tune")[-1].score.loss
    return cells.best(losses)


def chosen(name: str, task: str) -> float | None:
    """Return the tuned learning rate, where all rates were tried."""
    rows = STORE.read()["cells"]
    tried = {
        row["learning_rate"]: row["points"][-1][5]
        for row in rows
        if (row["method"], row["task"], row["purpose"]) == (name, task, "tune")
    }
    return cells.best(tried) if len(tried) >= len(TRIED) else None


def write() -> None:
    """Write presets.md and a plot a task."""
    lines = ["# presets", "", *__doc__.split("\n\n")[:2], ""]
    for task in tasks.LABELS:
        curves = {name: reported(name, task) for name in ROWS}
        curves = {name: seeds for name, seeds in curves.items() if seeds}
        if not curves:
            continue
        lines += [f"## {task}", "", f"![{task}](presets_{task}.png)", "", *_table(task, curves), ""]
        _plot(task, curves)
    lines += _orderings()
    lines += [f"- `{name}`: {row.why}" for name, row in ROWS.items() if row.why]
    STORE.write_text("\n".join([*lines, "", STORE.origin()]))


def reported(name: str, task: str) -> list[list[Point]]:
    """Return the curves of the seeds that the results hold, at the rate that tuning chose."""
    rate = chosen(name, task)
    if rate is None:
        return []
    found = [STORE.points(Cell(name, task, rate, seed, "report")) for seed in SEEDS]
    return [points for points in found if points]


def _table(task: str, curves: dict[str, list[list[Point]]]) -> list[str]:
    lines = [
        "| preset | rate (tried from, to) | seeds | accuracy | loss | bytes up + down | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seeds in curves.items():
        last = [points[-1] for points in seeds]
        accuracy = cells.mean_and_error([point.score.accuracy for point in last])
        loss = cells.mean_and_error([point.score.loss for point in last])
        middle = ROWS[name].rate
        wall = sum(point.wall_s for point in last) / len(last)
        lines.append(
            f"| {name} | {chosen(name, task):.2g} ({middle / 3:.2g}, {middle * 3:.2g}) | "
            f"{len(seeds)} | {accuracy[0]:.3f} ± {accuracy[1]:.3f} | {loss[0]:.3f} ± {loss[1]:.3f} "
            f"| {last[0].bytes_up:,} + {last[0].bytes_down:,} | {wall:.0f} |"
        )
    return lines


def _orderings() -> list[str]:
    """Compare final losses of pairs of presets: more than one standard error counts."""
    lines = [
        "## Who is better, by the loss at the end",
        "",
        "| claim | " + " | ".join(tasks.LABELS),
    ]
    lines[-1] += " |"
    lines.append("|---" * (len(tasks.LABELS) + 1) + "|")
    for one, other, claim in ORDERINGS:
        found = []
        for task in tasks.LABELS:
            pair = [
                [points[-1].score.loss for points in reported(name, task)] for name in (one, other)
            ]
            if not all(pair):
                found.append("not run")
                continue
            (a, a_error), (b, b_error) = map(cells.mean_and_error, pair)
            error = (a_error**2 + b_error**2) ** 0.5
            verdict = "no difference" if abs(b - a) <= error else "yes" if a < b else "no"
            found.append(f"{verdict} ({b - a:+.3f} ± {error:.3f})")
        lines.append(f"| {one} before {other} ({claim}) | " + " | ".join(found) + " |")
    return [*lines, "", "In brackets: how much lower the first one's loss is.", ""]


def _plot(task: str, curves: dict[str, list[list[Point]]]) -> None:
    def spent(point: Point, on: str) -> float:
        return point.forwards if on == "forwards" else point.bytes_up + point.bytes_down

    def curve(name: str, seeds: list[list[Point]], on: str, what: str) -> plots.Curve:
        means = [
            cells.mean_and_error([getattr(points[at].score, what) for points in seeds])
            for at in range(1, len(seeds[0]))
        ]
        x = [spent(point, on) for point in seeds[0][1:]]
        return plots.Curve(name, x, [m for m, _ in means], [e for _, e in means])

    across = {"forwards": "forward passes a worker", "bytes": "bytes a worker, up and down"}
    rows = [
        [
            plots.Panel(
                "", across[on], f"{what}, test", [curve(n, s, on, what) for n, s in curves.items()]
            )
            for on in across
        ]
        for what in ("loss", "accuracy")
    ]
    plots.draw(cells.RESULTS / f"presets_{task}.png", rows)


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    add("--tasks", nargs="+", default=list(tasks.LABELS))
    add("--purposes", nargs="+", default=["tune", "report"])
    add("--seeds", type=int, nargs="+", default=list(SEEDS))
    add("--write", action="store_true", help="run nothing")
    return parser.parse_args()


def main() -> None:
    """Fill in what is missing and write the page."""
    options = parse()
    for task in options.tasks if not options.write else []:
        for name in options.only:
            rate = tune(name, task)
            for seed in options.seeds if "report" in options.purposes else []:
                measure(name, task, rate, seed, "report")
            write()
    write()


if __name__ == "__main__":
    main()
