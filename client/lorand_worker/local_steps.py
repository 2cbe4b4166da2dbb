"""What a participant does in a round: measure where it stands, or take steps on its own data first.

`SeedSteps` walk on the coefficients, so that the weights stay w(A) for some A (FedKSeed, Qin et
al., ICML 2024, algorithm 1, where each step measures one direction; with backward passes each step
measures all K). `WeightSteps` walk on all weights; where they led is reported as K scalars (Ferret,
Shu et al., ICML 2025, algorithm 1). `CoordinateSteps` do so in the subspaces that a run shares.

Both steps report the way back in units of an unscaled weight, shape (count,): the coordinator takes
its mean over participants for a gradient (Reddi et al., Adaptive Federated Optimization, ICLR
2021).
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from math import ceil, sqrt
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from lorand.codec import Floats
from lorand.coefficients import MOVE_LIMIT, add
from lorand.config import LocalSection, RunConfig
from lorand.errors import ConfigError
from lorand.kernels import zero_sums
from lorand.replica import CopyReplica, Replica
from lorand.subspaces.replica import SubspaceReplica
from lorand_worker import estimators
from lorand_worker.estimators import (
    Estimator,
    Loss,
    Measurement,
    NonFiniteLoss,
    Order,
    Spsa,
    finite,
)

Batches = Callable[[], Sequence[int]]
"""Draws the next batch of example indices."""


class Work(Protocol):
    """A round's work. The replica stands at w(A) before and after, also after an error."""

    def do(self, loss: Loss, batches: Batches, order: Order, examples: int) -> Measurement:
        """Return what to report of the `examples` local examples. Raises NonFiniteLoss."""


class Standing:
    """No steps: the scalars of one batch at w(A)."""

    def __init__(self, estimator: Estimator) -> None:
        """Take what measures."""
        self._estimator = estimator

    def do(self, loss: Loss, batches: Batches, order: Order, examples: int) -> Measurement:
        """See Work."""
        if order.curvature:
            assert isinstance(self._estimator, Spsa), "the run file refuses it"
            return self._estimator.measure_curvature(loss, batches(), order.indices)
        return self._estimator.measure(loss, batches(), order.indices)


class SeedSteps:
    """Steps of a torch optimizer on the coefficients of the directions that are measured.

    It is given the coefficients times √m, m directions being measured by a step, so that its
    learning rate is in units of an unscaled weight: with Adam the root mean square by which the
    first step moves one, with SGD w −= rate · gradient estimate. Its state lives for one round.
    """

    def __init__(self, config: RunConfig, replica: Replica, estimator: Estimator) -> None:
        """Take what measures. Raises ConfigError for an optimizer that cannot step on a vector."""
        self._config, self._replica, self._estimator = config, replica, estimator
        check(config)

    def do(self, loss: Loss, batches: Batches, order: Order, examples: int) -> Measurement:
        """See Work."""
        start, count = self._replica.coefficients, len(order.indices)
        factors = np.ones(count) if order.factors is None else order.factors
        parts = self._parts(count, examples)
        root = sqrt(parts[0].stop)
        place = nn.Parameter(torch.zeros(count, dtype=torch.float64))
        optimizer = _optimizer(self._config.local, [place], rate(self._config, order.committed))
        losses = []
        try:
            for part in parts:
                measured = self._estimator.measure(loss, batches(), order.indices[part])
                losses.append(measured.loss)
                gradient = np.zeros(count)
                gradient[part] = measured.values * factors[part]
                gradient *= root / len(measured.values)
                place.grad = torch.from_numpy(gradient)
                optimizer.step()
                moved = _not_too_far(place.detach().numpy() / root)
                quanta = np.rint(moved * 2.0**self._config.directions.quantum_exponent)
                self._replica.set(add(start, order.indices, quanta.astype(np.int64)))
        finally:
            self._replica.set(start)
        return Measurement(-moved, float(np.mean(losses)))

    def _parts(self, count: int, examples: int) -> list[slice]:
        """Which of the directions each step measures."""
        if self._config.estimator.kind == "backprop":
            return [slice(0, count)] * steps(self._config, examples)
        each = self._config.estimator.directions_per_round
        return [slice(at, at + each) for at in range(0, count, each)]


class WeightSteps:
    """Steps of a torch optimizer on all trained weights; Δ is reported as γ = Zᵀ Δ / K.

    E[Zγ] = Δ over the signs of the directions, as with Ferret's (ρK)⁻¹ Vᵀ Δ (eq. 6): there ρ is a
    variance that is 1 here. What a tensor's direction scale multiplies is divided out. Z has one
    table of K numbers for all tensors, so there are no blocks with a K_l of their own: they would
    spare nothing, a projection being one pass over the weights whatever K is.
    """

    def __init__(self, config: RunConfig, replica: Replica) -> None:
        """Take the weights, whose gradients are kept from now on. Raises ConfigError."""
        if not isinstance(replica, CopyReplica):
            raise ConfigError(
                'local.space = "weights" steps on whole weights: join with --weights copy, or '
                'start a run with local.space = "seeds"'
            )
        self._config, self._replica = config, replica
        self._inverse = {t.name: 4.0**-t.scale_exponent for t in replica.manifest.tensors}
        for tensor in replica.parameters.values():
            tensor.requires_grad_(True)
        for dimensions in sorted({tensor.ndim for tensor in replica.parameters.values()}):
            try_out(config.local, torch.zeros([4] * dimensions))

    def do(self, loss: Loss, batches: Batches, order: Order, examples: int) -> Measurement:
        """See Work."""
        self._replica.settle()
        weights = list(self._replica.parameters.values())
        optimizer = _optimizer(self._config.local, weights, rate(self._config, order.committed))
        losses = []
        try:
            for _ in range(steps(self._config, examples)):
                value = loss(batches())
                losses.append(finite(value.detach()))
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            sums = zero_sums(self._replica.pool.size, weights[0].device)
            for name, drift in self._replica.drift():
                self._replica.project(name, drift * self._inverse[name], sums)
        finally:
            optimizer.zero_grad(set_to_none=True)
            self._replica.disturbed()
        moved = _not_too_far(self._replica.scalars(sums)[order.indices] / self._replica.pool.size)
        return Measurement(-moved, float(np.mean(losses)))


class CoordinateSteps:
    """Steps of a torch optimizer on the coordinates of shared subspaces, as GaLore takes them on
    PᵀG (Zhao et al., ICML 2024, algorithm 2) with everybody's P; where they led, D, of q numbers
    over all tensors, is reported as γ = Zᵀ D / K.

    Up to K coordinates are in different buckets of the pool, so that Z γ is D exactly for K ≥ q.
    Beyond, q/K of them share one: E[Z γ] is D still, with q/K as much squared length. The factor of
    least square error, 1/q, learns more slowly: `experiments/results/subspaces.md`.
    """

    def __init__(self, config: RunConfig, replica: SubspaceReplica) -> None:
        """Take the replica's gradients. Raises ConfigError."""
        self._config, self._replica = config, replica
        self._leaves: dict[str, nn.Parameter] = {}
        for dimensions in sorted({len(spec.shape) for spec in replica.manifest.tensors}):
            try_out(config.local, torch.zeros([4] * dimensions))
        replica.on_gradient(self._take)

    def do(self, loss: Loss, batches: Batches, order: Order, examples: int) -> Measurement:
        """See Work."""
        replica = self._replica
        replica.settle()
        start = replica.coordinates().clone()
        self._leaves = {
            name: nn.Parameter(torch.zeros(shape, device=start.device))
            for name, _, _, shape in replica.parts()
        }
        leaves: list[torch.Tensor] = list(self._leaves.values())
        optimizer = _optimizer(self._config.local, leaves, rate(self._config, order.committed))
        losses = []
        try:
            for _ in range(steps(self._config, examples)):
                value = loss(batches())
                losses.append(finite(value.detach()))
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                drift = self._drift(start)
                replica.write_at(start + drift)
        finally:
            replica.disturbed()
            self._leaves = {}
        scalars = replica.scalars_of(drift)[order.indices]
        moved = _not_too_far(scalars / replica.pool.size)
        return Measurement(-moved, float(np.mean(losses)))

    def _take(self, name: str, gradient: torch.Tensor) -> None:
        self._leaves[name].grad = self._replica.gather(name, gradient)

    @torch.no_grad()
    def _drift(self, like: torch.Tensor) -> torch.Tensor:
        """D in units of unscaled coordinates, shape (q,)."""
        drift = torch.empty_like(like)
        for name, part, place, _ in self._replica.parts():
            drift[place] = self._leaves[name].reshape(-1) / part.factor
        return drift


def _not_too_far(moved: Floats) -> Floats:
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
    optimizer = _optimizer(section, [trial], section.learning_rate)
    trial.grad = torch.ones_like(like)
    try:
        optimizer.step()
    except Exception as error:  # of a library that the run file chose: any kind
        raise ConfigError(
            f"local.optimizer = {section.optimizer!r} cannot step on a tensor of shape "
            f"{tuple(like.shape)} by its gradient: {error}; choose another, such as AdamW"
        ) from error


def _optimizer(
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


def build(config: RunConfig, replica: Replica, module: nn.Module) -> Work:
    """Return the work of the run's rounds on a replica of this module; freezes what is not trained.

    Raises ConfigError for an optimizer that cannot be used, or a replica that cannot serve it.
    """
    if config.local.space == "weights":
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        if isinstance(replica, SubspaceReplica):
            return CoordinateSteps(config, replica)
        return WeightSteps(config, replica)
    estimator = estimators.build(config, replica, module)
    return SeedSteps(config, replica, estimator) if config.local.taken else Standing(estimator)
