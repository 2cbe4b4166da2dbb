"""The experiments' short cut gives the losses of the model's own forward pass."""

from pathlib import Path

import pytest
import torch
from experiments import packing, quick
from tests import tiny

from lorand.config import ModelSection
from lorand_worker import model
from lorand_worker.data import Examples
from lorand_worker.model import LoadedModel
from lorand_worker.tasks import Classification

SECTION = ModelSection(name="unused", trainable="last:1", max_length=32)
BATCH = [3, 0, 11, 7, 5]


@pytest.fixture
def base(tmp_path: Path) -> LoadedModel:
    """A model with a head that answers something."""
    loaded = model.load(SECTION, 2, tiny.write_model(tmp_path / "model"))
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.trainable_tensors(loaded, SECTION.trainable).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
    return loaded


def examples(seed: int) -> Examples:
    """Examples of many lengths."""
    content = tiny.rows("gadgets", 24, seed=seed)
    texts = tuple(f"{text}{' very' * (i % 7)}" for i, (text, _) in enumerate(content))
    return Examples(texts, tuple(tiny.LABELS.index(label) for _, label in content))


def own_loss(base: LoadedModel, shard: Examples) -> Classification:
    """The task as a worker has it."""
    trainable = set(model.trainable_tensors(base, SECTION.trainable))
    return Classification(base, shard, trainable=trainable, max_length=SECTION.max_length)


def test_loss_is_the_models_own_up_to_bfloat16(base: LoadedModel) -> None:
    shard = examples(5)
    upper = quick.Upper(base.module, 1, lambda: None)
    loss = quick.alone(upper, packing.texts(base, shard, SECTION))
    with torch.no_grad():
        assert float(loss(BATCH)) == pytest.approx(
            float(own_loss(base, shard).loss(BATCH)), abs=0.02
        )


def test_a_pass_together_is_the_passes_alone(base: LoadedModel) -> None:
    parts = [packing.texts(base, examples(seed), SECTION) for seed in (5, 6)]
    upper = quick.Upper(base.module, 1, lambda: None)
    drawn = [BATCH, [1, 2, 20]]
    with torch.no_grad():
        shared = quick.together(upper, parts, [lambda: drawn[0], lambda: drawn[1]])
        for (loss, batches), part, indices in zip(shared, parts, drawn, strict=True):
            assert batches() == indices
            assert float(loss(indices)) == pytest.approx(
                float(quick.alone(upper, part)(indices)), abs=0.02
            )


def test_gradients_reach_the_models_parameters(base: LoadedModel) -> None:
    shard = examples(5)
    upper = quick.Upper(base.module, 1, lambda: None)
    loss = quick.alone(upper, packing.texts(base, shard, SECTION))
    tensors = model.trainable_tensors(base, SECTION.trainable)
    gradients = []
    for measured in (loss, own_loss(base, shard).loss):
        for parameter in base.module.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        measured(BATCH).backward()  # type: ignore[no-untyped-call]
        parts = [tensor.grad for tensor in tensors.values() if tensor.grad is not None]
        gradients.append(torch.cat([part.reshape(-1) for part in parts]))
    ours, own = gradients
    assert torch.nn.functional.cosine_similarity(ours, own, dim=0) > 0.98
