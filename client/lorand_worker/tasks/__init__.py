"""The tasks: what is predicted of one worker's examples, with which loss."""

import torch

from lorand.config import RunConfig
from lorand_worker.data import Chats, Data, Examples, Pairs, Texts
from lorand_worker.heads import LanguageModel
from lorand_worker.model import LoadedModel
from lorand_worker.tasks import answers
from lorand_worker.tasks.base import Forward, Score, Task
from lorand_worker.tasks.causal_lm import CausalLM
from lorand_worker.tasks.classification import Classification
from lorand_worker.tasks.label_words import LabelWords
from lorand_worker.tasks.parts import Part
from lorand_worker.tasks.prompts import Prompt, label_word_ids

__all__ = [
    "CausalLM",
    "Classification",
    "Forward",
    "LabelWords",
    "Part",
    "Score",
    "Task",
    "build",
    "check",
]


def check(model: LoadedModel, config: RunConfig) -> None:
    """Raise ModelError unless the run's template and label words suit the model; needs no data."""
    if config.task.kind == "label-words":
        assert isinstance(model.module, LanguageModel)
        prompt = Prompt(model.tokenizer, config.task.template, masked=model.module.masked)
        label_word_ids(model.tokenizer, prompt, config.task)
    if config.task.format == "chat":
        answers.check_chat(model.tokenizer)


def build(
    model: LoadedModel,
    config: RunConfig,
    examples: Data,
    *,
    trainable: set[str],
    device: torch.device | None = None,
    forward: Forward | None = None,
) -> Task:
    """Return the run's task on these examples. Raises DataError or ModelError (see the kinds)."""
    section, max_length = config.task, config.model.max_length
    if section.kind == "causal-lm":
        assert isinstance(examples, Pairs | Texts | Chats)
        return CausalLM(
            model,
            examples,
            task=section,
            trainable=trainable,
            max_length=max_length,
            device=device,
            forward=forward,
        )
    assert isinstance(examples, Examples)
    if section.kind == "label-words":
        return LabelWords(
            model,
            examples,
            task=section,
            trainable=trainable,
            max_length=max_length,
            device=device,
            forward=forward,
        )
    return Classification(
        model,
        examples,
        trainable=trainable,
        max_length=max_length,
        device=device,
        forward=forward,
    )
