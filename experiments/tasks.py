"""The public data sets of the experiments, split into shards of workers and scored examples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments import federation, uci_sentiment
from lorand_worker.data import Examples

SCORED = 500
"""At most so many of the held-out examples are scored, so that scoring is the smaller part."""
LABELS = {
    "subj": ("objective", "subjective"),
    "mr": ("negative", "positive"),
    "uci": ("negative", "positive"),
}


@dataclass(frozen=True)
class Task:
    """Shards of the workers and the examples that are scored."""

    shards: Sequence[Examples]
    scored: Examples


def load(name: str, *, workers: int, seed: int, held_out: bool) -> Task:
    """Return a task for so many workers; `held_out` scores a tenth of the training data instead.

    Subj and MR are dealt out at random (by `seed`); UCI by its three domains, or pooled to one.
    """
    if name == "uci":
        shards, test = uci_sentiment.shards_and_test(held_out)
        if workers == 1:
            shards = [federation.pool(shards)]
        assert len(shards) == workers, "UCI has three domains"
        return Task(shards, _first(test))
    train, test = federation.shuffled_split(_lines(name))
    if held_out:
        train, test = federation.shuffled_split(train)
    order = np.random.default_rng(1000 + seed).permutation(len(train))
    parts = np.array_split(order, workers)
    return Task([federation.subset(train, part.tolist()) for part in parts], _first(test))


def _first(examples: Examples) -> Examples:
    return federation.subset(examples, range(min(SCORED, len(examples))))


def _lines(name: str) -> Examples:
    file = {"subj": "subj.all", "mr": "rt-polarity.all"}[name]
    text = (federation.DATA / name / file).read_text(encoding="latin-1")
    rows = [line.partition(" ") for line in text.split("\n") if line.strip()]
    return Examples(
        tuple(text.strip() for _, _, text in rows), tuple(int(label) for label, _, _ in rows)
    )
