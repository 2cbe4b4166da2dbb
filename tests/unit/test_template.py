"""The run file that `lr-coordinator init` writes, and what the documents promise."""

import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorand.config import RunConfig
from lorand.errors import ConfigError
from lorand_coordinator import cli as coordinator
from lorand_coordinator.presets import PRESETS, render


def written(tmp_path: Path, preset: str = "") -> Path:
    target = tmp_path / "run.toml"
    result = CliRunner().invoke(coordinator.app, ["init", str(target), "--preset", preset])
    assert result.exit_code == 0, result.output
    return target


def test_template_is_a_valid_run_with_every_setting_spelled_out(tmp_path: Path) -> None:
    text = written(tmp_path).read_text(encoding="utf-8")
    config = RunConfig.parse(text)
    found = tomllib.loads(text)
    for section, fields in config.model_dump().items():
        assert set(found[section]) == set(fields), section


def test_template_states_the_defaults(tmp_path: Path) -> None:
    found = tomllib.loads(written(tmp_path).read_text(encoding="utf-8"))
    for name in ("directions", "codec", "service"):
        assert RunConfig.model_fields[name].default.model_dump() == found[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_template_with_its_own_settings(tmp_path: Path, name: str) -> None:
    """Nothing else differs, comments included, and its paper and differences come first."""
    preset = PRESETS[name]
    text = written(tmp_path, preset=name).read_text(encoding="utf-8")
    head, rest = text.split("\n#\n", 1)
    words = head.replace("# ", "").replace("\n", " ")
    assert words == f"{preset.paper}. Here {preset.differs}."
    config, plain = RunConfig.parse(text).model_dump(), RunConfig.parse(render()).model_dump()
    for section, values in preset.settings.items():
        plain[section] |= values
    assert config == plain
    comments = [re.findall(r"#.*", line) for line in render().splitlines()]
    assert [re.findall(r"#.*", line) for line in rest.splitlines()] == comments


def test_an_unknown_preset_is_refused_with_those_there_are(tmp_path: Path) -> None:
    result = CliRunner().invoke(coordinator.app, ["init", str(tmp_path / "a"), "--preset", "sgd"])
    assert isinstance(result.exception, ConfigError)
    assert f"there is no preset 'sgd'; there are {', '.join(sorted(PRESETS))}" in str(
        result.exception
    )
    assert not (tmp_path / "a").exists()


def test_init_keeps_an_existing_file(tmp_path: Path) -> None:
    target = written(tmp_path)
    target.write_text("mine", encoding="utf-8")
    assert CliRunner().invoke(coordinator.app, ["init", str(target)]).exit_code != 0
    assert target.read_text(encoding="utf-8") == "mine"
