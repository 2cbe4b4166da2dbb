"""Classification by a head: one logit a label."""

from collections.abc import Sequence

import torch
from torch import nn

from lorand_worker.data import Examples
from lorand_worker.model import LoadedModel
from lorand_worker.tasks.base import Forward, Judged, Targets, Task


class Classification(Task):
    """Single-label classification: cross-entropy of the head's logits."""

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
        encoded = model.tokenizer(list(examples.texts), truncation=True, max_length=max_length)
        self._labels = torch.tensor(examples.labels)
        super().__init__(
            model, encoded["input_ids"], trainable=trainable, device=device, forward=forward
        )

    def _targets(self, batch: Sequence[int]) -> Targets:
        return Targets(self._labels[list(batch)].to(self._device))

    def _judge(self, logits: torch.Tensor, targets: Targets, count: int) -> Judged:
        return judged_by_class(logits, targets.labels)


def judged_by_class(logits: torch.Tensor, labels: torch.Tensor) -> Judged:
    """Return the cross-entropy of logits, shape (batch, classes), and how many are the largest."""
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return Judged(losses, (logits.argmax(dim=-1) == labels).sum(), len(labels))
