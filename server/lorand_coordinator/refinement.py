"""A learning-rate schedule refined from the scalars of an earlier run (pure).

Defazio, Cutkosky, Mehta and Mishchenko, When, Why and How Much? Adaptive Learning Rate Scheduling
by Refinement, arXiv 2310.07831, algorithm 1: from the gradient norms G_t of a run of T rounds,

    w_t = Ĝ_t^-2        Ĝ = median filter of G, τ T rounds wide
    η_t ∝ w_t · Σ_{p > t} w_p

or, for optimizers that step by coordinates such as Adam, w_t = Ĝ_t^-1 with the l1 norm. Equal norms
give linear decay; large ones at the start give a warm-up, falling ones a faster end.
"""

from collections.abc import Iterable
from typing import Final, Literal

import numpy as np

from lorand.codec import Floats
from lorand.config import RunConfig
from lorand.errors import LedgerError
from lorand.schedules import REFINED_POINTS, exact
from lorand_coordinator.aggregation import aggregate
from lorand_coordinator.history import Round

Norm = Literal["l1", "l2"]

SMOOTHING: Final = 0.1
"""τ, the filter's width as a share of the run, as in the paper's experiments."""
FEWEST_ROUNDS: Final = 20


def norm_for(config: RunConfig) -> Norm:
    """Return the norm that belongs to a run's optimizer: l1 for Adam, else l2."""
    return "l1" if config.optimizer.kind == "adam" else "l2"


def norms(config: RunConfig, rounds: Iterable[Round], norm: Norm) -> Floats:
    """Return the norm of each round's aggregated scalars, shape (T,), per direction.

    The mean magnitude or the root mean square: random ±1 directions scale either norm of the
    gradient by a factor that stays the same along the run. One-sided scalars are taken about their
    mean, as the optimizer does.
    """
    found = []
    for part in rounds:
        estimate = aggregate(
            config, part.draws, part.round_index, part.scale_exponent, part.reports
        )
        values = estimate.values
        if config.estimator.kind == "one-sided" and len(values) > 1:
            values = values - values.mean()
        found.append(np.mean(np.abs(values)) if norm == "l1" else np.sqrt(np.mean(values**2)))
    return np.array(found)


def refine(observed: Floats, norm: Norm = "l2") -> Floats:
    """Return the refined schedule, shape (T,), its largest value 1, from norms of shape (T,).

    Rounds whose scalars were all zero tell nothing and count as the smallest norm that was seen.
    Raises LedgerError for too few rounds, or for none that tells.

    >>> refine(np.ones(20)).round(2).tolist()[:4]
    [1.0, 0.95, 0.89, 0.84]
    """
    if len(observed) < FEWEST_ROUNDS:
        raise LedgerError(
            f"the ledger has {len(observed)} committed rounds; a schedule is refined from at "
            f"least {FEWEST_ROUNDS}"
        )
    seen = observed[observed > 0]
    if not len(seen):
        raise LedgerError("all scalars of the ledger are zero: see `lr-coordinator diagnose`")
    smooth = median_filter(np.maximum(observed, seen.min()), SMOOTHING)
    weights = (smooth / smooth.min()) ** (-1.0 if norm == "l1" else -2.0)
    after = np.append(np.cumsum(weights[::-1])[::-1][1:], 0.0)
    factors: Floats = weights * after
    result: Floats = factors / factors.max()
    return result


def median_filter(values: Floats, share: float) -> Floats:
    """Return the running median, `share` of the values wide (an odd number, at least 3).

    Beyond the first value it is repeated; beyond the last the values are reflected, so that the
    end of a run, where the norms change most, is not drawn towards one value.
    """
    half = max(1, int(share * len(values)) // 2)
    padded = np.concatenate([np.full(half, values[0]), values, values[-2 : -2 - half : -1]])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    result: Floats = np.median(windows, axis=1)
    return result


def points(factors: Floats) -> list[float]:
    """Return a schedule at no more points than a run file takes, exact as text.

    The last of T factors is 0 and would waste the last round: the points end one round earlier.
    """
    useful = factors[:-1]
    count = min(len(useful), REFINED_POINTS[-1])
    places = np.linspace(0, len(useful) - 1, count)
    at = np.interp(places, np.arange(len(useful)), useful)
    return [exact(float(value)) for value in at]
