"""First-order peers in plain torch, which send weights: FedAvg, and Adam on the whole gradient.

With `adapter = "lora"` FedAvg trains and sends LoRA's matrices and the head alone, as FedIT does
(Zhang et al., arXiv 2305.05644); matrices are averaged one by one, as there.

They train what LoRand trains and start where it starts; the head's learning rate is `HEAD` times
the others', as LoRand's directions are 16 times longer there.
"""

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from pathlib import Path

import torch
from torch import nn

from experiments import federation, head_inputs, packing, quick
from experiments.federation import Point
from lorand.config import ModelSection, RunConfig
from lorand.sections import TaskSection
from lorand_coordinator.rounds import sample
from lorand_worker import model, tasks
from lorand_worker.data import Data, Examples, Sampler
from lorand_worker.estimators import Loss
from lorand_worker.tasks import Score

HEAD = 16.0


class _Setting:
    """A model with the tasks of all workers and of the scored examples."""

    def __init__(
        self,
        section: ModelSection,
        shards: Sequence[Data],
        scored: Data,
        task: TaskSection,
        source: Path | None,
    ) -> None:
        folder = source or federation.minilm()
        loaded = model.load(section, len(task.labels), folder, kind=task.kind)
        for parameter in loaded.module.parameters():
            parameter.requires_grad_(False)
        self.weights = model.trainable_tensors(loaded, section.trainable)
        for tensor in self.weights.values():
            tensor.requires_grad_(True)
        self._new = loaded.new_names
        self.losses: list[Loss]
        self.score: Callable[[], Score]
        self.bytes = sum(4 * tensor.numel() for tensor in self.weights.values())
        every = [part for part in (*shards, scored) if isinstance(part, Examples)]
        if every and section.trainable == head_inputs.ALONE:
            head = head_inputs.head_of(loaded)
            seen = [head_inputs.inputs(loaded, part, section) for part in every]
            self.losses = [head_inputs.loss_of(head, part) for part in seen[:-1]]
            self.score = partial(head_inputs.scored_by, head, seen[-1])
        elif every and section.adapter == "none":
            upper = quick.Upper(loaded.module, int(section.trainable[len("last:") :]), _nothing)
            kept = [packing.texts(loaded, part, section) for part in every]
            self.losses = [quick.alone(upper, part) for part in kept[:-1]]
            self.score = partial(quick.score, upper, kept[-1])
        else:
            build = partial(_task, loaded, section, task, set(self.weights))
            self.losses = [build(shard).loss for shard in shards]
            self.score = build(scored).score

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


def _task(
    loaded: model.LoadedModel,
    section: ModelSection,
    task: TaskSection,
    trained: set[str],
    examples: Data,
) -> tasks.Task:
    """Return the library's own task: the short cut knows no layers but a classifier's own."""
    config = RunConfig.model_validate(
        {
            "run": {"name": "fedavg", "rounds": 1},
            "model": section.model_dump(),
            "task": task.model_dump(),
            "estimator": {"kind": "backprop"},
            "rounds": {"quorum": 1},
            "optimizer": {"learning_rate": 1.0},
        }
    )
    return tasks.build(loaded, config, examples, trainable=trained)


def _classes(labels: int) -> TaskSection:
    return TaskSection(labels=tuple(map(str, range(labels))))


def fedavg(
    section: ModelSection,
    shards: Sequence[Data],
    scored: Data,
    *,
    labels: int = 0,
    learning_rate: float,
    rounds: int,
    seed: int,
    batch_size: int,
    epochs: int = 1,
    task: TaskSection | None = None,
    source: Path | None = None,
    participants: int = 0,
) -> list[Point]:
    """FedAvg (McMahan et al., AISTATS 2017, algorithm 1) with local AdamW, weights by examples.

    Full precision weights both ways; the local rate decays linearly over the rounds. Scored after
    each round. Where rounds ask some of the workers, spent is what a worker spends in the mean: who
    is not asked is sent nothing. `task` is a classifier's of so many labels where none is given.
    """
    setting = _Setting(section, shards, scored, task or _classes(labels), source)
    samplers = _samplers(shards, batch_size, seed)
    share = federation.share_asked(participants, len(shards))
    points, started = [], time.monotonic()
    forwards = 3 * epochs * max(ceil(len(shard) / batch_size) for shard in shards)
    for done in range(rounds + 1):
        spent = time.monotonic() - started
        score = setting.score()
        size, passes = round(done * share * setting.bytes), round(done * share * forwards)
        points.append(Point(done, score, passes, size, size, round(spent, 2)))
        if done == rounds:
            break
        asked = sample(federation.sampling_key(seed), participants, done, range(len(shards)))
        total = sum(len(shards[worker]) for worker in asked)
        before = {name: tensor.detach().clone() for name, tensor in setting.weights.items()}
        mean = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
        for worker in sorted(asked):
            _put(setting.weights, before)
            rate, size = learning_rate * (1 - done / rounds), len(shards[worker])
            optimizer = torch.optim.AdamW(setting.groups(rate))
            for _ in range(epochs * ceil(size / batch_size)):
                setting.step(optimizer, [setting.losses[worker](samplers[worker].batch())])
            for name, tensor in setting.weights.items():
                mean[name].add_(tensor.detach(), alpha=size / total)
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
    setting = _Setting(section, shards, scored, _classes(labels), None)
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


def _samplers(shards: Sequence[Data], batch_size: int, seed: int) -> list[Sampler]:
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
