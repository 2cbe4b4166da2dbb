"""When a tensor's basis is chosen anew: less often while the choice stays the same (numpy).

Q-GaLore's lazy refresh (Zhang et al., 2024, arXiv 2407.08296), in integers, so that coordinator and
workers decide alike. Theirs compares singular vectors; here a basis is a set of r indices, and what
was chosen again is counted: |old ∩ new| of r.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.integer]

WATCHED: Final = 5
"""Refreshes that are looked at together."""
ENOUGH: Final = (2, 5)
"""Mean share of indices that were chosen again at which the interval doubles, as a fraction."""
MOST: Final = 16
"""Longest interval, in periods."""


@dataclass(frozen=True)
class Lazy:
    """When one tensor's basis is chosen next. A period is `subspace.refresh_every` rounds.

    `interval` and `next_due` are in periods; the run's first basis is that of period 0. `overlaps`
    are, of the latest refreshes, oldest first, how many indices were chosen again.

    >>> lazy, same = Lazy(), np.arange(8)
    >>> for period in range(1, 6):
    ...     assert lazy.due(period)
    ...     lazy = lazy.after(period, same, same)
    >>> lazy
    Lazy(interval=2, next_due=7, overlaps=())
    """

    interval: int = 1
    next_due: int = 1
    overlaps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for a state that `after` never leads to."""
        if self.interval not in {2**n for n in range(MOST.bit_length())}:
            raise ValueError(f"an interval is a power of two up to {MOST}, not {self.interval}")
        if len(self.overlaps) > WATCHED or min(self.overlaps, default=0) < 0:
            raise ValueError(f"overlaps are up to {WATCHED} counts, not {self.overlaps}")

    def due(self, period: int) -> bool:
        """Return whether the basis is chosen anew in this period."""
        return period >= self.next_due

    def after(self, period: int, old_indices: Indices, new_indices: Indices) -> "Lazy":
        """Return the state after a refresh in this period; indices are distinct, shape (r,).

        When five refreshes kept 2/5 of the indices on average, the interval doubles, up to 16
        periods, and five others are waited for. (The published code lets the same overlaps count
        again, and has no limit.) Raises ValueError when no refresh is due, or ranks differ.
        """
        if not self.due(period):
            raise ValueError(f"period {period} is not due: the next refresh is in {self.next_due}")
        rank = len(_checked(new_indices))
        if len(_checked(old_indices)) != rank:
            raise ValueError(f"{len(old_indices)} indices cannot give way to {rank}")
        common = np.intersect1d(old_indices, new_indices, assume_unique=True)
        overlaps = (*self.overlaps, len(common))[-WATCHED:]
        interval = self.interval
        numerator, denominator = ENOUGH
        if len(overlaps) == WATCHED and denominator * sum(overlaps) >= numerator * WATCHED * rank:
            interval, overlaps = min(2 * interval, MOST), ()
        return Lazy(interval, period + interval, overlaps)


def _checked(indices: Indices) -> Indices:
    if indices.ndim != 1 or not len(indices) or len(np.unique(indices)) != len(indices):
        raise ValueError("the indices of a basis are distinct, and at least one")
    return indices
