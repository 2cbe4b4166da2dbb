"""Hidden states of texts below the trained layers, and batches of them without padding."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorand.config import ModelSection
from lorand_worker.data import Examples
from lorand_worker.model import LoadedModel

LINES = 32
"""Tokens of a pass are filled up to a multiple: products are prepared once a shape."""
TOGETHER = 64
FOLDER = os.environ.get("LORAND_STATES", "")
"""Where hidden states are kept for other processes, in files; empty: nowhere."""
GROUPS = 4
"""Parts of a batch that are padded apart for attention."""


@dataclass(frozen=True)
class Alike:
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
    groups: list[Alike]
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

_kept: dict[str, dict[str, torch.Tensor]] = {}


def texts(loaded: LoadedModel, examples: Examples, section: ModelSection) -> Texts:
    """Return the examples' states below the trained layers, computed once a text."""
    depth = _depth(loaded, section.trainable)
    name = f"{section.name.replace('/', '_')}-{depth}-{section.max_length}"
    known = _kept.setdefault(name, _from_file(name) if name not in _kept else {})
    missing = [text for text in dict.fromkeys(examples.texts) if text not in known]
    if missing:
        states = _lower(loaded, missing, depth, section.max_length)
        known.update(zip(missing, states, strict=True))
        _to_file(name, known)
    return Texts([known[text] for text in examples.texts], examples.labels)


def _from_file(name: str) -> dict[str, torch.Tensor]:
    if not FOLDER or not (path := Path(FOLDER) / f"{name}.pt").exists():
        return {}
    found = torch.load(path, weights_only=True)
    return dict(zip(found["texts"], found["states"].split(found["lengths"]), strict=True))


def _to_file(name: str, known: dict[str, torch.Tensor]) -> None:
    if not FOLDER:
        return
    path = Path(FOLDER) / f"{name}.pt"
    partial = path.with_suffix(f".{os.getpid()}")
    states = torch.cat(list(known.values()))
    lengths = [len(state) for state in known.values()]
    torch.save({"texts": list(known), "lengths": lengths, "states": states}, partial)
    partial.replace(path)


def _depth(loaded: LoadedModel, trainable: str) -> int:
    kind, _, count = trainable.partition(":")
    assert kind == "last", "the short cut is for the last layers"
    encoder: Any = loaded.module.encoder
    return len(encoder.encoder.layer) - int(count)


@torch.no_grad()
def _lower(
    loaded: LoadedModel, texts: Sequence[str], depth: int, length: int
) -> list[torch.Tensor]:
    """Run the layers below `depth` over all texts, in order of length."""
    encoder: Any = loaded.module.encoder
    ids = loaded.tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    hidden: list[torch.Tensor] = [torch.empty(0)] * len(ids)
    upper, encoder.encoder.layer = encoder.encoder.layer, encoder.encoder.layer[:depth]
    for start in range(0, len(order), TOGETHER):
        part = order[start : start + TOGETHER]
        rows = nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in part], batch_first=True)
        mask = torch.arange(rows.shape[1]) < torch.tensor([len(ids[i]) for i in part])[:, None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = encoder(input_ids=rows, attention_mask=mask.long()).last_hidden_state
        for i, state in zip(part, states.bfloat16(), strict=True):
            hidden[i] = state[: len(ids[i])].clone()
    encoder.encoder.layer = upper
    return hidden


def batch(unordered: Sequence[torch.Tensor], labels: torch.Tensor) -> Batch:
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


def _alike(first: int, lengths: list[int]) -> Alike:
    tokens, longest = sum(lengths), max(lengths)
    inside = torch.arange(longest) < torch.tensor(lengths)[:, None]
    rows = inside.view(-1).nonzero().view(-1)
    place = torch.zeros(inside.numel(), dtype=torch.long)
    place[rows] = torch.arange(tokens)
    mask = torch.zeros(len(lengths), 1, 1, longest, dtype=torch.bfloat16)
    mask.masked_fill_(~inside[:, None, None, :], -30000.0)
    return Alike(first, first + tokens, place, rows, mask)
