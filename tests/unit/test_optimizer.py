"""Server optimizers on the K numbers, against their formulas, and the codes of ΔA (DESIGN §3)."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runs import config_of

from lorand import codec
from lorand.codec import Codec, Floats
from lorand.config import RunConfig
from lorand.directions import Draws
from lorand.errors import ContributionError, LedgerError
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import optimizer
from lorand_coordinator.aggregation import Report
from lorand_coordinator.aggregation import report as read
from lorand_coordinator.optimizer import State, Update
from lorand_coordinator.snapshot import pack_state, unpack_state

RUN: Final = bytes(range(32))
QUANTUM: Final = 2.0**-32
SGD: Final[dict[str, Any]] = {"learning_rate": 0.01, "schedule": "constant"}
ADAM: Final[dict[str, Any]] = {**SGD, "kind": "adam"}


def run_of(
    optimizer: dict[str, Any], *, count: int = 8, down: Codec = "int32", **changes: Any
) -> RunConfig:
    """A run whose downward codes are exact to half a quantum, unless told otherwise."""
    return config_of(
        optimizer=optimizer,
        estimator={"directions_per_round": count},
        codec={"up": "int32", "down": down},
        **changes,
    )


def scalars(seed: int, count: int) -> Floats:
    return np.random.default_rng(seed).normal(0, 3.0, count)


def report(values: Floats) -> Report:
    return Report(codec.encode("int32", values, codec.INT32_SCALE_EXPONENT))


def rounds_of(
    config: RunConfig, rounds: int, workers: tuple[int, ...] = (1,)
) -> Iterator[tuple[State, Update, State, Floats]]:
    """Yield (state before, update, state after, mean scalars of the round's directions)."""
    draws, state = config.draws(RUN), optimizer.start(config)
    for round_index in range(1, rounds + 1):
        parts = {w: scalars(100 * round_index + w, config.num_directions) for w in workers}
        reports = {w: report(values) for w, values in parts.items()}
        after, update = optimizer.advance(config, draws, state, round_index, reports)
        yield state, update, after, np.mean(list(parts.values()), axis=0)
        state = after


def applied(update: Update) -> Floats:
    """ΔA in weight units."""
    return codec.delta(update.scale, update.codes).astype(np.float64) * QUANTUM


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


def same_state(a: State, b: State) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(State))


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
