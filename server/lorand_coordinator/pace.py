"""How many examples a round asks of a participant: grown by the measured noise (pure).

Up to the critical batch, where the noise of the batch equals the signal, twice the examples in a
round are worth two rounds: the same passes, half the bytes. McCandlish et al., "An Empirical Model
of Large-Batch Training", arXiv 1812.06162, eq. 2.8 and appendix A.1, with the participants' scalars
for the small and their mean for the large batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lorand.config import RunConfig
from lorand_coordinator import diagnostics
from lorand_coordinator.aggregation import Report

DECAY: Final = 0.9
FIRST_ROUNDS: Final = 10
"""So many rounds are looked at before anything changes."""


@dataclass(frozen=True)
class Pace:
    """Running sums of signal and of noise times examples, rounds seen, and the present batch."""

    batch_size: int
    signal: float = 0.0
    noise: float = 0.0
    rounds: int = 0


def start(config: RunConfig) -> Pace:
    """Return the pace of the first round."""
    return Pace(config.estimator.batch_size)


def after(config: RunConfig, pace: Pace, scale_exponent: int, reports: Sequence[Report]) -> Pace:
    """Return the pace of the round after one with these reports.

    The batch doubles while it is below the critical one, noise · examples / signal over the
    participants, and never shrinks: what differs between participants' data looks like noise that
    no batch averages out, and `max_batch_size` bounds what that costs.
    """
    most = config.estimator.max_batch_size
    if pace.batch_size >= most or len(reports) < 2:
        return pace
    figures = diagnostics.of_round(config, scale_exponent, reports)
    examples = len(reports) * pace.batch_size
    signal = DECAY * pace.signal + (1 - DECAY) * figures.signal
    noise = DECAY * pace.noise + (1 - DECAY) * figures.noise * examples
    rounds = pace.rounds + 1
    grows = rounds >= FIRST_ROUNDS and noise > signal * examples
    batch_size = min(most, 2 * pace.batch_size) if grows else pace.batch_size
    return Pace(batch_size, signal, noise, rounds)
