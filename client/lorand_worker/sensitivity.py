"""Direction scales from a short calibration: which tensors repay being moved.

Along a direction z restricted to one tensor the loss is L ± μ g·z + μ²/2 zᵀHz. Moved by many
tensors' directions at once, a step gains in proportion to Σ σ² G and loses in proportion to
Σ σ² h, where σ = 2^s is a tensor's scale, G = E[(g·z)²] its squared projected gradient and
h = E[zᵀHz] its curvature. What a tensor yields for what it costs is G/h: its scale is in proportion
to that. Both come from losses alone: (L₊ − L₋)/2μ (Spall, IEEE TAC 37(3), 1992) and
(L₊ + L₋ − 2L₀)/μ².
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from lorand.config import RunConfig
from lorand.errors import DataError
from lorand.manifest import Identity, Manifest, TensorSpec
from lorand.replica import CopyReplica
from lorand_worker.bench import Base
from lorand_worker.scales import bounded
from lorand_worker.tasks import Task

EXAMPLES: Final = 32
"""Most examples of the shard that are used."""
DIRECTIONS: Final = 8
"""Directions a tensor: two passes each."""
HEAD_STEPS: Final = 50
HEAD_TARGET: Final = 0.75
"""A new head is first fitted until its loss is this share of what it was, in so many steps."""
FLOOR: Final = 0.01
"""Least curvature that counts, as a share of the tensors' median."""
UNFELT: Final = 1e-6
"""Squared projected gradients below so much of the median are rounding: a key's bias has none."""


@dataclass(frozen=True)
class Sensitivity:
    """What moving one tensor does: mean squared projected gradient G and mean curvature h.

    `error` is the standard error of the curvature.
    """

    name: str
    weights: int
    gradient: float
    curvature: float
    error: float = 0.0


def measure(
    base: Base, config: RunConfig, task: Task, source: random.Random | None = None
) -> list[Sensitivity]:
    """Return what directions restricted to each trainable tensor do to the loss.

    2 · DIRECTIONS passes a tensor on at most EXAMPLES examples, at the run's perturbation scale.
    A zero head hides all that lies below it: once measured, new tensors are fitted by gradients of
    theirs alone before the others are measured. The weights are afterwards what they were. `base`
    keeps a copy of its weights. Raises DataError where the loss is not finite.
    """
    source = source or random.SystemRandom()
    batch = source.sample(range(len(task)), min(EXAMPLES, len(task)))
    base.replica.settle()
    parameters = dict(base.loaded.module.named_parameters())
    specs = base.identity.manifest.tensors
    fitted = {s.name: parameters[s.name] for s in specs if s.name in base.loaded.new_names}
    before = {name: parameter.detach().clone() for name, parameter in fitted.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    found = {}

    def look(chosen: Iterable[TensorSpec]) -> None:
        with torch.no_grad():
            here = float(task.loss(batch))
        for spec in chosen:
            alone = _alone(base, config, spec, parameters[spec.name])
            found[spec.name] = _sensitivity(alone, here, config, task, batch, source)

    try:
        look(spec for spec in specs if spec.name in fitted)
        if fitted:
            _fit(list(fitted.values()), task, batch)
        look(spec for spec in specs if spec.name not in fitted)
        return [found[spec.name] for spec in specs]
    finally:
        for name, parameter in fitted.items():
            parameter.data.copy_(before[name])


def _fit(parameters: Sequence[torch.nn.Parameter], task: Task, batch: Sequence[int]) -> None:
    """Descend by the gradient of these parameters; a step that does not help is halved."""
    step = 2.0**-10  # it doubles while it helps: one long step would go far past the minimum
    for parameter in parameters:
        parameter.requires_grad_(True)
    first = loss = task.loss(batch)
    for _ in range(HEAD_STEPS):
        if loss.detach() <= HEAD_TARGET * first.detach():
            break
        gradients = torch.autograd.grad(loss, parameters)
        while step > 2.0**-30:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.data.sub_(gradient, alpha=step)
            tried = task.loss(batch)
            if tried.detach() < loss.detach():
                loss, step = tried, 2 * step
                break
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.data.add_(gradient, alpha=step)
            step /= 2
    for parameter in parameters:
        parameter.requires_grad_(False)


def _alone(
    base: Base, config: RunConfig, spec: TensorSpec, parameter: torch.nn.Parameter
) -> CopyReplica:
    """A replica of one tensor, unscaled."""
    manifest = Manifest((replace(spec, scale_exponent=0),))
    pool = config.pool(Identity(base.identity.base_digest, b"", manifest))
    return CopyReplica({spec.name: parameter}, manifest, pool)


@torch.no_grad()
def _sensitivity(
    replica: CopyReplica,
    here: float,
    config: RunConfig,
    task: Task,
    batch: Sequence[int],
    source: random.Random,
) -> Sensitivity:
    """Measure a replica of one tensor; `here` is the loss where it stands."""
    [spec] = replica.manifest.tensors
    quanta = max(1, config.perturbation_quanta)
    scale = quanta * 2.0**-replica.pool.quantum_exponent
    gradients, curvatures = [], []
    for index in source.sample(range(replica.pool.size), DIRECTIONS):
        with replica.perturbed(index, quanta):
            above = float(task.loss(batch))
        with replica.perturbed(index, -quanta):
            below = float(task.loss(batch))
        gradients.append(((above - below) / (2 * scale)) ** 2)
        curvatures.append((above + below - 2 * here) / scale**2)
    replica.settle()
    gradient, curvature = float(np.mean(gradients)), float(np.mean(curvatures))
    if not math.isfinite(gradient + curvature):
        raise DataError(
            f"the loss is not finite when {spec.name!r} is moved by {scale:g}: calibrate with a "
            "smaller estimator.perturbation_scale, or on other data"
        )
    error = float(np.std(curvatures, ddof=1)) / DIRECTIONS**0.5
    return Sensitivity(spec.name, spec.size, gradient, curvature, error)


def exponents(found: Sequence[Sensitivity]) -> dict[str, int]:
    """Return each tensor's exponent: log2 of G/h against that of the typical weight, bounded.

    The typical weight is the median over weights of tensors with a gradient; it keeps 0, and so
    does a tensor that the loss does not feel yet.

    >>> rows = [Sensitivity("body", 1000, 1.0, 10.0), Sensitivity("head", 10, 8.0, 10.0)]
    >>> exponents([*rows, Sensitivity("unfelt", 10, 0.0, 0.0)])
    {'body': 0, 'head': 3, 'unfelt': 0}
    """
    least = UNFELT * float(np.median([row.gradient for row in found]))
    felt = [row for row in found if row.gradient > least]
    if not felt:
        return {row.name: 0 for row in found}
    costs = {row.name: max(row.curvature, row.error) for row in felt}
    least = FLOOR * float(np.median(list(costs.values()))) or 1.0
    yields = {row.name: math.log2(row.gradient / max(costs[row.name], least)) for row in felt}
    ordered = sorted(felt, key=lambda row: yields[row.name])
    half = sum(row.weights for row in felt) / 2
    passed, typical = 0, yields[ordered[-1].name]
    for row in ordered:
        passed += row.weights
        if passed >= half:
            typical = yields[row.name]
            break
    return {
        row.name: bounded(yields[row.name] - typical) if row.name in yields else 0 for row in found
    }


def identity(base: Base, found: Sequence[Sensitivity]) -> Identity:
    """Return the identity of the run on this base, with the exponents that were found."""
    scale = exponents(found)
    tensors = base.identity.manifest.tensors
    manifest = Manifest(tuple(replace(t, scale_exponent=scale[t.name]) for t in tensors))
    return replace(base.identity, manifest=manifest)


def uncalibrated(config: RunConfig) -> RunConfig:
    """Return the config under which a model can be loaded before its scales are known."""
    directions = config.directions.model_copy(update={"scale_rule": "head"})
    return config.model_copy(update={"directions": directions})
