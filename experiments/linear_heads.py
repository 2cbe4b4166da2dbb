"""Logistic regressions that a fixed pool moves: scalars of every example, by losses, in numpy.

For experiments on privacy, which need each example's scalars apart and many runs. Weights are
w(A) = Z A / u, directions Z of ±1, as in a run; integers, codes and replicas are left out.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from scipy import linalg  # type: ignore[import-untyped]

from experiments import federation, packing, tasks
from lorand.codec import Floats
from lorand.config import ModelSection
from lorand.directions import Indices
from lorand_worker import model
from lorand_worker.data import Examples

MU = 1e-3
"""Perturbation scale of the scalars."""
REGULARISER = 0.1
LARGEST = 500.0
"""Margin beyond which a loss is as good as linear, or zero."""


@dataclass(frozen=True)
class Problem:
    """Features with the label's sign, rows y_i·x_i of shape (n, d), and a public regulariser.

    An example's loss is log(1 + exp(−y x·w)) + λ Σ w²/(1 + w²), which is not convex where λ > 0.
    `scored` are held-out rows.
    """

    rows: Floats
    scored: Floats
    regulariser: float = 0.0

    def directions(self, count: int, source: np.random.Generator) -> "Pool":
        """Return so many directions, a power of two: a sign-randomised Hadamard matrix's columns.

        Weights have its rows in turn, in random order; with no more weights than directions all
        steps are possible, and none is easier than another.
        """
        width = self.rows.shape[1]
        rows = source.permutation(width) % count
        signs = source.choice([-1.0, 1.0], width)
        return Pool(self, signs[:, None] * linalg.hadamard(count)[rows])

    def loss(self, weights: Floats, rows: Floats | None = None) -> float:
        """Return the mean loss in nats over all examples, or over other rows."""
        margins = (self.rows if rows is None else rows) @ weights
        penalty = self.regulariser * (weights**2 / (1 + weights**2)).sum()
        return float(np.logaddexp(0, -margins).mean() + penalty)

    def squared_gradient(self, weights: Floats) -> float:
        """Return ‖∇F‖² over all examples."""
        pulls = -1 / (1 + np.exp(np.clip(self.rows @ weights, -LARGEST, LARGEST)))
        penalty = self.regulariser * 2 * weights / (1 + weights**2) ** 2
        gradient = pulls @ self.rows / len(self.rows) + penalty
        return float(gradient @ gradient)

    def accuracy(self, weights: Floats) -> float:
        """Return the share of held-out examples on the right side."""
        return float((self.scored @ weights > 0).mean())


@dataclass(frozen=True)
class Pool:
    """Directions of a problem, columns of ±1, shape (d, K)."""

    problem: Problem
    signs: Floats

    @cached_property
    def _all_along(self) -> Floats:
        return self._along(self.problem.rows)

    def _along(self, rows: Floats) -> Floats:
        """Return exp(μ · y x·z) of each row and direction, shape (n, K)."""
        along: Floats = np.exp(MU * (rows @ self.signs))
        return along

    def scalars(self, weights: Floats, batch: Indices | None = None) -> Floats:
        """Return (L_i(w + μz_k) − L_i(w − μz_k)) / 2μ of each example, shape (batch, K).

        log(1 + e^−(m+a)) − log(1 + e^−(m−a)) is taken as one logarithm.
        """
        if batch is None:
            rows, along = self.problem.rows, self._all_along
        else:
            rows = self.problem.rows[batch]
            along = self._along(rows)
        odds = np.exp(-np.clip(rows @ weights, -LARGEST, LARGEST))[:, None]
        values: Floats = odds / along
        values += 1
        below = odds * along
        below += 1
        values /= below
        np.log(values, out=values)
        values /= 2 * MU
        if self.problem.regulariser:
            values += self._penalties(weights)
        return values

    def _penalties(self, weights: Floats) -> Floats:
        above, below = (weights[:, None] + side * MU * self.signs for side in (1, -1))
        change = above**2 / (1 + above**2) - below**2 / (1 + below**2)
        slopes: Floats = self.problem.regulariser * change.sum(axis=0) / (2 * MU)
        return slopes


def synthetic(seed: int, examples: int = 4000, width: int = 30) -> Problem:
    """Return labels of a planted weight vector, a tenth of them turned round; ‖planted‖ = 2."""
    source = np.random.default_rng(10_000 + seed)
    planted = source.normal(0, 1, width)
    planted *= 2 / np.linalg.norm(planted)

    def drawn(count: int) -> Floats:
        features = source.normal(0, 1, (count, width))
        signs = np.where(features @ planted > 0, 1.0, -1.0)
        signs[source.random(count) < 0.1] *= -1
        rows: Floats = features * signs[:, None]
        return rows

    return Problem(drawn(examples), drawn(examples), REGULARISER)


@cache
def subj(held_out: bool) -> Problem:
    """Return a head on MiniLM's features of Subj: 384 of length 10 and a bias, zero at first.

    `held_out` scores a tenth of the training data, in place of the test data.
    """
    task = tasks.load("subj", workers=1, seed=0, held_out=held_out)
    return Problem(_features(task.shards[0]), _features(task.scored))


def _features(examples: Examples) -> Floats:
    section = ModelSection(name="all-MiniLM-L6-v2", trainable="last:0")
    loaded = model.load(section, 2, federation.minilm())
    states = packing.texts(loaded, examples, section).hidden
    means = np.array([state.double().mean(dim=0).numpy() for state in states])
    units = means / np.linalg.norm(means, axis=1, keepdims=True) * section.feature_scale
    signs = 2.0 * np.array(examples.labels) - 1.0
    rows: Floats = np.column_stack([units, np.ones(len(units))]) * signs[:, None]
    return rows
