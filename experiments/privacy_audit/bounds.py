"""From counts of a test's errors to the least epsilon a mechanism can have: the audit's statistic.

Whoever tells, from a release, whether a record was in the data errs in two ways; (ε, δ)-privacy
bounds both at once. So measured error rates bound ε from below, at a stated confidence.

Rates are bounded by Clopper and Pearson (Biometrika 26, 1934). Where noise is known to be Gaussian
they bound its multiplier (Gaussian differential privacy: Dong, Roth, Su, JRSS B 84, 2022), and the
accountant says what epsilon that is at any δ: far tighter than (1 − FNR − δ)/FPR, which would need
as many releases as 1/δ (Nasr et al., USENIX Security 2023).
"""

from dataclasses import dataclass
from math import inf
from statistics import NormalDist
from typing import Final

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from lorand.codec import Floats
from lorand.privacy import accountant
from lorand.privacy.accountant import Release

CONFIDENCE: Final = 0.95
NORMAL: Final = NormalDist()


def upper(errors: int, trials: int, confidence: float) -> float:
    """Return the upper Clopper–Pearson bound on a rate, one-sided.

    >>> round(upper(0, 100, 0.95), 4)  # 1 − 0.05^(1/100)
    0.0295
    """
    if errors == trials:
        return 1.0
    return float(stats.beta.ppf(confidence, errors + 1, trials - errors))


@dataclass(frozen=True)
class Errors:
    """How often a threshold took noise for a record, or a record for noise, of `trials` each."""

    false_positives: int
    false_negatives: int
    trials: int

    def rates(self) -> tuple[float, float]:
        """Return upper bounds on both rates that hold together with CONFIDENCE."""
        each = 1 - (1 - CONFIDENCE) / 2
        return (
            upper(self.false_positives, self.trials, each),
            upper(self.false_negatives, self.trials, each),
        )


def errors(without: Floats, with_record: Floats) -> Errors:
    """Return the errors, on the second halves, of the threshold that is best on the first halves.

    Both of shape (n,): an attacker's score of each release, larger where it speaks for the record.
    The halves are apart, so that no threshold is chosen by the releases it is judged on.
    """
    half = len(without) // 2
    threshold = best_threshold(without[:half], with_record[:half])
    return Errors(
        int(np.sum(without[half:] > threshold)),
        int(np.sum(with_record[half:] <= threshold)),
        len(without) - half,
    )


def best_threshold(without: Floats, with_record: Floats) -> float:
    """Return the score at which the two error rates are alike.

    For scores that differ by a shift, which noise on a sum is, no other gives a tighter bound on it
    from counts: rates near one half vary least in units of the noise.
    """
    places = np.sort(np.concatenate([without, with_record]))
    above = 1 - np.searchsorted(np.sort(without), places, side="right") / len(without)
    below = np.searchsorted(np.sort(with_record), places, side="right") / len(with_record)
    return float(places[np.argmin(np.abs(above - below))])


def least_shift(found: Errors, rate: float = 1.0) -> float:
    """Return a lower bound on μ, the record's shift in units of the noise; 0 if it shows none.

    Noise of multiplier σ has μ = 1/σ: a greater bound says that it is less. Infinite where the
    record shows in more releases than its rate allows.

    Where the record is sampled with a rate q, the test sees its release with that chance only:
    TPR = (1 − q) FPR + q TPR', and μ = Φ⁻¹(TPR') − Φ⁻¹(FPR).
    """
    false_positive, false_negative = found.rates()
    true_positive = (1 - false_negative - (1 - rate) * false_positive) / rate
    if not 0 < false_positive < true_positive:
        return 0.0
    if true_positive >= 1:
        return inf
    return NORMAL.inv_cdf(true_positive) - NORMAL.inv_cdf(false_positive)


def least_epsilon(found: Errors, delta: float, rate: float = 1.0) -> float:
    """Return a lower bound on the epsilon of one release, at delta: that of noise 1/μ."""
    shift = least_shift(found, rate)
    if shift <= 0 or shift == inf:
        return shift
    return accountant.epsilon(Release("gaussian", 1 / shift, rate), 1, delta)
