"""A worker's data file, and the batches drawn from it."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorand.config import TaskSection
from lorand.errors import DataError
from lorand_worker.data import Examples, Pairs, PoissonSampler, Sampler, load, missing_labels

TASK = TaskSection(labels=("bad", "good", "7"))


def written(folder: Path, name: str, content: str | bytes) -> Path:
    """A data file with this content."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\n"one, ""quoted""\nline",good\nÜber, bad \n'),
        ("a.csv", '\ufefftext,label\r\n"one, ""quoted""\nline",good\r\nÜber,bad\r\n'),
        ("a.csv", 'id,label,text\n1,good,"one, ""quoted""\nline"\n2,bad,Über\n'),
        ("a.TSV", 'text\tlabel\n"one, ""quoted""\nline"\tgood\nÜber\tbad\n'),
        (
            "a.jsonl",
            '{"text": "one, \\"quoted\\"\\nline", "label": "good"}\n\n'
            '{"label": "bad", "text": "Über", "more": [1]}\n',
        ),
    ],
)
def test_the_formats(tmp_path: Path, name: str, content: str) -> None:
    examples = load(written(tmp_path, name, content), TASK)
    assert examples == Examples(('one, "quoted"\nline', "Über"), (1, 0))
    assert len(examples) == 2
    assert missing_labels(examples, TASK) == ["7"]


def test_columns_can_be_named_and_labels_be_numbers(tmp_path: Path) -> None:
    task = TASK.model_copy(update={"text_column": "review", "label_column": "stars"})
    path = written(tmp_path, "a.jsonl", '{"review": "x", "stars": 7}\n')
    assert load(path, task) == Examples(("x",), (2,))
    assert missing_labels(load(path, task), task) == ["bad", "good"]


@pytest.mark.parametrize(
    ("name", "content", "sentences"),
    [
        ("a.csv", "", ["holds no examples"]),
        ("a.csv", "text,label\n", ["holds no examples; give a file with at least one"]),
        ("a.jsonl", "\n", ["holds no examples"]),
        ("a.csv", "txt,label\nx,good\n", ["line 2", "'text' and 'label'", "'txt'", "rename them"]),
        ("a.csv", "text;label\nx;good\n", ["'text;label'", "task.text_column"]),
        ("a.csv", "text,label\nx\n", ["line 2", "are needed"]),
        ("a.csv", "text,label\nx,good\ny,fine\n", ["line 3: the label 'fine' is not", "bad, good"]),
        ("a.csv", 'text,label\n" ",good\n', ["line 2: the text is empty; remove the line"]),
        ("a.csv", b"text,label\n\xff,good\n", ["cannot read the data file", "utf-8"]),
        ("a.csv", 'text,label\n"x,good\n', ["cannot read the data file", "unexpected end"]),
        ("a.csv", "text,label\n" + "x" * 200_000 + ",good\n", ["field larger than"]),
        ("a.jsonl", '{"text": "x"', ["line 1: not JSON"]),
        ("a.jsonl", "[1]\n", ["line 1: each line must be one JSON object"]),
        ("a.jsonl", '{"text": "x"}\n', ["line 1", "'label' are needed"]),
        ("a.txt", "text,label\n", ["must end in .csv, .tsv or .jsonl"]),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, name: str, content: str | bytes, sentences: list[str]
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        load(path, TASK)
    assert caught.value.exit_code == 3
    for sentence in [str(path), *sentences]:
        assert sentence in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the data file .*none\.csv"):
        load(tmp_path / "none.csv", TASK)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="cannot read the data file"):
        load(tmp_path / "folder.csv", TASK)


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorand_worker.data.MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match="give the worker a smaller shard"):
        load(written(tmp_path, "a.csv", "text,label\nx,good\n"), TASK)


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32))
def test_an_epoch_never_repeats_an_example(count: int, batch_size: int, seed: int) -> None:
    """Batches of an epoch are distinct; what is left at its end is too little for another one."""
    sampler = Sampler(count, batch_size, random.Random(seed))
    size = min(batch_size, count)
    for _ in range(3):
        epoch = [index for _ in range(count // size) for index in sampler.batch()]
        assert len(set(epoch)) == len(epoch) == count // size * size
        assert set(epoch) <= set(range(count))


def test_batches_are_unpredictable_unless_a_source_is_given() -> None:
    assert isinstance(Sampler(4, 2)._source, random.SystemRandom)
    first, again = (Sampler(100, 50, random.Random(1)).batch() for _ in range(2))
    assert first == again
    assert first != sorted(first)


# ------------------------------------------------------------- Poisson sampling


@pytest.mark.parametrize("rate", [0.02, 0.5, 1.0])
def test_each_example_is_in_a_batch_with_the_rate_on_its_own(rate: float) -> None:
    """Sizes vary as they do when each is drawn alone, and pairs are no likelier together."""
    count, batches = 50, 4000
    sampler = PoissonSampler(count, rate, source=random.Random(1).randbytes)
    present = np.zeros((batches, count))
    for row in present:
        batch = sampler.batch()
        assert batch == sorted(set(batch))
        row[batch] = 1
    error = 5 * np.sqrt(rate * (1 - rate) / batches) + 1e-12
    assert np.abs(present.mean(axis=0) - rate).max() < error
    assert present.sum(axis=1).var() == pytest.approx(count * rate * (1 - rate), rel=0.15)
    together = (present[:, 0] * present[:, 1]).mean()
    assert together == pytest.approx(rate**2, abs=5 * np.sqrt(rate**2 / batches))


def test_a_batch_may_be_empty() -> None:
    sampler = PoissonSampler(3, 0.001, source=random.Random(1).randbytes)
    assert [sampler.batch() for _ in range(5)] == [[]] * 5
    assert PoissonSampler(3, 2.0**-60).batch() == []


def test_a_batch_beyond_the_cap_is_cut_at_random() -> None:
    sampler = PoissonSampler(20, 0.9, cap=5, source=random.Random(1).randbytes)
    batches = [sampler.batch() for _ in range(2000)]
    assert all(len(set(batch)) == 5 for batch in batches)
    seen = np.bincount(np.concatenate(batches), minlength=20)
    assert np.abs(seen - 500).max() < 5 * np.sqrt(500)


def test_who_is_sampled_is_the_operating_systems_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """T3: equal seeds everywhere do not make equal batches."""
    assert PoissonSampler(4, 0.5)._source is os.urandom
    batches = []
    for _ in range(2):
        random.seed(1)
        batches.append(PoissonSampler(400, 0.5).batch())
    assert batches[0] != batches[1]


# ------------------------------------------------------------- prompts and answers

ANSWERS = TaskSection(kind="causal-lm", prompt_column="question")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'question,answer\n"Why, then?",Because.\n2,4\n'),
        ("a.tsv", "answer\tquestion\nBecause.\tWhy, then?\n4\t2\n"),
        (
            "a.jsonl",
            '{"question": "Why, then?", "answer": "Because."}\n{"question": 2, "answer": 4}\n',
        ),
    ],
)
def test_pairs_in_all_formats(tmp_path: Path, name: str, content: str) -> None:
    pairs = load(written(tmp_path, name, content), ANSWERS)
    assert pairs == Pairs(("Why, then?", "2"), ("Because.", "4"))
    assert len(pairs) == 2
    assert missing_labels(pairs, ANSWERS) == []


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("question,answer\nx,\n", "line 2: the answer is empty; remove the line"),
        ("question,answer\n ,y\n", "line 2: the prompt is empty; remove the line"),
        ("prompt,answer\nx,y\n", "set task.prompt_column and task.answer_column"),
        ("question,answer\n", "holds no examples"),
    ],
)
def test_pairs_that_cannot_be_used(tmp_path: Path, content: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        load(written(tmp_path, "a.csv", content), ANSWERS)
