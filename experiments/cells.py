"""Cells of an experiment: one run a cell, kept in experiments/results/NAME.json as soon as it ends.

A cell that is there is not run again: an interrupted experiment goes on where it stopped, and
several processes may fill one file.
"""

import fcntl
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numba
import torch

from experiments.federation import Point
from experiments.provenance import provenance

RESULTS = Path(__file__).resolve().parent / "results"
Purpose = Literal["tune", "report"]
Run = Callable[[], Sequence[Point]]


@dataclass(frozen=True)
class Cell:
    """One run: `tune` is scored on a tenth of the training data, `report` on test data."""

    method: str
    task: str
    learning_rate: float
    seed: int
    purpose: Purpose


class Store:
    """The cells of one results file."""

    def __init__(self, name: str, about: str) -> None:
        """Keep cells in results/NAME.json; `about` says what the file claims."""
        self.path = RESULTS / f"{name}.json"
        self._about = about

    def fill(
        self, cell: Cell, settings: dict[str, Any], run: Run, *, exact: bool = False
    ) -> list[Point]:
        """Return the points of a cell, from the file or by running it now.

        With `exact` one that was run with other settings is run again.
        """
        asked = settings if exact else None
        if (known := self.points(cell, asked)) is not None:
            return known
        torch.set_num_threads(1)
        numba.set_num_threads(1)
        print(cell, flush=True)
        points = run()
        last = points[-1]
        print(f"  {last.score.accuracy:.4f} {last.score.loss:.4f} {last.wall_s:.0f} s", flush=True)
        row = {
            **asdict(cell),
            "settings": settings,
            "provenance": provenance(),
            "scored_examples": last.score.examples,
            "points": [_plain(point) for point in points],
        }
        with self._locked():
            content = self.read()
            content["cells"].append(row)
            self._write(content)
        return self.points(cell, asked) or []

    def points(self, cell: Cell, settings: dict[str, Any] | None = None) -> list[Point] | None:
        """Return the points of a cell that was run: with these settings, or the last with any."""
        wanted = asdict(cell) if settings is None else {**asdict(cell), "settings": settings}
        for row in self.read()["cells"]:
            if wanted.items() <= row.items():
                return [_point(values, row["scored_examples"]) for values in row["points"]]
        return None

    def read(self) -> dict[str, Any]:
        """Return the whole file."""
        cells: tuple[dict[str, Any], ...] = ()
        if self.path.exists():
            now = self.path.stat()
            cells = _cells(self.path, (now.st_ino, now.st_mtime_ns, now.st_size))
        return {"about": self._about, "columns": COLUMNS, "cells": list(cells)}

    def write_text(self, text: str) -> None:
        """Write NAME.md beside the results."""
        self.path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")

    def origin(self) -> str:
        """Return hardware, versions, commits and dates of all cells as a sentence."""
        made = [row["provenance"] for row in self.read()["cells"]]
        names = list(made[0]) if made else []
        parts = [f"{name} {', '.join(sorted({m[name] for m in made}))}" for name in names]
        return "One thread; " + "; ".join(parts) + "."

    @contextmanager
    def _locked(self) -> Iterator[None]:
        RESULTS.mkdir(exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _write(self, content: dict[str, Any]) -> None:
        rows = ",\n".join(json.dumps(row) for row in content.pop("cells"))
        head = json.dumps(content, indent=1).removesuffix("\n}")
        partial = self.path.with_suffix(".partial")
        partial.write_text(f'{head},\n "cells": [\n{rows}\n]\n}}\n', encoding="utf-8")
        partial.replace(self.path)


@lru_cache(maxsize=32)
def _cells(path: Path, version: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
    """The rows of a results file, which a page of results looks up one by one."""
    return tuple(json.loads(path.read_text(encoding="utf-8"))["cells"])


COLUMNS = ("round", "forwards", "bytes_up", "bytes_down", "accuracy", "loss", "wall_s")


def _plain(point: Point) -> list[float]:
    score = point.score
    spent = [point.committed, point.forwards, point.bytes_up, point.bytes_down]
    return [*spent, round(score.accuracy, 5), round(score.loss, 5), point.wall_s]


def _point(values: Sequence[Any], examples: int) -> Point:
    from lorand_worker.tasks import Score

    committed, forwards, up, down, accuracy, loss, wall = values
    return Point(committed, Score(accuracy, loss, examples), forwards, up, down, wall)


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and its standard error (0 for a single value)."""
    known = list(values)
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else 0.0
    return statistics.fmean(known), error


def best(losses: dict[float, float]) -> float:
    """Return the learning rate with the lowest finite loss."""
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def first_at(curves: Sequence[Sequence[Point]], accuracy: float) -> Point | None:
    """Return the first scored point at which the mean accuracy is at least this; None: nowhere."""
    for place, point in enumerate(curves[0]):
        mean = statistics.fmean(curve[place].score.accuracy for curve in curves)
        if point.committed and mean >= accuracy:
            return point
    return None


def show(found: tuple[float, float]) -> str:
    """Return mean and standard error as pages have them."""
    return f"{found[0]:.3f} ± {found[1]:.3f}".replace("0.", ".")


def load(path: Path) -> dict[str, Any]:
    """Return a results file; empty where it is not there."""
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def link(name: str) -> str:
    """Return a link to a page of results."""
    suffix = "md" if (RESULTS / f"{name}.md").exists() else "json"
    return f"[{name}](../experiments/results/{name}.{suffix})"
