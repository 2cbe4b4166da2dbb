"""Whether a subspace pays, told from scalars alone by comparison with full space (pure).

Along directions z of ±1 a coordinate, the mean squared projected gradient E[(z · ∇L)²] is the
gradient's energy and E[zᵀHz] the trace of the Hessian, both of what the directions act on. Where P
spans the subspace, what it keeps of them is

    alpha = |Pᵀ∇L|² / |∇L|²        h = tr(PᵀHP) / tr(H)        kappa = alpha / h

A tensor's direction scale 2^s multiplies its part of z in and out of the subspace alike, so that
all four are sums over tensors with the same weights 4^s. A step w −= η·e along an estimate e from n
directions lowers the loss by η·G − η²·E[eᵀHe]/2 with G the energy and E[eᵀHe] ≈ G·tr(H)/n for few
directions: at the best η by n·G / (2·tr(H)). So kappa is the progress of a step relative to full
space, each with the learning rate that suits it, where the subspace keeps as much of a batch's
noise as of the gradient. A random subspace has kappa near 1.

Gradients and curvature drift while a run learns. So a probe, period 8·j, is compared with what a
straight line through the subspace's periods near it, three on either side, says of its own place;
the first, which has none before it, with a line through the four after it. Sums over probes of
either side go into the ratios (a combined ratio estimate, Cochran, Sampling Techniques, 1977,
§6.11), each probe weighted with what its comparison is worth by that design. Errors come from how
far rounds of a probe are apart, and periods of the subspace from their line; by the delta method.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Final

import numpy as np

from lorand.config import RunConfig
from lorand.subspaces import periods
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import diagnostics
from lorand_coordinator.aggregation import Report
from lorand_coordinator.diagnostics import MANY_CLIPPED, Finding, Recent

SIDE: Final = 3
"""So many periods on either side of a probe are compared with it."""
AFTER_FIRST: Final = periods.PROBE_EVERY - SIDE - 1
"""And so many after the first: those that the second leaves."""
FEWEST_PROBES: Final = 2
FEWEST_ROUNDS: Final = 8
"""Below these many rounds in full space nothing is said: how far a few are apart is chance."""
FEWEST_ERRORS: Final = 3.0
"""A ratio is known where what it is divided by is so many of its standard errors from zero."""
LEAST: Final = 0.7
"""Progress relative to full space below which a subspace does not pay."""


@dataclass(frozen=True)
class Pair:
    """Estimates of a mean squared slope and of a mean curvature, with variances and covariance.

    Slopes are in nats a unit of an unscaled weight, curvatures in nats a squared unit.
    """

    slope: float = 0.0
    curvature: float = 0.0
    slope_variance: float = 0.0
    curvature_variance: float = 0.0
    covariance: float = 0.0

    def plus(self, other: "Pair", weight: float) -> "Pair":
        """Return the sum with so much of an independent pair."""
        return Pair(
            self.slope + weight * other.slope,
            self.curvature + weight * other.curvature,
            self.slope_variance + weight**2 * other.slope_variance,
            self.curvature_variance + weight**2 * other.curvature_variance,
            self.covariance + weight**2 * other.covariance,
        )


@dataclass(frozen=True)
class Rounds:
    """Sums over the rounds of a period of x, a squared slope, and y, a curvature."""

    count: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    def plus(self, x: float, y: float) -> "Rounds":
        """Return the sums with one more round."""
        return Rounds(
            self.count + 1,
            self.x + x,
            self.y + y,
            self.xx + x * x,
            self.yy + y * y,
            self.xy + x * y,
        )

    @property
    def mean(self) -> Pair:
        """Their mean and its covariance, from how far the rounds are apart; at least two."""
        n, x, y = self.count, self.x / self.count, self.y / self.count
        freedom = n * (n - 1)
        return Pair(
            x,
            y,
            max(0.0, self.xx - n * x * x) / freedom,
            max(0.0, self.yy - n * y * y) / freedom,
            (self.xy - n * x * y) / freedom,
        )


@dataclass(frozen=True)
class Comparison:
    """What was seen so far: a fold over committed rounds, the same after a restart.

    `now` is the period under way, `near` are those before it, the last one last.
    `full` and `inside` are sums over `probes` comparisons, `full_rounds` the rounds behind the
    former.
    """

    now: Rounds = Rounds()
    near: tuple[Rounds, ...] = ()
    full: Pair = Pair()
    inside: Pair = Pair()
    probes: int = 0
    full_rounds: int = 0
    given_up: bool = False


Known = tuple[float, float] | None
"""A ratio and its standard error; None where it is not known yet."""


@dataclass(frozen=True)
class Kept:
    """alpha, h and kappa: see above."""

    energy: Known
    curvature: Known
    progress: Known


def curvatures(stored: Iterable[pb.StoredContribution]) -> list[float]:
    """Return the curvatures that came with a round's contributions."""
    parts = (part.contribution for part in stored)
    return [part.curvature for part in parts if part.HasField("curvature")]


def drop_unasked(contribution: pb.Contribution, *, probing: bool) -> None:
    """Drop a curvature that nobody asked for, or that is no number; the scalars count."""
    if not (probing and np.isfinite(contribution.curvature)):
        contribution.ClearField("curvature")


def after(
    config: RunConfig,
    before: Comparison,
    committed: int,
    scale_exponent: int,
    reports: Sequence[Report],
    met: Sequence[float],
) -> Comparison:
    """Return the comparison after the round that follows so many commits.

    `met` are the curvatures that came with it. A round without any, or whose scalars are clipped
    because full space has just been entered or left, tells nothing of energies and is left out.
    """
    if not config.subspace.probe or before.given_up:
        return before
    seen = before
    figures = diagnostics.of_round(config, scale_exponent, reports)
    if met and figures.compared and figures.clipped <= MANY_CLIPPED * figures.scalars:
        slope = figures.signal / figures.compared
        seen = replace(seen, now=seen.now.plus(slope, float(np.mean(met))))
    period, then = (
        periods.period(config, periods.pool_after(config, done))
        for done in (committed, committed + 1)
    )
    if period == then:
        return seen
    near = (*seen.near, seen.now)[-periods.PROBE_EVERY :]
    compared = _compared(replace(seen, now=Rounds(), near=near), period)
    return replace(compared, given_up=config.subspace.switch_off and fails(compared))


def _compared(seen: Comparison, period: int) -> Comparison:
    """Take a probe into the sums when the last period that it is compared with has ended."""
    if period == AFTER_FIRST:
        probe, places = 0, [*range(1, AFTER_FIRST + 1)]
    elif period > SIDE and (period - SIDE) % periods.PROBE_EVERY == 0:
        probe, places = period - SIDE, [*range(-SIDE, 0), *range(1, SIDE + 1)]
    else:
        return seen
    at_probe = seen.near[probe - period - 1]
    around = [(k, seen.near[probe + k - period - 1]) for k in places]
    if at_probe.count < 2 or not all(rounds.count for _, rounds in around):
        return seen
    inside, spread = _at_zero(around)
    weight = 1 / (1 + spread)
    return replace(
        seen,
        full=seen.full.plus(at_probe.mean, weight),
        inside=seen.inside.plus(inside, weight),
        probes=seen.probes + 1,
        full_rounds=seen.full_rounds + at_probe.count,
    )


def _at_zero(points: Sequence[tuple[int, Rounds]]) -> tuple[Pair, float]:
    """Return a straight line's values at place 0, and their variance in that of one point.

    Ordinary least squares through m points (k, y_k), both of slopes and of curvatures: the value is
    Σ_k a_k y_k with a_k = 1/m − k̄ (k − k̄) / Σ (k − k̄)², its covariance Σ a_k² times that of the
    residuals, which have m − 2 degrees of freedom.
    """
    places = np.array([k for k, _ in points], dtype=float)
    values = np.array([(r.x / r.count, r.y / r.count) for _, r in points])
    centred = places - places.mean()
    fall = centred @ values / (centred @ centred)
    residuals = values - values.mean(axis=0) - np.outer(centred, fall)
    factors = 1 / len(places) - places.mean() * centred / (centred @ centred)
    spread = float(factors @ factors)
    covariance = spread * (residuals.T @ residuals) / (len(places) - 2)
    slope, curvature = factors @ values
    pair = Pair(
        float(slope),
        float(curvature),
        float(covariance[0, 0]),
        float(covariance[1, 1]),
        float(covariance[0, 1]),
    )
    return pair, spread


def kept(seen: Comparison) -> Kept:
    """Return what the subspace keeps, with standard errors by the delta method.

    With x, y slopes and curvatures of the subspace and X, Y of full space, alpha = x/X, h = y/Y and
    kappa = x·Y / (X·y): var(kappa) is that of the linear part, in which x and y, and X and Y, are
    correlated.
    """
    if seen.probes < FEWEST_PROBES or seen.full_rounds < FEWEST_ROUNDS:
        return Kept(None, None, None)
    full, inside = seen.full, seen.inside
    has_energy = _differs(full.slope, full.slope_variance)
    has_curvature = _differs(full.curvature, full.curvature_variance)
    energy = curvature = progress = None
    if has_energy:
        energy = _ratio(inside.slope, inside.slope_variance, full.slope, full.slope_variance)
    if has_curvature:
        curvature = _ratio(
            inside.curvature, inside.curvature_variance, full.curvature, full.curvature_variance
        )
    if energy and curvature and _differs(inside.curvature, inside.curvature_variance):
        progress = _progress(full, inside)
    return Kept(energy, curvature, progress)


def _progress(full: Pair, inside: Pair) -> tuple[float, float]:
    each = full.curvature / (full.slope * inside.curvature)
    kappa = inside.slope * each
    # Derivatives of kappa by slope and curvature, of either space.
    variance = 0.0
    for pair, by_slope, by_curvature in (
        (inside, each, -kappa / inside.curvature),
        (full, -kappa / full.slope, kappa / full.curvature),
    ):
        variance += by_slope**2 * pair.slope_variance
        variance += by_curvature**2 * pair.curvature_variance
        variance += 2 * by_slope * by_curvature * pair.covariance
    return kappa, sqrt(max(0.0, variance))


def _differs(value: float, variance: float) -> bool:
    """Whether a value is above zero by more than chance; a negative curvature divides nothing."""
    return value > FEWEST_ERRORS * sqrt(variance)


def _ratio(above: float, above_variance: float, below: float, below_variance: float) -> Known:
    ratio = above / below
    return ratio, sqrt(above_variance + ratio**2 * below_variance) / below


def fails(seen: Comparison) -> bool:
    """Return whether the subspace is known to make less than LEAST of full space's progress."""
    progress = kept(seen).progress
    return progress is not None and progress[0] + 2 * progress[1] < LEAST


def told(recent: Recent, seen: Comparison) -> list[Finding]:
    """Return what is worth saying of the last rounds and of the run's subspace, warnings first."""
    found = [*recent.findings(), *findings(recent.config, seen)]
    return sorted(found, key=lambda finding: not finding.warning)


def findings(config: RunConfig, seen: Comparison) -> list[Finding]:
    """Return what is worth saying of the run's subspace; nothing before it is known."""
    found = kept(seen)
    if found.progress is None:
        return _unknown(found)
    kappa, error = found.progress
    head = (
        f"the subspace keeps {_percent(found.energy)} of the gradient's energy and "
        f"{_percent(found.curvature)} of the curvature: a step makes {kappa:.2f} ± {error:.2f} of "
        "the progress of one in full space; "
    )
    if seen.given_up:
        text = "the run has given it up and goes on in full space"
        return [Finding("given up", head + text, warning=False)]
    if fails(seen):
        return [Finding("subspace", head + _WAY_OUT)]
    if kappa - 2 * error > LEAST:
        return [Finding("subspace", head + "it pays, keep it", warning=False)]
    text = f"too little is known to tell it from {LEAST}: see again after more probes"
    return [Finding("subspace", head + text, warning=False)]


_WAY_OUT: Final = (
    'it does not pay: start again with subspace.kind = "full" or other subspace.targets or '
    "subspace.rank, or have runs give it up with subspace.switch_off = true"
)


def _unknown(found: Kept) -> list[Finding]:
    """What is said when energies can be told from noise and curvatures cannot, or are negative."""
    if found.energy is None:
        return []
    text = (
        f"the subspace keeps {_percent(found.energy)} of the gradient's energy; what that is worth "
        "is not known, since curvatures are not known to be above zero: raise "
        "estimator.perturbation_scale or estimator.batch_size"
    )
    return [Finding("subspace", text, warning=False)]


def _percent(known: Known) -> str:
    if known is None:
        return "an unknown share"
    return f"{known[0]:.0%} ± {100 * known[1]:.0f}"
