"""The task: loss in groups, padding, score, and the limit on kept hidden states."""

from pathlib import Path

import pytest
import torch
from tests import tiny

from lorand.config import ModelSection
from lorand_worker import model, tasks
from lorand_worker.data import Examples
from lorand_worker.model import LoadedModel
from lorand_worker.tasks import Classification


@pytest.fixture
def base(tiny_model: Path) -> LoadedModel:
    """The tiny model with a head that answers something."""
    loaded = model.load(ModelSection(name="unused"), 2, tiny_model)
    with torch.no_grad():
        head = dict(loaded.module.named_parameters())["head.weight"]
        head.normal_(generator=torch.Generator().manual_seed(3))
    return loaded


def examples(count: int = 40) -> Examples:
    """Examples of many lengths."""
    content = tiny.rows("hotels", count, seed=5)
    texts = tuple(f"{text}{' very' * (i % 13)}" for i, (text, _) in enumerate(content))
    return Examples(texts, tuple(tiny.LABELS.index(label) for _, label in content))


def classification(
    base: LoadedModel, trainable: str = "all", max_length: int = 24, data: Examples | None = None
) -> Classification:
    """The task on examples."""
    names = set(model.trainable_tensors(base, trainable))
    return Classification(base, data or examples(), trainable=names, max_length=max_length)


def one_by_one(base: LoadedModel, data: Examples, batch: list[int]) -> float:
    """The mean loss, each example alone: no padding, no groups, nothing kept."""
    losses = []
    for i in batch:
        encoded = base.tokenizer([data.texts[i]], return_tensors="pt")
        with torch.no_grad():
            answer = base.module(encoded["input_ids"], encoded["attention_mask"])
        target = torch.tensor([data.labels[i]])
        losses.append(float(torch.nn.functional.cross_entropy(answer, target)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("trainable", ["all", "last:1", "name:^head"])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 40])
def test_groups_give_the_mean_loss(base: LoadedModel, trainable: str, size: int) -> None:
    """Whatever the batch is cut into, and whether the hidden states were kept or not."""
    task = classification(base, trainable)
    batch = list(range(39, 39 - size, -1))
    expected = one_by_one(base, examples(), batch)
    for _ in range(2):
        with torch.no_grad():
            assert float(task.loss(batch)) == pytest.approx(expected, abs=2e-6)


def test_score_is_over_all_examples(base: LoadedModel) -> None:
    data = examples(70)  # more than one batch of the evaluation
    task = classification(base, "last:1", data=data)
    score = task.score()
    assert score.examples == len(task) == 70
    assert score.loss == pytest.approx(one_by_one(base, data, list(range(70))), abs=2e-6)
    correct = sum(score_of(base, text) == label for text, label in zip(*_pair(data), strict=True))
    assert score.accuracy == pytest.approx(correct / 70)


def _pair(data: Examples) -> tuple[tuple[str, ...], tuple[int, ...]]:
    return data.texts, data.labels


def score_of(base: LoadedModel, text: str) -> int:
    """The label the model gives a text."""
    encoded = base.tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        return int(base.module(encoded["input_ids"], encoded["attention_mask"]).argmax())


def test_long_texts_are_cut(base: LoadedModel) -> None:
    long = Examples(("lovely " * 200,), (1,))
    short = Examples(("lovely " * 6,), (1,))  # with [CLS] and [SEP]: 8 tokens
    with torch.no_grad():
        cut = classification(base, max_length=8, data=long).loss([0])
        assert torch.equal(cut, classification(base, max_length=8, data=short).loss([0]))


def test_beyond_the_memory_limit_states_are_computed_each_time(
    base: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit bounds memory; the answers stay the same."""
    batches = [[0, 1], [2, 3], [0, 2]] * 2
    whole, limited = (classification(base, "last:1") for _ in range(2))
    with torch.no_grad():
        expected = [whole.loss(batch) for batch in batches]
        monkeypatch.setattr(tasks, "CACHE_BYTES", 1)
        for batch, loss in zip(batches, expected, strict=True):
            torch.testing.assert_close(limited.loss(batch), loss)
    assert len(whole._kept) == 4
    assert len(limited._kept) == 2, "the first batch went over the limit"
