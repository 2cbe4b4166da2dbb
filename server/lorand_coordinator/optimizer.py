"""Server optimizers on the K numbers: SGD with momentum and Adam, and the codes of ΔA (pure).

A round measures some directions (zeroth-order) or all of them (first-order); only the measured
coordinates and their moments move (as in torch's SparseAdam), so ΔA has one code a measured
direction. A step is a vector of quanta; what its codes lose is kept as error feedback
(Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019), K numbers at the coordinator.

With clip_factor a scalar is bounded by the spread of earlier rounds, which the ledger determines.

learning_rate is in units of an unscaled weight. With `normalise` (SGD) and with Adam it is the
root mean square by which a round changes such a weight, whatever K, model and loss are; without,
w −= learning_rate · gradient estimate. Of local steps it is the share that is taken of their mean,
and the schedule acts on the local rate instead.
"""

from dataclasses import dataclass, replace

import numpy as np

from lorand import codec
from lorand.codec import Codes, Floats
from lorand.coefficients import Coefficients, add, zeros
from lorand.config import RunConfig
from lorand.directions import Draws
from lorand_coordinator import pace
from lorand_coordinator.aggregation import Estimate, Report, aggregate, scaling_codes
from lorand_coordinator.pace import Pace

ADAM_EPSILON = 1e-12
"""Only against division by zero: codes are integers, so a moment is zero or far above this."""


@dataclass(frozen=True)
class State:
    """Everything the coordinator carries from round to round; a fold over the ledger.

    Arrays have shape (K,): A in quanta, first and second moments, visits a coordinate, error
    feedback in quanta. `spread` and `spread_weight` are a running mean of squared scalars.
    """

    coefficients: Coefficients
    first: Floats
    second: Floats
    visits: Floats
    feedback: Floats
    spread: float
    spread_weight: float
    scale_exponent: int
    committed: int
    pace: Pace


@dataclass(frozen=True)
class Update:
    """ΔA as the ledger holds it: scale · codes at `indices`."""

    indices: Coefficients
    scale: int
    codes: Codes


def start(config: RunConfig) -> State:
    """Return the state before the first round."""
    size = config.directions.pool_size
    empty = np.zeros(size)
    scale_exponent = codec.first_scale_exponent(config.codec.up)
    paced = pace.start(config)
    return State(zeros(size), empty, empty, empty, empty, 0.0, 0.0, scale_exponent, 0, paced)


def advance(
    config: RunConfig,
    draws: Draws,
    state: State,
    round_index: int,
    reports: dict[int, Report],
) -> tuple[State, Update]:
    """Return the state after a round and the update it commits.

    Deterministic: a restarted coordinator repeats it from the stored contributions.
    """
    estimate = aggregate(config, draws, round_index, state.scale_exponent, reports)
    estimate = replace(estimate, values=_clipped(config, state, estimate.values))
    moved, step = _step(config, state, estimate)
    wanted = step * 2.0**config.directions.quantum_exponent + state.feedback[estimate.indices]
    scale, codes = codec.quantise_delta(config.codec.down, wanted)
    change = codec.delta(scale, codes)
    feedback = state.feedback.copy()
    feedback[estimate.indices] = wanted - change
    exponent = state.scale_exponent
    if not config.local.taken:
        followed = scaling_codes(config, reports)
        exponent = codec.next_scale_exponent(config.codec.up, exponent, followed)
    after = replace(
        moved,
        coefficients=add(state.coefficients, estimate.indices, change),
        feedback=feedback,
        scale_exponent=exponent,
        committed=state.committed + 1,
        pace=pace.after(
            config,
            state.pace,
            state.scale_exponent,
            [reports[worker] for worker in sorted(reports)],
            config.rate_factor(state.committed),
        ),
    )
    if config.pool_after(after.committed) != config.pool_after(state.committed):
        after = _on_new_pool(after)
    return after, Update(estimate.indices, scale, codes)


def _on_new_pool(state: State) -> State:
    """What a coordinate of the old pool has gathered is of no use to the new one's."""
    empty = np.zeros(len(state.first))
    return replace(
        state,
        coefficients=zeros(len(empty)),
        first=empty,
        second=empty,
        visits=empty,
        feedback=empty,
    )


def _step(config: RunConfig, state: State, estimate: Estimate) -> tuple[State, Floats]:
    """Return the moved moments and the change of A at the estimate's indices, in weight units."""
    settings = config.optimizer
    rate = settings.learning_rate
    if not estimate.walked:
        rate *= config.rate_factor(state.committed)
    if settings.kind == "adam":
        return _adam(config, state, estimate, rate)
    at, values = estimate.indices, estimate.values
    first = state.first.copy()
    first[at] = _momentum(config, state) * first[at] + values
    moved = replace(_spread_after(config, state, values), first=first)
    if not settings.normalise:
        return moved, -rate / (1 if estimate.walked else estimate.measured) * first[at]
    if moved.spread == 0.0:
        return moved, np.zeros_like(values)
    typical = np.sqrt(moved.spread / moved.spread_weight)
    return moved, -rate / np.sqrt(estimate.measured) * first[at] / typical


def _momentum(config: RunConfig, state: State) -> float:
    """Return the share of what was gathered that a round keeps.

    With DIFF2 all of it, to which a round adds what the gradient changed by; none at a restart,
    which brings the gradient itself (`lorand.privacy.diff2.accumulated`).
    """
    if not config.privacy.differences:
        return config.optimizer.momentum
    return 0.0 if config.privacy.restarts(state.committed) else 1.0


def _spread_after(config: RunConfig, state: State, values: Floats) -> State:
    """Return the state with the running mean of squared scalars one round further."""
    decay = config.optimizer.spread_decay
    spread = decay * state.spread + (1 - decay) * _squared_spread(config, values)
    return replace(state, spread=spread, spread_weight=decay * state.spread_weight + (1 - decay))


def _clipped(config: RunConfig, state: State, values: Floats) -> Floats:
    """Return the aggregated scalars, shape (n,), none beyond clip_factor running spreads.

    The spread is that of the rounds before (as they were clipped), so that an outlier does not
    raise its own bound; the first round has none, nor has one after rounds of zeros alone.
    One-sided scalars, which share what the curvature adds, are clipped about their median.
    """
    factor = config.optimizer.clip_factor
    if factor == 0.0 or state.spread == 0.0:
        return values
    bound = factor * np.sqrt(state.spread / state.spread_weight)
    centre = np.median(values) if config.estimator.kind == "one-sided" else 0.0
    clipped: Floats = np.clip(values, centre - bound, centre + bound)
    return clipped


def _squared_spread(config: RunConfig, values: Floats) -> float:
    """Mean square of the scalars; of one-sided ones about their mean (FZOO, arXiv 2506.09034).

    What the curvature adds to a one-sided scalar is nearly the same in all directions.
    """
    if config.estimator.kind == "one-sided" and len(values) > 1:
        return float(np.var(values, ddof=1))
    return float(np.mean(values**2))


def _adam(config: RunConfig, state: State, estimate: Estimate, rate: float) -> tuple[State, Floats]:
    """Adam (Kingma and Ba, ICLR 2015, algorithm 1) with a step count a coordinate."""
    settings = config.optimizer
    at, values = estimate.indices, estimate.values
    first, second, visits = state.first.copy(), state.second.copy(), state.visits.copy()
    first[at] = settings.beta1 * first[at] + (1 - settings.beta1) * values
    second[at] = settings.beta2 * second[at] + (1 - settings.beta2) * values**2
    visits[at] += 1
    mean = first[at] / (1 - settings.beta1 ** visits[at])
    variance = second[at] / (1 - settings.beta2 ** visits[at])
    step = -rate / np.sqrt(len(at)) * mean / (np.sqrt(variance) + ADAM_EPSILON)
    if settings.clip_factor:
        state = _spread_after(config, state, values)
    return replace(state, first=first, second=second, visits=visits), step
