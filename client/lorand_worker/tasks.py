"""The task of a run on one worker's examples: token ids, batches, loss and accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorand_worker.boundary import Boundary
from lorand_worker.data import Examples
from lorand_worker.model import LoadedModel

CACHE_BYTES = 1 << 30
"""Most memory that kept hidden states may take; examples beyond it are computed each time."""
EVALUATION_BATCH = 64
LENGTH_GROUP = 8


@dataclass(frozen=True)
class Score:
    """Result on a whole data set: share correct, mean cross-entropy in nats, examples."""

    accuracy: float
    loss: float
    examples: int


class Classification:
    """Single-label classification: cross-entropy of the head's logits."""

    def __init__(
        self,
        model: LoadedModel,
        examples: Examples,
        *,
        trainable: set[str],
        max_length: int,
        device: torch.device | None = None,
    ) -> None:
        """Tokenise every example once; texts are cut at max_length tokens."""
        self._module = model.module
        self._device = device or torch.device("cpu")
        encoded = model.tokenizer(list(examples.texts), truncation=True, max_length=max_length)
        self._ids = [torch.tensor(ids) for ids in encoded["input_ids"]]
        self._pad = int(model.tokenizer.pad_token_id or 0)
        self._labels = torch.tensor(examples.labels)
        self._boundary = Boundary(model.module, trainable)
        self._kept: dict[int, torch.Tensor] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._ids)

    def loss(self, batch: Sequence[int]) -> torch.Tensor:
        """Return the mean cross-entropy of a batch of example indices, in nats.

        Computed in groups of similar length, so that little of a forward pass is padding.
        """
        order = sorted(batch, key=lambda i: len(self._ids[i]))
        groups = [order[i : i + LENGTH_GROUP] for i in range(0, len(order), LENGTH_GROUP)]
        total = torch.stack([self._total_loss(group) for group in groups]).sum()
        return total / len(order)

    def _total_loss(self, batch: Sequence[int]) -> torch.Tensor:
        target = self._labels[list(batch)].to(self._device)
        logits = self._logits(batch).float()
        return nn.functional.cross_entropy(logits, target, reduction="sum")

    @torch.no_grad()
    def score(self) -> Score:
        """Return accuracy and loss over all examples."""
        order = sorted(range(len(self)), key=lambda i: len(self._ids[i]))
        correct, total = 0, 0.0
        for start in range(0, len(order), EVALUATION_BATCH):
            batch = order[start : start + EVALUATION_BATCH]
            logits = self._logits(batch).float()
            target = self._labels[batch].to(self._device)
            correct += int((logits.argmax(dim=-1) == target).sum())
            total += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
        return Score(correct / len(self), total / len(self), len(self))

    def _logits(self, batch: Sequence[int]) -> torch.Tensor:
        ids, mask = self._pad_ids(batch)
        if self._boundary.depth == 0:
            return torch.as_tensor(self._module(ids, mask))
        self._keep([i for i in batch if i not in self._kept])
        if any(i not in self._kept for i in batch):  # the memory limit is reached
            return torch.as_tensor(self._module(ids, mask))
        hidden = nn.utils.rnn.pad_sequence([self._kept[i] for i in batch], batch_first=True)
        with self._boundary.resume(hidden):
            return torch.as_tensor(self._module(ids, mask))

    @torch.no_grad()
    def _keep(self, missing: list[int]) -> None:
        """Compute and keep the boundary's hidden states of examples not seen before."""
        if not missing or self._kept_bytes >= CACHE_BYTES:
            return
        ids, mask = self._pad_ids(missing)
        with self._boundary.capture() as seen:
            self._module(ids, mask)
        for row, i in enumerate(missing):
            hidden = seen[0][row, : len(self._ids[i])].clone()
            self._kept[i] = hidden
            self._kept_bytes += hidden.numel() * hidden.element_size()

    def _pad_ids(self, batch: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self._ids[i] for i in batch]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
        return ids.to(self._device), mask.to(self._device)
