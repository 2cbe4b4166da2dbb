"""A worker's private examples: read from a source, kept in memory, sampled in batches."""

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any, Final, Self

import numpy as np

from lorand.config import TaskSection
from lorand.errors import ConfigError, DataError
from lorand_worker import sources
from lorand_worker.sources import Row, Source

Turn = tuple[str, str]
"""Who says something in a conversation ("system", "user", "assistant"), and what."""
ASSISTANT: Final = "assistant"


class _Columns:
    """Fields of equal length: one value an example."""

    def __len__(self) -> int:
        """Number of examples."""
        return len(next(iter(vars(self).values())))

    def only(self, indices: Sequence[int]) -> Self:
        """Return some of the examples."""
        columns = vars(self).items()
        return type(self)(**{name: tuple(column[i] for i in indices) for name, column in columns})


@dataclass(frozen=True)
class Examples(_Columns):
    """Texts and the index of each one's label in the run's label list."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Pairs(_Columns):
    """Prompts and their answers."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Texts(_Columns):
    """Texts that are learned as a whole."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class Chats(_Columns):
    """Conversations, whose assistant is learned."""

    turns: tuple[tuple[Turn, ...], ...]


Data = Examples | Pairs | Texts | Chats

LABEL_SHOWN: Final = 60
_SETTINGS: Final = {
    "text": "text_column",
    "label": "label_column",
    "prompt": "prompt_column",
    "answer": "answer_column",
    "messages": "messages_column",
}
"""The setting of [task] that names the column of each part of an example."""
_OTHER_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "text": ("review", "sentence", "content", "body", "comment", "tweet", "document", "text"),
    "label": ("labels", "stars", "rating", "sentiment", "class", "category", "target", "label"),
    "prompt": ("instruction", "question", "input", "query", "prompt"),
    "answer": ("completion", "response", "output", "answers", "target", "answer"),
    "messages": ("conversations", "conversation", "chat", "dialogue", "messages"),
}
"""What else columns are called, for a suggestion."""


def mapped(task: TaskSection, columns: str) -> TaskSection:
    """Return the task with columns named as in `text=review,label=stars`. Raises ConfigError."""
    parts = parts_of(task)
    changes = {}
    for each in filter(None, columns.split(",")):
        part, _, column = each.partition("=")
        if part.strip() not in parts or not column.strip():
            wanted = ",".join(f"{part}=COLUMN" for part in parts)
            raise ConfigError(
                f"--columns {columns}: this run's examples have {' and '.join(parts)}: write "
                f"--columns {wanted}, or those of them that are called otherwise"
            )
        changes[_SETTINGS[part.strip()]] = column.strip()
    return task.model_copy(update=changes)


def parts_of(task: TaskSection) -> tuple[str, ...]:
    """Return what an example of the task has."""
    if task.kind != "causal-lm":
        return ("text", "label")
    return {"pairs": ("prompt", "answer"), "text": ("text",), "chat": ("messages",)}[task.format]


def load(source: Source, task: TaskSection) -> Data:
    """Read the examples of a task, each with the parts that `parts_of` names.

    Raises DataError when the source is missing, unreadable, empty, has other columns or empty
    fields, or holds a label that the run does not know, and ModelError without a library it needs.
    """
    parts = parts_of(task)
    columns = [str(getattr(task, _SETTINGS[part])) for part in parts]
    table = sources.read(source, columns)
    found: list[list[Any]] = [[] for _ in parts]
    for place, row in table.rows:
        for part, column, values in zip(parts, columns, found, strict=True):
            where = f"{source}, {place}"
            if column not in row:
                raise DataError(f"{where}: {_advice(parts, columns, row)}")
            if part == "label":
                names = table.class_names.get(column, ())
                values.append(_label(where, row[column], names, task))
            elif part == "messages":
                values.append(_turns(where, row[column]))
            else:
                values.append(_filled(where, part, row[column]))
    if not found[0]:
        raise DataError(f"{source} holds no examples; give a file with at least one")
    kinds: dict[tuple[str, ...], Callable[..., Data]]
    kinds = {("prompt", "answer"): Pairs, ("text",): Texts, ("messages",): Chats}
    return kinds.get(parts, Examples)(*map(tuple, found))


def _advice(parts: Sequence[str], columns: Sequence[str], row: Row) -> str:
    """What columns are there, and how to say which are meant."""
    wanted = dict(zip(parts, columns, strict=True))
    free = [name for name in row if name not in columns]
    missing = [part for part, column in wanted.items() if column not in row]
    named = []
    for part in missing:
        likely = [name for name in _OTHER_NAMES[part] if name in free]
        if len(missing) == len(free) == 1:
            likely = free
        named.append(f"{part}={likely[0] if likely else 'COLUMN'}")
    settings = " and ".join(f"task.{_SETTINGS[part]}" for part in parts)
    plural = "s" * (len(columns) > 1)
    return (
        f"column{plural} {' and '.join(map(repr, columns))} {'are' if plural else 'is'} needed, "
        f"found {', '.join(map(repr, row))}; say which is meant with --columns "
        f"{','.join(named)}, or set {settings} in the run file"
    )


def _label(where: str, value: object, names: Sequence[str], task: TaskSection) -> int:
    """The index of a label: as it is written, or by its name where it is a number of a list."""
    label = _filled(where, "label", value).strip()
    if label not in task.labels:
        label = dict(zip(map(str, range(len(names))), names, strict=True)).get(label, label)
    if label not in task.labels:
        known = ", ".join(task.labels[:8]) + (", …" if len(task.labels) > 8 else "")
        shown = label if len(label) <= LABEL_SHOWN else label[:LABEL_SHOWN] + "…"
        raise DataError(
            f"{where}: the label {shown!r} is not one of the run's ({known}); "
            "correct the file or ask the coordinator's operator to add the label"
        )
    return task.labels.index(label)


def _filled(where: str, part: str, content: object) -> str:
    if isinstance(content, list | dict):
        raise DataError(
            f"{where}: the {part} is a list or an object, not a text; name another column with "
            "--columns"
            + ', or set task.format = "chat" for conversations'
            * (part in ("text", "prompt"))
        )
    if content is None or not str(content).strip():
        raise DataError(f"{where}: the {part} is empty; remove the line")
    return str(content)


def _turns(where: str, content: object) -> tuple[Turn, ...]:
    """A conversation: {"role", "content"} each turn, or {"from", "value"} as others have it."""
    named = {"human": "user", "gpt": ASSISTANT}
    turns: list[Turn] = []
    for turn in content if isinstance(content, list) else ():
        known = turn if isinstance(turn, Mapping) else {}
        role, said = known.get("role", known.get("from")), known.get("content", known.get("value"))
        if not isinstance(role, str) or not isinstance(said, str):
            turns = []
            break
        turns.append((named.get(role, role), said))
    if not turns:
        raise DataError(
            f'{where}: the messages are no list of {{"role": …, "content": …}} with texts; write, '
            'for example, [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": '
            '"Hi"}]'
        )
    if not any(role == ASSISTANT and said.strip() for role, said in turns):
        raise DataError(
            f"{where}: nothing in the messages is said by the assistant, so nothing is learned; "
            "remove the line"
        )
    return tuple(turns)


def missing_labels(examples: Data, task: TaskSection) -> list[str]:
    """Return the run's labels that this data never shows: allowed, and worth telling."""
    seen = set(examples.labels) if isinstance(examples, Examples) else set()
    return [label for position, label in enumerate(task.labels) if position not in seen]


def hold_out(examples: Data, share: float, source: str) -> tuple[Data, Data]:
    """Return the examples to train on, and about this share of them that is held out.

    A digest of an example's first part decides, so that it is the same each time, whatever the
    order of the rows, and equal texts are on one side. Raises DataError when nothing is left.
    """
    first = next(iter(vars(examples).values()))
    limit = floor(share * 2**64)
    held = [int.from_bytes(_digest(part)[:8]) < limit for part in first]
    parts = [i for i, out in enumerate(held) if not out], [i for i, out in enumerate(held) if out]
    if not parts[0] or not parts[1]:
        raise DataError(
            f"--validation {share:g} of the {len(examples)} examples of {source} leaves none to "
            f"{'train on' if not parts[0] else 'measure with'}: give another share, or more data"
        )
    return examples.only(parts[0]), examples.only(parts[1])


def _digest(part: object) -> bytes:
    return hashlib.sha256(json.dumps(part).encode()).digest()


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
