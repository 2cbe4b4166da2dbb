"""Learning-rate schedules: a factor from how far the run is."""

import math
from collections.abc import Sequence
from typing import Final, Literal

Schedule = Literal["linear", "cosine", "constant", "refined"]

_STEP: Final = 2.0**-20
"""Cosines are rounded to this, for their last bits differ between machines' libraries."""
REFINED_POINTS: Final = range(2, 65)
"""How many points a refined schedule may have."""


def exact(value: float) -> float:
    """Return a factor rounded to 2^-20: as text it is short, and read back it is the same.

    >>> exact(0.1)
    0.10000038146972656
    """
    return round(value / _STEP) * _STEP


def factor(
    schedule: Schedule, committed: int, total: int, warmup: int = 0, refined: Sequence[float] = ()
) -> float:
    """Return the factor on the learning rate of the next round, in [0, 1].

    It rises linearly over `warmup` rounds, 1/(warmup + 1) first. Then `linear` decays from 1 to
    1/(total − warmup) over the other committed rounds; `cosine` along half a wave
    (Loshchilov and Hutter, SGDR, ICLR 2017, eq. 5), never below the last value of `linear`;
    `constant` is 1; `refined` is read between its points, the first at the first of these rounds
    and the last at the run's last. Past the end of a run all but `constant` are 0.

    >>> [factor("linear", n, 4) for n in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    >>> [factor("cosine", n, 4) for n in (0, 2)]
    [1.0, 0.5]
    >>> [factor("constant", n, 8, warmup=3) for n in range(4)]
    [0.25, 0.5, 0.75, 1.0]
    >>> [factor("refined", n, 5, refined=(0.5, 1.0, 0.25)) for n in range(6)]
    [0.5, 0.75, 1.0, 0.625, 0.25, 0.0]
    """
    if committed < warmup:
        return (committed + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    if committed >= total:
        return 0.0
    rest = total - warmup
    if schedule == "refined":
        return _between(refined, committed - warmup, rest - 1)
    done = (committed - warmup) / rest
    if schedule == "linear":
        return 1.0 - done
    return max(1 / rest, exact((1 + math.cos(math.pi * done)) / 2))


def _between(points: Sequence[float], at: int, last: int) -> float:
    """Return the value at `at` of 0 … last on the line through evenly spread points.

    Whole numbers find the place, so that all machines compute the same.
    """
    if last == 0:
        return points[0]
    left, over = divmod(at * (len(points) - 1), last)
    if over == 0:
        return points[left]
    return points[left] + (points[left + 1] - points[left]) * (over / last)


def restarts(committed: int, every: int) -> bool:
    """Return whether the round after so many commits is the first of so many (DIFF2's restart)."""
    return committed % every == 0
