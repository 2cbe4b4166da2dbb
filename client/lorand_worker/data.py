"""A worker's private examples: read from one file, kept in memory, sampled in batches."""

import csv
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Final

import numpy as np

from lorand.config import TaskSection
from lorand.errors import DataError

MAX_FILE_BYTES: Final = 2 << 30


@dataclass(frozen=True)
class Examples:
    """Texts and the index of each one's label in the run's label list."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.texts)


@dataclass(frozen=True)
class Pairs:
    """Prompts and their answers."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.prompts)


def load(path: Path, task: TaskSection) -> Examples | Pairs:
    """Read the examples of a task from a CSV, TSV or JSON-lines file: Pairs for causal-lm.

    The first line of a CSV or TSV names the columns. Raises DataError when the file is missing,
    unreadable, empty, has other columns or empty fields, or holds a label that the run does not
    know.
    """
    if task.kind == "causal-lm":
        columns = _columns(
            path, "prompt_column", task.prompt_column, "answer_column", task.answer_column
        )
        rows = [
            (_filled(path, line, "prompt", p), _filled(path, line, "answer", a))
            for line, p, a in columns
        ]
        return Pairs(tuple(p for p, _ in rows), tuple(a for _, a in rows))
    return _labelled(path, task)


def _labelled(path: Path, task: TaskSection) -> Examples:
    index = {label: position for position, label in enumerate(task.labels)}
    texts: list[str] = []
    labels: list[int] = []
    columns = _columns(path, "text_column", task.text_column, "label_column", task.label_column)
    for line, text, label in columns:
        label = label.strip()
        if label not in index:
            known = ", ".join(task.labels[:8]) + (", …" if len(task.labels) > 8 else "")
            raise DataError(
                f"{path}, line {line}: the label {label!r} is not one of the run's ({known}); "
                "correct the file or ask the coordinator's operator to add the label"
            )
        texts.append(_filled(path, line, "text", text))
        labels.append(index[label])
    return Examples(tuple(texts), tuple(labels))


def _columns(
    path: Path, first_setting: str, first: str, second_setting: str, second: str
) -> Iterator[tuple[int, str, str]]:
    """Yield each example's line and its two fields, named by two settings of [task]."""
    empty = True
    for line, row in _rows(path):
        one, other = row.get(first), row.get(second)
        if one is None or other is None:
            raise DataError(
                f"{path}, line {line}: columns {first!r} and {second!r} are "
                f"needed, found {', '.join(map(repr, row))}; rename them or set "
                f"task.{first_setting} and task.{second_setting} in the run file"
            )
        empty = False
        yield line, str(one), str(other)
    if empty:
        raise DataError(f"{path} holds no examples; give a file with at least one")


def _filled(path: Path, line: int, what: str, content: str) -> str:
    if not content.strip():
        raise DataError(f"{path}, line {line}: the {what} is empty; remove the line")
    return content


def missing_labels(examples: Examples | Pairs, task: TaskSection) -> list[str]:
    """Return the run's labels that this data never shows: allowed, and worth telling."""
    seen = set(examples.labels) if isinstance(examples, Examples) else set()
    return [label for position, label in enumerate(task.labels) if position not in seen]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    suffix = path.suffix.lower()
    if suffix not in {".csv", ".tsv", ".jsonl"}:
        raise DataError(f"{path}: the data file must end in .csv, .tsv or .jsonl")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path} is larger than 2 GB; give the worker a smaller shard")
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix == ".jsonl":
                yield from _json_lines(path, file)
            else:
                reader = csv.DictReader(
                    file, delimiter="\t" if suffix == ".tsv" else ",", strict=True
                )
                for row in reader:
                    yield reader.line_num, {str(k): v for k, v in row.items() if k is not None}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the data file {path}: {error}") from error


def _json_lines(path: Path, file: Iterator[str]) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: each line must be one JSON object")
        yield number, row


class Sampler:
    """Batches of example indices: shuffled epochs, without replacement inside one.

    The shuffling uses the operating system's randomness (DESIGN §5, invariant 7): nobody can
    predict a worker's batches. Experiments inject a seeded `random.Random` to be repeatable.
    """

    def __init__(self, count: int, batch_size: int, source: random.Random | None = None) -> None:
        """Sample from range(count); a batch is never larger than the data."""
        self._count = count
        self._batch_size = min(batch_size, count)
        self._source = source or random.SystemRandom()
        self._left: list[int] = []

    def batch(self, size: int = 0) -> list[int]:
        """Return the next batch of distinct indices; of another size than usual if one is given."""
        size = min(size, self._count) or self._batch_size
        if len(self._left) < size:
            self._left = list(range(self._count))
            self._source.shuffle(self._left)
        taken, self._left = self._left[:size], self._left[size:]
        return taken


class PoissonSampler:
    """Batches in which each example is with the same chance, on its own, each time anew.

    What a sampled release costs is only known of this sampling, and only while nobody knows who was
    in a batch: shuffled epochs are something else, and a public seed tells all. A batch may be
    empty, and its size is private.
    """

    def __init__(
        self, count: int, rate: float, cap: int = 0, source: Callable[[int], bytes] = os.urandom
    ) -> None:
        """Sample from range(count); a batch beyond the cap (0: none) is cut at random.

        `source` gives random bytes; experiments inject a seeded one, and are not private.
        """
        self._count = count
        self._threshold = np.uint64(floor(rate * 2**53))  # rounded down: never more likely
        self._cap = cap
        self._source = source

    def batch(self) -> list[int]:
        """Return the next batch, distinct indices in ascending order."""
        taken = np.flatnonzero(self._numbers(self._count) < self._threshold)
        if self._cap and len(taken) > self._cap:
            order = np.argsort(self._numbers(len(taken)), kind="stable")
            taken = np.sort(taken[order[: self._cap]])
        return [int(index) for index in taken]

    def _numbers(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """Return integers below 2^53, all alike likely, shape (count,)."""
        words = np.frombuffer(self._source(8 * count), "<u8")
        return words.astype(np.uint64) >> np.uint64(11)
