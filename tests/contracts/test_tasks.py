"""What every task keeps: its losses are those of each example alone, whatever the batch."""

import random
from typing import Final

import numpy as np
import pytest
import torch
from tests.contracts.task_cases import CASES, COUNT, Case, Setup, set_up

from lorand.config import EstimatorKind
from lorand_worker.bench import ModelBench
from lorand_worker.estimators import Order
from lorand_worker.memory import Weights
from lorand_worker.precision import Precision
from lorand_worker.tasks import Forward

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 3e-6
INDICES = np.array([3, 17, 40])
KINDS: Final[list[tuple[EstimatorKind, Weights]]] = [
    ("backprop", Weights.COPY),
    ("backprop", Weights.LAYERWISE),
    ("forward", Weights.COPY),
    ("spsa", Weights.LAYERWISE),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    """Each kind of task."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=["all", "last:1"])
def setup(case: Case, request: pytest.FixtureRequest) -> Setup:
    """Everything is trained, or states below the last layer are kept."""
    return set_up(case, request, request.param)


@pytest.mark.parametrize("batch", [[3], [5, 1, 9, 2], list(range(COUNT - 1, -1, -1))])
def test_losses_are_those_of_each_example_alone(setup: Setup, batch: list[int]) -> None:
    task, examples = setup.task(), setup.case.examples()
    expected = [setup.case.by_hand(setup.base, examples, i) for i in batch]
    for _ in range(2):  # computed, then from what was kept
        with torch.no_grad():
            found = task.losses(batch)
        assert found.shape == (len(batch),)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_the_loss_is_the_mean_of_the_losses(setup: Setup) -> None:
    """Exactly: what privacy clips is what training uses."""
    task = setup.task()
    for batch in ([0], [7, 3, 11], list(range(COUNT))):
        loss, losses = task.loss(batch), task.losses(batch)
        assert loss.shape == ()
        assert torch.equal(loss, losses.mean())
        assert torch.equal(loss, task.loss(batch)), "nothing is random"


def test_an_examples_gradient_is_its_own(setup: Setup) -> None:
    """The gradient of the mean is the mean of the examples' gradients."""
    task, batch = setup.task(), [4, 8, 2]
    names = {spec.name for spec in setup.base.identity.manifest.tensors}
    trained = [p for n, p in setup.base.loaded.module.named_parameters() if n in names]

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(loss, trained, retain_graph=True)
        return torch.cat([part.flatten() for part in found])

    losses = task.losses(batch)
    each = [gradient(loss) for loss in losses]
    alone = gradient(task.losses([batch[1]])[0])
    torch.testing.assert_close(gradient(losses.mean()), sum(each) / 3, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(each[1], alone, atol=1e-6, rtol=1e-4)


def test_the_score_is_over_all_examples(setup: Setup) -> None:
    task = setup.task()
    score = task.score()
    assert len(task) == score.examples == COUNT
    assert 0 <= score.accuracy <= 1
    with torch.no_grad():
        assert score.loss == pytest.approx(float(task.loss(range(COUNT))), abs=TOLERANCE)
    assert task.score() == score


def test_bfloat16_passes_give_near_losses_in_float32(setup: Setup) -> None:
    batch = list(range(8))
    with torch.no_grad():
        plain = setup.task().losses(batch)
        rough = setup.task(Forward(Precision.BFLOAT16)).losses(batch)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, plain, atol=0.1, rtol=0.05)


@pytest.mark.usefixtures("one_thread")
def test_estimators_agree_on_a_task(case: Case, request: pytest.FixtureRequest) -> None:
    """Slopes by forward mode, by finite differences, by backward passes over both replicas.

    In the same order, on one thread: differences of losses have some of their roundings.
    """
    values = {}
    for kind, weights in KINDS:
        setup = set_up(case, request, "all", kind, weights)
        bench = ModelBench(setup.base, setup.config, case.examples(), random.Random(0))
        whole = kind == "backprop"
        found = bench.measure(Order(np.arange(64) if whole else INDICES)).values
        values[kind, weights] = found[INDICES] if whole else found
    exact = values["backprop", Weights.COPY]
    size = float(np.abs(exact).max())
    for key, found in values.items():
        tolerance = 0.02 if key[0] == "spsa" else 1e-3
        assert np.abs(found - exact).max() < tolerance * size, key
