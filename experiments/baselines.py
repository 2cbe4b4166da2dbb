"""What LoRand is compared with, in plain torch: no seeds, no integers, no ledger.

MeZO on one machine with Gaussian directions, and the first-order methods that send weights.
"""

import random
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from experiments import federation, packing, quick
from experiments.federation import Point
from lorand.config import ModelSection
from lorand_worker import model
from lorand_worker.data import Examples, Sampler

DIVERGED = 3.0
"""Loss, in nats, at which a run is given up; scored at least every `LOOK_EVERY` passes."""
LOOK_EVERY = 400
TABLE = 1 << 26
"""Gaussian draws from which a step's direction is a slice at a random place."""


@torch.no_grad()
def mezo(
    section: ModelSection,
    shard: Examples,
    scored: Examples,
    *,
    labels: int,
    learning_rate: float,
    forwards: int,
    seed: int,
    evaluate_at: Sequence[int],
    batch_size: int = 16,
    perturbation_scale: float = 1e-3,
) -> list[Point]:
    """MeZO (Malladi et al., NeurIPS 2023, algorithm 1): SPSA, in place, constant learning rate.

    Directions are slices, at random places, of one table of normal draws (Salimans et al., 2017,
    section 2.1): to draw 3.5 million numbers takes longer than the two forward passes.
    `evaluate_at` is in forward passes.
    """
    loaded = model.load(section, labels, federation.minilm())
    flat = _flatten(loaded.module, model.trainable_tensors(loaded, section.trainable))
    texts = packing.texts(loaded, shard, section)
    test = packing.texts(loaded, scored, section)
    upper = quick.Upper(loaded.module, int(section.trainable.removeprefix("last:")), lambda: None)
    table = _table(seed)
    places = np.random.default_rng(seed)
    sampler = Sampler(len(shard), batch_size, random.Random(f"{seed}/0"))
    points = []
    started = time.monotonic()
    for step in range(forwards // 2 + 1):
        if 2 * step in evaluate_at or 2 * step % LOOK_EVERY == 0:
            spent = time.monotonic() - started
            score = quick.score(upper, test)
            points.append(Point(step, score, 2 * step, wall_s=round(spent, 2)))
            started = time.monotonic() - spent
        if points[-1].score.loss > DIVERGED:
            break
        batch = packing.batch(*texts.states(sampler.batch()))
        at = int(places.integers(TABLE - flat.numel()))
        direction = table[at : at + flat.numel()]
        losses = []
        for move in (perturbation_scale, -2 * perturbation_scale):
            flat.add_(direction, alpha=move)
            upper.refresh()
            losses.append(float(upper.losses(batch).mean()))
        slope = (losses[0] - losses[1]) / (2 * perturbation_scale)
        flat.add_(direction, alpha=perturbation_scale - learning_rate * slope)
    return points


_tables: dict[int, torch.Tensor] = {}


def _table(seed: int) -> torch.Tensor:
    if seed not in _tables:
        _tables.clear()
        draws = np.random.default_rng([seed, 1]).standard_normal(TABLE, dtype=np.float32)
        _tables[seed] = torch.from_numpy(draws)
    return _tables[seed]


def _flatten(module: nn.Module, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Make the tensors views of one vector, and return it."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])
    start = 0
    for tensor in tensors.values():
        tensor.data = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    return flat
