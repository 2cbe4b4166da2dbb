"""Server optimizers on the K numbers, against their formulas (DESIGN §3)."""

from dataclasses import fields
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runs import config_of
from tests.unit.optimizer_rounds import (
    ADAM,
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
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import optimizer
from lorand_coordinator.aggregation import Report
from lorand_coordinator.aggregation import report as read
from lorand_coordinator.optimizer import State

# ------------------------------------------------------------- against the formulas


def test_plain_sgd_is_a_step_along_the_mean_gradient() -> None:
    """w −= learning_rate · (1/m) Σ g_k z_k, so A_k −= learning_rate / m · g_k."""
    config = run_of({**SGD, "normalise": False})
    for _, update, _, values in rounds_of(config, 4, workers=(1, 2, 3)):
        assert applied(update) == pytest.approx(-0.01 / 8 * values, abs=2e-9)


def test_momentum_is_a_decaying_sum_a_coordinate() -> None:
    """Only where a round measured: v_k ← β v_k + g_k there, as in torch's SparseAdam."""
    config = run_of({**SGD, "normalise": False, "momentum": 0.9})
    velocity = np.zeros(64)
    for _, update, after, values in rounds_of(config, 12):
        at = update.indices
        velocity[at] = 0.9 * velocity[at] + values
        assert after.first == pytest.approx(velocity, abs=1e-5)
        assert applied(update) == pytest.approx(-0.01 / 8 * velocity[at], abs=2e-9)


def test_adam_is_algorithm_1_with_a_count_a_coordinate() -> None:
    """Kingma and Ba, ICLR 2015, algorithm 1, over √m: then learning_rate is a weight's change."""
    config = run_of({**ADAM, "beta1": 0.8, "beta2": 0.95})
    m, v, t = np.zeros(64), np.zeros(64), np.zeros(64)
    for _, update, after, g in rounds_of(config, 20):
        at = update.indices
        t[at] += 1
        m[at] = 0.8 * m[at] + 0.2 * g
        v[at] = 0.95 * v[at] + 0.05 * g**2
        mean, variance = m[at] / (1 - 0.8 ** t[at]), v[at] / (1 - 0.95 ** t[at])
        expected = -0.01 / np.sqrt(8) * mean / np.sqrt(variance)
        assert applied(update) == pytest.approx(expected, rel=1e-5, abs=1e-8)
        assert after.visits.tolist() == t.tolist()


def test_the_first_adam_step_is_the_sign() -> None:
    """m̂/√v̂ = ±1 at a coordinate's first visit, so the weights change by learning_rate."""
    _, update, _, values = next(rounds_of(run_of(ADAM), 1))
    assert applied(update) == pytest.approx(-0.01 / np.sqrt(8) * np.sign(values), abs=1e-9)
    assert np.sqrt(np.sum(applied(update) ** 2)) == pytest.approx(0.01, rel=1e-6)


# ------------------------------------------------------------- normalise


@settings(deadline=None, max_examples=30)
@given(
    st.integers(-12, 12),
    st.sampled_from([1e-4, 1e-2, 1.0]),
    st.sampled_from([4, 16, 64]),
    st.sampled_from([64, 256]),
)
def test_normalised_the_first_round_changes_a_weight_by_learning_rate(
    magnitude: int, rate: float, count: int, size: int
) -> None:
    """Root mean square over weights: √Σ ΔA_k², whatever the loss's size, K and m are."""
    config = run_of({**SGD, "learning_rate": rate}, count=count, directions={"pool_size": size})
    values = scalars(1, count) * 2.0**magnitude
    _, update = optimizer.advance(
        config, config.draws(RUN), optimizer.start(config), 1, {1: report(values)}
    )
    assert np.sqrt(np.sum(applied(update) ** 2)) == pytest.approx(rate, rel=1e-3)


def test_a_spread_without_memory_is_that_of_the_round() -> None:
    """FZOO: every round changes a weight by learning_rate, however large its scalars are."""
    config = run_of({**SGD, "spread_decay": 0.0}, count=16)
    draws, state = config.draws(RUN), optimizer.start(config)
    for round_index, magnitude in enumerate((1.0, 100.0, 0.01), start=1):
        values = scalars(round_index, 16) * magnitude
        state, update = optimizer.advance(config, draws, state, round_index, {1: report(values)})
        assert np.sqrt(np.sum(applied(update) ** 2)) == pytest.approx(0.01, rel=1e-2)


@settings(deadline=None, max_examples=20)
@given(st.floats(-50, 50), st.integers(0, 100))
def test_one_sided_steps_are_divided_by_the_spread_about_the_mean(shift: float, seed: int) -> None:
    """FZOO's σ: what curvature adds to all scalars alike does not make it larger."""
    config = config_of(
        optimizer={**SGD, "spread_decay": 0.0},
        estimator={"kind": "one-sided", "directions_per_round": 16},
        codec={"up": "int32", "down": "int32"},
    )
    values = scalars(seed, 16) + shift
    _, update = optimizer.advance(
        config, config.draws(RUN), optimizer.start(config), 1, {1: report(values)}
    )
    expected = -0.01 / np.sqrt(16) * values / np.std(values, ddof=1)
    assert applied(update) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_normalised_own_directions_divide_by_all_that_was_measured() -> None:
    """Two workers measured 40 scalars, at fewer directions: some were drawn twice."""
    config = run_of(SGD, count=20, directions={"mode": "own"})
    parts = {worker: scalars(worker, 20) for worker in (1, 2)}
    reports = {worker: report(values) for worker, values in parts.items()}
    _, update = optimizer.advance(config, config.draws(RUN), optimizer.start(config), 1, reports)
    dense = np.zeros(64)
    for worker, values in parts.items():
        np.add.at(dense, config.draws(RUN).of(1, worker), values)
    values = dense[update.indices]
    assert len(values) < 40
    expected = -0.01 / np.sqrt(40) * values / np.sqrt(np.mean(values**2))
    assert applied(update) == pytest.approx(expected, rel=1e-5)


def test_normalised_it_stays_learning_rate_on_the_average() -> None:
    """The running mean of squared scalars follows the loss's scale, also when it drifts."""
    steps = [applied(update) for _, update, _, _ in rounds_of(run_of(SGD), 60)]
    sizes = [float(np.sum(step**2)) for step in steps[20:]]
    assert np.sqrt(np.mean(sizes)) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("size", [64, 128])
def test_root_mean_square_over_real_weights(size: int) -> None:
    """√Σ ΔA_k² is what the weights see: the directions are ±1 and orthogonal over K weights."""
    config = run_of(SGD, directions={"pool_size": size})
    _, update, _, _ = next(rounds_of(config, 1))
    signs = np.array(
        [
            [(-1) ** (int(e) & int(k)).bit_count() for k in update.indices.tolist()]
            for e in range(size)
        ]
    )
    change = signs @ applied(update)
    assert np.sqrt(np.mean(change**2)) == pytest.approx(0.01, rel=1e-6)


def test_a_round_of_zeros_changes_nothing() -> None:
    """No division by a spread of zero."""
    for kind in (SGD, ADAM, {**SGD, "normalise": False}):
        config = run_of(kind)
        after, update = optimizer.advance(
            config, config.draws(RUN), optimizer.start(config), 1, {1: report(np.zeros(8))}
        )
        assert not update.codes.any()
        assert not after.coefficients.any()


# ------------------------------------------------------------- local steps

MEAN_OF_STEPS: Final[dict[str, Any]] = {**SGD, "learning_rate": 1.0, "normalise": False}


def walk(seed: int, count: int = 8) -> Report:
    """Where local steps led: codes with a scale of their own."""
    return Report(np.random.default_rng(seed).integers(-127, 128, count), scale=50_000 * seed)


@pytest.mark.parametrize("mode", ["shared", "own"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_learning_rate_of_one_takes_the_mean_of_the_steps(mode: str, schedule: str) -> None:
    """Reddi et al., algorithm 1 with plain averaging; the schedule was applied at the workers."""
    settings_of = {**MEAN_OF_STEPS, "schedule": schedule}
    config = run_of(settings_of, directions={"mode": mode}, local={"steps": 1})
    draws, state = config.draws(RUN), optimizer.start(config)
    for round_index in range(1, 4):
        reports = {worker: walk(10 * round_index + worker) for worker in (1, 2)}
        mean = np.zeros(64)
        for worker, part in reports.items():
            np.add.at(mean, draws.of(round_index, worker), part.codes * part.scale / 2)
        before, public = state.coefficients, state.scale_exponent
        state, update = optimizer.advance(config, draws, state, round_index, reports)
        moved = state.coefficients - before
        np.testing.assert_allclose(moved[update.indices], mean[update.indices], atol=1)
        assert not np.delete(mean, update.indices).any()
        assert state.scale_exponent == public, "it is for scalars"


def test_momentum_of_steps_is_a_decaying_sum() -> None:
    """FedAvgM (Hsu et al., 2019): v ← β v + mean step, A += v, where it was measured."""
    config = run_of({**MEAN_OF_STEPS, "momentum": 0.5}, local={"steps": 1})
    draws, state, velocity = config.draws(RUN), optimizer.start(config), np.zeros(64)
    for round_index in range(1, 12):
        part, at = walk(round_index), draws.of(round_index, 1)
        velocity[at] = 0.5 * velocity[at] + part.codes * part.scale
        before = state.coefficients
        state, _ = optimizer.advance(config, draws, state, round_index, {1: part})
        np.testing.assert_allclose((state.coefficients - before)[at], velocity[at], atol=1)


def test_adam_of_steps_goes_their_way_at_its_own_length() -> None:
    """FedAdam: the first round changes a weight by learning_rate, however long the steps were."""
    config = run_of({**ADAM, "schedule": "linear"}, local={"steps": 1})
    part = walk(3)
    after, update = optimizer.advance(
        config, config.draws(RUN), optimizer.start(config), 1, {1: part}
    )
    assert np.sqrt(np.sum(applied(update) ** 2)) == pytest.approx(
        0.01 * np.sqrt(np.mean(part.codes != 0)), rel=1e-6
    )
    assert np.sign(after.coefficients[update.indices]).tolist() == np.sign(part.codes).tolist()


def test_normalised_steps_change_a_weight_by_learning_rate() -> None:
    config = run_of(SGD, local={"steps": 1})
    _, update = optimizer.advance(
        config, config.draws(RUN), optimizer.start(config), 1, {1: walk(5)}
    )
    assert np.sqrt(np.sum(applied(update) ** 2)) == pytest.approx(0.01, rel=1e-6)


def test_the_largest_walks_of_all_fit() -> None:
    """Every participant at the limit, in the finest quantum: no round fails by them."""
    config = config_of(
        optimizer=MEAN_OF_STEPS,
        codec={"up": "int32", "down": "int8"},
        directions={"quantum_exponent": 48, "mode": "own"},
        local={"steps": 1},
    )
    whole = Report(np.array([2**20, 0, 0]), scale=2**38)
    body = pb.Contribution(codes=codec.pack("int32", whole.codes), scale=whole.scale)
    reports = {worker: read(config, body) for worker in range(1, 6)}
    state, _ = optimizer.advance(config, config.draws(RUN), optimizer.start(config), 1, reports)
    assert np.abs(state.coefficients).sum() < 2**59


# ------------------------------------------------------------- what moves


@pytest.mark.parametrize("kind", [{**SGD, "momentum": 0.9}, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("mode", ["shared", "own"])
def test_only_measured_coordinates_move(kind: dict[str, Any], mode: str) -> None:
    """Moments and error feedback of the others keep their bits too."""
    config = run_of(kind, down="int8", directions={"mode": mode})
    for before, update, after, _ in rounds_of(config, 6, workers=(1, 2)):
        others = np.ones(64, bool)
        others[update.indices] = False
        assert others.any()
        for name in ("coefficients", "first", "second", "visits", "feedback"):
            old, new = getattr(before, name), getattr(after, name)
            assert new[others].tolist() == old[others].tolist(), name


def test_states_are_values() -> None:
    """Advancing leaves the state before as it was: an append that fails is tried again."""
    config = run_of(ADAM)
    *_, (before, _, _, _) = rounds_of(config, 4)
    copies = {field.name: np.copy(getattr(before, field.name)) for field in fields(State)}
    draws = config.draws(RUN)
    first = optimizer.advance(config, draws, before, 9, {1: report(scalars(5, 8))})
    for name, copy in copies.items():
        assert np.array_equal(getattr(before, name), copy), name
    second = optimizer.advance(config, draws, before, 9, {1: report(scalars(5, 8))})
    assert same_state(first[0], second[0])
    assert first[1].codes.tolist() == second[1].codes.tolist()


@pytest.mark.parametrize("kind", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("mode", ["shared", "own"])
def test_the_order_of_arrival_changes_no_bit(kind: dict[str, Any], mode: str) -> None:
    config = run_of(kind, down="int8", directions={"mode": mode})
    draws = config.draws(RUN)
    states = []
    for order in ([1, 2, 3], [3, 1, 2]):
        state = optimizer.start(config)
        for round_index in range(1, 6):
            reports = {w: report(scalars(10 * round_index + w, 8)) for w in order}
            state, _ = optimizer.advance(config, draws, state, round_index, reports)
        states.append(state)
    assert same_state(*states)
