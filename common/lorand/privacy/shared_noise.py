"""Noise of which every member of a sum adds a share, so that nobody has to be trusted with it.

The total is to be at least N(0, σ²C²) on the integer grid, σ the noise multiplier and C the clip
bound, even where all but h members leave theirs out, or tell theirs to the coordinator. So each
adds a discrete Gaussian of variance σ²C²/h, and n honest members add σ²C²·n/h: more than needed.

A sum of discrete Gaussians is not one, but close. Kairouz, Liu and Steinke, arXiv 2102.06387: with
h shares of standard deviation s on vectors of d numbers and sensitivity Δ, the Rényi divergence of
order α is at most

    min( α·l²/2 + τ·d,  α/2 · (l + √d·τ)² ),   l = Δ / (√h·s),
    τ = 10 · Σ_{k=1}^{h-1} exp(−2π² s² k/(k+1)).
"""

import math
from dataclasses import dataclass
from typing import Final

from lorand.errors import ConfigError
from lorand.privacy.roster import MAX_MEMBERS

MIN_LOCAL_STD: Final = 4.0
"""In steps of the grid: τ is then below 1e-67 and the sum as good as one discrete Gaussian."""
STEP: Final = 2.0**-16
"""Standard deviations are rounded up to multiples of it: exact samplers want short fractions."""
TAIL: Final = 16.0
"""Standard deviations for which a bound leaves room; beyond is less than 2·exp(−128) = 5.2e-56."""


def tau(std: float, honest: int) -> float:
    """Return τ, how far the sum of so many discrete Gaussians is from being one.

    >>> f"{tau(1.0, 8):.1e}"
    '5.4e-04'
    """
    return 10 * math.fsum(
        math.exp(-2 * (math.pi * std) ** 2 * k / (k + 1)) for k in range(1, honest)
    )


@dataclass(frozen=True)
class LocalNoise:
    """What each member adds: discrete Gaussians of this standard deviation, in grid steps."""

    std: float
    honest: int

    @property
    def tau(self) -> float:
        """τ of the shares of the honest."""
        return tau(self.std, self.honest)

    def bound(self, data_bound: int) -> int:
        """Return the bound of a run on |x_i| where clipped data stay within `data_bound`.

        Noise beyond it would end the attempt and so tell of itself; `TAIL` keeps it from happening.
        """
        return data_bound + math.ceil(TAIL * self.std)


def local_noise(
    noise_multiplier: float, clip_bound: int, *, members: int, honest_min: int
) -> LocalNoise:
    """Return each member's share of a total noise σ·C. Raises ConfigError below the grid's least.

    `members` is the fewest that are summed (n_min of `SumMember`), of whom at most `members -
    honest_min` leave their noise out or tell it. In the all-or-nothing sum who is missing is not
    summed either, so only collusion and dishonesty count.

    >>> local_noise(4.0, 64, members=8, honest_min=8).std
    90.50967407226562
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0 and clip_bound > 0):
        raise ConfigError(
            f"noise of {noise_multiplier} times a clip bound of {clip_bound} hides nothing: set "
            "both above zero"
        )
    if not 0 < honest_min <= members <= MAX_MEMBERS:
        raise ConfigError(
            f"{honest_min} of {members} members cannot be the honest ones: set 1 to {members}"
        )
    exact = noise_multiplier * clip_bound / math.sqrt(honest_min)
    std = math.ceil(exact / STEP) * STEP
    if exact < MIN_LOCAL_STD:
        least = math.ceil(MIN_LOCAL_STD * math.sqrt(honest_min) / noise_multiplier)
        raise ConfigError(
            f"noise of {exact:.2f} steps of the grid a member is too coarse for its sum to be "
            f"Gaussian: make the grid finer, so that the clip bound is at least {least} steps"
        )
    return LocalNoise(std, honest_min)
