"""Learning-rate schedules: a factor from how far the run is."""

import math
from typing import Final, Literal

Schedule = Literal["linear", "cosine", "constant"]

_STEP: Final = 2.0**-20
"""Cosines are rounded to this, for their last bits differ between machines' libraries."""


def factor(schedule: Schedule, committed: int, total: int, warmup: int = 0) -> float:
    """Return the factor on the learning rate of the next round, in [0, 1].

    It rises linearly over `warmup` rounds, 1/(warmup + 1) first. Then `linear` decays from 1 to
    1/(total − warmup) over the other committed rounds; `cosine` along half a wave
    (Loshchilov and Hutter, SGDR, ICLR 2017, eq. 5), never below the last value of `linear`;
    `constant` is 1. Past the end of a run those that decay are 0.

    >>> [factor("linear", n, 4) for n in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    >>> [factor("cosine", n, 4) for n in (0, 2)]
    [1.0, 0.5]
    >>> [factor("constant", n, 8, warmup=3) for n in range(4)]
    [0.25, 0.5, 0.75, 1.0]
    """
    if committed < warmup:
        return (committed + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    if committed >= total:
        return 0.0
    rest = total - warmup
    done = (committed - warmup) / rest
    if schedule == "linear":
        return 1.0 - done
    return max(1 / rest, round((1 + math.cos(math.pi * done)) / 2 / _STEP) * _STEP)
