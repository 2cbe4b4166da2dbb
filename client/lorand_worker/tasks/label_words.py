"""Classification by label words: what the model's own vocabulary says at one place of a prompt."""

from collections.abc import Sequence

import torch

from lorand.errors import DataError
from lorand.sections import TaskSection
from lorand_worker.data import Examples
from lorand_worker.heads import LanguageModel
from lorand_worker.model import LoadedModel
from lorand_worker.tasks.base import Forward, Judged, Targets, Task
from lorand_worker.tasks.classification import judged_by_class
from lorand_worker.tasks.prompts import Prompt, label_word_ids


class LabelWords(Task):
    """Cross-entropy over the label words, at the mask or after the last token; no new head.

    Gao et al., Making Pre-trained Language Models Better Few-shot Learners, ACL 2021; what MeZO
    (Malladi et al., NeurIPS 2023) trains on, since a prompted model starts near its goal.
    """

    def __init__(
        self,
        model: LoadedModel,
        examples: Examples,
        *,
        task: TaskSection,
        trainable: set[str],
        max_length: int,
        device: torch.device | None = None,
        forward: Forward | None = None,
    ) -> None:
        """Tokenise every example in the template once; texts are cut, the template is not.

        Raises ModelError when template or label words do not suit the model, DataError for a text
        that contains the mask itself.
        """
        assert isinstance(model.module, LanguageModel)
        masked = model.module.masked
        prompt = Prompt(model.tokenizer, task.template, masked=masked)
        self._words = torch.tensor(label_word_ids(model.tokenizer, prompt, task))
        ids = prompt.fitted(examples.texts, [max_length] * len(examples))
        self._labels = torch.tensor(examples.labels)
        mask = model.tokenizer.mask_token_id
        self._answers = [
            _only(row, mask, i) if masked else len(row) - 1 for i, row in enumerate(ids)
        ]
        self.cut = prompt.cut
        super().__init__(model, ids, trainable=trainable, device=device, forward=forward)
        self._words = self._words.to(self._device)

    def _targets(self, batch: Sequence[int]) -> Targets:
        rows = torch.arange(len(batch), device=self._device)
        columns = torch.tensor([self._answers[i] for i in batch], device=self._device)
        return Targets(self._labels[list(batch)].to(self._device), (rows, columns))

    def _judge(self, logits: torch.Tensor, targets: Targets, count: int) -> Judged:
        return judged_by_class(logits[:, self._words], targets.labels)


def _only(ids: Sequence[int], mask: int, example: int) -> int:
    places = [at for at, token in enumerate(ids) if token == mask]
    if len(places) != 1:
        raise DataError(
            f"the text of example {example + 1} contains the model's mask token, which only the "
            "template may; remove it from the text"
        )
    return places[0]
