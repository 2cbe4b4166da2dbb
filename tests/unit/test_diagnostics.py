"""What a run's scalars tell: the figures against simulation, and the sentences."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tests.runs import IDENTITY, codes_of, config_of, contribution, hello
from typer.testing import CliRunner

from lorand import codec
from lorand.config import RunConfig
from lorand.errors import LedgerError
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand.v1 import status_pb2 as status
from lorand_coordinator import cli, diagnostics, show
from lorand_coordinator.aggregation import Report
from lorand_coordinator.diagnostics import Figures, Recent, findings, of_round
from lorand_coordinator.hub import Hub
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import SqliteStore


def wide(up: str = "log8", count: int = 64, **changes: dict[str, Any]) -> RunConfig:
    estimator = {"directions_per_round": count, **changes.pop("estimator", {})}
    return config_of(codec={"up": up}, estimator=estimator, **changes)


# ------------------------------------------------------------- figures


@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 8.0])
def test_signal_to_noise_is_that_of_the_mean(workers: int, ratio: float) -> None:
    """Slopes of variance `ratio`, and noise whose mean over the participants has variance one."""
    config, rng = wide("int32"), np.random.default_rng(3)
    recent = Recent(config, window=60)
    for _ in range(60):
        slopes = rng.normal(0, np.sqrt(ratio), 64)
        parts = slopes + rng.normal(0, np.sqrt(workers), (workers, 64))
        recent.add(-20, [Report(codec.encode("int32", part, -20)) for part in parts])
    found = recent.total.signal_to_noise
    assert found is not None
    estimate, error = found
    assert estimate == pytest.approx(ratio, abs=3 * error)


def test_the_standard_error_is_the_spread_of_the_ratio() -> None:
    """Over 400 windows of 5 rounds."""
    config, rng = wide("int32"), np.random.default_rng(8)
    found = []
    for _ in range(400):
        recent = Recent(config, window=5)
        for _ in range(5):
            parts = rng.normal(0, 1.0, 64) + rng.normal(0, np.sqrt(2), (2, 64))
            recent.add(-20, [Report(codec.encode("int32", part, -20)) for part in parts])
        assert recent.total.signal_to_noise is not None
        found.append(recent.total.signal_to_noise)
    ratios, errors = np.array(found).T
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.15)


@pytest.mark.parametrize("changes", [{"directions": {"pool_size": 64, "mode": "own"}}, {}])
def test_one_participant_or_own_directions_compare_nothing(changes: dict[str, Any]) -> None:
    config = wide(**changes)
    parts = [Report(codes_of(config, seed)) for seed in range(2 if changes else 1)]
    assert of_round(config, 4, parts).signal_to_noise is None


def test_shares_are_of_all_codes() -> None:
    config = config_of(codec={"up": "int8"})
    figures = of_round(config, 2, [Report(np.array([0, 127, 5])), Report(np.array([0, -127, 0]))])
    assert (figures.scalars, figures.zeros, figures.clipped) == (6, 3, 2)
    assert figures.scale_exponent == 2
    signs = of_round(config_of(codec={"up": "sign"}), 0, [Report(np.array([1, -1, 1]))])
    assert (signs.zeros, signs.clipped) == (0, 0)


def test_only_the_last_rounds_count() -> None:
    recent = Recent(config_of(), window=2)
    for value in (0, 0, 1, 2):
        recent.add(value, [Report(np.full(3, value))])
    assert (len(recent.rounds), recent.total.zeros, recent.total.scale_exponent) == (2, 0, 2)


# ------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("changes", "figures", "kind", "text"),
    [
        (
            {"codec": {"up": "int8"}},
            Figures(scalars=100, zeros=92),
            "zeros",
            "92% of the scalars are zero: raise estimator.perturbation_scale or use "
            'codec.up = "log8", which reaches further down',
        ),
        (
            {"codec": {"up": "log8"}},
            Figures(scalars=100, zeros=92),
            "zeros",
            "92% of the scalars are zero: raise estimator.perturbation_scale",
        ),
        ({}, Figures(scalars=100, clipped=20), "clipped", 'use codec.up = "log8"'),
        (
            {"codec": {"up": "int32"}},
            Figures(scalars=100, clipped=20),
            "clipped",
            'int32 codes end at ±2048: use codec.up = "int8" or "log8"',
        ),
        (
            {"codec": {"up": "log8"}},
            Figures(scalars=100, clipped=80, scale_exponent=60),
            "overflow",
            "the scale of log8 codes is at its end, 2^60: the losses have left any sensible range; "
            "start again with a lower optimizer.learning_rate",
        ),
        (
            {},
            Figures(scalars=99, signal=0.1, noise=9.0, compared=40, freedom=40, examples=1280),
            "noise",
            "raise estimator.batch_size",
        ),
        (
            {},
            Figures(
                scalars=9999, signal=80.0, noise=100.0, compared=2000, freedom=2000, examples=64000
            ),
            "signal",
            "a round's 32 examples are below the critical batch of about 40",
        ),
        (
            {},
            Figures(
                scalars=9999, signal=400.0, noise=100.0, compared=2000, freedom=2000, examples=64000
            ),
            "signal",
            "above the critical batch of about 8; more examples would change little",
        ),
    ],
)
def test_a_finding_says_what_to_do(
    changes: dict[str, Any], figures: Figures, kind: str, text: str
) -> None:
    (found,) = findings(config_of(**changes), figures)
    assert found.kind == kind
    assert text in found.text
    assert found.warning == (kind != "signal")


def test_nothing_is_said_of_too_few_scalars_or_of_healthy_ones() -> None:
    assert findings(config_of(), Figures(scalars=20, zeros=20)) == []
    assert findings(config_of(), Figures(scalars=200, zeros=3, clipped=2)) == []


# ------------------------------------------------------------- where they are shown


def committed_run(path: Path, rounds: int, checkpoint_every: int = 50) -> Sequencer:
    config = wide("int8", 16, run={"rounds": 100}, service={"checkpoint_every": checkpoint_every})
    sequencer = Sequencer(config, SqliteStore(path), IDENTITY)
    for name in ("a", "b"):
        assert sequencer.position is not None
        worker, _ = sequencer.admit(hello(sequencer.position, name))
        sequencer.connect(worker, 0.0)
    for round_index in range(1, rounds + 1):
        report_round(sequencer, round_index)
    return sequencer


def report_round(sequencer: Sequencer, round_index: int) -> None:
    for worker in (1, 2):
        message = contribution(sequencer.config, round_index, seed=10 * round_index + worker)
        sequencer.receive(worker, message, 0.0)


@pytest.mark.parametrize("checkpoint_every", [50, 4])
def test_a_restart_and_the_ledger_show_the_same(tmp_path: Path, checkpoint_every: int) -> None:
    """Also where a checkpoint spares the optimizer the rounds before it."""
    path = tmp_path / "small.ledger"
    sequencer = committed_run(path, rounds=25, checkpoint_every=checkpoint_every)
    before = sequencer.recent.rounds
    sequencer.store.close()
    assert len(before) == diagnostics.WINDOW
    again = Sequencer(sequencer.config, SqliteStore(path), None)
    assert again.recent.rounds == before
    again.store.close()
    result = CliRunner().invoke(cli.app, ["diagnose", str(path), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == show.figures(again.recent, again.comparison)
    text = CliRunner().invoke(cli.app, ["diagnose", str(path)]).output
    assert "last 20 rounds, 640 scalars: " in text
    assert "signal-to-noise" in text


def test_an_exported_ledger_has_no_scalars(tmp_path: Path) -> None:
    path = tmp_path / "small.ledger"
    committed_run(path, rounds=1).store.close()
    exported = tmp_path / "exported.bin"
    assert (
        CliRunner().invoke(cli.app, ["ledger", "export", str(path), str(exported)]).exit_code == 0
    )
    result = CliRunner().invoke(cli.app, ["diagnose", str(exported)])
    assert isinstance(result.exception, LedgerError)
    assert "give the coordinator's own ledger file" in str(result.exception)


def test_the_log_says_it_once_a_window(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub = Hub(committed_run(tmp_path / "small.ledger", rounds=0), clock=lambda: 0.0)
    zeros = np.zeros(hub.config.num_directions)
    part = codec.pack("int8", codec.encode("int8", zeros, 0))
    said = []
    with caplog.at_level(logging.INFO, "lorand.coordinator"):
        for round_index in range(1, 2 * diagnostics.WINDOW):
            message = pb.Contribution(round_index=round_index, codes=part)
            for worker in (1, 2):
                request = wire.ParticipateRequest(contribution=message)
                hub.deliver(hub.sequencer.receive(worker, request, 0.0))
            if "100% of the scalars are zero" in caplog.text:
                said.append(round_index)
            caplog.clear()
    hub.sequencer.store.close()
    assert said == [1, 1 + diagnostics.WINDOW]


def test_the_status_shows_findings() -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(show.panel(status.GetStatusResponse(findings=["a finding: do this"])))
    assert "a finding: do this" in capture.get()
