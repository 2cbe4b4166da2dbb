"""Local steps inside of subspaces: those that a run shares, or a worker's own."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lorand.codec import Floats
from lorand.config import RunConfig
from lorand.kernels import zero_sums
from lorand.replica import CopyReplica, WholeReplica
from lorand.subspaces.lifts import Full, Lift
from lorand.subspaces.replica import SubspaceReplica
from lorand.subspaces.svd import Svd, has_basis
from lorand_worker.estimators import Batches, Loss, Measurement, Order, finite
from lorand_worker.stepping import make, not_too_far, rate, steps, try_out


class _ProjectedSteps(ABC):
    """Steps of a torch optimizer on coordinates, as GaLore takes them on PᵀG (Zhao et al., ICML
    2024, algorithm 2): each gradient is projected and freed as backward yields it, so that the
    optimizer's state, and what is stepped on, are of the subspace.
    """

    def __init__(self, config: RunConfig, replica: WholeReplica) -> None:
        """Take the replica's gradients. Raises ConfigError for an optimizer that cannot step."""
        self._config = config
        self._leaves: dict[str, nn.Parameter] = {}
        for dimensions in sorted({len(spec.shape) for spec in replica.manifest.tensors}):
            try_out(config.local, torch.zeros([4] * dimensions))
        replica.on_gradient(self._take)

    def _walk(
        self,
        loss: Loss,
        batches: Batches,
        order: Order,
        examples: int,
        write: Callable[[], None],
    ) -> float:
        """Take all steps; `write` writes the weights of the leaves. Return the mean loss."""
        losses, optimizer = [], None
        for _ in range(steps(self._config, examples)):
            value = loss(batches())
            losses.append(finite(value.detach()))
            value.backward()  # type: ignore[no-untyped-call]
            if optimizer is None:
                leaves: list[torch.Tensor] = list(self._leaves.values())
                optimizer = make(self._config.local, leaves, rate(self._config, order.committed))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                write()
        return float(np.mean(losses))

    def _take(self, name: str, gradient: torch.Tensor) -> None:
        part = self._part(name, gradient)
        coordinates = part.gather(gradient.detach())
        if name not in self._leaves:
            self._leaves[name] = nn.Parameter(torch.zeros_like(coordinates))
        self._leaves[name].grad = coordinates

    @abstractmethod
    def _part(self, name: str, gradient: torch.Tensor) -> Lift:
        """Return the lift of a tensor."""


class CoordinateSteps(_ProjectedSteps):
    """Steps in the subspaces that a run shares; where they led, D, of q numbers over all tensors,
    is reported as γ = Zᵀ D / K.

    Up to K coordinates are in different buckets of the pool, so that Z γ is D exactly for K ≥ q.
    Beyond, q/K of them share one: E[Z γ] is D still, with q/K as much squared length.
    """

    def __init__(self, config: RunConfig, replica: SubspaceReplica) -> None:
        """See _ProjectedSteps."""
        super().__init__(config, replica)
        self._replica = replica

    def do(self, loss: Loss, batches: Batches, order: Order, examples: int) -> Measurement:
        """See `local_steps.Work`."""
        replica = self._replica
        replica.settle()
        start = replica.coordinates().clone()
        try:
            mean = self._walk(
                loss, batches, order, examples, lambda: replica.write_at(start + self._drift(start))
            )
            scalars = replica.scalars_of(self._drift(start))[order.indices]
        finally:
            replica.disturbed()
            self._leaves = {}
        return Measurement(-not_too_far(scalars / replica.pool.size), mean)

    def _part(self, name: str, gradient: torch.Tensor) -> Lift:
        return self._replica.lift(name)

    @torch.no_grad()
    def _drift(self, like: torch.Tensor) -> torch.Tensor:
        """D in units of unscaled coordinates, shape (q,)."""
        drift = torch.zeros_like(like)
        for name, part, place, _ in self._replica.parts():
            if name in self._leaves:
                drift[place] = self._leaves[name].reshape(-1) / part.factor
        return drift


class SvdSteps(_ProjectedSteps):
    """GaLore's own steps: matrices move in the singular vectors of the round's first gradient.

    The basis stays with the worker, since an SVD's bits differ between machines, and is kept in 4
    bits (Q-GaLore, arXiv 2407.08296). Where steps led in full space is reported as γ = Zᵀ Δ / K.
    """

    def __init__(self, config: RunConfig, replica: CopyReplica) -> None:
        """See _ProjectedSteps."""
        super().__init__(config, replica)
        self._replica = replica
        self._specs = {
            spec.name: replace(
                spec, scale_exponent=0, rank=config.subspace.rank * has_basis(config, spec)
            )
            for spec in replica.manifest.tensors
        }
        self._inverse = {t.name: 4.0**-t.scale_exponent for t in replica.manifest.tensors}
        self._parts: dict[str, Lift] = {}

    def do(self, loss: Loss, batches: Batches, order: Order, examples: int) -> Measurement:
        """See `local_steps.Work`."""
        replica = self._replica
        replica.settle()
        try:
            mean = self._walk(loss, batches, order, examples, self._write)
            scalars = self._scalars()[order.indices]
        finally:
            replica.disturbed()
            self._leaves, self._parts = {}, {}
        return Measurement(-not_too_far(scalars / replica.pool.size), mean)

    def _part(self, name: str, gradient: torch.Tensor) -> Lift:
        if name not in self._parts:
            live, spec = self._replica.parameters[name].detach(), self._specs[name]
            made = Svd(live, spec, gradient.detach()) if spec.rank else Full(live, spec)
            self._parts[name] = made
        return self._parts[name]

    def _write(self) -> None:
        for name, leaf in self._leaves.items():
            self._parts[name].write(leaf)

    @torch.no_grad()
    def _scalars(self) -> Floats:
        sums: Any = None
        for name, drift in self._drifts():
            if sums is None:
                sums = zero_sums(self._replica.pool.size, drift.device)
            self._replica.project(name, drift * self._inverse[name], sums)
        return self._replica.scalars(sums)

    def _drifts(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, leaf in self._leaves.items():
            yield name, self._parts[name].lifted(leaf)
