"""Rounds of a DIFF2 run: what a worker measures and is charged, what the coordinator gathers."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from tests.runs import IDENTITY, config_of, hello
from torch import nn

from lorand import codec, ledger
from lorand.codec import Floats
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.errors import BudgetSpent, ConfigError, LorandError
from lorand.ledger import Position
from lorand.privacy import diff2, plan
from lorand.privacy.accountant import Release
from lorand.privacy.diff2 import Plan, Rule
from lorand.privacy.mechanism import Integers
from lorand.replica import CopyReplica
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import optimizer
from lorand_coordinator.aggregation import Report
from lorand_coordinator.sequencer import Outgoing, Sequencer
from lorand_coordinator.store import SqliteStore
from lorand_worker import budget as budgets
from lorand_worker import estimators, guard
from lorand_worker.bench import bring
from lorand_worker.budget import Budget
from lorand_worker.data import PoissonSampler
from lorand_worker.differenced import Differenced
from lorand_worker.estimators import Measurement, Order
from lorand_worker.feedback import Place
from lorand_worker.participant import Participant

POOL: Final = 64
EVERY: Final = 3
ROUNDS: Final = 7
ROWS: Final = np.random.default_rng(5).normal(0, 1, (4, 6))
SECTIONS: Final[dict[str, dict[str, Any]]] = {
    "run": {"rounds": ROUNDS},
    "estimator": {"kind": "backprop", "batch_size": 4},
    "codec": {"up": "int32", "down": "int32"},
    "optimizer": {"learning_rate": 0.05, "normalise": False, "schedule": "constant"},
    "rounds": {"telemetry": "none"},
    "privacy": {
        "mode": "worker",
        "estimator": "diff2",
        "target_epsilon": 8.0,
        "sample_rate": 1.0,
        "clip_bound": 100.0,
        "slope_bound": 1000.0,
        "restart_every": EVERY,
        "restart_share": 0.4,
    },
}


def of(**changes: dict[str, Any]) -> RunConfig:
    names = dict.fromkeys([*SECTIONS, *changes])
    return config_of(
        **{name: {**SECTIONS.get(name, {}), **changes.get(name, {})} for name in names}
    )


CONFIG: Final = of()


PLANNED: Final = plan.planned_differences


@pytest.fixture(autouse=True)
def _roughly_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take noise that is enough, instead of calculating for seconds how little would be."""

    def roughly(config: RunConfig) -> Plan:
        counts = diff2.counts(config.run.rounds, EVERY, config.privacy.spare_rounds)
        restart, increment = Release("gaussian", 3.0, 1.0), Release("gaussian", 4.0, 1.0)
        return Plan(restart, increment, *counts)

    monkeypatch.setattr(plan, "planned_differences", roughly)


# ------------------------------------------------------------- settings


def test_it_is_off_unless_asked_for() -> None:
    assert not config_of().privacy.differences
    assert config_of().canonical() == config_of(privacy={"estimator": "gradients"}).canonical()
    assert CONFIG.needs_history
    assert any("experimental" in line for line in guard.disclosure(CONFIG))


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"privacy": {"mode": "none"}}, 'privacy.mode = "worker"'),
        ({"privacy": {"mechanism": "laplace", "delta": 0.0}}, 'mechanism = "gaussian"'),
        ({"privacy": {"batch_cap": 8, "max_examples": 9}}, "privacy.batch_cap = 0"),
        (
            {"estimator": {"kind": "spsa", "directions_per_round": 8}},
            "estimator.directions_per_round = 64",
        ),
        ({"directions": {"mode": "own"}}, 'directions.mode = "shared"'),
        ({"directions": {"drawing": "weighted"}}, 'drawing = "uniform"'),
        ({"directions": {"rotate_every": 4}}, "a multiple of privacy.restart_every = 3"),
        ({"subspace": {"kind": "dct"}}, 'subspace.kind = "full"'),
        ({"optimizer": {"kind": "adam"}}, 'optimizer.kind = "sgd"'),
        ({"optimizer": {"normalise": True}}, "normalise = false"),
        ({"optimizer": {"momentum": 0.9}}, "momentum = 0"),
        ({"optimizer": {"clip_factor": 3.0}}, "clip_factor = 0"),
        ({"codec": {"up": "int8"}}, 'codec.up = "int32"'),
        ({"rounds": {"aggregation": "majority"}}, 'rounds.aggregation = "mean"'),
        ({"run": {"rounds": 1}}, "set run.rounds to 2"),
        ({"local": {"steps": 1}}, "local.steps = 0"),
    ],
)
def test_what_it_does_not_go_with(changes: dict[str, dict[str, Any]], remedy: str) -> None:
    with pytest.raises(ValueError, match="Value error") as caught:
        of(**changes)
    assert remedy in str(caught.value)
    assert not isinstance(caught.value, ConfigError)


# ------------------------------------------------------------- the coordinator


def advanced(config: RunConfig, values: Sequence[float]) -> Iterator[optimizer.State]:
    """Yield the state after each round in which two workers report this value everywhere."""
    draws, state = config.draws(b"\7" * 32), optimizer.start(config)
    for number, value in enumerate(values, 1):
        codes = codec.encode("int32", np.full(POOL, value), codec.INT32_SCALE_EXPONENT)
        reports = {1: Report(codes), 2: Report(-codes * 0)}
        state, _ = optimizer.advance(config, draws, state, number, reports)
        yield state


def test_the_coordinator_adds_up_between_restarts() -> None:
    values = [4.0, -1.0, 0.5, 2.0, 1.0]
    states = list(advanced(CONFIG, values))
    gathered = [state.first[0] for state in states]
    assert gathered == [2.0, 1.5, 1.75, 1.0, 1.5]
    steps = np.cumsum([-0.05 / POOL * v for v in gathered])
    found = [state.coefficients[0] * 2.0**-32 for state in states]
    assert found == pytest.approx(steps.tolist(), abs=1e-8)


def test_a_pool_begins_with_a_restart() -> None:
    config = of(directions={"rotate_every": EVERY})
    states = list(advanced(config, [4.0, -1.0, 0.5, 2.0]))
    assert states[2].coefficients.tolist() == [0] * POOL
    assert states[3].first[0] == 1.0


# ------------------------------------------------------------- the worker


class Bench:
    """Losses ½(x_i·w − 1)² of weights that a replica holds, released with hardly any noise."""

    def __init__(self, config: RunConfig = CONFIG) -> None:
        """Stand at the start."""
        module, self.weight = nn.Module(), nn.Parameter(torch.zeros(2, 3))
        module.w = self.weight
        self.replica = CopyReplica.of(module, IDENTITY.manifest, config.pool(IDENTITY))
        estimator = estimators.build(config, self.replica, module)
        rule = Rule(100.0, 200.0, 0.01, 0.01, 4)
        sampler = PoissonSampler(4, 1.0)
        self.work = Differenced(estimator, rule, sampler, config.privacy, self.replica)
        self.seen: list[Measurement] = []

    @property
    def examples(self) -> int:
        """See Bench."""
        return 4

    def adopt(self, position: Position) -> None:
        """See Bench."""
        bring(self.replica, position)

    def losses(self, batch: Sequence[int]) -> torch.Tensor:
        """One loss an example."""
        rows = torch.from_numpy(ROWS[list(batch)]).float()
        return 0.5 * (rows @ self.weight.flatten() - 1) ** 2

    def measure(self, order: Order) -> Measurement:
        """See Bench."""
        self.seen.append(self.work.measure(self.losses, order))
        return self.seen[-1]

    def release(self, indices: Indices) -> Integers:
        """No test of these is of sums."""
        raise NotImplementedError

    def slopes(self) -> Floats:
        """The mean of what `each` measures here, shape (K,)."""
        vectors = self.work.estimator.each(self.losses, [0, 1, 2, 3], np.arange(POOL))
        mean: Floats = vectors.mean(axis=0)
        return mean


def test_between_restarts_the_change_is_released_and_nothing_moves() -> None:
    bench = Bench()
    before = np.zeros(POOL, np.int64)
    here = np.random.default_rng(1).integers(-(2**26), 2**26, POOL)
    bench.replica.set(before)
    earlier = bench.slopes()
    bench.replica.set(here)
    present, digest = bench.slopes(), bench.replica.digest()
    released = bench.measure(Order(np.arange(POOL), committed=1, before=before))
    noise = 0.01 * 200.0 * diff2.distance(here, 32) / 4
    assert released.loss is None
    assert np.abs(released.values - (present - earlier)).max() < 6 * noise
    assert np.abs(present - earlier).max() > 10 * noise, "there is something to see"
    assert bench.replica.coefficients is here
    assert bench.replica.digest() == digest
    whole = bench.measure(Order(np.arange(POOL), committed=EVERY, before=before))
    assert np.abs(whole.values - present).max() < 6 * 0.01 * 100.0 / 4


def test_an_error_leaves_the_replica_where_it_stood() -> None:
    bench, here = Bench(), np.full(POOL, 5)
    bench.replica.set(here)
    calls: list[int] = []

    def failing(batch: Sequence[int]) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise LorandError("at the position before")
        return bench.losses(batch)

    with pytest.raises(LorandError, match="at the position before"):
        bench.work.measure(failing, Order(np.arange(POOL), committed=1, before=0 * here))
    assert bench.replica.coefficients is here


def test_without_the_commit_before_it_is_said() -> None:
    with pytest.raises(LorandError, match="join again"):
        Bench().measure(Order(np.arange(POOL), committed=1))


# ------------------------------------------------------------- a run


class Run:
    """A sequencer and two workers with budgets; messages arrive at once."""

    def __init__(self, folder: Path, config: RunConfig = CONFIG) -> None:
        """Begin it."""
        self.folder, self.config = folder, config
        self.store = SqliteStore(":memory:")
        self.sequencer = Sequencer(config, self.store, IDENTITY)
        self.workers: dict[int, Participant] = {}
        self.benches: dict[int, Bench] = {}
        self.starts: list[tuple[int, wire.RoundStart]] = []
        for name in ("ada", "ben"):
            assert self.sequencer.position is not None
            number, outgoing = self.sequencer.admit(hello(self.sequencer.position, name))
            self.open(number)
            self.deliver(outgoing)
        for number in self.workers:
            self.deliver(self.sequencer.connect(number, 0.0))

    def open(self, number: int) -> None:
        """Start a worker's process, which reads the ledger from its first entry."""
        origin = ledger.origin(self.config, IDENTITY)
        place = Place(self.folder, origin.run_digest, f"worker {number}")
        self.benches[number] = Bench(self.config)
        budget = Budget(place, self.config, self.folder / f"{number}.csv")
        worker = Participant(origin, self.benches[number], budget=budget)
        worker.worker = number
        self.workers[number] = worker
        for body in self.store.entries():
            worker.on_entry(body)

    def deliver(self, outgoing: list[Outgoing]) -> None:
        """Have the workers read the ledger, and keep the rounds that they are asked for."""
        for worker in self.workers.values():
            for body in self.store.entries(worker.position.next_sequence):
                worker.on_entry(body)
        started = [item for item in outgoing if item.message.HasField("round_start")]
        self.starts += [(item.worker, item.message.round_start) for item in started]

    def step(self) -> None:
        """Have the workers answer the round that was started."""
        starts, self.starts = self.starts, []
        for number, start in starts:
            self.deliver(
                self.sequencer.receive(number, self.workers[number].on_round_start(start), 0.0)
            )

    def close(self) -> None:
        """End it."""
        for worker in self.workers.values():
            assert worker._budget is not None
            worker._budget.close()
        self.store.close()


@pytest.mark.usefixtures("one_thread")
def test_a_run_gathers_the_gradient_and_spends_its_budget(tmp_path: Path) -> None:
    """Through restarts of everything, in the middle of an epoch."""
    with closing(Run(tmp_path)) as run:
        away = []
        for done in range(ROUNDS):
            bench = run.benches[1]
            run.workers[1].settle()
            slopes = bench.slopes()
            run.step()
            away.append(np.abs(run.sequencer._optimizer.first - slopes).max())
            if done == 4:
                for worker in run.workers.values():
                    assert worker._budget is not None
                    worker._budget.close()
                for number in list(run.workers):
                    run.open(number)
                again = Sequencer(CONFIG, run.store, None)
                assert again._optimizer.first.tolist() == run.sequencer._optimizer.first.tolist()
        assert max(away) < 6 * 0.01 * 100.0 / 4 * 2
        run.workers[1].settle()
        losses = run.benches[1].losses([0, 1, 2, 3]).mean().item()
        assert run.workers[1].position.finished
        assert losses < 0.5 * 0.9, "which is less than at the start"
        for worker in run.workers.values():
            assert worker._budget is not None
            account = worker._budget.account
            assert account.restarts is not None
            assert (account.charged, account.limit, account.left) == (ROUNDS, ROUNDS, 0)
            assert (account.restarts.charged, account.restarts.limit) == (3, 3)
            assert account.spent() == account.most()
            assert account == budgets.read(worker._budget.path)


# ------------------------------------------------------------- the budget


@pytest.fixture
def budget(tmp_path: Path) -> Iterator[Budget]:
    place = Place(tmp_path, ledger.origin(CONFIG, IDENTITY).run_digest, "worker 1")
    opened = Budget(place, CONFIG, tmp_path / "a.csv")
    with closing(opened):
        yield opened


def test_each_kind_has_its_own_budget(budget: Budget) -> None:
    """Whoever starts restarts over and over gets no more of them than were planned."""
    for number in range(3):
        budget.charge((number, 0, 1), pb.Contribution(round_index=number))
    with pytest.raises(BudgetSpent, match="3 of 7 releases"):
        budget.check(EVERY)
    budget.check(1)
    for number in range(3, 7):
        budget.charge((number, 1, 1), pb.Contribution(round_index=number))
    for committed in (0, 1, 2):
        with pytest.raises(BudgetSpent):
            budget.check(committed)
    rule = budget.mechanism(CONFIG)
    assert isinstance(rule, Rule)
    first = budget.account.restarts
    assert first is not None
    assert (rule.restart, rule.increment) == (
        first.release.multiplier,
        budget.account.release.multiplier,
    )
    assert (rule.clip_bound, rule.slope_bound, rule.divisor) == (100.0, 1000.0, 4)


def test_a_budget_of_other_counts_is_refused(budget: Budget, tmp_path: Path) -> None:
    budget.close()
    written = budget.path.read_text()
    budget.path.write_text(written.replace('"every": 3', '"every": 4'))
    place = Place(tmp_path, ledger.origin(CONFIG, IDENTITY).run_digest, "worker 1")
    with pytest.raises(LorandError, match="cannot be relied upon"):
        Budget(place, CONFIG, tmp_path / "a.csv")
    budget.path.write_text(json.dumps({**json.loads(written), "restarts": None}))
    with pytest.raises(LorandError, match="of another run"):
        Budget(place, CONFIG, tmp_path / "a.csv")
    budget.path.write_text(written.replace('"limit": 3', '"limit": -1'))
    with pytest.raises(LorandError, match="what it counts cannot be"):
        budgets.read(budget.path)


def test_spare_rounds_are_of_either_kind(tmp_path: Path) -> None:
    config = of(privacy={"spare_rounds": 2})
    place = Place(tmp_path, ledger.origin(config, IDENTITY).run_digest, "worker 1")
    with closing(Budget(place, config, tmp_path / "a.csv")) as opened:
        account = opened.account
        assert account.restarts is not None
    assert (account.restarts.limit, account.left_after(0), account.left_after(1)) == (5, 5, 6)


@pytest.mark.slow
def test_the_noise_follows_from_the_runs_own_settings() -> None:
    made = diff2.planned(ROUNDS, EVERY, 0.4, rate=1.0, target_epsilon=8.0, delta=1e-5, spare=0)
    assert PLANNED(CONFIG) == made
    assert 7.99 < made.epsilon(1e-5) <= 8.0
