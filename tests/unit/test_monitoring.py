"""What an operator asks to watch a run with, and what trackers are told."""

import asyncio
import subprocess
import sys
from collections.abc import Mapping
from importlib import util
from pathlib import Path

import pytest
from tests.commands import ENVIRONMENT
from tests.runs import IDENTITY, evaluation_of
from tests.unit.page.staging import Stage

from lorand import trackers
from lorand.errors import ConfigError
from lorand_coordinator.monitoring import Asked, Monitor


def test_nothing_is_needed_where_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    Asked().check()


def test_the_coordinator_imports_none_of_it_unasked() -> None:
    wanted = "{'starlette', 'uvicorn', 'prometheus_client', 'tensorboard', 'opentelemetry'}"
    code = f"import sys, lorand_coordinator.cli; print({wanted} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=ENVIRONMENT
    )
    assert done.stdout == "set()\n", done.stderr


def test_a_page_without_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    there = util.find_spec
    missing = ("starlette", "prometheus_client")
    monkeypatch.setattr(util, "find_spec", lambda n: None if n in missing else there(n))
    with pytest.raises(ConfigError, match=r"starlette, prometheus_client: pip install 'lorand\[p"):
        Asked(page="127.0.0.1:7780").check()


def test_an_address_that_is_none() -> None:
    with pytest.raises(ConfigError, match="'7780' is no HOST:PORT"):
        Asked(page="7780").check()


def test_a_tracker_that_is_unknown() -> None:
    with pytest.raises(ConfigError, match="'comet' is not known"):
        Asked(report_to="comet").check()


class Rows:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, Mapping[str, float]]] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, values))

    def close(self) -> None:
        """Nothing is left."""


def test_trackers_hear_of_rounds_and_evaluations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each evaluation once, also one that is posted after the last round."""
    kept, stage = Rows(), Stage(IDENTITY)
    monkeypatch.setitem(trackers.MAKERS, "trackio", lambda *_: kept)
    evaluations = stage.hub.sequencer.tally.evaluations
    evaluations.append(evaluation_of("eve", 0, 0.25))  # of before this process
    monitor = Monitor(stage.config, tmp_path / "none", Asked(report_to="trackio"))

    async def run() -> None:
        async with monitor.running():
            monitor.lead(stage.hub)
            stage.join("ada")
            stage.join("ben")
            stage.commit()
            evaluations.append(evaluation_of("eve", 1, 0.5))
            stage.commit(rounds=2)
            evaluations.append(evaluation_of("eve", 3, 0.75))

    asyncio.run(run())
    stage.close()
    assert [step for step, _ in kept.rows] == [1, 2, 3, 3]
    assert [values.get("accuracy/eve") for _, values in kept.rows] == [None, 0.5, None, 0.75]
    assert [values.get("loss") for _, values in kept.rows] == [1.0, 0.5, pytest.approx(1 / 3), None]
