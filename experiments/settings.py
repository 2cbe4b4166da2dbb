"""The run of a preset on a task of the experiments: its settings, and what is set alike for all."""

from typing import Any

from experiments import federation
from lorand.config import RunConfig
from lorand_coordinator import presets

BATCH = 16
MODEL = {"name": "all-MiniLM-L6-v2", "trainable": "last:2"}

Overrides = dict[str, dict[str, Any]]


def of_preset(
    name: str,
    *,
    labels: tuple[str, ...],
    workers: int,
    forwards: int,
    learning_rate: float | None,
    overrides: Overrides | None = None,
) -> RunConfig:
    """Return a preset's run that lasts for so many forward passes a worker.

    Model, task, batch, length and learning rate (None: the preset's) are set here; `overrides` are
    what an experiment varies. Everything else is the preset's.
    """
    content = RunConfig.parse(presets.render(name)).model_dump(mode="json")
    content["task"] = {"labels": labels}
    content["run"] |= {"name": name, "rounds": 1}
    content["model"] |= MODEL
    content["estimator"] |= {"batch_size": BATCH}
    content["rounds"] |= {"quorum": workers}
    content["optimizer"] |= {"warmup_rounds": 0}
    if learning_rate is not None:
        content["optimizer"]["learning_rate"] = learning_rate
    for section, values in (overrides or {}).items():
        content[section] |= values
    a_round = federation.forwards_a_round(RunConfig.model_validate(content))
    content["run"]["rounds"] = max(1, forwards // a_round)
    return RunConfig.model_validate(content)


def takes_local_steps(name: str) -> bool:
    """Return whether participants of a preset take steps before they report."""
    return RunConfig.parse(presets.render(name)).local.taken


def marks(config: RunConfig, points: int) -> list[int]:
    """Return about so many rounds, evenly apart, the first and the last among them."""
    rounds = config.run.rounds
    return sorted({round(rounds * at / points) for at in range(points + 1)})


def plain(config: RunConfig) -> dict[str, Any]:
    """Return what a results file says of a run."""
    return config.model_dump(mode="json", exclude={"service", "task"})
