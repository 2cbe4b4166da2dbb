"""What a run's settings mean: how much noise each worker adds, and the mechanism that adds it."""

from lorand.config import RunConfig
from lorand.privacy import diff2
from lorand.privacy.accountant import Release, calibrated
from lorand.privacy.diff2 import Plan, Rule
from lorand.privacy.mechanism import LEAST_MULTIPLIER, Mechanism


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


def mechanism(config: RunConfig, multiplier: float) -> Mechanism:
    """Return what releases a round; the run's batch size is the public number it divides by."""
    section = config.privacy
    return Mechanism(section.mechanism, section.clip_bound, multiplier, config.estimator.batch_size)


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
