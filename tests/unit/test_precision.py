"""What `--precision auto` chooses, and that it says why."""

from typing import Any

import pytest
import torch
from tests import tiny

from lorand_worker import precision
from lorand_worker.precision import Precision, choose

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "changes", "speedup", "expected", "reason"),
    [
        ("backprop", {}, 3.0, "bfloat16", "3.0 times as fast"),
        ("backprop", {}, 1.1, "float32", "1.1 times as fast"),
        ("backprop", {"model": {"dtype": "bfloat16"}}, 3.0, "float32", "as the weights"),
        ("spsa", {}, 3.0, "bfloat16", "3.0 times as fast"),
        ("spsa", {"estimator": {"perturbation_scale": 0.001}}, 3.0, "bfloat16", "as fast"),
        ("spsa", {"estimator": {"perturbation_scale": 0.0005}}, 3.0, "float32", "drown"),
        ("spsa", {}, 0.1, "float32", "0.1 times as fast"),
        (
            "spsa",
            {
                "directions": {"rotate_every": 4},
                "subspace": {"kind": "coordinate", "probe": True},
            },
            3.0,
            "float32",
            "compares curvatures",
        ),
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
    changes: dict[str, Any],
    speedup: float,
    expected: str,
    reason: str,
) -> None:
    monkeypatch.setattr(precision, "bfloat16_speedup", lambda device: speedup)
    chosen, why = choose(Precision.AUTO, tiny.config(kind, **changes), CPU)
    assert chosen == expected
    assert reason in why


@pytest.mark.parametrize("asked", [Precision.FLOAT32, Precision.BFLOAT16])
def test_what_is_asked_for_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, asked: Precision
) -> None:
    monkeypatch.setattr(precision, "bfloat16_speedup", None)
    assert choose(asked, tiny.config("spsa"), CPU) == (asked, f"forward passes: {asked}")


def test_it_is_measured_in_a_moment() -> None:
    assert 0.0 < precision.bfloat16_speedup(CPU) < 1000.0
    assert precision.bfloat16_speedup(torch.device("meta")) == 1.0


def test_passes_run_in_it() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    for asked, dtype in (
        (Precision.FLOAT32, torch.float32),
        (Precision.BFLOAT16, torch.bfloat16),
    ):
        with precision.passes(asked, CPU):
            assert layer(x).dtype == dtype
