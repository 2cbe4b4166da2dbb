"""Drawing by weights that everyone computes from the ledger (FedKSeed-Pro; peers §4).

The constants are normative: a machine that draws others cannot take part in a run.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import count as count_from
from itertools import islice
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lorand.directions import (
    LARGEST_ACTIVITY,
    SHARED,
    WEIGHT_ONE,
    Activity,
    Drawing,
    Draws,
    draw,
    draw_weighted,
)
from lorand.philox import philox4x32

RUN: Final = bytes(range(32))
WEIGHTED: Final[list[Drawing]] = ["weighted", "weighted-unbiased"]
CUBES: Final = np.arange(1, 65, dtype=np.int64) ** 3


def moved() -> Activity:
    """Eight directions after two commits."""
    first = Activity.none(8).after(np.array([1, 2, 5]), np.array([10, -20, 40]))
    return first.after(np.array([2, 7]), np.array([7, -3]))


# ------------------------------------------------------------- drawing


def test_weighted_draws_are_normative() -> None:
    drawn = draw_weighted(RUN, 1, SHARED, CUBES, 12)
    assert drawn.tolist() == [63, 60, 35, 50, 52, 61, 41, 44, 57, 48, 30, 55]
    alike = np.full(4096, WEIGHT_ONE, np.int64)
    assert draw_weighted(RUN, 5, bytes([3, 0, 0, 0]), alike, 8).tolist() == [
        *(2818, 2898, 2525, 3045, 890, 2385, 2483, 822)
    ]


def stream(round_index: int, weights: list[int]) -> Iterator[int]:
    """The same by its words: 64 bits, high word first, modulo the sum, and where that falls."""
    digest = hashlib.sha256(RUN + round_index.to_bytes(4, "little") + SHARED).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    seen = set()
    for counter in count_from():
        a, b, c, d = map(int, philox4x32(key, np.array([counter], np.uint32))[0])
        for at in ((a << 32 | b) % sum(weights), (c << 32 | d) % sum(weights)):
            index, before = 0, weights[0]
            while before <= at:
                index += 1
                before += weights[index]
            if index not in seen:
                seen.add(index)
                yield index


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(WEIGHT_ONE, 3 * WEIGHT_ONE), min_size=64, max_size=64),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_a_weighted_draw_is_distinct_in_range_and_recomputable(
    weights: list[int], round_index: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 12))
    drawn = draw_weighted(RUN, round_index, SHARED, np.array(weights), count)
    assert drawn.dtype == np.int64
    assert len(set(drawn.tolist())) == count
    assert 0 <= drawn.min() <= drawn.max() < 64
    assert drawn.tolist() == list(islice(stream(round_index, weights), count))


def test_all_but_one_and_all_of_a_pool_can_be_drawn() -> None:
    weights = np.arange(64, dtype=np.int64) % 3 + 1
    assert len(set(draw_weighted(RUN, 0, SHARED, weights, 63).tolist())) == 63
    assert draw_weighted(RUN, 0, SHARED, CUBES, 64).tolist() == list(range(64))


def test_directions_are_drawn_as_often_as_they_weigh() -> None:
    """χ² over the first draw of 6,400 rounds: weights 1 and 3, 63 degrees of freedom, 63 ± 11."""
    weights = np.where(np.arange(64) % 2, 3, 1) * WEIGHT_ONE
    first = [int(draw_weighted(RUN, n, SHARED, weights, 1)[0]) for n in range(6400)]
    expected = 6400 * weights / weights.sum()
    observed = np.bincount(first, minlength=64)
    assert float(((observed - expected) ** 2 / expected).sum()) < 63 + 4 * 11
    assert np.bincount(np.array(first) % 2).tolist() == pytest.approx([1600, 4800], rel=0.05)


# ------------------------------------------------------------- weights


def test_weights_are_normative() -> None:
    """Mean |ΔA| of each direction over its commits and a 0, between 0 and 1, e to that power."""
    assert moved().sums.tolist() == [0, 10, 27, 0, 0, 40, 0, 3]
    assert moved().visits.tolist() == [1, 2, 3, 1, 1, 2, 1, 2]
    assert moved().weights().tolist() == [
        *(1048576, 1346398, 1644495, 1048576, 1048576, 2850325, 1048576, 1130243)
    ]


def test_weights_are_the_softmax_of_the_paper() -> None:
    """Qin et al., eq. 6 and 7, to a millionth: eight means between 0 and 20."""
    mean = moved().sums / moved().visits
    expected = np.exp(mean / 20)
    np.testing.assert_allclose(moved().weights() / WEIGHT_ONE, expected, rtol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=8), st.integers(0, 2**32))
def test_the_likeliest_is_e_times_as_likely_as_the_least(changes: list[int], seed: int) -> None:
    """However large ΔA is; a history in which all are equal weighs all alike."""
    rng = np.random.default_rng(seed)
    activity = Activity.none(64)
    for change in changes:
        activity = activity.after(rng.permutation(64)[:3], np.array([change, 0, -change]))
    weights = activity.weights()
    assert weights.min() == WEIGHT_ONE
    apart = len(set((activity.sums / activity.visits).tolist())) > 1
    assert weights.max() == (round(np.e * WEIGHT_ONE) if apart else WEIGHT_ONE)


def test_a_huge_update_cannot_overflow_a_long_run() -> None:
    after = Activity.none(64).after(np.array([3]), np.array([-(2**62)]))
    assert after.sums[3] == LARGEST_ACTIVITY
    assert LARGEST_ACTIVITY * 1_000_000 < 2**62


def test_activities_are_values() -> None:
    before = moved()
    before.after(np.array([0]), np.array([9]))
    assert before.sums.tolist() == moved().sums.tolist()
    assert before.visits.tolist() == moved().visits.tolist()


# ------------------------------------------------------------- in a run


def draws_of(drawing: Drawing, count: int = 3) -> Draws:
    return Draws(RUN, "shared", 64, count, drawing)


@pytest.mark.parametrize("drawing", WEIGHTED)
def test_only_weighted_draws_depend_on_what_was_committed(drawing: Drawing) -> None:
    indices, change = np.arange(5), np.array([1, 2, 30000, -4, 5])
    uniform = draws_of("uniform")
    assert uniform.after(indices, change) is uniform
    assert uniform.of(4, 0).tolist() == draw(RUN, 4, SHARED, 64, 3).tolist()
    weighted = draws_of(drawing, 20)
    after = weighted.after(indices, change)
    expected = Activity.none(64).after(indices, change).weights()
    assert after.of(4, 0).tolist() == draw_weighted(RUN, 4, SHARED, expected, 20).tolist()
    assert weighted.of(4, 0).tolist() != after.of(4, 0).tolist()
    assert weighted.activity is None, "a value: it stays as it was"


def test_a_direction_that_moves_more_is_drawn_more_often() -> None:
    draws = draws_of("weighted")
    for _ in range(3):
        draws = draws.after(np.array([9, 40]), np.array([1 << 20, 1 << 18]))
    seen = Counter(k for n in range(3000) for k in draws.of(n, 0).tolist())
    others = np.mean([seen[k] for k in range(64) if k not in (9, 40)])
    assert seen[9] > 2 * others
    assert others < seen[40] < seen[9]


@pytest.mark.parametrize("drawing", ["uniform", *WEIGHTED])
def test_importance_makes_the_mean_over_a_draw_the_pools(drawing: Drawing) -> None:
    """Σ_k p_k f_k g_k = mean(g), for p_k of one draw: exactly where drawn with replacement."""
    draws = draws_of(drawing).after(np.array([3, 60]), np.array([5, -9000]))
    everything = np.arange(64)
    factors = draws.importance(everything)
    if drawing != "weighted-unbiased":
        assert factors.tolist() == [1.0] * 64
        return
    activity = draws.activity
    assert activity is not None
    likely = activity.weights() / activity.weights().sum()
    g: NDArray[np.float64] = np.random.default_rng(1).normal(0, 1, 64)
    assert np.sum(likely * factors * g) == pytest.approx(g.mean(), rel=1e-12)
    assert draws.importance(np.array([60, 3])).tolist() == factors[[60, 3]].tolist()
    assert factors[60] < 1 < factors[0]


def test_nothing_has_moved_at_first() -> None:
    for drawing in WEIGHTED:
        assert draws_of(drawing).importance(np.arange(64)).tolist() == [1.0] * 64
