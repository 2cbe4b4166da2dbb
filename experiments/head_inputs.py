"""What a model's head sees of a text: where the head alone is trained, all that is computed of it.

The head is `PooledClassifier.head`; its inputs are what that module hands to it, once a text.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import nn
from torch.nn import functional

from lorand.config import ModelSection
from lorand_worker.data import Examples
from lorand_worker.estimators import Loss
from lorand_worker.heads import PooledClassifier
from lorand_worker.model import LoadedModel
from lorand_worker.precision import Precision, passes
from lorand_worker.tasks import Score

ALONE: Final = "name:^head"
"""The `trainable` of a run that trains none of the layers."""
TOGETHER: Final = 64

Labelled = tuple[torch.Tensor, torch.Tensor]
"""Inputs of the head, shape (examples, width), and labels, shape (examples,)."""

_known: dict[tuple[str, int, float, Precision], dict[str, torch.Tensor]] = {}


def inputs(
    loaded: LoadedModel,
    examples: Examples,
    section: ModelSection,
    precision: Precision = Precision.FLOAT32,
) -> Labelled:
    """Return what the head sees of each example, in float32; kept by text for later runs.

    `precision` is that of the passes below the head. Texts of a length go together, in an order
    of their own: the last bits depend on which.
    """
    known = _known.setdefault(
        (section.name, section.max_length, section.feature_scale, precision), {}
    )
    missing = sorted(set(examples.texts) - known.keys(), key=lambda text: (len(text), text))
    for start in range(0, len(missing), TOGETHER):
        part = missing[start : start + TOGETHER]
        with passes(precision, torch.device("cpu")):
            seen = _seen(loaded, part, section.max_length)
        known.update(zip(part, seen.float(), strict=True))
    return torch.stack([known[text] for text in examples.texts]), torch.tensor(examples.labels)


@torch.no_grad()
def _seen(loaded: LoadedModel, texts: Sequence[str], max_length: int) -> torch.Tensor:
    """Return the inputs of the head in a pass over these texts, shape (texts, width)."""
    encoded = loaded.tokenizer(
        list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    seen: list[torch.Tensor] = []
    hook = head_of(loaded).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        loaded.module(encoded["input_ids"], encoded["attention_mask"])
    finally:
        hook.remove()
    return seen[0]


def head_of(loaded: LoadedModel) -> nn.Linear:
    """Return the head of a model with a pooled one."""
    assert isinstance(loaded.module, PooledClassifier)
    return loaded.module.head


def loss_of(head: nn.Module, part: Labelled) -> Loss:
    """Return the mean loss of a head on some of the examples, by their places."""

    def loss(indices: Sequence[int]) -> torch.Tensor:
        at = torch.tensor(indices)
        return functional.cross_entropy(head(part[0][at]), part[1][at])

    return loss


@torch.no_grad()
def scored_by(head: nn.Module, part: Labelled) -> Score:
    """Return accuracy and mean loss of a head."""
    logits = head(part[0])
    correct = (logits.argmax(dim=1) == part[1]).float().mean()
    return Score(float(correct), float(functional.cross_entropy(logits, part[1])), len(part[1]))
