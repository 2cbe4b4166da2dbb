"""What a run's settings mean: how much noise there is, and who adds it to what."""

from dataclasses import replace
from math import sqrt
from typing import Final

from lorand.config import RunConfig
from lorand.privacy import diff2
from lorand.privacy.accountant import Release, calibrated
from lorand.privacy.diff2 import Plan, Rule
from lorand.privacy.mechanism import GRID, LEAST_MULTIPLIER, Mechanism
from lorand.privacy.shared_noise import local_noise

BATCHES: Final = 4
"""Times the batch size, in clip bounds: what a worker's number in a sum stays within. A sample is
hardly ever as large, and no worker can move a mean further."""


def release_of(config: RunConfig, multiplier: float) -> Release:
    """Return a round's release of a private run, with noise of this multiplier."""
    section = config.privacy
    return Release(
        section.mechanism,
        multiplier,
        section.sample_rate,
        section.batch_cap,
        section.max_examples,
    )


def planned(config: RunConfig) -> Release:
    """Return a round's release with the least noise that keeps the whole run to its target.

    The number of scalars does not enter: an example's vector of them is clipped as a whole. Raises
    ConfigError where no noise is enough, or dp-accounting is not installed.
    """
    section = config.privacy
    found = calibrated(
        release_of(config, 1.0), config.releases, section.target_epsilon, section.delta
    )
    return release_of(config, max(found.multiplier, LEAST_MULTIPLIER))


def whole(config: RunConfig, multiplier: float) -> Mechanism:
    """Return what releases a round by itself; the run's batch size is what it divides by."""
    section = config.privacy
    return Mechanism(section.mechanism, section.clip_bound, multiplier, config.estimator.batch_size)


def mechanism(config: RunConfig, multiplier: float) -> Mechanism:
    """Return what each worker does: it adds all the noise, none of it, or its share."""
    alone = whole(config, multiplier)
    if not config.privacy.summed:
        return alone
    alone = replace(alone, largest=BATCHES * config.estimator.batch_size * GRID)
    if config.privacy.mode == "central":
        return replace(alone, adds_noise=False)
    return replace(alone, multiplier=multiplier / sqrt(config.privacy.honest_min))


def largest_number(config: RunConfig, multiplier: float) -> int:
    """Return the bound on a number that a worker sends to a sum, in grid steps.

    Of a secure sum it leaves room for a share of the noise. The multiplier is taken up to a power
    of two, since who calculated it elsewhere may have another last digit. Raises ConfigError for
    noise too coarse to be shared.
    """
    largest = BATCHES * config.estimator.batch_size * GRID
    section = config.privacy
    if section.mode == "central":
        return largest
    about = 2.0 ** (int(multiplier * GRID).bit_length()) / GRID
    members = config.rounds.quorum
    noise = local_noise(about, GRID, members=members, honest_min=section.honest_min)
    return noise.bound(largest)


def planned_differences(config: RunConfig) -> Plan:
    """Return both kinds of a DIFF2 run's releases, as `planned` returns the one of others."""
    section = config.privacy
    return diff2.planned(
        config.run.rounds,
        section.restart_every,
        section.restart_share,
        rate=section.sample_rate,
        target_epsilon=section.target_epsilon,
        delta=section.delta,
        spare=section.spare_rounds,
    )


def rule(config: RunConfig, restart: float, increment: float) -> Rule:
    """Return what releases the rounds of a DIFF2 run, with noise of these multipliers."""
    section = config.privacy
    return Rule(
        section.clip_bound, section.slope_bound, restart, increment, config.estimator.batch_size
    )
