"""RunConfig: everything that defines a run, from one TOML file, frozen, with a digest.

All sections but [service] enter the digest, which is part of the run's identity; [service] holds
what an operator may change between restarts: addresses, limits and deadlines of the transport.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lorand.codec import Codec, DeltaCodec, Rounding
from lorand.coefficients import check_size, quanta
from lorand.directions import Drawing, Draws, Family, Pool, pool_key
from lorand.errors import ConfigError
from lorand.manifest import Identity
from lorand.schedules import Schedule

PROTOCOL_VERSION = 1

Quantisation = Literal["none", "int8", "nf4"]
EstimatorKind = Literal["spsa", "one-sided", "forward", "backprop"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


ADDED_LATER: Final[dict[str, dict[str, object]]] = {
    "model": {"quantisation": "none"},
    "codec": {"rounding": "nearest"},
    "optimizer": {"warmup_rounds": 0, "spread_decay": 0.9},
    "rounds": {"aggregation": "mean"},
    "directions": {"drawing": "uniform", "rotate_every": 0},
    "local": {
        "steps": 0,
        "epochs": 0,
        "space": "seeds",
        "optimizer": "SGD",
        "learning_rate": 1e-3,
        "options": {},
        "error_feedback": True,
    },
}
"""Settings that the first runs did not have: at these values they are not part of the identity."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class RunSection(_Section):
    """Name and length of the run."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")]
    rounds: Annotated[int, Field(ge=1, le=1_000_000)]
    adopt_first_worker: bool = False


class ModelSection(_Section):
    """The base model and which of its parameters are trained."""

    name: str
    revision: str = "main"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantisation: Quantisation = "none"
    trainable: str = "all"
    head: Literal["auto", "own", "pooled"] = "auto"
    feature_scale: Positive = 10.0
    max_length: Annotated[int, Field(ge=4, le=32768)] = 128


class TaskSection(_Section):
    """What is learned: single-label classification of a text."""

    kind: Literal["classification"] = "classification"
    labels: Annotated[tuple[str, ...], Field(min_length=2, max_length=10_000)]
    text_column: str = "text"
    label_column: str = "label"

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(labels)) != len(labels):
            raise ValueError("every label is listed once")
        return labels


class DirectionsSection(_Section):
    """The seed pool, and who measures which of its directions."""

    family: Family = "hadamard"
    pool_size: int = 4096
    pool_index: Annotated[int, Field(ge=0, lt=2**32)] = 0
    mode: Literal["shared", "own"] = "shared"
    quantum_exponent: Annotated[int, Field(ge=8, le=48)] = 32
    head_scale: float = 16.0
    drawing: Drawing = "uniform"
    rotate_every: Annotated[int, Field(ge=0, le=1_000_000)] = 0

    @field_validator("pool_size")
    @classmethod
    def _power_of_two(cls, size: int) -> int:
        check_size(size)
        return size

    @field_validator("head_scale")
    @classmethod
    def _power_of_two_scale(cls, scale: float) -> float:
        if scale not in {2.0**s for s in range(-10, 11)}:
            raise ValueError("a direction scale is a power of two from 2^-10 to 2^10")
        return scale


class EstimatorSection(_Section):
    """How a worker measures; see `lorand_worker.estimators`."""

    kind: EstimatorKind
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    perturbation_scale: Annotated[float, Field(gt=0, le=1024, allow_inf_nan=False)] = 0.01
    directions_per_round: Count = 8


class LocalSection(_Section):
    """Steps that a participant takes on its own data before it reports; see `local_steps`."""

    steps: Annotated[int, Field(ge=0, le=100_000)] = 0
    epochs: Annotated[int, Field(ge=0, le=1000)] = 0
    space: Literal["seeds", "weights"] = "seeds"
    optimizer: str = "SGD"
    learning_rate: Positive = 1e-3
    options: dict[str, bool | int | float | tuple[float, ...]] = {}
    error_feedback: bool = True

    @field_validator("options")
    @classmethod
    def _finite(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name, value in options.items():
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(isfinite(n) for n in numbers if isinstance(n, float)):
                raise ValueError(f"{name} is not a finite number")
        return options

    @property
    def taken(self) -> bool:
        """Whether participants take steps of their own."""
        return self.steps > 0 or self.epochs > 0


class CodecSection(_Section):
    """Codes up (contributions) and down (ΔA), and how workers round to them."""

    up: Codec = "int8"
    down: DeltaCodec = "int8"
    rounding: Rounding = "nearest"


class OptimizerSection(_Section):
    """The coordinator's optimizer on the K numbers; see `lorand_coordinator.optimizer`."""

    kind: Literal["sgd", "adam"] = "sgd"
    learning_rate: Positive
    normalise: bool = True
    spread_decay: Share = 0.9
    momentum: Share = 0.0
    beta1: Share = 0.9
    beta2: Share = 0.999
    schedule: Schedule = "linear"
    warmup_rounds: Annotated[int, Field(ge=0)] = 0


class RoundsSection(_Section):
    """When a round may start and commit."""

    quorum: Annotated[int, Field(ge=1, le=100_000)]
    start_with: Annotated[int, Field(ge=0, le=100_000)] = 0
    deadline_s: Positive = 60.0
    weighting: Literal["equal", "examples"] = "equal"
    aggregation: Literal["mean", "majority"] = "mean"
    telemetry: Literal["loss", "none"] = "loss"


class ServiceSection(_Section):
    """Operation of the coordinator: not part of the run's identity."""

    address: str = "127.0.0.1:7700"
    ledger: str = ""
    checkpoint_every: Count = 50
    heartbeat_s: Positive = 10.0
    heartbeat_timeout_s: Positive = 45.0
    max_workers: Annotated[int, Field(ge=1, le=100_000)] = 1000
    outbox_messages: Annotated[int, Field(ge=8, le=100_000)] = 256
    tail_entries: Annotated[int, Field(ge=1, le=100_000)] = 512
    commit_retry_s: Positive = 5.0
    drain_s: Positive = 5.0


class RunConfig(_Section):
    """One run. Build it with `load`, `parse` or `from_json`; all raise ConfigError."""

    run: RunSection
    model: ModelSection
    task: TaskSection
    directions: DirectionsSection = DirectionsSection()
    estimator: EstimatorSection
    local: LocalSection = LocalSection()
    codec: CodecSection = CodecSection()
    optimizer: OptimizerSection
    rounds: RoundsSection
    service: ServiceSection = ServiceSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse combinations that cannot work, with the way out."""
        for holds, why in (*self._measured_wrongly(), *self._taken_wrongly(), *self._run_wrongly()):
            if holds:
                raise ValueError(why)
        return self

    def _measured_wrongly(self) -> Iterator[tuple[bool, str]]:
        """What cannot be of directions, estimator and codec."""
        estimator, directions = self.estimator, self.directions
        perturbs = estimator.kind in ("spsa", "one-sided")
        yield (
            self.perturbation_quanta < 1 and perturbs,
            "estimator.perturbation_scale is below the quantum 2^-quantum_exponent; "
            "raise one of them",
        )
        yield (
            self.num_directions > directions.pool_size,
            "estimator.directions_per_round (times local.steps) is larger than "
            "directions.pool_size",
        )
        yield (
            estimator.kind == "backprop" and directions.mode == "own",
            'estimator "backprop" reports the whole pool: set directions.mode = "shared"',
        )
        yield (
            estimator.kind == "backprop" and directions.drawing != "uniform",
            'estimator "backprop" reports the whole pool: set directions.drawing = "uniform"',
        )
        yield (
            directions.family == "independent" and directions.pool_size > 4096,
            'directions.family = "independent" costs K passes; use "hadamard" above 4096',
        )
        yield (
            directions.rotate_every > 0
            and (self.model.dtype != "float32" or self.model.quantisation != "none"),
            "directions.rotate_every folds each pool into float32 weights: set model.dtype = "
            '"float32" and model.quantisation = "none" (workers still pass in bfloat16 with '
            "--precision)",
        )
        yield (
            directions.rotate_every > 0 and directions.drawing != "uniform",
            "weights of directions are learned on one pool: set directions.rotate_every = 0, or "
            'directions.drawing = "uniform"',
        )
        yield (
            self.codec.rounding == "unbiased" and self.codec.up == "sign",
            'codec.up = "sign" keeps only signs, which cannot be unbiased: set '
            'codec.rounding = "nearest", or codec.up = "int8" or "log8"',
        )

    def _taken_wrongly(self) -> Iterator[tuple[bool, str]]:
        """What cannot be of local steps."""
        local = self.local
        backprop = self.estimator.kind == "backprop"
        yield (
            local.steps > 0 and local.epochs > 0,
            "local.steps and local.epochs say the same in two ways: set one of them to 0",
        )
        yield (
            local.epochs > 0 and not backprop,
            "local.epochs is another number of steps for each participant, which directions "
            'cannot be drawn for: set local.steps, or estimator.kind = "backprop"',
        )
        yield (
            local.space == "weights" and not (backprop and local.taken),
            'local.space = "weights" needs gradients and steps: set estimator.kind = "backprop" '
            "and local.steps",
        )
        yield (
            local.taken and self.codec.up == "log8",
            'what local steps moved is reported with a scale of its own: set codec.up = "int8", '
            '"sign" or "int32"',
        )
        yield (
            local.taken and self.rounds.aggregation == "majority",
            'rounds.aggregation = "majority" votes on scalars: set local.steps = 0, or '
            'rounds.aggregation = "mean"',
        )

    def _run_wrongly(self) -> Iterator[tuple[bool, str]]:
        """What cannot be of rounds, schedule and service."""
        rounds, service = self.rounds, self.service
        yield (
            self.optimizer.warmup_rounds >= self.run.rounds,
            f"optimizer.warmup_rounds = {self.optimizer.warmup_rounds} leaves nothing of "
            f"{self.run.rounds} rounds; make it smaller",
        )
        yield (
            rounds.aggregation == "majority" and self.directions.mode == "own",
            'rounds.aggregation = "majority" votes on directions that all measured: set '
            'directions.mode = "shared"',
        )
        yield (
            0 < rounds.start_with < rounds.quorum,
            "rounds.start_with must be 0 (= quorum) or at least rounds.quorum",
        )
        yield (
            service.heartbeat_timeout_s < 2 * service.heartbeat_s,
            "service.heartbeat_timeout_s must be at least twice heartbeat_s",
        )

    @property
    def num_directions(self) -> int:
        """Scalars a participant reports in a round."""
        if self.estimator.kind == "backprop":
            return self.directions.pool_size
        return self.estimator.directions_per_round * max(1, self.local.steps)

    @property
    def needs_history(self) -> bool:
        """Whether A alone does not say what comes next, so that who joins reads all entries."""
        return self.directions.rotate_every > 0 or self.directions.drawing != "uniform"

    @property
    def keeps_feedback(self) -> bool:
        """Whether participants carry what their codes lose into the next round."""
        local = self.local
        return local.taken and local.error_feedback and self.codec.rounding == "nearest"

    def pool_after(self, committed: int) -> int:
        """Return the number of the pool, from 0, on which the round after these is measured."""
        every = self.directions.rotate_every
        return min(committed, self.run.rounds - 1) // every if every else 0

    @property
    def perturbation_quanta(self) -> int:
        """The perturbation scale μ as an integer number of quanta, c = μ/u."""
        return quanta(self.estimator.perturbation_scale, self.directions.quantum_exponent)

    def draws(self, run_digest: bytes) -> Draws:
        """Return the directions of the rounds of this run."""
        section = self.directions
        return Draws(
            run_digest, section.mode, section.pool_size, self.num_directions, section.drawing
        )

    def pool(self, identity: Identity, number: int = 0) -> Pool:
        """Return a seed pool of the run, its first or number so and so, on a base and a set."""
        section = self.directions
        index = (section.pool_index + number) % 2**32
        key = pool_key(identity.base_digest, identity.manifest.digest(), index)
        return Pool(key, section.pool_size, section.quantum_exponent, section.family, number)

    def canonical(self) -> str:
        """Return the identity of the run as text: JSON, sorted, without [service]."""
        content = self.model_dump(mode="json", exclude={"service"})
        for section, added in ADDED_LATER.items():
            for name, value in added.items():
                if content[section][name] == value:
                    del content[section][name]
            if not content[section]:
                del content[section]
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    def digest(self) -> bytes:
        """Return SHA-256 of the canonical text, 32 bytes."""
        return hashlib.sha256(self.canonical().encode()).digest()

    def to_json(self) -> str:
        """Return the whole config as JSON: what a worker receives at join."""
        return self.model_dump_json()

    @staticmethod
    def from_json(text: str) -> "RunConfig":
        """Return the config of `to_json`."""
        try:
            return RunConfig.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(_explain("the coordinator's run config", error)) from error

    @staticmethod
    def parse(text: str, source: str = "run.toml") -> "RunConfig":
        """Return the config of a TOML text."""
        try:
            return RunConfig.model_validate(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{source} is not valid TOML: {error}") from error
        except ValidationError as error:
            raise ConfigError(_explain(source, error)) from error


def load(path: Path) -> RunConfig:
    """Read a run file. Raises ConfigError when it is missing, unreadable or wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the run file {path}: {error}; write one with `lr-coordinator init`"
        ) from error
    return RunConfig.parse(text, str(path))


def _explain(source: str, error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "the file"
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: no such setting; see the comments of `lr-coordinator init`")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing; add it")
        else:
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
    return f"{source} is not a valid run:\n  " + "\n  ".join(lines)
