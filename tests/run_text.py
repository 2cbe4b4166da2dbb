"""Run files as text: the smallest valid one, with lines changed."""

from typing import Final

import pytest

from lorand.config import RunConfig
from lorand.errors import ConfigError

MINIMAL: Final = {
    "run": "name = 'sentiment'\nrounds = 40",
    "model": "name = 'some/model'",
    "task": "labels = ['negative', 'positive']",
    "estimator": "kind = 'spsa'",
    "optimizer": "learning_rate = 0.01",
    "rounds": "quorum = 3",
}


def text_of(**changes: str) -> str:
    """The minimal run file with lines added to its sections, or put in place of theirs."""
    text = ""
    for name in dict.fromkeys([*MINIMAL, *changes]):
        lines = [*MINIMAL.get(name, "").splitlines(), *changes.get(name, "").splitlines()]
        settings_of = {line.partition("=")[0]: line for line in lines}
        text += "\n".join([f"[{name}]", *settings_of.values(), ""])
    return text


def config_of(**changes: str) -> RunConfig:
    return RunConfig.parse(text_of(**changes))


def assert_refused(sections: dict[str, str], field: str, remedy: str) -> None:
    """Settings that do not go together are refused for one reason, with a remedy."""
    with pytest.raises(ConfigError) as caught:
        config_of(**sections)
    assert field in str(caught.value)
    assert remedy in str(caught.value)
    assert len(str(caught.value).split("\n")) == 2, "one reason"
