"""Batches that grow by the measured noise, up to the critical one and no further."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.runs import config_of

from lorand import codec
from lorand.config import RunConfig
from lorand_coordinator import optimizer, pace
from lorand_coordinator.aggregation import Report
from lorand_coordinator.snapshot import pack_state, unpack_state


def growing(**estimator: Any) -> RunConfig:
    settings = {"batch_size": 4, "max_batch_size": 256, "directions_per_round": 16, **estimator}
    return config_of(
        codec={"up": "int32"},
        estimator=settings,
        rounds={"quorum": 2},
        directions={"pool_size": 1024},
    )


def batch_after(rounds: int, slope: float, deviation: float, workers: int = 4) -> int:
    """The batch after rounds with scalars of this slope and this deviation of one example."""
    config, rng = growing(), np.random.default_rng(0)
    now = pace.start(config)
    for _ in range(rounds):
        noise = rng.normal(0, deviation / np.sqrt(now.batch_size), (workers, 16))
        values = slope * rng.choice([-1.0, 1.0], 16) + noise
        reports = [Report(codec.encode("int32", row, -20)) for row in values]
        now = pace.after(config, now, -20, reports, 1.0)
    return now.batch_size


@pytest.mark.parametrize(("deviation", "expected"), [(0.1, {4}), (12.0, {32, 64}), (1e3, {256})])
def test_a_batch_grows_to_the_critical_one(deviation: float, expected: set[int]) -> None:
    """Of slope 1 and deviation s an example, s² examples make the noise equal the signal."""
    assert batch_after(120, 1.0, deviation) in expected


def directions_after(rounds: int, fades: float, factor: float = 1.0) -> int:
    """The number of directions after rounds, in the later half of which slopes are faded."""
    config, rng = growing(max_batch_size=0, max_directions_per_round=512), np.random.default_rng(0)
    now = pace.start(config)
    for index in range(rounds):
        slope, rate = (1.0, 1.0) if index < rounds // 2 else (fades, factor)
        slopes = slope * rng.choice([-1.0, 1.0], now.directions)
        values = slopes + rng.normal(0, 1.0, (4, now.directions))
        reports = [Report(codec.encode("int32", row, -20)) for row in values]
        now = pace.after(config, now, -20, reports, rate)
    return now.directions


def test_directions_grow_as_the_signal_fades() -> None:
    """n keeps η²·(|G|² + v)/|G|⁴ / n: with v = 1/4, at half the slope 6.4 times as many."""
    assert directions_after(200, fades=1.0) == 16
    assert directions_after(200, fades=0.5) == 64
    assert directions_after(200, fades=0.0) == 512, "no more than the run allows"
    assert directions_after(200, fades=0.5, factor=0.5) == 16, "a rate that falls does as well"


def test_nothing_grows_before_enough_was_seen() -> None:
    assert batch_after(pace.FIRST_ROUNDS - 1, 0.0, 10.0) == 4
    assert batch_after(pace.FIRST_ROUNDS, 0.0, 10.0) == 8


def test_one_participant_tells_no_noise() -> None:
    config = growing()
    now = pace.start(config)
    assert pace.after(config, now, 0, [Report(np.ones(16, np.int64))], 1.0) == now


def test_a_checkpoint_keeps_the_pace() -> None:
    config = growing()
    state = replace(optimizer.start(config), pace=pace.Pace(32, 64, 12, 0.1, 7.0, 3.5))
    again = unpack_state(pack_state(state), state.coefficients, state.committed)
    assert again.pace == state.pace
