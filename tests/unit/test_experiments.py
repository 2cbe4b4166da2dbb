"""Experiments: every preset has a row, and cells that are kept are not run again."""

from pathlib import Path

import pytest
from experiments import cells, presets
from experiments.cells import Cell, Store
from experiments.federation import Point, forwards_a_round

from lorand_coordinator.presets import PRESETS
from lorand_worker.tasks import Score


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_has_a_row_that_spends_its_forward_passes(name: str) -> None:
    config = presets.config_of(name, "subj", presets.ROWS[name].rate)
    spent = config.run.rounds * forwards_a_round(config, examples=1000)
    assert 0.9 * presets.FORWARDS <= spent <= presets.FORWARDS
    assert config.run.rounds >= 8
    assert config.estimator.batch_size == 16


def test_a_kept_cell_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    points = [Point(0, Score(0.5, 0.7, 10)), Point(4, Score(0.75, 0.5, 10), 8, 4, 4, 1.5)]
    cell = Cell("mezo", "subj", 1e-3, 0, "tune")
    assert Store("some", "A claim.").fill(cell, {"a": 1}, lambda: points) == points

    def again() -> list[Point]:
        raise AssertionError("it was run before")

    assert Store("some", "A claim.").fill(cell, {"a": 1}, again) == points


def test_best_takes_no_diverged_rate() -> None:
    assert cells.best({1.0: float("nan"), 2.0: 0.7, 3.0: 0.6}) == 3.0


def test_mean_and_error() -> None:
    assert cells.mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert cells.mean_and_error([5.0]) == (5.0, 0.0)
