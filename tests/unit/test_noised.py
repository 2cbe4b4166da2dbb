"""Each example's scalars, by themselves, sampled and released with noise (notes/privacy.md §1)."""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from tests import tiny
from torch import nn

from lorand.codec import Floats
from lorand.config import EstimatorKind, RunConfig
from lorand.errors import LorandError, ModelError
from lorand.manifest import Manifest, TensorSpec
from lorand.privacy.mechanism import GRID, Mechanism
from lorand.replica import CopyReplica
from lorand_worker import data, independence
from lorand_worker.bench import ModelBench, load_base
from lorand_worker.data import PoissonSampler
from lorand_worker.estimators import Order, Spsa, build
from lorand_worker.local_steps import Standing
from lorand_worker.noised import Noised, alone
from lorand_worker.tasks import Task

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: Final[list[EstimatorKind]] = ["spsa", "one-sided", "forward", "backprop"]
POOL: Final = 64
DIRECTIONS: Final = np.array([5, 0, 63])
EXACT: Final = Mechanism("gaussian", 1000.0, 0.01, 4)
"""Nothing is clipped, and the noise is known."""


def private(kind: EstimatorKind, **changes: dict[str, Any]) -> RunConfig:
    return tiny.config(
        kind,
        directions={"pool_size": POOL, "head_scale": 4.0},
        estimator={"perturbation_scale": 2.0**-9, "batch_size": 4},
        rounds={"telemetry": "none"},
        privacy={"mode": "worker", "sample_rate": 0.5, **changes.get("privacy", {})},
    )


def bench_of(
    config: RunConfig, folder: Path, mechanism: Mechanism | None, count: int = 12
) -> ModelBench:
    base = load_base(config, folder, "cpu")
    content = tiny.rows("hotels", count, seed=9)
    examples = data.Examples(
        tuple(text for text, _ in content),
        tuple(tiny.LABELS.index(label) for _, label in content),
    )
    return ModelBench(base, config, examples, random.Random(3), mechanism=mechanism)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_each_examples_scalars_is_the_batchs(
    tiny_model: Path, kind: EstimatorKind
) -> None:
    config = private(kind)
    bench = bench_of(config, tiny_model, None)
    source = np.random.default_rng(7)
    bench.replica.set(source.integers(-(2**26), 2**26, POOL))
    before = bench.replica.digest()
    estimator = build(config, bench.replica, load_module(bench))
    task, batch = bench._task, [4, 1, 7, 2]
    vectors = estimator.each(alone(task.losses), batch, DIRECTIONS)
    assert vectors.shape == (4, 3)
    together = estimator.measure(task.loss, batch, DIRECTIONS)
    assert vectors.mean(axis=0) == pytest.approx(together.values, rel=2e-2, abs=1e-3)
    one = estimator.each(alone(task.losses), [7], DIRECTIONS)
    assert one[0].tolist() == vectors[2].tolist(), "bit for bit, whoever else is there"
    assert bench.replica.digest() == before


def load_module(bench: ModelBench) -> nn.Module:
    assert isinstance(bench._task, Task)
    module: nn.Module = bench._task._module
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_a_private_bench_releases_the_noisy_mean_and_no_loss(
    tiny_model: Path, kind: EstimatorKind
) -> None:
    config = private(kind)
    bench = bench_of(config, tiny_model, EXACT)
    assert isinstance(bench._noised, Noised)
    batch = PoissonSampler(12, 0.5, source=random.Random(3).randbytes).batch()
    assert 0 < len(batch) < 12
    vectors = bench._noised.estimator.each(alone(bench._task.losses), batch, DIRECTIONS)
    measured = bench.measure(Order(DIRECTIONS))
    assert measured.loss is None
    noise = 1000.0 * 0.01 / 4
    assert np.abs(measured.values - vectors.sum(axis=0) / 4).max() < 6 * noise
    assert (
        measured.values.tolist()
        != bench_of(config, tiny_model, EXACT).measure(Order(DIRECTIONS)).values.tolist()
    ), "the same sample has other noise"


def test_without_a_mechanism_a_private_run_is_not_measured(tiny_model: Path) -> None:
    """An evaluator has none, and scores."""
    bench = bench_of(private("spsa"), tiny_model, None)
    assert bench.score().examples == 12
    with pytest.raises(LorandError, match="with its mechanism, or not at all"):
        bench.measure(Order(DIRECTIONS))


# ------------------------------------------------------------- a replica of numbers


class Linear:
    """Losses x_i · w of weights that a replica holds, and ways for examples to interfere."""

    def __init__(self, rows: Floats, how: str = "not at all") -> None:
        """`rows` are the x_i, shape (examples, 6)."""
        spec = TensorSpec("w", (6,), "float32")
        config = private("spsa")
        module = nn.Module()
        module.w = nn.Parameter(torch.zeros(6))
        manifest = Manifest((spec,))
        identity = tiny_identity(manifest)
        self.replica = CopyReplica.of(module, manifest, config.pool(identity))
        self.estimator = Spsa(self.replica, config)
        self._rows, self._how = torch.from_numpy(rows).float(), how

    def losses(self, batch: Sequence[int]) -> torch.Tensor:
        """One loss an example; together they interfere as planted."""
        values = self._rows[list(batch)] @ self.replica.live["w"]
        if self._how == "one scale a tensor":  # as in dynamic int8: 127 steps for all together
            step = values.abs().max().clamp_min(1e-9) / 127
            return torch.round(values / step) * step
        if self._how == "batch normalisation":
            return values - values.mean()
        return values

    def noised(self, batch: list[int], bound: float = 1.0) -> Noised:
        """Release this very batch."""
        sampler = PoissonSampler(1, 1.0)
        sampler.batch = partial(list, batch)  # type: ignore[method-assign]
        return Noised(self.estimator, Mechanism("gaussian", bound, 1.0, 1), sampler)


def tiny_identity(manifest: Manifest) -> Any:
    from lorand.manifest import Identity

    return Identity(b"\1" * 32, b"\2" * 32, manifest)


ROWS: Final = np.random.default_rng(2).normal(0, 1, (5, 6))


@pytest.mark.parametrize("how", ["one scale a tensor", "batch normalisation"])
def test_an_outlier_changes_the_others_only_where_they_pass_together(how: str) -> None:
    """T5: alone, what an example adds is its own clipped vector, exactly."""
    rows = ROWS.copy()
    rows[4] *= 1e4
    made = Linear(rows, how)
    mechanism = Mechanism("gaussian", 1.0, 1.0, 1)
    four, five = [0, 1, 2, 3], [0, 1, 2, 3, 4]
    apart = [
        mechanism.clipped(made.estimator.each(alone(made.losses), batch, DIRECTIONS))
        for batch in (four, five)
    ]
    assert apart[1][:4].tolist() == apart[0].tolist()
    moved = (apart[1].sum(axis=0) - apart[0].sum(axis=0)).tolist()
    assert sum(part**2 for part in moved) <= GRID**2
    together = [
        mechanism.clipped(made.estimator.each(made.losses, batch, DIRECTIONS))
        for batch in (four, five)
    ]
    assert together[1][:4].tolist() != together[0].tolist(), "what is planted is seen"


def test_whatever_the_losses_are_a_release_comes() -> None:
    """T7: no exception, no skip: an example without a finite loss counts as nothing."""
    rows = ROWS.copy()
    rows[1] = np.nan
    rows[2] = 1e38
    made = Linear(rows)
    for batch in ([1], [1, 2], []):
        measured = made.noised(batch).measure(made.losses, Order(DIRECTIONS))
        assert measured.values.shape == (3,)
        assert np.isfinite(measured.values).all()
        assert measured.loss is None
    clipped = Mechanism("gaussian", 1.0, 1.0, 1).clipped(
        made.estimator.each(alone(made.losses), [0, 1, 3], DIRECTIONS)
    )
    assert clipped[1].tolist() == [0, 0, 0]
    assert clipped[[0, 2]].any(axis=1).all()


def test_local_steps_are_not_noised() -> None:
    with pytest.raises(AssertionError):
        Noised.of(private("spsa"), object(), EXACT, 4, random.randbytes)  # type: ignore[arg-type]
    made = Linear(ROWS)
    noised = Noised.of(private("spsa"), Standing(made.estimator), EXACT, 4, random.randbytes)
    assert noised.estimator is made.estimator


# ------------------------------------------------------------- models that are refused


class Told:
    """A task whose losses a test makes up."""

    def __init__(self, losses: Any) -> None:
        """`losses` is called with an example."""
        self._losses = losses

    def __len__(self) -> int:
        return 3

    def losses(self, batch: Sequence[int]) -> torch.Tensor:
        """See HasLosses."""
        return torch.tensor([float(self._losses(i)) for i in batch])


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.SyncBatchNorm(3)])
def test_batch_normalisation_is_refused(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(3, 3), layer)
    with pytest.raises(ModelError, match="1 is a batch normalisation"):
        independence.check(module, Told(lambda i: i))


def test_a_model_that_remembers_is_refused() -> None:
    seen: list[int] = []

    def drifting(i: int) -> float:
        seen.append(i)
        return 1.0 + 0.01 * len(seen)

    with pytest.raises(ModelError, match="keeps something of what it sees"):
        independence.check(nn.Linear(2, 2), Told(drifting))
    dice = random.Random(1)
    with pytest.raises(ModelError, match="randomness of its own"):
        independence.check(nn.Linear(2, 2), Told(lambda i: dice.random()))


def test_models_whose_losses_are_their_examples_own_are_taken() -> None:
    independence.check(nn.LayerNorm(3), Told(lambda i: 0.5 * i))
    independence.check(nn.Linear(2, 2), Told(lambda i: np.nan if i == 1 else 0.5))
