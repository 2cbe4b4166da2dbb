"""What scripts give as a run."""

from pathlib import Path

from lorand import config as run_config
from lorand.config import RunConfig
from lorand.manifest import Identity

Run = RunConfig | Path | str
"""A config, a run file, or the text of one."""


def config_of(run: Run) -> RunConfig:
    """Return the config of a run. Raises ConfigError."""
    if isinstance(run, RunConfig):
        return run
    if isinstance(run, str) and "\n" in run:
        return RunConfig.parse(run, "the run's text")
    return run_config.load(Path(run))


def identity_beside(run: Run) -> Identity | None:
    """Return what the run.lock beside a run file says, None where there is neither."""
    if isinstance(run, RunConfig) or (isinstance(run, str) and "\n" in run):
        return None
    return Identity.beside(Path(run))


def prepare(run: Run, model: Path | str | None = None) -> Identity:
    """Return the digests and trainable tensors of a run's model: what run.lock holds.

    `model` is a folder in place of the run's model name. Raises LorandError.
    """
    from lorand_worker.bench import load_base

    folder = None if model is None else Path(model)
    return load_base(config_of(run), folder, "cpu", prepares=True).identity
