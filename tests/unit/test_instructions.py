"""Instruction tuning in experiments: who has which task, what is learned, what a worker pays."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from experiments import cells, federation, instructions, self_instruct, small_model
from experiments.cells import Store
from experiments.federation import Point
from experiments.grid import Method
from tests import tiny

from lorand.sections import ModelSection
from lorand_coordinator.rounds import sample
from lorand_worker import model
from lorand_worker.data import Pairs
from lorand_worker.tasks import Score, answers


def write_tasks(folder: Path, count: int) -> None:
    """Write self-instruct's two files, with one task that is too long."""
    (folder / self_instruct.NAME).mkdir()
    for name, app in zip(self_instruct.FILES, ("", "Maps"), strict=True):
        rows = [
            {
                "instruction": f"{name} {i}",
                "instances": [{"input": "now", "output": f" room {i % 3}"}],
            }
            | ({"motivation_app": f"{app} {i % 4}"} if app else {})
            for i in range(count)
        ]
        rows[0]["instances"] = [{"input": "", "output": "long " * self_instruct.LONGEST}]
        text = "\n".join(map(json.dumps, rows))
        (folder / self_instruct.NAME / name).write_text(text, encoding="utf-8")


def test_tasks_of_one_application_are_at_one_worker() -> None:
    origins = ["a", "b", "", "a", "c", "", "b", "", "", "a"] * 3
    shards = self_instruct.dealt(origins, 4, seed=1)
    assert sorted(place for shard in shards for place in shard) == list(range(30))
    for app in "abc":
        assert sum(any(origins[i] == app for i in shard) for shard in shards) == 1
    assert max(map(len, shards)) - min(map(len, shards)) <= 3
    assert shards == self_instruct.dealt(origins, 4, seed=1)
    assert shards != self_instruct.dealt(origins, 4, seed=2)


def test_no_scored_task_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tasks(tmp_path, 41)
    monkeypatch.setattr(federation, "DATA", tmp_path)
    tasks, origins = self_instruct.read()
    assert len(tasks) == len(origins) == 80
    assert tasks.prompts[0] == f"{self_instruct.FILES[0]} 1\nnow"
    tests = {seed: self_instruct.shards_and_scored(10, seed, held_out=False)[1] for seed in (0, 1)}
    assert tests[0] == tests[1], "the seed moves the test tenth"
    for held_out, scored in ((False, 8), (True, 7)):
        shards, part = self_instruct.shards_and_scored(10, 0, held_out=held_out)
        trained = [prompt for shard in shards for prompt in shard.prompts]
        assert len(shards) == 10
        assert (len(trained), len(part)) == (80 - 8 - 7 * held_out, scored)
        assert not {*trained} & {*part.prompts, *tests[0].prompts}


def test_an_answer_and_its_end_are_learned_and_nothing_else(causal_model: Path) -> None:
    loaded = model.load(ModelSection(name="tiny"), 0, causal_model, kind="causal-lm")
    tokenizer = loaded.tokenizer
    found = answers.of(tokenizer, Pairs(("room?",), ("a lovely room",)), instructions.TASK, 64)
    learned = [found.ids[0][at] for at in found.learned[0]]
    assert tokenizer.decode(learned) == " a lovely room" + tiny.END
    assert tokenizer.decode(found.ids[0]).startswith("Question: room?\nAnswer:")


@pytest.mark.parametrize("name", instructions.METHODS)
def test_methods_try_rates_as_far_apart_and_are_runs(name: str) -> None:
    method = instructions.METHODS[name]
    assert len(method.rates) in (1, 3, 4)
    for low, high in pairwise(method.rates):
        assert high / low == pytest.approx(3, rel=0.2)
    middle = method.rates[len(method.rates) // 2]
    if method.preset:
        config = instructions.config_of(method, middle)
        assert config.rounds.participants == instructions.ASKED
        assert config.directions.pool_size == 4096
        assert middle in (config.local.learning_rate, config.optimizer.learning_rate)
    assert json.loads(json.dumps(instructions.settings_of(method))) == (
        instructions.settings_of(method)
    ), "a cell would never be found again"


def test_bytes_are_a_workers_on_average() -> None:
    point = Point(4, Score(0.5, 1.0, 10))
    weights = instructions.on_average(point, 1000)
    assert (weights.bytes_up, weights.bytes_down) == (2000, 2000)
    codes = instructions.on_average(point, 1000, 300, everybody=True)
    assert (codes.bytes_up, codes.bytes_down) == (2000, 1200)


def test_the_first_point_as_good_is_of_the_mean() -> None:
    def curve(*losses: float) -> list[Point]:
        return [Point(at, Score(0.1, each, 10), at) for at, each in enumerate(losses)]

    curves = [curve(1.0, 3.0, 2.0, 1.0), curve(1.0, 2.0, 2.0, 2.0)]
    found = instructions.first_at(curves, 2.2)
    assert found is not None
    assert found.committed == 2
    assert instructions.first_at(curves, 1.0) is None
    assert instructions.first_at([], 9.0) is None


@pytest.mark.parametrize("name", ["FedAvg, AdamW, all weights", "LoRand, first order, int8"])
def test_who_is_not_asked_moves_nothing(
    name: str, causal_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = replace(instructions.METHODS[name], rounds=1, batch=1)
    texts = [Pairs(("room?",), ("lovely",)), Pairs(("bed?",), ("awful noisy",))]
    (asked,) = sample(federation.sampling_key(0), 1, 0, range(2))
    monkeypatch.setattr(instructions, "ASKED", 1)
    monkeypatch.setattr(small_model, "made", lambda: causal_model)

    def after(changed: int | None) -> float:
        shards = list(texts)
        if changed is not None:
            shards[changed] = Pairs(("view?",), ("the view was superb",))
        monkeypatch.setattr(
            self_instruct, "shards_and_scored", lambda *_, held_out: (shards, texts[0])
        )
        return instructions.run(method, 0.003, 0, "report")[-1].score.loss

    assert after(None) == after(1 - asked)
    assert after(None) != after(asked)


def test_methods_learn_and_their_pages_are_written(
    causal_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tasks(tmp_path, 24)
    (tmp_path / "small_model.json").write_text('{"weights": 10, "loss_held_out": 1.0}')
    monkeypatch.setattr(federation, "DATA", tmp_path)
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    monkeypatch.setattr(instructions, "RESULTS", tmp_path)
    monkeypatch.setattr(instructions, "SEEDS", range(1))
    monkeypatch.setattr(small_model, "made", lambda: causal_model)
    monkeypatch.setattr(instructions, "WORKERS", 4)
    monkeypatch.setattr(instructions, "ASKED", 2)
    chosen = {
        name: Method(
            method.rates[1 : 3 if method.peer else 2],
            3,
            method.preset,
            method.peer,
            4,
            method.changes,
        )
        for name, method in instructions.METHODS.items()
        if "LoRA " in name or "weights, 1 bit" in name or "zeroth" in name
    }
    assert len(chosen) == 3
    monkeypatch.setattr(instructions, "METHODS", chosen)
    monkeypatch.setattr(instructions, "STORE", Store("instructions", "A question?"))
    for name in chosen:
        instructions.fill(name)
    instructions.write()
    for name in chosen:
        (curve,) = instructions.reported(name)
        assert curve[-1].score.loss < curve[0].score.loss, name
        assert curve[-1].committed == 3
    instructions.reported.cache_clear()
    page = (tmp_path / "instructions.md").read_text(encoding="utf-8")
    assert "not run" not in page
    assert all(f"| {name} |" in page for name in chosen)
    assert len((tmp_path / "instructions.csv").read_text().splitlines()) == 1 + 4 * len(chosen)


def test_a_small_model_learns_its_text_and_opens(tmp_path: Path) -> None:
    sizes = {"vocabulary": 300, "width": 16, "layers": 1, "heads": 2, "inner": 32, "context": 16}
    settings = small_model.Settings(**sizes, steps=30, warmup=2, learning_rate=0.02)
    texts = small_model.paragraphs("The hound\n   was  large.\n\n\n\nIt howled.\n\n" * 60)
    assert texts[:2] == ["The hound was large.", "It howled."]
    small_model.train(settings, texts, tmp_path)
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["loss_held_out"] < 0.7 * 5.7  # that of as many tokens, all alike likely
    loaded = model.load(ModelSection(name="tiny"), 0, tmp_path, kind="causal-lm")
    assert sum(p.numel() for p in loaded.module.parameters()) == about["weights"]
    one, other = (small_model.folder_of(small_model.Settings(seed=seed), "text") for seed in (0, 1))
    assert one != other


def test_rates_warm_up_and_fall() -> None:
    settings = small_model.Settings(steps=100, warmup=10, learning_rate=1.0)
    assert settings.rate(0) == pytest.approx(0.1)
    assert settings.rate(10) == pytest.approx(1.0)
    assert settings.rate(100) == pytest.approx(0.1)
