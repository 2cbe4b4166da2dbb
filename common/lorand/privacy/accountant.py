"""What releases cost in epsilon and delta, and how much noise a target takes.

Everything here is about one example added to or removed from one worker's data: the only adjacency
used (under "replace one" dp-accounting's own accountants disagree about what a multiplier means).
The privacy loss distribution (PLD) decides; Rényi privacy (RDP) is the cross-check, always above.

All K scalars of a round come from one batch. They are ONE sampled event, not K of them: sampling
an example once shows it to all scalars at once, and K independently sampled events would claim a
smaller epsilon than holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import expm1, inf, isfinite, log1p, sqrt
from types import ModuleType
from typing import Any, Final, Literal

from lorand.errors import ConfigError

Accountant = Literal["pld", "rdp"]
Noise = Literal["gaussian", "laplace"]

TOLERANCE: Final = 1e-4
"""Of a calibrated noise multiplier, which is never below what its target takes."""
LARGEST_MULTIPLIER: Final = 1e6
_ORDERS: Final = (*range(2, 65), 128, 256, 512, 1024)
_COARSE: Final = 1e-3
_SMALLEST: Final = 0.2
"""Less noise is not looked for, and hardly any."""


@dataclass(frozen=True)
class Release:
    """One round of one worker: a Poisson sample, one clipped vector an example, noise on the sum.

    `multiplier` is the noise's scale over the clip bound: the standard deviation of Gaussian noise,
    with vectors clipped in L2; or b of Laplace noise, density ∝ exp(−|x|/b), with vectors clipped
    in L1. `rate` is each example's chance of being in the batch. With a `cap` a larger batch is cut
    to a random part of that size, and the data are at most so many `examples`; 0: no cap.
    """

    noise: Noise
    multiplier: float
    rate: float
    cap: int = 0
    examples: int = 0


Part = tuple[Release, int]
"""A release and how often it is made."""


def per_scalar(multiplier: float, scalars: int) -> float:
    """Return the multiplier of one vector that is as noisy as scalars clipped each by itself.

    Each of K scalars of one batch in ±C has the sum's sensitivity √K·C in L2: σ/√K.

    >>> per_scalar(4.0, 16)
    1.0
    """
    return multiplier / sqrt(scalars)


def epsilon(release: Release, times: int, delta: float, accountant: Accountant = "pld") -> float:
    """Return epsilon, at delta, of so many releases of the same kind, each on a fresh sample.

    Laplace noise has delta 0 and the closed form of `laplace_epsilon`. Raises ConfigError where
    dp-accounting is not installed, and for what it cannot account for.
    """
    return epsilon_together([(release, times)], delta, accountant)


def epsilon_together(parts: Sequence[Part], delta: float, accountant: Accountant = "pld") -> float:
    """Return epsilon, at delta, of releases of several kinds, all of one kind of noise.

    It bounds any order, also one that somebody chooses by what was released, as long as no kind
    comes more often than here. By induction on how many are left: whichever kind is next, what
    follows is dominated by the product of the rest, and products commute; ending early is
    post-processing. Raises as `epsilon` does.
    """
    parts = [(release, times) for release, times in parts if times]
    if not parts:
        return 0.0
    if parts[0][0].noise == "laplace":
        assert all(release.noise == "laplace" for release, _ in parts)
        return sum(laplace_epsilon(part.multiplier, part.rate, times) for part, times in parts)
    dpa, pld, rdp = _library()
    counter: Any = pld.PLDAccountant() if accountant == "pld" else rdp.RdpAccountant()
    return float(counter.compose(_events(dpa, parts)).get_epsilon(delta))


def laplace_epsilon(multiplier: float, rate: float, times: int) -> float:
    """Return T·ln(1 + q(e^{1/b} − 1)): pure epsilon of T sampled releases, q the sample rate.

    One release of noise b·C on a sum of sensitivity C is 1/b-private; sampling with q makes it
    ln(1 + q(e^{1/b} − 1)) (Balle, Barthe, Gaboardi, NeurIPS 2018, theorem 8), and T releases add.

    >>> round(laplace_epsilon(1.0, 1.0, 100), 9)
    100.0
    """
    exponent = 1 / multiplier
    if exponent > 700:
        return inf
    return times * log1p(rate * expm1(exponent))


def calibrated(release: Release, times: int, target_epsilon: float, delta: float) -> Release:
    """Return the release with the smallest multiplier that keeps `times` of it to the target.

    To TOLERANCE, from above: the result's epsilon is at most the target. Raises ConfigError when
    no noise up to LARGEST_MULTIPLIER does, or dp-accounting is not installed.
    """
    if release.noise == "laplace":
        return _with(release, 1 / log1p(expm1(target_epsilon / times) / release.rate))
    return calibrated_together([(_with(release, 1.0), times)], target_epsilon, delta)[0]


def calibrated_together(
    parts: Sequence[Part], target_epsilon: float, delta: float
) -> list[Release]:
    """Return the releases of the parts with their multipliers times one number, the smallest.

    With Gaussian noise. So many of each keep to the target, as in `calibrated`, whose tolerance
    holds for a multiplier of 1; raises as that does.
    """
    dpa, pld, rdp = _library()

    def scaled(factor: float, plain: bool = False) -> list[Part]:
        made = [(_with(release, factor * release.multiplier), n) for release, n in parts]
        return [(replace(r, cap=0, examples=0), n) for r, n in made] if plain else made

    def beyond(accountant: Callable[[], Any], plain: bool, factor: float) -> float:
        spent = accountant().compose(_events(dpa, scaled(factor, plain))).get_epsilon(delta)
        return float(spent) - target_epsilon

    # PLD costs seconds, most where noise is small. RDP, which asks for more noise, shows where to
    # look, and a coarse PLD, whose epsilon is no smaller than the fine one's, looks there first.
    coarse = partial(pld.PLDAccountant, value_discretization_interval=_COARSE)
    near = _root(partial(beyond, lambda: rdp.RdpAccountant(_ORDERS), True), 1.0, 2.0, 1e-2)
    near = _root(partial(beyond, coarse, False), near, 1.15, 1e-2 * near)
    found = _root(partial(beyond, pld.PLDAccountant, False), near, 1.01, TOLERANCE / 2)
    return [release for release, _ in scaled(found)]


def _root(beyond: Callable[[float], float], guess: float, step: float, tolerance: float) -> float:
    """Return a multiplier that is not beyond the target, `tolerance` at most above the smallest.

    `beyond` falls as noise grows. From the guess it goes by factors of `step` to where the sign
    changes, then by secants of which neither end stays for long (the Illinois rule). Raises
    ConfigError when no multiplier in use is enough.
    """
    low = high = guess
    above = below = beyond(guess)
    while below > 0:
        low, above, high = high, below, high * step
        below = beyond(high)
    while above <= 0 and high > _SMALLEST:
        high, below, low = low, above, low / step
        above = beyond(low)
    while high - low > tolerance and high > _SMALLEST:
        middle = low + (high - low) * above / (above - below)
        middle = min(max(middle, low + tolerance / 2), high - tolerance / 2)
        value = beyond(middle)
        if value > 0:
            low, above, below = middle, value, below / 2
        else:
            high, below, above = middle, value, above / 2
    return high


def _with(release: Release, multiplier: float) -> Release:
    if not (isfinite(multiplier) and 0 < multiplier <= LARGEST_MULTIPLIER):
        raise ConfigError(
            f"a noise multiplier of {multiplier:g} is of no use: raise privacy.target_epsilon"
        )
    return replace(release, multiplier=multiplier)


def _events(dpa: ModuleType, parts: Sequence[Part]) -> Any:
    """Return all releases as one event."""
    return dpa.ComposedDpEvent(
        [dpa.SelfComposedDpEvent(_event(dpa, release), times) for release, times in parts]
    )


def _event(dpa: ModuleType, release: Release) -> Any:
    """Return one release as dp-accounting knows it."""
    if release.cap:
        return dpa.TruncatedSubsampledGaussianDpEvent(
            release.examples, release.rate, release.cap, release.multiplier
        )
    return dpa.PoissonSampledDpEvent(release.rate, dpa.GaussianDpEvent(release.multiplier))


def _library() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Return dp-accounting, its PLD and its RDP part. Raises ConfigError where it is missing."""
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError as error:
        raise ConfigError(
            "a run with [privacy] counts what is spent with the library dp-accounting: "
            "pip install 'lorand[privacy]'"
        ) from error
    return dp_accounting, pld, rdp
