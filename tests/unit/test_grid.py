"""Grids of experiments: what their files ask for is a run, and a cell knows its settings."""

from dataclasses import replace
from pathlib import Path

import pytest
from experiments import grid
from experiments.cells import Cell
from experiments.federation import Point
from experiments.grid import Grid

from lorand_worker.tasks import Score

GRIDS = sorted((Path(grid.__file__).parent / "grids").glob("*.toml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_each_preset_of_a_grid_is_a_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid.Task, "labels", lambda _: ("a", "b"))
    found = Grid.read(path)
    assert len(set(found.pairs)) == len(found.pairs)
    for task, name in found.pairs:
        method = found.methods[name]
        assert bool(method.preset) != bool(method.peer), name
        assert method.peer in ("", "fedavg", "adam", "mezo")
        if method.preset:
            config = grid.config_of(found.tasks[task], method, method.rates[0])
            assert config.run.rounds == method.rounds


def test_a_cell_with_other_settings_is_not_the_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.cells.RESULTS", tmp_path)
    found = Grid.read(GRIDS[-1])
    (task, name), ran = found.pairs[0], []

    def run(on: grid.Task, method: grid.Method, *_: object) -> list[Point]:
        ran.append(method.rounds)
        return [Point(0, Score(0.5, 0.7, 10))]

    monkeypatch.setattr(grid, "run", run)
    for rounds in (3, 3, 4):
        methods = {**found.methods, name: replace(found.methods[name], rounds=rounds)}
        points = grid.filling(replace(found, methods=methods))(task, name, 0.1, 0, "report")
        assert points is not None
        assert len(points) == 1
    assert ran == [3, 4]
    assert found.store.points(Cell(name, task, 0.1, 0, "report")) is not None


def test_a_rate_is_the_most_accurate_or_that_with_the_least_loss(tmp_path: Path) -> None:
    tried = {1.0: Score(0.8, 0.3, 10), 2.0: Score(0.9, 0.5, 10), 3.0: Score(0.9, 0.4, 10)}
    assert grid.chosen(tried, "loss") == 1.0
    assert grid.chosen(tried, "accuracy") == 3.0
    assert {path.stem: Grid.read(path).choose for path in GRIDS}["zeroth"] == "accuracy"
    other = tmp_path / "other.toml"
    other.write_text(GRIDS[0].read_text().replace('choose = "accuracy"', 'choose = "speed"'))
    with pytest.raises(AssertionError, match="speed"):
        Grid.read(other)


def test_a_grid_that_only_tries_shows_its_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.cells.RESULTS", tmp_path)
    whole = Grid.read(GRIDS[0])
    pair = next(p for p in whole.pairs if len(whole.methods[p[1]].rates) > 1)
    found = replace(whole, seeds=0, pairs=(pair,))

    def run(_: grid.Task, __: grid.Method, rate: float, *___: object) -> list[Point]:
        return [Point(7, Score(0.5 + rate, 0.7, 10), 0, 1000, 234)]

    monkeypatch.setattr(grid, "run", run)
    assert grid.reported(found, *pair, grid.filling(found)) is None
    grid.write(found, [])
    text = (tmp_path / f"{found.name}.md").read_text(encoding="utf-8")
    for rate in found.methods[pair[1]].rates:
        assert f"{rate:g}: {0.5 + rate:.3f}, 0.700" in text
    assert "| 7 | 1,234 |" in text
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".lock", ".md"]
