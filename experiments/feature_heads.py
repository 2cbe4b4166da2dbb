"""A trained linear head on a frozen model: its inputs are computed once, and passes are products.

The head is `PooledClassifier.head`, its inputs what that module hands to it; nothing else of the
model runs in a round. tests/unit/test_private_runs.py compares with the library's own estimators.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from experiments.private_runs import Bench
from lorand.codec import Floats
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.replica import CopyReplica
from lorand_worker.data import Examples
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


class Directions:
    """All directions of a run on a head, as columns: an example's vectors are products with them.

    They are the library's up to the last bits of float32, which is all that differs.
    """

    def __init__(self, head: nn.Linear, replica: CopyReplica, scale: float) -> None:
        """Take the directions of the replica's pool; `scale` is how far zeroth order looks."""
        self._head, self._replica, self._scale = head, replica, scale
        columns = [replica.direction(index) for index in range(replica.pool.size)]
        self._weight = torch.stack([column["head.weight"] for column in columns], dim=2)
        self._bias = torch.stack([column["head.bias"] for column in columns], dim=1)

    @torch.no_grad()
    def sketches(self, part: Labelled) -> torch.Tensor:
        """Return Zᵀ∇L of each example, shape (examples, K), as `Backprop.each` does.

        An example's gradient is (p − y) ⊗ (x, 1): softmax less label, times the input.
        """
        self._replica.settle()
        x, labels = part
        logits: torch.Tensor = self._head(x)
        residual = logits.softmax(dim=1) - functional.one_hot(labels, logits.shape[1])
        outer = residual[:, :, None] * x[:, None, :]
        return outer.flatten(1) @ self._weight.flatten(0, 1) + residual @ self._bias

    @torch.no_grad()
    def differences(self, part: Labelled, indices: Indices) -> torch.Tensor:
        """Return (L(w + μz) − L(w − μz)) / 2μ, shape (examples, n), as `Spsa.each` does."""
        self._replica.settle()
        x, labels = part
        at = torch.from_numpy(indices)
        here = self._head(x)[:, :, None]
        moved = torch.einsum("ew,cwn->ecn", x, self._weight[:, :, at]) + self._bias[:, at]
        targets = labels[:, None].expand(-1, len(indices))
        above, below = (
            functional.cross_entropy(here + step * moved, targets, reduction="none")
            for step in (self._scale, -self._scale)
        )
        return (above.double() - below.double()) / (2 * self._scale)


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

    scale = config.perturbation_quanta * 2.0**-config.directions.quantum_exponent
    directions = Directions(head, replica, scale)

    def vectors(worker: int, batch: Sequence[int], indices: Indices) -> Floats:
        part = parts[worker][0][list(batch)], parts[worker][1][list(batch)]
        if config.estimator.kind == "backprop":
            found = directions.sketches(part)[:, torch.from_numpy(indices)]
        else:
            found = directions.differences(part, indices)
        values: Floats = found.double().numpy()
        return values

    return Bench(vectors, score)


@torch.no_grad()
def scored_by(head: nn.Module, part: Labelled) -> Score:
    """Return accuracy and mean loss of a head."""
    logits = head(part[0])
    correct = (logits.argmax(dim=1) == part[1]).float().mean()
    return Score(float(correct), float(functional.cross_entropy(logits, part[1])), len(part[1]))
