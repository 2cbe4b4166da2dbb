"""run.lock beside a run file: what the run is about, as `lr-worker prepare` found it."""

from pathlib import Path

from lorand.config import RunConfig
from lorand.errors import ConfigError
from lorand.manifest import LOCK_NAME, Identity


def read(run: Path, config: RunConfig) -> Identity | None:
    """Return the run's identity; None: the first worker's is taken. Raises ConfigError."""
    found = Identity.beside(run)
    if found is not None:
        return found
    lock = run.with_name(LOCK_NAME)
    if not config.run.adopt_first_worker:
        raise ConfigError(
            f"there is no {lock}; write it with `lr-worker prepare {run}`, "
            "or set run.adopt_first_worker = true"
        )
    if config.directions.scale_rule == "calibrated":
        raise ConfigError(
            f"there is no {lock} with calibrated scales (directions.scale_rule); write it with "
            f"`lr-worker prepare {run} --calibrate DATA`"
        )
    if config.subspace.measures_ranks:
        raise ConfigError(
            f"there is no {lock} with the ranks of matrices (subspace.rank_rule); write it with "
            f"`lr-worker prepare {run}`"
        )
    return None
