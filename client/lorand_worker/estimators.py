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
from lorand.kernels import zero_sums
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
    """A way to measure. The replica stands at w(A) before and after, also after an error."""

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
        for position, index in enumerate(indices.tolist()):
            with self._replica.perturbed(index, self._quanta):
                above = _finite(loss(batch))
            with self._replica.perturbed(index, -self._quanta):
                below = _finite(loss(batch))
            values[position] = (above - below) / (2 * self._scale)
            total += above + below
        return Measurement(values, total / (2 * len(indices)))


class Backprop:
    """All K scalars g_k = z_k · ∇L from one backward pass (Ferret, Shu et al., ICML 2025, eq. 6).

    Each tensor's gradient is projected and freed as backward yields it, so memory is activations,
    the largest gradient and O(K).
    """

    def __init__(self, replica: Replica) -> None:
        """Take the replica's gradients; the caller froze what is not trained."""
        self._replica = replica
        self._shares = torch.empty(0)
        replica.on_gradient(self._add)

    def measure(self, loss: Loss, batch: Sequence[int], indices: Indices) -> Measurement:
        """Return Zᵀ∇L at `indices` (the whole pool, in order)."""
        self._replica.settle()
        value = loss(batch)
        mean = _finite(value.detach())
        self._shares = zero_sums(self._replica.pool.size, value.device)
        value.backward()  # type: ignore[no-untyped-call]
        values = self._replica.scalars(self._shares)[indices]
        if not np.isfinite(values).all():
            raise NonFiniteLoss("the gradient is not finite")
        return Measurement(values, mean)

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        self._replica.project(name, gradient, self._shares)


def build(config: RunConfig, replica: Replica, module: torch.nn.Module) -> Estimator:
    """Return the run's estimator on a replica of this module; freezes what is not trained."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return Spsa(replica, config) if config.estimator.kind == "spsa" else Backprop(replica)


def _finite(value: torch.Tensor) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise NonFiniteLoss(f"the loss of this batch is {number}")
    return number
