"""Question: what do a byte or a bit a scalar cost, and a fixed pool of 4,096, and which K?

At equal settings (rate, batches and draws alike; only what a row names differs), five seeds each on
test data, fewer where the table says so. Zeroth order is the preset `lorand-zo` on one machine,
first order `lorand-fo` on the three domains of UCI; all-MiniLM-L6-v2, last two layers and a zero
head trained, batches of 16.

- codec: int32, int8 and one bit, each way; for first order too.
- pool: the same pool of 4,096 throughout, or another one each round (`rotate_every = 1`).
- K: pools of 64 to 2^20 directions: accuracy, bytes and seconds a round.

    python -m experiments.codecs_and_pool                    # whatever is not in the results yet
    python -m experiments.codecs_and_pool --parts codec --tasks uci
    python -m experiments.codecs_and_pool --write            # tables and plots from the results

Learning rates are those that experiments/zeroth_order.py found for int8 and K = 4,096, and
for first order the best of `FIRST_ORDER_RATES` on held-out data with int32.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from experiments import cells, plots, settings, tasks, zeroth_order
from experiments.cells import Cell, Purpose, Store
from experiments.federation import Point, run
from experiments.settings import Overrides

STORE = Store("codecs_and_pool", __doc__.split("\n\n")[0])
SEEDS = range(5)
TUNING_SEED: Final = 100
ZEROTH, FIRST = "lorand-zo", "lorand-fo"
FORWARDS: Final = {ZEROTH: 500, FIRST: 60}
FIRST_ORDER_RATES: Final = (1e-4, 3e-4, 1e-3, 3e-3)
CODECS: Final = ("int32", "int8", "sign")
POOL_SIZES: Final = tuple(4**power for power in range(3, 11))


@dataclass(frozen=True)
class Setting:
    """A row: preset, task and what differs from the preset."""

    part: str
    name: str
    preset: str
    task: str
    overrides: Overrides

    @property
    def method(self) -> str:
        """Its name in the results."""
        return f"{self.part}: {self.preset}, {self.name}"


def rows() -> list[Setting]:
    """Return all settings."""
    found: list[Setting] = []
    changes: Overrides
    places = [(ZEROTH, "subj"), (ZEROTH, "uci"), (FIRST, "uci")]
    for preset, task in places:
        pool = {"directions": {"pool_size": 4096}}
        for codec in CODECS:
            changes = {"codec": {"up": codec, "down": codec}, **pool}
            found.append(Setting("codec", codec, preset, task, changes))
    for preset, task in places[:2]:
        for name, every in (("one pool", 0), ("another each round", 1)):
            changes = {"directions": {"pool_size": 4096, "rotate_every": every}}
            found.append(Setting("pool", name, preset, task, changes))
    for preset, task in (places[0], places[2]):
        for size in POOL_SIZES:
            changes = {"directions": {"pool_size": size}, "codec": {"up": "int8", "down": "int8"}}
            found.append(Setting("K", f"K = {size:,}", preset, task, changes))
    return found


def measure(row: Setting, rate: float, seed: int, purpose: Purpose = "report") -> list[Point]:
    """Return the points of a cell; draws depend on the seed alone, so that rows are paired."""
    workers = 1 if row.preset == ZEROTH else 3
    config = settings.of_preset(
        row.preset,
        labels=tasks.LABELS[row.task],
        workers=workers,
        forwards=FORWARDS[row.preset],
        learning_rate=rate,
        overrides=row.overrides,
    )

    def go() -> Sequence[Point]:
        data = tasks.load(row.task, workers=workers, seed=seed, held_out=purpose == "tune")
        marks = settings.marks(config, 4)
        return run(
            config,
            data.shards,
            data.scored,
            seed=seed,
            evaluate_at=marks,
            quick=True,
            draws_of_seed=True,
        )

    cell = Cell(row.method, row.task, rate, seed, purpose)
    return STORE.fill(cell, settings.plain(config), go)


def rate_of(row: Setting) -> float:
    """Return the tuned learning rate of the row's preset and task."""
    if row.preset == ZEROTH:
        return zeroth_order.tune(zeroth_order.LORAND, row.task)
    reference = next(r for r in rows() if (r.part, r.name, r.preset) == ("codec", "int32", FIRST))
    losses = {
        rate: measure(reference, rate, TUNING_SEED, "tune")[-1].score.loss
        for rate in FIRST_ORDER_RATES
    }
    return cells.best(losses)


def write() -> None:
    """Write the page and the plot of the sweep."""
    lines = ["# codecs_and_pool", "", __doc__.split("\n\n    python")[0], ""]
    for part in ("codec", "pool", "K"):
        lines += [f"## {part}", "", *HEAD]
        lines += [line for row in rows() if row.part == part for line in _line(row)]
        lines.append("")
    curves = [c for preset in (ZEROTH, FIRST) for c in _sweep(preset)]
    if curves:
        panel = plots.Panel("", "directions in the pool, K", "accuracy, test", curves)
        plots.draw(STORE.path.with_suffix(".png"), [[panel]])
        lines += ["![accuracy against K](codecs_and_pool.png)", ""]
    STORE.write_text("\n".join([*lines, STORE.origin()]))


HEAD: Final = [
    "| preset, task | row | rate | seeds | accuracy | loss | bytes up + down | s a round |",
    "|---|---|---|---|---|---|---|---|",
]


def reported(row: Setting) -> list[dict[str, Any]]:
    """Return the row's cells on test data."""
    wanted = {"method": row.method, "task": row.task, "purpose": "report"}
    return [cell for cell in STORE.read()["cells"] if wanted.items() <= cell.items()]


def _line(row: Setting) -> list[str]:
    found = reported(row)
    if not found:
        return []
    last = [cell["points"][-1] for cell in found]
    accuracy = cells.mean_and_error([point[4] for point in last])
    loss = cells.mean_and_error([point[5] for point in last])
    pace = sum(point[6] / point[0] for point in last) / len(last)
    return [
        f"| {row.preset}, {row.task} | {row.name} | {found[0]['learning_rate']:.2g} | "
        f"{len(found)} | {accuracy[0]:.3f} ± {accuracy[1]:.3f} | {loss[0]:.3f} ± {loss[1]:.3f} | "
        f"{last[0][2]:,} + {last[0][3]:,} | {pace:.2f} |"
    ]


def _sweep(preset: str) -> list[plots.Curve]:
    found = [(row, reported(row)) for row in rows() if (row.part, row.preset) == ("K", preset)]
    found = [(row, done) for row, done in found if done]
    if not found:
        return []
    sizes = [row.overrides["directions"]["pool_size"] for row, _ in found]
    means = [cells.mean_and_error([c["points"][-1][4] for c in done]) for _, done in found]
    label = f"{preset}, {found[0][0].task}"
    return [plots.Curve(label, sizes, [m for m, _ in means], [e for _, e in means])]


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", default=["codec", "pool", "K"])
    add("--presets", nargs="+", default=[ZEROTH, FIRST])
    add("--tasks", nargs="+", default=["subj", "uci"])
    add("--seeds", type=int, nargs="+", default=list(SEEDS))
    add("--write", action="store_true", help="run nothing")
    return parser.parse_args()


def main() -> None:
    """Fill in what is missing and write the page."""
    options = parse()
    for row in rows() if not options.write else []:
        wanted = row.part in options.parts and row.preset in options.presets
        if not wanted or row.task not in options.tasks:
            continue
        rate = rate_of(row)
        for seed in options.seeds:
            measure(row, rate, seed)
        write()
    write()


if __name__ == "__main__":
    main()
