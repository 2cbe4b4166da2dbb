"""What scripts give as data: a file, rows, or examples that are ready."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path

from lorand.errors import DataError
from lorand.sections import TaskSection
from lorand_worker import data
from lorand_worker.data import Data, Examples, Pairs

Rows = Sequence[tuple[str, str]]
"""Text and label of each example, or prompt and answer."""

Shard = Data | Path | str | Rows


def examples_of(shard: Shard, task: TaskSection, what: str) -> Data:
    """Return a shard's examples; `what` names it in errors. Raises DataError."""
    if isinstance(shard, Data):
        return shard
    if isinstance(shard, str | Path):
        return data.load(Path(shard), task)
    if not shard:
        raise DataError(f"{what} holds no examples: give at least one")
    if not all(isinstance(row, tuple | list) and len(row) == 2 for row in shard):
        raise DataError(f"{what}: rows are pairs (text, label), or (prompt, answer)")
    first, second = (tuple(str(row[column]) for row in shard) for column in (0, 1))
    if task.kind == "causal-lm":
        return Pairs(first, second)
    places: Mapping[str, int] = {label: place for place, label in enumerate(task.labels)}
    unknown = sorted(set(second) - places.keys())
    if unknown:
        raise DataError(
            f"{what}: the label {unknown[0]!r} is not one of the run's ({', '.join(task.labels)})"
        )
    return Examples(first, tuple(places[label] for label in second))


def joined(parts: Sequence[Data]) -> Data:
    """Return all examples of shards of one kind, one after another."""
    first = parts[0]
    columns = (chain.from_iterable(getattr(p, f.name) for p in parts) for f in fields(first))
    return type(first)(*map(tuple, columns))
