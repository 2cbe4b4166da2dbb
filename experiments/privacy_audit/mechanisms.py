"""A5: whether the noise holds. Releases with and without a record, and what they prove of epsilon.

White box: the attacker knows everything but the noise and, of a whole round, who was sampled. The
record is the worst there is, a vector many times as long as the clip bound. Noise comes from a
seeded source of integers in place of the operating system's, so that every figure repeats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Final

import numpy as np

from experiments.privacy_audit import bounds, subjects
from experiments.privacy_audit.bounds import Errors
from experiments.privacy_audit.subjects import Subject
from lorand.codec import Floats
from lorand.directions import Indices, draw
from lorand.privacy import accountant
from lorand.privacy.accountant import Release
from lorand.privacy.mechanism import GRID, Integers, Mechanism
from lorand.privacy.sampler import Below
from lorand_worker.data import PoissonSampler
from lorand_worker.estimators import Order
from lorand_worker.noised import Noised, alone

DELTA: Final = 1e-5
LENGTH: Final = 8.0
"""Of the record's vector, in clip bounds."""


class HalfNoise(Mechanism):
    """A planted bug: noise of half its scale."""

    @property
    def noise_steps(self) -> int:
        """Half of what it should be."""
        return ceil(self.multiplier * GRID / 2)


class NoClip(Mechanism):
    """A planted bug: vectors are put on the grid and never shortened."""

    def clipped(self, vectors: Floats) -> Integers:
        """Return the vectors as they are."""
        return np.rint(vectors * (GRID / self.clip_bound)).astype(np.int64)


def releases(
    mechanism: Mechanism, vectors: Floats, count: int, below: Below, towards: Floats
) -> Floats:
    """Return so many releases' scores: how far each lies towards a unit vector, shape (count,)."""
    return np.array([mechanism.release(vectors, below) @ towards for _ in range(count)])


def audit(mechanism: Mechanism, count: int, seed: int, scalars: int = 1) -> Errors:
    """Return the errors of telling `count` releases with the worst record from as many without."""
    below = subjects.below(seed)
    towards = np.random.default_rng(seed).standard_normal(scalars)
    towards /= np.linalg.norm(towards)
    record = LENGTH * mechanism.clip_bound * towards[None]
    without = releases(mechanism, np.empty((0, scalars)), count, below, towards)
    return bounds.errors(without, releases(mechanism, record, count, below, towards))


def run(seeds: int) -> dict[str, Any]:
    """Return the rows of A5."""
    return {
        "mechanism": mechanism_rows(20_000),
        "long": mechanism_rows(200_000, only_sound=True),
        "round": round_rows(4_000),
    }


def mechanism_rows(count: int, *, only_sound: bool = False) -> list[dict[str, Any]]:
    """Return theory and bound by noise multiplier: as it is, and with a bug planted."""
    rows = []
    for multiplier in (1.0, 2.0, 4.0):
        theory = accountant.epsilon(Release("gaussian", multiplier, 1.0), 1, DELTA)
        for kind in (Mechanism,) if only_sound else (Mechanism, HalfNoise, NoClip):
            for scalars in (1,) if only_sound else (1, 16):
                releases_of = count if scalars == 1 else count // 4
                made = kind("gaussian", 0.5, multiplier, 16)
                found = audit(made, releases_of, seed=round(multiplier), scalars=scalars)
                row = _row(found, theory, 1.0)
                named = {"kind": kind.__name__, "multiplier": multiplier, "scalars": scalars}
                rows.append({**named, **row})
    return rows


def _row(found: Errors, theory: float, rate: float) -> dict[str, Any]:
    bound = bounds.least_epsilon(found, DELTA, rate)
    return {
        "releases": 4 * found.trials,
        "epsilon": round(theory, 4),
        "bound": round(bound, 4) if np.isfinite(bound) else "no bound",
        "share": round(bound / theory, 3) if np.isfinite(bound) else "no bound",
        "flagged": bool(bound > theory),
    }


# -- a whole round -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeededNoise(Mechanism):
    """The mechanism with a repeatable source of integers; for audits alone."""

    source: Below = field(default_factory=lambda: subjects.below(0))

    def release(self, vectors: Floats, below: Below | None = None) -> Floats:
        """Release with the audit's source."""
        return super().release(vectors, self.source)


@dataclass(frozen=True)
class Round:
    """A private worker's round on a model's head, with a record that may be among its data.

    `others` are the examples that are there anyway.
    """

    subject: Subject
    indices: Indices
    record: int
    others: Sequence[int]
    rate: float

    def scores(self, multiplier: float, count: int, seed: int, *, present: bool) -> Floats:
        """Return the scores of so many rounds: towards the record's vector, less the others' sum.

        Everything is `Noised.measure`: the Poisson sample, each example's own pass, clip and noise.
        """
        data = [*self.others, *([self.record] if present else [])]
        mechanism = SeededNoise("gaussian", self.clip(), multiplier, 8, source=subjects.below(seed))
        bytes_of = np.random.default_rng([seed, present]).bytes
        sampler = PoissonSampler(len(data), self.rate, source=bytes_of)
        noised = Noised(self.subject.estimator, mechanism, sampler)

        def losses(batch: Sequence[int]) -> Any:
            return self.subject.task.losses([data[i] for i in batch])

        towards = self.vectors([self.record])[0]
        towards = towards / np.linalg.norm(towards)
        found = [noised.measure(losses, Order(self.indices)).values @ towards for _ in range(count)]
        return np.array(found)

    def clip(self) -> float:
        """Return a bound that shortens every record: half of the shortest vector."""
        lengths = np.linalg.norm(self.vectors([self.record, *self.others]), axis=1)
        return float(lengths.min()) / 2

    def vectors(self, batch: Sequence[int]) -> Floats:
        """Return these examples' scalars."""
        return self.subject.estimator.each(alone(self.subject.task.losses), batch, self.indices)


def round_rows(count: int) -> list[dict[str, Any]]:
    """Return theory and bound of a whole round, sampled with a rate of one half.

    The record alone against no data, the worst case of the proof, and among eight others whose
    coming and going hides it.
    """
    config = subjects.config_of("name:head", 64, "backprop")
    subject = subjects.minilm(config, subjects.sentences(32, 1), seed=0)
    indices = draw(b"audit", 0, b"shared", 64, 4)
    rows = []
    for others in ((), range(8)):
        for multiplier in (0.5, 1.0):
            made = Round(subject, indices, 20, list(others), 0.5)
            found = bounds.errors(
                made.scores(multiplier, count, 1, present=False),
                made.scores(multiplier, count, 2, present=True),
            )
            theory = accountant.epsilon(Release("gaussian", multiplier, 0.5), 1, DELTA)
            named = {"others": len(others), "multiplier": multiplier, "rate": 0.5}
            rows.append({**named, **_row(found, theory, 0.5)})
    return rows
