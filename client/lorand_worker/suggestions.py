"""From what `calibrate` measured to settings of the run: batch, perturbation, learning rate (pure).

Symbols: G the gradient, z a ±1 direction, g = z·G a scalar, S = E[g²] = |G|², N the variance of a
scalar between batches of B examples, T = E[z'Hz] the trace of the Hessian, m the scalars of a
round, n its participants, μ the perturbation scale.
"""

from dataclasses import dataclass
from math import inf, pi, sqrt
from typing import Any, Final

import numpy as np

from lorand import codec
from lorand.codec import Floats
from lorand.config import RunConfig
from lorand_worker.calibration import Readings
from lorand_worker.floor import floor

TOLERATED_ERROR: Final = 0.2
"""Relative error of a scalar from μ below which μ is kept: another batch changes it by far more."""
MAX_BATCH: Final = 4096
ADAPTING_ROUNDS: Final = 20


@dataclass(frozen=True)
class Noise:
    """How scalars vary: `signal` S and `noise` N (of one batch), and the critical batch.

    The critical batch is where noise equals signal, B · N / S: McCandlish et al., An Empirical
    Model of Large-Batch Training, arXiv 1812.06162, eq. 2.9 ("simple noise scale", tr(Σ)/|G|²),
    since E_z[z'Σz] = tr(Σ) and E_z[(z·G)²] = |G|². Infinite where no signal is seen.
    """

    signal: float
    noise: float
    critical_batch: float

    @property
    def ratio(self) -> float:
        """Signal-to-noise of a batch."""
        return max(self.signal, 0.0) / self.noise if self.noise else inf


@dataclass(frozen=True)
class Suggestion:
    """Settings of the run by section, why each, and the loss a round is expected to gain."""

    settings: dict[str, dict[str, Any]]
    reasons: list[str]


def noise_of(slopes: Floats, batch: int) -> Noise:
    """Return signal and noise of slopes of shape (N, B), both unbiased.

    N = mean_k s_k², the variance over batches; S = mean_k (mean_b² − s_k² / B).
    """
    variance = slopes.var(axis=1, ddof=1)
    signal = float(np.mean(slopes.mean(axis=1) ** 2 - variance / slopes.shape[1]))
    noise = float(np.mean(variance))
    return Noise(signal, noise, batch * noise / signal if signal > 0 else inf)


def curvature_of(readings: Readings) -> tuple[float, float]:
    """Return the mean curvature T at the run's μ and its standard error over directions.

    Where rounding drowns it, that at 10 μ: a second difference's noise falls as 1/μ².
    """
    found = (0.0, inf)
    for probe in readings.probes[1:]:
        each = probe.curvatures.mean(axis=1)
        found = float(each.mean()), float(each.std(ddof=1) / sqrt(len(each)))
        if found[0] > 2 * found[1]:
            break
    return found


def zero_share(config: RunConfig, values: Floats) -> float:
    """Return the share of zero codes, once the codec's scale has followed the scalars."""
    flat, up = values.ravel(), config.codec.up
    exponent = codec.first_scale_exponent(up)
    for _ in range(ADAPTING_ROUNDS):
        exponent = codec.next_scale_exponent(up, exponent, codec.encode(up, flat, exponent))
    return float(np.mean(codec.encode(up, flat, exponent) == 0))


def floor_of(readings: Readings, dtype: str) -> float:
    """Return the floor of the loss differences: the estimate, or less where less was seen.

    `floor.floor` takes errors in proportion to the loss. Those of a head that is still zero are
    smaller: the root mean square of d(μ/10) − d(μ)/10, d = L+ − L−, is an upper bound of them.
    """
    small, middle = readings.probes[:2]
    shared = small.differences.shape[1]
    left = small.differences - middle.differences[:, :shared] * (small.scale / middle.scale)
    return min(floor(dtype, float(middle.base.mean()), readings.batch), _rms(left))


def bend(readings: Readings) -> list[float]:
    """Return how much slopes at each μ differ from those at the next smaller, relative to them."""
    found = [0.0][: len(readings.probes)]
    for small, large in zip(readings.probes, readings.probes[1:], strict=False):
        shared = min(small.slopes.shape[1], large.slopes.shape[1])
        change = large.slopes[:, :shared] - small.slopes[:, :shared]
        found.append(_rms(change) / max(_rms(small.slopes[:, :shared]), 1e-300))
    return found


def perturbation_scale(config: RunConfig, readings: Readings, dtype: str) -> tuple[float, str]:
    """Return μ and why.

    A scalar's relative error is e(μ)² = (a/μ)² + (b μ^p)²: a from rounding, a = floor / (2 rms g)
    for `spsa`; b from what a difference leaves of higher derivatives. For `spsa` p = 2, and slopes
    at 10 μ and at μ differ by 99 b μ²; for `one-sided` (floor / rms g) p = 1 and b is half the
    spread of the curvatures over rms g. The least is at μ^(2p + 2) = a² / (p b²).
    """
    present, middle = config.estimator.perturbation_scale, readings.probes[1]
    size = _rms(middle.slopes)
    if size == 0:
        return min(10 * present, 1024.0), "no difference of losses at all: ten times as far"
    rounding = floor_of(readings, dtype) / size
    if config.estimator.kind == "one-sided":
        p, a = 1, rounding
        b = float(middle.curvatures.mean(axis=1).std(ddof=1)) / (2 * size)
    else:
        p, a = 2, rounding / 2
        b = bend(readings)[2] / 99 / present**2
    error = sqrt((a / present) ** 2 + (b * present**p) ** 2)
    what = "rounding" if a / present > b * present**p else "the bend of the loss"
    if error <= TOLERATED_ERROR:
        return present, f"kept: it adds {error:.1%} of error to a scalar, mostly {what}"
    best = (a * a / (p * b * b)) ** (1 / (2 * p + 2)) if b > 0 else inf
    best = float(np.clip(best, present / 10, present * 10))
    return one_digit(best), f"at {present:g}, {what} adds {error:.0%} of error to a scalar"


def batch_size(config: RunConfig, noise: Noise, examples: int) -> tuple[int, str]:
    """Return the examples a participant measures on, and why.

    Up to the critical batch, twice the examples are worth twice the rounds, and cost no bytes: the
    round's n participants share it. A power of two, at most the local examples.
    """
    participants = config.rounds.quorum if config.directions.mode == "shared" else 1
    most = min(examples, MAX_BATCH)
    if noise.critical_batch == inf:
        return min(most, 4 * config.estimator.batch_size), "no signal is seen at this size"
    share = max(1.0, noise.critical_batch / participants)
    wanted = 2 ** round(np.log2(share))
    why = f"critical batch about {noise.critical_batch:.0f}, {participants} share it"
    if wanted > most:
        return most, f"{why}; more than {most} are not here"
    return int(wanted), why


def learning_rate(
    config: RunConfig, readings: Readings, noise: Noise, batch: int
) -> tuple[float, str]:
    """Return the learning rate of the first rounds in the run's units, and why.

    Quadratic model. A round of m scalars with noise N_r each moves weights by r in RMS along
    p = Σ_k h_k z_k / sqrt(m E[h²]), so L falls by r a − r² T / 2, a = f sqrt(m) S / sqrt(S + N_r),
    best at r = a / T. With h the scalars themselves (sgd) f = 1; with their signs (adam in its
    first rounds, sign codes, majority) f = sqrt(2/π). Off-diagonal z_j'Hz_k are left out (small
    while m is far below the pool: then weights move along nearly independent directions).

    Where all directions are measured at once (`backprop`), a and T are those of the line along the
    first step, a corrected for the noise of a round's batch.

    In the run's units: with `normalise` and with adam learning_rate is r. Without, it is
    r sqrt(m) / rms(h): w −= learning_rate/m · Σ h_k z_k. Momentum sums to 1 / (1 − momentum).
    """
    own = config.directions.mode == "own"
    participants = config.rounds.quorum
    measured = config.num_directions * (participants if own else 1)
    noise_here = noise.noise * readings.batch / batch / (1 if own else participants)
    signal = max(noise.signal, 0.0)
    signs = config.codec.up == "sign" or config.rounds.aggregation == "majority"
    settings = config.optimizer
    if signal == 0.0:
        return settings.learning_rate, "kept: no signal is seen in so few batches"
    size = sqrt(signal + noise_here)
    if readings.line is not None:
        line = readings.line
        seen = sqrt(signal + noise.noise / line.batches)
        slope, curvature = line.slope * seen / size, line.curvature
        if slope <= 0 or curvature <= 0:
            return settings.learning_rate, "kept: the loss along the first step is no parabola"
    else:
        factor = sqrt(2 / pi) if signs or settings.kind == "adam" else 1.0
        slope = factor * sqrt(measured) * signal / size
        curvature, error = curvature_of(readings)
        if curvature < 2 * error:
            return settings.learning_rate, "kept: the curvature cannot be told from zero"
    best = slope / curvature
    rate = best
    if settings.kind == "sgd":
        rate *= 1 - settings.momentum
        if not settings.normalise:
            rate *= sqrt(measured) / (1.0 if signs else size)
    gain = slope * best / 2
    return one_digit(rate), (
        f"{_unit(config)}; a quadratic model of the first rounds expects each to lower the loss by "
        f"{gain:.2g}"
    )


def suggest(config: RunConfig, readings: Readings, dtype: str, examples: int) -> Suggestion:
    """Return settings of the run for what was measured with passes in `dtype`."""
    noise = noise_of(readings.slopes, readings.batch)
    settings: dict[str, dict[str, Any]] = {"estimator": {}, "optimizer": {}}
    reasons = []
    if config.estimator.kind in ("spsa", "one-sided"):
        value, why = perturbation_scale(config, readings, dtype)
        settings["estimator"]["perturbation_scale"] = value
        reasons.append(f"perturbation_scale: {why}")
    batch, why = batch_size(config, noise, examples)
    settings["estimator"]["batch_size"] = batch
    reasons.append(f"batch_size: {why}")
    if config.local.taken:
        del settings["optimizer"]
        reasons.append("learning_rate: none, since local steps have local.learning_rate for theirs")
        return Suggestion(settings, reasons)
    rate, why = learning_rate(config, readings, noise, batch)
    settings["optimizer"]["learning_rate"] = rate
    reasons.append(f"learning_rate: {why}")
    return Suggestion(settings, reasons)


def one_digit(value: float) -> float:
    """Return a number rounded to one significant digit: no suggestion is more exact."""
    return float(f"{value:.1g}")


def _unit(config: RunConfig) -> str:
    if config.optimizer.kind == "adam" or config.optimizer.normalise:
        return "root mean square change of an unscaled weight in a round"
    return "factor of the gradient estimate"


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(values**2)))
