"""The Python API: where its names come from, and what simulated runs refuse."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.commands import ENVIRONMENT

import lorand
import lorand_api
from lorand.errors import ConfigError, DataError, HandshakeError, LorandError
from lorand_api import simulation
from lorand_worker.tasks import Part

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [row for domain in tiny.DOMAINS for row in tiny.rows(domain, 8, seed=1)]
TWO = {"quorum": 2, "start_with": 2}


def run_of(kind: Any = "backprop", **changes: dict[str, Any]) -> lorand.config.RunConfig:
    return tiny.config(kind, **{"run": {"rounds": 3}, "rounds": TWO, **changes})


def test_the_names_of_the_api_are_those_of_lorand() -> None:
    assert sorted(lorand.API) == sorted(lorand_api.__all__)
    assert lorand.simulate is lorand_api.simulate
    with pytest.raises(AttributeError, match="no attribute 'simulated'"):
        _ = lorand.simulated


def test_the_coordinator_loads_neither_the_api_nor_tensors() -> None:
    """Its imports of `lorand` modules pass by `lorand.__getattr__`."""
    code = (
        "import sys, lorand_coordinator.cli, lorand_coordinator.standby\n"
        "print([name for name in ('lorand_api', 'torch', 'safetensors') if name in sys.modules])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "[]"


# -- simulated runs ------------------------------------------------------------------------------


def test_a_run_is_told_round_by_round(tiny_model: Path) -> None:
    told: list[lorand.Round] = []
    made = lorand.simulate(
        tiny.to_toml(tiny.settings("backprop", run={"rounds": 5}, rounds=TWO)),
        [ROWS, ROWS],
        model=tiny_model,
        test=ROWS,
        evaluate_every=2,
        seed=1,
        report=told.append,
    )
    assert told == list(made.rounds)
    assert [r.committed for r in told if r.score] == [2, 4, 5]
    assert told[-1].score == made.score
    assert all(r.loss is not None for r in told)
    assert (made.facts.rounds, made.facts.contributions) == (5, 10)
    assert made.adapter.head == made.position.head


@pytest.mark.parametrize("kind", ["spsa", "backprop"])
def test_a_seed_repeats_a_run_and_another_does_not(kind: str, tiny_model: Path) -> None:
    config = run_of(kind, directions={"mode": "own"} if kind == "spsa" else {})
    heads = [
        lorand.simulate(config, [ROWS, ROWS], model=tiny_model, seed=seed).position.head
        for seed in (1, 1, 2)
    ]
    assert heads[0] == heads[1] != heads[2]


def test_a_run_goes_on_in_its_ledger(tiny_model: Path, tmp_path: Path) -> None:
    ledger_at = tmp_path / "run.ledger"

    class Interrupted(Exception):
        pass

    def interrupt(made: lorand.Round) -> None:
        if made.committed == 2:
            raise Interrupted

    config = run_of(run={"rounds": 4})
    with pytest.raises(Interrupted):
        lorand.simulate(
            config, [ROWS, ROWS], model=tiny_model, ledger_at=ledger_at, report=interrupt
        )
    made = lorand.simulate(config, [ROWS, ROWS], model=tiny_model, ledger_at=ledger_at)
    assert [r.committed for r in made.rounds] == [3, 4]
    assert made.facts.rounds == 4


@pytest.mark.parametrize(
    ("shards", "changes", "error", "why"),
    [
        ([ROWS], {}, ConfigError, "the run waits for 2 workers .* there are 1 shards"),
        ([ROWS, ROWS[:3]], {}, DataError, "shard 2 holds 3 examples, fewer than"),
        ([ROWS, []], {}, DataError, "shard 2 holds no examples"),
        ([ROWS, [("text", "?")]], {}, DataError, r"shard 2: the label '\?' is not one of"),
        ([ROWS, ["text"]], {}, DataError, "shard 2: rows are pairs"),
        (
            [ROWS, ROWS],
            {"privacy": {"mode": "worker"}, "rounds": {**TWO, "telemetry": "none"}},
            ConfigError,
            "simulate it without",
        ),
    ],
)
def test_what_cannot_be_simulated_says_why(
    shards: Any, changes: Any, error: type[LorandError], why: str, tiny_model: Path
) -> None:
    with pytest.raises(error, match=why):
        lorand.simulate(run_of(**changes), shards, model=tiny_model)


def test_rounds_that_come_to_nothing_end_a_simulation(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "MOST_ABANDONED", 2)
    monkeypatch.setattr(Part, "loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(LorandError, match="3 rounds in a row came to nothing"):
        lorand.simulate(run_of(), [ROWS, ROWS], model=tiny_model, seed=1)


def test_another_model_than_the_lock_names_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(tiny.to_toml(tiny.settings("backprop", rounds=TWO)), encoding="utf-8")
    lock = lorand.prepare(path, tiny_model).to_lock()
    (tmp_path / "run.lock").write_text(lock, encoding="utf-8")
    other = tiny.write_model(tmp_path / "other", seed=3)
    with pytest.raises(HandshakeError, match="the base weights here"):
        lorand.simulate(path, [ROWS, ROWS], model=other)


# -- a coordinator in a thread -------------------------------------------------------------------


def test_a_coordinator_says_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match=r"lorand\.prepare"):
        lorand.Coordinator(run_of())
    run = run_of(run={"rounds": 3, "adopt_first_worker": True})
    with pytest.raises(ConfigError, match="reached from others"):
        lorand.Coordinator(run, address="0.0.0.0:0")
    with lorand.Coordinator(run) as coordinator:
        taken = lorand.Coordinator(run, address=coordinator.address)
        with pytest.raises(ConfigError, match="cannot listen"):
            taken.start()
        with pytest.raises(LorandError, match="has not begun"):
            _ = coordinator.position
    coordinator.stop()
