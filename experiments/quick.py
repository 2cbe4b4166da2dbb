"""Losses of a MiniLM classifier by a short cut: frozen layers once, the rest without padding.

Experiments on zeroth-order methods are forward passes and little else. Here the hidden states below
the trained layers are computed once a process and text, the trained layers run in bfloat16 on the
tokens that there are, and the workers of a round share a pass where they measure the same
perturbation. tests/unit/test_quick.py compares with the model's own forward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from experiments.packing import TOGETHER, Alike, Batch, Texts, batch
from lorand.config import RunConfig
from lorand.ledger import pool_of
from lorand.manifest import Identity
from lorand.replica import CopyReplica, WholeReplica
from lorand.subspaces.replica import SubspaceReplica
from lorand_worker import bench
from lorand_worker.estimators import Batches, Loss
from lorand_worker.heads import PooledClassifier
from lorand_worker.tasks import Score


class Lazy(WholeReplica):
    """A replica that writes its weights only when `write` asks for them.

    Where workers share a pass, most perturbations are never written.
    """

    def settle(self) -> None:
        """Leave it to `write`."""

    def write(self) -> None:
        """Write the weights where they are not yet what they should be."""
        super().settle()


class LazyReplica(Lazy, CopyReplica):
    """One with directions on whole tensors."""


class LazySubspaceReplica(Lazy, SubspaceReplica):
    """One with directions in subspaces."""


def replica_of(config: RunConfig, module: nn.Module, identity: Identity) -> Lazy:
    """Return the run's replica of a module that holds the base weights."""
    tensors, pool = dict(module.named_parameters()), pool_of(config, identity, 0)
    if not config.subspace.restricts:
        return LazyReplica(tensors, identity.manifest, pool)
    kept = bench.kept_of(config, identity.manifest)
    return LazySubspaceReplica(tensors, identity.manifest, pool, **kept)


def together(
    upper: "Upper", parts: Sequence[Texts], batches: Sequence[Batches]
) -> list[tuple[Loss, Batches]]:
    """Return each worker's loss of a round in which their n-th losses are at the same weights.

    The first worker's call computes all of them in one pass.
    """
    drawn = [draw() for draw in batches]
    ready = [part.states(indices) for part, indices in zip(parts, drawn, strict=True)]
    joined = batch(
        [state for states, _ in ready for state in states], torch.cat([y for _, y in ready])
    )
    sizes = [len(labels) for _, labels in ready]
    means: list[list[torch.Tensor]] = [[] for _ in ready]

    def loss_of(worker: int) -> Loss:
        def loss(_: Sequence[int]) -> torch.Tensor:
            if not means[worker]:
                upper.refresh()
                for kept, part in zip(means, torch.split(upper.losses(joined), sizes), strict=True):
                    kept.append(part.mean())
            return means[worker].pop(0)

        return loss

    return [(loss_of(w), lambda indices=drawn[w]: indices) for w in range(len(parts))]  # type: ignore[misc]


def alone(upper: "Upper", part: Texts) -> Loss:
    """Return the loss of one worker; the last batch is kept as prepared."""
    kept: dict[tuple[int, ...], Batch] = {}

    def loss(indices: Sequence[int]) -> torch.Tensor:
        key = tuple(indices)
        if key not in kept:
            kept.clear()
            kept[key] = batch(*part.states(indices))
        upper.refresh()
        return upper.losses(kept[key]).mean()

    return loss


class Upper:
    """The trained layers and the head of a model, in bfloat16 copies of its present weights."""

    def __init__(self, module: nn.Module, layers: int, write: Callable[[], None]) -> None:
        """Take the last layers; `write` brings the model's weights up to date."""
        assert isinstance(module, PooledClassifier)
        encoder: Any = module.encoder
        self._write = write
        self._heads = encoder.config.num_attention_heads
        self._epsilon = encoder.config.layer_norm_eps
        self._module = module
        self._copies = [_Copies(layer) for layer in list(encoder.encoder.layer)[-layers:]]

    def refresh(self) -> None:
        """Copy the model's present weights, in the graph where gradients are wanted."""
        self._write()
        for copies in self._copies:
            copies.refresh()

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return logits, shape (examples, labels), at the copied weights."""
        hidden = batch.hidden
        for copies in self._copies:
            hidden = self._layer(copies, hidden, batch)
        pooled = batch.mean @ hidden.float()
        unit = functional.normalize(pooled, dim=-1) * self._module.feature_scale
        return functional.linear(unit, self._module.head.weight, self._module.head.bias)

    def losses(self, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy of each example, in nats, in the order asked for."""
        losses = functional.cross_entropy(self.logits(batch), batch.labels, reduction="none")
        return torch.empty_like(losses).index_copy_(0, batch.order, losses)

    def _layer(self, w: "_Copies", hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        width = hidden.shape[1]
        mixed = functional.linear(hidden, w.qkv, w.qkv_bias)
        parts = [self._attend(mixed[g.first : g.last], g) for g in batch.groups]
        filling = hidden.new_zeros(len(hidden) - batch.groups[-1].last, width)
        seen = torch.cat([*parts, filling])
        out = functional.linear(seen, w.out, w.out_bias)
        hidden = functional.layer_norm(out.add_(hidden), (width,), *w.norm1, self._epsilon)
        inner = functional.gelu(functional.linear(hidden, w.inner, w.inner_bias))
        out = functional.linear(inner, w.outer, w.outer_bias)
        return functional.layer_norm(out.add_(hidden), (width,), *w.norm2, self._epsilon)

    def _attend(self, mixed: torch.Tensor, group: Alike) -> torch.Tensor:
        width = mixed.shape[1] // 3
        padded = mixed.index_select(0, group.place)
        split = padded.view(len(group.mask), -1, 3, self._heads, width // self._heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=group.mask)
        return seen.transpose(1, 2).reshape(-1, width).index_select(0, group.rows)


class _Copies:
    """A layer's weights in bfloat16: query, key and value in one matrix.

    Without gradients they are kept in the same memory, else they are part of the graph.
    """

    def __init__(self, layer: Any) -> None:
        attention = layer.attention
        mix, dense = attention.self, attention.output.dense
        joined = (mix.query, mix.key, mix.value)
        inner, outer = layer.intermediate.dense, layer.output.dense
        first, second = attention.output.LayerNorm, layer.output.LayerNorm
        single = (dense, inner, outer, first, second)
        self._sources: list[list[torch.Tensor]] = [
            [part.weight for part in joined],
            [part.bias for part in joined],
            *([tensor] for part in single for tensor in (part.weight, part.bias)),
        ]
        self._kept = [torch.cat(source).bfloat16().detach() for source in self._sources]
        self._name(self._kept)

    def _name(self, tensors: Sequence[torch.Tensor]) -> None:
        self.qkv, self.qkv_bias, self.out, self.out_bias = tensors[:4]
        self.inner, self.inner_bias, self.outer, self.outer_bias = tensors[4:8]
        self.norm1, self.norm2 = (tensors[8], tensors[9]), (tensors[10], tensors[11])

    def refresh(self) -> None:
        if torch.is_grad_enabled():
            self._name([torch.cat([t.bfloat16() for t in source]) for source in self._sources])
            return
        for made, source in zip(self._kept, self._sources, strict=True):
            for part, tensor in zip(made.chunk(len(source)), source, strict=True):
                part.copy_(tensor)
        self._name(self._kept)


@torch.no_grad()
def score(upper: Upper, texts: Texts) -> Score:
    """Return accuracy and loss over all texts at the model's present weights."""
    upper.refresh()
    order = sorted(range(len(texts.hidden)), key=lambda i: len(texts.hidden[i]))
    correct, total = 0, 0.0
    for start in range(0, len(order), TOGETHER):
        part = batch(*texts.states(order[start : start + TOGETHER]))
        logits = upper.logits(part)
        correct += int((logits.argmax(dim=-1) == part.labels).sum())
        total += float(functional.cross_entropy(logits, part.labels, reduction="sum"))
    return Score(correct / len(order), total / len(order), len(order))
