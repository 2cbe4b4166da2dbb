"""The floor of a loss difference: what rounding alone makes of |L+ − L−|.

A scalar from two losses is their difference over 2μ; where the difference is of the size of the
losses' rounding errors, the scalar is noise that no larger batch averages out.
"""

import logging
from math import sqrt
from typing import Final

import numpy as np

from lorand.config import EstimatorKind, RunConfig
from lorand_worker.estimators import Measurement
from lorand_worker.precision import Precision

EPSILON: Final = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Distance from one to the next number of a precision."""
SCALARS_SEEN: Final = 32
MOST: Final = 0.5

log = logging.getLogger("lorand")


def passes_dtype(config: RunConfig, precision: Precision) -> str:
    """Return the dtype that forward passes compute in."""
    return "bfloat16" if precision is Precision.BFLOAT16 else config.model.dtype


def floor(dtype: str, loss: float, batch: int) -> float:
    """Return the root mean square of L+ − L− when nothing but rounding tells them apart.

    √2 · L · max(ε_passes / √batch, ε_float32): passes in a precision round each example's loss to
    about ε of itself, independently, and the mean over a batch averages that; the mean itself is a
    float32 number whatever the passes are. An estimate: two-point differences of MiniLM's loss at
    vanishing μ were within a factor of three of it, in float32 and in bfloat16, for batches of 4
    to 64. Errors really grow with the logits: while a new head is still zero they are smaller.

    >>> floor("float32", 0.5, 16) == 2**0.5 * 0.5 * 2**-23
    True
    >>> floor("bfloat16", 0.5, 16) == 2**0.5 * 0.5 * 2**-7 / 4
    True
    """
    return sqrt(2) * abs(loss) * max(EPSILON[dtype] / sqrt(batch), EPSILON["float32"])


class FloorWatch:
    """Warns once when most loss differences of this worker are below the floor."""

    def __init__(
        self,
        config: RunConfig,
        precision: Precision,
        batch: int,
        kind: EstimatorKind | None = None,
    ) -> None:
        """`batch` is the number of examples behind a loss, `kind` a worker's own estimator."""
        self._dtype = passes_dtype(config, precision)
        self._batch = batch
        # Zero where what is reported is no difference of two losses, but a slope or where local
        # steps led: nothing to watch.
        passes = {"spsa": 2.0, "one-sided": 1.0}.get(kind or config.estimator.kind, 0.0)
        self._step = 0.0 if config.local.taken else passes
        self._step *= config.estimator.perturbation_scale
        self._seen = 0
        self._below = 0
        self._warned = False

    def see(self, measured: Measurement) -> None:
        """Count the scalars of a round."""
        if self._warned or not self._step or measured.loss is None:
            return
        limit = floor(self._dtype, measured.loss, self._batch)
        self._seen += len(measured.values)
        self._below += int(np.count_nonzero(np.abs(measured.values) * self._step <= limit))
        if self._seen < SCALARS_SEEN:
            return
        if self._below > MOST * self._seen:
            self._warned = True
            log.warning("%s", self._sentence(limit))
        self._seen = self._below = 0

    def _sentence(self, limit: float) -> str:
        instead = "join with --precision float32, or " if self._dtype == "bfloat16" else ""
        return (
            f"{self._below / self._seen:.0%} of this worker's loss differences are below "
            f"{limit:.1e}, about what {self._dtype} passes resolve, so that its scalars may be "
            f"mostly rounding: {instead}ask for a run with a larger estimator.perturbation_scale"
        )
