"""Estimators against autograd and against the definition of the directions (DESIGN §2, §3)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests import tiny

from lorand.config import EstimatorKind, Quantisation
from lorand.directions import Pool
from lorand.errors import ConfigError
from lorand.kernels.reference import buckets, signs
from lorand.manifest import Manifest, TensorSpec
from lorand.replica import CopyReplica
from lorand_worker import data
from lorand_worker.bench import Base, ModelBench, load_base, parse_device, task_for
from lorand_worker.estimators import (
    Backprop,
    ForwardGradient,
    NonFiniteLoss,
    OneSided,
    Order,
    Spsa,
    build,
)
from lorand_worker.memory import Weights

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH: Final = list(range(12))
POOL: Final = 128


class Made:
    """A base model somewhere in a run, its task and its estimator."""

    def __init__(
        self,
        folder: Path,
        kind: EstimatorKind,
        trainable: str,
        weights: Weights = Weights.COPY,
        *,
        checkpointing: bool = False,
        quantisation: Quantisation = "none",
    ) -> None:
        """Load it, and move the weights away from zero coefficients."""
        self.config = tiny.config(
            kind,
            model={"trainable": trainable, "quantisation": quantisation},
            directions={"pool_size": POOL, "head_scale": 4.0},
            # Small, so that the third derivative along a direction hardly counts.
            estimator={"perturbation_scale": 2.0**-9},
        )
        self.base: Base = load_base(
            self.config, folder, "cpu", weights, checkpointing=checkpointing
        )
        source = np.random.default_rng(7)
        start = source.integers(-(2**26), 2**26, POOL)
        self.base.replica.set(start)
        content = tiny.rows("hotels", 20, seed=9)
        labels = tuple(tiny.LABELS.index(label) for _, label in content)
        self.task = task_for(
            self.base, self.config, data.Examples(tuple(text for text, _ in content), labels)
        )
        self.estimator = build(self.config, self.base.replica, self.base.loaded.module)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Plain autograd's, by name, in float64."""
        module = self.base.loaded.module
        names = [spec.name for spec in self.base.identity.manifest.tensors]
        parameters = dict(module.named_parameters())
        before = [parameters[name].requires_grad for name in names]
        for name in names:
            parameters[name].requires_grad_(True)
        found = torch.autograd.grad(self.task.loss(BATCH), [parameters[name] for name in names])
        for name, flag in zip(names, before, strict=True):
            parameters[name].requires_grad_(flag)
        return {name: g.double() for name, g in zip(names, found, strict=True)}

    def direction(self, k: int) -> dict[str, torch.Tensor]:
        """z_k by its definition: D[i] · (−1)^popcount(((i mod K) xor r_b) & k) · 2^s."""
        result = {}
        device = torch.device("cpu")
        for tid, spec in enumerate(self.base.replica.manifest.tensors):
            key = self.base.replica.pool.key
            places = buckets(0, spec.size, key=key, tid=tid, size=POOL, device=device)
            odd = torch.tensor([(int(place) & k).bit_count() & 1 for place in places])
            sign = signs(0, spec.size, key=key, tid=tid, device=device)
            z = sign.double() * (1 - 2 * odd) * 2.0**spec.scale_exponent
            result[spec.name] = z.reshape(spec.shape)
        return result

    def slope(self, k: int) -> float:
        """z_k · ∇L."""
        gradients, z = self.gradients(), self.direction(k)
        return sum(float((gradients[name] * z[name]).sum()) for name in z)


@pytest.mark.parametrize("trainable", ["last:1", "name:^head", "name:layer.0|^head"])
def test_backprop_is_every_directions_slope(tiny_model: Path, trainable: str) -> None:
    made = Made(tiny_model, "backprop", trainable)
    before = made.base.replica.digest()
    measured = made.estimator.measure(made.task.loss, BATCH, np.arange(POOL))
    assert made.base.replica.digest() == before
    assert measured.values.shape == (POOL,)
    with torch.no_grad():
        assert measured.loss == pytest.approx(float(made.task.loss(BATCH)))
    for k in [0, 1, POOL - 1, *np.random.default_rng(1).integers(0, POOL, 6)]:
        assert measured.values[k] == pytest.approx(made.slope(int(k)), rel=1e-4, abs=1e-6)
    assert all(p.grad is None for p in made.base.loaded.module.parameters()), "freed at once"
    again = made.estimator.measure(made.task.loss, BATCH, np.arange(POOL))
    np.testing.assert_allclose(again.values, measured.values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trainable", ["all", "last:1", "name:layer.0|^head"])
@pytest.mark.parametrize("kind", ["spsa", "one-sided"])
def test_losses_are_the_same_bits_layer_by_layer(
    tiny_model: Path, kind: EstimatorKind, trainable: str
) -> None:
    """Weights and so losses agree bit for bit, whichever way they are made."""
    indices = np.array([3, 77, 100])
    results = []
    for weights in (Weights.COPY, Weights.LAYERWISE):
        made = Made(tiny_model, kind, trainable, weights)
        results.append(made.estimator.measure(made.task.loss, BATCH, indices))
    assert results[0].values.tolist() == results[1].values.tolist()
    assert results[0].loss == results[1].loss


@pytest.mark.parametrize("trainable", ["all", "last:1", "name:layer.0|^head"])
def test_backprop_measures_the_same_layer_by_layer(tiny_model: Path, trainable: str) -> None:
    """Also on a copy whose blocks are run again in the backward pass."""
    plain, again, layerwise = (
        made.estimator.measure(made.task.loss, BATCH, np.arange(POOL))
        for made in (
            Made(tiny_model, "backprop", trainable),
            Made(tiny_model, "backprop", trainable, checkpointing=True),
            Made(tiny_model, "backprop", trainable, Weights.LAYERWISE),
        )
    )
    assert plain.loss == again.loss == layerwise.loss
    scale = float(np.abs(plain.values).max())
    for other in (again, layerwise):
        np.testing.assert_allclose(other.values, plain.values, rtol=1e-4, atol=1e-5 * scale)


def test_a_zeroth_order_round_is_two_passes_a_direction(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adopting a round's coefficients costs none, nor does returning to them."""
    made = Made(tiny_model, "spsa", "last:1")
    backend = made.base.replica.backend
    passes = []
    whole = backend.materialise_all

    def counted(places: Any, tables: Any, *, key: Any) -> None:
        passes.append(len(places))
        whole(places, tables, key=key)

    monkeypatch.setattr(type(backend), "materialise_all", lambda _, *a, **k: counted(*a, **k))
    tensors = len(made.base.identity.manifest.tensors)
    for number in range(3):
        made.base.replica.set(np.full(POOL, number, np.int64))
        made.estimator.measure(made.task.loss, BATCH, np.array([1, 2]))
    assert passes == [tensors] * 3 * 2 * 2


def test_backprop_answers_in_the_order_of_the_draw(tiny_model: Path) -> None:
    made = Made(tiny_model, "backprop", "name:^head")
    whole = made.estimator.measure(made.task.loss, BATCH, np.arange(POOL)).values
    some = np.array([5, 99, 0])
    np.testing.assert_allclose(
        made.estimator.measure(made.task.loss, BATCH, some).values, whole[some], rtol=1e-6
    )


ZEROTH_ORDER: Final[list[EstimatorKind]] = ["spsa", "one-sided", "forward"]
ROOM: Final = {"spsa": 0.01, "one-sided": 0.05, "forward": 1e-5}
"""Most error as a share of the largest scalar: μ², μ or nothing, and float32."""


@pytest.mark.parametrize("trainable", ["all", "last:1", "name:^head"])
@pytest.mark.parametrize("kind", ZEROTH_ORDER)
def test_scalars_agree_with_autograd(tiny_model: Path, kind: EstimatorKind, trainable: str) -> None:
    """Losses along a direction, or its derivative, and the slope by autograd."""
    made = Made(tiny_model, kind, trainable)
    before = made.base.replica.digest()
    indices = np.random.default_rng(2).choice(POOL, 8, replace=False)
    measured = made.estimator.measure(made.task.loss, BATCH, indices)
    assert made.base.replica.digest() == before, "the weights are w(A) again, bit for bit"
    expected = np.array([made.slope(int(k)) for k in indices])
    scale = float(np.abs(expected).max())
    assert scale > 0.01
    np.testing.assert_allclose(measured.values, expected, rtol=0, atol=ROOM[kind] * scale)
    with torch.no_grad():
        assert measured.loss == pytest.approx(float(made.task.loss(BATCH)), rel=0.05)


@pytest.mark.parametrize("kind", ZEROTH_ORDER)
def test_each_direction_is_measured_from_the_base(tiny_model: Path, kind: EstimatorKind) -> None:
    """A direction's scalar does not depend on what was measured before it: the same bits."""
    made = Made(tiny_model, kind, "last:1")
    indices = np.array([3, 77, 100, 5])
    together = made.estimator.measure(made.task.loss, BATCH, indices).values
    alone = [
        made.estimator.measure(made.task.loss, BATCH, indices[i : i + 1]).values[0]
        for i in range(4)
    ]
    assert together.tolist() == alone


def test_forward_gradients_need_whole_weights(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"--weights copy, or start a run with"):
        Made(tiny_model, "forward", "last:1", Weights.LAYERWISE)


@pytest.mark.parametrize("kind", ["spsa", "one-sided", "forward"])
def test_passes_of_a_round(tiny_model: Path, kind: EstimatorKind) -> None:
    """Two a direction, one and one for all, or one."""
    made, calls = Made(tiny_model, kind, "name:^head"), 0

    def loss(batch: Sequence[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return made.task.loss(batch)

    made.estimator.measure(loss, BATCH, np.arange(5))
    assert calls == {"spsa": 10, "one-sided": 6, "forward": 5}[kind]


def test_the_curvature_that_directions_met(tiny_model: Path) -> None:
    """By its definition, from the same losses and one more; scalars and loss stay what they are."""
    made, calls = Made(tiny_model, "spsa", "name:^head"), 0
    assert isinstance(made.estimator, Spsa)
    indices, mu, losses = np.array([3, 77, 5]), 2.0**-9, []

    def loss(batch: Sequence[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        value = made.task.loss(batch)
        losses.append(float(value))
        return value

    measured = made.estimator.measure_curvature(loss, BATCH, indices)
    assert calls == 7
    above, below, here = losses[0:6:2], losses[1:6:2], losses[6]
    with torch.no_grad():
        assert here == float(made.task.loss(BATCH))
    expected = np.mean([(a + b - 2 * here) / mu**2 for a, b in zip(above, below, strict=True)])
    assert measured.curvature == pytest.approx(expected)
    plain = made.estimator.measure(made.task.loss, BATCH, indices)
    assert plain.curvature is None
    assert (plain.values.tolist(), plain.loss) == (measured.values.tolist(), measured.loss)


def test_the_curvature_of_a_quadratic() -> None:
    """zᵀHz in the units of an unscaled weight, whatever the direction's scale."""
    module = torch.nn.Linear(4, 1, bias=False)
    module.weight.data.zero_()
    manifest = Manifest((TensorSpec("weight", (1, 4), "float32", 1),))
    replica = CopyReplica.of(module, manifest, Pool((1, 2), POOL, 32))
    config = tiny.config("spsa", estimator={"perturbation_scale": 2.0**-4})
    bend = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def loss(batch: Sequence[int]) -> torch.Tensor:
        return 0.5 * (bend * module.weight[0] ** 2).sum() + module.weight.sum()

    measured = Spsa(replica, config).measure_curvature(loss, [0], np.arange(5))
    assert measured.curvature == pytest.approx(4 * 10.0)


@pytest.mark.parametrize("kind", ZEROTH_ORDER)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 1])
def test_a_loss_that_is_not_finite_restores_the_weights(
    tiny_model: Path, kind: EstimatorKind, bad: float, at: int
) -> None:
    made = Made(tiny_model, kind, "name:^head")
    before = made.base.replica.digest()
    calls = 0

    def loss(batch: Sequence[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        value = made.task.loss(batch)
        return value * bad if calls == at + 1 else value

    with pytest.raises(NonFiniteLoss, match=r"is (nan|inf|-inf)"):
        made.estimator.measure(loss, BATCH, np.array([1, 2]))
    assert made.base.replica.digest() == before
    assert calls == at + 1, "it stops there"


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_backprop_without_a_finite_gradient(tiny_model: Path, wrong: str) -> None:
    made = Made(tiny_model, "backprop", "name:^head")
    before = made.base.replica.digest()

    def loss(batch: Sequence[int]) -> torch.Tensor:
        value = made.task.loss(batch)
        if wrong == "loss":
            return value * float("nan")
        zero = value - value.detach()
        return 1.0 + torch.sqrt(zero.abs())  # finite, with an infinite slope

    with pytest.raises(NonFiniteLoss):
        made.estimator.measure(loss, BATCH, np.arange(POOL))
    assert made.base.replica.digest() == before
    fine = made.estimator.measure(made.task.loss, BATCH, np.arange(POOL))
    assert np.isfinite(fine.values).all()


def test_what_is_not_trained_is_frozen(tiny_model: Path) -> None:
    kinds: dict[EstimatorKind, type] = {
        "spsa": Spsa,
        "one-sided": OneSided,
        "forward": ForwardGradient,
        "backprop": Backprop,
    }
    for kind, of in kinds.items():
        made = Made(tiny_model, kind, "last:1")
        assert isinstance(made.estimator, of)
        asked = {n for n, p in made.base.loaded.module.named_parameters() if p.requires_grad}
        assert asked == (
            {spec.name for spec in made.base.identity.manifest.tensors}
            if kind == "backprop"
            else set()
        )


def test_the_bench_puts_it_together(tiny_model: Path, tiny_data: dict[str, Path]) -> None:
    made = Made(tiny_model, "spsa", "last:1")
    examples = data.load(tiny_data["hotels"], made.config.task)
    bench = ModelBench(made.base, made.config, examples)
    assert bench.examples == len(examples) == 160
    coefficients = np.zeros(POOL, np.int64)
    coefficients[3] = 2**24
    bench.replica.set(coefficients)
    values: NDArray[np.float64] = bench.measure(Order(np.array([0, 9]))).values
    assert values.shape == (2,)
    assert bench.measure(Order(np.array([0, 9]))).curvature is None
    assert bench.measure(Order(np.array([0, 9]), curvature=True)).curvature is not None
    assert bench.score().examples == 160
    assert np.array_equal(bench.replica.coefficients, coefficients)


def test_a_device_that_is_not_there() -> None:
    assert parse_device("cpu") == torch.device("cpu")
    for name in ("abacus", "cuda:99"):
        with pytest.raises(ConfigError, match="use cpu"):
            parse_device(name)
