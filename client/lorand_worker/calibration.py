"""A short look at a run's loss on local data before round 1: what `calibrate` measures.

Nothing is trained and nothing leaves the machine: directions are moved along and back, on a few
disjoint batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from lorand.codec import Floats
from lorand.coefficients import Coefficients, zeros
from lorand.config import RunConfig
from lorand.directions import SHARED, Indices, draw
from lorand.errors import DataError
from lorand.replica import Replica
from lorand_worker.data import Sampler
from lorand_worker.estimators import Estimator, Loss, finite

MULTIPLES: Final = (0.1, 1.0, 10.0)
"""Of the run's perturbation scale, at which losses are compared."""
FEW_BATCHES: Final = 2
"""Batches at the outer two."""
LINE_TRIES: Final = 3
SECOND_DIFFERENCE_STEP: Final = 0.01
"""μ at which curvature is measured where the estimator has none of its own."""
ADVICE: Final = ": lower estimator.perturbation_scale, or check the model and its dtype"

Batch = list[int]


@dataclass(frozen=True)
class Probe:
    """Losses around w(A) at one perturbation scale: `above`, `below` (N, B), `base` (B,)."""

    scale: float
    above: Floats
    below: Floats
    base: Floats

    @property
    def differences(self) -> Floats:
        """L+ − L−, shape (N, B)."""
        return self.above - self.below

    @property
    def slopes(self) -> Floats:
        """The projected gradients (L+ − L−) / 2μ, shape (N, B)."""
        return self.differences / (2 * self.scale)

    @property
    def curvatures(self) -> Floats:
        """(L+ + L− − 2 L0) / μ², shape (N, B); its mean estimates the trace of the Hessian."""
        return (self.above + self.below - 2 * self.base) / self.scale**2


@dataclass(frozen=True)
class Line:
    """The loss along the optimizer's first step, for a change of weights of RMS one.

    `slope` is minus the first derivative, `curvature` the second. `batches` were averaged for the
    direction of the step; the losses are of other batches.
    """

    slope: float
    curvature: float
    batches: int


@dataclass(frozen=True)
class Readings:
    """What was measured: loss (B,) and projected gradients (N, B) on batches of `batch` examples.

    `probes` are there for estimators that compare losses, `line` for those that see all
    directions at once.
    """

    losses: Floats
    slopes: Floats
    batch: int
    probes: tuple[Probe, ...] = ()
    line: Line | None = None


def split(examples: int, batch_size: int, batches: int) -> list[Batch]:
    """Return disjoint batches of the run's size, at least two. Raises DataError for too few data.

    Where there is not enough for as many, there are fewer; the spread needs two.
    """
    count = min(batches, examples // batch_size)
    if count < 2:
        raise DataError(
            f"{examples} examples make {count} batch{'es' * (count != 1)} of {batch_size}, and "
            f"calibration compares at least two: give at least {2 * batch_size} examples, or lower "
            "estimator.batch_size"
        )
    sampler = Sampler(examples, batch_size)
    return [sampler.batch() for _ in range(count)]


def directions(config: RunConfig, count: int) -> Indices:
    """Return some directions, always the same."""
    return draw(b"calibrate", 0, SHARED, config.directions.pool_size, count)


@torch.no_grad()
def by_losses(
    config: RunConfig, replica: Replica, loss: Loss, indices: Indices, batches: Sequence[Batch]
) -> Readings:
    """Measure along `indices` by losses alone. Raises NonFiniteLoss.

    2 · N · (B + 2 · 2) + B forward passes.
    """
    scale = config.estimator.perturbation_scale
    if config.estimator.kind == "forward":
        scale = SECOND_DIFFERENCE_STEP
    replica.settle()
    base = np.array([_finite(loss(batch)) for batch in batches])
    probes = []
    for multiple in MULTIPLES:
        used = len(batches) if multiple == 1 else FEW_BATCHES
        quanta = max(1, round(multiple * scale * 2.0**config.directions.quantum_exponent))
        above, below = (
            _losses(replica, loss, indices, batches[:used], sign * quanta) for sign in (1, -1)
        )
        exact = quanta * 2.0**-config.directions.quantum_exponent
        probes.append(Probe(exact, above, below, base[:used]))
    return Readings(base, probes[1].slopes, len(batches[0]), tuple(probes))


def by_gradients(
    config: RunConfig,
    replica: Replica,
    estimator: Estimator,
    loss: Loss,
    batches: Sequence[Batch],
) -> Readings:
    """Measure the whole pool by a backward pass a batch, then the loss along the first step."""
    every = np.arange(config.directions.pool_size, dtype=np.int64)
    measured = [estimator.measure(loss, batch, every) for batch in batches]
    slopes = np.stack([part.values for part in measured], axis=1)
    half = len(batches) // 2
    line = along_first_step(
        config, replica, loss, slopes[:, :half].mean(axis=1), batches[half:], half
    )
    losses = np.array([part.loss for part in measured])
    return Readings(losses, slopes, len(batches[0]), (), line)


@torch.no_grad()
def along_first_step(
    config: RunConfig,
    replica: Replica,
    loss: Loss,
    gradient: Floats,
    batches: Sequence[Batch],
    averaged: int,
) -> Line:
    """Return slope and curvature along the step that a gradient estimate, shape (K,), gives.

    Losses are compared at ± the present learning rate, then around the best rate that they imply,
    until both are within a factor of two: a parabola holds near where it was measured.
    """
    start = replica.coefficients
    step = -gradient
    if config.optimizer.kind == "adam" or config.codec.up == "sign":
        step = np.sign(step)
    unit = step / np.sqrt(np.sum(step**2) or 1.0)  # a change of weights of RMS one
    rate = config.optimizer.learning_rate
    replica.settle()
    base = _mean(loss, batches)
    line = Line(0.0, 0.0, averaged)
    try:
        for _ in range(LINE_TRIES):
            around = []
            for sign in (1, -1):
                replica.set(start + _quanta(config, sign * rate * unit))
                around.append(_mean(loss, batches))
            forward, back = around
            line = Line(
                (back - forward) / (2 * rate), (forward + back - 2 * base) / rate**2, averaged
            )
            if line.slope <= 0 or line.curvature <= 0:
                break
            best = line.slope / line.curvature
            if 0.5 <= best / rate <= 2:
                break
            rate *= float(np.clip(best / rate, 0.1, 10.0))
    finally:
        replica.set(start)
    return line


def _quanta(config: RunConfig, step: Floats) -> Coefficients:
    change = zeros(config.directions.pool_size)
    change[:] = np.rint(step * 2.0**config.directions.quantum_exponent)
    return change


def _losses(
    replica: Replica, loss: Loss, indices: Indices, batches: Sequence[Batch], quanta: int
) -> Floats:
    """Losses at w(A + quanta · e_k), shape (N, B): weights are written once a direction."""
    found = np.empty((len(indices), len(batches)))
    for row, index in enumerate(indices.tolist()):
        with replica.perturbed(index, quanta):
            found[row] = [_finite(loss(batch)) for batch in batches]
    return found


def _mean(loss: Loss, batches: Sequence[Batch]) -> float:
    return float(np.mean([_finite(loss(batch)) for batch in batches]))


def _finite(value: torch.Tensor) -> float:
    return finite(value, ADVICE)
