"""Changing values in a run file: it stays what its owner wrote, but for the value."""

import tomllib
from typing import Any

import pytest

from lorand.config import RunConfig
from lorand.errors import ConfigError
from lorand.runfile import lines, with_value, with_values
from lorand_coordinator.presets import PRESETS, render

TEXT = """# A run.
[run]
name = "a"   # of the run
rounds = 5

[ task ]
[estimator]     # how
kind = 'spsa'
scales = [1,
  2]          # two
batch_size=16# small
"""


@pytest.mark.parametrize(
    ("section", "key", "value", "before", "after"),
    [
        ("run", "rounds", 12, "rounds = 5", "rounds = 12"),
        ("run", "name", "b", 'name = "a"   # of', 'name = "b"   # of'),
        ("run", "name", "longer", 'name = "a"   # of', 'name = "longer"  # of'),
        ("estimator", "kind", "forward", "kind = 'spsa'", 'kind = "forward"'),
        ("estimator", "batch_size", 4, "batch_size=16# small", "batch_size = 4  # small"),
        ("estimator", "scales", (0.5, 1.0), "[1,\n  2]          # two", "[0.5, 1.0]  # two"),
        ("estimator", "rounds", 3, "how\n", "how\nrounds = 3\n"),
        ("optimizer", "kind", "adam", "# small\n", '# small\n\n[optimizer]\nkind = "adam"\n'),
    ],
)
def test_only_the_value_changes(
    section: str, key: str, value: object, before: str, after: str
) -> None:
    assert TEXT.count(before) == 1
    if key == "scales":
        before, after = f"scales = {before}", f"scales = {after}"
    changed = with_value(TEXT, section, key, value)
    expected = TEXT.replace(before, after)
    assert [line.split() for line in changed.splitlines()] == [
        line.split() for line in expected.splitlines()
    ]


@pytest.mark.parametrize(
    "text", ["run = {rounds = 5}\n", "run.rounds = 5\n", '[run]\nrounds = """5\n"""']
)
def test_what_is_not_understood_is_left_to_its_owner(text: str) -> None:
    with pytest.raises(ConfigError, match=r"set run\.rounds = 6 in the run file by hand"):
        with_value(text, "run", "rounds", 6)


@pytest.mark.parametrize("name", PRESETS)
def test_values_of_every_preset_are_found(name: str) -> None:
    """Written into a preset's file, they are what is read from it."""
    changes: dict[str, dict[str, Any]] = {
        "estimator": {"batch_size": 48, "perturbation_scale": 3e-05},
        "optimizer": {"learning_rate": 0.0007, "schedule": "constant"},
    }
    text = with_values(render(name), changes)
    assert len(text.splitlines()) == len(render(name).splitlines())
    config = RunConfig.parse(text).model_dump()
    for section, values in changes.items():
        assert values.items() <= config[section].items()
    assert tomllib.loads(lines(changes)) == changes
