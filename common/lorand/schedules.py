"""Learning-rate schedules: a factor from the share of the run that is done."""

from typing import Literal

Schedule = Literal["linear", "constant"]


def factor(schedule: Schedule, committed: int, total: int) -> float:
    """Return the factor on the learning rate of the next round.

    `linear` decays from 1 to 1/total over the run's committed rounds; `constant` is 1.

    >>> [factor("linear", n, 4) for n in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    if schedule == "constant":
        return 1.0
    return max(0.0, 1.0 - committed / total)
