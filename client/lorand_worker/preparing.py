"""The `prepare` command: what every worker of a run must share, decided once for run.lock."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lorand import runfile
from lorand.config import RunConfig
from lorand.errors import ConfigError
from lorand.kernels import zero_sums
from lorand.manifest import LOCK_NAME, Identity, Manifest
from lorand_worker import model, pretrained, ranks, sensitivity, stepping, tasks
from lorand_worker.bench import Base, task_for
from lorand_worker.data import Data
from lorand_worker.resolution import check_perturbation
from lorand_worker.session import Reporter
from lorand_worker.sources import Source


def check(run: Path, config: RunConfig, examples: Source | None) -> None:
    """Raise ConfigError for local steps that cannot be, and for examples that are not asked for."""
    stepping.check(config)
    calibrated = config.directions.scale_rule == "calibrated"
    if calibrated != (examples is not None):
        raise ConfigError(
            f'{run} has directions.scale_rule = "calibrated": give examples, --calibrate DATA'
            if calibrated
            else '--calibrate measures scales for directions.scale_rule = "calibrated": set it in '
            f"{run}, or leave the option out"
        )


def prepare(
    config: RunConfig, examples: Data | None, load: Callable[[RunConfig], Base], report: Reporter
) -> Identity:
    """Return the run's identity, with direction scales measured on the examples, if any.

    `load` loads the model as the one who prepares does. What was measured is told. Raises
    ConfigError, DataError or ModelError for a run that would not work.
    """
    if examples is None:
        base = load(config)
        tasks.check(base.loaded, config)
        check_perturbation(config, base.replica)
        _warm_up(base)
        found = base.identity
    else:
        base = load(sensitivity.uncalibrated(config))
        found = _calibrated(config, base, examples, report)
    if config.subspace.measures_ranks:
        _tell_ranks(config, base, report)
    return found


def written(run: Path, config: RunConfig) -> Identity | None:
    """Return what run.lock beside the run file says, where the run cannot be loaded without it."""
    measured = config.directions.scale_rule == "calibrated" or config.subspace.measures_ranks
    return Identity.beside(run) if measured else None


def write(run: Path, identity: Identity) -> Path:
    """Write run.lock beside the run file; return it. Raises ConfigError."""
    lock = run.with_name(LOCK_NAME)
    try:
        lock.write_text(identity.to_lock(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {lock}: {error}") from error
    return lock


def pin(run: Path, config: RunConfig, source: Path | None, report: Reporter, wanted: bool) -> None:
    """Put the commit of the hub that the model was loaded from into the run file, where wanted.

    Else say which it is, if the run's revision may move. Raises ConfigError.
    """
    commit = pretrained.commit(config.model, source)
    if commit is None or commit == config.model.revision:
        if wanted and commit is None:
            raise ConfigError(
                f"--pin: {source or config.model.name} is a folder, which has no commits: prepare "
                "the run with the model's name on the hub, or leave the flag away"
            )
        return
    if not wanted:
        report.note(
            f"{config.model.revision!r} of {config.model.name} is the commit {commit}: --pin puts "
            "that into the run file, for the day when it is another one"
        )
        return
    try:
        text = run.read_text(encoding="utf-8")
        run.write_text(runfile.with_value(text, "model", "revision", commit), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {run}: {error}") from error
    report.note(f"model.revision in {run} is {commit} now")


def _calibrated(config: RunConfig, base: Base, examples: Data, report: Reporter) -> Identity:
    """The run's identity with direction scales measured on these examples."""
    task = task_for(base, config, examples)
    found = sensitivity.measure(base, config, task)
    identity = sensitivity.identity(base, found)
    tensors = identity.manifest.tensors
    shifts = ranks.shifts(config.subspace, {spec.name: spec.rank for spec in tensors})
    manifest = Manifest(
        tuple(replace(t, scale_exponent=t.scale_exponent + shifts[t.name]) for t in tensors)
    )
    for row, tensor in zip(found, manifest.tensors, strict=True):
        report.note(
            f"{row.name}: squared projected gradient {row.gradient:.3g}, curvature "
            f"{row.curvature:.3g}, scale 2^{tensor.scale_exponent}"
        )
    return replace(identity, manifest=manifest)


def _tell_ranks(config: RunConfig, base: Base, report: Reporter) -> None:
    """Say each low-rank matrix's rank, and which tensors are frozen for having none."""
    trained = {spec.name: spec for spec in base.identity.manifest.tensors}
    for spec in trained.values():
        if spec.rank:
            report.note(f"{spec.name}: rank {spec.rank} of {min(spec.shape)}")
    for name in model.trainable_tensors(base.loaded, config.model.trainable):
        if name not in trained:
            report.note(f"{name}: frozen, not of low rank")


def _warm_up(base: Base) -> None:
    """Compile the kernels now, so that workers on this machine find them compiled."""
    base.replica.settle()
    name, tensor = next(base.replica.weights())
    base.replica.project(name, tensor, zero_sums(base.replica.pool.size, tensor.device))
