"""Private runs in one process: `lorand_worker.noised` for all workers of a run, on one replica.

The parts are the library's: Poisson samples, per-example vectors, the mechanism with its discrete
noise, codes, the coordinator's optimizer. What differs from workers is what experiments need:

* Samples and noise come from a seed, so that figures can be repeated. Such a run protects nobody.
* Examples pass together where that is faster. An example's loss then differs in last bits, which
  accuracy does not notice; the proof of privacy does, so that workers pass them one at a time.
* Vectors are clipped on the grid in floats, which is exact to some steps of the 2^30 in a bound.
* Noise is at each worker (`each`: mode "worker"), in the sum of all (`once`: mode "central", or
  "secure-sum" where all members are counted on), or nowhere, and then nothing is clipped (`none`).
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

from experiments import federation
from experiments.federation import Point
from lorand import ledger
from lorand.codec import Floats
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.manifest import run_digest
from lorand.privacy import plan
from lorand.privacy.accountant import Release, calibrated
from lorand.privacy.mechanism import GRID, Integers, Mechanism
from lorand.privacy.sampler import Below
from lorand.replica import CopyReplica
from lorand_coordinator import optimizer
from lorand_coordinator.aggregation import Report
from lorand_worker import model
from lorand_worker.data import Examples, PoissonSampler
from lorand_worker.model import LoadedModel
from lorand_worker.participant import encode
from lorand_worker.tasks import Score

Noise = Literal["none", "each", "once"]
Releases = Callable[[Sequence[Floats]], list[Floats]]
"""The workers' vectors (batch, n) → what the coordinator sees, (n,) of each worker or of all."""


@dataclass(frozen=True)
class Bench:
    """What measures: a worker's vectors (batch, n) on a batch along directions, and the score."""

    vectors: Callable[[int, Sequence[int], Indices], Floats]
    score: Callable[[], Score]


MakeBench = Callable[
    [RunConfig, LoadedModel, CopyReplica, Sequence[Examples], Examples],
    Bench,
]


def run(
    config: RunConfig,
    shards: Sequence[Examples],
    scored: Examples,
    *,
    noise: Noise,
    seed: int,
    evaluate_at: Sequence[int],
    bench: MakeBench,
) -> list[Point]:
    """Run all rounds and return the scores at `evaluate_at`; `seed` fixes samples, noise and draws.

    `estimator.batch_size` is what each worker divides by: `privacy.sample_rate` of its examples,
    of which all have about the same number. Raises ConfigError where no noise is enough.
    """
    loaded = model.load(config.model, len(config.task.labels), federation.minilm())
    identity = model.identity(loaded, config, prepares=True)
    pool = ledger.pool_of(config, identity, 0)
    replica = CopyReplica.of(loaded.module, identity.manifest, pool)
    measured = bench(config, loaded, replica, shards, scored)
    draws = config.draws(run_digest(config.digest() + bytes([seed]), identity))
    samplers = [
        PoissonSampler(
            len(shard),
            config.privacy.sample_rate,
            source=random.Random(f"{seed}/{worker}").randbytes,
        )
        for worker, shard in enumerate(shards)
    ]
    below = random.Random(f"{seed}/noise").randrange
    release = releases(config, noise, len(shards), below)
    state, points, started = optimizer.start(config), [], time.monotonic()
    for round_index in range(config.run.rounds + 1):
        if round_index in evaluate_at:
            points.append(_point(config, round_index, measured.score(), started))
        if round_index == config.run.rounds:
            break
        indices = draws.of(round_index, 0)
        parts = [
            measured.vectors(worker, batch, indices)
            if (batch := sampler.batch())
            else np.empty((0, len(indices)))
            for worker, sampler in enumerate(samplers)
        ]
        reports = {
            worker: Report(encode(config, values, state.scale_exponent, np.zeros(0)).codes)
            for worker, values in enumerate(release(parts))
        }
        state, _ = optimizer.advance(config, draws, state, round_index, reports)
        replica.set(state.coefficients)
    return points


class Quick(Mechanism):
    """The mechanism with vectors clipped in floats: some steps of the grid beside the exact ones.

    Exact clipping is in integers of any length, one number after the other.
    """

    def clipped(self, vectors: Floats) -> Integers:
        """See Mechanism; for finite vectors and Gaussian noise."""
        assert self.noise == "gaussian"
        steps = vectors * (GRID / self.clip_bound)
        norms = np.linalg.norm(steps, axis=1, keepdims=True)
        short: Integers = np.rint(steps * (GRID / np.maximum(norms, GRID))).astype(np.int64)
        return short


def releases(config: RunConfig, noise: Noise, workers: int, below: Below) -> Releases:
    """Return how vectors are released; noise comes from `below`, which tests and seeds fix.

    With `once` the workers' clipped vectors are summed as the mechanism sums those of one worker:
    one example more or less changes that sum by the same clip bound, so that noise of the same
    multiplier, added once, protects it alike.
    """
    divisor = config.estimator.batch_size
    if noise == "none":
        return lambda parts: [part.sum(axis=0) / divisor for part in parts]
    planned = plan.mechanism(config, multiplier(config))
    mechanism = Quick(planned.noise, planned.clip_bound, planned.multiplier, planned.divisor)
    if noise == "each":
        return lambda parts: [mechanism.release(part, below) for part in parts]
    central = replace(mechanism, divisor=workers * divisor)
    return lambda parts: [central.release(np.concatenate(parts), below)]


def multiplier(config: RunConfig) -> float:
    """Return the noise multiplier of a run, as each of its workers calculates it."""
    section = config.privacy
    return calibrate(
        section.sample_rate, config.releases, section.target_epsilon, section.delta
    ).multiplier


@cache
def calibrate(rate: float, rounds: int, epsilon: float, delta: float) -> Release:
    """Return the Gaussian release that so many rounds may make; kept, as it takes seconds."""
    return calibrated(Release("gaussian", 1.0, rate), rounds, epsilon, delta)


def _point(config: RunConfig, committed: int, score: Score, started: float) -> Point:
    sent = federation.payload(config, config.rounds.quorum)
    return Point(
        committed,
        score,
        committed * federation.forwards_a_round(config),
        committed * sent["bytes_up_a_worker_round"],
        committed * sent["bytes_down_a_worker_round"],
        round(time.monotonic() - started, 2),
    )
