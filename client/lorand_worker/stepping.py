"""What all local steps share: how many, how fast, by which optimizer, and how far at most."""

from importlib import import_module
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import nn

from lorand.codec import Floats
from lorand.coefficients import MOVE_LIMIT
from lorand.config import LocalSection, RunConfig
from lorand.errors import ConfigError
from lorand_worker.estimators import NonFiniteLoss


def not_too_far(moved: Floats) -> Floats:
    """Return where steps led. Raises NonFiniteLoss where no contribution can say it."""
    far = float(np.abs(moved).sum())
    if not far <= MOVE_LIMIT:
        raise NonFiniteLoss(
            f"local steps moved weights by up to {far:.3g}, the limit is {MOVE_LIMIT}; a lower "
            "local.learning_rate may help"
        )
    return moved


def steps(config: RunConfig, examples: int) -> int:
    """Return how many steps a participant with so many examples takes in a round."""
    batch = min(config.estimator.batch_size, examples)
    return config.local.steps or config.local.epochs * ceil(examples / batch)


def rate(config: RunConfig, committed: int) -> float:
    """Return the local learning rate of the next round."""
    return config.local.learning_rate * config.rate_factor(committed)


def check(config: RunConfig) -> None:
    """Raise ConfigError unless the run's local optimizer, if any, is there and takes a step."""
    if config.local.taken:
        try_out(
            config.local, torch.zeros(4, 4) if config.local.space == "weights" else torch.zeros(4)
        )


def try_out(section: LocalSection, like: torch.Tensor) -> None:
    """Take one step on a small tensor. Raises ConfigError when the optimizer cannot."""
    trial = nn.Parameter(torch.zeros_like(like))
    optimizer = make(section, [trial], section.learning_rate)
    trial.grad = torch.ones_like(like)
    try:
        optimizer.step()
    except Exception as error:  # of a library that the run file chose: any kind
        raise ConfigError(
            f"local.optimizer = {section.optimizer!r} cannot step on a tensor of shape "
            f"{tuple(like.shape)} by its gradient: {error}; choose another, such as AdamW"
        ) from error


def make(
    section: LocalSection, weights: list[torch.Tensor], learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer of that name in torch.optim, or in pytorch_optimizer where installed."""
    kind: Any = getattr(torch.optim, section.optimizer, None) or _elsewhere(section.optimizer)
    if not _is_optimizer(kind):
        raise ConfigError(
            f"local.optimizer = {section.optimizer!r} is neither in torch.optim nor in "
            "pytorch_optimizer (`pip install 'lorand[optimizers]'`); names are as there, such as "
            "SGD or AdamW"
        )
    try:
        made: torch.optim.Optimizer = kind(weights, lr=learning_rate, **section.options)
    except Exception as error:  # of a library that the run file chose: any kind
        raise ConfigError(
            f"local.optimizer = {section.optimizer!r} does not take local.options = "
            f"{section.options}: {error}"
        ) from error
    return made


def _is_optimizer(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)


def _elsewhere(name: str) -> Any:
    try:
        return getattr(import_module("pytorch_optimizer"), name, None)
    except ImportError:
        return None
