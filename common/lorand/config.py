"""RunConfig: everything that defines a run, from one TOML file, frozen, with a digest.

All sections but [service] enter the digest, which is part of the run's identity; [service] holds
what an operator may change between restarts: addresses, limits and deadlines of the transport.
"""

import hashlib
import json
import tomllib
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from lorand import schedules
from lorand.codec import Codec, DeltaCodec, Rounding
from lorand.coefficients import check_size, quanta
from lorand.consistency import refusals
from lorand.directions import Drawing, Draws, Family, Pool, pool_key
from lorand.errors import ConfigError
from lorand.manifest import Identity
from lorand.schedules import REFINED_POINTS, Schedule
from lorand.sections import ModelSection as ModelSection
from lorand.sections import PrivacySection, Section, SubspaceSection
from lorand.sections import Quantisation as Quantisation
from lorand.sections import TaskSection as TaskSection
from lorand.subspaces import periods
from lorand.subspaces.basis import Basis

PROTOCOL_VERSION = 1

EstimatorKind = Literal["spsa", "one-sided", "forward", "backprop"]
Rule = Literal["mean", "majority", "clipped-mean", "median", "trimmed-mean"]
ROBUST: Final = ("clipped-mean", "median", "trimmed-mean")
"""Rules that bound what a minority of liars does, whatever the size of its scalars."""

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
        "format": "pairs",
        "messages_column": "messages",
    },
    "codec": {"rounding": "nearest"},
    "optimizer": {"warmup_rounds": 0, "spread_decay": 0.9, "clip_factor": 0.0, "refined": []},
    "estimator": {"max_batch_size": 0, "max_directions_per_round": 0, "mixed": False},
    "rounds": {"aggregation": "mean", "trim": 0.3, "deadline_k": 0.0, "participants": 0},
    "directions": {"scale_rule": "head", "drawing": "uniform", "rotate_every": 0},
    "subspace": {
        "kind": "full",
        "rank": 8,
        "rank_rule": "fixed",
        "targets": "",
        "scale": 1.0,
        "selection": "drawn",
        "refresh_every": 0,
        "lazy": False,
        "state": "none",
        "weights": "float",
        "probe": False,
        "switch_off": False,
    },
    "local": {
        "steps": 0,
        "epochs": 0,
        "space": "seeds",
        "optimizer": "SGD",
        "learning_rate": 1e-3,
        "options": {},
        "error_feedback": True,
    },
    "privacy": {
        "mode": "none",
        "mechanism": "gaussian",
        "target_epsilon": 8.0,
        "delta": 1e-5,
        "clip_bound": 1.0,
        "sample_rate": 0.01,
        "spare_rounds": 0,
        "batch_cap": 0,
        "max_examples": 0,
        "honest_min": 0,
        "estimator": "gradients",
        "restart_every": 50,
        "restart_share": 0.5,
        "slope_bound": 1.0,
    },
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


class EstimatorSection(Section):
    """How a worker measures; see `lorand_worker.estimators`."""

    kind: EstimatorKind
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    max_batch_size: Annotated[int, Field(ge=0, le=65536)] = 0
    perturbation_scale: Annotated[float, Field(gt=0, le=1024, allow_inf_nan=False)] = 0.01
    directions_per_round: Count = 8
    max_directions_per_round: Annotated[int, Field(ge=0, le=2**20)] = 0
    mixed: bool = False


class LocalSection(Section):
    """Steps that a participant takes on its own data before it reports; see `local_steps`."""

    steps: Annotated[int, Field(ge=0, le=100_000)] = 0
    epochs: Annotated[int, Field(ge=0, le=1000)] = 0
    space: Literal["seeds", "weights"] = "seeds"
    optimizer: str = "SGD"
    learning_rate: Positive = 1e-3
    options: dict[str, bool | int | float | tuple[float, ...]] = Field(default={})
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
    refined: tuple[Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)], ...] = ()
    clip_factor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _refined_or_not(self) -> Self:
        if (self.schedule == "refined") != bool(self.refined):
            raise ValueError(
                'schedule = "refined" and refined = [...] go together: take both lines from '
                "`lr-coordinator refine`"
            )
        if self.refined and len(self.refined) not in REFINED_POINTS:
            raise ValueError(
                f"refined has {len(self.refined)} points; give {REFINED_POINTS[0]} to "
                f"{REFINED_POINTS[-1]}"
            )
        if 0 < self.clip_factor < 1:
            raise ValueError(
                "clip_factor below 1 clips typical scalars: set it to 3 or so, or to 0 for none"
            )
        return self


class RoundsSection(Section):
    """When a round may start and commit."""

    quorum: Annotated[int, Field(ge=1, le=100_000)]
    start_with: Annotated[int, Field(ge=0, le=100_000)] = 0
    deadline_s: Positive = 60.0
    deadline_k: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    participants: Annotated[int, Field(ge=0, le=100_000)] = 0
    weighting: Literal["equal", "examples"] = "equal"
    aggregation: Rule = "mean"
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.3
    telemetry: Literal["loss", "none"] = "loss"

    @field_validator("aggregation", mode="before")
    @classmethod
    def _by_its_other_name(cls, rule: object) -> object:
        return "majority" if rule == "sign-vote" else rule


class ServiceSection(Section):
    """Operation of the coordinator: not part of the run's identity."""

    address: str = "127.0.0.1:7700"
    enrol_address: str = ""
    ledger: str = ""
    members: str = ""
    checkpoint_every: Count = 50
    heartbeat_s: Positive = 10.0
    heartbeat_timeout_s: Positive = 45.0
    max_workers: Annotated[int, Field(ge=1, le=100_000)] = 1000
    outbox_messages: Annotated[int, Field(ge=8, le=100_000)] = 256
    tail_entries: Annotated[int, Field(ge=1, le=100_000)] = 512
    messages_per_s: Annotated[float, Field(ge=1, le=100_000)] = 500.0
    calls_per_s: Annotated[float, Field(ge=1, le=100_000)] = 20.0
    commit_retry_s: Positive = 5.0
    drain_s: Positive = 5.0
    quarantine: bool = False
    auditor: Annotated[str, Field(max_length=64)] = ""
    statements_every: Annotated[int, Field(ge=0, le=1_000_000)] = 0


class RunConfig(Section):
    """One run. Build it with `load`, `parse` or `from_json`; all raise ConfigError."""

    run: RunSection
    model: ModelSection
    task: TaskSection
    directions: DirectionsSection = DirectionsSection()
    estimator: EstimatorSection
    local: LocalSection = LocalSection()
    subspace: SubspaceSection = SubspaceSection()
    codec: CodecSection = CodecSection()
    optimizer: OptimizerSection
    rounds: RoundsSection
    privacy: PrivacySection = PrivacySection()
    service: ServiceSection = ServiceSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse combinations that cannot work, with the way out."""
        for holds, why in refusals(self):
            if holds:
                raise ValueError(why)
        return self

    @property
    def num_directions(self) -> int:
        """Scalars a participant reports in a round."""
        if self.estimator.kind == "backprop":
            return self.directions.pool_size
        return self.estimator.directions_per_round * max(1, self.local.steps)

    @property
    def needs_history(self) -> bool:
        """Whether A alone does not say what comes next, so that who joins reads all entries."""
        rotates = self.directions.rotate_every > 0 or periods.voted(self)
        return rotates or self.directions.drawing != "uniform" or self.privacy.differences

    @property
    def releases(self) -> int:
        """Most rounds that a worker of a private run answers, which its noise is calculated for."""
        return self.run.rounds + self.privacy.spare_rounds

    @property
    def keeps_feedback(self) -> bool:
        """Whether participants carry what their codes lose into the next round."""
        local = self.local
        return local.taken and local.error_feedback and self.codec.rounding == "nearest"

    def pool_after(self, committed: int) -> int:
        """Return the number of the pool, from 0, on which the round after these is measured."""
        return periods.pool_after(self, committed)

    @property
    def perturbation_quanta(self) -> int:
        """The perturbation scale μ as an integer number of quanta, c = μ/u."""
        return quanta(self.estimator.perturbation_scale, self.directions.quantum_exponent)

    def rate_factor(self, committed: int) -> float:
        """Return the schedule's factor on the learning rate of the round after so many commits."""
        settings = self.optimizer
        return schedules.factor(
            settings.schedule,
            committed,
            self.run.rounds,
            settings.warmup_rounds,
            settings.refined,
        )

    def rate(self, committed: int) -> float:
        """Return the coordinator's learning rate of the round after so many commits."""
        return self.optimizer.learning_rate * self.rate_factor(committed)

    def draws(self, run_digest: bytes) -> Draws:
        """Return the directions of the rounds of this run."""
        section = self.directions
        return Draws(
            run_digest, section.mode, section.pool_size, self.num_directions, section.drawing
        )

    def pool(self, identity: Identity, number: int = 0, basis: Basis | None = None) -> Pool:
        """Return a seed pool of the run, its first or number so and so, on a base and a set.

        In full space, or on a basis: see `ledger.pool_of`.
        """
        section = self.directions
        index = (section.pool_index + number) % 2**32
        key = pool_key(identity.base_digest, identity.manifest.digest(), index)
        return Pool(key, section.pool_size, section.quantum_exponent, section.family, number, basis)

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
        """Return the config as JSON: what a worker receives at join.

        Without databases, whose addresses may hold a password, and without a setting of [service]
        that older workers do not know, where it is off.
        """
        kept_back = {"ledger", "members"}
        if not self.service.statements_every:
            kept_back.add("statements_every")
        return self.model_dump_json(exclude={"service": kept_back})

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
        except ValidationError as error:
            raise ConfigError(_explain(source, error)) from error
        except (ValueError, RecursionError) as error:  # also: a number or nesting without end
            raise ConfigError(f"{source} is not valid TOML: {error}") from error


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
