"""Loads of the schemes against stragglers, and that fractional repetition is exact."""

import pytest
from experiments.gradient_coding import patterns, recovered, repetition_groups, schemes


def test_the_loads_of_the_paper() -> None:
    """256 workers, 27 stragglers, B = 1, W = 2: Krishnan et al., ICLR 2023."""
    found = {s.name: (round(s.load, 4), s.delay) for s in schemes(256, 27, 1, 2)}
    assert found == {
        "uncoded": (0.0039, 0),
        "gradient coding": (0.1094, 0),
        "selective repetition": (0.0586, 1),
        "multiplexed": (0.0075, 1),
    }


def test_without_stragglers_nothing_is_held_twice() -> None:
    loads = [s.load for s in schemes(10, 0, 1, 2)]
    assert loads == pytest.approx([0.1] * 4)


@pytest.mark.parametrize(("workers", "stragglers", "count"), [(4, 1, 4), (6, 2, 15), (12, 2, 66)])
def test_repetition_is_exact_for_every_pattern(workers: int, stragglers: int, count: int) -> None:
    groups = repetition_groups(workers, stragglers)
    slow = list(patterns(workers, stragglers))
    assert len(slow) == count
    assert all(recovered(groups, who) for who in slow)
    one_more = [recovered(groups, who) for who in patterns(workers, stragglers + 1)]
    assert one_more.count(False) == len(groups), "only a whole group is missed"


@pytest.mark.parametrize(("burst", "window"), [(2, 2), (2, 4), (0, 2)])
def test_bursts_that_no_code_is_for(burst: int, window: int) -> None:
    with pytest.raises(ValueError, match="divides the window less one"):
        schemes(12, 2, burst, window)


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="10 workers are no groups of 3"):
        repetition_groups(10, 2)
