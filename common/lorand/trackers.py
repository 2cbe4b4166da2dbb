"""One class a tracker: what its library calls a run, a step and an end.

Each library is imported when it is asked for, and told to send nothing of its own accord.
"""

import os
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from lorand.errors import ConfigError

SILENT: Final = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
"""Read by these libraries: no usage statistics, no error reports. What the user set stays."""

Settings = Mapping[str, object]


class Trackio:
    """Trackio: local first, an SQLite file; `trackio show` opens it."""

    def __init__(self, run: str, name: str, settings: Settings, folder: Path) -> None:
        """Begin a run of this name in the project, or go on with it."""
        self._trackio = _library("trackio", "trackio")
        self._trackio.init(project=run, name=name, config=dict(settings), resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See LogWriter."""
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        """See LogWriter."""
        self._trackio.finish()


class Wandb:
    """Weights & Biases: where WANDB_MODE and its login say."""

    def __init__(self, run: str, name: str, settings: Settings, folder: Path) -> None:
        """Begin a run of this name in the project."""
        wandb = _library("wandb", "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project=run, name=name, config=dict(settings), dir=str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See LogWriter."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See LogWriter."""
        self._run.finish()


class Mlflow:
    """MLflow: where MLFLOW_TRACKING_URI says."""

    def __init__(self, run: str, name: str, settings: Settings, folder: Path) -> None:
        """Begin a run of this name in the experiment."""
        client: Any = _library("mlflow.tracking", "mlflow").MlflowClient()
        experiment = client.get_experiment_by_name(run)
        number = experiment.experiment_id if experiment else client.create_experiment(run)
        self._client, self._run = client, client.create_run(number, run_name=name).info.run_id
        for key, value in settings.items():
            client.log_param(self._run, key, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See LogWriter."""
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        """See LogWriter."""
        self._client.set_terminated(self._run)


class Tensorboard:
    """TensorBoard's event files, written without torch: the coordinator has none."""

    def __init__(self, run: str, name: str, settings: Settings, folder: Path) -> None:
        """Begin a file in FOLDER/RUN/NAME."""
        files: Any = _library("tensorboard.summary.writer.event_file_writer", "tensorboard")
        self._event = import_module("tensorboard.compat.proto.event_pb2").Event
        self._summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
        place = folder / run / name
        place.mkdir(parents=True, exist_ok=True)
        self._file = files.EventFileWriter(str(place))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See LogWriter."""
        parts = [self._summary.Value(tag=name, simple_value=v) for name, v in values.items()]
        summary = self._summary(value=parts)
        self._file.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """See LogWriter."""
        self._file.close()


Make = Callable[[str, str, Settings, Path], Trackio | Wandb | Mlflow | Tensorboard]
MAKERS: Final[dict[str, Make]] = {
    "trackio": Trackio,
    "tensorboard": Tensorboard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


def _library(module: str, package: str) -> Any:
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"--report-to {package} needs its library: pip install {package}"
        ) from error
