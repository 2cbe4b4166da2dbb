"""Direction scales: by head, by size, and calibrated from losses."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny

from lorand.config import RunConfig
from lorand.errors import ConfigError, DataError, ModelError
from lorand.manifest import Identity
from lorand_worker import model, scales, sensitivity
from lorand_worker.bench import Base, load_base, task_for
from lorand_worker.data import Examples
from lorand_worker.sensitivity import Sensitivity
from lorand_worker.tasks import Task

pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(rule: str, **estimator: Any) -> RunConfig:
    return tiny.config("spsa", directions={"scale_rule": rule}, estimator=estimator)


def exponents_of(identity: Identity) -> dict[str, int]:
    return {spec.name: spec.scale_exponent for spec in identity.manifest.tensors}


# ------------------------------------------------------------- rules


def test_by_size_a_tensor_moves_by_a_share_of_itself(tiny_model: Path) -> None:
    """Ones of a normalisation move most, zeros as all; a new head as the run file says."""
    loaded = model.load(config_of("size").model, 2, tiny_model)
    found = exponents_of(model.identity(loaded, config_of("size")))
    assert found.pop("head.weight") == found.pop("head.bias") == 4
    for name, exponent in found.items():
        if name.endswith("bias"):
            assert exponent == 0
        elif "LayerNorm" in name:
            assert exponent >= 2
        else:
            assert exponent <= 0, "most weights are here, and are smaller than the mean of squares"


def test_size_is_bounded_and_exact_at_powers_of_two() -> None:
    tensors = {f"2^{e}": torch.full((2,), 2.0**e) for e in (-9, -3, 0)} | {
        "most": torch.ones(10**5)
    }
    found = scales.by_size(tensors)
    assert found == {"2^-9": -scales.MOST, "2^-3": -3, "2^0": 0, "most": 0}
    assert scales.by_size({"nothing": torch.zeros(3)}) == {"nothing": 0}


@pytest.mark.parametrize("rule", ["size", "calibrated"])
def test_scales_are_taken_from_the_run(tiny_model: Path, rule: str) -> None:
    """What was written once into run.lock is what every machine uses."""
    loaded = model.load(config_of("head").model, 2, tiny_model)
    plain = model.identity(loaded, config_of("head"))
    tensors = tuple(
        replace(spec, scale_exponent=i % 5 - 2) for i, spec in enumerate(plain.manifest.tensors)
    )
    theirs = replace(plain, manifest=replace(plain.manifest, tensors=tensors))
    assert model.identity(loaded, config_of(rule), theirs) == theirs
    assert model.identity(loaded, config_of("head"), theirs) == plain, "the rule leaves no choice"


def test_a_run_without_its_measured_scales(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a run\.lock .* `lr-worker prepare .*--calibrate"):
        load_base(config_of("calibrated"), tiny_model, "cpu")


def test_scales_that_no_rule_would_find(tiny_model: Path) -> None:
    loaded = model.load(config_of("head").model, 2, tiny_model)
    plain = model.identity(loaded, config_of("head"))
    first, *others = plain.manifest.tensors
    tensors = (replace(first, scale_exponent=30), *others)
    theirs = replace(plain, manifest=replace(plain.manifest, tensors=tensors))
    with pytest.raises(
        ModelError, match=r"by 2\^30, which is beyond 2\^±10; prepare the run again"
    ):
        model.identity(loaded, config_of("calibrated"), theirs)


# ------------------------------------------------------------- calibration


@pytest.fixture
def setup(tiny_model: Path) -> tuple[Base, RunConfig, Task]:
    config = config_of("head", perturbation_scale=0.004)
    base = load_base(config, tiny_model, "cpu")
    rows = tiny.rows("hotels", 40, seed=5)
    data = Examples(tuple(t for t, _ in rows), tuple(tiny.LABELS.index(y) for _, y in rows))
    return base, config, task_for(base, config, data)


def test_a_calibration_leaves_the_weights_as_they_were(
    setup: tuple[Base, RunConfig, Task],
) -> None:
    base, config, task = setup
    before = model.base_digest(base.loaded.module)
    found = sensitivity.measure(base, config, task, random.Random(1))
    assert model.base_digest(base.loaded.module) == before
    assert [row.name for row in found] == [spec.name for spec in base.identity.manifest.tensors]
    measured = {row.name: row for row in found}
    assert measured["head.weight"].gradient > 0
    assert measured["encoder.encoder.layer.2.output.dense.weight"].gradient > 0, (
        "no zero head hides it"
    )
    identity = sensitivity.identity(base, found)
    assert exponents_of(identity) == sensitivity.exponents(found)
    key = exponents_of(identity)["encoder.encoder.layer.2.attention.self.key.bias"]
    assert key == 0, "softmax does not feel it"


@pytest.mark.slow
def test_what_is_measured_is_the_gradients_and_hessians(
    setup: tuple[Base, RunConfig, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the head at zero: E[(g·z)²] = |g|², E[zᵀHz] = tr H, within the noise of 64 directions."""
    base, config, task = setup
    monkeypatch.setattr(sensitivity, "DIRECTIONS", 64)
    monkeypatch.setattr(sensitivity, "EXAMPLES", 40)
    found = {r.name: r for r in sensitivity.measure(base, config, task, random.Random(1))}
    head = dict(base.loaded.module.named_parameters())["head.weight"].requires_grad_(True)
    [gradient] = torch.autograd.grad(task.loss(range(40)), head, create_graph=True)
    flat = gradient.flatten()
    square = float(flat.detach().square().sum())
    rows = [
        torch.autograd.grad(g, head, retain_graph=True)[0].flatten()[i] for i, g in enumerate(flat)
    ]
    row = found["head.weight"]
    assert row.gradient == pytest.approx(square, rel=0.5)
    assert row.curvature == pytest.approx(float(torch.stack(rows).sum()), abs=4 * row.error)


def test_exponents_follow_yield_for_cost() -> None:
    rows = [
        Sensitivity("body", 10_000, 1.0, 16.0),
        Sensitivity("cheap", 100, 1.0, 2.0),
        Sensitivity("dear", 100, 1.0, 64.0),
        Sensitivity("head", 10, 1000.0, 1.0),
        Sensitivity("uncertain", 10, 1.0, -3.0, error=4.0),
        Sensitivity("unfelt", 10, 1e-12, -1e-3),
    ]
    expected = {"body": 0, "cheap": 3, "dear": -2, "head": 4, "uncertain": 2, "unfelt": 0}
    assert sensitivity.exponents(rows) == expected
    nothing = [replace(row, gradient=0.0) for row in rows]
    assert set(sensitivity.exponents(nothing).values()) == {0}


def test_a_loss_that_is_not_finite(
    setup: tuple[Base, RunConfig, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, config, task = setup
    monkeypatch.setattr(task, "loss", lambda batch: torch.tensor(np.nan))
    with pytest.raises(DataError, match=r"smaller estimator\.perturbation_scale"):
        sensitivity.measure(base, config, task, random.Random(1))
