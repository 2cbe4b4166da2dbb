"""Refined schedules: the paper's algorithm on known norms, and from a ledger to a run file."""

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.runs import IDENTITY, config_of, hello
from typer.testing import CliRunner

from lorand import codec
from lorand.config import RunConfig
from lorand.errors import LedgerError
from lorand.schedules import factor
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import cli, optimizer
from lorand_coordinator.aggregation import aggregate
from lorand_coordinator.history import Round, read
from lorand_coordinator.refinement import median_filter, norm_for, norms, points, refine
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import SqliteStore


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_equal_norms_give_linear_decay(norm: str) -> None:
    factors = refine(np.full(100, 7.0), norm)  # type: ignore[arg-type]
    assert factors == pytest.approx(np.arange(99, -1, -1) / 99)
    assert points(factors)[0] == 1.0
    assert min(points(factors)) > 0, "the last round is not wasted"


def test_the_algorithm_on_three_levels() -> None:
    """w = 1/Ĝ² (or 1/Ĝ for l1), η_t ∝ w_t Σ_{p>t} w_p: computed here round by round."""
    observed = np.repeat([4.0, 1.0, 2.0], 100)
    observed[50] = 1e6  # an outlier that the median leaves out
    for norm, power in (("l2", 2), ("l1", 1)):
        smooth = np.repeat([4.0, 1.0, 2.0], 100)
        weights = smooth**-power
        expected = np.array([weights[t] * weights[t + 1 :].sum() for t in range(300)])
        found = refine(observed, norm)  # type: ignore[arg-type]
        assert found == pytest.approx(expected / expected.max())
        assert found[0] < found[100], "large norms at the start warm up"


def test_the_filter_is_a_running_median() -> None:
    values = np.random.default_rng(0).normal(size=50)
    found = median_filter(values, 0.1)
    assert found[20] == np.median(values[18:23])
    assert found[0] == np.median([values[0], values[0], *values[:3]])
    assert found[-1] == np.median([*values[-3:], values[-2], values[-3]])


def test_rounds_of_zeros_count_as_the_smallest_norm() -> None:
    observed = np.full(40, 2.0)
    observed[10:20] = 0.0
    assert refine(observed) == pytest.approx(refine(np.full(40, 2.0)))


@pytest.mark.parametrize(
    ("observed", "message"),
    [
        (np.ones(19), "has 19 committed rounds"),
        (np.zeros(50), "all scalars of the ledger are zero"),
    ],
)
def test_what_cannot_be_refined(observed: np.ndarray, message: str) -> None:
    with pytest.raises(LedgerError, match=message):
        refine(observed)


def test_points_are_exact_as_text() -> None:
    found = points(refine(np.linspace(3.0, 1.0, 777)))
    assert len(found) == 64
    assert all(value * 2**20 % 1 == 0 and 0 <= value <= 1 for value in found)
    assert json.loads(json.dumps(found)) == found


def committed(path: Path, rounds: int, **changes: dict[str, Any]) -> RunConfig:
    """A run whose scalars shrink to a quarter."""
    config = config_of(run={"rounds": 60}, codec={"up": "log8"}, **changes)
    sequencer = Sequencer(config, SqliteStore(path), IDENTITY)
    for name in ("a", "b"):
        assert sequencer.position is not None
        worker, _ = sequencer.admit(hello(sequencer.position, name))
        sequencer.connect(worker, 0.0)
    rng = np.random.default_rng(1)
    for index in range(1, rounds + 1):
        scale = sequencer._optimizer.scale_exponent
        for worker in (1, 2):
            values = rng.normal(0, 4.0 if index < 15 else 1.0, config.num_directions)
            codes = codec.encode("log8", values, scale)
            part = pb.Contribution(round_index=index, codes=codec.pack("log8", codes))
            sequencer.receive(worker, wire.ParticipateRequest(contribution=part), 0.0)
    sequencer.store.close()
    return config


def test_from_a_ledger_to_the_next_runs_file(tmp_path: Path) -> None:
    path = tmp_path / "small.ledger"
    config = committed(path, rounds=60)
    result = CliRunner().invoke(cli.app, ["refine", str(path)])
    assert result.exit_code == 0, result.output
    section = tomllib.loads(result.output)["optimizer"]
    content = config.model_dump()
    again = RunConfig.model_validate({**content, "optimizer": content["optimizer"] | section})
    assert again.digest() != config.digest()
    rates = [
        factor(again.optimizer.schedule, n, 60, refined=again.optimizer.refined) for n in range(60)
    ]
    assert np.argmax(rates) > 5, "it warms up while scalars are large"
    assert rates[-1] < 0.1
    assert rates[2] < 0.3


def test_a_running_run_is_refined_with_a_remark(tmp_path: Path) -> None:
    path = tmp_path / "small.ledger"
    committed(path, rounds=30)
    result = CliRunner().invoke(cli.app, ["refine", str(path)])
    assert "# from 30 of 60 rounds: of the rest of the run nothing is known yet" in result.output
    content = json.loads(CliRunner().invoke(cli.app, ["refine", str(path), "--json"]).output)
    assert (content["rounds"], content["norm"], content["schedule"]) == (30, "l2", "refined")


@pytest.mark.parametrize("mode", ["shared", "own"])
def test_weighted_draws_follow_what_was_moved(tmp_path: Path, mode: str) -> None:
    """Which scalars stand at one direction, and what they weigh, depends on the rounds before."""
    path = tmp_path / "small.ledger"
    drawn = {"pool_size": 64, "mode": mode, "drawing": "weighted-unbiased"}
    committed(path, rounds=30, directions=drawn)
    config, rounds = read(path)
    found = norms(config, rounds, "l2")
    again, state = history_of(path), optimizer.start(config)
    for part, norm in zip(again, found, strict=True):
        estimate = aggregate(
            config, part.draws, part.round_index, state.scale_exponent, part.reports
        )
        assert norm == pytest.approx(np.sqrt(np.mean(estimate.values**2)))
        state, update = optimizer.advance(config, part.draws, state, part.round_index, part.reports)
        assert len(update.codes) == len(estimate.values)
    assert part.draws.activity is not None


def history_of(path: Path) -> list[Round]:
    return list(read(path)[1])


def test_adam_goes_by_l1() -> None:
    assert norm_for(config_of(optimizer={"learning_rate": 0.1, "kind": "adam"})) == "l1"
