"""First-order peers in plain torch, which send weights: FedAvg, and Adam on the whole gradient.

They train what LoRand trains and start where it starts; the head's learning rate is `HEAD` times
the others', as LoRand's directions are 16 times longer there.
"""

import random
import time
from collections.abc import Sequence
from math import ceil

import torch
from torch import nn

from experiments import federation, packing, quick
from experiments.federation import Point
from lorand.config import ModelSection
from lorand_worker import model
from lorand_worker.data import Examples, Sampler
from lorand_worker.tasks import Score

HEAD = 16.0


class _Setting:
    """A model with the tasks of all workers and of the scored examples."""

    def __init__(
        self, section: ModelSection, shards: Sequence[Examples], scored: Examples, labels: int
    ) -> None:
        loaded = model.load(section, labels, federation.minilm())
        for parameter in loaded.module.parameters():
            parameter.requires_grad_(False)
        self.weights = model.trainable_tensors(loaded, section.trainable)
        for tensor in self.weights.values():
            tensor.requires_grad_(True)
        self._new = loaded.new_names

        self._upper = quick.Upper(loaded.module, int(section.trainable[len("last:") :]), _nothing)
        texts = [packing.texts(loaded, shard, section) for shard in shards]
        self.losses = [quick.alone(self._upper, part) for part in texts]
        self._scored = packing.texts(loaded, scored, section)
        self.bytes = sum(4 * tensor.numel() for tensor in self.weights.values())

    def score(self) -> Score:
        """Return accuracy and loss on the scored examples."""
        return quick.score(self._upper, self._scored)

    def groups(self, learning_rate: float) -> list[dict[str, object]]:
        """Return the parameter groups of an optimizer: the head apart."""
        new = [t for name, t in self.weights.items() if name in self._new]
        old = [t for name, t in self.weights.items() if name not in self._new]
        return [
            {"params": old, "lr": learning_rate},
            {"params": new, "lr": HEAD * learning_rate},
        ]

    def step(self, optimizer: torch.optim.Optimizer, losses: Sequence[torch.Tensor]) -> None:
        """Step along the gradient of the losses' mean."""
        torch.stack(list(losses)).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def fedavg(
    section: ModelSection,
    shards: Sequence[Examples],
    scored: Examples,
    *,
    labels: int,
    learning_rate: float,
    rounds: int,
    seed: int,
    batch_size: int,
    epochs: int = 1,
) -> list[Point]:
    """FedAvg (McMahan et al., AISTATS 2017, algorithm 1) with local AdamW, weights by examples.

    Full precision weights both ways; the local rate decays linearly over the rounds. Scored after
    each round.
    """
    setting = _Setting(section, shards, scored, labels)
    samplers = _samplers(shards, batch_size, seed)
    total = sum(map(len, shards))
    points, started = [], time.monotonic()
    forwards = 3 * epochs * max(ceil(len(shard) / batch_size) for shard in shards)
    for done in range(rounds + 1):
        spent = time.monotonic() - started
        score = setting.score()
        size = done * setting.bytes
        points.append(Point(done, score, done * forwards, size, size, round(spent, 2)))
        if done == rounds:
            break
        before = {name: tensor.detach().clone() for name, tensor in setting.weights.items()}
        mean = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
        for loss, sampler, shard in zip(setting.losses, samplers, shards, strict=True):
            _put(setting.weights, before)
            rate = learning_rate * (1 - done / rounds)
            optimizer = torch.optim.AdamW(setting.groups(rate))
            for _ in range(epochs * ceil(len(shard) / batch_size)):
                setting.step(optimizer, [loss(sampler.batch())])
            for name, tensor in setting.weights.items():
                mean[name].add_(tensor.detach(), alpha=len(shard) / total)
        _put(setting.weights, mean)
    return points


def adam(
    section: ModelSection,
    shards: Sequence[Examples],
    scored: Examples,
    *,
    labels: int,
    learning_rate: float,
    rounds: int,
    seed: int,
    batch_size: int,
    evaluate_at: Sequence[int],
) -> list[Point]:
    """Adam on the mean of the workers' whole gradients, one batch each a round, linear decay."""
    setting = _Setting(section, shards, scored, labels)
    samplers = _samplers(shards, batch_size, seed)
    optimizer = torch.optim.Adam(setting.groups(learning_rate))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / rounds)
    points, started = [], time.monotonic()
    for done in range(rounds + 1):
        if done in evaluate_at:
            spent = time.monotonic() - started
            score = setting.score()
            size = done * setting.bytes
            points.append(Point(done, score, 3 * done, size, size, round(spent, 2)))
        if done < rounds:
            pairs = zip(setting.losses, samplers, strict=True)
            setting.step(optimizer, [loss(sampler.batch()) for loss, sampler in pairs])
            schedule.step()
    return points


def _samplers(shards: Sequence[Examples], batch_size: int, seed: int) -> list[Sampler]:
    return [
        Sampler(len(shard), batch_size, random.Random(f"{seed}/{i}"))
        for i, shard in enumerate(shards)
    ]


def _nothing() -> None:
    """The weights are up to date already."""


@torch.no_grad()
def _put(weights: dict[str, nn.Parameter | torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        tensor.copy_(values[name])
