"""What committed contributions tell when a run does not learn, in sentences with what to do (pure).

Everything is computed from codes that the ledger holds, so that a restarted coordinator, and anyone
with the ledger, sees the same figures.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Final

import numpy as np

from lorand import codec
from lorand.config import RunConfig
from lorand_coordinator.aggregation import Report, decoded

WINDOW: Final = 20
"""Rounds that the figures are taken over."""
FEWEST_SCALARS: Final = 32
"""Below these many scalars nothing is said: a share of a few is chance."""
MANY_ZERO: Final = 0.5
MANY_CLIPPED: Final = 0.05
MOST: Final = 0.5


@dataclass(frozen=True)
class Figures:
    """Sums over the scalars of one round, or of several.

    `signal` and `noise` are sums over `compared` directions that at least two participants
    measured; `freedom` and `examples` are the degrees of freedom of the noise and the examples
    behind one mean scalar, summed over these directions.
    """

    scalars: int = 0
    zeros: int = 0
    clipped: int = 0
    signal: float = 0.0
    noise: float = 0.0
    compared: int = 0
    freedom: int = 0
    examples: int = 0
    scale_exponent: int = 0

    def plus(self, later: "Figures") -> "Figures":
        """Return the sums over both; the scale is that of the later."""
        return Figures(
            self.scalars + later.scalars,
            self.zeros + later.zeros,
            self.clipped + later.clipped,
            self.signal + later.signal,
            self.noise + later.noise,
            self.compared + later.compared,
            self.freedom + later.freedom,
            self.examples + later.examples,
            later.scale_exponent,
        )

    @property
    def signal_to_noise(self) -> tuple[float, float] | None:
        """Signal over noise and its standard error; None where nothing was compared.

        For D independent directions and noise of f degrees of freedom, with r the ratio:
        error² = (2 + 4 r) / D + 2 (1 + r)² / f. The first part is the variance of a noncentral χ²
        of one degree of freedom (a squared mean), the second that of the noise.
        """
        if not self.compared or self.noise <= 0:
            return None
        ratio = self.signal / self.noise
        seen = max(ratio, 0.0)
        return ratio, sqrt((2 + 4 * seen) / self.compared + 2 * (1 + seen) ** 2 / self.freedom)


@dataclass(frozen=True)
class Finding:
    """A sentence for the operator; `kind` stays the same while its figures change."""

    kind: str
    text: str
    warning: bool = True


def of_round(config: RunConfig, scale_exponent: int, reports: Sequence[Report]) -> Figures:
    """Return a round's figures from its participants' reports.

    With shared directions and n ≥ 2 participants, x_ik the decoded scalar of participant i along
    direction k, m_k their mean and v_k = Σ_i (x_ik − m_k)² / (n (n − 1)) the variance of that mean:
    E[m_k²] is the squared slope plus v_k, so signal = Σ_k (m_k² − v_k), unbiased, and
    noise = Σ_k v_k. Participants count equally. It may come out negative where there is no signal.
    """
    codes = np.concatenate([report.codes for report in reports])
    largest = codec.LARGEST[config.codec.up]
    # Signs have no end, and what local steps led to has a scale that its largest code fits.
    endless = config.codec.up == "sign" or config.local.taken
    figures = Figures(
        scalars=len(codes),
        zeros=int(np.count_nonzero(codes == 0)),
        clipped=0 if endless else int(np.count_nonzero(np.abs(codes) == largest)),
        scale_exponent=scale_exponent,
    )
    count = len(reports)
    if config.directions.mode != "shared" or count < 2:
        return figures
    scalars = np.stack([decoded(config, report, scale_exponent) for report in reports])
    mean = scalars.mean(axis=0)
    variance = scalars.var(axis=0, ddof=1) / count
    return figures.plus(
        Figures(
            signal=float(np.sum(mean**2 - variance)),
            noise=float(np.sum(variance)),
            compared=len(mean),
            freedom=len(mean) * (count - 1),
            examples=len(mean) * count * config.estimator.batch_size,
            scale_exponent=scale_exponent,
        )
    )


@dataclass
class Recent:
    """The figures of the last rounds."""

    config: RunConfig
    window: int = WINDOW
    rounds: list[Figures] = field(default_factory=list)

    def add(self, scale_exponent: int, reports: Iterable[Report]) -> None:
        """Take a committed round."""
        figures = of_round(self.config, scale_exponent, list(reports))
        self.rounds = [*self.rounds, figures][-self.window :]

    @property
    def total(self) -> Figures:
        """The sums over these rounds."""
        total = Figures()
        for figures in self.rounds:
            total = total.plus(figures)
        return total

    def findings(self) -> list[Finding]:
        """Return what is worth saying of these rounds."""
        return findings(self.config, self.total)


def findings(config: RunConfig, figures: Figures) -> list[Finding]:
    """Return what is worth saying, warnings first; nothing of too few scalars."""
    if figures.scalars < FEWEST_SCALARS:
        return []
    found = [_zeros(config, figures), _clipped(config, figures), _signal(config, figures)]
    return sorted((f for f in found if f is not None), key=lambda f: not f.warning)


def _zeros(config: RunConfig, figures: Figures) -> Finding | None:
    share = figures.zeros / figures.scalars
    if share < MANY_ZERO:
        return None
    advice = {
        "spsa": "raise estimator.perturbation_scale",
        "one-sided": "raise estimator.perturbation_scale",
        "forward": "check that the model's loss depends on what is trained",
        "backprop": "check that the model's loss depends on what is trained",
    }[config.estimator.kind]
    if config.codec.up != "log8":
        advice += ' or use codec.up = "log8", which reaches further down'
    return Finding("zeros", f"{share:.0%} of the scalars are zero: {advice}")


def _clipped(config: RunConfig, figures: Figures) -> Finding | None:
    share = figures.clipped / figures.scalars
    if share < MANY_CLIPPED:
        return None
    head = f"{share:.0%} of the scalars are clipped"
    up, end = config.codec.up, codec.SCALE_EXPONENTS[-1]
    if up == "int32":
        most = codec.LARGEST["int32"] * 2.0**codec.INT32_SCALE_EXPONENT
        advice = f'int32 codes end at ±{most:.0f}: use codec.up = "int8" or "log8", which follow'
        return Finding("clipped", f"{head}: {advice}")
    if figures.scale_exponent == end and share >= MOST:
        return Finding(
            "overflow",
            f"{head} and the scale of {up} codes is at its end, 2^{end}: the losses have left any "
            "sensible range; start again with a lower optimizer.learning_rate",
        )
    if up == "log8":
        return Finding(
            "clipped", f"{head}: their size grows faster than the scale follows; {_SLOW}"
        )
    return Finding(
        "clipped",
        f"{head}: a few are far larger than the others, or all grow faster than the scale follows; "
        f'use codec.up = "log8", or {_SLOW}',
    )


_SLOW: Final = "lower optimizer.learning_rate if the loss rises too"


def _signal(config: RunConfig, figures: Figures) -> Finding | None:
    """What McCandlish et al. (arXiv 1812.06162, eq. 2.8) call the noise scale, from the scalars.

    A mean over B examples has signal-to-noise B / B_crit.
    """
    known = figures.signal_to_noise
    if known is None:
        return None
    ratio, error = known
    size = figures.examples / figures.compared
    head = f"signal-to-noise of the mean scalars {ratio:.2f} ± {error:.2f}"
    if ratio < 2 * error:
        return Finding(
            "noise",
            f"{head}, no signal to be told from noise in {figures.compared} scalars: raise "
            "estimator.batch_size, wait for more participants, or lower optimizer.learning_rate",
        )
    critical = size / ratio
    where = "below" if ratio < 1 else "above"
    advice = (
        "a larger estimator.batch_size would still pay in full"
        if ratio < 1
        else "more examples would change little: more directions, or a smaller batch, would pay"
    )
    return Finding(
        "signal",
        f"{head}: a round's {size:.0f} examples are {where} the critical batch of about "
        f"{critical:.0f}; {advice}",
        warning=False,
    )
