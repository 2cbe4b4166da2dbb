"""Fine-tuning of a causal language model: answers to prompts, whole texts, or conversations."""

from collections.abc import Sequence

import torch
from torch import nn

from lorand.sections import TaskSection
from lorand_worker.data import Chats, Pairs, Texts
from lorand_worker.model import LoadedModel
from lorand_worker.tasks import answers
from lorand_worker.tasks.base import Forward, Judged, Targets, Task


class CausalLM(Task):
    """Cross-entropy of the tokens that are learned: an answer's, and what ends it.

    An example's loss is the mean over its own such tokens, a batch's the mean over examples: a
    long answer counts as much as a short one. Tokens of a prompt are not predicted. The score's
    accuracy is the share of all learned tokens that the model, given those before, puts first.
    """

    unit = "tokens"

    def __init__(
        self,
        model: LoadedModel,
        examples: Pairs | Texts | Chats,
        *,
        task: TaskSection,
        trainable: set[str],
        max_length: int,
        device: torch.device | None = None,
        forward: Forward | None = None,
    ) -> None:
        """Tokenise every example once. A prompt is cut where it is too long, an answer never.

        Raises DataError for an answer without tokens, or too long for max_length.
        """
        found = answers.of(model.tokenizer, examples, task, max_length)
        self._learned = [
            torch.tensor([row[at] for at in places])
            for row, places in zip(found.ids, found.learned, strict=True)
        ]
        # A token is predicted at the one before it.
        self._places = [torch.tensor(places) - 1 for places in found.learned]
        self.cut = found.cut
        super().__init__(model, found.ids, trainable=trainable, device=device, forward=forward)

    def _targets(self, batch: Sequence[int]) -> Targets:
        sizes = torch.tensor([len(self._learned[i]) for i in batch])
        rows = torch.repeat_interleave(torch.arange(len(batch)), sizes)
        columns = torch.cat([self._places[i] for i in batch])
        labels = torch.cat([self._learned[i] for i in batch])
        places = rows.to(self._device), columns.to(self._device)
        return Targets(labels.to(self._device), places)

    def _judge(self, logits: torch.Tensor, targets: Targets, count: int) -> Judged:
        assert targets.places is not None
        rows = targets.places[0]
        tokens = nn.functional.cross_entropy(logits, targets.labels, reduction="none")
        sizes = torch.bincount(rows, minlength=count)
        losses = tokens.new_zeros(count).index_add(0, rows, tokens / sizes[rows])
        correct = (logits.argmax(dim=-1) == targets.labels).sum()
        return Judged(losses, correct, len(targets.labels))
