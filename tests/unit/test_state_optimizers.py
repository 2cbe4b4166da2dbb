"""Optimizer state in a subspace: its limiter, refreshes, bits and extremes."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tests.unit.state_steps import CHOSEN, RANK, REST, ROWS, Parts, Result, gradients, run

from lorand.codec import Floats
from lorand.directions import Indices
from lorand.subspaces.state_optimizers import (
    FLOOR,
    LARGEST,
    Kind,
    Settings,
    State,
    advance,
    carried,
    nbytes,
    reset,
    start,
)

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: Final[list[Kind]] = ["adam", "frugal", "fira"]


# ------------------------------------------------------------- Fira's limiter

values = st.one_of(
    st.just(0.0),
    st.floats(-10, 10, allow_nan=False),
    st.sampled_from([1e-300, -1e-60, 1e-9, 1e30, -1e60, LARGEST, -LARGEST]),
)


@st.composite
def walks(draw: st.DrawFn) -> Parts:
    """Up to eight gradients of one shape, of any sizes, with whole zero gradients among them."""
    m, r, rest = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 4))
    parts: list[tuple[Floats, Floats | None]] = []
    for _ in range(draw(st.integers(1, 8))):
        inside = draw(arrays(np.float64, (m, r), elements=values))
        outside = draw(arrays(np.float64, (m, rest), elements=values))
        silent = draw(st.sampled_from([(1, 1), (1, 1), (0, 1), (1, 0), (0, 0)]))
        parts.append((inside * silent[0], outside * silent[1]))
    return parts


@settings(deadline=None, max_examples=150)
@given(walks(), st.sampled_from([1.0, 1.01, 2.0]))
def test_the_residual_grows_by_the_limiter_at_most(parts: Parts, limiter: float) -> None:
    """‖S_t‖ ≤ γ·(‖S_{t−1}‖ + 1e-8), measured on the steps, which carry Adam's correction."""
    last = None
    for state, _, step in run(Settings("fira", limiter=limiter), parts):
        assert step is not None
        correction = math.sqrt(1 - state.beta2_power) / (1 - state.beta1_power)
        largest = float(np.abs(step).max(initial=0.0))
        norm = largest and largest * math.sqrt(float(((step / largest) ** 2).sum())) / correction
        assert state.residual_norm == pytest.approx(norm, rel=1e-9)
        assert last is None or norm <= limiter * (last + 1e-8) * (1 + 1e-9)
        last = norm


def test_after_a_silent_step_the_residual_starts_from_firas_constant() -> None:
    """So its steps are far below Adam's for long; docstring of `_residual`."""
    ones, none = np.ones((2, 3)), np.zeros((2, 3))
    results = run(Settings("fira"), [(none, none), *[(ones, ones)] * 5])
    norms = [state.residual_norm for state, _, _ in results]
    expected = [0.0]
    for _ in range(5):
        expected.append(1.01 * (expected[-1] + 1e-8))
    assert norms == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------- refreshes


@st.composite
def refreshes(draw: st.DrawFn) -> tuple[State, Indices, Indices]:
    """A state, the indices of its columns, and others."""

    def indices() -> Indices:
        chosen = draw(st.sets(st.integers(0, 12), min_size=1, max_size=6))
        return np.array(sorted(chosen), np.int64)

    before, after, m = indices(), indices(), draw(st.integers(1, 3))
    numbers = arrays(np.float64, (m, len(before)), elements=st.floats(-9, 9))
    norm = draw(st.none() | st.floats(0, 9))
    return State(draw(numbers), draw(numbers) ** 2, 0.81, 0.9, norm), before, after


@settings(deadline=None)
@given(refreshes())
def test_surviving_coordinates_keep_their_moments(case: tuple[State, Indices, Indices]) -> None:
    """DCT-AdamW's rotation, M·Q[:, before]ᵀ·Q[:, after], with Q the identity; the counts stay."""
    state, before, after = case
    moved = carried(state, before, after)
    rotation = np.eye(13)[:, before].T @ np.eye(13)[:, after]
    for old, new in ((state.first, moved.first), (state.second, moved.second)):
        assert new.tolist() == (old @ rotation).tolist()
        assert not np.shares_memory(old, new)
    assert replace(moved, first=state.first, second=state.second) == state
    same = carried(state, before, before)
    assert same.first.tobytes() == state.first.tobytes()
    assert same.second.tobytes() == state.second.tobytes()


@settings(deadline=None)
@given(refreshes())
def test_a_reset_remembers_nothing(case: tuple[State, Indices, Indices]) -> None:
    state, *_ = case
    fresh, expected = reset(state), start(*state.first.shape)
    assert fresh.first.tobytes() == expected.first.tobytes() == bytes(state.first.nbytes)
    assert fresh.second.tobytes() == expected.second.tobytes() == bytes(state.second.nbytes)
    assert (fresh.beta1_power, fresh.beta2_power, fresh.residual_norm) == (1.0, 1.0, None)


def test_new_coordinates_take_part_after_a_refresh() -> None:
    """As if their gradients had been zero so far: their count is the tensor's."""
    matrices, after = gradients(12), np.array([0, 4, 7, 9, 13])
    seen = np.isin(after, CHOSEN)
    long = run(Settings(), [(g[:, after] * seen, None) for g in matrices[:6]])[-1][0]
    state = run(Settings(), [(g[:, CHOSEN], None) for g in matrices[:6]])[-1][0]
    state = carried(state, CHOSEN, after)
    for gradient in matrices[6:]:
        state, step, _ = advance(Settings(), state, gradient[:, after], None)
        long, expected, _ = advance(Settings(), long, gradient[:, after], None)
        assert step.tobytes() == expected.tobytes()


@pytest.mark.parametrize("r", [1, RANK])
def test_the_state_is_two_numbers_a_coordinate(r: int) -> None:
    """And three a tensor; also when it has walked and been refreshed."""
    limit = 8 * (2 * ROWS * r + 3)
    state = start(ROWS, r)
    assert nbytes(state) == limit
    gradient = gradients(1)[0]
    state, *_ = advance(Settings("fira"), state, gradient[:, :r], gradient[:, r:])
    state = carried(state, np.arange(r), np.arange(1, r + 1))
    assert nbytes(state) == limit
    assert state.first.base is None
    assert state.second.base is None


# ------------------------------------------------------------- the same bits everywhere


def bits(results: list[Result]) -> list[tuple[bytes, ...]]:
    """Everything that could differ."""
    return [
        (
            state.first.tobytes(),
            state.second.tobytes(),
            np.array([state.beta1_power, state.beta2_power, state.residual_norm or 0.0]).tobytes(),
            step_inside.tobytes(),
            b"" if step_outside is None else step_outside.tobytes(),
        )
        for state, step_inside, step_outside in results
    ]


def parts_of(kind: Kind, matrices: list[Floats]) -> Parts:
    """Chosen columns inside, the others outside."""
    return [(g[:, CHOSEN], None if kind == "adam" else g[:, REST]) for g in matrices]


def slowly(options: Settings, parts: Parts) -> Iterator[tuple[Any, ...]]:
    """The definition in Python's own floats: no vectors, no library, one order of operations."""
    m, r = parts[0][0].shape
    b1, b2, p1, p2, last = options.beta1, options.beta2, 1.0, 1.0, None
    first = [[0.0] * r for _ in range(m)]
    second = [[0.0] * r for _ in range(m)]
    for inside, outside in parts:
        p1, p2 = b1 * p1, b2 * p2
        c = math.sqrt(1.0 - p2) / (1.0 - p1)
        rows = [[float(g) for g in row] for row in inside]
        first = [
            [b1 * x + (1.0 - b1) * g for x, g in zip(*pair, strict=True)]
            for pair in zip(first, rows, strict=True)
        ]
        second = [
            [b2 * x + (1.0 - b2) * (g * g) for x, g in zip(*pair, strict=True)]
            for pair in zip(second, rows, strict=True)
        ]
        normalised = [
            [x / (math.sqrt(y) + options.epsilon) for x, y in zip(*pair, strict=True)]
            for pair in zip(first, second, strict=True)
        ]
        step_inside = [[options.scale * c * x for x in row] for row in normalised]
        step_outside = None
        if options.kind == "frugal" and outside is not None:
            step_outside = [
                [options.inactive_scale * math.copysign(1.0, x) for x in row] for row in outside
            ]
        if options.kind == "fira" and outside is not None:
            residual = []
            for u, g, others in zip(normalised, rows, outside, strict=True):
                factor = math.sqrt(squares(u)) / (math.sqrt(squares(g)) + 1e-8)
                residual.append([float(x) * factor for x in others])
            norm, growth = math.sqrt(math.fsum(map(squares, residual))), 1.0
            if last is not None:
                growth = max(norm / (last + 1e-8), options.limiter) / options.limiter
            last = norm / growth
            step_outside = [[c * (x / growth) for x in row] for row in residual]
        yield first, second, (p1, p2, last), step_inside, step_outside


def squares(row: list[float]) -> float:
    total = 0.0
    for x in row:
        total += x * x
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_one_operation_after_the_other(kind: Kind) -> None:
    """Awkward shapes, so that vectors of any width have a rest; numpy's own sums would differ."""
    options = Settings(kind, scale=0.3, inactive_scale=0.7)
    rng = np.random.default_rng(3)
    matrices = [rng.normal(0, size, (13, 56)) for size in (1.0, 5.0, 0.1, 9.0, 1.0)]
    parts = [(g[:, :19], None if kind == "adam" else g[:, 19:]) for g in matrices]
    for (state, step_inside, step_outside), expected in zip(
        run(options, parts), slowly(options, parts), strict=True
    ):
        first, second, numbers, inside, outside = expected
        assert state.first.tolist() == first
        assert state.second.tolist() == second
        assert (state.beta1_power, state.beta2_power, state.residual_norm) == numbers
        assert step_inside.tolist() == inside
        assert (None if step_outside is None else step_outside.tolist()) == outside


def lying(values: Floats, how: str) -> Floats:
    """The same numbers, elsewhere in memory."""
    if how == "fortran":
        return np.asfortranarray(values)
    if how == "reversed":
        return values[::-1, ::-1].copy()[::-1, ::-1]
    room = np.full((3 * values.shape[0], 2 * values.shape[1]), np.nan)
    room[1::3, ::2] = values
    return room[1::3, ::2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["fortran", "strided", "reversed"])
def test_how_arrays_lie_in_memory_changes_no_bit(kind: Kind, how: str) -> None:
    parts = [(i.copy(), None if o is None else o.copy()) for i, o in parts_of(kind, gradients(6))]
    other = [(lying(i, how), None if o is None else lying(o, how)) for i, o in parts]
    assert parts[0][0].strides != other[0][0].strides
    results = run(Settings(kind), other)
    assert bits(results) == bits(run(Settings(kind), parts))
    for state, inside, outside in results:
        for made in (state.first, state.second, inside, outside):
            assert made is None or made.flags.c_contiguous


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [2, 5, ROWS])
def test_rows_can_be_taken_in_pieces(kind: Kind, pieces: int) -> None:
    """Fira's limiter alone looks at all rows at once, so the pieces have none."""
    options = Settings(kind, limiter=2.0**60)
    parts = parts_of(kind, gradients(6))
    whole = run(options, parts)
    runs = [
        run(options, [(i[at], None if o is None else o[at]) for i, o in parts])
        for at in np.array_split(np.arange(ROWS), pieces)
    ]
    for number, (state, inside, outside) in enumerate(whole):
        chunks = [results[number] for results in runs]
        assert np.concatenate([c[0].first for c in chunks]).tobytes() == state.first.tobytes()
        assert np.concatenate([c[0].second for c in chunks]).tobytes() == state.second.tobytes()
        assert np.concatenate([c[1] for c in chunks]).tobytes() == inside.tobytes()
        if outside is not None:
            joined = np.concatenate([c[2] for c in chunks if c[2] is not None])
            assert joined.tobytes() == outside.tobytes()


def test_the_order_of_rows_changes_no_bit_of_firas_norm() -> None:
    """Rows are added exactly, so however a machine goes through them the limiter is the same."""
    parts = parts_of("fira", gradients(8))
    whole = run(Settings("fira"), parts)
    order = np.random.default_rng(5).permutation(ROWS)
    other = run(Settings("fira"), [(i[order], o[order]) for i, o in parts if o is not None])
    for (state, _, outside), (shuffled, _, moved) in zip(whole, other, strict=True):
        assert state.residual_norm == shuffled.residual_norm
        assert outside is not None
        assert moved is not None
        assert outside[order].tobytes() == moved.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_was_given_is_changed_or_kept(kind: Kind) -> None:
    inside, outside = parts_of(kind, gradients(1))[0]
    state = run(Settings(kind), [(inside, outside)])[0][0]
    before = [x.tobytes() for x in (inside, outside, state.first, state.second) if x is not None]
    after, *steps = advance(Settings(kind), state, inside, outside)
    kept = [x.tobytes() for x in (inside, outside, state.first, state.second) if x is not None]
    assert kept == before
    for made in (after.first, after.second, *steps):
        for old in (inside, outside, state.first, state.second):
            assert made is None or old is None or not np.shares_memory(made, old)


# ------------------------------------------------------------- extremes


@settings(deadline=None, max_examples=150)
@given(walks(), st.sampled_from(KINDS))
def test_all_stays_finite_and_nothing_is_subnormal(parts: Parts, kind: Kind) -> None:
    given = [(inside, None if kind == "adam" else outside) for inside, outside in parts]
    for state, inside, outside in run(Settings(kind), given):
        scalars = np.array([state.beta1_power, state.beta2_power, state.residual_norm or 0.0])
        for made in (state.first, state.second, scalars, inside, outside):
            if made is not None:
                assert np.isfinite(made).all()
                assert ((made == 0.0) | (np.abs(made) >= np.finfo(np.float64).tiny)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_zeros_does_not_move(kind: Kind) -> None:
    none = np.zeros((3, 1))
    for state, inside, outside in run(
        Settings(kind), [(none, None if kind == "adam" else none)] * 4
    ):
        assert not inside.any()
        assert outside is None or not outside.any()
        assert not state.first.any()
        assert not state.second.any()


def test_moments_at_rest_end_at_zero() -> None:
    """β1^t itself and what it multiplies would be subnormal for dozens of steps."""
    state, *_ = advance(Settings(), start(1, 1), np.ones((1, 1)), None)
    seen = []
    for _ in range(1700):
        state, *_ = advance(Settings(), state, np.zeros((1, 1)), None)
        seen.append(float(state.first[0, 0]))
    assert seen[-1] == 0.0 == state.beta1_power
    assert min(x for x in seen if x) >= FLOOR


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12, 1e60])
def test_a_first_step_is_a_sign_whatever_the_size(size: float) -> None:
    """M̂/(√V̂ + ε̂) with ε̂ = ε/√(1 − β2): GaLore's code adds ε before the correction."""
    gradient = size * np.array([[1.0], [-2.0]])
    _, step, _ = advance(Settings(), start(2, 1), gradient, None)
    expected = gradient / (np.abs(gradient) + 1e-6 / math.sqrt(0.001))
    assert step == pytest.approx(expected, rel=1e-9)


def test_no_rest_is_a_rest_of_no_columns() -> None:
    """A subspace may be all there is."""
    state, inside, outside = advance(
        Settings("fira"), start(2, 3), np.ones((2, 3)), np.zeros((2, 0))
    )
    _, expected, _ = advance(Settings(), start(2, 3), np.ones((2, 3)), None)
    assert inside.tolist() == expected.tolist()
    assert outside is not None
    assert outside.shape == (2, 0)
    assert state.residual_norm == 0.0


# ------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2,), (3, 3), (2, 4), (2, 3, 1), (6,), ()])
def test_wrong_shapes_inside_are_refused(kind: Kind, shape: tuple[int, ...]) -> None:
    outside = None if kind == "adam" else np.ones((2, 1))
    with pytest.raises(ValueError, match="inside has the shape"):
        advance(Settings(kind), start(2, 3), np.ones(shape), outside)


@pytest.mark.parametrize("kind", ["frugal", "fira"])
@pytest.mark.parametrize("shape", [(2,), (3, 3), (1, 4), (2, 3, 1), ()])
def test_wrong_shapes_outside_are_refused(kind: Kind, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="outside has the shape"):
        advance(Settings(kind), start(2, 3), np.ones((2, 3)), np.ones(shape))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_outside_belongs_to_the_kind(kind: Kind) -> None:
    wrong = np.ones((2, 1)) if kind == "adam" else None
    with pytest.raises(ValueError, match="outside is"):
        advance(Settings(kind), start(2, 3), np.ones((2, 3)), wrong)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2 * LARGEST])
def test_what_would_not_stay_finite_is_refused(bad: float) -> None:
    good, wrong = np.ones((2, 3)), np.ones((2, 3))
    wrong[1, 2] = bad
    for pair in ((wrong, good), (good, wrong)):
        with pytest.raises(ValueError, match="not a number of magnitude"):
            advance(Settings("fira"), start(2, 3), *pair)


@pytest.mark.parametrize("shape", [(0, 1), (1, 0), (-1, 2)])
def test_a_state_of_nothing_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="rows and coordinates"):
        start(*shape)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([0, 1], [0, 1, 2], "2 indices for a state of 3"),
        ([0, 2, 1], [0, 1, 2], "before must ascend"),
        ([0, 1, 2], [0, 1, 1], "after must ascend"),
        ([0, 1, 2], [-1, 1, 2], "after must be"),
        ([0, 1, 2], [], "after must be"),
        ([0, 1, 2], [[0, 1, 2]], "after must be"),
        ([0.0, 1.0, 2.0], [0, 1, 2], "before must be"),
    ],
)
def test_wrong_indices_are_refused(before: list[Any], after: list[Any], message: str) -> None:
    empty = np.zeros(0, np.int64)
    with pytest.raises(ValueError, match=message):
        carried(start(2, 3), np.array(before), np.array(after) if after else empty)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "sgd"},
        {"beta1": 1.0},
        {"beta1": -0.1},
        {"beta2": 1.0},
        {"beta2": 0.5},
        {"beta1": 1e-300},
        {"epsilon": 0.0},
        {"epsilon": float("nan")},
        {"scale": 0.0},
        {"inactive_scale": -1.0},
        {"limiter": 0.99},
        {"limiter": float("inf")},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
