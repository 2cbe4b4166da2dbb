"""Workers that train a linear head on frozen features, each with a replica of its own.

Two problems for ten of them, their runs, and their scalars measured in several ways.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from experiments import banking77, federation, tasks, uci_sentiment
from experiments.head_inputs import ALONE, Labelled, inputs, scored_by
from lorand import ledger
from lorand.codec import Floats
from lorand.config import EstimatorKind, RunConfig
from lorand.directions import Indices
from lorand.ledger import Position
from lorand.manifest import Identity
from lorand.privacy.mechanism import Integers
from lorand_worker import bench, local_steps, model
from lorand_worker.data import Examples, Sampler
from lorand_worker.estimators import Measurement, Order
from lorand_worker.model import LoadedModel
from lorand_worker.precision import Precision, passes
from lorand_worker.tasks import Score

WORKERS: Final = 10
ROUNDS: Final = 60
MU: Final = 0.01
CPU: Final = torch.device("cpu")
SETTINGS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "banking77": {
        "task": {"label_column": "category"},
        "estimator": {"kind": "backprop", "batch_size": 16},
        "optimizer": {"kind": "adam"},
    },
    "uci": {
        "task": {"labels": tasks.LABELS["uci"]},
        "estimator": {
            "kind": "spsa",
            "batch_size": 16,
            "directions_per_round": 16,
            "perturbation_scale": MU,
            "mixed": True,
        },
    },
}


@dataclass(frozen=True)
class Lab:
    """A problem: the base's identity, examples by worker and seed, and those that are scored."""

    loaded: LoadedModel
    identity: Identity
    config: RunConfig
    shards: Callable[[int], Sequence[Examples]]
    scored: Examples

    def features(self, examples: Examples, precision: Precision) -> Labelled:
        """Return what the head sees of examples."""
        return inputs(self.loaded, examples, self.config.model, precision)


@cache
def lab(problem: str, held_out: bool) -> Lab:
    """Load a problem; `held_out` scores a tenth of the training data in place of test data."""
    if problem == "banking77":
        train, labels = banking77.read("train.csv")
        test, _ = banking77.read("test.csv", labels)
        if held_out:
            train, test = federation.shuffled_split(train)

        def deal(seed: int) -> Sequence[Examples]:
            return banking77.dirichlet(train, WORKERS, banking77.CONCENTRATION, seed)

    else:
        parts, test = uci_sentiment.shards_and_test(held_out)
        pooled, labels = federation.pool(parts), tasks.LABELS["uci"]
        cuts = np.array_split(np.arange(len(pooled)), WORKERS)
        dealt = [federation.subset(pooled, cut.tolist()) for cut in cuts]

        def deal(seed: int) -> Sequence[Examples]:
            return dealt

    config = settings(problem, labels, 1.0, waits=False, seed=0)
    loaded = model.load(config.model, len(labels), federation.minilm(), kind="classification")
    identity = model.identity(loaded, config, None, prepares=True)
    return Lab(loaded, identity, config, deal, test)


def settings(
    problem: str, labels: Sequence[str], rate: float, *, waits: bool, seed: int
) -> RunConfig:
    """Return the run of a row; the seed moves the pool."""
    of = SETTINGS[problem]
    return RunConfig.model_validate(
        {
            "run": {"name": f"heterogeneity-{problem}", "rounds": ROUNDS},
            "model": {"name": "all-MiniLM-L6-v2", "trainable": ALONE, "max_length": 64},
            "task": {**of["task"], "labels": tuple(labels)},
            "directions": {"pool_size": 4096, "pool_index": seed},
            "estimator": of["estimator"],
            "optimizer": {**of.get("optimizer", {}), "learning_rate": rate},
            "rounds": {
                "quorum": WORKERS if waits else 4,
                "start_with": WORKERS,
                "deadline_k": 0.0 if waits else 3.0,
            },
        }
    )


class Head(nn.Module):
    """The linear head alone, zero at first."""

    def __init__(self, width: int, labels: int) -> None:
        """Have so many inputs and outputs."""
        super().__init__()
        self.head = nn.Linear(width, labels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.head(x)
        return logits


class Seat:
    """A worker's bench: a head and a replica of its own, on the features of its examples."""

    def __init__(
        self,
        config: RunConfig,
        identity: Identity,
        part: Labelled,
        source: random.Random | None = None,
        precision: Precision = Precision.FLOAT32,
        kind: EstimatorKind | None = None,
    ) -> None:
        """Stand at the base weights."""
        self._x, self._labels = part
        self.head = Head(self._x.shape[1], len(config.task.labels))
        pool = ledger.pool_of(config, identity, 0)
        self.replica = bench.replica_of(config, self.head, identity.manifest, pool)
        self._work = local_steps.build(config, self.replica, self.head, kind)
        self._sampler = Sampler(self.examples, config.estimator.batch_size, source)
        self._precision = precision

    @property
    def examples(self) -> int:
        """See participant.Bench."""
        return len(self._labels)

    def adopt(self, position: Position) -> None:
        """See participant.Bench."""
        bench.bring(self.replica, position)

    def measure(self, order: Order) -> Measurement:
        """See participant.Bench."""
        batches = partial(self._sampler.batch, order.batch_size)
        return self._work.do(self._loss, batches, order, self.examples)

    def release(self, indices: Indices) -> Integers:
        """No run here is private."""
        raise NotImplementedError

    def score(self) -> Score:
        """Return accuracy and loss on all examples."""
        self.replica.settle()
        return scored_by(self.head, (self._x, self._labels))

    def _loss(self, batch: Sequence[int]) -> torch.Tensor:
        with passes(self._precision, CPU):
            logits = self.head(self._x[list(batch)])
        return functional.cross_entropy(logits.float(), self._labels[list(batch)])


@dataclass(frozen=True)
class Way:
    """A way to measure; `batch` is a batch's number, and a perturbation scale of 0 the run's."""

    kind: EstimatorKind
    precision: Precision = Precision.FLOAT32
    batch: int = 0
    perturbation_scale: float = 0.0


EXACT: Final = Way("backprop")
WAYS: Final = {
    "two losses": Way("spsa"),
    "two losses, bfloat16": Way("spsa", Precision.BFLOAT16),
    "two losses, μ = 0.001": Way("spsa", perturbation_scale=0.001),
    "two losses, μ = 0.001, bfloat16": Way("spsa", Precision.BFLOAT16, 0, 0.001),
    "backward pass, bfloat16": Way("backprop", Precision.BFLOAT16),
    "backward pass, another batch": Way("backprop", batch=1),
}


def scalars(
    here: Lab, config: RunConfig, seed: int, end: Position
) -> dict[str, list[tuple[float, float]]]:
    """Return how scalars of other ways compare with those of a backward pass in float32.

    At the start and at the end of a run: the root mean square, over all workers and some
    directions, of their difference and of themselves, as a share of what is compared with.
    """
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for position in (ledger.origin(config, here.identity), end):
        exact = _scalars(here, config, position, EXACT, seed)
        for name, way in WAYS.items():
            other = _scalars(here, config, position, way, seed)
            found[name].append((_size(other - exact) / _size(exact), _size(other) / _size(exact)))
    return found


def _size(values: Floats) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _scalars(here: Lab, config: RunConfig, position: Position, way: Way, seed: int) -> Floats:
    """Return all workers' scalars along some directions, each of one batch."""
    order = Order(np.arange(0, config.directions.pool_size, 64))
    near = way.perturbation_scale or config.estimator.perturbation_scale
    estimator = config.estimator.model_copy(update={"perturbation_scale": near})
    measured = []
    for shard in here.shards(seed):
        seat = Seat(
            config.model_copy(update={"estimator": estimator}),
            here.identity,
            here.features(shard, way.precision),
            random.Random(f"{seed}/{way.batch}"),
            way.precision,
            way.kind,
        )
        seat.adopt(position)
        measured.append(seat.measure(order).values)
    return np.concatenate(measured)
