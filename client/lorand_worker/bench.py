"""The bench of a worker: model, replica, estimator and private data, put together."""

import logging
import os
import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorand import layers, ledger
from lorand.config import EstimatorKind, RunConfig
from lorand.directions import Indices, Pool
from lorand.errors import ConfigError, LorandError
from lorand.layerwise import LayerwiseReplica
from lorand.ledger import Position
from lorand.manifest import Identity, Manifest
from lorand.privacy.diff2 import Rule
from lorand.privacy.mechanism import Integers, Mechanism
from lorand.replica import DTYPES, CopyReplica, Replica, WholeReplica
from lorand.subspaces.replica import SubspaceReplica
from lorand.subspaces.state import ReplicatedState
from lorand.subspaces.state_optimizers import Settings
from lorand_worker import independence, local_steps, memory, model, quantisation, tasks
from lorand_worker.data import Data, Sampler
from lorand_worker.differenced import Differenced
from lorand_worker.estimators import Measurement, Order
from lorand_worker.floor import FloorWatch
from lorand_worker.local_steps import Work
from lorand_worker.memory import Weights
from lorand_worker.model import LoadedModel
from lorand_worker.noised import Noised
from lorand_worker.tasks import Forward, Part, Score, Task
from lorand_worker.votes import vote

log = logging.getLogger("lorand")


@dataclass(frozen=True)
class Base:
    """A loaded base model with the replica of its trainable tensors, and what identifies it.

    `weights` says where they are kept, and why.
    """

    loaded: LoadedModel
    identity: Identity
    replica: Replica
    device: torch.device
    weights: str


def load_base(
    config: RunConfig,
    source: Path | None,
    device_name: str,
    weights: Weights = Weights.COPY,
    *,
    checkpointing: bool = False,
    theirs: Identity | None = None,
    prepares: bool = False,
) -> Base:
    """Load the run's model: `source`, a local copy of it, or by name.

    Raises ModelError or ConfigError.

    `theirs` is the run's identity where it is known: measured direction scales and ranks come from
    there; who `prepares` the run measures ranks itself.
    `checkpointing`: backward passes over a copy run each block again instead of keeping its
    activations, as they always do layerwise.
    """
    if source is not None and not source.is_dir():
        raise ConfigError(f"--model {source} is not a folder")
    device = parse_device(device_name)
    log.info("loading %s", source or config.model.name)
    inside = config.subspace.restricts
    whole = config.estimator.kind == "forward" or config.local.space == "weights" or inside
    if whole and weights == Weights.AUTO:
        weights = Weights.COPY  # it differentiates along whole weights, or steps on them
    if inside and weights == Weights.LAYERWISE:
        raise ConfigError(
            "directions in subspaces write whole weights: join with --weights copy, which keeps "
            "the subspaces' columns beside them, not a second model"
        )
    task = config.task
    loaded = model.load(config.model, len(task.labels), source, kind=task.kind)
    loaded = replace(loaded, stored={name: q.on(device) for name, q in loaded.stored.items()})
    identity = model.identity(loaded, config, theirs, prepares=prepares)
    module, pool = loaded.module, ledger.pool_of(config, identity, 0)
    elsewhere = [p for p in module.parameters() if p.device != device]
    to_bring = sum(p.nbytes for p in elsewhere)
    free = memory.free_bytes(device)
    kept, why = memory.choose(
        weights,
        quantised=bool(loaded.stored),
        needed_bytes=to_bring + _weight_bytes(identity.manifest),
        free=free,
    )
    if kept == Weights.LAYERWISE:
        if memory.fits(to_bring, free):
            for parameter in elsewhere:
                parameter.data = parameter.data.to(device)
        replica: Replica = LayerwiseReplica(
            module, identity.manifest, pool, stored=loaded.stored, device=device
        )
    else:
        quantisation.expand(module, loaded.stored)
        replica = replica_of(config, module.to(device), identity.manifest, pool)
        if checkpointing:
            layers.checkpoint(module)
    return Base(loaded, identity, replica, device, why)


def replica_of(
    config: RunConfig, module: nn.Module, manifest: Manifest, pool: Pool
) -> CopyReplica | SubspaceReplica:
    """Return the run's replica of a module that holds the base weights."""
    if not config.subspace.restricts:
        return CopyReplica.of(module, manifest, pool)
    return SubspaceReplica.of(module, manifest, pool, **kept_of(config, manifest))


def kept_of(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    """Return what else replicas in subspaces keep: optimizer state, weights in 8 bits."""
    kind = config.subspace.state
    state = None if kind == "none" else ReplicatedState(manifest, Settings(kind), config.rate)
    rounding = {"float": "none", "int8": "nearest", "int8-stochastic": "stochastic"}
    return {"state": state, "rounding": rounding[config.subspace.weights]}


def bring(replica: Replica, position: Position) -> None:
    """Bring a replica to a later position of its run: through the pools closed since, and to A."""
    for number in range(replica.pool.index, len(position.closed)):
        left = position.closed[number].dense(replica.pool.size)
        replica.fold(left, position.pool(number + 1))
    if replica.coefficients is not position.coefficients:  # those who share a replica come in turn
        replica.set(position.coefficients)


def _weight_bytes(manifest: Manifest) -> int:
    return sum(spec.size * DTYPES[spec.dtype].itemsize for spec in manifest.tensors)


def parse_device(name: str) -> torch.device:
    """Return the torch device of a name, `auto` being CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {_no_device(name, str(error))}") from error
    return device


def _no_device(name: str, said: str) -> str:
    """Why there is no such device, and what to do."""
    if name in ("balanced", "balanced_low_0", "sequential") or "," in name:
        return (
            "a worker computes on one device: use cuda or cuda:0, and --weights layerwise for a "
            "model that is larger than its memory; or start a worker for each GPU, with "
            "CUDA_VISIBLE_DEVICES and data of its own"
        )
    if name.startswith("cuda") and not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        return f"the torch installed here {built}; use cpu or auto, or install a torch that has it"
    return f"{said.splitlines()[0]}; use cpu, cuda or auto"


def task_for(base: Base, config: RunConfig, examples: Data, forward: Forward | None = None) -> Task:
    """Return the run's task on these examples."""
    trainable = {spec.name for spec in base.identity.manifest.tensors}
    return tasks.build(
        base.loaded, config, examples, trainable=trainable, device=base.device, forward=forward
    )


class ModelBench:
    """Measures projected gradients of the real model on the worker's own examples."""

    def __init__(
        self,
        base: Base,
        config: RunConfig,
        examples: Data | Part,
        source: random.Random | None = None,
        forward: Forward | None = None,
        mechanism: Mechanism | Rule | None = None,
        held: Data | None = None,
        work: Work | None = None,
        estimator: EstimatorKind | None = None,
    ) -> None:
        """Tokenise the examples and build the run's estimator; `source` fixes the batches.

        `mechanism` is what makes a private run's releases; without it there are none. `held` are
        examples that are measured with, and never trained on. Benches on one base have parts of one
        task, and one `work`: a replica hands its gradients to the last. `estimator` is how this
        worker measures in a mixed run.
        """
        self.replica = base.replica
        self._task: Task | Part = (
            examples if isinstance(examples, Part) else task_for(base, config, examples, forward)
        )
        # As `evaluate` measures it: in float32.
        exact = None if forward is None else Forward(limits=forward.limits)
        self._held = None if held is None else task_for(base, config, held, exact)
        self._subspace = config.subspace.kind
        self._work = work or local_steps.build(config, base.replica, base.loaded.module, estimator)
        self._noised: Noised | Differenced | None = None
        if mechanism is not None:
            independence.check(base.loaded.module, self._task)
            random_bytes = os.urandom if source is None else source.randbytes
            work, count = self._work, len(examples)
            if isinstance(mechanism, Rule):
                self._noised = Differenced.of(
                    config, work, mechanism, self.replica, count, random_bytes
                )
            else:
                self._noised = Noised.of(config, work, mechanism, count, random_bytes)
        self._private = config.privacy.noised
        self._sampler = Sampler(len(examples), config.estimator.batch_size, source)
        batch = min(len(examples), config.estimator.batch_size)
        self._watch = FloorWatch(config, (forward or Forward()).precision, batch, estimator)

    @property
    def examples(self) -> int:
        """See Bench."""
        return len(self._task)

    @property
    def cut(self) -> int:
        """Number of prompts that were cut to the run's max_length."""
        return self._task.cut

    def adopt(self, position: Position) -> None:
        """See Bench."""
        bring(self.replica, position)

    def release(self, indices: Indices) -> Integers:
        """See Bench."""
        assert isinstance(self._noised, Noised), "sums are of gradients"
        return self._noised.release(self._task.losses, indices)

    def measure(self, order: Order) -> Measurement:
        """See Bench."""
        if self._private:
            if self._noised is None:
                raise LorandError("a private run is measured with its mechanism, or not at all")
            return self._noised.measure(self._task.losses, order)
        batches = partial(self._sampler.batch, order.batch_size)
        measured = self._work.do(self._task.loss, batches, order, len(self._task))
        self._watch.see(measured)
        if order.elect:
            assert isinstance(self.replica, WholeReplica)
            columns = vote(self.replica, self._task.loss, batches, order.elect, self._subspace)
            measured = replace(measured, votes=columns)
        return measured

    def score(self) -> Score:
        """Return accuracy and loss on all local examples."""
        return self._task.score()

    def validate(self) -> Score | None:
        """Return accuracy and loss on the examples held out, at the weights as they are."""
        return None if self._held is None else self._held.score()
