"""The experiments' linear heads measure what losses say, and their noise is the mechanism's."""

import numpy as np
import pytest
from experiments import diff2, linear_heads
from experiments.linear_heads import MU, Problem

from lorand.privacy.mechanism import GRID, Mechanism


def problem(regulariser: float = 0.1) -> Problem:
    source = np.random.default_rng(4)
    return Problem(source.normal(0, 1, (7, 6)), source.normal(0, 1, (5, 6)), regulariser)


@pytest.mark.parametrize("batch", [None, np.array([5, 2])])
def test_scalars_are_differences_of_losses(batch: np.ndarray | None) -> None:
    made, weights = problem(), np.linspace(-2, 2, 6)
    pool = made.directions(8, np.random.default_rng(1))
    found = pool.scalars(weights, batch)
    for row, example in enumerate(range(7) if batch is None else batch):
        for k in range(8):
            sides = [
                made.loss(weights + side * MU * pool.signs[:, k], made.rows[[example]])
                for side in (1, -1)
            ]
            assert found[row, k] == pytest.approx((sides[0] - sides[1]) / (2 * MU), abs=1e-9)


def test_directions_span_evenly() -> None:
    made = problem()
    signs = made.directions(8, np.random.default_rng(1)).signs
    assert (signs @ signs.T).tolist() == (8 * np.eye(6)).tolist()
    fewer = made.directions(4, np.random.default_rng(1)).signs
    assert np.linalg.matrix_rank(fewer) == 4


def test_the_squared_gradient_is_that_of_the_loss() -> None:
    made, weights = problem(), np.linspace(-1, 1.5, 6)
    steps = 1e-6 * np.eye(6)
    slopes = [(made.loss(weights + step) - made.loss(weights - step)) / 2e-6 for step in steps]
    assert made.squared_gradient(weights) == pytest.approx(np.dot(slopes, slopes), rel=1e-6)


def test_large_weights_are_no_error() -> None:
    made = problem(0.0)
    pool = made.directions(8, np.random.default_rng(1))
    assert np.isfinite(pool.scalars(np.full(6, 1e6))).all()
    assert np.isfinite(made.squared_gradient(np.full(6, 1e6)))


def test_noise_in_floats_is_the_mechanisms() -> None:
    vectors = np.random.default_rng(2).normal(0, 2, (50, 4))
    found = diff2.noisy_mean(vectors, 3.0, 1e-12, 10, np.random.default_rng(1))
    exact = Mechanism("gaussian", 3.0, 1.0, 10).clipped(vectors).sum(axis=0) / GRID * 3.0 / 10
    assert found == pytest.approx(exact, abs=1e-7)
    noise = diff2.noisy_mean(np.zeros((3, 4000)), 3.0, 2.0, 10, np.random.default_rng(1))
    assert noise.std() == pytest.approx(3.0 * 2.0 / 10, rel=0.05)


def test_a_run_ends_better_than_it_began() -> None:
    cell = diff2.Cell("synthetic", 2.0, 1.0)
    setting = diff2.Setting(0.1, 1.3, 0.2, 50)
    start = linear_heads.synthetic(3).squared_gradient(np.zeros(30))
    for row in (diff2.Row("DP-ZO", rounds=30), diff2.Row("DIFF2", 0.5, rounds=30)):
        found = diff2.run(cell, row, setting, 3)
        assert found["squared_gradient"] < start / 2
        assert found == diff2.run(cell, row, setting, 3), "a seed fixes it"
