"""Whether a perturbation moves the weights at all, in the dtype that they are kept in."""

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch

from lorand.codec import Floats
from lorand.config import RunConfig
from lorand.errors import ConfigError
from lorand.replica import Replica

LEAST_MOVED: Final = 0.5
"""Share of the weights that have to move for scalars to be slopes along the directions."""
ADVISED_MOVED: Final = 0.9
SAMPLED: Final = 4096
"""Weights looked at in a tensor: of a few million, they are enough to know a share."""


def check_perturbation(config: RunConfig, replica: Replica) -> None:
    """Raise ConfigError when perturbing by μ·2^s rounds away in most of the trained weights.

    The replica stands at the weights in question. Estimators of exact slopes perturb nothing.
    """
    if config.estimator.kind not in ("spsa", "one-sided"):
        return
    needed, counts = smallest_moves(replica)
    scale = config.perturbation_quanta * 2.0**-config.directions.quantum_exponent
    lost = float(np.sum(counts[needed > scale]) / np.sum(counts))
    if lost <= 1 - LEAST_MOVED:
        return
    order = np.argsort(needed)
    share = np.cumsum(counts[order]) / np.sum(counts)
    enough = float(needed[order][np.searchsorted(share, ADVISED_MOVED)])
    dtypes = ", ".join(sorted({spec.dtype for spec in replica.manifest.tensors}))
    instead = "" if dtypes == "float32" else ', or model.dtype = "float32"'
    raise ConfigError(
        f"estimator.perturbation_scale = {scale:.3g} rounds away in {lost:.0%} of the trained "
        f"{dtypes} weights, so that moving them changes nothing: set it to at least "
        f"{_rounded_up(enough):g}{instead}"
    )


def smallest_moves(replica: Replica) -> tuple[Floats, Floats]:
    """Return the smallest μ that moves each of a sample of weights, and how many each stands for.

    A weight of magnitude |w| in [2^e, 2^(e+1)) moves when μ·2^s exceeds half the distance to its
    neighbour, ε·2^e / 2; below the smallest normal number these distances are all alike.
    """
    pairs = list(_moves(replica))
    return np.concatenate([m for m, _ in pairs]), np.concatenate([c for _, c in pairs])


def _moves(replica: Replica) -> Iterator[tuple[Floats, Floats]]:
    exponents = {spec.name: spec.scale_exponent for spec in replica.manifest.tensors}
    replica.settle()
    for name, tensor in replica.weights():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLED)].float().abs().cpu().numpy()
        limits = torch.finfo(tensor.dtype)
        binade = np.floor(np.log2(np.maximum(sample, limits.tiny)))
        moves = limits.eps / 2 * np.exp2(binade) * 2.0 ** -exponents[name]
        yield moves.astype(np.float64), np.full(len(sample), len(flat) / len(sample))


def _rounded_up(value: float) -> float:
    """Return a number of one digit that is not smaller."""
    unit = 10.0 ** np.floor(np.log10(value))
    return float(f"{np.ceil(value / unit) * unit:.1g}")
