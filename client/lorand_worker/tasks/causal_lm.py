"""Fine-tuning of a causal language model on prompts and their answers."""

from collections.abc import Sequence

import torch
from torch import nn

from lorand.errors import DataError
from lorand.sections import PLAIN_TEMPLATE, TaskSection
from lorand_worker.data import Pairs
from lorand_worker.heads import LanguageModel
from lorand_worker.model import LoadedModel
from lorand_worker.tasks.base import Forward, Judged, Targets, Task
from lorand_worker.tasks.prompts import Prompt


class CausalLM(Task):
    """Cross-entropy of the answer's tokens and the end-of-text token after them.

    An example's loss is the mean over its own answer tokens, a batch's the mean over examples: a
    long answer counts as much as a short one. Tokens of the prompt are not predicted. The score's
    accuracy is the share of all answer tokens that the model, given those before, puts first.
    """

    def __init__(
        self,
        model: LoadedModel,
        pairs: Pairs,
        *,
        task: TaskSection,
        trainable: set[str],
        max_length: int,
        device: torch.device | None = None,
        forward: Forward | None = None,
    ) -> None:
        """Tokenise every pair once. A prompt is cut where it is too long, an answer never.

        Raises DataError for an answer without tokens, or too long for max_length.
        """
        assert isinstance(model.module, LanguageModel)
        tokenizer = model.tokenizer
        prompt = Prompt(tokenizer, task.template or PLAIN_TEMPLATE, masked=model.module.masked)
        answers = [prompt.joint + answer.strip() for answer in pairs.answers]
        encoded = tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
        for i, row in enumerate(encoded):
            if not row:
                raise DataError(f"the answer of example {i + 1} has no tokens; remove the example")
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        answer_ids = [[*row, *end] for row in encoded]
        rooms = [max_length - len(row) for row in answer_ids]
        prompts = prompt.fitted(pairs.prompts, rooms)
        self._answers = [torch.tensor(row) for row in answer_ids]
        # A token is predicted at the one before it.
        self._starts = [len(row) - 1 for row in prompts]
        ids = [[*p, *a] for p, a in zip(prompts, answer_ids, strict=True)]
        self.cut = prompt.cut
        super().__init__(model, ids, trainable=trainable, device=device, forward=forward)

    def _targets(self, batch: Sequence[int]) -> Targets:
        sizes = torch.tensor([len(self._answers[i]) for i in batch])
        rows = torch.repeat_interleave(torch.arange(len(batch)), sizes)
        columns = torch.cat([self._starts[i] + torch.arange(len(self._answers[i])) for i in batch])
        labels = torch.cat([self._answers[i] for i in batch])
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
