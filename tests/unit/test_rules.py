"""Rules against participants who lie: what they equal without any, and how far liars get."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.runs import config_of

from lorand import codec
from lorand.codec import LARGEST, Floats
from lorand.config import ROBUST, RunConfig
from lorand_coordinator import optimizer, rules
from lorand_coordinator.aggregation import Report, aggregate

RUN: Final = bytes(range(32))
TRIM: Final = 0.3
RULES: Final[dict[str, Callable[[Floats], Floats]]] = {
    "median": rules.median,
    "trimmed-mean": lambda rows: rules.trimmed_mean(rows, TRIM),
    "clipped-mean": lambda rows: rules.clip(rows).sum(axis=0) / len(rows),
    "majority": lambda rows: rules.vote(rows, [1.0] * len(rows)),
}


@st.composite
def rooms(draw: st.DrawFn, fewest: int = 3) -> tuple[Floats, int]:
    """Rows of up to eleven participants, and how many of them (the first) may lie: f < n/3."""
    count = draw(st.integers(fewest, 11))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = rng.normal(draw(st.sampled_from([0.0, 0.5])), 1.0, (count, draw(st.integers(1, 6))))
    return rows, (count - 1) // 3


def lied(rows: Floats, liars: int, size: float, seed: int) -> Floats:
    lies = np.random.default_rng(seed).choice([-size, 0.0, size], (liars, rows.shape[1]))
    return np.concatenate([lies, rows[liars:]])


LIES: Final = st.sampled_from([0.1, 1.0, 1e3, 1e30])
SEEDS: Final = st.integers(0, 1000)


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=40)
@given(room=rooms(), seed=SEEDS)
def test_who_said_it_is_irrelevant(rule: str, room: tuple[Floats, int], seed: int) -> None:
    """To the last bit for what goes by order or votes; a mean's sum rounds by its order."""
    rows, _ = room
    shuffled = rows[np.random.default_rng(seed).permutation(len(rows))]
    one, other = RULES[rule](rows), RULES[rule](shuffled)
    if rule == "clipped-mean":
        assert one == pytest.approx(other, rel=1e-12, abs=1e-15)
    else:
        assert one.tobytes() == other.tobytes()


@settings(deadline=None, max_examples=40)
@given(rooms())
def test_without_liars_to_reckon_with_rules_are_means(room: tuple[Floats, int]) -> None:
    rows, _ = room
    mean = rows.mean(axis=0)
    assert rules.trimmed_mean(rows, 0.0) == pytest.approx(mean)
    alike = rows / np.sqrt(np.sum(rows**2, axis=1))[:, None]
    assert rules.clip(alike) == pytest.approx(alike)
    assert rules.trimmed_mean(rows, 0.49) == pytest.approx(rules.median(rows))


@settings(deadline=None, max_examples=100)
@given(rooms(), LIES, SEEDS)
def test_fewer_than_a_third_cannot_leave_the_honest_range(
    room: tuple[Floats, int], size: float, seed: int
) -> None:
    rows, liars = room
    told = lied(rows, liars, size, seed)
    honest = rows[liars:]
    for rule in ("median", "trimmed-mean"):
        if rule == "trimmed-mean" and liars > np.ceil(TRIM * len(rows)):
            continue  # more than it was told to reckon with
        found = RULES[rule](told)
        assert (found >= honest.min(axis=0) - 1e-12).all()
        assert (found <= honest.max(axis=0) + 1e-12).all()


@settings(deadline=None, max_examples=100)
@given(rooms(), LIES, SEEDS)
def test_liars_move_a_clipped_mean_by_a_bounded_length(
    room: tuple[Floats, int], size: float, seed: int
) -> None:
    """By 2 f C / n at most, with the same bound C before and after; C is an honest length."""
    rows, liars = room
    told = lied(rows, liars, size, seed)
    clipped = rules.clip(told)
    lengths = np.sqrt(np.sum(clipped**2, axis=1))
    bound = float(np.sqrt(np.sum(told[rules.typical(told)] ** 2)))
    longest = np.sqrt(np.sum(rows[liars:] ** 2, axis=1)).max()
    assert lengths.max() <= bound * (1 + 1e-12)
    assert bound <= longest * (1 + 1e-12)
    without = clipped.copy()
    without[:liars] = -clipped[:liars]  # the furthest that liars of this length could be from it
    moved = np.sqrt(np.sum((clipped.mean(axis=0) - without.mean(axis=0)) ** 2))
    assert moved <= 2 * liars * bound / len(rows) * (1 + 1e-12)


@pytest.mark.parametrize(("rule", "holds"), [("median", 5), ("trimmed-mean", 4)])
def test_the_breakdown_point(rule: str, holds: int) -> None:
    """Of eleven: the median stands while most are honest, trimming as far as it trims."""
    rows = np.random.default_rng(0).normal(0, 1, (11, 4))
    for liars in range(1, 11):
        told = rows.copy()
        told[:liars] = 1e30
        assert (RULES[rule](told).max() < 10) == (liars <= holds)


def test_one_liar_ruins_a_plain_mean() -> None:
    rows = np.random.default_rng(0).normal(0, 1, (11, 4))
    rows[0] = 1e30
    assert rows.mean(axis=0).max() > 1e28
    assert all(np.abs(rule(rows)).max() < 10 for rule in RULES.values())


@settings(deadline=None, max_examples=60)
@given(rooms(), LIES, SEEDS)
def test_a_vote_is_right_where_honest_votes_outnumber_the_others(
    room: tuple[Floats, int], size: float, seed: int
) -> None:
    rows, liars = room
    assume(liars > 0)
    honest = np.sign(rows[liars:]).sum(axis=0)
    found = RULES["majority"](lied(rows, liars, size, seed))
    sure = np.abs(honest) > liars
    assert found[sure].tolist() == np.sign(honest[sure]).tolist()


def test_a_tie_moves_nothing_and_nor_do_zeros() -> None:
    assert rules.vote(np.array([[1.0, 0.0], [-5.0, 0.0]]), [1.0, 1.0]).tolist() == [0.0, 0.0]
    assert rules.clip(np.zeros((3, 2))).tolist() == np.zeros((3, 2)).tolist()


# ------------------------------------------------------------- in a run


def robust(rule: str, **changes: dict[str, Any]) -> RunConfig:
    return config_of(**{"rounds": {"aggregation": rule, "quorum": 3}, **changes})


def reports_of(rows: list[list[int]], scale: int = 0) -> dict[int, Report]:
    return {w: Report(np.array(codes), scale=scale) for w, codes in enumerate(rows, start=1)}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("median", [2.0, -2.0, 3.0]),
        ("trimmed-mean", [2.0, -2.0, 3.0]),
        ("clipped-mean", None),
        ("mean", [127 / 3 + 1, 127 / 3 - 4 / 3, 127 / 3 + 2]),
    ],
)
def test_a_run_takes_the_rule_that_it_names(rule: str, expected: list[float] | None) -> None:
    """In units of a code; with weighted drawing and walks as the mean is."""
    config, rows = robust(rule), [[127, 127, 127], [1, -2, 3], [2, -2, 3]]
    estimate = aggregate(config, config.draws(RUN), 5, 0, reports_of(rows))
    if expected is None:
        expected = list(RULES[rule](np.array(rows, float)))
        assert max(expected) < 4
    assert estimate.values.tolist() == pytest.approx(expected)
    assert estimate.measured == 3


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "clipped-mean"])
def test_rules_go_with_local_steps(rule: str) -> None:
    """What a liar walked bounds nobody else's."""
    config = robust(rule, local={"steps": 1})
    reports = reports_of([[1, 2, 3], [1, 2, 3], [1, 2, 3]], scale=1000)
    reports[2] = Report(np.array([127, 127, 127]), scale=2**33)
    estimate = aggregate(config, config.draws(RUN), 5, 0, reports)
    assert estimate.walked
    honest = np.array([1, 2, 3]) * -1000 * 2.0**-32
    if rule == "clipped-mean":
        length = np.sqrt(np.sum(honest**2))
        assert np.sqrt(np.sum((estimate.values - 2 / 3 * honest) ** 2)) == pytest.approx(length / 3)
    else:
        assert estimate.values == pytest.approx(honest)


def test_a_clipped_mean_goes_with_directions_of_ones_own() -> None:
    config = robust("clipped-mean", directions={"mode": "own"})
    rows = [[127, 127, 127], [1, -2, 3], [2, -2, 3]]
    estimate = aggregate(config, config.draws(RUN), 5, 0, reports_of(rows))
    assert np.abs(estimate.values).max() <= np.sqrt(17)
    assert estimate.measured == 9


@pytest.mark.parametrize("rule", [*ROBUST, "mean"])
@pytest.mark.parametrize("up", ["int8", "log8"])
def test_liars_do_not_run_away_with_the_scale(rule: str, up: codec.Codec) -> None:
    """Three of ten saturated: of the mean's scale they raise it until honest codes are zero."""
    config = robust(rule, codec={"up": up})
    draws, state = config.draws(RUN), optimizer.start(config)
    rng = np.random.default_rng(0)
    for round_index in range(60):
        values = rng.normal(0, 1e-2, (10, 3))
        codes = [_encoded(up, row, state.scale_exponent) for row in values]
        codes[:3] = [[LARGEST[up]] * 3] * 3
        state, _ = optimizer.advance(config, draws, state, round_index, reports_of(codes))
    last = [_encoded(up, row, state.scale_exponent) for row in values]
    assert np.any(last) == (rule != "mean")


def _encoded(up: codec.Codec, values: Floats, exponent: int) -> list[int]:
    codes: list[int] = codec.encode(up, values, exponent).tolist()
    return codes
