"""DIFF2: what a round releases, when it restarts, and what both kinds cost together."""

import random
from collections.abc import Callable
from itertools import product
from math import exp, inf, isfinite, sqrt
from statistics import NormalDist
from typing import Final

import numpy as np
import pytest
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st

from lorand.codec import Floats
from lorand.errors import ConfigError
from lorand.privacy import diff2
from lorand.privacy.accountant import Release, epsilon, epsilon_together
from lorand.privacy.diff2 import Plan, Rule, accumulated, changes, planned
from lorand.privacy.mechanism import GRID
from lorand.schedules import restarts

DELTA: Final = 1e-5


def below(seed: int) -> Callable[[int], int]:
    return random.Random(seed).randrange


def gaussian(multiplier: float, rate: float = 1.0) -> Release:
    return Release("gaussian", multiplier, rate)


# ------------------------------------------------------------- what it costs


def test_with_one_multiplier_it_costs_what_plain_rounds_do() -> None:
    """The golden row of notes/privacy.md §1.3: whole batches, σ = 10, 100 rounds."""
    plan = Plan(gaussian(10.0), gaussian(10.0), 4, 96)
    assert plan.epsilon(DELTA) == pytest.approx(4.377179, abs=1e-5)
    assert plan.epsilon(DELTA, "rdp") == pytest.approx(4.728507, abs=1e-5)


@pytest.mark.parametrize("share", [0.01, 0.7])
def test_without_sampling_both_kinds_are_one_gaussian(share: float) -> None:
    """μ² = n1/σ1² + n2/σ2²; its epsilon is exact (Balle and Wang, ICML 2018, theorem 8)."""
    plan = planned(100, 25, share, rate=1.0, target_epsilon=2.0, delta=DELTA)
    mu = sqrt(4 / plan.restart.multiplier**2 + 96 / plan.increment.multiplier**2)
    tail = NormalDist().cdf
    exact = tail(mu / 2 - 2.0 / mu) - exp(2.0) * tail(-mu / 2 - 2.0 / mu)
    assert exact == pytest.approx(DELTA, rel=1e-3)
    assert 4 / plan.restart.multiplier**2 == pytest.approx(share * mu**2)


def test_a_plan_keeps_to_its_target_and_no_more() -> None:
    target = 2.0
    plan = planned(60, 20, 0.4, rate=1.0, target_epsilon=target, delta=DELTA)
    assert (plan.restarts, plan.increments) == (3, 57)
    assert target * 0.999 < plan.epsilon(DELTA) <= target
    assert plan.epsilon(DELTA) < plan.epsilon(DELTA, "rdp") < 1.5 * target
    ratio = plan.increment.multiplier / plan.restart.multiplier
    assert ratio == pytest.approx(sqrt(57 / 0.6 / (3 / 0.4)))


@pytest.mark.slow
def test_a_sampled_plan_keeps_to_its_target() -> None:
    plan = planned(60, 20, 0.4, rate=0.05, target_epsilon=1.0, delta=DELTA)
    assert 0.999 < plan.epsilon(DELTA) <= 1.0


def test_equal_shares_of_rounds_and_budget_are_equal_noise() -> None:
    plan = planned(100, 25, 0.04, rate=1.0, target_epsilon=1.0, delta=DELTA)
    assert plan.restart.multiplier == pytest.approx(plan.increment.multiplier)
    assert plan.epsilon(DELTA) == pytest.approx(epsilon(plan.restart, 100, DELTA), abs=1e-6)


def test_spare_rounds_may_be_of_either_kind() -> None:
    plan = planned(40, 20, 0.5, rate=1.0, target_epsilon=1.0, delta=DELTA, spare=5)
    assert (plan.restarts, plan.increments) == (7, 43)
    assert plan.epsilon(DELTA) <= 1.0


@pytest.mark.slow
def test_sampled_rounds_are_two_sampled_events_and_not_fewer() -> None:
    """Each kind with the rate of its own rounds; the same as composing the PLDs by hand."""
    plan = Plan(gaussian(4.0, 0.1), gaussian(2.0, 0.1), 5, 95)
    apart = [
        pld.privacy_loss_distribution.from_gaussian_mechanism(m, sampling_prob=0.1)
        for m in (4.0, 2.0)
    ]
    together = apart[0].self_compose(5).compose(apart[1].self_compose(95))
    spent = plan.epsilon(DELTA)
    assert spent == pytest.approx(together.get_epsilon_for_delta(DELTA), abs=1e-6)
    whole = Plan(gaussian(4.0), gaussian(2.0), 5, 95)
    assert spent < 0.3 * whole.epsilon(DELTA)
    assert epsilon(gaussian(2.0, 0.1), 95, DELTA) < spent < epsilon(gaussian(2.0, 0.1), 100, DELTA)


def test_a_target_out_of_reach_is_said() -> None:
    with pytest.raises(ConfigError, match=r"raise privacy.target_epsilon"):
        planned(10**6, 10, 0.5, rate=1.0, target_epsilon=1e-6, delta=1e-9)


@st.composite
def pairs(draw: st.DrawFn) -> list[tuple[float, float]]:
    """Chances of three outcomes with an example and without it."""
    chances = st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3)
    both = [draw(chances), draw(chances)]
    return [(p / sum(both[0]), q / sum(both[1])) for p, q in zip(*both, strict=True)]


@settings(deadline=None, max_examples=30)
@given(pairs(), pairs(), st.floats(0.0, 2.0))
def test_no_order_of_releases_costs_more_than_another(
    one: list[tuple[float, float]], two: list[tuple[float, float]], at: float
) -> None:
    """Nor does one that is chosen by outcomes, or ends early: what `epsilon_together` rests on.

    Of two releases of each kind; divergences E_α = Σ max(0, p − α·q) at α = e^at, by the law of a
    chooser that maximises them.
    """
    kinds = (one, two)

    def chosen(left: tuple[int, int], alpha: float) -> float:
        best = max(0.0, 1 - alpha)
        for kind in (0, 1):
            if left[kind]:
                after = (left[0] - (kind == 0), left[1] - (kind == 1))
                best = max(best, sum(p * chosen(after, alpha * q / p) for p, q in kinds[kind]))
        return best

    fixed = 0.0
    for outcome in product(one, one, two, two):
        p, q = np.prod(outcome, axis=0)
        fixed += max(0.0, p - exp(at) * q)
    assert chosen((2, 2), exp(at)) == pytest.approx(fixed, abs=1e-12)


# ------------------------------------------------------------- when


@given(st.integers(2, 400), st.integers(2, 60))
def test_restarts_are_as_many_as_planned(rounds: int, every: int) -> None:
    found = [restarts(committed, every) for committed in range(rounds)]
    assert found[0]
    gaps = np.diff(np.flatnonzero(found))
    assert (gaps == every).all()
    assert sum(found) == -(-rounds // every)


# ------------------------------------------------------------- what leaves

NUMBERS = st.floats(width=64, allow_nan=True, allow_infinity=True) | st.floats(-3, 3)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Floats, Floats, int]:
    """Vectors of a batch at two positions, shape (batch, K), and the number of one example."""
    size, count = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    row = st.lists(NUMBERS, min_size=count, max_size=count)
    both = [draw(st.lists(row, min_size=size, max_size=size)) for _ in range(2)]
    here, before = (np.array(rows, np.float64) for rows in both)
    return here, before, draw(st.integers(0, size - 1))


@settings(deadline=None, max_examples=200)
@given(batches(), st.floats(1e-6, 1e6), st.floats(1e-6, 1e3))
def test_one_example_moves_an_increment_by_its_bound_at_most(
    batch: tuple[Floats, Floats, int], slope: float, moved: float
) -> None:
    """In exact integers, whatever both gradients are and whatever the others are."""
    here, before, gone = batch
    made = Rule(1.0, slope, 1.0, 1.0, 1).mechanism(moved)
    assert made.clip_bound == slope * moved
    whole = made.clipped(changes(here, before)).sum(axis=0)
    left = [np.delete(vectors, gone, axis=0) for vectors in (here, before)]
    rest = made.clipped(changes(*left)).sum(axis=0)
    away = [int(a) - int(b) for a, b in zip(whole, rest, strict=True)]
    assert sum(part * part for part in away) <= GRID**2


def test_noise_is_that_of_the_kind() -> None:
    rule = Rule(clip_bound=4.0, slope_bound=2.0, restart=0.5, increment=3.0, divisor=8)
    here, before = np.full((3, 200), 0.1), np.full((3, 200), 0.09)
    whole = rule.release(here, below=below(1))
    part = rule.release_change(here, before, 0.25, below(2))
    assert whole.std() == pytest.approx(0.5 * 4.0 / 8, rel=0.15)
    assert part.std() == pytest.approx(3.0 * 2.0 * 0.25 / 8, rel=0.15)
    assert abs(whole.mean() - 3 * 0.1 / 8) < 4 * whole.std() / sqrt(200)
    assert abs(part.mean() - 3 * 0.01 / 8) < 4 * part.std() / sqrt(200)


def test_each_bound_clips_its_own_kind() -> None:
    rule = Rule(clip_bound=1.0, slope_bound=1.0, restart=0.01, increment=0.01, divisor=1)
    here, before = np.array([[30.0, 40.0]]), np.array([[0.0, 0.0]])
    assert rule.release(here, below=below(1)) == pytest.approx([0.6, 0.8], abs=0.05)
    assert rule.release_change(here, before, 10.0, below(1)) == pytest.approx([6.0, 8.0], abs=0.5)


@pytest.mark.parametrize("value", [inf, -inf, np.nan])
def test_what_is_no_number_at_either_position_counts_as_nothing(value: float) -> None:
    rule = Rule(1.0, 1.0, 0.01, 0.01, 1)
    here, before = np.array([[value, 0.0], [0.5, 0.0]]), np.array([[value, 0.0], [0.0, 0.0]])
    assert rule.release_change(here, before, 1.0, below(4)) == pytest.approx([0.5, 0.0], abs=0.06)


def test_an_empty_batch_is_answered_like_any_other() -> None:
    rule, empty = Rule(1.0, 1.0, 1.0, 1.0, 1), np.empty((0, 3))
    assert np.count_nonzero(rule.release(empty, below=below(1))) == 3
    assert np.count_nonzero(rule.release_change(empty, empty, 0.5, below(1))) == 3


def test_where_nothing_moved_nothing_is_told() -> None:
    """Whatever the examples are, also without numbers: a constant."""
    rule = Rule(1.0, 1.0, 1.0, 1.0, 1)
    for rows in (np.ones((2, 3)), np.full((2, 3), np.nan), np.empty((0, 3))):
        assert rule.release_change(rows, rows, 0.0, below(1)).tolist() == [0.0, 0.0, 0.0]


def test_the_smallest_step_has_a_bound() -> None:
    moved = diff2.distance(np.array([1, 0]), 48)
    assert moved == 2.0**-48
    rule, rows = Rule(1.0, 1e-6, 1.0, 1.0, 1), np.ones((2, 2))
    found = rule.release_change(rows, 0 * rows, moved, below(1))
    assert all(isfinite(value) and value != 0 for value in found)


def test_a_distance_is_exact_where_64_bits_overflow() -> None:
    assert diff2.distance(np.array([3, 4]) * 2**40, 32) == 5.0 * 2**8


def test_without_noise_or_clipping_the_sum_is_the_gradient_itself() -> None:
    """Telescoping: v = g(x_0) + Σ (g(x_t) − g(x_{t−1})) = g(x_t)."""
    source = np.random.default_rng(3)
    gradients = source.normal(0, 1, (9, 5, 4))
    rule = Rule(1e3, 1e3, 0.01, 0.01, 10**6)
    gathered = np.full(4, np.nan)  # of which nothing is left after the first round
    for at, here in enumerate(gradients):
        anew = restarts(at, 4)
        released = (
            rule.release(here, below(at))
            if anew
            else rule.release_change(here, gradients[at - 1], 1.0, below(at))
        )
        gathered = accumulated(gathered, released, restart=anew)
        assert gathered * 10**6 == pytest.approx(here.sum(axis=0), abs=150)
    before_last = gathered.copy()
    assert accumulated(gathered, released, restart=True) is not released
    assert gathered.tolist() == before_last.tolist(), "what was gathered stays as it was"


def test_laplace_parts_add() -> None:
    parts = [(Release("laplace", 100.0, 1.0), 50), (Release("laplace", 50.0, 1.0), 25)]
    assert epsilon_together(parts, 0.0) == pytest.approx(1.0)
    assert epsilon_together([], DELTA) == 0.0


def test_a_kind_that_never_comes_costs_nothing() -> None:
    parts = [(gaussian(3.0), 2), (gaussian(7.0, 0.5), 0)]
    assert epsilon_together(parts, DELTA) == epsilon(gaussian(3.0), 2, DELTA)
