"""Virtual workers in groups: the same run, wherever they are."""

import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests import tiny

import lorand
from lorand.errors import ConfigError, HandshakeError, LorandError
from lorand_api import groups
from lorand_api.groups import Call, Place, Seat, Setup
from lorand_worker.precision import Precision
from lorand_worker.tasks import Forward

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [tiny.rows(domain, 8, seed=seed) for domain in tiny.DOMAINS for seed in (1, 2)]
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "backprop": {"codec": {"up": "sign", "down": "sign"}},
    "spsa": {
        "codec": {"rounding": "unbiased"},
        "directions": {"mode": "own"},
        "estimator": {"directions_per_round": 4},
        "run": {"rounds": 2},
    },
    "local": {
        "local": {"steps": 2, "learning_rate": 0.002},
        "codec": {"up": "sign", "down": "int8"},
        "optimizer": {"kind": "sgd", "learning_rate": 1.0, "normalise": False},
        "directions": {"rotate_every": 2},
        "rounds": {"participants": 4, "start_with": 6, "quorum": 3},
    },
}
SHARED: dict[str, Any] = {"seed": 1, "forward": Forward(Precision.FLOAT32)}


def run_of(name: str = "backprop") -> lorand.config.RunConfig:
    kind: Any = "spsa" if name == "spsa" else "backprop"
    sections = {"run": {"rounds": 4}, "rounds": {"quorum": 6, "start_with": 6}, **RUNS[name]}
    return tiny.config(kind, **sections)


class Here:
    """Places in this process, as many as there should be."""

    def __init__(self, count: int, seat: type[Seat] = Seat) -> None:
        self.calls: list[str] = []
        self.setups: list[Setup] = []
        self.closed = False
        self._count, self._seat = count, seat

    @contextmanager
    def places(self, workers: int) -> Iterator[list[Place]]:
        yield [self._place] * self._count
        self.closed = True

    def _place(self, setup: Setup) -> Call:
        seat, group = self._seat(setup), len(self.setups)
        self.setups.append(setup)

        def call(method: str, *arguments: Any) -> Future[Any]:
            self.calls.append(f"{group} {method}")
            told: Future[Any] = Future()
            try:
                told.set_result(getattr(seat, method)(*arguments))
            except LorandError as error:
                told.set_exception(error)
            return told

        return call


@pytest.mark.parametrize("name", RUNS)
def test_groups_elsewhere_make_the_same_ledger(name: str, tiny_model: Path) -> None:
    config, machines = run_of(name), Here(4)
    alone = lorand.simulate(config, ROWS, model=tiny_model, **SHARED)
    spread = lorand.simulate(config, ROWS, model=tiny_model, machines=machines, **SHARED)
    assert spread.position.head == alone.position.head
    assert spread.base.replica.digest() == alone.base.replica.digest()
    assert spread.rounds == alone.rounds
    assert [(setup.first, len(setup.parts)) for setup in machines.setups] == [
        *((1, 1), (2, 2), (4, 1), (5, 2))
    ]
    assert machines.closed
    assert machines.calls.count("0 digest") == 1


def test_there_are_no_more_groups_than_workers(tiny_model: Path) -> None:
    machines = Here(20)
    lorand.simulate(run_of(), ROWS, model=tiny_model, machines=machines, **SHARED)
    assert [len(setup.parts) for setup in machines.setups] == [1] * 6
    assert {setup.groups for setup in machines.setups} == {6}


def test_a_spread_run_goes_on_in_its_ledger(tiny_model: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(made: lorand.Round) -> None:
        if made.committed == 2:
            raise Interrupted

    shared: dict[str, Any] = {"model": tiny_model, "ledger_at": tmp_path / "a.ledger", **SHARED}
    with pytest.raises(Interrupted):
        lorand.simulate(run_of(), ROWS, report=interrupt, machines=Here(2), **shared)
    made = lorand.simulate(run_of(), ROWS, machines=Here(3), **shared)
    assert [r.committed for r in made.rounds] == [3, 4]


def test_a_machine_that_computes_other_weights_is_named(tiny_model: Path) -> None:
    class Other(Seat):
        def digest(self, bodies: Any) -> bytes:
            return super().digest(bodies)[::-1]

    with pytest.raises(LorandError, match=r"group 1 of .* computes other bits"):
        lorand.simulate(run_of(), ROWS, model=tiny_model, machines=Here(2, Other), **SHARED)


def test_a_machine_that_has_another_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other", seed=3)

    class Elsewhere(Seat):
        def __init__(self, setup: Setup) -> None:
            super().__init__(Setup(**{**vars(setup), "model": other}))

    with pytest.raises(HandshakeError, match="the base weights here"):
        lorand.simulate(run_of(), ROWS, model=tiny_model, machines=Here(2, Elsewhere), **SHARED)


def test_a_machine_that_does_not_answer_ends_the_run(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "LIMIT_S", 0.01)

    class Silent(Here):
        def _place(self, setup: Setup) -> Call:
            return lambda *_: Future()

    with pytest.raises(LorandError, match="did not answer within 0 s"):
        lorand.simulate(run_of(), ROWS, model=tiny_model, machines=Silent(2), **SHARED)


def test_ray_that_is_not_there(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'lorand\[ray\]'"):
        lorand.simulate(run_of(), ROWS, model=tiny_model, machines=lorand.Ray(2), **SHARED)
