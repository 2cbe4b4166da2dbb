"""What server optimizers carry from round to round: feedback, rates, snapshots, clip bounds."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runs import config_of
from tests.unit.optimizer_rounds import (
    ADAM,
    QUANTUM,
    RUN,
    SGD,
    applied,
    report,
    rounds_of,
    run_of,
    same_state,
    scalars,
)

from lorand import codec
from lorand.codec import Codec, Floats
from lorand.config import RunConfig
from lorand.directions import Draws
from lorand.errors import ContributionError, LedgerError
from lorand_coordinator import optimizer
from lorand_coordinator.aggregation import Report
from lorand_coordinator.optimizer import Update
from lorand_coordinator.snapshot import pack_state, unpack_state

# ------------------------------------------------------------- error feedback


@pytest.mark.parametrize("down", ["int8", "sign", "int32"])
@pytest.mark.parametrize("mode", ["shared", "own"])
def test_error_feedback_is_exact(down: Codec, mode: str) -> None:
    """Σ wanted = Σ applied + feedback, a coordinate: what the codes lose is kept, not lost.

    What was wanted comes from the same run without loss on the way down (in quanta, so every sum
    here is of integers and halves far below 2^53).
    """
    config = run_of({**SGD, "normalise": False}, down=down, directions={"mode": mode})
    workers = (1, 2)
    wanted = np.zeros(64)
    for _, update, after, _ in rounds_of(config, 12, workers):
        wanted[update.indices] += step_of(config, after.committed, update.indices, workers)
        kept = after.coefficients + after.feedback
        assert kept == pytest.approx(wanted, rel=1e-12, abs=1e-3)
        assert np.abs(after.feedback[update.indices]).max() <= bound(down, update) + 1e-3


def step_of(config: RunConfig, round_index: int, indices: Any, workers: tuple[int, ...]) -> Floats:
    """Plain SGD's step in quanta, from the decoded scalars."""
    dense, measured = np.zeros(64), 0
    for worker in workers:
        codes = report(scalars(100 * round_index + worker, 8)).codes
        values = codes * 2.0**codec.INT32_SCALE_EXPONENT
        if config.directions.mode == "shared":
            values = values / len(workers)
        np.add.at(dense, config.draws(RUN).of(round_index, worker), values)
        measured += 8
    measured = 8 if config.directions.mode == "shared" else measured
    return np.asarray(-0.01 / measured / QUANTUM * dense[indices], np.float64)


def bound(down: Codec, update: Update) -> float:
    """What a code may lose: half a step; one bit loses up to the largest of the wanted."""
    return np.inf if down == "sign" else update.scale / 2


def test_one_bit_applies_what_was_lost_later() -> None:
    """With signs alone, a coordinate that wants more than the mean catches up over the rounds."""
    config = run_of({**SGD, "normalise": False}, count=64, down="sign")
    values = np.full(64, 1.0)
    values[7] = 5.0
    draws, state = config.draws(RUN), optimizer.start(config)
    way = [state.coefficients]
    for round_index in range(1, 401):
        state, _ = optimizer.advance(config, draws, state, round_index, {1: report(values)})
        way.append(state.coefficients)
    moved = way[400] - way[200]
    assert moved[7] / moved[0] == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize("down", ["int8", "sign", "int32"])
def test_an_update_too_large_for_its_codes_is_an_error(down: Codec) -> None:
    """One code or their total at 2^62 or above: refused before anything is written."""
    for rate in (2e9, 1e12, 1e30):
        config = run_of({**SGD, "learning_rate": rate}, down=down)
        state, draws = optimizer.start(config), config.draws(RUN)
        with pytest.raises((ContributionError, LedgerError)):
            optimizer.advance(config, draws, state, 1, {1: report(scalars(1, 8))})


# ------------------------------------------------------------- over the run


def test_linear_decay_shrinks_the_step() -> None:
    """Factors 1, 3/4, 1/2, 1/4 over four committed rounds, then 0."""
    config = run_of({**SGD, "schedule": "linear", "normalise": False})
    draws, state = config.draws(RUN), optimizer.start(config)
    sizes = []
    for round_index in range(1, 6):
        state, update = optimizer.advance(config, draws, state, round_index, {1: report(ones(8))})
        sizes.append(float(np.abs(applied(update)).max()))
    whole = 0.01 / 8
    assert sizes == pytest.approx([whole, 0.75 * whole, 0.5 * whole, 0.25 * whole, 0], abs=2e-9)


def ones(count: int) -> Floats:
    return np.ones(count)


def test_the_public_scale_follows_the_committed_codes() -> None:
    """It moves only by what everybody can recompute from the ledger."""
    config = config_of(estimator={"directions_per_round": 16})
    draws, state = config.draws(RUN), optimizer.start(config)
    seen = [state.scale_exponent]
    for round_index in range(1, 12):
        values = np.full(16, 1e-6)
        codes = codec.encode("int8", values, state.scale_exponent)
        expected = codec.next_scale_exponent("int8", state.scale_exponent, codes)
        state, _ = optimizer.advance(config, draws, state, round_index, {1: Report(codes)})
        assert state.scale_exponent == expected
        seen.append(state.scale_exponent)
    assert seen[0] == -6
    assert codec.TARGET_RMS / 2 < 1e-6 * 2.0 ** -seen[-1] < codec.TARGET_RMS * 2


def test_a_run_learns() -> None:
    """Sanity of signs and sizes: a quadratic bowl in coefficient space is descended."""
    target = np.random.default_rng(0).normal(0, 0.05, 64)
    for kind in ({**SGD, "learning_rate": 0.02}, {**ADAM, "learning_rate": 0.02}):
        config = run_of({**kind, "schedule": "linear"}, count=16, down="int8", run={"rounds": 150})
        draws, state = config.draws(RUN), optimizer.start(config)
        for round_index in range(1, 151):
            at = draws.of(round_index, 1)
            gradient = state.coefficients[at] * QUANTUM - target[at]
            state, _ = optimizer.advance(config, draws, state, round_index, {1: report(gradient)})
        left = np.linalg.norm(state.coefficients * QUANTUM - target) / np.linalg.norm(target)
        assert left < 0.2


# ------------------------------------------------------------- snapshots


@pytest.mark.parametrize("kind", [{**SGD, "momentum": 0.9}, ADAM], ids=["sgd", "adam"])
def test_a_snapshot_is_exact(kind: dict[str, Any]) -> None:
    """A coordinator that goes on from it writes the same bits as one that never stopped."""
    config = run_of({**kind, "learning_rate": 1 / 3}, down="int8")
    *_, (_, _, state, _) = rounds_of(config, 7)
    back = unpack_state(pack_state(state), state.coefficients, state.committed)
    assert same_state(back, state)
    assert pack_state(back) == pack_state(state)
    draws: Draws = config.draws(RUN)
    reports = {1: report(scalars(3, 8))}
    one, _ = optimizer.advance(config, draws, state, 8, reports)
    two, _ = optimizer.advance(config, draws, back, 8, reports)
    assert same_state(one, two)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_snapshot_is_an_error(data: st.DataObject) -> None:
    """Every flipped bit, also of A, which late joiners would else take for the run's."""
    *_, (_, _, state, _) = rounds_of(run_of(ADAM), 2)
    packed = bytearray(pack_state(state))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(LedgerError, match="a checkpoint is damaged"):
        unpack_state(bytes(packed), state.coefficients, state.committed)


def test_a_snapshot_belongs_to_its_coefficients() -> None:
    *_, (_, _, state, _) = rounds_of(run_of(ADAM), 2)
    packed = pack_state(state)
    flipped = state.coefficients.copy()
    flipped[3] ^= 1
    for coefficients, committed in ((flipped, 2), (state.coefficients, 3)):
        with pytest.raises(LedgerError, match="a checkpoint is damaged"):
            unpack_state(packed, coefficients, committed)
    for cut in (0, 1, 32, 100, len(packed) - 1):
        with pytest.raises(LedgerError, match="a checkpoint is damaged"):
            unpack_state(packed[:cut], state.coefficients, state.committed)


# ------------------------------------------------------------- clipping by history


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_an_outlier_is_clipped_at_the_spread_of_earlier_rounds(kind: str) -> None:
    """Not at its own round's, which it raises; the first round knows none and is not clipped."""
    plain = run_of({**SGD, "kind": kind, "normalise": False}, count=64)
    config = run_of({**SGD, "kind": kind, "normalise": False, "clip_factor": 3.0}, count=64)
    draws, state, other = config.draws(RUN), optimizer.start(config), optimizer.start(plain)
    spread, weight = 0.0, 0.0
    for round_index in range(1, 80):
        values = scalars(round_index, 64)
        if round_index in (1, 79):
            values[7] = 1000.0
        bound = 3.0 * np.sqrt(spread / weight) if weight else np.inf
        clipped = np.clip(values, -bound, bound)
        assert (clipped[7] == 1000.0) == (round_index == 1)
        state, update = optimizer.advance(config, draws, state, round_index, {1: report(values)})
        other, expected = optimizer.advance(plain, draws, other, round_index, {1: report(clipped)})
        assert applied(update) == pytest.approx(applied(expected), rel=1e-4, abs=1e-6)
        spread, weight = 0.9 * spread + 0.1 * float(np.mean(clipped**2)), 0.9 * weight + 0.1
        assert state.spread / state.spread_weight == pytest.approx(spread / weight, rel=1e-4)
    assert bound < 12, "three times the scalars' spread of 3, but for what is left of the first"


def test_one_sided_scalars_are_clipped_about_their_median() -> None:
    """What the curvature adds to all of them alike is no outlier."""
    settings = {**SGD, "clip_factor": 3.0, "normalise": False}
    estimator = {"kind": "one-sided", "directions_per_round": 64}
    config = config_of(
        optimizer=settings, estimator=estimator, codec={"up": "int32", "down": "int32"}
    )
    draws, state = config.draws(RUN), optimizer.start(config)
    for round_index in (1, 2):
        values = scalars(round_index, 64) + 500.0
        state, update = optimizer.advance(config, draws, state, round_index, {1: report(values)})
        assert applied(update) == pytest.approx(-0.01 / 64 * values, rel=0.02)


def test_a_run_of_zeros_clips_nothing() -> None:
    config = run_of({**SGD, "clip_factor": 1.0, "normalise": False}, count=8)
    draws, state = config.draws(RUN), optimizer.start(config)
    for round_index, value in enumerate((0.0, 0.0, 5.0), start=1):
        values = np.full(8, value)
        state, update = optimizer.advance(config, draws, state, round_index, {1: report(values)})
        assert applied(update) == pytest.approx(-0.01 / 8 * values, abs=2e-9)
