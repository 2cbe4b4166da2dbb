"""A2: which words of a batch its scalars tell, where an embedding is trained.

A text changes only the rows of its own tokens, so its gradient is sparse in blocks, and K over d
bounds nothing. Three ways to find the rows: the shortest gradient that fits; orthogonal matching
pursuit by rows (Eldar, Kuppinger, Bölcskei, IEEE TSP 2010, §V), which fits what it has found so far
and looks for the next row in what is left; and back-projection, all that signs allow. The attacker
is told how many different tokens there are: recall is then precision, and chance s/V.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from experiments.privacy_audit import subjects, view
from experiments.privacy_audit.recovery import CODECS, name_of
from experiments.privacy_audit.view import Places, View
from lorand.codec import Codec, Floats
from lorand.directions import Indices, Pool
from lorand.manifest import Manifest, TensorSpec
from lorand.replica import CopyReplica
from lorand_worker.estimators import Spsa

WORDS, WIDTH = 500, 16
POOLS: Final = (4096, 16384)
COUNTS: Final = (64, 128, 256, 512, 1024, 2048, 4096)
AT_ONCE: Final = 12
"""Steps in which matching pursuit finds all rows: a few rows a step where there are many."""


# -- a small model -------------------------------------------------------------------------------


class Bag(nn.Module):
    """The mean of a text's word vectors through tanh, and two logits; only words are trained."""

    def __init__(self, seed: int) -> None:
        """Draw the weights."""
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.head = nn.Linear(WIDTH, len(subjects.LABELS))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits, shape (2,), of one text's token ids."""
        mean = self.words(ids).mean(dim=0)
        return torch.as_tensor(self.head(torch.tanh(4 * mean)))


@dataclass(frozen=True)
class Small:
    """A worker that trains a small embedding of the commonest words by SPSA."""

    texts: Sequence[torch.Tensor]
    labels: Sequence[int]
    module: Bag
    replica: CopyReplica
    estimator: Spsa

    @staticmethod
    def of(seed: int, size: int) -> "Small":
        """Make it of UCI sentences of five words or more that it knows."""
        examples = subjects.sentences(2000, seed)
        texts = [re.findall(r"[a-z']+", text.lower()) for text in examples.texts]
        common = Counter(word for words in texts for word in words).most_common(WORDS)
        place = {word: at for at, (word, _) in enumerate(common)}
        known = [[place[word] for word in words if word in place] for words in texts]
        kept = [i for i, ids in enumerate(known) if len(set(ids)) >= 5]
        module = Bag(seed)
        spec = TensorSpec("words.weight", (WORDS, WIDTH), "float32")
        config = subjects.config_of("all", size, "spsa")
        pool = Pool((seed, 1), size, config.directions.quantum_exponent)
        replica = CopyReplica.of(module, Manifest((spec,)), pool)
        return Small(
            [torch.tensor(known[i]) for i in kept],
            [examples.labels[i] for i in kept],
            module,
            replica,
            Spsa(replica, config),
        )

    def loss(self, batch: Sequence[int]) -> torch.Tensor:
        """Return the mean cross-entropy of a batch."""
        logits = torch.stack([self.module(self.texts[i]) for i in batch])
        labels = torch.tensor([self.labels[i] for i in batch])
        return nn.functional.cross_entropy(logits, labels)


def small(seeds: int) -> list[dict[str, Any]]:
    """Return recall of words by pool, scalars, codec and method; SPSA, d = 8,000.

    In a pool smaller than d rows fall on each other: of two in the same buckets either fits, and
    the attacker takes the longer, or the first, which is the commoner word.
    """
    return [
        {**row, "pool": size, "dimension": WORDS * WIDTH}
        for size in POOLS
        for batch_size in (1, 8)
        for row in _small(size, batch_size, seeds)
    ]


def _small(size: int, batch_size: int, seeds: int) -> list[dict[str, Any]]:
    recalls: dict[tuple[int, str, str], list[float]] = {}
    numbers: list[float] = []
    for seed in range(seeds):
        subject = Small.of(seed, size)
        rows = Rows(View.of(subject.replica.manifest, subject.replica.pool), 0, WORDS, WIDTH)
        source = np.random.default_rng([seed, batch_size])
        order = source.permutation(size)[: COUNTS[-1]]
        batch = [int(i) for i in source.choice(len(subject.texts), batch_size, replace=False)]
        true = {int(word) for i in batch for word in subject.texts[i]}
        numbers.append(len(true))
        values = subject.estimator.measure(subject.loss, batch, order).values
        for count, codec in product(COUNTS, CODECS):
            told = view.coded(codec, values[:count])
            for method in methods_for(codec):
                guess = method(rows, told, order[:count], len(true))
                key = (count, name_of(codec), method.__name__)
                recalls.setdefault(key, []).append(len(true & guess) / len(true))
    return [
        {
            "batch_size": batch_size,
            "tokens": view.mean_and_error(numbers),
            "scalars": count,
            "codec": codec,
            "method": method.replace("_", " "),
            "recall": view.mean_and_error(hits),
            "chance": round(float(np.mean(numbers)) / WORDS, 3),
        }
        for (count, codec, method), hits in recalls.items()
    ]


# -- the attacks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of an embedding among all coordinates; what lies outside it and is small is known.

    `first` is the embedding's first coordinate. `others` are coordinates outside that are fitted
    from the start (a head); all else outside is noise to the attacker. `parts` of a row have
    buckets of their own. `candidates`, shape (count,), are the rows that are looked for.
    """

    view: View
    first: int
    count: int
    width: int
    others: Places | None = None
    parts: int = 1
    candidates: NDArray[np.bool_] | Literal[True] = True

    @cached_property
    def start(self) -> Places:
        """What is fitted from the start."""
        return np.empty(0, np.int64) if self.others is None else self.others

    def support(self, rows: Sequence[int]) -> Places:
        """Return the coordinates of these rows and of what is fitted anyway."""
        starts = self.first + np.array(rows, np.int64) * self.width
        return np.concatenate([self.start, (starts[:, None] + np.arange(self.width)).ravel()])

    def lengths(self, vector: Floats) -> Floats:
        """Return the squared length of each row's shortest part; −1 for what is no candidate.

        The shortest part, since a part of another row, or of a head, may lie in the same buckets.
        """
        inside = vector[self.first : self.first + self.count * self.width]
        squares = np.sum(inside.reshape(self.count, self.parts, -1) ** 2, axis=2).min(axis=1)
        return np.asarray(np.where(self.candidates, squares, -1.0))


def shortest(rows: Rows, values: Floats, indices: Indices, count: int) -> set[int]:
    """Return the longest rows of the shortest gradient that fits."""
    return _longest(rows.lengths(rows.view.solve(values, indices, iterations=60)), count)


def matching_pursuit(rows: Rows, values: Floats, indices: Indices, count: int) -> set[int]:
    """Return rows found one step after another, for as long as a fit leaves anything.

    Where scalars are too few to fit more rows, the rest are the longest in what was left.
    """
    found: list[int] = []
    left = values
    if rows.start.size:
        left = _left(rows, values, indices, found)
    step = max(1, count // AT_ONCE)
    room = (len(indices) // 2 - rows.start.size) // rows.width
    while True:
        lengths = rows.lengths(rows.view.back(left, indices))
        lengths[found] = np.inf
        if len(found) + step > min(count, room):
            return _longest(lengths, count)
        found = sorted(_longest(lengths, len(found) + step))
        left = _left(rows, values, indices, found)


def _left(rows: Rows, values: Floats, indices: Indices, found: Sequence[int]) -> Floats:
    support = rows.support(found)
    fit = rows.view.solve(values, indices, support, iterations=25)
    return values - rows.view.scalars(fit, indices, support)


def back_projection(rows: Rows, values: Floats, indices: Indices, count: int) -> set[int]:
    """Return the longest rows of Z s."""
    return _longest(rows.lengths(rows.view.back(values, indices)), count)


Method = Callable[[Rows, Floats, Indices, int], set[int]]


def methods_for(codec: Codec | None) -> tuple[Method, ...]:
    """Return the attacks: a fit needs magnitudes, which signs do not have."""
    if codec == "sign":
        return (back_projection,)
    return (shortest, matching_pursuit, back_projection)


def _longest(lengths: NDArray[np.float64], count: int) -> set[int]:
    return {int(row) for row in np.argsort(-lengths, kind="stable")[:count]}


# -- MiniLM --------------------------------------------------------------------------------------


def minilm(seeds: int) -> list[dict[str, Any]]:
    """Return recall of MiniLM's tokens from first-order sketches of 4,096 and 65,536 scalars.

    With the embedding and the head trained, d = 11.7 million, and with everything, 22.6 million.
    The attacker looks among the tokens of other sentences of the kind.
    """
    rows = []
    for trainable in ("name:word_embeddings|head", "all"):
        for size in (4096, 65536):
            config = subjects.config_of(trainable, size, "backprop")
            subject = subjects.minilm(config, subjects.sentences(200, 1), seed=0)
            for batch_size in (1, 16):
                rows += _of(subject, batch_size, seeds)
    return rows


def _of(subject: subjects.Subject, batch_size: int, seeds: int) -> list[dict[str, Any]]:
    rows, indices = _rows_of(subject), np.arange(subject.view.size)
    looked_for = int(np.sum(rows.candidates))
    recalls: dict[tuple[str, str], list[float]] = {}
    numbers: list[float] = []
    for seed in range(seeds):
        batch = subjects.batch_of(subject, batch_size, seed)
        true = subject.token_ids(batch)
        numbers.append(len(true))
        values = subject.estimator.measure(subject.task.loss, batch, indices).values
        for codec in CODECS:
            told = view.coded(codec, values)
            for method in methods_for(codec)[-2:]:  # the shortest fit is back-projection here
                guess = method(rows, told, indices, len(true))
                hit = len(true & guess) / len(true)
                recalls.setdefault((name_of(codec), method.__name__), []).append(hit)
    return [
        {
            "trainable": subject.config.model.trainable,
            "batch_size": batch_size,
            "tokens": view.mean_and_error(numbers),
            "scalars": subject.view.size,
            "dimension": subject.view.dimension,
            "codec": codec,
            "method": method.replace("_", " "),
            "recall": view.mean_and_error(hits),
            "chance": round(float(np.mean(numbers)) / looked_for, 5),
        }
        for (codec, method), hits in recalls.items()
    ]


def _rows_of(subject: subjects.Subject) -> Rows:
    """Where the embedding's rows are; the head and special tokens are fitted from the start."""
    at, first, count, width, others = 0, 0, 0, 0, []
    for spec in subject.replica.manifest.tensors:
        if spec.name.endswith("word_embeddings.weight"):
            first, (count, width) = at, spec.shape
        elif spec.name.startswith("head."):
            others.append(np.arange(at, at + spec.size))
        at += spec.size
    special = sorted(subjects.special_ids(subject.base))
    for row in special:
        others.append(np.arange(first + row * width, first + (row + 1) * width))
    candidates = np.zeros(count, bool)
    public = subject.base.loaded.tokenizer(list(subjects.sentences(3000, 1).texts[200:]))
    candidates[list({token for row in public["input_ids"] for token in row})] = True
    candidates[special] = False
    return Rows(subject.view, first, count, width, np.concatenate(others), 3, candidates)


def run(seeds: int) -> dict[str, Any]:
    """Return the rows of A2."""
    return {"small": small(seeds), "minilm": minilm(2 * seeds)}
