"""Private runs of experiments: vectors are those of workers, and noise is where it should be."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from experiments import dp_sgd, feature_heads, head_inputs, private_runs
from experiments.privacy_utility import PRIVACY, ROWS, choices, config_of
from experiments.private_runs import releases
from tests import tiny

from lorand import ledger
from lorand.codec import Floats
from lorand.config import EstimatorKind, RunConfig
from lorand.privacy import plan
from lorand.privacy.accountant import Release
from lorand.privacy.mechanism import GRID, Mechanism
from lorand.privacy.sampler import Below
from lorand.replica import CopyReplica
from lorand_worker import estimators, model
from lorand_worker.data import Examples
from lorand_worker.model import LoadedModel
from lorand_worker.noised import alone
from lorand_worker.tasks import build

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH: Final = [3, 0, 11, 7, 5]
WORKERS: Final = 3


def config_for(kind: EstimatorKind, **privacy: object) -> RunConfig:
    """A run on the head alone, with as many directions as a test of equality needs."""
    return tiny.config(
        kind,
        model={"trainable": head_inputs.ALONE},
        directions={"pool_size": 64},
        estimator={"directions_per_round": 8, "batch_size": 4, "perturbation_scale": 2.0**-9},
        rounds={"telemetry": "none", "quorum": WORKERS},
        privacy={"sample_rate": 0.5, **privacy},
    )


def examples(seed: int) -> Examples:
    content = tiny.rows("gadgets", 24, seed=seed)
    texts = tuple(f"{text}{' very' * (i % 7)}" for i, (text, _) in enumerate(content))
    return Examples(texts, tuple(tiny.LABELS.index(label) for _, label in content))


def on_a_head(config: RunConfig, folder: Path) -> tuple[LoadedModel, CopyReplica]:
    """A model and its replica, at weights that answer something."""
    loaded = model.load(config.model, 2, tiny.write_model(folder))
    identity = model.identity(loaded, config, prepares=True)
    pool = ledger.pool_of(config, identity, 0)
    replica = CopyReplica.of(loaded.module, identity.manifest, pool)
    replica.set(np.random.default_rng(3).integers(-(1 << 28), 1 << 28, pool.size))
    return loaded, replica


@pytest.mark.parametrize("kind", ["backprop", "spsa"])
def test_batched_vectors_are_those_of_examples_that_pass_alone(
    kind: EstimatorKind, tmp_path: Path
) -> None:
    config, shard = config_for(kind), examples(5)
    loaded, replica = on_a_head(config, tmp_path / "model")
    bench = feature_heads.bench(config, loaded, replica, [shard], shard)
    indices = np.arange(64) if kind == "backprop" else np.array([5, 0, 63])
    batched = bench.vectors(0, BATCH, indices)

    whole = build(loaded, config, shard, trainable={"head.weight", "head.bias"})
    estimator = estimators.build(config, replica, loaded.module)
    single = estimator.each(alone(whole.losses), BATCH, indices)
    assert np.abs(single).max() > 0.1
    assert batched == pytest.approx(single, rel=1e-3, abs=2e-3)


def test_the_heads_score_is_the_models(tmp_path: Path) -> None:
    config, shard = config_for("backprop"), examples(6)
    loaded, replica = on_a_head(config, tmp_path / "model")
    found = feature_heads.bench(config, loaded, replica, [shard], shard).score()
    own = build(loaded, config, shard, trainable={"head.weight", "head.bias"}).score()
    assert (found.accuracy, found.examples) == pytest.approx((own.accuracy, own.examples))
    assert found.loss == pytest.approx(own.loss, rel=1e-4)


def vectors(sizes: Sequence[int], length: float) -> list[Floats]:
    source = np.random.default_rng(4)
    parts = [source.standard_normal((size, 8)) for size in sizes]
    return [length * part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]


def below(seed: int) -> Below:
    return random.Random(seed).randrange


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A noise multiplier that is known, without calculating one."""
    monkeypatch.setattr(private_runs, "multiplier", lambda config: 0.01)


@pytest.mark.usefixtures("quiet")
def test_one_noise_is_as_much_as_one_workers_over_all_examples() -> None:
    config = config_for("spsa", mode="worker", clip_bound=2.0)
    nobody = [np.empty((0, 8))] * WORKERS
    each = releases(config, "each", WORKERS, below(1))(nobody)
    (once,) = releases(config, "once", WORKERS, below(1))(nobody)
    assert len(each) == WORKERS
    assert not np.array_equal(each[0], each[1])  # each worker's noise is its own
    assert once * WORKERS == pytest.approx(each[0])
    assert np.abs(once).max() > 0


@pytest.mark.usefixtures("quiet")
def test_both_places_of_noise_release_the_mean_of_clipped_vectors() -> None:
    config = config_for("spsa", mode="worker", clip_bound=2.0)
    parts = vectors([3, 1, 4], length=10.0)
    expected = sum(part.sum(axis=0) for part in parts) * (2.0 / 10.0) / (WORKERS * 4)
    noise = 6 * 0.01 * 2.0 / 4
    each = releases(config, "each", WORKERS, below(1))(parts)
    (once,) = releases(config, "once", WORKERS, below(1))(parts)
    assert np.mean(each, axis=0) == pytest.approx(expected, abs=noise)
    assert once == pytest.approx(expected, abs=noise)
    assert np.abs(expected).max() > 2 * noise


@pytest.mark.usefixtures("quiet")
def test_one_noise_is_that_of_a_central_run() -> None:
    settings = {"clip_bound": 2.0, "mode": "central"}
    central = config_for("spsa", **settings)
    worker, coordinator = plan.mechanism(central, 0.01), plan.whole(central, 0.01)
    parts = vectors([3, 1, 4], length=10.0)
    total = np.sum([worker.steps(part) for part in parts], axis=0)
    expected = coordinator.mean(coordinator.noisy(total, below(1)), WORKERS)

    config = config_for("spsa", clip_bound=2.0, mode="worker")
    (once,) = releases(config, "once", WORKERS, below(1))(parts)
    two_steps_an_example = 2 * 8 * 2.0 / GRID / (WORKERS * 4)
    assert once == pytest.approx(expected, rel=0, abs=two_steps_an_example)


def test_quick_clipping_is_the_mechanisms_to_steps_of_the_grid() -> None:
    mixed = np.concatenate(vectors([5], length=10.0) + vectors([5], length=0.5))
    quick = private_runs.Quick("gaussian", 2.0, 0.01, 4).clipped(mixed)
    exact = Mechanism("gaussian", 2.0, 0.01, 4).clipped(mixed)
    assert quick.dtype == exact.dtype
    assert np.abs(quick - exact).max() <= 2
    assert np.linalg.norm(quick[5:], axis=1) == pytest.approx(GRID / 4)


def test_without_noise_nothing_is_clipped() -> None:
    parts = vectors([3, 1, 4], length=10.0)
    each = releases(config_for("spsa"), "none", WORKERS, below(1))(parts)
    assert np.array(each) == pytest.approx(np.array([part.sum(axis=0) / 4 for part in parts]))


def test_noise_is_calculated_for_what_workers_calculate_it_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def calibrated(release: Release, times: int, epsilon: float, delta: float) -> Release:
        return replace(release, multiplier=times + epsilon + delta + release.rate)

    monkeypatch.setattr(private_runs, "calibrated", calibrated)
    monkeypatch.setattr(plan, "calibrated", calibrated)
    config = config_for("spsa", mode="worker", target_epsilon=3.0, spare_rounds=2)
    assert private_runs.multiplier(config) == plan.planned(config).multiplier


@pytest.mark.parametrize("title", list(ROWS))
def test_every_row_tries_as_much_with_privacy_as_without(title: str) -> None:
    row = ROWS[title]
    assert len({len(choices(row, privacy)) for privacy in PRIVACY}) == 1
    if row.kind == "opacus":
        return
    for privacy in PRIVACY:
        for choice in choices(row, privacy):
            config = config_of("uci", row, privacy, choice, examples=900)
            assert config.estimator.batch_size == 225
            assert config.num_directions == row.numbers
            assert config.privacy.noised == (privacy.noise != "none")
            assert config.releases == row.rounds


def test_opacus_learns_a_head_and_repeats_it() -> None:
    pytest.importorskip("opacus", reason="see experiments/dp_sgd.py for how to install it")
    source = torch.Generator().manual_seed(2)
    x = torch.randn(200, 4, generator=source)
    part = x, (x[:, 0] > 0).long()
    plain = dp_sgd.Settings(rounds=20, sample_rate=0.25, learning_rate=1.0)
    assert dp_sgd.train([part, part], part, plain, seed=1).accuracy > 0.95
    noisy = replace(plain, clip=1.0, multiplier=5.0)
    first, again, other = (dp_sgd.train([part], part, noisy, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
