"""The audit's statistic, the mechanism under it, and what an attacker reads off a replica."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments.privacy_audit import bounds, view
from experiments.privacy_audit.bounds import Errors
from experiments.privacy_audit.mechanisms import DELTA, HalfNoise, NoClip, audit
from experiments.privacy_audit.membership import auc, trial_auc
from experiments.privacy_audit.tokens import Rows, back_projection, matching_pursuit
from experiments.privacy_audit.view import View
from scipy import stats  # type: ignore[import-untyped]
from tests import tiny

from lorand.directions import Pool
from lorand.errors import HandshakeError
from lorand.manifest import Manifest, TensorSpec
from lorand.privacy.mechanism import Mechanism
from lorand.replica import CopyReplica
from lorand_worker import guard, model

EPSILON = {1.0: 4.377178, 2.0: 1.993091, 4.0: 0.926342}
"""Of one release at δ = 1e-5, by noise multiplier: the analytic value."""
RELEASES = 20_000


def made(kind: type[Mechanism], multiplier: float) -> Mechanism:
    return kind("gaussian", 0.5, multiplier, 16)


def bound(mechanism: Mechanism, count: int, seed: int = 1) -> float:
    return bounds.least_epsilon(audit(mechanism, count, seed), DELTA)


# ------------------------------------------------------------- the mechanism


@pytest.mark.parametrize(("multiplier", "releases"), [(1.0, 5000), (2.0, 10_000), (4.0, RELEASES)])
def test_releases_show_no_more_than_the_theory_says_and_hardly_less(
    multiplier: float, releases: int
) -> None:
    found = bound(made(Mechanism, multiplier), releases)
    assert 0.7 * EPSILON[multiplier] <= found <= EPSILON[multiplier]


@pytest.mark.parametrize("bug", [HalfNoise, NoClip])
@pytest.mark.parametrize(("multiplier", "scalars"), [(1.0, 1), (1.0, 8), (4.0, 1)])
def test_a_planted_bug_is_found(bug: type[Mechanism], multiplier: float, scalars: int) -> None:
    """A shift beyond 1/σ is an epsilon beyond the theory's, which grows with it."""
    found = audit(made(bug, multiplier), 3000 // scalars, 1, scalars)
    assert bounds.least_shift(found) > 1 / multiplier
    sound = audit(made(Mechanism, multiplier), 3000 // scalars, 1, scalars)
    assert bounds.least_shift(sound) <= 1 / multiplier


def test_half_the_noise_is_a_greater_epsilon() -> None:
    assert bound(made(HalfNoise, 2.0), 2000) > EPSILON[2.0]


@pytest.mark.slow
@pytest.mark.parametrize("multiplier", [1.0, 2.0, 4.0])
def test_many_releases_come_closer(multiplier: float) -> None:
    found = bound(made(Mechanism, multiplier), 10 * RELEASES, seed=2)
    assert 0.85 * EPSILON[multiplier] <= found <= EPSILON[multiplier]


# ------------------------------------------------------------- the statistic


def test_the_bound_on_a_rate_is_clopper_and_pearsons() -> None:
    for errors in (0, 3, 50, 99):
        at = bounds.upper(errors, 100, 0.975)
        assert stats.binom.cdf(errors, 100, at) == pytest.approx(0.025, rel=1e-6)
    assert bounds.upper(100, 100, 0.975) == 1.0


def test_no_difference_shows_nothing() -> None:
    scores = np.random.default_rng(0).standard_normal((2, 4000))
    found = bounds.errors(scores[0], scores[1])
    assert bounds.least_shift(found) == 0.0
    assert bounds.least_epsilon(found, DELTA) == 0.0


def test_a_record_that_is_sampled_too_often_is_beyond_any_epsilon() -> None:
    found = Errors(false_positives=0, false_negatives=0, trials=1000)
    assert math.isinf(bounds.least_epsilon(found, DELTA, rate=0.5))
    assert math.isfinite(bounds.least_shift(found, rate=1.0))


def test_the_threshold_is_of_releases_it_is_not_judged_on() -> None:
    """All of the second half lies where the first half's threshold errs."""
    without = np.concatenate([np.zeros(100), np.ones(100)])
    assert bounds.errors(without, 1 - without) == Errors(100, 100, 100)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_sampled_records_shift_is_found(rate: float) -> None:
    """Scores of a known shift; a bound is below it, and near it with many."""
    source = np.random.default_rng(3)
    without, with_record = source.standard_normal((2, 400_000))
    with_record = with_record + 1.5 * (source.random(len(with_record)) < rate)
    found = bounds.least_shift(bounds.errors(without, with_record), rate)
    assert 1.4 <= found <= 1.5


# ------------------------------------------------------------- the attacker's view

MANIFEST = Manifest(
    (TensorSpec("a.bias", (7,), "float32", 3), TensorSpec("a.weight", (5, 60), "float32"))
)
POOL = Pool((5, 9), 64, 32)


def test_the_view_is_the_replicas_directions() -> None:
    """Blocks, shifts, signs and direction scales, read off one call of the library."""
    seen = View.of(MANIFEST, POOL)
    tensors = {spec.name: torch.zeros(spec.shape) for spec in MANIFEST.tensors}
    replica = CopyReplica(tensors, MANIFEST, POOL)
    gradient = np.random.default_rng(0).standard_normal(MANIFEST.num_weights)
    for index in (0, 1, 37, 63):
        direction = torch.cat([z.reshape(-1) for z in replica.direction(index).values()]).numpy()
        at = np.array([index])
        assert seen.back(np.ones(1), at).tolist() == direction.tolist()
        assert seen.scalars(gradient, at)[0] == pytest.approx(float(gradient @ direction))


def test_as_many_scalars_as_numbers_are_the_gradient() -> None:
    seen, places = View.of(MANIFEST, POOL), np.arange(7, 47)
    gradient = np.random.default_rng(1).standard_normal(40)
    indices = np.arange(64)
    values = seen.scalars(gradient, indices, places)
    assert view.relative_error(seen.solve(values, indices, places), gradient) < 1e-6
    half = seen.solve(values[:16], indices[:16], places)
    assert 0.3 < view.relative_error(half, gradient) < 1.0


def test_codes_are_told_at_the_scale_where_a_run_holds_them() -> None:
    values = 1e-3 * np.random.default_rng(2).standard_normal(4096)
    assert view.relative_error(view.coded("int8", values), values) < 0.02
    assert set(view.coded("sign", values).tolist()) == {-1.0, 1.0}
    assert view.coded(None, values) is values


# ------------------------------------------------------------- the attacks


def test_rows_are_found_in_fewer_scalars_than_numbers() -> None:
    """Three rows of 64 × 16: 256 scalars of 1,024 numbers tell which, signs too."""
    spec = TensorSpec("words", (64, 16), "float32")
    rows = Rows(View.of(Manifest((spec,)), Pool((5, 9), 1024, 32)), 0, 64, 16)
    source = np.random.default_rng(4)
    gradient = np.zeros((64, 16))
    gradient[[3, 17, 60]] = source.standard_normal((3, 16))
    indices = source.permutation(1024)[:256]
    values = rows.view.scalars(gradient.ravel(), indices)
    assert matching_pursuit(rows, values, indices, 3) == {3, 17, 60}
    assert back_projection(rows, np.sign(values), indices, 3) == {3, 17, 60}
    assert matching_pursuit(rows, source.standard_normal(256), indices, 3) != {3, 17, 60}


def test_area_under_the_curve() -> None:
    assert auc(np.array([2.0, 3.0]), np.array([1.0, 0.0])) == 1.0
    assert auc(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0.5
    assert auc(np.array([0.0, 2.0]), np.array([1.0, 3.0])) == 0.25


def test_members_of_a_batch_are_told_by_its_mean_and_not_by_anything_else() -> None:
    vectors = np.random.default_rng(6).standard_normal((400, 64)) * np.linspace(0.1, 3, 64)
    told = trial_auc(vectors, 8, lambda batch: batch.mean(axis=0), 0.0, 20, 0)
    assert told > 0.9
    none = trial_auc(vectors, 8, lambda batch: vectors[0], 0.0, 20, 0)
    assert 0.4 < none < 0.6


def test_a_base_model_made_to_memorise_is_refused(tiny_model: Path) -> None:
    """ReCIT needs one: here a single last bit of a single weight that nobody trains."""
    config = tiny.config("backprop")
    ours, theirs = (model.load(config.model, 2, tiny_model) for _ in range(2))
    guard.check_identity(model.identity(ours, config), model.identity(theirs, config))
    trained = model.trainable_tensors(theirs, config.model.trainable)
    frozen = next(t for name, t in theirs.module.named_parameters() if name not in trained)
    with torch.no_grad():
        frozen.view(-1)[0] = torch.nextafter(frozen.view(-1)[0], torch.tensor(torch.inf))
    with pytest.raises(HandshakeError, match=r"base weights here .* are not the run's"):
        guard.check_identity(model.identity(ours, config), model.identity(theirs, config))
