"""How a worker measures: the loss on its own batch → one scalar a direction."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorand.codec import Floats
from lorand.coefficients import Coefficients
from lorand.config import EstimatorKind, RunConfig
from lorand.directions import Indices
from lorand.errors import ConfigError, LorandError
from lorand.kernels import zero_sums
from lorand.layers import slots
from lorand.replica import Replica, WholeReplica
from lorand.subspaces.elections import Columns

Loss = Callable[[Sequence[int]], torch.Tensor]
"""Mean loss of a batch of example indices at the live weights, a scalar tensor."""

Losses = Callable[[Sequence[int]], torch.Tensor]
"""Each example's own loss at the live weights, shape (batch,)."""

Batches = Callable[[], Sequence[int]]
"""Draws the next batch of example indices."""


class NonFiniteLoss(LorandError):
    """The loss of a batch is not a finite number: the worker sits the round out."""


@dataclass(frozen=True)
class Order:
    """What a round asks of a participant.

    The directions to measure, shape (count,), factors on their scalars where local steps use them
    (`Draws.importance`; None: 1), how many rounds were committed before, and the number of examples
    where it is not the run's batch size. `elect` are the numbers of the tensors whose next columns
    the round elects. `curvature` asks for what the directions met of it. `before` are the
    coefficients that the last commit found, where the ledger tells.
    """

    indices: Indices
    factors: Floats | None = None
    committed: int = 0
    batch_size: int = 0
    elect: Sequence[int] = ()
    curvature: bool = False
    before: Coefficients | None = None


@dataclass(frozen=True)
class Measurement:
    """`values[i]` is the projected gradient along direction i of the draw; loss in nats.

    `votes` are columns with most of the gradient, where the round elects a subspace; `curvature`
    the mean of zᵀHz over the directions, in nats a squared unit of an unscaled weight, where the
    round asks for it. Values with privacy noise come without a loss, which has none.
    """

    values: Floats
    loss: float | None
    votes: Columns = field(default_factory=dict)
    curvature: float | None = None


class Estimator(Protocol):
    """A way to measure. The replica stands at w(A) before and after, also after an error."""

    def measure(self, loss: Loss, batch: Sequence[int], indices: Indices) -> Measurement:
        """Return the projected gradients along `indices`. Raises NonFiniteLoss."""

    def each(self, losses: Losses, batch: Sequence[int], indices: Indices) -> Floats:
        """Return each example's projected gradients, shape (batch, count); they may be no numbers.

        For a batch of one example or more.
        """


class _ByLosses:
    """What estimators have in common that move the weights and compare losses."""

    def __init__(self, replica: Replica, config: RunConfig) -> None:
        """Take the perturbation scale from the run."""
        self._replica = replica
        self._quanta = config.perturbation_quanta
        self._scale = self._quanta * 2.0**-config.directions.quantum_exponent


class Spsa(_ByLosses):
    """Two-point estimate: g_k = (L(w(A + c e_k)) − L(w(A − c e_k))) / 2μ, c = μ/u.

    Spall, IEEE TAC 37(3), 1992, eq. 2.2; MeZO, Malladi et al., NeurIPS 2023, definition 1. Two
    forward passes a scalar on the same batch. The reported loss is the mean over all of them.
    """

    @torch.no_grad()
    def measure(self, loss: Loss, batch: Sequence[int], indices: Indices) -> Measurement:
        """Return one scalar a direction; 2 · len(indices) forward passes."""
        values = np.empty(len(indices))
        total = 0.0
        for position, index in enumerate(indices.tolist()):
            with self._replica.perturbed(index, self._quanta):
                above = finite(loss(batch))
            with self._replica.perturbed(index, -self._quanta):
                below = finite(loss(batch))
            values[position] = (above - below) / (2 * self._scale)
            total += above + below
        return Measurement(values, total / (2 * len(indices)))

    @torch.no_grad()
    def each(self, losses: Losses, batch: Sequence[int], indices: Indices) -> Floats:
        """See Estimator; as many passes as `measure`."""
        vectors = np.empty((len(batch), len(indices)))
        for position, index in enumerate(indices.tolist()):
            with self._replica.perturbed(index, self._quanta):
                above = losses(batch).double()
            with self._replica.perturbed(index, -self._quanta):
                below = losses(batch).double()
            vectors[:, position] = ((above - below) / (2 * self._scale)).cpu()
        return vectors

    @torch.no_grad()
    def measure_curvature(self, loss: Loss, batch: Sequence[int], indices: Indices) -> Measurement:
        """Return what `measure` does, with the curvature: one forward pass more, of L(w(A)).

        The mean over directions of (L(w + μz) + L(w − μz) − 2 L(w)) / μ², which is zᵀHz + O(μ²), is
        twice what the reported loss is above L(w), over μ².
        """
        measured = self.measure(loss, batch, indices)
        self._replica.settle()
        here = finite(loss(batch))
        assert measured.loss is not None
        return replace(measured, curvature=2 * (measured.loss - here) / self._scale**2)


class OneSided(_ByLosses):
    """One-point estimate: g_k = (L(w(A + c e_k)) − L(w(A))) / μ, c = μ/u.

    FZOO, arXiv 2506.09034: n directions cost n + 1 forward passes on the same batch. With
    `optimizer.spread_decay = 0` the coordinator divides a step by the spread of the round's
    scalars, as FZOO does. The reported loss is that of w(A).
    """

    @torch.no_grad()
    def measure(self, loss: Loss, batch: Sequence[int], indices: Indices) -> Measurement:
        """Return one scalar a direction; len(indices) + 1 forward passes."""
        self._replica.settle()
        base = finite(loss(batch))
        values = np.empty(len(indices))
        for position, index in enumerate(indices.tolist()):
            with self._replica.perturbed(index, self._quanta):
                values[position] = (finite(loss(batch)) - base) / self._scale
        return Measurement(values, base)

    @torch.no_grad()
    def each(self, losses: Losses, batch: Sequence[int], indices: Indices) -> Floats:
        """See Estimator; as many passes as `measure`."""
        self._replica.settle()
        base = losses(batch).double()
        vectors = np.empty((len(batch), len(indices)))
        for position, index in enumerate(indices.tolist()):
            with self._replica.perturbed(index, self._quanta):
                vectors[:, position] = ((losses(batch).double() - base) / self._scale).cpu()
        return vectors


class ForwardGradient:
    """Exact slope g_k = z_k · ∇L(w(A)) from one pass in forward-mode differentiation; no μ.

    Baydin et al., Gradients without Backpropagation, 2022, algorithm 1. No graph is kept: memory is
    the base, the weights and one direction.
    """

    def __init__(self, replica: Replica, module: nn.Module) -> None:
        """Find where the module holds the replica's weights.

        Raises ConfigError for a replica without weights of its own to differentiate along.
        """
        if not isinstance(replica, WholeReplica):
            raise ConfigError(
                'estimator "forward" differentiates along whole weights: join with --weights '
                'copy, or start a run with the estimator "spsa"'
            )
        with warnings.catch_warnings():  # torch 2.13's own rules use what it has deprecated
            warnings.simplefilter("ignore", DeprecationWarning)
            import torch._decomp.decompositions_for_jvp  # noqa: F401
        self._replica = replica
        names = {spec.name for spec in replica.manifest.tensors}
        self._slots = [slot for _, slot in slots(module) if slot.name in names]

    @torch.no_grad()
    def measure(self, loss: Loss, batch: Sequence[int], indices: Indices) -> Measurement:
        """Return one scalar a direction; as many passes, each with its derivative."""
        values = np.empty(len(indices))
        total = 0.0
        for position, index in enumerate(indices.tolist()):
            value = self._differentiated(loss, batch, index)
            total += finite(value.primal)
            values[position] = finite(value.tangent)
        return Measurement(values, total / len(indices))

    @torch.no_grad()
    def each(self, losses: Losses, batch: Sequence[int], indices: Indices) -> Floats:
        """See Estimator; as many passes as `measure`."""
        vectors = np.empty((len(batch), len(indices)))
        for position, index in enumerate(indices.tolist()):
            vectors[:, position] = self._differentiated(losses, batch, index).tangent.cpu()
        return vectors

    def _differentiated(self, loss: Loss, batch: Sequence[int], index: int) -> Any:
        """Return a loss, or losses, with what they change along a direction."""
        # Fused attention has no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), self._along(index):
            return forward_ad.unpack_dual(loss(batch))  # type: ignore[no-untyped-call]

    @contextmanager
    def _along(self, index: int) -> Iterator[None]:
        """Within it the module's weights are w(A) + ε · z_index, ε² = 0."""
        make: Any = forward_ad.make_dual
        weights, direction = self._replica.live, self._replica.direction(index)
        tensors = {name: make(weights[name], z) for name, z in direction.items()}
        before = [slot.put(tensors[slot.name]) for slot in self._slots]
        try:
            yield
        finally:
            # Backwards: a module in two places has its slots twice.
            for slot, tensor in reversed(list(zip(self._slots, before, strict=True))):
                slot.put(tensor)


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
        """Return Zᵀ∇L at `indices`: the whole pool, in order, where the run is of this kind."""
        self._replica.settle()
        value = loss(batch)
        mean = finite(value.detach())
        self._shares = zero_sums(self._replica.pool.size, value.device)
        value.backward()  # type: ignore[no-untyped-call]
        values = self._replica.scalars(self._shares)[indices]
        if not np.isfinite(values).all():
            raise NonFiniteLoss("the gradient is not finite")
        return Measurement(values, mean)

    def each(self, losses: Losses, batch: Sequence[int], indices: Indices) -> Floats:
        """See Estimator; one backward pass an example, whose gradients are freed like any other."""
        self._replica.settle()
        vectors = np.empty((len(batch), len(indices)))
        for row, example in enumerate(batch):
            value = losses([example]).sum()
            self._shares = zero_sums(self._replica.pool.size, value.device)
            value.backward()  # type: ignore[no-untyped-call]
            vectors[row] = self._replica.scalars(self._shares)[indices]
        return vectors

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        self._replica.project(name, gradient, self._shares)


def build(
    config: RunConfig, replica: Replica, module: nn.Module, kind: EstimatorKind | None = None
) -> Estimator:
    """Return the run's estimator on a replica of this module, or one that measures the same.

    Freezes what is not trained. `kind` is a worker's own choice (`own_estimator`).
    """
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    match kind or config.estimator.kind:
        case "spsa":
            return Spsa(replica, config)
        case "one-sided":
            return OneSided(replica, config)
        case "forward":
            return ForwardGradient(replica, module)
        case "backprop":
            return Backprop(replica)


def finite(value: torch.Tensor, advice: str = "") -> float:
    """Return a loss as a number. Raises NonFiniteLoss, with the advice, when it is none."""
    number = float(value)
    if not math.isfinite(number):
        raise NonFiniteLoss(f"the loss of this batch is {number}{advice}")
    return number
