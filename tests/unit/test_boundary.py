"""Kept hidden states change the cost of a pass and nothing else."""

import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from tests import tiny
from torch import nn

from lorand import layers
from lorand.config import ModelSection
from lorand_worker import model
from lorand_worker.bench import ModelBench, load_base
from lorand_worker.boundary import Boundary
from lorand_worker.cache import Limits
from lorand_worker.data import Examples
from lorand_worker.estimators import Order
from lorand_worker.heads import PooledClassifier
from lorand_worker.memory import Weights
from lorand_worker.model import LoadedModel
from lorand_worker.precision import Precision
from lorand_worker.tasks import Classification, Forward, Task


def base_of(folder: Path) -> LoadedModel:
    """A model with a head that answers something."""
    loaded = model.load(ModelSection(name="unused"), 2, folder)
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in loaded.module.named_parameters():
            if name in loaded.new_names:
                parameter.normal_(generator=source)
    return loaded


def examples() -> Examples:
    """Examples of many lengths."""
    content = tiny.rows("gadgets", 24, seed=5)
    texts = tuple(f"{text}{' very' * (i % 7)}" for i, (text, _) in enumerate(content))
    return Examples(texts, tuple(tiny.LABELS.index(label) for _, label in content))


@pytest.fixture(params=["encoder", "own", "roberta"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedModel:
    """Each kind of head."""
    return base_of(tiny.write_model(tmp_path / "model", request.param))


@pytest.mark.parametrize(
    ("rule", "depth"),
    [
        ("all", 0),
        ("last:3", 0),
        ("last:2", 1),
        ("last:1", 2),
        ("name:^head|classifier", 3),
        ("name:layer.1.output", 1),
        ("name:embeddings.LayerNorm", 0),
    ],
)
def test_logits_and_gradients_are_the_same(base: LoadedModel, rule: str, depth: int) -> None:
    if rule.startswith("name:^head") and not base.new_names:
        rule = "name:classifier"
    names = set(model.trainable_tensors(base, rule))
    kept = Classification(base, examples(), trainable=names, max_length=24)
    plain = Classification(
        base, examples(), trainable=set(dict(base.module.named_parameters())), max_length=24
    )
    assert kept._boundary.depth == depth
    assert plain._boundary.depth == 0
    for parameter_name, parameter in base.module.named_parameters():
        parameter.requires_grad_(parameter_name in names)
    for batch in ([0, 1, 2, 3, 4, 5, 6, 7], [9, 3, 1, 12, 23], [0, 1, 2]):
        expected, gradients = pass_of(base, plain, batch)
        found, others = pass_of(base, kept, batch)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=2e-6, rtol=1e-4)


def pass_of(
    base: LoadedModel, task: Classification, batch: list[int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a batch."""
    base.module.zero_grad()
    loss = task.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    pairs = base.module.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in pairs if p.grad is not None}


def count_runs(base: LoadedModel) -> list[int]:
    """Note the number of each encoder layer that runs, not of one that is skipped."""
    ran: list[int] = []
    layers: Any = base.module.encoder.encoder.layer  # type: ignore[union-attr]
    for number, layer in enumerate(layers):
        layer.attention.register_forward_hook(lambda *_, number=number: ran.append(number))
    return ran


def test_the_second_time_frozen_layers_do_not_run(tiny_model: Path) -> None:
    base = base_of(tiny_model)
    names = set(model.trainable_tensors(base, "last:1"))
    task = Classification(base, examples(), trainable=names, max_length=24)
    ran = count_runs(base)
    with torch.no_grad():
        task.loss([0, 1, 2])
        assert ran == [0, 1, 2], "what was not seen before stops at the boundary"
        ran.clear()
        task.loss([2, 0, 1])
        assert ran == [2]
        ran.clear()
        task.loss([0, 3])
        assert ran == [0, 1, 2], "only the new example"


@pytest.mark.parametrize("kind", ["spsa", "backprop"])
@pytest.mark.parametrize("limits", [None, Limits(0, 1 << 20), Limits(4000, 1 << 20)])
def test_frozen_layers_run_once_an_example_over_many_rounds(
    tiny_model: Path, kind: Literal["spsa", "backprop"], limits: Limits | None
) -> None:
    """Three epochs of rounds, and two evaluations: what counts is rows, not calls."""
    config = tiny.config(kind, directions={"pool_size": 64})
    base = load_base(config, tiny_model, "cpu")
    rows: list[int] = []
    frozen: Any = base.loaded.module.encoder.encoder.layer[1]  # type: ignore[union-attr, index]
    bench = ModelBench(base, config, examples(), forward=Forward(limits=limits or Limits()))
    frozen.attention.register_forward_hook(lambda _module, inputs, _: rows.append(len(inputs[0])))
    for position in range(9):
        bench.measure(Order(np.arange(64 if kind == "backprop" else 3)))
        bench.replica.set(np.full(64, 2**20 * position))
        if position in (4, 8):
            bench.score()
    assert sum(rows) == len(examples()) == 24


def test_with_no_cache_frozen_layers_run_once_a_round(tiny_model: Path) -> None:
    """All passes of a measurement share the prepared batch."""
    config = tiny.config("spsa", directions={"pool_size": 64})
    base = load_base(config, tiny_model, "cpu")
    bench = ModelBench(base, config, examples(), forward=Forward(limits=Limits(0, 0)))
    ran = count_runs(base.loaded)
    for _ in range(6):
        bench.measure(Order(np.arange(5)))
    assert ran.count(0) == ran.count(1)
    assert ran.count(2) == 10 * ran.count(0), "five directions of two passes each"


def test_layers_above_run_with_their_hooks_and_those_below_without(tiny_model: Path) -> None:
    """As replicas need it that make a layer's weights around its forward."""
    base = base_of(tiny_model)
    made: list[int] = []
    blocks: Any = base.module.encoder.encoder.layer  # type: ignore[union-attr]
    for number, block in enumerate(blocks):

        def around(forward: Any, *args: Any, number: int = number, **kwargs: Any) -> Any:
            made.append(number)
            return forward(*args, **kwargs)

        layers.intercept(block, around)
        block.register_forward_pre_hook(lambda *_, number=number: made.append(10 + number))
    names = set(model.trainable_tensors(base, "last:1"))
    task = Classification(base, examples(), trainable=names, max_length=24)
    assert task._boundary.depth == 2
    made.clear()
    with torch.no_grad():
        first = task.loss([0, 1])
        assert [m for m in made if m < 10] == [0, 1, 2]
        made.clear()
        task.loss([2, 3])
        made.clear()
        torch.testing.assert_close(task.loss([1, 0]), first)
    assert [m for m in made if m < 10] == [2]
    assert 12 in made


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
@pytest.mark.parametrize("kind", ["spsa", "backprop"])
def test_weights_made_layer_by_layer_give_the_same_scalars(
    tiny_model: Path, kind: Literal["spsa", "backprop"], precision: Precision
) -> None:
    """Boundary, precision and layerwise weights at once, at other weights than the base's."""
    config = tiny.config(kind, directions={"pool_size": 64}, model={"trainable": "last:2"})
    coefficients = np.random.default_rng(1).integers(-(2**26), 2**26, 64)
    found = []
    for weights in (Weights.COPY, Weights.LAYERWISE):
        base = load_base(config, tiny_model, "cpu", weights)
        source = random.Random(5)
        bench = ModelBench(base, config, examples(), source, Forward(precision))
        assert isinstance(bench._task, Task)
        assert bench._task._boundary.depth == 1
        bench.replica.set(coefficients)
        for _ in range(4):  # the second epoch starts at the boundary
            measured = bench.measure(Order(np.arange(64 if kind == "backprop" else 3)))
        found.append((measured.values, measured.loss, bench.score().loss))
    for copy, layerwise in zip(*found, strict=True):
        np.testing.assert_allclose(layerwise, copy, rtol=1e-5, atol=1e-6)


def test_after_a_failed_pass_the_layers_run_again(tiny_model: Path) -> None:
    """The shortcut is taken out whatever happens inside."""
    base = base_of(tiny_model)
    boundary = Boundary(base.module, {"head.weight"})
    hidden = torch.zeros(1, 4, 32)

    def fail_inside() -> None:
        with boundary.resume(hidden):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert all("forward" not in vars(layer) for layer in boundary.layers)


def test_nothing_stays_on_the_module(tiny_model: Path) -> None:
    base = base_of(tiny_model)
    boundary = Boundary(base.module, set(model.trainable_tensors(base, "last:1")))
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    boundary.verify(ids, mask)
    assert boundary.depth == 2
    assert boundary.states(ids, mask).shape == (2, 5, 32)
    for layer in boundary.layers:
        assert not layer._forward_hooks
        assert "forward" not in vars(layer)


# -- models in which a pass cannot start at the boundary -------------------------------------------


class Stack(nn.Module):
    """Two layers and a head; subclasses run them in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.head(self.body(self.embed(ids)).mean(dim=1)))

    def body(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layers[1](self.layers[0](hidden)))


class Repeated(Stack):
    """ALBERT's way: a layer's weights are used several times."""

    def body(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().body(super().body(hidden))


class Residual(Stack):
    """Embeddings run in every pass, so they may go past the boundary."""

    def body(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layers[1](self.layers[0](hidden) + hidden))


class Skipping(Stack):
    """A frozen layer's output goes past the boundary beside the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])

    def body(self, hidden: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = self.layers[0](hidden)
        return torch.as_tensor(self.layers[2](first + self.layers[1](first)))


class Pair(nn.Linear):
    """T5's way: a layer gives its bias to the next one."""

    def forward(self, hidden: torch.Tensor) -> Any:
        return super().forward(hidden), hidden


class Handing(Stack):
    """Layers that give more than hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Pair(4, 4), Pair(4, 4)])

    def body(self, hidden: torch.Tensor) -> torch.Tensor:
        middle, bias = self.layers[0](hidden)
        last: torch.Tensor = self.layers[1](middle + bias)[0]
        return last


class Flat(Stack):
    """Rows are not examples inside the stack."""

    def body(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().body(hidden.reshape(1, -1, 4)).reshape(hidden.shape)


@pytest.mark.parametrize(
    ("kind", "depth"),
    [(Stack, 1), (Residual, 1), (Repeated, 0), (Skipping, 0), (Handing, 0), (Flat, 0)],
)
def test_a_boundary_is_refused_where_passes_would_differ(kind: type[Stack], depth: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind()
    last = len(module.layers) - 1
    boundary = Boundary(module, {f"layers.{last}.weight"})
    assert boundary.depth == last
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    boundary.verify(ids, torch.ones_like(ids))
    assert boundary.depth == depth


def test_albert_is_refused() -> None:
    """Its one group of layers runs twelve times a pass."""
    config = transformers.AlbertConfig(
        vocab_size=50,
        hidden_size=16,
        embedding_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
    )
    encoder = transformers.AlbertModel(config, add_pooling_layer=False)
    module = PooledClassifier(encoder, 16, 2, 1.0).eval()
    boundary = Boundary(module, {"head.weight"})
    assert boundary.depth == 1
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    boundary.verify(ids, torch.ones_like(ids))
    assert boundary.depth == 0


def test_a_model_without_layers_keeps_nothing() -> None:
    assert Boundary(nn.Linear(2, 2), {"weight"}).depth == 0
