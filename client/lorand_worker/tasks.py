"""The task of a run on one worker's examples: token ids, batches, loss and accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lorand_worker.boundary import Boundary
from lorand_worker.cache import Limits, TensorCache
from lorand_worker.data import Examples
from lorand_worker.grouping import groups, launch_tokens
from lorand_worker.model import LoadedModel
from lorand_worker.precision import Precision, passes


@dataclass(frozen=True)
class Score:
    """Result on a whole data set: share correct, mean cross-entropy in nats, examples."""

    accuracy: float
    loss: float
    examples: int


@dataclass(frozen=True)
class Forward:
    """How this machine runs forward passes; it changes results by rounding only."""

    precision: Precision = Precision.FLOAT32
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class _Group:
    """Examples of similar length, padded, on the device: all that a forward pass needs.

    `ids` and `mask` are (batch, length), `labels` (batch,), `hidden`, where layers are frozen, the
    boundary's states, (batch, length, width).
    """

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    hidden: torch.Tensor | None


class Classification:
    """Single-label classification: cross-entropy of the head's logits.

    What cannot change is computed once: token ids, the groups and padding of a batch for as long as
    it is measured, and an example's hidden states below the first trained layer. Those depend in
    their last bits on what an example was first padded with: at most rounding, and the same bits
    for all passes of a measurement. The cache belongs to this task alone, so that held-out examples
    take no room from those trained on.
    """

    def __init__(
        self,
        model: LoadedModel,
        examples: Examples,
        *,
        trainable: set[str],
        max_length: int,
        device: torch.device | None = None,
        forward: Forward | None = None,
    ) -> None:
        """Tokenise every example once; texts are cut at max_length tokens."""
        forward = forward or Forward()
        self._module = model.module
        self._device = device or torch.device("cpu")
        self._precision = forward.precision
        self._launch = launch_tokens(self._device, forward.precision)
        encoded = model.tokenizer(list(examples.texts), truncation=True, max_length=max_length)
        self._ids = [torch.tensor(ids) for ids in encoded["input_ids"]]
        self._pad = int(model.tokenizer.pad_token_id or 0)
        self._labels = torch.tensor(examples.labels)
        self._cache = TensorCache(forward.limits)
        self._measured: tuple[tuple[int, ...], list[_Group]] = ((), [])
        self._scored: list[list[int]] = []
        self._boundary = Boundary(model.module, trainable)
        with passes(self._precision, self._device):
            self._boundary.verify(*self._pad_ids(range(min(2, len(self)))))

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._ids)

    def loss(self, batch: Sequence[int]) -> torch.Tensor:
        """Return the mean cross-entropy of a batch of example indices, in nats.

        The last batch is kept as prepared: an estimator asks for its loss many times.
        """
        key = tuple(batch)
        if self._measured[0] != key:
            self._measured = (key, [self._prepare(group) for group in self._cut(key)])
        prepared = self._measured[1]
        # One context for all groups: in it autocast casts a trained weight only once.
        with passes(self._precision, self._device):
            logits = [self._logits(group) for group in prepared]
        losses = [
            nn.functional.cross_entropy(row.float(), group.labels, reduction="sum")
            for row, group in zip(logits, prepared, strict=True)
        ]
        return torch.stack(losses).sum() / len(key)

    @torch.no_grad()
    def score(self) -> Score:
        """Return accuracy and loss over all examples."""
        self._scored = self._scored or self._cut(range(len(self)))
        correct, total = 0, 0.0
        for indices in self._scored:
            group = self._prepare(indices)
            with passes(self._precision, self._device):
                logits = self._logits(group)
            correct += int((logits.argmax(dim=-1) == group.labels).sum())
            loss = nn.functional.cross_entropy(logits.float(), group.labels, reduction="sum")
            total += float(loss)
        return Score(correct / len(self), total / len(self), len(self))

    def _logits(self, group: _Group) -> torch.Tensor:
        if group.hidden is None:
            return torch.as_tensor(self._module(group.ids, group.mask))
        with self._boundary.resume(group.hidden):
            return torch.as_tensor(self._module(group.ids, group.mask))

    def _cut(self, batch: Sequence[int]) -> list[list[int]]:
        """The batch in groups of similar length."""
        lengths = [len(self._ids[i]) for i in batch]
        return [[batch[at] for at in group] for group in groups(lengths, self._launch)]

    def _prepare(self, batch: Sequence[int]) -> _Group:
        ids, mask = self._pad_ids(batch)
        labels = self._labels[list(batch)].to(self._device)
        return _Group(ids, mask, labels, self._hidden(batch) if self._boundary.depth else None)

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
