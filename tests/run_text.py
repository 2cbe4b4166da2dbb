"""Run files as text: the smallest valid one, with lines changed."""

from typing import Final

from lorand.config import RunConfig

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
