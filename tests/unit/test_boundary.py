"""Kept hidden states change the cost of a pass and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from torch import nn

from lorand.config import ModelSection
from lorand_worker import model
from lorand_worker.boundary import Boundary
from lorand_worker.data import Examples
from lorand_worker.model import LoadedModel
from lorand_worker.tasks import Classification


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


def test_the_second_time_frozen_layers_do_not_run(tiny_model: Path) -> None:
    base = base_of(tiny_model)
    names = set(model.trainable_tensors(base, "last:1"))
    task = Classification(base, examples(), trainable=names, max_length=24)
    ran: list[int] = []
    layers: Any = base.module.encoder.encoder.layer  # type: ignore[union-attr]
    for number, layer in enumerate(layers):
        layer.attention.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad():
        task.loss([0, 1, 2])
        assert ran == [0, 1, 2, 2], "once to keep, then from the boundary"
        ran.clear()
        task.loss([2, 0, 1])
        assert ran == [2]
        ran.clear()
        task.loss([0, 3])
        assert ran == [0, 1, 2, 2], "only the new example"


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


def test_a_model_without_layers_keeps_nothing() -> None:
    assert Boundary(nn.Linear(2, 2), {"weight"}).depth == 0
