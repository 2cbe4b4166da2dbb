"""A4: an attacker who holds a sentence asks whether it was in a batch, or in the data.

Known are the model, the directions and sentences of the same kind: the mean and the spread of
their scalars. The score is the likelihood ratio's linear part, (v − v̄)ᵀ S⁻¹ (r − v̄) with S what the
other examples of a batch and the noise add to a released vector r (linear discriminant). Scalars
are those of MiniLM's last layer, by backward passes: what forward passes measure, but for μ²
(`agreement`). The mean of a batch's vectors is what a worker reports without noise; with noise it
is what `Mechanism.release` makes of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from scipy.stats import rankdata  # type: ignore[import-untyped]

from experiments.privacy_audit import subjects, view
from experiments.privacy_audit.recovery import DELTA, multipliers
from experiments.privacy_audit.subjects import Subject
from lorand.codec import Codec, Floats
from lorand.directions import draw
from lorand.privacy.accountant import Release, calibrated
from lorand.privacy.mechanism import Mechanism
from lorand_worker.data import PoissonSampler
from lorand_worker.estimators import Spsa

SENTENCES: Final = 1000
"""Half of them are what the attacker knows of their kind."""
BATCHES: Final = (4, 16, 64)
COUNTS: Final = (1, 8, 64, 512, 4096)
TRIALS: Final = 60
RUN_ROUNDS, RUN_RATE, RUN_EXAMPLES, RUN_SCALARS = 100, 0.1, 160, 64

SHRINKS: Final = (0.01, 0.03, 0.1, 0.3)

Report = Callable[[Floats], Floats]
"""From the vectors of a batch, shape (batch, m), to what leaves the worker, shape (m,)."""


def run(seeds: int) -> dict[str, Any]:
    """Return the rows of A4."""
    config = subjects.config_of("last:1", COUNTS[-1], "backprop")
    subject = subjects.minilm(config, subjects.sentences(SENTENCES, 1), seed=0)
    vectors = subject.estimator.each(
        subject.task.losses, range(SENTENCES), np.arange(subject.view.size)
    )
    return {
        "batch": [*plain(vectors, seeds), *noised(vectors, seeds)],
        "run": whole_runs(vectors, seeds),
        "agreement": agreement(subject, vectors),
    }


@dataclass(frozen=True)
class Known:
    """What the attacker knows of the kind: mean, and axes and variances of the spread around it.

    Variances are drawn towards their mean, by `shrink`: known examples may be fewer than scalars.
    Directions that they do not span have the floor alone.
    """

    mean: Floats
    axes: Floats
    variances: Floats
    floor: float

    @staticmethod
    def of(vectors: Floats, shrink: float) -> "Known":
        """Take them from examples' vectors, shape (n, m)."""
        centred = vectors - vectors.mean(axis=0)
        _, lengths, axes = np.linalg.svd(centred, full_matrices=False)
        variances = lengths**2 / max(1, len(vectors) - 1)
        floor = shrink * float(variances.sum()) / vectors.shape[1]
        return Known(vectors.mean(axis=0), axes, (1 - shrink) * variances + floor, floor)

    def scores(self, candidates: Floats, released: Floats, batch: float, noise: float) -> Floats:
        """Return each candidate's score by one release, shape (candidates,).

        `noise` is the variance that was added to a released mean of `batch` examples.
        """
        away = candidates - self.mean
        rest = released - self.mean
        outside = self.floor / batch + noise
        inside = self.variances / batch + noise
        weights = 1 / inside - 1 / outside
        found: Floats = away @ rest / outside + (away @ self.axes.T * weights) @ (self.axes @ rest)
        return found


def auc(inside: Floats, outside: Floats) -> float:
    """Return the chance that a member scores above another, ties half: area under the curve."""
    ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)].sum()
    count = len(inside)
    return float((ranks - count * (count + 1) / 2) / (count * len(outside)))


def trial_auc(
    vectors: Floats, batch: int, report: Report, noise: float, trials: int, seed: int
) -> float:
    """Return the AUC of telling the batch's members from as many other sentences.

    Of the second half of the vectors; the first is what the attacker knows, and tries itself on to
    find out how much to shrink.
    """
    half = len(vectors) // 2
    tries = {a: _trial(vectors[:half], batch, report, noise, 8, seed, a) for a in SHRINKS}
    return _trial(vectors, batch, report, noise, trials, seed, max(SHRINKS, key=lambda a: tries[a]))


def _trial(
    vectors: Floats, batch: int, report: Report, noise: float, trials: int, seed: int, shrink: float
) -> float:
    half = len(vectors) // 2
    known, pool = Known.of(vectors[:half], shrink), vectors[half:]
    source = np.random.default_rng([seed, batch])
    inside, outside = [], []
    for _ in range(trials):
        order = source.permutation(half)
        released = report(pool[order[:batch]])
        scores = known.scores(pool[order[: 2 * batch]], released, batch, noise)
        inside.append(scores[:batch])
        outside.append(scores[batch:])
    return auc(np.concatenate(inside), np.concatenate(outside))


def mean_of(codec: Codec | None, mean_size: float, vectors: Floats) -> Floats:
    """Return what codes tell of a batch's mean; signs at the mean size of such a mean's parts."""
    told = view.coded(codec, vectors.mean(axis=0))
    return told * mean_size if codec == "sign" else told


def plain(vectors: Floats, seeds: int) -> list[dict[str, Any]]:
    """Return AUCs by batch size, number of scalars and codec, without noise."""
    rows = []
    for batch in BATCHES:
        for count in COUNTS:
            codecs: tuple[Codec | None, ...] = ("int8", "sign") if count > 1 else (None,)
            for codec in codecs:
                found = []
                for seed in range(seeds):
                    some = vectors[:, _columns(count, seed)]
                    typical = float(np.abs(_typical(some, batch, seed)).mean())
                    report = partial(mean_of, codec, typical)
                    found.append(trial_auc(some, batch, report, 0.0, TRIALS, seed))
                named = {"batch_size": batch, "scalars": count, "codec": codec or "float"}
                rows.append({**named, "noise": "none", "auc": view.mean_and_error(found)})
    return rows


def noised(vectors: Floats, seeds: int) -> list[dict[str, Any]]:
    """Return AUCs under the noise of private runs, all of whose batches would be such.

    `limit` is the most that any attacker has by one release: two normal curves 1/σ apart.
    """
    rows = []
    for epsilon, multiplier in multipliers().items():
        for batch, count in [(4, 64), (16, 64), (64, 64), (16, 4096)]:
            found = []
            for seed in range(seeds):
                some = vectors[:, _columns(count, seed)]
                bound = float(np.median(np.linalg.norm(some, axis=1)))
                made = Mechanism("gaussian", bound, multiplier, batch)
                report = partial(made.release, below=subjects.below(seed))
                variance = (bound * multiplier / batch) ** 2
                trials = TRIALS if count <= 64 else TRIALS // 4
                found.append(trial_auc(some, batch, report, variance, trials, seed))
            named = {"batch_size": batch, "scalars": count, "codec": "float"}
            limit = round(NormalDist().cdf(1 / multiplier / 2**0.5), 3)
            noise = {"noise": f"epsilon {epsilon}", "multiplier": round(multiplier, 4)}
            rows.append({**named, **noise, "auc": view.mean_and_error(found), "limit": limit})
    return rows


def whole_runs(vectors: Floats, seeds: int) -> list[dict[str, Any]]:
    """Return AUCs of telling a worker's data from other sentences by a whole run's releases.

    100 rounds of 64 directions, Poisson batches of 16 out of 160 sentences; the weights stand
    still, as late in a run. Scores of rounds are added.
    """
    like = Release("gaussian", 1.0, RUN_RATE)
    noises = {"none": 0.0}
    for target in (8.0, 2.0):
        noises[f"epsilon {target:g}"] = calibrated(like, RUN_ROUNDS, target, DELTA).multiplier
    rows = []
    for name, multiplier in noises.items():
        found = [_whole_run(vectors, multiplier, seed) for seed in range(seeds)]
        shape = {"rounds": RUN_ROUNDS, "scalars": RUN_SCALARS, "sample_rate": RUN_RATE}
        noise = {"noise": name, "multiplier": round(multiplier, 4)}
        rows.append({**shape, **noise, "auc": view.mean_and_error(found)})
    return rows


def _whole_run(vectors: Floats, multiplier: float, seed: int, shrink: float = 0.1) -> float:
    source, below = np.random.default_rng([seed, 9]), subjects.below(seed)
    half, size = len(vectors) // 2, RUN_RATE * RUN_EXAMPLES
    chosen = half + source.permutation(half)[: 2 * RUN_EXAMPLES]
    sampler = PoissonSampler(RUN_EXAMPLES, RUN_RATE, source=source.bytes)
    total = np.zeros(len(chosen))
    for round_index in range(RUN_ROUNDS):
        some = vectors[:, _columns(RUN_SCALARS, RUN_ROUNDS * seed + round_index)]
        members = some[chosen[:RUN_EXAMPLES]][sampler.batch()]
        known = Known.of(some[:half], shrink)
        if multiplier:
            bound = float(np.median(np.linalg.norm(some[:half], axis=1)))
            released = Mechanism("gaussian", bound, multiplier, round(size)).release(members, below)
            noise = (bound * multiplier / size) ** 2
        else:
            released, noise = members.sum(axis=0) / size, 0.0
        total += known.scores(some[chosen], released, size, noise)
    return auc(total[:RUN_EXAMPLES], total[RUN_EXAMPLES:])


def agreement(subject: Subject, vectors: Floats) -> dict[str, float]:
    """Return how far a batch's mean vector is from what a worker measures, relatively.

    By a backward pass over the whole batch, and by SPSA along eight directions.
    """
    batch, indices = list(range(16)), np.arange(subject.view.size)
    mean = vectors[batch].mean(axis=0)
    backward = subject.estimator.measure(subject.task.loss, batch, indices).values
    eight = _columns(8, 0)
    spsa = Spsa(subject.replica, subjects.config_of("last:1", COUNTS[-1], "spsa"))
    forward = spsa.measure(subject.task.loss, batch, eight).values
    return {
        "backward": float(f"{view.relative_error(backward, mean):.2g}"),
        "spsa": float(f"{view.relative_error(forward, mean[eight]):.2g}"),
    }


def _columns(count: int, seed: int) -> Any:
    return draw(b"audit", seed, b"shared", COUNTS[-1], count)


def _typical(vectors: Floats, batch: int, seed: int) -> Floats:
    """Means of batches of what the attacker knows."""
    known, source = vectors[: len(vectors) // 2], np.random.default_rng(seed)
    drawn: Sequence[Floats] = [
        known[source.choice(len(known), batch, replace=False)].mean(axis=0) for _ in range(20)
    ]
    return np.array(drawn)
