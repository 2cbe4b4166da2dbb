"""How a worker measures: the loss on its own batch → one scalar a direction."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from lorand.codec import Floats
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.errors import LorandError
from lorand.replica import Replica

Loss = Callable[[Sequence[int]], torch.Tensor]
"""Mean loss of a batch of example indices at the live weights, a scalar tensor."""


class NonFiniteLoss(LorandError):
    """The loss of a batch is not a finite number: the worker sits the round out."""


@dataclass(frozen=True)
class Measurement:
    """`values[i]` is the projected gradient along direction i of the draw; loss in nats."""

    values: Floats
    loss: float


class Estimator(Protocol):
    """A way to measure. The replica's weights are w(A) before and after."""

    def measure(self, loss: Loss, batch: Sequence[int], indices: Indices) -> Measurement:
        """Return the projected gradients along `indices`. Raises NonFiniteLoss."""


class Spsa:
    """Two-point estimate: g_k = (L(w(A + c e_k)) − L(w(A − c e_k))) / 2μ, c = μ/u.

    Spall, IEEE TAC 37(3), 1992, eq. 2.2; MeZO, Malladi et al., NeurIPS 2023, definition 1. Two
    forward passes a scalar on the same batch. The reported loss is the mean over all of them.
    """

    def __init__(self, replica: Replica, config: RunConfig) -> None:
        """Take the perturbation scale from the run."""
        self._replica = replica
        self._quanta = config.perturbation_quanta
        self._scale = self._quanta * 2.0**-config.directions.quantum_exponent

    @torch.no_grad()
    def measure(self, loss: Loss, batch: Sequence[int], indices: Indices) -> Measurement:
        """Return one scalar a direction; 2 · len(indices) forward passes."""
        values = np.empty(len(indices))
        total = 0.0
        try:
            for position, index in enumerate(indices.tolist()):
                self._replica.perturb(index, self._quanta)
                above = _finite(loss(batch))
                self._replica.perturb(index, -self._quanta)
                below = _finite(loss(batch))
                values[position] = (above - below) / (2 * self._scale)
                total += above + below
        finally:
            self._replica.restore()
        return Measurement(values, total / (2 * len(indices)))


class Backprop:
    """All K scalars g_k = z_k · ∇L from one backward pass (Ferret, Shu et al., ICML 2025, eq. 6).

    Each tensor's gradient is projected and freed as backward yields it, so memory is activations,
    the largest gradient and O(K).
    """

    def __init__(self, replica: Replica, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Hook the trainable parameters; the caller froze the others."""
        self._replica = replica
        self._shares = np.zeros(replica.pool.size)
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(self._projector(name))  # type: ignore[no-untyped-call]

    def measure(self, loss: Loss, batch: Sequence[int], indices: Indices) -> Measurement:
        """Return Zᵀ∇L at `indices` (the whole pool, in order)."""
        self._shares = np.zeros(self._replica.pool.size)
        value = loss(batch)
        mean = _finite(value.detach())
        value.backward()  # type: ignore[no-untyped-call]
        values = self._replica.scalars(self._shares)[indices]
        if not np.isfinite(values).all():
            raise NonFiniteLoss("the gradient is not finite")
        return Measurement(values, mean)

    def _projector(self, name: str) -> Callable[[torch.Tensor], None]:
        def project(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            self._shares += self._replica.project(name, parameter.grad)
            parameter.grad = None

        return project


def build(config: RunConfig, replica: Replica, module: torch.nn.Module) -> Estimator:
    """Return the run's estimator on a replica of this module; freezes what is not trained."""
    trained = {spec.name for spec in replica.manifest.tensors}
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if config.estimator.kind == "spsa":
        return Spsa(replica, config)
    parameters = {name: p for name, p in module.named_parameters() if name in trained}
    return Backprop(replica, parameters)


def _finite(value: torch.Tensor) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise NonFiniteLoss(f"the loss of this batch is {number}")
    return number
