"""The task: loss in groups, padding, score, precision, and where hidden states are kept."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests import tiny

from lorand.config import ModelSection
from lorand_worker import cache, model
from lorand_worker.cache import Limits
from lorand_worker.data import Examples
from lorand_worker.model import LoadedModel
from lorand_worker.precision import Precision
from lorand_worker.tasks import Classification, Forward


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
    base: LoadedModel,
    trainable: str = "all",
    max_length: int = 24,
    data: Examples | None = None,
    forward: Forward | None = None,
) -> Classification:
    """The task on examples."""
    names = set(model.trainable_tensors(base, trainable))
    return Classification(
        base, data or examples(), trainable=names, max_length=max_length, forward=forward
    )


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


LIMITS = [Limits(0, 0), Limits(0, 1 << 24), Limits(3000, 0), Limits(3000, 5000), Limits(3000)]


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
@pytest.mark.parametrize("limits", LIMITS)
def test_where_states_are_kept_changes_no_answer(
    base: LoadedModel, limits: Limits, precision: Precision, tmp_path: Path
) -> None:
    batches = [[0, 1], [2, 3], [0, 2], [3, 1]] * 2
    limits = dataclasses.replace(limits, folder=tmp_path)
    whole = classification(base, "last:1", forward=Forward(precision))
    limited = classification(base, "last:1", forward=Forward(precision, limits))
    # bfloat16 has eight bits; what an example is padded with may change the last of them.
    tolerance = 2e-6 if precision is Precision.FLOAT32 else 2e-2
    with torch.no_grad():
        for batch in batches:
            expected, found = whole.loss(batch), limited.loss(batch)
            assert float(found) == pytest.approx(float(expected), abs=tolerance)
        assert limited.score().loss == pytest.approx(whole.score().loss, abs=tolerance)
    assert limited._cache.memory_bytes <= (limits.memory_bytes or 0)
    assert limits.disk_bytes is None or limited._cache.disk_bytes <= limits.disk_bytes
    assert not list(tmp_path.iterdir()), "nothing with a name is on the disk"


def test_a_full_disk_costs_time_and_nothing_else(
    base: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_nameless_file", lambda folder: io.FileIO("/dev/full", "r+"))
    plain = classification(base, "last:1")
    task = classification(base, "last:1", forward=Forward(limits=Limits(0, 1 << 20, tmp_path)))
    with torch.no_grad():
        for batch in ([0, 1, 2], [3, 4], [2, 1, 0]):
            torch.testing.assert_close(task.loss(batch), plain.loss(batch))


def test_an_evaluation_leaves_what_was_kept(base: LoadedModel) -> None:
    """Held-out examples are another task's, with a cache of its own; nothing is ever evicted."""
    task = classification(base, "last:1", forward=Forward(limits=Limits(3000, 0)))
    with torch.no_grad():
        task.loss([5, 6])
        kept = [task._cache.get(i) for i in (5, 6)]
        assert kept[0] is not None
        task.score()
    assert [task._cache.get(i) for i in (5, 6)] == kept


def test_kept_states_are_those_of_an_example_alone(base: LoadedModel) -> None:
    """Up to the rounding that padding and company cause."""
    task = classification(base, "last:1")
    for i, state in enumerate(task._hidden(range(40))):
        length = len(task._ids[i])
        alone = task._boundary.states(*task._pad_ids([i]))[0]
        torch.testing.assert_close(state[:length], alone, atol=2e-6, rtol=1e-5)
        assert not state[length:].any()


def test_bfloat16_passes_give_a_float32_loss(base: LoadedModel) -> None:
    """Weights stay what they are; gradients are float32 and near."""
    batch = list(range(12))
    plain = classification(base, "last:1")
    task = classification(base, "last:1", forward=Forward(Precision.BFLOAT16))
    losses, gradients = [], []
    for of in (plain, task):
        base.module.zero_grad()
        loss = of.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        found = [p.grad.flatten() for p in base.module.parameters() if p.grad is not None]
        losses.append(loss.detach())
        gradients.append(torch.cat(found))
    assert losses[1].dtype == gradients[1].dtype == torch.float32
    assert losses[0] != losses[1], "it is another computation"
    torch.testing.assert_close(losses[1], losses[0], atol=0.02, rtol=0.0)
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999
    assert {p.dtype for p in base.module.parameters()} == {torch.float32}


def test_a_batch_is_prepared_once_a_measurement(base: LoadedModel) -> None:
    task = classification(base)
    prepared: list[int] = []
    original = task._pad_ids

    def count(batch: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        prepared.extend(batch)
        return original(batch)

    task._pad_ids = count  # type: ignore[method-assign]
    with torch.no_grad():
        for _ in range(5):
            task.loss([4, 2, 9])
        assert sorted(prepared) == [2, 4, 9]
        task.loss([4, 2])
    assert sorted(prepared) == [2, 2, 4, 4, 9]
