"""Workers of a mixed run measure the same scalars in their own way, and only where it says so."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny

from lorand.config import EstimatorKind
from lorand.errors import ConfigError
from lorand_worker.bench import ModelBench, load_base
from lorand_worker.data import Examples
from lorand_worker.estimators import Backprop, Order
from lorand_worker.local_steps import Standing
from lorand_worker.own_estimator import OwnEstimator, choose

MIXED: dict[str, Any] = {"estimator": {"mixed": True}}


@pytest.mark.parametrize(
    ("asked", "kind", "changes", "expected"),
    [
        (OwnEstimator.RUN, "forward", {}, "forward"),
        (OwnEstimator.SPSA, "spsa", {}, "spsa"),
        (OwnEstimator.BACKPROP, "backprop", {}, "backprop"),
        (OwnEstimator.RUN, "spsa", MIXED, "spsa"),
        (OwnEstimator.SPSA, "spsa", MIXED, "spsa"),
        (OwnEstimator.BACKPROP, "spsa", MIXED, "backprop"),
    ],
)
def test_the_runs_or_in_a_mixed_run_ones_own(
    asked: OwnEstimator, kind: EstimatorKind, changes: dict[str, Any], expected: str
) -> None:
    assert choose(asked, tiny.config(kind, **changes)) == expected


@pytest.mark.parametrize(
    ("asked", "kind"), [(OwnEstimator.BACKPROP, "spsa"), (OwnEstimator.SPSA, "backprop")]
)
def test_another_runs_worker_has_no_choice(asked: OwnEstimator, kind: EstimatorKind) -> None:
    with pytest.raises(ConfigError, match=f"--estimator {asked}: all .* with {kind}; join without"):
        choose(asked, tiny.config(kind))


@pytest.mark.parametrize(
    ("kind", "changes", "remedy"),
    [
        ("backprop", {}, 'set estimator.kind = "spsa", or mixed = false'),
        ("one-sided", {}, 'set estimator.kind = "spsa", or mixed = false'),
        (
            "spsa",
            {
                "directions": {"rotate_every": 4},
                "subspace": {"kind": "coordinate", "probe": True},
            },
            "or subspace.probe = false",
        ),
        (
            "spsa",
            {"privacy": {"mode": "worker"}, "rounds": {"telemetry": "none"}},
            "with \\[privacy\\] set estimator.mixed = false",
        ),
    ],
)
def test_where_scalars_must_be_of_one_kind_a_mixed_run_is_refused(
    kind: EstimatorKind, changes: dict[str, Any], remedy: str
) -> None:
    tiny.config(kind, **changes)
    with pytest.raises(ConfigError, match=remedy):
        tiny.config(kind, **changes, **MIXED)


def test_a_run_that_is_not_mixed_keeps_its_identity() -> None:
    plain = tiny.config("spsa")
    assert "mixed" not in plain.canonical()
    assert plain.digest() != tiny.config("spsa", **MIXED).digest()


@pytest.mark.usefixtures("one_thread")
def test_a_bench_measures_the_same_scalars_by_one_backward_pass(tiny_model: Path) -> None:
    near = {"mixed": True, "perturbation_scale": 2.0**-9}
    config = tiny.config("spsa", estimator=near, directions={"head_scale": 4.0})
    base = load_base(config, tiny_model, "cpu")
    base.replica.set(np.random.default_rng(7).integers(-(2**26), 2**26, 256))
    texts, names = zip(*tiny.rows("hotels", 20, seed=9), strict=True)
    examples = Examples(texts, tuple(tiny.LABELS.index(name) for name in names))
    order = Order(np.array([3, 200, 77, 5]))
    values = []
    for kind in (None, "backprop"):
        bench = ModelBench(base, config, examples, random.Random(0), estimator=kind)
        assert isinstance(bench._work, Standing)
        assert isinstance(bench._work.estimator, Backprop) == (kind == "backprop")
        values.append(bench.measure(order).values)
    np.testing.assert_allclose(values[1], values[0], rtol=0, atol=0.02 * np.abs(values[0]).max())
