"""A worker's own way to the scalars of a run that leaves it to its workers (`estimator.mixed`).

Two losses and a backward pass tell the same slopes z·∇L, the former up to O(μ²) and
rounding, so that codes of both are averaged as codes of one are. Who has memory for a backward pass
measures any number of directions in one; who has not takes two forward passes a direction.
"""

from enum import StrEnum

from lorand.config import EstimatorKind, RunConfig
from lorand.errors import ConfigError


class OwnEstimator(StrEnum):
    """`run` is what the run file says."""

    RUN = "run"
    SPSA = "spsa"
    BACKPROP = "backprop"


def choose(asked: OwnEstimator, config: RunConfig) -> EstimatorKind:
    """Return the estimator that this worker measures with. Raises ConfigError."""
    kind: EstimatorKind = config.estimator.kind
    if asked in (OwnEstimator.RUN, kind):
        return kind
    if not config.estimator.mixed:
        raise ConfigError(
            f"--estimator {asked}: all workers of the run {config.run.name!r} measure with "
            f"{kind}; join without --estimator, or ask the coordinator's operator for a run with "
            '[estimator] kind = "spsa" and mixed = true'
        )
    return "backprop"
