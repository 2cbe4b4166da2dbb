"""The `calibrate` command: measure, show, and write the suggestions into the run file."""

from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lorand import runfile
from lorand.config import RunConfig
from lorand.errors import ConfigError
from lorand_worker import calibration, estimators, guard, precision, suggestions
from lorand_worker.bench import Base, task_for
from lorand_worker.calibration import Readings
from lorand_worker.data import Data
from lorand_worker.floor import passes_dtype
from lorand_worker.precision import Precision
from lorand_worker.resolution import check_perturbation
from lorand_worker.session import Reporter
from lorand_worker.suggestions import Suggestion
from lorand_worker.tasks import Forward


@dataclass(frozen=True)
class Found:
    """What a calibration showed; `dtype` is that of the passes."""

    config: RunConfig
    dtype: str
    readings: Readings
    suggestion: Suggestion

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        noise = suggestions.noise_of(self.readings.slopes, self.readings.batch)
        critical = noise.critical_batch if np.isfinite(noise.critical_batch) else None
        return {
            "loss": float(self.readings.losses.mean()),
            "gradient_rms": _rms(self.readings.slopes.mean(axis=1)),
            "batch_rms": float(np.sqrt(noise.noise)),
            "batches": self.readings.slopes.shape[1],
            "signal_to_noise": noise.ratio,
            "critical_batch": critical,
            "zero_share": suggestions.zero_share(self.config, self.readings.slopes),
            "probes": self._probes(),
            "line": asdict(self.readings.line) if self.readings.line else None,
            "settings": self.suggestion.settings,
            "reasons": self.suggestion.reasons,
        }

    def _probes(self) -> list[dict[str, float]]:
        rows: list[dict[str, float]] = []
        if not self.readings.probes:
            return rows
        floor = suggestions.floor_of(self.readings, self.dtype)
        for probe, bend in zip(self.readings.probes, suggestions.bend(self.readings), strict=True):
            size = _rms(probe.differences)
            rows.append(
                {
                    "perturbation_scale": probe.scale,
                    "difference_rms": size,
                    "floor_ratio": size / floor if floor else 0.0,
                    "zero_share": suggestions.zero_share(self.config, probe.slopes),
                    "bend": bend,
                    "curvature": float(probe.curvatures.mean()),
                }
            )
        return rows

    def text(self, written: Path | None) -> str:
        """Return it for people; the last lines are TOML."""
        content = self.as_dict()
        critical = content["critical_batch"]
        lines = [
            f"loss {content['loss']:.4f} on {content['batches']} batches of {self.readings.batch}; "
            f"projected gradient {content['gradient_rms']:.3g} in RMS across directions, "
            f"{content['batch_rms']:.3g} between batches",
            f"signal-to-noise of a batch {content['signal_to_noise']:.2g}, critical batch "
            + ("beyond what can be seen" if critical is None else f"about {critical:.0f} examples")
            + f"; {content['zero_share']:.0%} of the codes would be zero",
        ]
        if content["probes"]:
            lines.append(self._table(content["probes"]))
        if self.readings.line:
            line = self.readings.line
            lines.append(
                f"along the first step: slope {line.slope:.3g}, curvature {line.curvature:.3g}"
            )
        lines += [*self.suggestion.reasons, "", runfile.lines(self.suggestion.settings)]
        if written is None:
            return "\n".join([*lines, "", "--write puts these lines into the run file"])
        return "\n".join(
            [*lines, "", f"written to {written}; next: lr-coordinator serve {written}"]
        )

    def _table(self, probes: list[dict[str, float]]) -> str:
        table = Table(box=None, pad_edge=False)
        for column in ("μ", "|L+ - L-|", "/ floor", "zero codes", "bend", "curvature"):
            table.add_column(column, justify="right")
        for row in probes:
            table.add_row(
                f"{row['perturbation_scale']:.3g}",
                f"{row['difference_rms']:.2e}",
                f"{row['floor_ratio']:.3g}",
                f"{row['zero_share']:.0%}",
                f"{row['bend']:.1%}" if row is not probes[0] else "",
                f"{row['curvature']:.3g}",
            )
        console = Console(file=StringIO(), width=100, color_system=None)
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip()


def measure(
    config: RunConfig,
    base: Base,
    examples: Data,
    asked: Precision,
    *,
    num_directions: int,
    num_batches: int,
    source: str,
    report: Reporter,
) -> Found:
    """Measure on local data as a worker would. Raises DataError, ConfigError or NonFiniteLoss."""
    guard.check_examples(config, len(examples), source)
    check_perturbation(config, base.replica)
    batches = calibration.split(len(examples), config.estimator.batch_size, num_batches)
    chosen, why = precision.choose(asked, config, base.device)
    report.note(why)
    task = task_for(base, config, examples, Forward(chosen))
    estimator = estimators.build(config, base.replica, base.loaded.module)
    if config.estimator.kind == "backprop":
        readings = calibration.by_gradients(config, base.replica, estimator, task.loss, batches)
    else:
        indices = calibration.directions(config, num_directions)
        readings = calibration.by_losses(config, base.replica, task.loss, indices, batches)
    dtype = passes_dtype(config, chosen)
    suggestion = suggestions.suggest(config, readings, dtype, len(examples))
    return Found(config, dtype, readings, suggestion)


def check_not_begun(run: Path, config: RunConfig) -> None:
    """Raise ConfigError when a run of this file has begun: its ledger holds the settings."""
    ledger = Path(config.service.ledger or run.with_name(f"{config.run.name}.ledger"))
    if ledger.exists():
        raise ConfigError(
            f"the run has begun: {ledger} holds its settings, and a changed run file would be "
            "another run's; copy it to a new file with another run.name, and calibrate that"
        )


def write(run: Path, suggestion: Suggestion) -> None:
    """Change the settings in the run file. Raises ConfigError."""
    try:
        text = runfile.with_values(run.read_text(encoding="utf-8"), suggestion.settings)
        RunConfig.parse(text, str(run))
        run.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {run}: {error}") from error


def _rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
