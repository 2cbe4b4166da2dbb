"""A grid of runs from a TOML file: tasks x methods x rates x seeds, as a table, CSV and plots.

    python -m experiments.grid experiments/grids/quick.toml
    python -m experiments.grid experiments/grids/full.toml --only uci
    python -m experiments.grid experiments/grids/full.toml --write    # from what is there

Every run is a cell of experiments/results/GRID.json, written as it ends and not run again unless
its settings in the file changed: interrupted, the same command goes on. Where a method lists
several learning rates, each is tried on a tenth of the training data with one seed, and the one
with the lowest loss is reported on test data: as many tries for every method. A file that compares
accuracies says `choose = "accuracy"`: then the most accurate one is, of equals that with less loss.
With `seeds = 0` it only tries, and its page shows the tries.

Bytes are counted by one rule for all: what a worker sends and receives on the socket over mutual
TLS (`lorand.wire_size`, which experiments/wire_bytes.py holds against sockets), for weights as for
codes. The base model, which everybody fetches once, is not in them.
"""

import argparse
import csv
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, get_args

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import averaging, banking77, baselines, federation, plots, tasks
from experiments.cells import RESULTS, Cell, Purpose, Store, best, first_at, mean_and_error
from experiments.federation import Point
from experiments.settings import BATCH, MODEL, Overrides
from lorand import wire_size
from lorand.config import ModelSection, RunConfig
from lorand_coordinator import presets
from lorand_worker.data import Examples
from lorand_worker.tasks import Score

TUNING_SEED: Final = 100
MARKS: Final = 10
"""Places of a curve that are scored, beside the start; FedAvg is scored after each round."""
IN_A_ROW: Final = 3
ACROSS: Final = {"bytes": "bytes a worker, up and down", "forwards": "forward passes a worker"}


@dataclass(frozen=True)
class Task:
    """A data set and its workers; `concentration` is Dirichlet's, of Banking77's labels."""

    data: str
    workers: int
    max_length: int = 64
    concentration: float = 0.5

    def labels(self) -> tuple[str, ...]:
        """Return the names of the labels."""
        if self.data == "banking77":
            return tuple(banking77.read("test.csv")[1])
        return tasks.LABELS[self.data]

    def split(self, seed: int, *, held_out: bool) -> tuple[Sequence[Examples], Examples]:
        """Return the workers' shards and the scored examples."""
        if self.data != "banking77":
            loaded = tasks.load(self.data, workers=self.workers, seed=seed, held_out=held_out)
            return loaded.shards, loaded.scored
        train, labels = banking77.read("train.csv")
        scored, _ = banking77.read("test.csv", labels)
        if held_out:
            train, scored = federation.shuffled_split(train)
        return banking77.dirichlet(train, self.workers, self.concentration, seed), scored


@dataclass(frozen=True)
class Method:
    """A preset with `changes`, or a `peer` in plain torch; and its learning rates."""

    rates: tuple[float, ...]
    rounds: int
    preset: str = ""
    peer: str = ""
    batch: int = BATCH
    changes: Overrides = field(default_factory=dict)


Measure = Literal["loss", "accuracy"]
"""What learning rates are chosen by."""


@dataclass(frozen=True)
class Grid:
    """What a file asks for: which methods on which tasks."""

    name: str
    about: str
    seeds: int
    tasks: dict[str, Task]
    methods: dict[str, Method]
    pairs: tuple[tuple[str, str], ...]
    choose: Measure = "loss"
    across: tuple[str, ...] = tuple(ACROSS)
    """What the plots' panels have across: of one alone they stand three in a row."""

    @staticmethod
    def read(path: Path) -> "Grid":
        """Return the grid of a file. Raises KeyError or TypeError where it names what is not."""
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        methods = {
            name: Method(**{**values, "rates": tuple(values["rates"])})
            for name, values in content["methods"].items()
        }
        found = {name: Task(**values) for name, values in content["tasks"].items()}
        pairs = [(t, m) for runs in content["runs"] for t in runs["tasks"] for m in runs["methods"]]
        for task, method in pairs:
            assert task in found, f"{path}: there is no task {task!r}"
            assert method in methods, f"{path}: there is no method {method!r}"
        choose: Measure = content.get("choose", "loss")
        assert choose in get_args(Measure), f"{path}: rates are not chosen by {choose!r}"
        across = tuple(content.get("across", ACROSS))
        assert set(across) <= set(ACROSS), f"{path}: across is of {list(ACROSS)}"
        name, about, seeds = f"grid_{path.stem}", content["about"], content["seeds"]
        return Grid(name, about, seeds, found, methods, tuple(pairs), choose, across)

    @property
    def store(self) -> Store:
        """Where its cells are."""
        return Store(self.name, self.about)


def config_of(task: Task, method: Method, rate: float) -> RunConfig:
    """Return the run of a method that is a preset."""
    content = RunConfig.parse(presets.render(method.preset)).model_dump(mode="json")
    content["task"] = {"labels": task.labels()}
    content["run"] |= {"name": "grid", "rounds": method.rounds}
    content["model"] |= {**MODEL, "max_length": task.max_length}
    content["estimator"] |= {"batch_size": method.batch}
    content["rounds"] |= {"quorum": task.workers, "start_with": 0}
    content["optimizer"] |= {"warmup_rounds": 0}
    for section, values in method.changes.items():
        content[section] |= values
    local = content["local"]["steps"] or content["local"]["epochs"]
    content["local" if local else "optimizer"]["learning_rate"] = rate
    return RunConfig.model_validate(content)


def run(task: Task, method: Method, rate: float, seed: int, purpose: Purpose) -> list[Point]:
    """Return the curve of a cell, by running it now."""
    shards, scored = task.split(seed % TUNING_SEED, held_out=purpose == "tune")
    marks = sorted({math.ceil(method.rounds * at / MARKS) for at in range(MARKS + 1)})
    if method.peer:
        return _peer(task, method, rate, seed, shards, scored, marks)
    config = config_of(task, method, rate)
    asked = config.rounds.participants
    size = wire_size.of_round(config, asked or task.workers)
    up = federation.share_asked(asked, task.workers) * size.up.socket
    return [
        replace(p, bytes_up=round(p.committed * up), bytes_down=p.committed * size.down.socket)
        for p in federation.run(
            config, shards, scored, seed=seed % TUNING_SEED, evaluate_at=marks, quick=True
        )
    ]


def _peer(
    task: Task,
    method: Method,
    rate: float,
    seed: int,
    shards: Sequence[Examples],
    scored: Examples,
    marks: Sequence[int],
) -> list[Point]:
    section = {**MODEL, "max_length": task.max_length, **method.changes.get("model", {})}
    common: dict[str, Any] = {"labels": len(task.labels()), "learning_rate": rate, "seed": seed}
    model, rounds = ModelSection.model_validate(section), method.rounds
    if method.peer == "mezo":
        pooled = federation.pool(shards)
        common |= {"forwards": 2 * rounds, "evaluate_at": [2 * at for at in marks]}
        return baselines.mezo(model, pooled, scored, batch_size=method.batch, **common)
    common |= {"rounds": rounds, "batch_size": method.batch}
    participants = method.changes.get("rounds", {}).get("participants", 0)
    if method.peer == "fedavg":
        points = averaging.fedavg(model, shards, scored, participants=participants, **common)
    else:
        assert method.peer == "adam", f"there is no peer {method.peer!r}"
        points = averaging.adam(model, shards, scored, evaluate_at=marks, **common)
    share = federation.share_asked(participants, task.workers)
    return [
        replace(
            p,
            bytes_up=_framed(p.bytes_up, p.committed * share),
            bytes_down=_framed(p.bytes_down, p.committed * share),
        )
        for p in points
    ]


def _framed(payload: int, messages: float) -> int:
    """Return the bytes on the socket of so many messages of weights (of a worker, in the mean)."""
    return round(messages * wire_size.on_socket(round(payload / messages))) if payload else 0


@dataclass(frozen=True)
class Reported:
    """A method on a task: the rate that was chosen, how many were tried, and a curve a seed."""

    task: str
    method: str
    rate: float
    curves: list[list[Point]]

    def at(self, place: int) -> tuple[float, float]:
        """Return mean accuracy and its standard error at a place of the curves."""
        return mean_and_error(curve[place].score.accuracy for curve in self.curves)

    @property
    def peak(self) -> int:
        """The place with the best mean accuracy."""
        return max(range(len(self.curves[0])), key=lambda place: self.at(place)[0])


Cells = Callable[[str, str, float, int, Purpose], list[Point] | None]


def filling(grid: Grid) -> Cells:
    """Return what runs the cells that are not there."""

    def points(
        task: str, method: str, rate: float, seed: int, purpose: Purpose
    ) -> list[Point] | None:
        how, on = grid.methods[method], grid.tasks[task]
        go = partial(run, on, how, rate, seed, purpose)
        cell = Cell(method, task, rate, seed, purpose)
        return grid.store.fill(cell, _settings(on, how), go, exact=True)

    return points


def looking(grid: Grid) -> Cells:
    """Return what only looks cells up."""

    def points(
        task: str, method: str, rate: float, seed: int, purpose: Purpose
    ) -> list[Point] | None:
        settings = _settings(grid.tasks[task], grid.methods[method])
        return grid.store.points(Cell(method, task, rate, seed, purpose), settings)

    return points


def _settings(task: Task, method: Method) -> dict[str, Any]:
    return {
        "task": {name: getattr(task, name) for name in task.__dataclass_fields__},
        "method": {
            name: getattr(method, name) for name in method.__dataclass_fields__ if name != "rates"
        },
    }


def tries(grid: Grid, task: str, method: str, cells: Cells) -> dict[float, Point | None]:
    """Return where each of several rates led on held-out data; None where it was not run."""
    rates = grid.methods[method].rates
    curves = {
        rate: cells(task, method, rate, TUNING_SEED, "tune")
        for rate in (rates if len(rates) > 1 else ())
    }
    return {rate: curve[-1] if curve else None for rate, curve in curves.items()}


def reported(grid: Grid, task: str, method: str, cells: Cells) -> Reported | None:
    """Return a method's curves on a task; None where the cells are not all there."""
    rates = grid.methods[method].rates
    ends = tries(grid, task, method, cells)
    if None in ends.values():
        return None
    scores = {rate: end.score for rate, end in ends.items() if end}
    rate = chosen(scores, grid.choose) if scores else rates[0]
    curves = [cells(task, method, rate, seed, "report") for seed in range(grid.seeds)]
    known = [curve for curve in curves if curve]
    return Reported(task, method, rate, known) if known else None


def chosen(tried: Mapping[float, Score], by: Measure) -> float:
    """Return the rate of the best of these scores."""
    if by == "accuracy":
        most = max(score.accuracy for score in tried.values())
        tried = {rate: score for rate, score in tried.items() if score.accuracy == most}
    return best({rate: score.loss for rate, score in tried.items()})


def table(grid: Grid, rows: Sequence[Reported]) -> Iterator[str]:
    """Yield the results as Markdown, a table a task."""
    for task in grid.tasks:
        found = [row for row in rows if row.task == task]
        if not found:
            continue
        yield from [f"## {task}", "", f"{grid.tasks[task]}", ""]
        yield "| method | rate | seeds | accuracy, best round | bytes by then | forwards | s |"
        yield "|---|---|---|---|---|---|---|"
        for row in found:
            mean, error = row.at(row.peak)
            point = row.curves[0][row.peak]
            seconds, _ = mean_and_error(curve[-1].wall_s for curve in row.curves)
            yield (
                f"| {row.method} | {row.rate:g} of {len(grid.methods[row.method].rates)} | "
                f"{len(row.curves)} | {mean:.3f} ± {error:.3f} | "
                f"{point.bytes_up + point.bytes_down:,} | {point.forwards:,} | {seconds:.0f} |"
            )
        yield ""
        yield from _equal_accuracy(found)


def _equal_accuracy(rows: Sequence[Reported]) -> Iterator[str]:
    """Yield what LoRand's rows take to the best accuracy of the others."""
    ours = [row for row in rows if row.method.startswith("LoRand")]
    peers = [row for row in rows if row not in ours]
    if not ours or not peers:
        return
    yield "| to the best accuracy of | its forwards | bytes | by | accuracy | forwards | bytes |"
    yield "|---|---|---|---|---|---|---|"
    for peer in peers:
        mean, end = peer.at(peer.peak)[0], peer.curves[0][-1]
        for row in ours:
            point = first_at(row.curves, mean)
            said = "never | | |"
            if point:
                reached, error = row.at(row.curves[0].index(point))
                spent = point.bytes_up + point.bytes_down
                said = f"{reached:.3f} ± {error:.3f} | {point.forwards:,} | {spent:,} |"
            yield (
                f"| {peer.method}: {mean:.3f} | {end.forwards:,} | "
                f"{end.bytes_up + end.bytes_down:,} | {row.method} | {said}"
            )
    yield ""


def tried(grid: Grid) -> Iterator[str]:
    """Yield what tuning saw, as Markdown: of a grid that reports nothing."""
    yield "| task | method | rounds | bytes | rate: accuracy, loss |"
    yield "|---|---|---|---|---|"
    for task, method in grid.pairs:
        ends = tries(grid, task, method, looking(grid))
        found = {rate: end for rate, end in ends.items() if end}
        if not found:
            continue
        last = next(iter(found.values()))
        each = (
            f"{rate:g}: {end.score.accuracy:.3f}, {end.score.loss:.3f}"
            for rate, end in found.items()
        )
        yield (
            f"| {task} | {method} | {last.committed} | {last.bytes_up + last.bytes_down:,} | "
            f"{'; '.join(each)} |"
        )
    yield ""


def write(grid: Grid, rows: Sequence[Reported]) -> None:
    """Write GRID.md, GRID.csv and GRID.png; of a grid that only tries GRID.md alone."""
    head = [f"# {grid.name}", "", grid.about, ""]
    if not grid.seeds:
        grid.store.write_text("\n".join([*head, *tried(grid), grid.store.origin()]))
        return
    panels = []
    for task in grid.tasks:
        found = [row for row in rows if row.task == task]
        if found:
            panels.append([_panel(task, across, found) for across in grid.across])
    if len(grid.across) == 1:
        alone = [panel for (panel,) in panels]
        panels = [alone[at : at + IN_A_ROW] for at in range(0, len(alone), IN_A_ROW)]
    if panels:
        plots.draw(RESULTS / f"{grid.name}.png", panels, height=3.2)
    with (RESULTS / f"{grid.name}.csv").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["task", "method", "rate", "seed", *COLUMNS])
        for row in rows:
            for seed, curve in enumerate(row.curves):
                out.writerows([row.task, row.method, row.rate, seed, *_row(p)] for p in curve)
    how = f"Learning rates are chosen by {grid.choose}, on a tenth of the training data."
    text = [*head, how, "", *table(grid, rows)]
    text += [f"![accuracy]({grid.name}.png)", "", grid.store.origin()]
    grid.store.write_text("\n".join(text))


COLUMNS: Final = ("round", "forwards", "bytes_up", "bytes_down", "accuracy", "loss", "wall_s")


def _row(p: Point) -> list[float]:
    spent = [p.committed, p.forwards, p.bytes_up, p.bytes_down]
    return [*spent, p.score.accuracy, p.score.loss, p.wall_s]


def _panel(task: str, across: str, rows: Sequence[Reported]) -> plots.Panel:
    curves = []
    for row in rows:
        points = row.curves[0][1:]
        x = [p.bytes_up + p.bytes_down if across == "bytes" else p.forwards for p in points]
        if not any(x):
            continue  # one machine sends nothing
        both = [row.at(place) for place in range(1, len(row.curves[0]))]
        curves.append(plots.Curve(row.method, x, [m for m, _ in both], [e for _, e in both]))
    return plots.Panel(task, ACROSS[across], "accuracy, test", curves)


def main() -> None:
    """Run what is not there, and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("--only", default="", help="tasks and methods whose names hold this")
    parser.add_argument("--write", action="store_true", help="run nothing")
    given = parser.parse_args()
    grid = Grid.read(given.grid)
    wanted = [pair for pair in grid.pairs if given.only in " ".join(pair)]
    if not given.write:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn()) as progress:
            bar = progress.add_task(grid.name, total=len(wanted))
            for task, method in wanted:
                progress.update(bar, description=f"{task}: {method}")
                reported(grid, task, method, filling(grid))
                progress.advance(bar)
    found = (reported(grid, task, method, looking(grid)) for task, method in grid.pairs)
    write(grid, [row for row in found if row is not None])


if __name__ == "__main__":
    main()
