"""Pools that a run has left: rotation in the ledger, at the coordinator, in adapters."""

import dataclasses
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tests.runs import IDENTITY, codes_of, config_of, history

from lorand import adapter, codec, ledger
from lorand.closed import Closed, Sparse
from lorand.coefficients import Coefficients
from lorand.directions import pool_key
from lorand.errors import LedgerError, ModelError
from lorand_coordinator import optimizer
from lorand_coordinator.aggregation import Report

ROTATING: Final = config_of(directions={"rotate_every": 2}, run={"rounds": 6})


def some(seed: int, count: int = 64) -> Coefficients:
    """Coefficients of which most are zero."""
    rng = np.random.default_rng(seed)
    return rng.integers(-(2**40), 2**40, count) * (rng.random(count) < 0.2)


# ------------------------------------------------------------- what is kept of a pool


@settings(deadline=None)
@given(st.lists(st.integers(-(2**62), 2**62), min_size=64, max_size=64))
def test_what_is_not_zero_is_kept_exactly(values: list[int]) -> None:
    coefficients = np.array(values, np.int64)
    sparse = Sparse.of(coefficients)
    assert sparse.dense(64).tolist() == values
    assert sparse.dense(64).dtype == np.int64
    assert len(sparse.indices) == np.count_nonzero(coefficients)


@pytest.mark.parametrize(("value", "nbytes"), [(2**31 - 1, 4), (-(2**31) + 1, 4), (2**31, 8)])
def test_it_takes_32_bits_where_they_do(value: int, nbytes: int) -> None:
    sparse = Sparse.of(np.array([0, value] * 32))
    assert sparse.values.itemsize == nbytes
    assert sparse.indices.itemsize == 4
    assert sparse.dense(64)[1] == value


@pytest.mark.parametrize("indices", [[1, 1], [3, 2], [-1, 4], [1], [1, 2, 3]])
def test_indices_that_no_pool_has_are_refused(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="closed pool"):
        Sparse(np.array(indices, np.int32), np.array([5, 6]))
    with pytest.raises(ValueError, match="index 64 of 64"):
        Sparse(np.array([3, 64], np.int32), np.array([5, 6])).dense(64)


def test_pools_continue_without_changing_what_others_hold() -> None:
    """Two histories that part share no pool after that, whichever goes on first."""
    a, b, c = (Sparse.of(some(seed)) for seed in (1, 2, 3))
    one = Closed([a])
    two, other = one.then(b), one.then(c)
    assert [len(closed) for closed in (one, two, other)] == [1, 2, 2]
    assert list(two) == [a, b]
    assert list(other) == [a, c]
    assert two == Closed([a, Sparse.of(some(2))]) != other
    assert Closed() != one != (a,)
    with pytest.raises(IndexError):
        one[1]


def test_ten_thousand_pools_share_one_memory() -> None:
    """A pool a round: what the others hold is not copied."""
    closed, pool = Closed(), Sparse.of(some(1))
    for _ in range(10_000):
        closed = closed.then(pool)
    assert len(closed) == len(list(closed)) == 10_000
    assert closed._shared is closed.then(pool)._shared


# ------------------------------------------------------------- the ledger


def test_a_run_rotates_after_so_many_rounds_but_not_after_its_last() -> None:
    for every, expected in [
        (0, [0] * 7),
        (1, [0, 1, 2, 3, 4, 5, 5]),
        (2, [0, 0, 1, 1, 2, 2, 2]),
        (6, [0] * 7),
    ]:
        config = config_of(directions={"rotate_every": every}, run={"rounds": 6})
        assert [config.pool_after(n) for n in range(7)] == expected


def test_rotation_closes_a_pool_and_begins_another_at_zero() -> None:
    """Every third of these rounds is given up, and does not count."""
    bodies = history(ROTATING, 8)
    position, at_end_of = ledger.origin(ROTATING, IDENTITY), []
    for body in bodies:
        before, position = position, ledger.apply(position, body)
        if len(position.closed) > len(before.closed):
            indices, change = ledger.committed_delta(before, ledger.parse(body))
            last = before.coefficients.copy()
            last[indices] += change
            at_end_of.append(last.tolist())
            assert not position.coefficients.any()
    assert position.committed == 6
    assert [pool.dense(64).tolist() for pool in position.closed] == at_end_of
    assert len(at_end_of) == 2
    assert position.coefficients.any(), "the last pool stays open"


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 3), st.sampled_from(["uniform", "weighted"]), st.integers(0, 12))
def test_replay_is_entry_after_entry(every: int, drawing: str, cut: int) -> None:
    """Also where directions depend on the history."""
    directions = {"rotate_every": every, "drawing": "uniform" if every else drawing}
    bodies = history(config_of(directions=directions, run={"rounds": 6}), 8)
    whole, position = ledger.replay(bodies), ledger.replay(bodies[: cut + 1])
    for body in bodies[cut + 1 :]:
        position = ledger.apply(position, body)
    assert (position.head, position.committed) == (whole.head, whole.committed)
    assert position.coefficients.tolist() == whole.coefficients.tolist()
    assert position.closed == whole.closed
    assert position.draws.of(99, 1).tolist() == whole.draws.of(99, 1).tolist()


def test_only_weighted_runs_carry_an_activity() -> None:
    weighted = ledger.replay(history(config_of(directions={"drawing": "weighted"}), 3))
    assert weighted.draws.activity is not None
    assert weighted.draws.activity.visits.sum() == 64 + 2 * 3
    assert ledger.replay(history(config_of(), 3)).draws.activity is None


def test_the_pools_of_a_run_follow_from_the_first() -> None:
    config = config_of(directions={"rotate_every": 1, "pool_index": 2**32 - 1})
    pools = [config.pool(IDENTITY, number) for number in range(3)]
    manifest = IDENTITY.manifest.digest()
    expected = [pool_key(IDENTITY.base_digest, manifest, n) for n in (2**32 - 1, 0, 1)]
    assert [pool.key for pool in pools] == expected
    assert [pool.index for pool in pools] == [0, 1, 2]
    assert config.pool(IDENTITY) == pools[0]


# ------------------------------------------------------------- the coordinator


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_optimizer_begins_anew_but_for_its_scales(kind: str) -> None:
    config = config_of(
        directions={"rotate_every": 2}, optimizer={"kind": kind, "momentum": 0.9}, run={"rounds": 4}
    )
    draws, state = config.draws(bytes(32)), optimizer.start(config)
    for round_index in range(1, 5):
        reports = {1: Report(codes_of(config, round_index))}
        before = state
        state, update = optimizer.advance(config, draws, state, round_index, reports)
        assert update.codes.any()
        arrays = [state.coefficients, state.first, state.second, state.visits, state.feedback]
        assert any(array.any() for array in arrays) == (round_index != 2)
        follows = codec.next_scale_exponent("int8", before.scale_exponent, reports[1].codes)
        assert (state.committed, state.scale_exponent) == (round_index, follows)
    assert state.spread > 0 or kind == "adam"


# ------------------------------------------------------------- adapters


def rotated(folder: Path) -> adapter.Adapter:
    """An adapter of two closed pools and an open one, saved."""
    position = ledger.replay(history(ROTATING, 7))
    big = np.zeros(64, np.int64)
    big[[0, 63]] = 2**40, -5
    closed = Closed([position.closed[0], Sparse.of(big)])
    made = adapter.of(dataclasses.replace(position, closed=closed))
    adapter.save(made, folder)
    return made


def test_an_adapter_holds_all_pools(tmp_path: Path) -> None:
    made, loaded = rotated(tmp_path), adapter.load(tmp_path)
    assert loaded.closed == made.closed
    assert loaded.coefficients.tolist() == made.coefficients.tolist()
    assert (loaded.committed, loaded.head) == (5, made.head)


def test_an_empty_pool_is_a_pool(tmp_path: Path) -> None:
    made = rotated(tmp_path)
    nothing = Sparse.of(np.zeros(64, np.int64))
    for pools in ([nothing, nothing], [made.closed[0], nothing], [nothing, made.closed[0]]):
        adapter.save(dataclasses.replace(made, closed=Closed(pools)), tmp_path)
        assert adapter.load(tmp_path).closed == Closed(pools)


def test_one_pool_is_written_without_closed_ones(tmp_path: Path) -> None:
    adapter.save(adapter.of(ledger.replay(history(config_of(), 4))), tmp_path)
    (name,) = load_file(tmp_path / adapter.WEIGHTS_FILE)
    assert name.startswith("coefficients")


DAMAGE: Final[dict[str, dict[str, Any]]] = {
    "no closed pools": {"counts": None},
    "one count too many": {"counts": lambda a: np.append(a, np.int32(0))},
    "a pool is missing": {"counts": lambda a: a[:1]},
    "counts that do not add up": {"counts": lambda a: a + 1},
    "a negative count": {"counts": lambda a: np.array([a.sum() + 1, -1], np.int32)},
    "counts that are no integers": {"counts": lambda a: a.astype(np.float32)},
    "indices are missing": {"indices": None},
    "values are missing": {"values": None},
    "an index outside": {"indices": lambda a: np.append(a[:-1], np.int32(64))},
    "a negative index": {"indices": lambda a: np.insert(a[1:], 0, np.int32(-1))},
    "an index twice": {"indices": lambda a: np.append(a[:-1], a[-2])},
    "too few indices": {"indices": lambda a: a[:-1]},
    "too few values": {"values": lambda a: a[:-1]},
    "values that are no integers": {"values": lambda a: a.astype(np.float64)},
}


@pytest.mark.parametrize("changes", DAMAGE.values(), ids=DAMAGE)
def test_pools_that_were_damaged_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Never other weights, never another exception."""
    rotated(tmp_path)
    tensors = load_file(tmp_path / adapter.WEIGHTS_FILE)
    for name, change in changes.items():
        array = tensors.pop(f"closed_{name}")
        if change is not None:
            tensors[f"closed_{name}"] = change(array)
    save_file(tensors, tmp_path / adapter.WEIGHTS_FILE)
    with pytest.raises(ModelError, match="holds no readable adapter"):
        adapter.load(tmp_path)


# ------------------------------------------------------------- reading a ledger from elsewhere


def test_an_update_that_does_not_fit_leaves_the_position() -> None:
    """At a rotation too."""
    bodies = history(ROTATING, 2)
    entry = ledger.parse(bodies[-1])
    entry.commit.codes = b"\1"
    before = ledger.replay(bodies[:-1])
    with pytest.raises(LedgerError, match="is damaged"):
        ledger.apply(before, entry.SerializeToString())
    assert len(before.closed) == 0
    assert len(ledger.apply(before, bodies[-1]).closed) == 1
