"""A trained linear head on a frozen model: its inputs are computed once, and passes are products.

The head is `PooledClassifier.head`, its inputs what that module hands to it; nothing else of the
model runs in a round. tests/unit/test_private_runs.py compares with the library's own estimators.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from experiments.private_runs import Bench
from lorand.codec import Floats
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.replica import CopyReplica
from lorand_worker import estimators
from lorand_worker.data import Examples
from lorand_worker.estimators import Losses
from lorand_worker.heads import PooledClassifier
from lorand_worker.model import LoadedModel
from lorand_worker.tasks import Score

TRAINABLE = "name:^head"
TOGETHER = 64

Labelled = tuple[torch.Tensor, torch.Tensor]
"""Inputs of the head, shape (examples, width), and labels, shape (examples,)."""

_known: dict[tuple[str, int, float], dict[str, torch.Tensor]] = {}


def inputs(loaded: LoadedModel, examples: Examples, config: RunConfig) -> Labelled:
    """Return what the head sees of each example, in float32; kept by text for later runs."""
    section = config.model
    known = _known.setdefault((section.name, section.max_length, section.feature_scale), {})
    missing = sorted(set(examples.texts) - known.keys(), key=len)
    for start in range(0, len(missing), TOGETHER):
        part = missing[start : start + TOGETHER]
        known.update(zip(part, _seen(loaded, part, section.max_length), strict=True))
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


def losses_of(head: nn.Linear, part: Labelled) -> Losses:
    """Return each example's cross-entropy in nats; the last batch is kept, as many ask for it."""
    kept: dict[tuple[int, ...], Labelled] = {}

    def losses(batch: Sequence[int]) -> torch.Tensor:
        if (key := tuple(batch)) not in kept:
            kept.clear()
            kept[key] = part[0][list(batch)], part[1][list(batch)]
        x, labels = kept[key]
        return functional.cross_entropy(head(x), labels, reduction="none")

    return losses


def sketches(
    head: nn.Linear, replica: CopyReplica
) -> Callable[[Labelled, Sequence[int], Indices], Floats]:
    """Return `Backprop.each` for a linear head: each example's Zᵀ∇L of a batch in two products.

    An example's gradient is (p − y) ⊗ (x, 1), softmax less label times input.
    """
    columns = [replica.direction(index) for index in range(replica.pool.size)]
    weight = torch.stack([column["head.weight"].flatten() for column in columns], dim=1)
    bias = torch.stack([column["head.bias"] for column in columns], dim=1)

    @torch.no_grad()
    def each(part: Labelled, batch: Sequence[int], indices: Indices) -> Floats:
        replica.settle()
        x, labels = part[0][list(batch)], part[1][list(batch)]
        logits = head(x)
        residual = logits.softmax(dim=1) - functional.one_hot(labels, logits.shape[1])
        outer = residual[:, :, None] * x[:, None, :]
        found = outer.flatten(1) @ weight + residual @ bias
        values: Floats = found.double().numpy()[:, indices]
        return values

    return each


def bench(
    config: RunConfig,
    loaded: LoadedModel,
    replica: CopyReplica,
    shards: Sequence[Examples],
    scored: Examples,
) -> Bench:
    """Return the bench of a run that trains the head alone."""
    parts = [inputs(loaded, shard, config) for shard in shards]
    x, labels = inputs(loaded, scored, config)
    head = head_of(loaded)

    @torch.no_grad()
    def score() -> Score:
        replica.settle()
        return scored_by(head, (x, labels))

    if config.estimator.kind == "backprop":
        each = sketches(head, replica)
        return Bench(lambda worker, batch, at: each(parts[worker], batch, at), score)
    estimator = estimators.build(config, replica, loaded.module)
    losses = [losses_of(head, part) for part in parts]
    return Bench(lambda worker, batch, at: estimator.each(losses[worker], batch, at), score)


@torch.no_grad()
def scored_by(head: nn.Module, part: Labelled) -> Score:
    """Return accuracy and mean loss of a head."""
    logits = head(part[0])
    correct = (logits.argmax(dim=1) == part[1]).float().mean()
    return Score(float(correct), float(functional.cross_entropy(logits, part[1])), len(part[1]))
