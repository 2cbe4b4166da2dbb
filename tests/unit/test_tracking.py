"""Figures to trackers: stand-ins of their libraries, and TensorBoard's own files."""

import logging
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests.runs import config_of

from lorand import trackers, tracking
from lorand.errors import ConfigError
from lorand.tracking import Background

CONFIG = config_of()


class Kept:
    """A writer that keeps what it is given, or fails from a step on."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.closed = False
        self._fails_at = fails_at

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == self._fails_at:
            raise OSError("the service is down")
        self.rows.append((step, values))

    def close(self) -> None:
        self.closed = True


def library(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """Put a stand-in where a library would be imported from."""
    parent, _, child = name.rpartition(".")
    made = ModuleType(name)
    made.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, made)
    if parent:
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        setattr(sys.modules[parent], child, made)


def recorder(calls: list[Any], name: str, result: Any = None) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append((name, args, kwargs))
        return result

    return call


def test_trackio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    names = ("init", "log", "finish")
    library(monkeypatch, "trackio", **{name: recorder(calls, name) for name in names})
    opened = tracking.open_all("trackio", CONFIG, "ada", tmp_path)
    opened.log(3, {"loss": 0.5, "accuracy": None})
    opened.close()
    (_, _, begun), (_, logged, step), (last, _, _) = calls
    assert (begun["project"], begun["name"], begun["config"]["rounds"]) == ("small", "ada", 4)
    assert (logged, step, last) == (({"loss": 0.5},), {"step": 3}, "finish")


def test_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(log=recorder(calls, "log"), finish=recorder(calls, "finish"))
    library(monkeypatch, "wandb", init=recorder(calls, "init", run))
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    opened = tracking.open_all("wandb", CONFIG, "ada", tmp_path / "kept")
    opened.log(3, {"loss": 0.5})
    opened.close()
    assert [name for name, _, _ in calls] == ["init", "log", "finish"]
    assert calls[0][2]["dir"] == str(tmp_path / "kept")
    assert calls[1][1:] == (({"loss": 0.5},), {"step": 3})


@pytest.mark.parametrize("known", [None, SimpleNamespace(experiment_id="7")])
def test_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: Any) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    client = SimpleNamespace(
        get_experiment_by_name=recorder(calls, "find", known),
        create_experiment=recorder(calls, "make", "8"),
        create_run=recorder(calls, "run", run),
        log_param=recorder(calls, "param"),
        log_metric=recorder(calls, "metric"),
        set_terminated=recorder(calls, "end"),
    )
    library(monkeypatch, "mlflow.tracking", MlflowClient=lambda: client)
    opened = tracking.open_all("mlflow", CONFIG, "ada", tmp_path)
    opened.log(3, {"loss": 0.5})
    opened.close()
    told = {name: (args, kwargs) for name, args, kwargs in calls}
    assert told["run"] == (("7" if known else "8",), {"run_name": "ada"})
    assert told["metric"] == (("r1", "loss", 0.5), {"step": 3})
    assert told["end"] == (("r1",), {})


def test_tensorboard_files_hold_the_figures(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    opened = tracking.open_all("tensorboard", CONFIG, "ada", tmp_path)
    opened.log(1, {"loss": 0.5})
    opened.log(2, {"loss": 0.25, "accuracy": 0.75})
    opened.close()
    (file,) = (tmp_path / "small" / "ada").iterdir()
    found = [
        (event.step, value.tag, value.tensor.float_val[0])
        for event in loader.EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]
    assert found == [(1, "loss", 0.5), (2, "loss", 0.25), (2, "accuracy", 0.75)]


def test_several_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one, other = Kept(), Kept()
    monkeypatch.setitem(trackers.MAKERS, "trackio", lambda *_: one)
    monkeypatch.setitem(trackers.MAKERS, "wandb", lambda *_: other)
    opened = tracking.open_all("trackio, wandb,trackio", CONFIG, "ada", tmp_path)
    opened.log(1, {"loss": 0.5})
    opened.close()
    opened.close()
    assert one.rows == other.rows == [(1, {"loss": 0.5})]
    assert one.closed
    assert other.closed


def test_a_tracker_that_fails_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    one, other = Kept(fails_at=2), Kept()
    opened = Background({"one": one, "other": other})
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            opened.log(step, {"loss": 0.5})
        opened.close()
    assert [step for step, _ in one.rows] == [1]
    assert [step for step, _ in other.rows] == [1, 2, 3]
    assert caplog.messages == ["one failed and is written to no more: the service is down"]


def test_a_slow_tracker_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "WAITING", 2)
    go_on, kept = threading.Event(), Kept()

    class Slow(Kept):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            assert go_on.wait(10.0)
            kept.log(step, values)

    opened = Background({"slow": Slow()})
    with caplog.at_level(logging.WARNING):
        for step in range(10):
            opened.log(step, {"loss": 0.5})
    assert caplog.messages == ["a tracker is slow: some rounds are left out of it"]
    go_on.set()
    opened.close()
    assert 2 <= len(kept.rows) <= 3


def test_no_tracker_is_no_thread() -> None:
    before = threading.active_count()
    opened = Background({})
    opened.log(1, {"loss": 0.5})
    assert threading.active_count() == before
    opened.close()


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_a_library_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"--report-to {name} needs its library: pip install"):
        tracking.open_all(name, CONFIG, "ada", tmp_path)


def test_one_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuses(**_: Any) -> None:
        raise ValueError("no login")

    library(monkeypatch, "wandb", init=refuses)
    with pytest.raises(ConfigError, match=r"--report-to wandb: it does not start \(no login\)"):
        tracking.open_all("wandb", CONFIG, "ada", tmp_path)


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match="'comet' is not known; choose of trackio, tensorboard"):
        tracking.names_in("trackio,comet")


def test_libraries_are_told_to_send_nothing_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import os

    for name in trackers.SILENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "the user's own")
    calls: list[Any] = []
    library(monkeypatch, "wandb", init=recorder(calls, "init", Kept()))
    tracking.open_all("wandb", CONFIG, "ada", tmp_path).close()
    assert os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "the user's own"
