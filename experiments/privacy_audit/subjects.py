"""What is attacked: models, replicas, estimators and tasks of the library, put together.

Subjects stand at weights that some rounds have led to: at a zero head nothing below it has a
gradient, so a run's first rounds would show less than its others do.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch

from experiments import federation, tasks
from experiments.privacy_audit.view import View
from lorand import codec
from lorand.codec import Floats
from lorand.config import EstimatorKind, RunConfig
from lorand.manifest import run_digest
from lorand.privacy.sampler import Below
from lorand.replica import WholeReplica
from lorand_coordinator import optimizer
from lorand_coordinator.aggregation import Report
from lorand_worker.bench import Base, load_base, task_for
from lorand_worker.data import Examples, Sampler
from lorand_worker.estimators import Estimator, build
from lorand_worker.tasks import Task

LABELS: Final = ("negative", "positive")
WARM_ROUNDS: Final = 20
MAX_TOKENS: Final = 64


def config_of(
    trainable: str, size: int, kind: EstimatorKind, *, count: int = 1, **sections: Any
) -> RunConfig:
    """Return a run of MiniLM on sentences; `count` scalars a round, by forward passes.

    A new head's directions are as long as all others: longer ones, the library's default, put more
    of the scalars on the head and leave less of them to what is below.
    """
    content: dict[str, dict[str, Any]] = {
        "run": {"name": "audit", "rounds": WARM_ROUNDS},
        "model": {"name": "all-MiniLM-L6-v2", "trainable": trainable, "max_length": MAX_TOKENS},
        "task": {"labels": LABELS},
        "directions": {"pool_size": size, "head_scale": 1.0},
        "estimator": {"kind": kind, "batch_size": 32, "perturbation_scale": 2.0**-10},
        "codec": {"up": "int8", "down": "int8"},
        "optimizer": {"kind": "adam", "learning_rate": 2e-3},
        "rounds": {"quorum": 1},
    }
    if kind != "backprop":
        content["estimator"]["directions_per_round"] = count
    for name, values in sections.items():
        content.setdefault(name, {}).update(values)
    return RunConfig.model_validate(content)


def sentences(count: int, seed: int) -> Examples:
    """Return so many different UCI sentiment sentences of three domains, at random."""
    every = tasks.load("uci", workers=1, seed=0, held_out=False).shards[0]
    first = {text.lower(): at for at, text in reversed(list(enumerate(every.texts)))}
    order = np.random.default_rng([seed, 77]).permutation(sorted(first.values()))
    return federation.subset(every, order[:count].tolist())


def below(seed: int) -> Below:
    """Return a repeatable source of integers for noise: fit for experiments, and no privacy."""
    return random.Random(seed).randrange


@dataclass(frozen=True)
class Subject:
    """A worker's bench at the weights of a run under way, and what an attacker knows of it."""

    config: RunConfig
    base: Base
    examples: Examples
    task: Task
    estimator: Estimator

    @property
    def replica(self) -> WholeReplica:
        """The worker's replica."""
        assert isinstance(self.base.replica, WholeReplica)
        return self.base.replica

    @cached_property
    def view(self) -> View:
        """The directions, as anyone can read them from base model, manifest and pool."""
        return View.of(self.replica.manifest, self.replica.pool)

    def gradient(self, batch: Sequence[int]) -> Floats:
        """Return the true gradient of a batch, shape (d,), in the manifest's order."""
        found: dict[str, torch.Tensor] = {}
        self.replica.settle()
        with self.replica.gradients_to(lambda name, g: found.__setitem__(name, g.detach())):
            self.task.loss(batch).backward()  # type: ignore[no-untyped-call]
        names = [spec.name for spec in self.replica.manifest.tensors]
        return torch.cat([found[name].reshape(-1) for name in names]).double().numpy()

    def token_ids(self, batch: Sequence[int]) -> set[int]:
        """Return the distinct tokens of a batch, without those that every text has."""
        tokenizer = self.base.loaded.tokenizer
        texts = [self.examples.texts[i] for i in batch]
        encoded = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)
        return {token for row in encoded["input_ids"] for token in row} - special_ids(self.base)


def special_ids(base: Base) -> set[int]:
    """Return the tokens that stand for no text."""
    return set(base.loaded.tokenizer.all_special_ids)


def batch_of(subject: Subject, size: int, seed: int) -> list[int]:
    """Return a batch of a subject's examples, at random."""
    source = np.random.default_rng([seed, size])
    return [int(i) for i in source.choice(len(subject.task), size, replace=False)]


def minilm(config: RunConfig, examples: Examples, *, seed: int) -> Subject:
    """Return MiniLM on these sentences after WARM_ROUNDS first-order rounds on others."""
    base = load_base(config, federation.minilm(), "cpu")
    warm = warmed(config, base, seed)
    task = task_for(base, config, examples)
    estimator = build(config, base.replica, base.loaded.module)
    base.replica.set(warm)
    return Subject(config, base, examples, task, estimator)


def warmed(config: RunConfig, base: Base, seed: int) -> Any:
    """Return A after some rounds of one worker, by backward passes and the real optimizer."""
    first = config.estimator.model_copy(update={"kind": "backprop"})
    config = config.model_copy(update={"estimator": first})
    examples = sentences(600, seed + 1000)
    task = task_for(base, config, examples)
    estimator = build(config, base.replica, base.loaded.module)
    draws = config.draws(run_digest(config.digest(), base.identity))
    sampler = Sampler(len(examples), config.estimator.batch_size, random.Random(seed))
    state = optimizer.start(config)
    for round_index in range(config.run.rounds):
        indices = draws.of(round_index, 0, 0)
        measured = estimator.measure(task.loss, sampler.batch(), indices)
        codes = codec.encode(config.codec.up, measured.values, state.scale_exponent)
        state, _ = optimizer.advance(config, draws, state, round_index, {0: Report(codes)})
        base.replica.set(state.coefficients)
    return state.coefficients
