"""What every task shares: examples as token ids, batches in groups, losses and a score."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from lorand.errors import ModelError
from lorand_worker.boundary import Boundary
from lorand_worker.cache import Limits, TensorCache
from lorand_worker.grouping import groups, launch_tokens
from lorand_worker.heads import Places
from lorand_worker.model import LoadedModel
from lorand_worker.precision import Precision, passes

NEAR: Final = 4
"""Some models keep so many of their positions, at most, for other things than a text's tokens."""


@dataclass(frozen=True)
class Score:
    """Result on a whole data set: share correct, mean loss in nats, number of examples.

    The share is of examples, or of answer tokens where answers are what is learned.
    """

    accuracy: float
    loss: float
    examples: int
    of: str = "examples"

    def text(self) -> str:
        """Return it for people."""
        token = "token " * (self.of == "tokens")
        return (
            f"{token}accuracy {self.accuracy:.4f}, loss {self.loss:.4f} on {self.examples} examples"
        )


@dataclass(frozen=True)
class Forward:
    """How this machine runs forward passes; it changes results by rounding only."""

    precision: Precision = Precision.FLOAT32
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Targets:
    """What the passes of a group are judged by.

    `labels` are class indices or token ids, shape (targets,): one an example, unless `places` says
    where in the group each target is predicted.
    """

    labels: torch.Tensor
    places: Places | None = None


@dataclass(frozen=True)
class Judged:
    """A group's losses in nats, shape (batch,); how many targets were hit, and of how many."""

    losses: torch.Tensor
    correct: torch.Tensor
    targets: int


@dataclass(frozen=True)
class _Group:
    """Examples of similar length, padded, on the device: all that a forward pass needs.

    `ids` and `mask` are (batch, length), `hidden`, where layers are frozen, the boundary's states,
    (batch, length, width).
    """

    ids: torch.Tensor
    mask: torch.Tensor
    targets: Targets
    hidden: torch.Tensor | None


class Task(ABC):
    """A loss on one worker's examples; a kind says what it predicts (`_targets`, `_judge`).

    What cannot change is computed once: token ids, the groups and padding of a batch for as long as
    it is measured, and an example's hidden states below the first trained layer. Those depend in
    their last bits on what an example was first padded with: at most rounding, and the same bits
    for all passes of a measurement. The cache belongs to this task alone, so that held-out examples
    take no room from those trained on.
    """

    unit = "examples"
    """What the score's accuracy is a share of."""
    cut = 0
    """Number of prompts that were too long for max_length and lost the end of their text."""

    def __init__(
        self,
        model: LoadedModel,
        ids: Sequence[Sequence[int]],
        *,
        trainable: set[str],
        device: torch.device | None = None,
        forward: Forward | None = None,
    ) -> None:
        """Take the token ids of every example. Raises ModelError for more than the model takes."""
        forward = forward or Forward()
        self._module = model.module
        self._device = device or torch.device("cpu")
        self._precision = forward.precision
        self._launch = launch_tokens(self._device, forward.precision)
        self._ids = [torch.tensor(row) for row in ids]
        self._pad = int(model.tokenizer.pad_token_id or 0)
        self._cache = TensorCache(forward.limits)
        self._measured: tuple[tuple[int, ...], list[list[int]], list[_Group]] = ((), [], [])
        self._scored: list[list[int]] = []
        self._check_length()
        self._boundary = Boundary(model.module, trainable)
        with passes(self._precision, self._device):
            self._boundary.verify(*self._pad_ids(range(min(2, len(self)))))

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._ids)

    @torch.no_grad()
    def _check_length(self) -> None:
        """Try the longest example where it is near the number of positions that the model has."""
        configs: list[Any] = [getattr(part, "config", None) for part in self._module.modules()]
        known = [getattr(config, "max_position_embeddings", None) for config in configs]
        positions = min((n for n in known if isinstance(n, int)), default=None)
        longest = max(range(len(self)), key=lambda i: len(self._ids[i]))
        length = len(self._ids[longest])
        if positions is None or length + NEAR < positions:
            return
        try:
            with passes(self._precision, self._device):
                self._module(*self._pad_ids([longest]))
        except (IndexError, RuntimeError) as error:
            raise ModelError(
                f"example {longest + 1} has {length} tokens, more than this model has positions "
                f"for ({positions}, some of them not for texts): set model.max_length in the run "
                f"file to {positions - NEAR} or less"
            ) from error

    def at_limit(self, length: int) -> float:
        """Return the share of examples that have as many tokens as they may have, or more."""
        return sum(len(row) >= length for row in self._ids) / len(self)

    def loss(self, batch: Sequence[int]) -> torch.Tensor:
        """Return the mean loss of a batch of example indices, in nats: that of `losses`."""
        return self.losses(batch).mean()

    def losses(self, batch: Sequence[int]) -> torch.Tensor:
        """Return each example's loss, shape (batch,), float32, in nats, in the order of the batch.

        The last batch is kept as prepared: an estimator asks for its losses many times.
        """
        key = tuple(batch)
        if self._measured[0] != key:
            cut = self._cut(key)
            self._measured = (key, cut, [self._prepare(group) for group in cut])
        _, cut, prepared = self._measured
        # One context for all groups: in it autocast casts a trained weight only once.
        with passes(self._precision, self._device):
            logits = [self._logits(group) for group in prepared]
        judged = [
            self._judge(row.float(), group.targets, len(group.ids)).losses
            for row, group in zip(logits, prepared, strict=True)
        ]
        place = {i: at for at, i in enumerate(i for group in cut for i in group)}
        return torch.cat(judged)[[place[i] for i in key]]

    @torch.no_grad()
    def score(self, examples: Sequence[int] = ()) -> Score:
        """Return accuracy and loss over these examples, all if none are named."""
        if not examples:
            examples = range(len(self))
            self._scored = self._scored or self._cut(examples)
        correct, targets, total = 0, 0, 0.0
        for indices in self._scored if len(examples) == len(self) else self._cut(examples):
            group = self._prepare(indices)
            with passes(self._precision, self._device):
                logits = self._logits(group)
            judged = self._judge(logits.float(), group.targets, len(indices))
            correct += int(judged.correct)
            targets += judged.targets
            total += float(judged.losses.sum())
        return Score(correct / targets, total / len(examples), len(examples), self.unit)

    @abstractmethod
    def _targets(self, batch: Sequence[int]) -> Targets:
        """What examples are judged by, as the rows of one group, on the device."""

    @abstractmethod
    def _judge(self, logits: torch.Tensor, targets: Targets, count: int) -> Judged:
        """Judge a group of `count` examples by logits, float32, (targets, classes or tokens)."""

    def _logits(self, group: _Group) -> torch.Tensor:
        places = () if group.targets.places is None else (group.targets.places,)
        if group.hidden is None:
            return torch.as_tensor(self._module(group.ids, group.mask, *places))
        with self._boundary.resume(group.hidden):
            return torch.as_tensor(self._module(group.ids, group.mask, *places))

    def _cut(self, batch: Sequence[int]) -> list[list[int]]:
        """The batch in groups of similar length."""
        lengths = [len(self._ids[i]) for i in batch]
        return [[batch[at] for at in group] for group in groups(lengths, self._launch)]

    def _prepare(self, batch: Sequence[int]) -> _Group:
        ids, mask = self._pad_ids(batch)
        hidden = self._hidden(batch) if self._boundary.depth else None
        return _Group(ids, mask, self._targets(batch), hidden)

    def _hidden(self, batch: Sequence[int]) -> torch.Tensor:
        """Return the boundary's hidden states, from the cache where it has them."""
        found = {i: self._cache.get(i) for i in batch}
        known = {i: states for i, states in found.items() if states is not None}
        missing = [i for i in found if i not in known]
        if missing:
            with passes(self._precision, self._device):
                computed = self._boundary.states(*self._pad_ids(missing))
            for i, states in zip(missing, computed, strict=True):
                known[i] = states[: len(self._ids[i])]
                self._cache.put(i, known[i])
        rows = [known[i].to(self._device) for i in batch]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _pad_ids(self, batch: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self._ids[i] for i in batch]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
        return ids.to(self._device), mask.to(self._device)
