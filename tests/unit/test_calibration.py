"""Calibration: its formulas on losses known exactly, and the command on a tiny model."""

import json
import tomllib
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from tests import tiny
from typer.testing import CliRunner

from lorand.codec import Floats
from lorand.config import RunConfig
from lorand.errors import ConfigError, DataError
from lorand_worker import calibration, cli, suggestions
from lorand_worker.calibration import Line, Probe, Readings
from lorand_worker.suggestions import Noise, noise_of, suggest

pytestmark = pytest.mark.usefixtures("one_thread")

SCALE: Final = 0.01
BATCH: Final = 8
CURVATURE: Final = 300.0


def readings(
    *, signal: float = 4.0, noise: float = 36.0, rounding: float = 1e-9, third: float = 0.0
) -> Readings:
    """4,000 directions and 16 batches of L(t) = 0.7 + g t + T t²/2 + q t³/6 along each."""
    rng = np.random.default_rng(5)
    slopes = rng.normal(0, np.sqrt(signal), (4000, 1)) + rng.normal(0, np.sqrt(noise), (4000, 16))
    curvature = rng.normal(CURVATURE, CURVATURE / 10, (4000, 1))

    def at(step: float, batches: int) -> Floats:
        exact = slopes * step + curvature * step**2 / 2 + third * step**3 / 6 + 0.7
        return (exact + rng.normal(0, rounding, exact.shape))[:, :batches]

    probes = tuple(
        Probe(m * SCALE, at(m * SCALE, n), at(-m * SCALE, n), np.full(n, 0.7))
        for m, n in zip(calibration.MULTIPLES, (2, 16, 2), strict=True)
    )
    return Readings(probes[1].base, probes[1].slopes, BATCH, probes)


def run_of(kind: str = "spsa", **changes: Any) -> RunConfig:
    estimator = {"batch_size": BATCH, "perturbation_scale": SCALE, **changes.pop("estimator", {})}
    return tiny.config(kind, estimator=estimator, **changes)  # type: ignore[arg-type]


# ------------------------------------------------------------- formulas


def test_the_critical_batch_is_where_noise_equals_signal() -> None:
    """N falls as 1/B: at 8 examples it is 9 S, so at 72 it is S (arXiv 1812.06162, eq. 2.9)."""
    noise = noise_of(readings().slopes, BATCH)
    assert noise.signal == pytest.approx(4.0, rel=0.2)
    assert noise.noise == pytest.approx(36.0, rel=0.05)
    assert noise.critical_batch == pytest.approx(72, rel=0.2)
    assert noise_of(readings(signal=0.0).slopes, BATCH).signal == pytest.approx(0, abs=0.5)


def expected_loss(
    config: RunConfig, rate: float, batch: int, *, signs: bool, signal: float, noise: float
) -> float:
    """The change of a quadratic loss in a round, simulated scalar by scalar."""
    rng = np.random.default_rng(11)
    own = config.directions.mode == "own"
    workers, count = config.rounds.quorum, config.num_directions
    measured = count * (workers if own else 1)
    spread = np.sqrt(noise * BATCH / batch / (1 if own else workers))
    slope = rng.normal(0, np.sqrt(signal), (20000, measured))
    seen = slope + rng.normal(0, spread, slope.shape)
    h = np.sign(seen) if signs else seen
    if config.optimizer.normalise or config.optimizer.kind == "adam":
        steps = rate / np.sqrt(measured) * h / np.sqrt(np.mean(h**2))
    else:
        steps = rate / measured * h
    each = -(steps * slope).sum(axis=1) + (steps**2).sum(axis=1) * CURVATURE / 2
    return float(each.mean())


@pytest.mark.parametrize(
    ("optimizer", "changes", "signs"),
    [
        ({"normalise": True}, {}, False),
        ({"normalise": False}, {}, False),
        ({"normalise": True}, {"directions": {"mode": "own"}}, False),
        ({"kind": "adam"}, {}, True),
        ({"normalise": False}, {"codec": {"up": "sign"}}, True),
        ({"normalise": True}, {"rounds": {"aggregation": "majority"}}, True),
    ],
)
def test_the_learning_rate_is_the_best_of_the_quadratic_model(
    optimizer: dict[str, Any], changes: dict[str, Any], signs: bool
) -> None:
    config = run_of(optimizer={"learning_rate": 1e-9, **optimizer}, **changes)
    found = readings()
    rate, why = suggestions.learning_rate(config, found, Noise(4.0, 36.0, 72.0), 32)

    def fall(factor: float) -> float:
        return -expected_loss(config, factor * rate, 32, signs=signs, signal=4.0, noise=36.0)

    # One digit is within a fifth of the best; the parabola is flat there.
    assert fall(1) > 0.9 * max(fall(factor) for factor in (0.5, 0.8, 1.25, 2))
    assert float(why.rsplit(" ", 1)[1]) == pytest.approx(fall(1), rel=0.2)


def test_momentum_sums_to_more_than_a_step() -> None:
    plain, pushed = (
        suggestions.learning_rate(
            run_of(optimizer={"momentum": beta}), readings(), Noise(4.0, 36.0, 72.0), 8
        )[0]
        for beta in (0.0, 0.9)
    )
    assert pushed == pytest.approx(plain / 10, rel=0.3)


def test_all_directions_at_once_go_by_the_line_along_the_first_step() -> None:
    """Slope and curvature of the line hold at the noise that the direction was averaged to."""
    config = run_of("backprop", rounds={"quorum": 2, "start_with": 2})
    line = Line(slope=2.0, curvature=400.0, batches=4)
    found = Readings(np.full(8, 0.7), readings().slopes, BATCH, (), line)
    noise = Noise(4.0, 36.0, 72.0)
    same, _ = suggestions.learning_rate(config, found, noise, 2 * BATCH)
    assert same == 0.005
    noisier, _ = suggestions.learning_rate(config, found, noise, BATCH // 4)
    assert noisier == pytest.approx(0.005 * np.sqrt((4 + 9) / (4 + 72)), rel=0.2)


def test_the_perturbation_scale_is_between_rounding_and_bends() -> None:
    config = run_of()
    value, why = suggestions.perturbation_scale(config, readings(), "float32")
    assert (value, "kept: it adds" in why) == (SCALE, True)
    small = readings(signal=0.01, noise=0.09, rounding=2e-3)
    value, why = suggestions.perturbation_scale(config, small, "bfloat16")
    assert SCALE < value <= 10 * SCALE
    assert "at 0.01, rounding adds" in why
    value, why = suggestions.perturbation_scale(config, readings(third=6e5), "float32")
    assert SCALE / 10 <= value < SCALE
    assert "at 0.01, the bend of the loss adds" in why


def test_a_batch_is_a_power_of_two_and_no_larger_than_the_data() -> None:
    config = run_of(rounds={"quorum": 2, "start_with": 2})
    assert suggestions.batch_size(config, Noise(4.0, 36.0, 72.0), 500)[0] == 32
    value, why = suggestions.batch_size(config, Noise(4.0, 36.0, 72.0), 20)
    assert value == 20
    assert "more than 20 are not here" in why
    unseen = Noise(-1.0, 36.0, float("inf"))
    assert suggestions.batch_size(config, unseen, 500) == (32, "no signal is seen at this size")


def test_no_signal_and_no_curvature_keep_the_learning_rate() -> None:
    config = run_of()
    flat = readings()
    rates = [
        suggestions.learning_rate(config, flat, Noise(-0.1, 36.0, float("inf")), 8),
        suggestions.learning_rate(
            config,
            Readings(flat.losses, flat.slopes, BATCH, (flat.probes[0],) * 3),
            Noise(4.0, 36.0, 72.0),
            8,
        ),
    ]
    assert rates[0] == (0.002, "kept: no signal is seen in so few batches")
    assert (
        suggest(config, flat, "float32", 100).settings["estimator"]["perturbation_scale"] == SCALE
    )


def test_local_steps_have_a_learning_rate_of_their_own() -> None:
    found = suggest(run_of(local={"steps": 5}), readings(), "float32", 100)
    assert set(found.settings) == {"estimator"}
    assert "local.learning_rate" in found.reasons[-1]


# ------------------------------------------------------------- the command


def written(tmp_path: Path, kind: str, **changes: Any) -> Path:
    path = tmp_path / "run.toml"
    text = tiny.to_toml(tiny.settings(kind, **changes))  # type: ignore[arg-type]
    path.write_text(text.replace("batch_size = 8", "batch_size = 8   # examples"), encoding="utf-8")
    return path


def calibrate(run: Path, model: Path, data: Path, *more: str) -> Any:
    arguments = ["calibrate", str(run), "--data", str(data), "--model", str(model)]
    few = ["--device", "cpu", "--directions", "6", "--batches", "4", "--precision", "float32"]
    return CliRunner().invoke(cli.app, [*arguments, *few, *more])


@pytest.mark.parametrize("kind", ["spsa", "one-sided", "forward", "backprop"])
def test_the_command_prints_what_it_would_write(
    tmp_path: Path, tiny_model: Path, tiny_data: dict[str, Path], kind: str
) -> None:
    run = written(tmp_path, kind)
    before = run.read_text(encoding="utf-8")
    result = calibrate(run, tiny_model, tiny_data["hotels"], "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.output)
    assert run.read_text(encoding="utf-8") == before
    assert len(content["probes"]) == (0 if kind == "backprop" else 3)
    assert (content["line"] is None) == (kind != "backprop")
    assert set(content["settings"]["estimator"]) == (
        {"batch_size", "perturbation_scale"} if kind in ("spsa", "one-sided") else {"batch_size"}
    )


def test_written_suggestions_are_the_run_files(
    tmp_path: Path, tiny_model: Path, tiny_data: dict[str, Path]
) -> None:
    run = written(tmp_path, "spsa")
    result = calibrate(run, tiny_model, tiny_data["hotels"], "--write")
    assert result.exit_code == 0, result.output
    text = run.read_text(encoding="utf-8")
    assert "# examples" in text
    assert f"written to {run}" in result.output
    shown = result.output[result.output.index("[estimator]") : result.output.index("written to")]
    found = tomllib.loads(text)
    for section, values in tomllib.loads(shown).items():
        assert values.items() <= found[section].items()


def test_a_run_that_has_begun_is_not_changed(
    tmp_path: Path, tiny_model: Path, tiny_data: dict[str, Path]
) -> None:
    run = written(tmp_path, "spsa")
    (tmp_path / "tiny-spsa.ledger").write_bytes(b"")
    result = calibrate(run, tiny_model, tiny_data["hotels"], "--write")
    assert isinstance(result.exception, ConfigError)
    assert "copy it to a new file with another run.name" in str(result.exception)


def test_too_few_examples_to_compare_batches(
    tmp_path: Path, tiny_model: Path, tiny_data: dict[str, Path]
) -> None:
    run = written(tmp_path, "spsa", estimator={"batch_size": 100})
    result = calibrate(run, tiny_model, tiny_data["hotels"])
    assert isinstance(result.exception, DataError)
    assert "160 examples make 1 batch of 100" in str(result.exception)
