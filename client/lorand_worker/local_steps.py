"""What a participant does in a round: measure where it stands, or take steps on its own data first.

`SeedSteps` walk on the coefficients, so that the weights stay w(A) for some A (FedKSeed, Qin et
al., ICML 2024, algorithm 1, where each step measures one direction; with backward passes each step
measures all K). `WeightSteps` walk on all weights; where they led is reported as K scalars (Ferret,
Shu et al., ICML 2025, algorithm 1). `projected_steps` do so inside of subspaces.

Both steps report the way back in units of an unscaled weight, shape (count,): the coordinator takes
its mean over participants for a gradient (Reddi et al., Adaptive Federated Optimization, ICLR
2021).
"""

from math import sqrt
from typing import Protocol

import numpy as np
import torch
from torch import nn

from lorand.coefficients import add
from lorand.config import EstimatorKind, RunConfig
from lorand.errors import ConfigError
from lorand.kernels import zero_sums
from lorand.replica import CopyReplica, Replica
from lorand.subspaces.replica import SubspaceReplica
from lorand_worker import estimators
from lorand_worker.estimators import Batches, Estimator, Loss, Measurement, Order, Spsa, finite
from lorand_worker.projected_steps import CoordinateSteps, SvdSteps
from lorand_worker.stepping import check, make, not_too_far, rate, steps, try_out


class Work(Protocol):
    """A round's work. The replica stands at w(A) before and after, also after an error."""

    def do(self, loss: Loss, batches: Batches, order: Order, examples: int) -> Measurement:
        """Return what to report of the `examples` local examples. Raises NonFiniteLoss."""


class Standing:
    """No steps: the scalars of one batch at w(A)."""

    def __init__(self, estimator: Estimator) -> None:
        """Take what measures."""
        self.estimator = estimator

    def do(self, loss: Loss, batches: Batches, order: Order, examples: int) -> Measurement:
        """See Work."""
        if order.curvature:
            assert isinstance(self.estimator, Spsa), "the run file refuses it"
            return self.estimator.measure_curvature(loss, batches(), order.indices)
        return self.estimator.measure(loss, batches(), order.indices)


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
        optimizer = make(self._config.local, [place], rate(self._config, order.committed))
        losses = []
        try:
            for part in parts:
                measured = self._estimator.measure(loss, batches(), order.indices[part])
                assert measured.loss is not None, "the run file refuses noise on steps"
                losses.append(measured.loss)
                gradient = np.zeros(count)
                gradient[part] = measured.values * factors[part]
                gradient *= root / len(measured.values)
                place.grad = torch.from_numpy(gradient)
                optimizer.step()
                moved = not_too_far(place.detach().numpy() / root)
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
        optimizer = make(self._config.local, weights, rate(self._config, order.committed))
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
        moved = not_too_far(self._replica.scalars(sums)[order.indices] / self._replica.pool.size)
        return Measurement(-moved, float(np.mean(losses)))


def build(
    config: RunConfig, replica: Replica, module: nn.Module, kind: EstimatorKind | None = None
) -> Work:
    """Return the work of the run's rounds on a replica of this module; freezes what is not trained.

    `kind` is the estimator where it is a worker's own choice. Raises ConfigError for an optimizer
    that cannot be used, or a replica that cannot serve it.
    """
    if config.local.space == "weights":
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        if isinstance(replica, SubspaceReplica):
            return CoordinateSteps(config, replica)
        if config.subspace.kind == "svd" and isinstance(replica, CopyReplica):
            return SvdSteps(config, replica)
        return WeightSteps(config, replica)
    estimator = estimators.build(config, replica, module, kind)
    return SeedSteps(config, replica, estimator) if config.local.taken else Standing(estimator)
