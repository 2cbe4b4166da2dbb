"""When a basis is chosen anew: less often while the choice stays the same."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorand.subspaces.lazy import MOST, WATCHED, Indices, Lazy

RANK = 8


def basis(kept: int, *, rank: int = RANK) -> tuple[Indices, Indices]:
    """Old and new indices, so many of them in both, in no order."""
    old = np.arange(rank)[::-1]
    return old, np.concatenate([np.arange(rank, 2 * rank - kept), np.arange(kept)])


def run(kept: list[int], *, rank: int = RANK) -> list[tuple[int, Lazy]]:
    """Refresh whenever it is due; return the periods and the states after."""
    states, lazy, period = [], Lazy(), 0
    for count in kept:
        while not lazy.due(period):
            period += 1
        lazy = lazy.after(period, *basis(count, rank=rank))
        states.append((period, lazy))
    return states


def test_a_basis_that_changes_is_chosen_in_every_period() -> None:
    states = run([3] * 20)
    assert [period for period, _ in states] == list(range(1, 21))
    assert {lazy.interval for _, lazy in states} == {1}
    assert states[-1][1].overlaps == (3,) * WATCHED


def test_a_basis_that_stays_is_chosen_ever_less() -> None:
    periods = [period for period, _ in run([RANK] * 32)]
    gaps = np.diff(periods).tolist()
    assert gaps == [1] * 4 + [2] * 5 + [4] * 5 + [8] * 5 + [16] * 12
    assert run([RANK] * 32)[-1][1].interval == MOST


def test_two_fifths_is_enough_and_less_is_not() -> None:
    """Compared in integers: 0.4 is no binary fraction."""
    for rank in (5, 10, 35, 2045):
        enough = [2 * rank // 5] * WATCHED
        assert run(enough, rank=rank)[-1][1] == Lazy(2, WATCHED + 2)
        assert run([*enough[:-1], enough[-1] - 1], rank=rank)[-1][1].interval == 1


def test_overlaps_count_once() -> None:
    """Five that double the interval are not looked at again with the next four."""
    states = run([RANK] * 5 + [0] + [RANK] * 4)
    assert [lazy.interval for _, lazy in states] == [1] * 4 + [2] * 5 + [4]
    assert [len(lazy.overlaps) for _, lazy in states] == [1, 2, 3, 4, 0, 1, 2, 3, 4, 0]


def test_old_overlaps_are_forgotten() -> None:
    states = run([0] * 30 + [4] * 4)
    assert states[-1][1].interval == 2, "(0 + 4 · 4) / 5 of 8 is 2/5"


@given(st.lists(st.integers(0, RANK), max_size=120))
def test_rules_that_always_hold(kept: list[int]) -> None:
    before = Lazy()
    queue: list[Fraction] = []
    for (period, lazy), count in zip(run(kept), kept, strict=True):
        queue = [*queue, Fraction(count, RANK)][-WATCHED:]
        doubles = len(queue) == WATCHED and sum(queue) / WATCHED >= Fraction(2, 5)
        assert period == before.next_due, "never late, never early"
        assert lazy.interval == min(MOST, before.interval * (2 if doubles else 1))
        assert lazy.next_due == period + lazy.interval
        queue = [] if doubles else queue
        assert lazy.overlaps == tuple(int(share * RANK) for share in queue)
        assert all(isinstance(n, int) for n in (lazy.interval, lazy.next_due, *lazy.overlaps))
        before = lazy


@given(st.permutations(range(RANK)), st.integers(0, RANK))
def test_the_order_of_indices_does_not_matter(order: list[int], kept: int) -> None:
    old, new = basis(kept)
    assert Lazy().after(1, old[order], new) == Lazy().after(1, old, new[order])


def test_a_refresh_that_was_missed_is_due_until_it_is_done() -> None:
    late = Lazy(4, 10)
    assert [late.due(period) for period in (9, 10, 13)] == [False, True, True]
    assert late.after(13, *basis(1)).next_due == 17


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="period 2 is not due: the next refresh is in 3"):
        Lazy(2, 3).after(2, *basis(1))
    with pytest.raises(ValueError, match="8 indices cannot give way to 9"):
        Lazy().after(1, basis(1)[0], np.arange(9))
    wrongs: list[Indices] = [np.array([1, 1]), np.arange(8).reshape(2, 4), np.arange(0)]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="distinct, and at least one"):
            Lazy().after(1, wrong, wrong)
    for interval in (0, 3, 32):
        with pytest.raises(ValueError, match="power of two up to 16"):
            Lazy(interval)
    with pytest.raises(ValueError, match="up to 5 counts"):
        Lazy(overlaps=(1,) * 6)
