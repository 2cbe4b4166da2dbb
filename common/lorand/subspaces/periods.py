"""When a run has which subspace: pools follow one another, and a basis serves some of them (pure).

A period is the pools that share a basis. Where columns are voted for, the first pool is one round
in full space, whose participants vote; the last round of each period elects the next one's.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorand.config import RunConfig

PROBE_EVERY = 8
"""With `subspace.probe`, every so many periods one is in full space, for comparison."""


def voted(config: "RunConfig") -> bool:
    """Return whether participants vote on the columns."""
    return config.subspace.restricts and config.subspace.selection == "voted"


def pool_after(config: "RunConfig", committed: int) -> int:
    """Return the number of the pool, from 0, on which the round after these is measured.

    After the last round the pool stays, but where replicas step when a pool is closed.
    """
    every = config.directions.rotate_every
    done = committed if config.subspace.state != "none" else min(committed, config.run.rounds - 1)
    if voted(config) and done:
        return 1 + ((done - 1) // every if every else 0)
    return done // every if every and not voted(config) else 0


def period(config: "RunConfig", pool: int) -> int:
    """Return the period, from 0, that a pool belongs to."""
    if voted(config) and pool == 0:
        return 0
    first, since = (1, pool - 1) if voted(config) else (0, pool)
    return first + since // _pools(config)


def first_pool(config: "RunConfig", number: int) -> int:
    """Return the first pool of a period."""
    pools = _pools(config)
    return 1 + (number - 1) * pools if voted(config) and number else number * pools


def _pools(config: "RunConfig") -> int:
    """How many pools a period has."""
    rotate = config.directions.rotate_every
    return max(1, config.subspace.refresh_every // rotate) if rotate else 1


def in_full_space(config: "RunConfig", number: int) -> bool:
    """Return whether directions of a period act on whole tensors, for a vote or as a probe."""
    if not config.subspace.restricts or (voted(config) and number == 0):
        return True
    return config.subspace.probe and number % PROBE_EVERY == 0


def elects(config: "RunConfig", committed: int) -> int:
    """Return the period that the round after so many commits elects columns for, or 0."""
    if not voted(config):
        return 0
    now = period(config, pool_after(config, committed))
    then = period(config, pool_after(config, committed + 1))
    return then if then != now else 0
