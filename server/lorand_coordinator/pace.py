"""How much a round asks of a participant, examples and directions, grown by the noise (pure).

Batches: up to the critical one, where the noise of the batch equals the signal, twice the examples
in a round are worth two rounds: the same passes, half the bytes. McCandlish et al., "An Empirical
Model of Large-Batch Training", arXiv 1812.06162, eq. 2.8 and appendix A.1, with the participants'
scalars for the small and their mean for the large batch.

Directions: a normalised step of rate η along n of them gains η·√n·|G|²/√(|G|² + v) and costs
η²·tr(H)/2, whatever n is, where |G|² is the signal and v the noise of a scalar. So as signal fades
a given rate wants n in proportion to η²·(|G|² + v)/|G|⁴, or the rate to fall; here n grows, as
Smith et al. (ICLR 2018) grow batches, so that the ratio of gain to cost stays what it was at first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from lorand.config import RunConfig
from lorand_coordinator import diagnostics
from lorand_coordinator.aggregation import Report

DECAY: Final = 0.95
FIRST_ROUNDS: Final = 10
"""So many rounds are looked at before anything changes."""


@dataclass(frozen=True)
class Pace:
    """What the next round asks for (0: what the config says), rounds seen, and running means.

    `signal` and `noise` are those of a mean scalar, noise times its examples; `needed` is what
    η²·(|G|² + v)/|G|⁴ was after the first rounds.
    """

    batch_size: int = 0
    directions: int = 0
    rounds: int = 0
    signal: float = 0.0
    noise: float = 0.0
    needed: float = 0.0


def start(config: RunConfig) -> Pace:
    """Return the pace of the first round."""
    estimator = config.estimator
    return Pace(
        batch_size=estimator.batch_size if estimator.max_batch_size else 0,
        directions=estimator.directions_per_round if estimator.max_directions_per_round else 0,
    )


def after(
    config: RunConfig,
    pace: Pace,
    scale_exponent: int,
    reports: Sequence[Report],
    factor: float,
) -> Pace:
    """Return the pace of the round after one with these reports; `factor` is the schedule's.

    Nothing shrinks, and what grows doubles. What differs between participants' data looks
    like noise that no batch averages out: the maxima bound what that costs.
    """
    if not (pace.batch_size or pace.directions) or len(reports) < 2:
        return pace
    figures = diagnostics.of_round(config, scale_exponent, reports)
    examples = len(reports) * (pace.batch_size or config.estimator.batch_size)
    seen = replace(
        pace,
        rounds=pace.rounds + 1,
        signal=_mean(pace, pace.signal, figures.signal / figures.compared),
        noise=_mean(pace, pace.noise, figures.noise / figures.compared * examples),
    )
    if seen.rounds < FIRST_ROUNDS:
        return seen
    return replace(
        seen,
        batch_size=_batch_size(config, seen, examples),
        directions=_directions(config, seen, examples, factor),
        needed=seen.needed or _needed(seen, examples, factor),
    )


def _mean(pace: Pace, before: float, now: float) -> float:
    """A running mean; of all rounds until there are enough to forget some."""
    decay = min(DECAY, pace.rounds / (pace.rounds + 1))
    return decay * before + (1 - decay) * now


def _batch_size(config: RunConfig, pace: Pace, examples: int) -> int:
    """Twice the batch where it is below the critical one."""
    grows = pace.noise > pace.signal * examples
    return min(config.estimator.max_batch_size, (2 if grows else 1) * pace.batch_size)


def _needed(pace: Pace, examples: int, factor: float) -> float:
    """η²·(|G|² + v)/|G|⁴ in units of the first rate; 0 where no signal is seen."""
    if pace.signal <= 0:
        return 0.0
    return factor**2 * (pace.signal + pace.noise / examples) / pace.signal**2


def _directions(config: RunConfig, pace: Pace, examples: int, factor: float) -> int:
    """Twice as many where so many keep the ratio of gain to cost, which is known roughly."""
    if not pace.directions or not pace.needed:
        return pace.directions
    estimator, doubled = config.estimator, 2 * pace.directions
    wanted = estimator.directions_per_round * _needed(pace, examples, factor) / pace.needed
    grows = pace.signal <= 0 or wanted >= doubled
    return min(estimator.max_directions_per_round, doubled) if grows else pace.directions
