"""Budgets on the command line: opened at join, and shown by `lr-worker privacy`."""

import json
from pathlib import Path
from typing import Any, Final

import pytest
from tests.run_text import text_of
from tests.runs import IDENTITY, config_of
from typer.testing import CliRunner

from lorand import ledger
from lorand.config import RunConfig
from lorand.errors import ConfigError, HandshakeError
from lorand.privacy.mechanism import Mechanism
from lorand.v1 import ledger_pb2 as pb
from lorand_worker import cli
from lorand_worker.budget import Budget
from lorand_worker.guard import Policy
from lorand_worker.spending import listed, open_budget


class Notes:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        """Nothing so far."""
        self.said: list[str] = []

    def note(self, text: str) -> None:
        """See Reporter."""
        self.said.append(text)

    def progress(self, committed: int, total: int, text: str) -> None:
        """See Reporter."""


def private(name: str, epsilon: float = 2.0) -> RunConfig:
    laplace = {"mechanism": "laplace", "delta": 0.0, "sample_rate": 0.5, "clip_bound": 3.0}
    return config_of(
        run={"name": name},
        rounds={"telemetry": "none"},
        privacy={"mode": "worker", "target_epsilon": epsilon, **laplace},
    )


def begun(
    folder: Path, run: str, worker: str, data: str = "a.csv", policy: Policy | None = None
) -> tuple[Budget, list[str]]:
    notes = Notes()
    budget = open_budget(
        private(run), IDENTITY, worker, folder, folder / data, policy or Policy(), notes
    )
    assert budget is not None
    return budget, notes.said


def spend(budget: Budget, times: int) -> None:
    for number in range(1, times + 1):
        budget.charge((number, number - 1, 1), pb.Contribution(round_index=number))


def test_a_run_without_privacy_has_no_budget(tmp_path: Path) -> None:
    arguments: tuple[Any, ...] = ("one", tmp_path / "state", tmp_path / "a.csv", Policy(), Notes())
    assert open_budget(config_of(), IDENTITY, *arguments) is None
    assert not (tmp_path / "state").exists()


def test_the_owner_is_told_the_noise(tmp_path: Path) -> None:
    budget, said = begun(tmp_path, "first", "one")
    multiplier = budget.account.release.multiplier
    assert f"noise multiplier {multiplier:.4g}: laplace noise of scale" in said[-1]
    assert f"scale {multiplier * 3.0 / 16:.3g} on each scalar, for 4 releases" in said[-1]
    mechanism = budget.mechanism(private("first"))
    assert isinstance(mechanism, Mechanism)
    assert (mechanism.multiplier, mechanism.divisor, mechanism.clip_bound) == (multiplier, 16, 3.0)


def test_runs_on_the_same_data_count_together(tmp_path: Path) -> None:
    first, _ = begun(tmp_path, "first", "one")
    spend(first, 2)
    first.close()
    strict = Policy(max_epsilon=2.5)
    with pytest.raises(HandshakeError, match="is 2 and 1 was spent of these data, this worker all"):
        begun(tmp_path, "second", "one", policy=strict)
    begun(tmp_path, "second", "one", data="b.csv", policy=strict)[0].close()
    begun(tmp_path, "first", "one", policy=strict)[0].close()
    _, said = begun(tmp_path, "third", "one", policy=Policy(max_epsilon=3.0))
    assert said[-1] == "other runs spent epsilon 1 of these data: epsilons add up"


def test_one_run_takes_a_data_file_once(tmp_path: Path) -> None:
    begun(tmp_path, "first", "one")[0].close()
    with pytest.raises(HandshakeError, match="in this run already, as 'one'"):
        begun(tmp_path, "first", "two")
    begun(tmp_path, "first", "two", data="b.csv")[0].close()


def test_what_was_spent_is_listed(tmp_path: Path) -> None:
    assert "no private run was joined here" in listed(tmp_path)[1]
    for run, times in (("second", 1), ("first", 4)):
        budget, _ = begun(tmp_path, run, "one")
        spend(budget, times)
        budget.close()
    result, text = listed(tmp_path)
    figures = [(run["run"], run["epsilon_spent"], run["releases_left"]) for run in result["runs"]]
    assert figures == [("first", pytest.approx(2.0), 0), ("second", pytest.approx(0.5), 3)]
    assert result["runs"][0]["scalars"] == 12
    assert result["runs"][0]["run_digest"] == (
        ledger.origin(private("first"), IDENTITY).run_digest.hex()
    )
    assert result["data"] == [
        {"file": str((tmp_path / "a.csv").resolve()), "epsilon": pytest.approx(2.5)}
    ]
    assert "first, as one: epsilon 2 of 2 spent, delta 0" in text
    assert "4 of 4 releases, each 3 scalars of a fresh sample" in text
    assert "epsilon 2.5 (deltas add as well)" in text


LINES: Final = 'mode = "worker"\nmechanism = "laplace"\ndelta = 0\ntarget_epsilon = 4.0'


def test_the_command(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text(text_of(privacy=LINES, rounds='telemetry = "none"'), encoding="utf-8")
    said = CliRunner().invoke(cli.app, ["privacy", str(run), "--json"])
    result = json.loads(said.output)
    assert result["epsilon"] == pytest.approx(4.0)
    assert (result["releases"], result["delta"]) == (40, 0.0)
    shown = CliRunner().invoke(cli.app, ["privacy", "--state", str(tmp_path)])
    assert "no private run was joined here" in shown.output
    run.write_text(text_of(), encoding="utf-8")
    refused = CliRunner().invoke(cli.app, ["privacy", str(run)])
    assert isinstance(refused.exception, ConfigError)
    assert 'set privacy.mode = "worker"' in str(refused.exception)
