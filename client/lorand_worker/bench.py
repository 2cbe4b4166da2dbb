"""The bench of a worker: model, replica, estimator and private data, put together."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from lorand.coefficients import Coefficients
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.errors import ConfigError
from lorand.manifest import Identity
from lorand.replica import Replica
from lorand_worker import estimators, model
from lorand_worker.data import Examples, Sampler
from lorand_worker.estimators import Measurement
from lorand_worker.model import LoadedModel
from lorand_worker.tasks import Classification, Score


@dataclass(frozen=True)
class Base:
    """A loaded base model with the replica of its trainable tensors, and what identifies it."""

    loaded: LoadedModel
    identity: Identity
    replica: Replica
    device: torch.device


def load_base(config: RunConfig, source: Path | None, device_name: str) -> Base:
    """Load the run's model. Raises ModelError or ConfigError."""
    device = parse_device(device_name)
    loaded = model.load(config.model, len(config.task.labels), source)
    identity = model.identity(loaded, config)
    loaded.module.to(device)
    parameters = dict(loaded.module.named_parameters())
    replica = Replica(parameters, identity.manifest, config.pool(identity))
    return Base(loaded, identity, replica, device)


def parse_device(name: str) -> torch.device:
    """Return the torch device of a name, `auto` being CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: {first}; use cpu, cuda or auto") from error
    return device


def task_for(base: Base, config: RunConfig, examples: Examples) -> Classification:
    """Return the run's task on these examples."""
    return Classification(
        base.loaded,
        examples,
        trainable=set(base.replica.live),
        max_length=config.model.max_length,
        device=base.device,
    )


class ModelBench:
    """Measures projected gradients of the real model on the worker's own examples."""

    def __init__(
        self,
        base: Base,
        config: RunConfig,
        examples: Examples,
        source: random.Random | None = None,
    ) -> None:
        """Tokenise the examples and build the run's estimator; `source` fixes the batches."""
        self.replica = base.replica
        self._task = task_for(base, config, examples)
        self._estimator = estimators.build(config, base.replica, base.loaded.module)
        self._sampler = Sampler(len(examples), config.estimator.batch_size, source)

    @property
    def examples(self) -> int:
        """See Bench."""
        return len(self._task)

    def adopt(self, coefficients: Coefficients) -> None:
        """See Bench."""
        self.replica.set(coefficients)

    def measure(self, indices: Indices) -> Measurement:
        """See Bench."""
        return self._estimator.measure(self._task.loss, self._sampler.batch(), indices)

    def score(self) -> Score:
        """Return accuracy and loss on all local examples."""
        return self._task.score()
