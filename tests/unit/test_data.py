"""A worker's data file, and the batches drawn from it."""

import json
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorand.config import TaskSection
from lorand.errors import ConfigError, DataError, ModelError
from lorand_worker import sources
from lorand_worker.data import (
    Chats,
    Examples,
    Pairs,
    PoissonSampler,
    Sampler,
    Texts,
    hold_out,
    load,
    mapped,
    missing_labels,
)
from lorand_worker.sources import HubSet

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
        (
            "a.csv",
            "txt,label\nx,good\n",
            ["line 2", "'text' and 'label'", "--columns text=txt, or"],
        ),
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
        ("a.txt", "text,label\n", ["must end in .csv, .tsv, .jsonl or .parquet"]),
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


def test_a_label_of_thousands_of_digits_is_only_a_wrong_one(tmp_path: Path) -> None:
    """Python turns no such text into a number: found by the fuzzer."""
    path = written(tmp_path, "a.csv", "text,label\na," + "9" * 5000 + "\n")
    with pytest.raises(DataError, match=r"line 2: the label '9{60}…' is not one of the run's"):
        load(path, TASK)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the data file .*none\.csv"):
        load(tmp_path / "none.csv", TASK)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="cannot read the data file"):
        load(tmp_path / "folder.csv", TASK)


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorand_worker.sources.MAX_FILE_BYTES", 10)
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


# ------------------------------------------------------------- columns by other names


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("", ("text", "label")),
        ("text=review", ("review", "label")),
        ("text=review,label=stars", ("review", "stars")),
        (" label = stars ,", ("text", "stars")),
    ],
)
def test_columns_by_another_name(columns: str, expected: tuple[str, str]) -> None:
    task = mapped(TASK, columns)
    assert (task.text_column, task.label_column) == expected
    assert task.labels == TASK.labels


@pytest.mark.parametrize("columns", ["review", "txt=review", "text=", "prompt=text", "=a"])
def test_columns_that_no_example_has(columns: str) -> None:
    with pytest.raises(ConfigError, match=r"text and label: write --columns text=COLUMN,label=COL"):
        mapped(TASK, columns)


@pytest.mark.parametrize(
    ("header", "advice"),
    [
        ("review,stars", "--columns text=review,label=stars, or set task.text_column"),
        ("a,b", "--columns text=COLUMN,label=COLUMN"),
        ("text,verdict", "--columns label=verdict, or"),
        ("id,sentence,label", "--columns text=sentence, or"),
    ],
)
def test_columns_are_suggested(tmp_path: Path, header: str, advice: str) -> None:
    path = written(tmp_path, "a.csv", f"{header}\n{','.join('x' for _ in header.split(','))}\n")
    with pytest.raises(DataError, match="found ") as caught:
        load(path, TASK)
    assert advice in str(caught.value)
    for name in header.split(","):
        assert repr(name) in str(caught.value)


# ------------------------------------------------------------- held out


def test_held_out_examples_are_the_same_whatever_else_the_file_holds() -> None:
    texts = tuple(f"text {i}" for i in range(400))
    labels = tuple(i % 2 for i in range(400))
    training, held = hold_out(Examples(texts, labels), 0.1, "a.csv")
    assert isinstance(training, Examples)
    assert isinstance(held, Examples)
    assert sorted(training.texts + held.texts) == sorted(texts)
    assert 20 < len(held) < 60
    assert [(text, label) for text, label in zip(held.texts, held.labels, strict=True)] == [
        (text, label) for text, label in zip(texts, labels, strict=True) if text in held.texts
    ]
    half = Examples(texts[::-2], labels[::-2])
    _, again = hold_out(half, 0.1, "a.csv")
    assert isinstance(again, Examples)
    assert set(again.texts) == set(held.texts) & set(half.texts)
    _, more = hold_out(half, 0.2, "a.csv")
    assert isinstance(more, Examples)
    assert set(again.texts) < set(more.texts), "a larger share holds out some more"


def test_equal_texts_are_on_one_side() -> None:
    doubled = Examples(tuple(f"text {i % 50}" for i in range(100)), (0,) * 50 + (1,) * 50)
    training, held = hold_out(doubled, 0.3, "a.csv")
    assert isinstance(training, Examples)
    assert isinstance(held, Examples)
    assert not set(training.texts) & set(held.texts)


@pytest.mark.parametrize(("share", "left"), [(1e-9, "measure with"), (0.9999999, "train on")])
def test_a_share_that_leaves_nothing(share: float, left: str) -> None:
    with pytest.raises(DataError, match=f"of the 3 examples of a.csv leaves none to {left}"):
        hold_out(Pairs(("a", "b", "c"), ("d", "e", "f")), share, "a.csv")


# ------------------------------------------------------------- texts and conversations

TEXTS = TaskSection(kind="causal-lm", format="text")
CHATS = TaskSection(kind="causal-lm", format="chat")
HELLO: Final = (("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi!"))


def test_whole_texts(tmp_path: Path) -> None:
    assert load(written(tmp_path, "a.csv", "text\none\ntwo\n"), TEXTS) == Texts(("one", "two"))
    with pytest.raises(
        DataError, match=r"column 'text' is needed, found 'a'.*--columns text=a, or"
    ):
        load(written(tmp_path, "a.csv", "a\none\n"), TEXTS)


@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value")])
def test_conversations(tmp_path: Path, role: str, content: str) -> None:
    names = {"user": "human", "assistant": "gpt"} if role == "from" else {}
    turns = [{role: names.get(who, who), content: said} for who, said in HELLO]
    path = written(tmp_path, "a.jsonl", json.dumps({"messages": turns, "id": 1}) + "\n")
    assert load(path, CHATS) == Chats((HELLO,))


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ("hello", "the messages are no list of"),
        ([], "the messages are no list of"),
        (None, "the messages are no list of"),
        (["hello"], "the messages are no list of"),
        ([{"role": "user"}], "the messages are no list of"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "are no list of"),
        ([{"role": "user", "content": "hello"}], "nothing in the messages is said by the assist"),
        ([{"role": "assistant", "content": " "}], "nothing in the messages is said by the assist"),
    ],
)
def test_conversations_that_cannot_be_used(tmp_path: Path, messages: Any, sentence: str) -> None:
    path = written(tmp_path, "a.jsonl", json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match="line 1") as caught:
        load(path, CHATS)
    assert sentence in str(caught.value)


def test_conversations_are_no_texts(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", json.dumps({"text": [], "label": "good"}) + "\n")
    with pytest.raises(DataError, match=r'not a text; .* set task\.format = "chat"'):
        load(path, TASK)


# ------------------------------------------------------------- Parquet


def parquet(path: Path, columns: Mapping[str, object], features: Any = None) -> Path:
    """A Parquet file, with what the hub's libraries write into its schema."""
    arrow: Any = pytest.importorskip("pyarrow")
    table = arrow.table(columns)
    if features is not None:
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=2)
    return path


def test_parquet(tmp_path: Path) -> None:
    rows = {"review": ["one", "two", "three"], "stars": ["good", "bad", "7"], "id": [1, 2, 3]}
    path = parquet(tmp_path / "a.parquet", rows)
    assert load(path, mapped(TASK, "text=review,label=stars")) == Examples(
        ("one", "two", "three"), (1, 0, 2)
    )
    with pytest.raises(DataError, match=r"row 1: columns .* found 'review', 'stars', 'id'"):
        load(path, TASK)
    turns = [{"role": who, "content": said} for who, said in HELLO]
    chats = parquet(tmp_path / "chats.parquet", {"messages": [turns]})
    assert load(chats, CHATS) == Chats((HELLO,))


def test_labels_that_are_numbers_of_named_classes(tmp_path: Path) -> None:
    """As files of the hub have them; a run may list the names, or the numbers."""
    rows: dict[str, list[Any]] = {"text": ["one", "two"], "label": [1, 0]}
    features = {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}, "text": {}}
    path = parquet(tmp_path / "a.parquet", rows, features)
    assert load(path, TASK) == Examples(("one", "two"), (1, 0))
    assert load(path, TaskSection(labels=("0", "1"))) == Examples(("one", "two"), (1, 0))
    with pytest.raises(DataError, match="row 1: the label 'good' is not one of"):
        load(path, TaskSection(labels=("a", "b")))
    odd = parquet(tmp_path / "odd.parquet", rows, ["no", "features"])
    with pytest.raises(DataError, match="the label '1' is not one of"):
        load(odd, TASK)


def test_parquet_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parquet(tmp_path / "a.parquet", {"text": ["one"], "label": ["good"]})
    for damaged in (b"", b"PAR1", whole.read_bytes()[:-9], b"PAR1" + b"\xff" * 300):
        with pytest.raises(DataError, match="cannot read the data file"):
            load(written(tmp_path, "b.parquet", damaged), TASK)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModelError, match=r"is a Parquet file: pip install 'lorand\[data\]'"):
        load(whole, TASK)


# ------------------------------------------------------------- data sets of the hub


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reviews.csv", Path("reviews.csv")),
        ("hub:imdb", HubSet("imdb")),
        ("hub:o/n:train", HubSet("o/n", None, None, "train")),
        ("hub:o/n:plain:test", HubSet("o/n", None, "plain", "test")),
        ("hub:o/n@v1.0:plain:train[10:20]", HubSet("o/n", "v1.0", "plain", "train[10:20]")),
    ],
)
def test_what_data_are_called(text: str, expected: sources.Source) -> None:
    assert sources.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["hub:", "hub:o/n/x", "hub:o/n:a:b:c", "hub:o/n:", "hub:../x y"])
def test_what_no_data_are_called(text: str) -> None:
    with pytest.raises(ConfigError, match="write hub:OWNER/NAME"):
        sources.parse(text)


def test_names_and_budgets_of_data_sets() -> None:
    """Slices may share examples: what is shown of them is shown of one data set."""
    both = sources.parse("hub:o/reviews:train[:10]"), sources.parse("hub:o/reviews@v2:test")
    assert {sources.key(each) for each in both} == {"hub:o/reviews"}
    assert {sources.stem(each) for each in both} == {"reviews"}
    assert sources.key(Path("a.csv")) == str(Path("a.csv").resolve())


@pytest.mark.slow
def test_a_data_set_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real library, which reads a folder as it reads a repository."""
    datasets: Any = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "o" / "reviews"
    folder.mkdir(parents=True)
    rows = {"review": ["one", "two", "three"], "stars": ["good", "bad", "good"]}
    datasets.Dataset.from_dict(rows).to_csv(folder / "train.csv")
    task = mapped(TASK, "text=review,label=stars")
    assert load(sources.parse("hub:o/reviews"), task) == Examples(tuple(rows["review"]), (1, 0, 1))
    assert len(load(sources.parse("hub:o/reviews:train[:2]"), task)) == 2
    with pytest.raises(DataError, match=r"row 1: columns 'text' and 'label' .* text=review,label="):
        load(sources.parse("hub:o/reviews"), TASK)
    datasets.Dataset.from_dict(rows).to_csv(folder / "test.csv")
    with pytest.raises(DataError, match=r"has several splits \(.*\): write hub:o/reviews:train"):
        load(sources.parse("hub:o/reviews"), task)
    with pytest.raises(
        DataError, match=r"cannot read the data set hub:o/reviews:dev: .*write hub:"
    ):
        load(sources.parse("hub:o/reviews:dev"), task)
