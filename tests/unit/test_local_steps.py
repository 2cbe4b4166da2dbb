"""Steps on a participant's own data, against plain loops on their definition (FedKSeed, Ferret)."""

import sys
from collections.abc import Callable, Sequence
from math import ceil, sqrt
from typing import Any, Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests import tiny
from torch import nn

from lorand.config import RunConfig
from lorand.directions import Pool
from lorand.errors import ConfigError
from lorand.kernels.reference import ReferenceBackend
from lorand.layerwise import LayerwiseReplica
from lorand.manifest import Manifest, TensorSpec
from lorand.replica import CopyReplica, Replica
from lorand_worker import local_steps, stepping
from lorand_worker.estimators import NonFiniteLoss, Order

pytestmark = pytest.mark.usefixtures("one_thread")

POOL: Final = 64
QUANTUM: Final = 2.0**-32
STARTS_AT: Final = np.random.default_rng(3).integers(-(2**26), 2**26, POOL)
INPUTS: Final = torch.from_numpy(np.random.default_rng(4).normal(0, 1, (20, 5))).float()
TARGETS: Final = torch.from_numpy(np.random.default_rng(5).normal(0, 1, (20, 2))).float()


class Made:
    """A linear layer of twelve weights that fits twenty pairs, somewhere in a run."""

    def __init__(
        self,
        config: RunConfig,
        *,
        layerwise: bool = False,
        key: tuple[int, int] = (1, 2),
        scale_exponents: tuple[int, int] = (1, 0),
    ) -> None:
        """Stand away from zero coefficients."""
        self.config = config
        self.module = nn.Sequential(nn.Linear(5, 2))
        for parameter in self.module.parameters():
            steps = torch.arange(parameter.numel()) * 37 % 251 - 125
            parameter.data = steps.reshape(parameter.shape) / 512
        bias, weight = scale_exponents
        manifest = Manifest(
            (
                TensorSpec("0.bias", (2,), "float32", bias),
                TensorSpec("0.weight", (2, 5), "float32", weight),
            )
        )
        pool = Pool(key, POOL, 32)
        self.replica: Replica
        if layerwise:
            self.replica = LayerwiseReplica(self.module, manifest, pool, ReferenceBackend())
        else:
            self.replica = CopyReplica.of(self.module, manifest, pool)
        self.replica.set(STARTS_AT)
        self.work = local_steps.build(config, self.replica, self.module)
        self.batches: list[list[int]] = []

    def loss(self, batch: Sequence[int]) -> torch.Tensor:
        """Mean squared error of a batch."""
        rows = list(batch)
        value: torch.Tensor = ((self.module(INPUTS[rows]) - TARGETS[rows]) ** 2).mean()
        return value

    def batch(self) -> list[int]:
        """Another eight of the twenty."""
        self.batches.append([(8 * len(self.batches) + i) % 20 for i in range(8)])
        return self.batches[-1]

    def do(self, order: Order, loss: Callable[[Sequence[int]], torch.Tensor] | None = None) -> Any:
        """Do a round's work."""
        return self.work.do(loss or self.loss, self.batch, order, 20)

    def weights(self) -> dict[str, NDArray[np.float64]]:
        """The weights now, as float64."""
        return {name: t.double().numpy() for name, t in self.replica.weights()}


def config_of(kind: Any = "spsa", each: int = 1, **changes: dict[str, Any]) -> RunConfig:
    sections: tiny.Settings = {
        "directions": {"pool_size": POOL},
        "estimator": {"directions_per_round": each, "perturbation_scale": 2.0**-8},
        "optimizer": {"schedule": "constant"},
    }
    for section, values in changes.items():
        sections.setdefault(section, {}).update(values)
    return tiny.config(kind, **sections)


def drawn(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(6).permutation(POOL)[:count]


# ------------------------------------------------------------- steps on coefficients


def test_steps_of_one_direction_are_fedkseeds() -> None:
    """Algorithm 1: measure z at w, then w −= η g z, one step after the other, on fresh batches."""
    config = config_of(local={"steps": 12, "learning_rate": 0.01})
    made, plain = Made(config), Made(config_of())
    indices = drawn(12)
    before = made.replica.digest()
    measured = made.do(Order(indices))
    assert made.replica.digest() == before
    a, losses = STARTS_AT.copy(), []
    for number, k in enumerate(indices.tolist()):
        plain.replica.set(a)
        g = plain.work.do(plain.loss, plain.batch, Order(np.array([k])), 20)
        assert g.loss is not None
        losses.append(g.loss)
        a = a.copy()
        a[k] += round(-0.01 * g.values[0] / QUANTUM)
        assert made.batches[number] == plain.batches[number]
    way = (a - STARTS_AT)[indices] * QUANTUM
    np.testing.assert_allclose(-measured.values, way, rtol=0, atol=2 * QUANTUM)
    assert np.abs(way).min() > 1e-5
    assert measured.loss == pytest.approx(np.mean(losses))


@pytest.mark.parametrize("layerwise", [False, True], ids=["copy", "layerwise"])
def test_a_direction_is_measured_where_the_walk_stands(layerwise: bool) -> None:
    """At coefficients that steps before have moved, which nobody sees outside of the round."""
    made = Made(config_of(local={"steps": 4, "learning_rate": 0.05}, each=2), layerwise=layerwise)
    seen: list[list[int]] = []
    measure = made.work._estimator.measure  # type: ignore[attr-defined]

    def noted(loss: Any, batch: Any, indices: NDArray[np.int64]) -> Any:
        seen.append((made.replica.coefficients - STARTS_AT).tolist())
        return measure(loss, batch, indices)

    made.work._estimator.measure = noted  # type: ignore[attr-defined]
    indices = drawn(8)
    measured = made.do(Order(indices))
    for number, moved in enumerate(seen):
        visited = indices[: 2 * number]
        assert set(np.flatnonzero(moved).tolist()) == set(visited.tolist())
        way = np.array(moved)[visited] * QUANTUM
        np.testing.assert_allclose(-measured.values[: 2 * number], way, atol=QUANTUM)
    assert made.replica.coefficients.tolist() == STARTS_AT.tolist()


def test_steps_of_backward_passes_measure_the_whole_pool() -> None:
    """w −= rate · (1/K) Σ g_k z_k, each step."""
    config = config_of("backprop", local={"steps": 3, "learning_rate": 0.1})
    made, plain = Made(config), Made(config_of("backprop"))
    measured = made.do(Order(np.arange(POOL)))
    a = STARTS_AT.astype(np.float64)
    for _ in range(3):
        plain.replica.set(np.rint(a).astype(np.int64))
        g = plain.work.do(plain.loss, plain.batch, Order(np.arange(POOL)), 20)
        a = a - 0.1 / POOL * g.values / QUANTUM
    np.testing.assert_allclose(-measured.values, (a - STARTS_AT) * QUANTUM, atol=1e-8)
    assert made.batches == plain.batches


@pytest.mark.parametrize("each", [1, 4, 16])
def test_adams_learning_rate_is_the_change_of_a_weight(each: int) -> None:
    """Root mean square of the first step over unscaled weights: √Σ ΔA_k², however many it takes."""
    config = config_of(each=each, local={"steps": 1, "learning_rate": 0.003, "optimizer": "Adam"})
    measured = Made(config).do(Order(drawn(each)))
    assert sqrt(np.sum(measured.values**2)) == pytest.approx(0.003, rel=1e-3)
    config = config_of("backprop", local={"steps": 1, "learning_rate": 0.003, "optimizer": "Adam"})
    measured = Made(config).do(Order(np.arange(POOL)))
    assert sqrt(np.sum(measured.values**2)) == pytest.approx(0.003, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 3])
def test_adams_unit_is_that_of_a_step_and_not_of_the_round(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More steps do not make the first one shorter."""
    config = config_of(each=2, local={"steps": steps, "learning_rate": 0.003, "optimizer": "Adam"})
    made = Made(config)
    places: list[NDArray[np.int64]] = []
    adopt = made.replica.set

    def noted(coefficients: NDArray[np.int64]) -> None:
        places.append(coefficients - STARTS_AT)
        adopt(coefficients)

    monkeypatch.setattr(made.replica, "set", noted)
    made.do(Order(drawn(2 * steps)))
    assert sqrt(np.sum((places[0] * QUANTUM) ** 2)) == pytest.approx(0.003, rel=1e-3)


def test_importance_multiplies_the_scalars() -> None:
    config = config_of(each=3, local={"steps": 1, "learning_rate": 0.01})
    plain = Made(config).do(Order(drawn(3))).values
    factors = np.array([2.0, 0.5, 1.0])
    np.testing.assert_allclose(
        Made(config).do(Order(drawn(3), factors)).values, factors * plain, atol=1e-9
    )


@pytest.mark.parametrize(("examples", "batch_size", "epochs"), [(20, 8, 1), (20, 8, 3), (5, 8, 2)])
def test_an_epoch_is_as_many_batches_as_hold_the_data(
    examples: int, batch_size: int, epochs: int
) -> None:
    config = config_of("backprop", estimator={"batch_size": batch_size}, local={"epochs": epochs})
    assert stepping.steps(config, examples) == epochs * ceil(examples / batch_size)
    made = Made(config)
    made.work.do(made.loss, made.batch, Order(np.arange(POOL)), examples)
    assert len(made.batches) == epochs * ceil(examples / batch_size)


def test_the_schedule_is_of_the_local_rate() -> None:
    config = config_of(
        run={"rounds": 4},
        local={"steps": 1, "learning_rate": 0.8},
        optimizer={"schedule": "linear"},
    )
    assert [stepping.rate(config, n) for n in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    ways = [Made(config).do(Order(drawn(1), committed=n)).values[0] for n in (0, 3)]
    assert ways[1] == pytest.approx(ways[0] / 4, rel=1e-5)


def test_the_optimizers_state_lives_for_one_round() -> None:
    options = {"momentum": 0.9, "nesterov": True}
    made = Made(config_of(each=2, local={"steps": 3, "options": options}))
    first = made.do(Order(drawn(6)))
    made.batches.clear()
    assert made.do(Order(drawn(6))).values.tolist() == first.values.tolist()


# ------------------------------------------------------------- steps on weights

WEIGHTS: Final[dict[str, Any]] = {"space": "weights", "learning_rate": 0.05}


def walked(made: Made, steps: int, **options: Any) -> dict[str, NDArray[np.float64]]:
    """Δ of a torch optimizer from the same weights on the same batches, no replica near."""
    module = nn.Sequential(nn.Linear(5, 2))
    start = {name: values.copy() for name, values in made.weights().items()}
    for name, parameter in module.named_parameters():
        parameter.data = torch.from_numpy(start[name]).float()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, **options)
    for _ in range(steps):
        rows = made.batch()
        ((module(INPUTS[rows]) - TARGETS[rows]) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().double().numpy() - start[n] for n, p in module.named_parameters()}


def lifted(made: Made, values: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Where −values, as coefficients, would lead: Z·γ."""
    start = made.replica.coefficients
    before = {name: weights.copy() for name, weights in made.weights().items()}
    made.replica.set(start + np.rint(-values / QUANTUM).astype(np.int64))
    after = {name: weights.copy() for name, weights in made.weights().items()}
    made.replica.set(start)
    return {name: after[name] - before[name] for name in after}


def test_what_weights_moved_is_right_on_average_over_pools() -> None:
    """E[Z γ] = Δ (Ferret, eq. 6 and 7), with direction scales divided out."""
    local = {**WEIGHTS, "steps": 3, "options": {"momentum": 0.5}}
    expected = walked(at_zero(Made(config_of("backprop"))), 3, momentum=0.5)
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in expected}
    for seed in range(200):
        made = at_zero(Made(config_of("backprop", local=local), key=(seed, 9)))
        for name, delta in lifted(made, made.do(Order(np.arange(POOL))).values).items():
            found[name].append(delta)
    for name, delta in expected.items():
        off = np.mean(found[name], axis=0) - delta
        assert np.all(np.abs(off) < 4 * np.std(found[name], axis=0) / sqrt(200) + 1e-6), name
        assert np.abs(off).max() < np.abs(delta).max() / 2, name


def at_zero(made: Made) -> Made:
    """At the base weights, which are the same whatever the pool is."""
    made.replica.set(np.zeros(POOL, np.int64))
    return made


@pytest.mark.parametrize("scale", [0, 3, -2])
def test_a_tensor_of_one_block_is_lifted_exactly(scale: int) -> None:
    """Ten weights on 64 directions: rows of Z are orthogonal, so that Z γ = Δ, at any scale."""
    config, scales = config_of("backprop", local={**WEIGHTS, "steps": 2}), (scale, scale)
    made = Made(config, scale_exponents=scales)
    assert isinstance(made.replica, CopyReplica)
    drift = made.replica.drift

    def of_the_weight() -> Any:
        return ((n, d if n == "0.weight" else torch.zeros_like(d)) for n, d in drift())

    made.replica.drift = of_the_weight  # type: ignore[method-assign]
    values = made.do(Order(np.arange(POOL))).values
    expected = walked(Made(config, scale_exponents=scales), 2)["0.weight"]
    np.testing.assert_allclose(lifted(made, values)["0.weight"], expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-2


def test_after_steps_on_weights_the_replica_is_at_its_coefficients() -> None:
    """Bit for bit; the next round walks from there with an optimizer that knows nothing."""
    local = {**WEIGHTS, "steps": 3, "optimizer": "AdamW"}
    made = Made(config_of("backprop", local=local))
    before = made.replica.digest()
    first = made.do(Order(np.arange(POOL)))
    assert made.replica.digest() == before
    assert all(p.grad is None for p in made.module.parameters())
    made.batches.clear()
    again = made.do(Order(np.arange(POOL)))
    assert again.values.tolist() == first.values.tolist()
    with torch.no_grad():  # a pass right after the work is at w(A) too
        there = Made(config_of("backprop", local=local)).loss(range(20))
        assert float(made.loss(range(20))) == float(there)


# ------------------------------------------------------------- what cannot go on

SPACES: Final = [
    ("spsa", {"steps": 3}),
    ("backprop", {"steps": 3}),
    ("backprop", {**WEIGHTS, "steps": 3}),
]


@pytest.mark.parametrize(("kind", "local"), SPACES, ids=["spsa", "seeds", "weights"])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite_leaves_the_weights(
    kind: str, local: dict[str, Any], at: int
) -> None:
    made, calls = Made(config_of(kind, local=local)), 0

    def loss(batch: Sequence[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return made.loss(batch) * (float("nan") if calls == at + 1 else 1.0)

    before = made.replica.digest()
    order = Order(drawn(3) if kind == "spsa" else np.arange(POOL))
    if at < 3 or kind == "spsa":
        with pytest.raises(NonFiniteLoss, match="is nan"):
            made.do(order, loss)
    assert made.replica.digest() == before
    assert made.replica.coefficients.tolist() == STARTS_AT.tolist()
    made.batches.clear()
    fine = Made(config_of(kind, local=local)).do(order).values
    assert made.do(order).values.tolist() == fine.tolist()


@pytest.mark.parametrize(("kind", "local"), SPACES, ids=["spsa", "seeds", "weights"])
@pytest.mark.parametrize("rate", [1e6, 1e18, 1e30])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_walk_that_runs_away_sits_out(kind: str, local: dict[str, Any], rate: float) -> None:
    """Too far for 64-bit quanta is no error that ends the worker."""
    made = Made(config_of(kind, local={**local, "learning_rate": rate}))
    before = made.replica.digest()
    with pytest.raises(NonFiniteLoss, match=r"local steps moved|is (nan|inf)|not finite"):
        made.do(Order(drawn(3) if kind == "spsa" else np.arange(POOL)))
    assert made.replica.digest() == before
    assert made.replica.coefficients.tolist() == STARTS_AT.tolist()


WRONG: Final = [
    ({"optimizer": "NoSuchThing"}, "neither in torch.optim nor in pytorch_optimizer"),
    ({"optimizer": "lr_scheduler"}, "neither in torch.optim nor in pytorch_optimizer"),
    ({"optimizer": "LBFGS"}, "cannot step on a tensor of shape"),
    ({"optimizer": "SparseAdam"}, "cannot step on a tensor of shape"),
    ({"optimizer": "Optimizer"}, "does not take local.options"),
    ({"options": {"momentums": 0.9}}, "does not take local.options"),
    ({"options": {"momentum": -1.0}}, "does not take local.options"),
    ({"options": {"lr": 1.0}}, "does not take local.options"),
]


@pytest.mark.parametrize(("changes", "why"), WRONG, ids=[str(change) for change, _ in WRONG])
@pytest.mark.parametrize("space", ["seeds", "weights"])
def test_optimizers_that_cannot_be_used_are_refused_at_join(
    changes: dict[str, Any], why: str, space: str
) -> None:
    with pytest.raises(ConfigError, match=why.replace(".", r"\.")):
        Made(config_of("backprop", local={"steps": 2, "space": space, **changes}))


@pytest.mark.parametrize("space", ["seeds", "weights"])
def test_an_optimizer_of_matrices_is_refused_where_there_are_others(space: str) -> None:
    """Coefficients are a vector, and so is a bias."""
    with pytest.raises(ConfigError, match=r"local\.optimizer = 'Muon'"):
        Made(config_of("backprop", local={"steps": 1, "space": space, "optimizer": "Muon"}))


def test_optimizers_of_another_library_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name they have there; without the library the error says what to install."""

    class Halving(torch.optim.SGD):
        pass

    library = type(sys)("pytorch_optimizer")
    library.Halving = Halving  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", library)
    made = Made(config_of(local={"steps": 2, "optimizer": "Halving", "learning_rate": 0.01}))
    expected = Made(config_of(local={"steps": 2, "learning_rate": 0.01})).do(Order(drawn(2)))
    assert made.do(Order(drawn(2))).values.tolist() == expected.values.tolist()
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ConfigError, match=r"pip install 'lorand\[optimizers"):
        Made(config_of(local={"steps": 2, "optimizer": "Halving"}))


@pytest.mark.parametrize("name", ["Lion", "Prodigy", "ScheduleFreeAdamW"])
def test_optimizers_of_pytorch_optimizer_walk(name: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    local = {"steps": 2, "optimizer": name, "learning_rate": 0.01}
    values = Made(config_of("backprop", local=local)).do(Order(np.arange(64))).values
    assert np.isfinite(values).all()
    assert values.any()


def test_steps_on_weights_need_whole_weights() -> None:
    config = config_of("backprop", local={**WEIGHTS, "steps": 1})
    with pytest.raises(ConfigError, match="join with --weights copy"):
        Made(config, layerwise=True)


def test_what_is_not_trained_is_frozen() -> None:
    for kind, local in SPACES:
        made = Made(config_of(kind, local=local))
        assert {p.requires_grad for p in made.module.parameters()} == {kind == "backprop"}
