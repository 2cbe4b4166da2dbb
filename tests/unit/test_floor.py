"""The floor of loss differences: its formula, and the one warning."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import tiny

from lorand_worker import data
from lorand_worker.bench import load_base, task_for
from lorand_worker.estimators import Measurement
from lorand_worker.floor import FloorWatch, floor, passes_dtype
from lorand_worker.precision import Precision
from lorand_worker.tasks import Forward

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
def test_rounding_alone_differs_by_about_the_floor(tiny_model: Path, precision: Precision) -> None:
    """At a μ far below what passes resolve, differences are rounding and nothing else."""
    config = tiny.config("spsa", model={"trainable": "all"}, directions={"quantum_exponent": 40})
    base = load_base(config, tiny_model, "cpu")
    source = np.random.default_rng(0)
    base.replica.set(source.integers(-(2**33), 2**33, config.directions.pool_size))
    rows = tiny.rows("hotels", 16, seed=3)
    labels = tuple(tiny.LABELS.index(label) for _, label in rows)
    examples = data.Examples(tuple(text for text, _ in rows), labels)
    task = task_for(base, config, examples, Forward(precision))
    found, quanta = [], 2 ** (10 if precision is Precision.FLOAT32 else 18)
    with torch.no_grad():
        for index in range(24):
            losses = []
            for sign in (1, -1):
                with base.replica.perturbed(index, sign * quanta):
                    losses.append(float(task.loss(range(16))))
            found.append(losses[0] - losses[1])
    expected = floor(passes_dtype(config, precision), losses[0], 16)
    assert expected / 4 < float(np.sqrt(np.mean(np.square(found)))) < 4 * expected


def watch(kind: str = "spsa", precision: Precision = Precision.BFLOAT16) -> FloorWatch:
    config = tiny.config(kind, estimator={"perturbation_scale": 0.001})  # type: ignore[arg-type]
    return FloorWatch(config, precision, 16)


def test_one_sentence_when_most_scalars_are_below(caplog: pytest.LogCaptureFixture) -> None:
    limit = floor("bfloat16", 0.7, 16)
    small, large = 0.9 * limit / 0.002, 1.1 * limit / 0.002
    watching = watch()
    with caplog.at_level(logging.INFO, "lorand"):
        for _ in range(20):
            watching.see(Measurement(np.array([small, large, large, -large]), 0.7))
        assert caplog.records == []
        for _ in range(20):
            watching.see(Measurement(np.array([small, small, -small, large]), 0.7))
    (record,) = caplog.records
    text = record.getMessage()
    assert "75% of this worker's loss differences are below" in text
    assert "join with --precision float32, or ask for a run with a larger" in text


@pytest.mark.parametrize("kind", ["forward", "backprop"])
def test_slopes_are_not_differences(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lorand"):
        watch(kind).see(Measurement(np.zeros(64), 0.7))
    assert caplog.records == []


def test_float32_has_no_other_precision_to_offer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lorand"):
        watch("one-sided", Precision.FLOAT32).see(Measurement(np.zeros(64), 0.7))
    assert "rounding: ask for a run with" in caplog.text
