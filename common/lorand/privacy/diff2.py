"""DIFF2 on the scalars of a fixed pool: gradients at times, differences in between (experimental).

Murata, Suzuki, DIFF2: Differential Private Optimization via Gradient Differences for Nonconvex
Distributed Learning, ICML 2023, arXiv 2302.03884. Every `every` rounds, at a restart, the clipped
gradients of the present coefficients x_r are released with noise; in between only what they changed
by since x_{r−1}, which is small where steps are, so that little noise hides it:

    restart:     v  = ( Σ_i clip(g_i(x_r), C1)                           + N(0, (σ1·C1)²) ) / b
    increment:   v += ( Σ_i clip(g_i(x_r) − g_i(x_{r−1}), C2·‖x_r − x_{r−1}‖)
                                                     + N(0, (σ2·C2·‖x_r − x_{r−1}‖)²) ) / b

and the step goes along v, which is post-processing. g_i are an example's K projected gradients, so
all rounds of an epoch measure the same K directions. How far the coefficients moved is public,
hence so is the second bound, and one example added or removed moves a sum by its bound at most.
The paper replaces examples and takes all of them in each round, b = n; here b is a public number,
and each example may be in a round's batch by chance: a fresh batch a round, at both of its
positions, so that an increment is one sampled Gaussian release of multiplier σ2 as a restart is one
of σ1. The noise that v has gathered t rounds after a restart has the variance
(σ1·C1)² + Σ (σ2·C2·‖dx‖)², and each increment costs twice the forward passes.
"""

import secrets
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np

from lorand.codec import Floats
from lorand.coefficients import Coefficients
from lorand.privacy.accountant import (
    Accountant,
    Part,
    Release,
    calibrated_together,
    epsilon_together,
)
from lorand.privacy.mechanism import LEAST_MULTIPLIER, Mechanism
from lorand.privacy.sampler import Below


def counts(rounds: int, every: int, spare: int = 0) -> tuple[int, int]:
    """Return the most restarts and increments of a run, `spare` rounds being of either kind."""
    first = -(-rounds // every)
    return first + spare, rounds - first + spare


@dataclass(frozen=True)
class Plan:
    """What a worker releases in a run, at most: so many restarts and so many increments."""

    restart: Release
    increment: Release
    restarts: int
    increments: int

    @property
    def parts(self) -> list[Part]:
        """Both kinds, as the accountant composes them."""
        return [(self.restart, self.restarts), (self.increment, self.increments)]

    def epsilon(self, delta: float, accountant: Accountant = "pld") -> float:
        """Return what all of it costs, at delta."""
        return epsilon_together(self.parts, delta, accountant)


def planned(
    rounds: int,
    every: int,
    share: float,
    *,
    rate: float,
    target_epsilon: float,
    delta: float,
    spare: int = 0,
) -> Plan:
    """Return the plan with the least noise that keeps a run of so many rounds to its target.

    `share` is that of the restarts in the budget, counted as Σ 1/σ² (zero-concentrated privacy):
    n1/σ1² is to n2/σ2² as share is to 1 − share, at any sample `rate`. With share = n1/(n1 + n2)
    both multipliers are the same. `spare` rounds may come on top, of either kind. Raises
    ConfigError where no noise is enough, or dp-accounting is not installed.
    """
    assert every >= 2
    assert rounds >= 2
    assert 0 < share < 1
    most = counts(rounds, every, spare)
    wide = [sqrt(n / part) for n, part in zip(most, (share, 1 - share), strict=True)]
    parts = [(Release("gaussian", w / min(wide), rate), n) for w, n in zip(wide, most, strict=True)]
    found = calibrated_together(parts, target_epsilon, delta)
    restart, increment = (replace(r, multiplier=max(r.multiplier, LEAST_MULTIPLIER)) for r in found)
    return Plan(restart, increment, *most)


@dataclass(frozen=True)
class Rule:
    """How rounds are released; every number here is public.

    `clip_bound` is C1, on vectors of K projected gradients; `slope_bound` C2, how much of that a
    distance of one in the coefficients may change; `restart` and `increment` are σ1 and σ2.
    """

    clip_bound: float
    slope_bound: float
    restart: float
    increment: float
    divisor: int

    def mechanism(self, moved: float | None) -> Mechanism:
        """Return what releases a round: a restart, or where coefficients moved by a distance."""
        if moved is None:
            return Mechanism("gaussian", self.clip_bound, self.restart, self.divisor)
        return Mechanism("gaussian", self.slope_bound * moved, self.increment, self.divisor)

    def release(self, here: Floats, below: Below = secrets.randbelow) -> Floats:
        """Return the noisy mean of gradients (batch, K) at a restart: shape (K,)."""
        return self.mechanism(None).release(here, below)

    def release_change(
        self, here: Floats, before: Floats, moved: float, below: Below = secrets.randbelow
    ) -> Floats:
        """Return the noisy mean of what gradients changed by over a distance: shape (K,).

        `here` and `before` hold the same examples at both positions, shape (batch, K). Where
        nothing moved nothing changed, whatever the examples are: zeros, without noise.
        """
        if moved == 0.0:
            return np.zeros(here.shape[1])
        return self.mechanism(moved).release(changes(here, before), below)


def changes(here: Floats, before: Floats) -> Floats:
    """Return each example's change, shape (batch, K); it may be no number."""
    with np.errstate(invalid="ignore", over="ignore"):
        return here - before


def distance(change: Coefficients, quantum_exponent: int) -> float:
    """Return ‖ΔA‖ in units of an unscaled weight, of a change in quanta.

    >>> distance(np.array([3, -4]) << 30, 30)
    5.0
    """
    return sqrt(sum(part * part for part in change.tolist())) * 2.0**-quantum_exponent


def accumulated(gathered: Floats, released: Floats, *, restart: bool) -> Floats:
    """Return v after a round's release, shape (K,): what a step goes along."""
    return released.copy() if restart else gathered + released
