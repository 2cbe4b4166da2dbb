"""Gradients for the optimizers of subspaces, and the steps that they lead to."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from lorand.codec import Floats
from lorand.subspaces.state_optimizers import Settings, State, advance, start

Parts = Sequence[tuple[Floats, Floats | None]]
"""Gradients, inside and outside."""
Result = tuple[State, Floats, Floats | None]
ROWS: Final = 24
COLUMNS: Final = 16
RANK: Final = 5
CHOSEN: Final = np.array([1, 4, 6, 7, 13])
REST: Final = np.setdiff1d(np.arange(COLUMNS), CHOSEN)


def gradients(steps: int, seed: int = 0) -> list[Floats]:
    """Matrices of sizes that jump, so that Fira's limiter has something to do."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(0, 1, steps))
    return [rng.normal(0, size, (ROWS, COLUMNS)) for size in sizes]


def run(options: Settings, parts: Parts) -> list[Result]:
    """All (state after, step inside, step outside)."""
    state, result = start(*parts[0][0].shape), []
    for inside, outside in parts:
        state, step_inside, step_outside = advance(options, state, inside, outside)
        result.append((state, step_inside, step_outside))
    return result
