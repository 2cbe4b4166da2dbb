"""Losses of a MiniLM classifier by a short cut: frozen layers once, the rest without padding.

Experiments on zeroth-order methods are forward passes and little else. Here the hidden states below
the trained layers are computed once a process and text, the trained layers run in bfloat16 (sums
and normalisations as in autocast) on the tokens that there are, and the workers of a round share a
pass where they measure the same perturbation. `check` compares with the model's own forward pass.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lorand.config import ModelSection
from lorand.replica import CopyReplica
from lorand_worker.data import Examples
from lorand_worker.estimators import Loss
from lorand_worker.local_steps import Batches
from lorand_worker.model import LoadedModel, PooledClassifier
from lorand_worker.tasks import Score

LINES = 32
"""Tokens of a pass are filled up to a multiple: products are prepared once a shape."""
SCORED_TOGETHER = 64
GROUPS = 4
"""Parts of a batch that are padded apart for attention."""


@dataclass(frozen=True)
class _Alike:
    """Examples of similar length inside a batch, padded for attention.

    Rows `first` to `last` of the batch are theirs; `place` (examples × length) is the row of each
    padded position, `rows` (tokens,) the padded position of each row; `mask` (examples, 1, 1,
    length) is added to scores.
    """

    first: int
    last: int
    place: torch.Tensor
    rows: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """Examples ready for a pass, without padding, in order of length.

    `hidden` (tokens, width), `mean` (examples, tokens) averages over an example's tokens, `labels`
    (examples,), `order` where each example stood in what was asked for.
    """

    hidden: torch.Tensor
    groups: list[_Alike]
    mean: torch.Tensor
    labels: torch.Tensor
    order: torch.Tensor


class Texts:
    """Hidden states of texts at the frozen boundary, one tensor (tokens, width) a text."""

    def __init__(self, hidden: list[torch.Tensor], labels: Sequence[int]) -> None:
        """Take the states and the labels, one each a text."""
        self.hidden = hidden
        self.labels = torch.tensor(labels)

    def states(self, indices: Sequence[int]) -> "States":
        """Return the states and labels of these texts."""
        return [self.hidden[i] for i in indices], self.labels[list(indices)]


States = tuple[list[torch.Tensor], torch.Tensor]
"""Hidden states (tokens, width) of texts, and their labels (texts,)."""

_kept: dict[bytes, list[torch.Tensor]] = {}


def texts(loaded: LoadedModel, examples: Examples, section: ModelSection) -> Texts:
    """Return the examples' states below the trained layers, computed once a process and text."""
    depth = _depth(loaded, section.trainable)
    named = f"{depth}|{section.max_length}|" + "|".join(examples.texts)
    key = hashlib.sha256(named.encode()).digest()
    if key not in _kept:
        _kept[key] = _lower(loaded, examples, depth, section.max_length)
    return Texts(_kept[key], examples.labels)


def _depth(loaded: LoadedModel, trainable: str) -> int:
    kind, _, count = trainable.partition(":")
    assert kind == "last", "the short cut is for the last layers"
    encoder: Any = loaded.module.encoder
    return len(encoder.encoder.layer) - int(count)


@torch.no_grad()
def _lower(loaded: LoadedModel, examples: Examples, depth: int, length: int) -> list[torch.Tensor]:
    """Run the layers below `depth` over all texts, in order of length."""
    encoder: Any = loaded.module.encoder
    ids = loaded.tokenizer(list(examples.texts), truncation=True, max_length=length)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    hidden: list[torch.Tensor] = [torch.empty(0)] * len(ids)
    upper, encoder.encoder.layer = encoder.encoder.layer, encoder.encoder.layer[:depth]
    for start in range(0, len(order), SCORED_TOGETHER):
        part = order[start : start + SCORED_TOGETHER]
        rows = nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in part], batch_first=True)
        mask = torch.arange(rows.shape[1]) < torch.tensor([len(ids[i]) for i in part])[:, None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = encoder(input_ids=rows, attention_mask=mask.long()).last_hidden_state
        for i, state in zip(part, states.bfloat16(), strict=True):
            hidden[i] = state[: len(ids[i])].clone()
    encoder.encoder.layer = upper
    return hidden


class LazyReplica(CopyReplica):
    """A replica that writes its weights only when `write` asks for them.

    Where workers share a pass, most perturbations are never written.
    """

    def settle(self) -> None:
        """Leave it to `write`."""

    def write(self) -> None:
        """Write the weights where they are not yet what they should be."""
        super().settle()


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


def batch(unordered: Sequence[torch.Tensor], labels: torch.Tensor) -> "Batch":
    """Return texts of these states, ready for a pass."""
    order = sorted(range(len(unordered)), key=lambda at: len(unordered[at]))
    states = [unordered[at] for at in order]
    lengths = [len(state) for state in states]
    tokens = sum(lengths)
    filled = -(-tokens // LINES) * LINES
    hidden = torch.zeros(filled, states[0].shape[1], dtype=torch.bfloat16)
    torch.cat(states, out=hidden[:tokens])
    mean = torch.zeros(len(states), filled)
    owner = torch.repeat_interleave(torch.arange(len(states)), torch.tensor(lengths))
    mean[owner, torch.arange(tokens)] = 1 / torch.tensor(lengths, dtype=torch.float32)[owner]
    size = -(-len(states) // GROUPS)
    cuts = range(0, len(states), size)
    groups = [_alike(sum(lengths[:cut]), lengths[cut : cut + size]) for cut in cuts]
    return Batch(hidden, groups, mean, labels[order], torch.tensor(order))


def _alike(first: int, lengths: list[int]) -> _Alike:
    tokens, longest = sum(lengths), max(lengths)
    inside = torch.arange(longest) < torch.tensor(lengths)[:, None]
    rows = inside.view(-1).nonzero().view(-1)
    place = torch.zeros(inside.numel(), dtype=torch.long)
    place[rows] = torch.arange(tokens)
    mask = torch.zeros(len(lengths), 1, 1, longest, dtype=torch.bfloat16)
    mask.masked_fill_(~inside[:, None, None, :], -30000.0)
    return _Alike(first, first + tokens, place, rows, mask)


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

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the model's present weights."""
        self._write()
        for copies in self._copies:
            copies.refresh()

    @torch.no_grad()
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
        seen = torch.zeros_like(hidden)
        for group in batch.groups:
            self._attend(mixed, seen, group)
        out = functional.linear(seen, w.out, w.out_bias)
        hidden = functional.layer_norm(out.add_(hidden), (width,), *w.norm1, self._epsilon)
        inner = functional.gelu(functional.linear(hidden, w.inner, w.inner_bias))
        out = functional.linear(inner, w.outer, w.outer_bias)
        return functional.layer_norm(out.add_(hidden), (width,), *w.norm2, self._epsilon)

    def _attend(self, mixed: torch.Tensor, seen: torch.Tensor, group: _Alike) -> None:
        inside, width = slice(group.first, group.last), seen.shape[1]
        padded = mixed[inside].index_select(0, group.place)
        split = padded.view(len(group.mask), -1, 3, self._heads, width // self._heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed_values = functional.scaled_dot_product_attention(q, k, v, attn_mask=group.mask)
        flat = mixed_values.transpose(1, 2).reshape(-1, width)
        torch.index_select(flat, 0, group.rows, out=seen[inside])


class _Copies:
    """bfloat16 copies of a layer's weights; query, key and value in one matrix."""

    def __init__(self, layer: Any) -> None:
        attention = layer.attention
        mix = attention.self
        width = mix.query.weight.shape[1]
        self.qkv = torch.empty(3 * width, width, dtype=torch.bfloat16)
        self.qkv_bias = torch.empty(3 * width, dtype=torch.bfloat16)
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for place, part in enumerate((mix.query, mix.key, mix.value)):
            inside = slice(place * width, (place + 1) * width)
            pairs += [(self.qkv[inside], part.weight), (self.qkv_bias[inside], part.bias)]

        def copy_of(tensor: torch.Tensor) -> torch.Tensor:
            made = torch.empty_like(tensor, dtype=torch.bfloat16)
            pairs.append((made, tensor))
            return made

        dense, inner, outer = attention.output.dense, layer.intermediate.dense, layer.output.dense
        self.out, self.out_bias = copy_of(dense.weight), copy_of(dense.bias)
        self.inner, self.inner_bias = copy_of(inner.weight), copy_of(inner.bias)
        self.outer, self.outer_bias = copy_of(outer.weight), copy_of(outer.bias)
        first, second = attention.output.LayerNorm, layer.output.LayerNorm
        self.norm1 = copy_of(first.weight), copy_of(first.bias)
        self.norm2 = copy_of(second.weight), copy_of(second.bias)
        self._pairs = pairs

    def refresh(self) -> None:
        for made, tensor in self._pairs:
            made.copy_(tensor)


def score(upper: Upper, texts: Texts) -> Score:
    """Return accuracy and loss over all texts at the model's present weights."""
    upper.refresh()
    order = sorted(range(len(texts.hidden)), key=lambda i: len(texts.hidden[i]))
    correct, total = 0, 0.0
    for start in range(0, len(order), SCORED_TOGETHER):
        part = batch(*texts.states(order[start : start + SCORED_TOGETHER]))
        logits = upper.logits(part)
        correct += int((logits.argmax(dim=-1) == part.labels).sum())
        total += float(functional.cross_entropy(logits, part.labels, reduction="sum"))
    return Score(correct / len(order), total / len(order), len(order))
