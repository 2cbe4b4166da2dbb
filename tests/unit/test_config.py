"""RunConfig: one TOML file, frozen, whose digest is the identity of the run (DESIGN §3, §5)."""

import hashlib
import json
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from tests.run_text import MINIMAL, config_of, text_of

from lorand.config import ADDED_LATER, RunConfig, load
from lorand.directions import pool_key
from lorand.errors import ConfigError
from lorand.manifest import Identity, Manifest, TensorSpec, run_digest
from lorand.schedules import Schedule, factor

# ------------------------------------------------------------- identity

IDENTITY: Final = Identity(b"\1" * 32, b"\2" * 32, Manifest((TensorSpec("w", (2, 3), "float32"),)))


def test_the_digest_is_pinned() -> None:
    """A change here gives every existing run another name: workers of it could not come back."""
    config = config_of()
    assert config.digest() == hashlib.sha256(config.canonical().encode()).digest()
    assert (
        config.digest().hex() == "e6f54e3ac3cbe3a340f5dba8bfa5b8876ef4ebc817e53d9da4c013a70d6a133d"
    )


def test_the_spelling_of_a_file_is_not_its_identity() -> None:
    """Order, comments, defaults written out and integers for floats leave the run as it is."""
    sections = text_of(codec="up = 'int8'").split("\n[")
    other = "\n[".join(["# a comment", *reversed(sections[1:]), sections[0].removeprefix("[")])
    assert RunConfig.parse(other).digest() == config_of().digest()
    same = config_of(directions="head_scale = 16"), config_of(directions="head_scale = 16.0")
    assert same[0].digest() == same[1].digest() == config_of().digest()


def test_the_canonical_text_holds_every_section_but_service() -> None:
    """A setting that the first runs did not have is left out at the value they had."""
    content = json.loads(config_of().canonical())
    for name, added in ADDED_LATER.items():
        assert set(added).isdisjoint(content.get(name, {}))
        content[name] = content.get(name, {}) | added
    assert set(content) == set(RunConfig.model_fields) - {"service"}
    for name, section in content.items():
        assert set(section) == set(type(getattr(config_of(), name)).model_fields)


SECTIONS: Final[dict[str, type[BaseModel]]] = {
    name: section
    for name, field in RunConfig.model_fields.items()
    if isinstance(section := field.annotation, type) and issubclass(section, BaseModel)
}
FIELDS: Final = [
    (name, field)
    for name, section in SECTIONS.items()
    for field, info in section.model_fields.items()
    if len(get_args(info.annotation)) != 1  # task.kind has one choice so far
]


def changed(section: str, field: str) -> RunConfig:
    """The minimal config with one field set to anything else of its type."""
    config = config_of()
    value = getattr(getattr(config, section), field)
    annotation = SECTIONS[section].model_fields[field].annotation
    other: Any
    if get_origin(annotation) is Literal:
        other = next(choice for choice in get_args(annotation) if choice != value)
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, (int, float)):
        other = value + 1
    elif isinstance(value, dict):
        other = {**value, "more": 1.0}
    else:
        more = 0.5 if field == "refined" else "more"
        other = (*value, more) if isinstance(value, tuple) else value + "more"
    moved = getattr(config, section).model_copy(update={field: other})
    return config.model_copy(update={section: moved})


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=[".".join(f) for f in FIELDS])
def test_every_setting_but_those_of_service_names_the_run(section: str, field: str) -> None:
    """Two coordinators with one run digest cannot differ in anything that moves a weight."""
    same_run = section == "service"
    plain, other = config_of(), changed(section, field)
    assert other != plain
    assert (other.digest() == plain.digest()) == same_run
    names = run_digest(other.digest(), IDENTITY), run_digest(plain.digest(), IDENTITY)
    assert (names[0] == names[1]) == same_run


def test_a_sign_vote_is_a_majority() -> None:
    """One rule by two names is one run."""
    voted, majority = (
        config_of(rounds=f'aggregation = "{name}"') for name in ("sign-vote", "majority")
    )
    assert voted == majority
    assert voted.digest() == majority.digest()


def test_a_config_is_frozen() -> None:
    config = config_of()
    with pytest.raises(ValidationError, match="frozen"):
        config.run = config.run
    with pytest.raises(ValidationError, match="frozen"):
        config.run.rounds = 3


def test_a_worker_receives_the_whole_config() -> None:
    """Join: the config travels as JSON and means the same run, service settings included."""
    config = config_of(service="heartbeat_s = 3.0", optimizer="learning_rate = 0.1")
    again = RunConfig.from_json(config.to_json())
    assert again == config
    assert again.digest() == config.digest()


def test_databases_are_the_coordinators_alone() -> None:
    """Their addresses may hold a password."""
    url = "postgresql://lorand:secret@db/lorand"
    config = config_of(service=f'ledger = "{url}"\nmembers = "{url}"')
    assert "secret" not in config.to_json()
    again = RunConfig.from_json(config.to_json())
    assert again == config_of()
    assert again.digest() == config.digest()


def test_an_older_worker_is_sent_nothing_that_it_does_not_know() -> None:
    """Statements were added after the first workers: where there are none, nothing names them."""
    assert "statements_every" not in config_of().to_json()
    stating = config_of(service="statements_every = 50")
    assert RunConfig.from_json(stating.to_json()) == stating
    assert stating.digest() == config_of().digest()


@pytest.mark.parametrize("text", ["", "{", "{}", "[]"])
def test_a_coordinator_that_sends_no_config(text: str) -> None:
    with pytest.raises(ConfigError, match="the coordinator's run config is not a valid run"):
        RunConfig.from_json(text)


# ------------------------------------------------------------- what follows from the settings


def test_the_pool_of_a_run() -> None:
    """DESIGN §2 step 2: base, trainable set and pool index choose it; the config only its size."""
    config = config_of(directions="pool_index = 7")
    pool = config.pool(IDENTITY)
    assert pool.key == pool_key(IDENTITY.base_digest, IDENTITY.manifest.digest(), 7)
    assert (pool.size, pool.quantum_exponent, pool.family) == (4096, 32, "hadamard")
    other = config_of(directions="pool_index = 7", optimizer="learning_rate = 2.0")
    assert other.pool(IDENTITY) == pool


def test_the_draws_of_a_run() -> None:
    """By forward passes a few directions, by one backward pass the whole pool."""
    draws = config_of(directions="mode = 'own'").draws(b"\5" * 32)
    assert (draws.run_digest, draws.mode, draws.size, draws.count) == (b"\5" * 32, "own", 4096, 8)
    assert config_of(estimator='kind = "backprop"').draws(b"\5" * 32).count == 4096


def test_a_round_has_a_direction_for_each_step() -> None:
    """A participant reports all it measured; by backward passes that is the pool, each time."""
    several = config_of(estimator="directions_per_round = 3", local="steps = 5")
    assert several.num_directions == several.draws(b"\5" * 32).count == 15
    config = config_of(estimator="kind = 'backprop'", local="steps = 5")
    assert config.num_directions == 4096


@pytest.mark.parametrize(
    ("directions", "needs"),
    [("", False), ("rotate_every = 3", True), ("drawing = 'weighted'", True)],
)
def test_who_joins_reads_all_where_the_coefficients_do_not_say_all(
    directions: str, needs: bool
) -> None:
    assert config_of(directions=directions).needs_history == needs


@pytest.mark.parametrize(
    ("local", "codec", "keeps"),
    [
        ("steps = 0", "", False),
        ("steps = 3", "", True),
        ("steps = 3", "rounding = 'unbiased'", False),
        ("steps = 3\nerror_feedback = false", "", False),
    ],
)
def test_feedback_is_kept_where_codes_lose_something_for_good(
    local: str, codec: str, keeps: bool
) -> None:
    assert config_of(local=local, codec=codec).keeps_feedback == keeps


def test_options_of_an_optimizer_reach_the_worker_as_they_are() -> None:
    """Whole numbers, truth values and pairs too; they name the run."""
    options = "options = {betas = [0.9, 0.95], nesterov = true, weight_decay = 0, momentum = 0.5}"
    config = config_of(local=f"steps = 2\n{options}")
    expected = {"betas": (0.9, 0.95), "nesterov": True, "weight_decay": 0, "momentum": 0.5}
    assert config.local.options == expected
    assert RunConfig.from_json(config.to_json()).local.options == expected
    assert RunConfig.from_json(config.canonical()).digest() == config.digest()
    assert config.local.options["nesterov"] is True
    assert config.digest() != config_of(local="steps = 2").digest()


def test_the_perturbation_scale_is_a_whole_number_of_quanta() -> None:
    """DESIGN §1: c = μ/u."""
    assert config_of().perturbation_quanta == round(0.01 * 2**32)
    assert config_of(estimator="perturbation_scale = 0.25").perturbation_quanta == 2**30


def test_schedules() -> None:
    """`linear` ends at 1/total, never at zero or below; `constant` stays."""
    assert [factor("linear", n, 5) for n in range(5)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert factor("linear", 9, 5) == factor("cosine", 9, 5) == 0
    assert {factor("constant", n, 5) for n in range(9)} == {1.0}
    wave = [factor("cosine", n, 5) for n in range(5)]
    assert wave == pytest.approx([1, 0.9045, 0.6545, 0.3455, 0.2], abs=1e-4)
    assert all(value * 2**20 % 1 == 0 for value in wave[:4]), "alike on every machine"


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_rises_to_one_and_the_rest_is_the_schedule(schedule: Schedule) -> None:
    warm = [factor(schedule, n, 13, warmup=3) for n in range(13)]
    assert warm[:4] == [0.25, 0.5, 0.75, 1.0]
    assert warm[3:] == [factor(schedule, n, 10) for n in range(10)]


def test_a_refined_schedule_is_read_between_its_points() -> None:
    """Any length of a run: the first point at the first round, the last at the last."""
    points = (0.25, 1.0, 0.5)
    for total in (1, 2, 3, 7, 200):
        found = [factor("refined", n, total, refined=points) for n in range(total + 1)]
        places = np.linspace(0, 2, total) if total > 1 else [0]
        assert found[:-1] == pytest.approx(np.interp(places, [0, 1, 2], points).tolist())
        assert found[-1] == 0, "past the end of the run"
    warm = [factor("refined", n, 10, 3, points) for n in range(10)]
    assert warm[:3] == [0.25, 0.5, 0.75]
    assert warm[3:] == [factor("refined", n, 7, refined=points) for n in range(7)]


@pytest.mark.parametrize("count", [1, 65])
def test_a_refined_schedule_has_two_to_64_points(count: int) -> None:
    line = f"schedule = 'refined'\nrefined = {[0.5] * count}"
    with pytest.raises(ConfigError, match=f"refined has {count} points; give 2 to 64"):
        config_of(optimizer=line)


# ------------------------------------------------------------- what is refused, and how

WRONG: Final[list[tuple[str, str, str, str]]] = [
    # section, line, the field the message names, and what it says to do
    ("run", "name = 'two words'", "run.name", "should match pattern"),
    ("run", "name = ''", "run.name", "at least 1 character"),
    ("run", "rounds = 0", "run.rounds", "greater than or equal to 1"),
    ("run", "rounds = 2.5", "run.rounds", "valid integer"),
    ("run", "rounds = 'many'", "run.rounds", "valid integer"),
    ("run", "color = 'red'", "run.color", "no such setting; see the comments of `lr-coordinator"),
    ("runs", "name = 'x'", "runs", "no such setting; see the comments of `lr-coordinator"),
    ("model", "dtype = 'int8'", "model.dtype", "should be 'float32', 'bfloat16' or 'float16'"),
    ("model", "max_length = 3", "model.max_length", "greater than or equal to 4"),
    ("model", "feature_scale = inf", "model.feature_scale", "finite number"),
    ("model", "head = 'none'", "model.head", "should be 'auto', 'own' or 'pooled'"),
    ("task", "labels = ['a']", "task.labels", "at least 2 items"),
    ("task", "labels = ['a', 'b', 'a']", "task.labels", "every label is listed once"),
    (
        "task",
        "kind = 'regression'",
        "task.kind",
        "should be 'classification', 'label-words' or 'causal-lm'",
    ),
    ("directions", "pool_size = 1000", "directions.pool_size", "power of two from 64 to 1048576"),
    ("directions", "pool_size = 32", "directions.pool_size", "power of two from 64 to 1048576"),
    ("directions", "pool_size = -64", "directions.pool_size", "power of two from 64 to 1048576"),
    ("directions", "head_scale = 3.0", "directions.head_scale", "power of two from 2^-10"),
    ("directions", "head_scale = nan", "directions.head_scale", "power of two from 2^-10"),
    ("directions", "pool_index = -1", "directions.pool_index", "greater than or equal to 0"),
    ("directions", "quantum_exponent = 49", "directions.quantum_exponent", "equal to 48"),
    ("directions", "family = 'random'", "directions.family", "should be 'hadamard' or"),
    (
        "estimator",
        "kind = 'adamw'",
        "estimator.kind",
        "should be 'spsa', 'one-sided', ",
    ),
    ("estimator", "perturbation_scale = 0", "estimator.perturbation_scale", "greater than 0"),
    ("estimator", "perturbation_scale = nan", "estimator.perturbation_scale", "finite number"),
    ("estimator", "perturbation_scale = 1e300", "estimator.perturbation_scale", "less than"),
    ("estimator", "perturbation_scale = 1e-12", "estimator.perturbation_scale", "raise one"),
    ("estimator", "directions_per_round = 5000", "estimator.directions_per_round", "pool_size"),
    ("estimator", "max_directions_per_round = 4", "estimator", "directions_per_round to "),
    ("directions", "drawing = 'often'", "directions.drawing", "should be 'uniform', 'weighted'"),
    ("directions", "rotate_every = -1", "directions.rotate_every", "equal to 0"),
    ("local", "steps = -1", "local.steps", "greater than or equal to 0"),
    ("local", "epochs = 1001", "local.epochs", "less than or equal to 1000"),
    ("local", "space = 'lora'", "local.space", "should be 'seeds' or 'weights'"),
    ("local", "learning_rate = 0", "local.learning_rate", "greater than 0"),
    ("local", "options = {betas = [0.9, nan]}", "local.options", "betas is not a finite number"),
    ("local", "options = {eps = inf}", "local.options", "eps is not a finite number"),
    ("codec", "up = 'int4'", "codec.up", "should be 'int8', 'log8', 'sign' or"),
    ("codec", "down = 'log8'", "codec.down", "should be 'int8', 'sign' or 'int32'"),
    ("codec", "rounding = 'up'", "codec.rounding", "should be 'nearest' or 'unbiased'"),
    ("optimizer", "learning_rate = -1", "optimizer.learning_rate", "greater than 0"),
    ("optimizer", "kind = 'lion'", "optimizer.kind", "should be 'sgd' or 'adam'"),
    ("optimizer", "beta1 = 1.0", "optimizer.beta1", "less than 1"),
    ("optimizer", "schedule = 'step'", "optimizer.schedule", "should be 'linear', 'cosine', "),
    ("optimizer", "clip_factor = 0.5", "optimizer", "set it to 3 or so, or to 0 for none"),
    ("optimizer", "clip_factor = -1", "optimizer.clip_factor", "greater than or equal to 0"),
    ("optimizer", "schedule = 'refined'", "optimizer", "take both lines from `lr-coordinator re"),
    ("optimizer", "refined = [1.0, 0.5]", "optimizer", 'schedule = "refined" and refined = [...]'),
    ("optimizer", "refined = [1.0, 1.5]", "optimizer.refined.1", "less than or equal to 1"),
    ("rounds", "quorum = 0", "rounds.quorum", "greater than or equal to 1"),
    ("rounds", "start_with = 2", "rounds.start_with", "must be 0 (= quorum) or at least"),
    ("rounds", "deadline_s = 0", "rounds.deadline_s", "greater than 0"),
    ("service", "max_workers = 0", "service.max_workers", "greater than or equal to 1"),
    ("service", "heartbeat_timeout_s = 5", "service.heartbeat_timeout_s", "at least twice"),
]


@pytest.mark.parametrize(
    ("section", "line", "field", "remedy"), WRONG, ids=[f"{s}: {line}" for s, line, _, _ in WRONG]
)
def test_a_wrong_setting_is_named_with_what_to_do(
    section: str, line: str, field: str, remedy: str
) -> None:
    """One error a wrong setting, none of them about anything else."""
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse(text_of(**{section: line}), "here.toml")
    first, *rest = str(caught.value).split("\n")
    assert first == "here.toml is not a valid run:"
    assert len(rest) == 1
    assert field in rest[0]
    assert remedy in rest[0]


@pytest.mark.parametrize("name", MINIMAL)
def test_a_missing_section_is_named(name: str) -> None:
    text = "".join(f"[{other}]\n{MINIMAL[other]}\n" for other in MINIMAL if other != name)
    with pytest.raises(ConfigError, match=f"\n  {name}: missing; add it$"):
        RunConfig.parse(text)


def test_every_wrong_setting_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse(text_of(run="rounds = 0").replace("quorum = 3", ""))
    assert "\n  run.rounds: " in str(caught.value)
    assert "\n  rounds.quorum: missing; add it" in str(caught.value)


@settings(deadline=None)
@given(st.sampled_from(["perturbation_scale", "learning_rate"]), st.floats())
def test_any_number_gives_a_config_or_a_config_error(field: str, value: float) -> None:
    """A run that starts can perturb: the quanta of the perturbation scale fit the coefficients."""
    section = "estimator" if field == "perturbation_scale" else "optimizer"
    for quantum in (8, 48):
        directions = f"quantum_exponent = {quantum}"
        try:
            config = config_of(**{section: f"{field} = {value!r}", "directions": directions})
        except ConfigError:
            continue
        assert 1 <= config.perturbation_quanta < 2**62


# ------------------------------------------------------------- files


def test_load(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text_of().replace("negative", "négatif"), encoding="utf-8")
    assert load(path).task.labels == ("négatif", "positive")


def test_a_file_that_is_not_toml_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[run\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML: .*line 1"):
        load(path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["missing", "not text"])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.toml: .*write one with `lr-coordinator init`"):
        load(path)


def test_a_folder_is_no_run_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the run file"):
        load(tmp_path)
