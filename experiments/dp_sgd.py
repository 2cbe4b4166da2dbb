"""DP-SGD on a linear head by opacus, the library that the field compares with.

Abadi et al., Deep Learning with Differential Privacy, CCS 2016, algorithm 1: each example's
gradient is clipped, Gaussian noise is added to the sum over a Poisson sample. With several shards
each has a noise of its own and the mean of their steps is taken. Opacus is no dependency of this
project; install it beside the environment and name the folder:

    pip install --no-deps --target FOLDER opacus opt-einsum
    PYTHONPATH=$PYTHONPATH:FOLDER python -m experiments.privacy_utility
"""

import importlib.util
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from experiments.head_inputs import Labelled, scored_by
from lorand_worker.tasks import Score

NO_CLIP = 1e9


@dataclass(frozen=True)
class Settings:
    """Steps, sample rate, learning rate (falls to 0), clip bound (L2), and noise over the bound."""

    rounds: int
    sample_rate: float
    learning_rate: float
    clip: float = NO_CLIP
    multiplier: float = 0.0


def installed() -> bool:
    """Return whether opacus can be imported."""
    return importlib.util.find_spec("opacus") is not None


def train(shards: Sequence[Labelled], scored: Labelled, settings: Settings, seed: int) -> Score:
    """Train a head of zeros on the shards and return its score; `seed` fixes samples and noise.

    An example's label is one of two, its input of shape (width,).
    """
    heads = [_Private(shard, settings, 1000 * seed + at) for at, shard in enumerate(shards)]
    for _ in range(settings.rounds):
        for head in heads:
            head.step()
        with torch.no_grad():
            for copies in zip(*(head.linear.parameters() for head in heads), strict=True):
                mean = torch.stack(copies).mean(dim=0)
                for copy in copies:
                    copy.copy_(mean)
    return scored_by(heads[0].linear, scored)


class _Private:
    """A head in the hands of opacus: its own optimizer, sampler and noise."""

    def __init__(self, part: Labelled, settings: Settings, seed: int) -> None:
        from opacus import PrivacyEngine

        self.linear = nn.Linear(part[0].shape[1], 2)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)
        loader = DataLoader(
            TensorDataset(*part),
            batch_size=math.ceil(settings.sample_rate * len(part[1])),
            generator=torch.Generator().manual_seed(seed),
        )
        with warnings.catch_warnings():  # that its generators are seeded, which is meant
            warnings.simplefilter("ignore")
            self._module, self._optimizer, self._loader = PrivacyEngine().make_private(
                module=self.linear,
                optimizer=torch.optim.SGD(self.linear.parameters(), lr=settings.learning_rate),
                data_loader=loader,
                noise_multiplier=settings.multiplier,
                max_grad_norm=settings.clip,
                noise_generator=torch.Generator().manual_seed(seed + 500),
            )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda at: 1 - at / settings.rounds
        )
        self._batches = self._forever()

    def _forever(self) -> Iterator[Any]:
        while True:
            yield from self._loader

    def step(self) -> None:
        """Take one step on one Poisson sample."""
        x, labels = next(self._batches)
        self._optimizer.zero_grad()
        with warnings.catch_warnings():  # of a hook on a layer whose input has no gradient
            warnings.simplefilter("ignore")
            functional.cross_entropy(self._module(x), labels).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()


def epsilon(settings: Settings, delta: float) -> float:
    """Return what opacus' own accountant (PRV) says, to compare with ours; up to .01 above."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(settings.multiplier, settings.sample_rate, settings.rounds)]
    return float(accountant.get_epsilon(delta=delta))
