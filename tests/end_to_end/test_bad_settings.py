"""Settings that a model, a dtype or the data cannot serve: refused with what to change."""

import math
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.commands import MakeRoom, Room, status

NOT_LOCKED: dict[str, Any] = {"run": {"adopt_first_worker": True}}


def on_model(room: Room, command: str, *more: object) -> tuple[int, str]:
    return room.failure("lr-worker", command, room.run, "--model", room.model, *more)


@pytest.mark.slow
def test_a_perturbation_that_rounds_away(make_room: MakeRoom) -> None:
    """In bfloat16 weights a step of 1e-5 is no step: at prepare, calibrate and join."""
    settings: dict[str, Any] = {
        **NOT_LOCKED,
        "model": {"dtype": "bfloat16"},
        "estimator": {"perturbation_scale": 1e-5},
    }
    room = make_room(tiny.settings("spsa", **settings))
    data = ("--data", room.data["hotels"])
    with room.coordinator() as (_, address):
        found = [
            on_model(room, "prepare"),
            on_model(room, "calibrate", *data),
            room.failure("lr-worker", *room.join_arguments(address, "hotels")),
        ]
    for code, text in found:
        assert code == 2, text
        assert "estimator.perturbation_scale = 1e-05 rounds away in " in text
        assert "of the trained bfloat16 weights, so that moving them changes nothing" in text
        assert 'or model.dtype = "float32"' in text
    assert not (room.folder / "run.lock").exists()
    advised = float(found[0][1].split("set it to at least ")[1].split(",")[0])
    assert 1e-5 < advised < 0.01
    settings["estimator"] = {"perturbation_scale": advised}
    room.run.write_text(tiny.to_toml(tiny.settings("spsa", **settings)), encoding="utf-8")
    assert room.once("lr-worker", "prepare", room.run, "--model", room.model)["tensors"] > 0


@pytest.mark.slow
def test_a_batch_larger_than_the_data(make_room: MakeRoom, tmp_path: Path) -> None:
    """Refused by the worker: what it would measure is another estimator than the run's."""
    room = make_room(tiny.settings("spsa", **NOT_LOCKED))
    room.data = {
        **room.data,
        "few": tiny.write_csv(tmp_path / "few.csv", tiny.rows("hotels", 7, 1)),
    }
    with room.coordinator() as (_, address):
        found = [
            room.failure("lr-worker", *room.join_arguments(address, "few")),
            on_model(room, "calibrate", "--data", room.data["few"]),
        ]
        answer = status(address)
        assert answer is not None
        assert answer.entries == 0, "nobody joined"
    for code, text in found:
        assert code == 3, text
        assert "few.csv holds 7 examples, fewer than the run's batch of 8: give at least 8" in text
        assert "for a run with estimator.batch_size = 7" in text


@pytest.mark.parametrize(
    ("section", "settings", "sentence"),
    [
        ("optimizer", {"kind": "lion"}, "optimizer.kind: Input should be 'sgd' or 'adam'"),
        ("optimizer", {"schedule": "refined"}, "take both lines from `lr-coordinator refine`"),
        ("optimizer", {"clip_factor": 0.1}, "set it to 3 or so, or to 0 for none"),
        ("directions", {"pool_size": 1000}, "directions.pool_size"),
    ],
)
def test_settings_that_no_run_has(
    make_room: MakeRoom, section: str, settings: dict[str, Any], sentence: str
) -> None:
    room = make_room(tiny.settings("spsa"))
    content = tiny.settings("spsa", **{section: settings})
    room.run.write_text(tiny.to_toml(content), encoding="utf-8")
    for program, command in (("lr-coordinator", "serve"), ("lr-worker", "prepare")):
        code, text = room.failure(program, command, room.run)
        assert code == 2, text
        assert sentence in text


def test_weights_of_float32_bear_a_small_perturbation(make_room: MakeRoom) -> None:
    room = make_room(tiny.settings("spsa", estimator={"perturbation_scale": 1e-5}))
    assert room.once("lr-worker", "prepare", room.run, "--model", room.model)["tensors"] > 0
    content = tiny.settings("spsa", estimator={"perturbation_scale": 3e-10})
    room.run.write_text(tiny.to_toml(content), encoding="utf-8")
    code, text = on_model(room, "prepare")
    assert code == 2
    assert "of the trained float32 weights" in text
    assert "model.dtype" not in text
    assert math.isfinite(float(text.rsplit("set it to at least ", 1)[1]))


def test_ranks_that_nobody_decided(make_room: MakeRoom) -> None:
    """Singular values differ between machines: without run.lock a run has no ranks."""
    subspace = {"kind": "coordinate", "rank": 12, "rank_rule": "welore"}
    room = make_room(tiny.settings("spsa", **NOT_LOCKED, subspace=subspace))
    code, text = room.failure("lr-coordinator", "serve", room.run)
    assert code == 2, text
    assert "with the ranks of matrices (subspace.rank_rule); write it with `lr-worker pre" in text
    code, text = on_model(room, "calibrate", "--data", room.data["hotels"])
    assert code == 2, text
    assert 'subspace.rank_rule = "welore" needs a run.lock with the ranks' in text
