"""A quadratic of which energies and curvatures are known, measured in a subspace and in full space.

L(w) = g · w + ½ wᵀ diag(H) w, of which participants see g with noise of their own batches.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.runs import config_of

from lorand import codec
from lorand.codec import Floats
from lorand.config import RunConfig
from lorand.subspaces import periods
from lorand_coordinator import payoff
from lorand_coordinator.aggregation import Report
from lorand_coordinator.payoff import Comparison

PARTICIPANTS = 2


def probed(rounds: int = 8, directions: int = 8, **changes: Any) -> RunConfig:
    """A run whose periods have so many rounds, each of so many directions."""
    subspace = {"kind": "coordinate", "rank": 1, "probe": True, **changes.pop("subspace", {})}
    return config_of(
        run={"rounds": 100_000},
        directions={"rotate_every": rounds},
        estimator={"directions_per_round": directions},
        subspace=subspace,
        **changes,
    )


@dataclass
class Landscape:
    """Slopes and curvatures a coordinate, shape (d,), and how much a batch adds to a slope.

    `inside` says for a period which coordinates its subspace spans, as indices. All slopes fall by
    the factor `fade` a round, all curvatures by its root.
    """

    slopes: Floats
    curvatures: Floats
    noise: float = 0.3
    fade: float = 1.0

    def energy(self, inside: NDArray[np.int64]) -> float:
        """alpha."""
        return float((self.slopes[inside] ** 2).sum() / (self.slopes**2).sum())

    def bend(self, inside: NDArray[np.int64]) -> float:
        """h."""
        return float(self.curvatures[inside].sum() / self.curvatures.sum())

    def measure(
        self, at: NDArray[np.int64], done: int, count: int, rng: np.random.Generator
    ) -> tuple[list[Floats], list[float]]:
        """Return each participant's scalars along the same directions, and the curvature it met."""
        z = rng.choice([-1.0, 1.0], (count, len(at)))
        slopes = self.slopes[at] * self.fade**done
        spread = self.noise * np.sqrt(np.mean(self.slopes**2)) * self.fade**done
        scalars, met = [], []
        for _ in range(PARTICIPANTS):
            scalars.append(z @ (slopes + rng.normal(0, spread, len(at))))
            bend = self.curvatures[at].sum() * self.fade ** (done / 2)
            met.append(float(bend * (1 + 0.3 * rng.normal() / np.sqrt(count))))
        return scalars, met


def compare(
    config: RunConfig,
    landscape: Landscape,
    bases: "list[NDArray[np.int64]] | NDArray[np.int64]",
    last_period: int,
    seed: int = 0,
) -> Comparison:
    """Return what is known after a period; `bases` is one for all or one a period."""
    rng = np.random.default_rng(seed)
    seen, done, up = Comparison(), 0, config.codec.up
    scale_exponent = codec.first_scale_exponent(up)
    whole = np.arange(len(landscape.slopes))
    while (period := periods.period(config, config.pool_after(done))) <= last_period:
        basis = bases[period] if isinstance(bases, list) else bases
        at = whole if periods.in_full_space(config, period) or seen.given_up else basis
        scalars, met = landscape.measure(at, done, config.num_directions, rng)
        reports = [Report(codec.encode(up, part, scale_exponent)) for part in scalars]
        seen = payoff.after(config, seen, done, scale_exponent, reports, met)
        arrived = np.concatenate([report.codes for report in reports])
        scale_exponent = codec.next_scale_exponent(up, scale_exponent, arrived)
        done += 1
    return seen
