"""Groups are the cheapest there are, and within their limits."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorand_worker.grouping import MAX_EXAMPLES, MAX_TOKENS, groups, launch_tokens
from lorand_worker.precision import Precision


def cost(lengths: list[int], cut: list[list[int]], launch: int) -> int:
    """Launches and tokens, padding included."""
    return sum(launch + len(group) * max(lengths[i] for i in group) for group in cut)


def partitions(items: list[int]) -> list[list[list[int]]]:
    """All ways to put items into groups."""
    if not items:
        return [[]]
    first, *rest = items
    return [
        part
        for other in partitions(rest)
        for part in (
            [[first], *other],
            *([*other[:i], [first, *group], *other[i + 1 :]] for i, group in enumerate(other)),
        )
    ]


@given(st.lists(st.integers(1, 100), max_size=6), st.integers(1, 300))
def test_no_partition_is_cheaper(lengths: list[int], launch: int) -> None:
    found = groups(lengths, launch)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    best = min(cost(lengths, cut, launch) for cut in partitions(list(range(len(lengths)))))
    assert cost(lengths, found, launch) == best


@given(st.lists(st.integers(1, 600), max_size=300), st.integers(1, 5000))
def test_groups_are_bounded_and_sorted(lengths: list[int], launch: int) -> None:
    found = groups(lengths, launch)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    flat = [lengths[i] for group in found for i in group]
    assert all(a <= b for a, b in pairwise(flat))
    for group in found:
        assert len(group) <= MAX_EXAMPLES
        assert len(group) * max(lengths[i] for i in group) <= MAX_TOKENS


def test_one_example_may_be_longer_than_a_group() -> None:
    assert groups([MAX_TOKENS + 1, 3, MAX_TOKENS + 1], launch=10**6) == [[1], [0], [2]]


def test_in_bfloat16_passes_cost_more_tokens() -> None:
    device = torch.device("cpu")
    assert launch_tokens(device, Precision.BFLOAT16) > launch_tokens(device, Precision.FLOAT32)
