"""Rounds of a server optimizer on scalars that are the same every time."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Final

import numpy as np
from tests.runs import config_of

from lorand import codec
from lorand.codec import Codec, Floats
from lorand.config import RunConfig
from lorand_coordinator import optimizer
from lorand_coordinator.aggregation import Report
from lorand_coordinator.optimizer import State, Update

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


def same_state(a: State, b: State) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(State))
