"""RunConfig: everything that defines a run, from one TOML file, frozen, with a digest.

All sections but [service] enter the digest, which is part of the run's identity; [service] holds
what an operator may change between restarts: addresses, limits and deadlines of the transport.
"""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from lorand.codec import Codec, DeltaCodec, Rounding
from lorand.coefficients import check_size, quanta
from lorand.directions import Draws, Family, Pool, pool_key
from lorand.errors import ConfigError
from lorand.manifest import Identity
from lorand.schedules import Schedule
from lorand.sections import ModelSection as ModelSection
from lorand.sections import Quantisation as Quantisation
from lorand.sections import Section
from lorand.sections import TaskSection as TaskSection

PROTOCOL_VERSION = 1

EstimatorKind = Literal["spsa", "one-sided", "forward", "backprop"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


ADDED_LATER: Final[dict[str, dict[str, object]]] = {
    "model": {
        "quantisation": "none",
        "adapter": "none",
        "adapter_rank": 8,
        "adapter_alpha": 0.0,
        "adapter_targets": [],
    },
    "task": {
        "template": "",
        "label_words": [],
        "prompt_column": "prompt",
        "answer_column": "answer",
    },
    "directions": {"scale_rule": "head"},
    "codec": {"rounding": "nearest"},
    "optimizer": {"warmup_rounds": 0, "spread_decay": 0.9},
    "rounds": {"aggregation": "mean"},
}
"""Settings that the first runs did not have: at these values they are not part of the identity."""


class RunSection(Section):
    """Name and length of the run."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")]
    rounds: Annotated[int, Field(ge=1, le=1_000_000)]
    adopt_first_worker: bool = False


class DirectionsSection(Section):
    """The seed pool, and who measures which of its directions."""

    family: Family = "hadamard"
    pool_size: int = 4096
    pool_index: Annotated[int, Field(ge=0, lt=2**32)] = 0
    mode: Literal["shared", "own"] = "shared"
    quantum_exponent: Annotated[int, Field(ge=8, le=48)] = 32
    scale_rule: Literal["head", "size", "calibrated"] = "head"
    head_scale: float = 16.0

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


class EstimatorSection(Section):
    """How a worker measures; see `lorand_worker.estimators`."""

    kind: EstimatorKind
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    perturbation_scale: Annotated[float, Field(gt=0, le=1024, allow_inf_nan=False)] = 0.01
    directions_per_round: Count = 8


class CodecSection(Section):
    """Codes up (contributions) and down (ΔA), and how workers round to them."""

    up: Codec = "int8"
    down: DeltaCodec = "int8"
    rounding: Rounding = "nearest"


class OptimizerSection(Section):
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


class RoundsSection(Section):
    """When a round may start and commit."""

    quorum: Annotated[int, Field(ge=1, le=100_000)]
    start_with: Annotated[int, Field(ge=0, le=100_000)] = 0
    deadline_s: Positive = 60.0
    weighting: Literal["equal", "examples"] = "equal"
    aggregation: Literal["mean", "majority"] = "mean"
    telemetry: Literal["loss", "none"] = "loss"


class ServiceSection(Section):
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


class RunConfig(Section):
    """One run. Build it with `load`, `parse` or `from_json`; all raise ConfigError."""

    run: RunSection
    model: ModelSection
    task: TaskSection
    directions: DirectionsSection = DirectionsSection()
    estimator: EstimatorSection
    codec: CodecSection = CodecSection()
    optimizer: OptimizerSection
    rounds: RoundsSection
    service: ServiceSection = ServiceSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse combinations that cannot work, with the way out."""
        if self.perturbation_quanta < 1 and self.estimator.kind in ("spsa", "one-sided"):
            raise ValueError(
                "estimator.perturbation_scale is below the quantum 2^-quantum_exponent; "
                "raise one of them"
            )
        if self.num_directions > self.directions.pool_size:
            raise ValueError("estimator.directions_per_round is larger than directions.pool_size")
        if self.estimator.kind == "backprop" and self.directions.mode == "own":
            raise ValueError(
                'estimator "backprop" reports the whole pool: set directions.mode = "shared"'
            )
        if self.directions.family == "independent" and self.directions.pool_size > 4096:
            raise ValueError(
                'directions.family = "independent" costs K passes; use "hadamard" above 4096'
            )
        if self.codec.rounding == "unbiased" and self.codec.up == "sign":
            raise ValueError(
                'codec.up = "sign" keeps only signs, which cannot be unbiased: set '
                'codec.rounding = "nearest", or codec.up = "int8" or "log8"'
            )
        if self.model.adapter == "randlora" and self.estimator.kind == "forward":
            raise ValueError(
                'model.adapter = "randlora" has no forward-mode derivative: set '
                'estimator.kind = "spsa" or "backprop", or model.adapter = "lora"'
            )
        if self.task.kind != "classification" and self.model.head != "auto":
            raise ValueError(
                f'model.head = "{self.model.head}" is a new head, which task.kind = '
                f'"{self.task.kind}" does without: set model.head = "auto"'
            )
        if self.optimizer.warmup_rounds >= self.run.rounds:
            raise ValueError(
                f"optimizer.warmup_rounds = {self.optimizer.warmup_rounds} leaves nothing of "
                f"{self.run.rounds} rounds; make it smaller"
            )
        if self.rounds.aggregation == "majority" and self.directions.mode == "own":
            raise ValueError(
                'rounds.aggregation = "majority" votes on directions that all measured: set '
                'directions.mode = "shared"'
            )
        if 0 < self.rounds.start_with < self.rounds.quorum:
            raise ValueError("rounds.start_with must be 0 (= quorum) or at least rounds.quorum")
        if self.service.heartbeat_timeout_s < 2 * self.service.heartbeat_s:
            raise ValueError("service.heartbeat_timeout_s must be at least twice heartbeat_s")
        return self

    @property
    def num_directions(self) -> int:
        """Scalars a participant reports in a round."""
        if self.estimator.kind == "backprop":
            return self.directions.pool_size
        return self.estimator.directions_per_round

    @property
    def perturbation_quanta(self) -> int:
        """The perturbation scale μ as an integer number of quanta, c = μ/u."""
        return quanta(self.estimator.perturbation_scale, self.directions.quantum_exponent)

    def draws(self, run_digest: bytes) -> Draws:
        """Return the directions of the rounds of this run."""
        section = self.directions
        return Draws(run_digest, section.mode, section.pool_size, self.num_directions)

    def pool(self, identity: Identity) -> Pool:
        """Return the run's seed pool on a base model and trainable set."""
        section = self.directions
        key = pool_key(identity.base_digest, identity.manifest.digest(), section.pool_index)
        return Pool(key, section.pool_size, section.quantum_exponent, section.family)

    def canonical(self) -> str:
        """Return the identity of the run as text: JSON, sorted, without [service]."""
        content = self.model_dump(mode="json", exclude={"service"})
        for section, added in ADDED_LATER.items():
            for name, value in added.items():
                if content[section][name] == value:
                    del content[section][name]
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
