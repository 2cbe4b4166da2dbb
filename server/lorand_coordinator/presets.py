"""Run files of published methods, and of our own: the template with their settings.

A preset is a comment that names the paper and what differs from it here, and the settings that
make the method; everything else is the template's.
"""

import textwrap
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

from lorand.errors import ConfigError
from lorand.runfile import with_values

Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Preset:
    """A method: its paper, what differs here, and its settings by section."""

    paper: str
    differs: str
    settings: Settings


_ALL_ALIKE: Final[Settings] = {
    "model": {"trainable": "all"},
    "directions": {"head_scale": 1.0},
}
_TWO_LOSSES_A_ROUND: Final[Settings] = {
    **_ALL_ALIKE,
    "run": {"rounds": 20000},
    "estimator": {
        "kind": "spsa",
        "batch_size": 16,
        "perturbation_scale": 0.001,
        "directions_per_round": 1,
    },
    "optimizer": {"learning_rate": 1e-6, "normalise": False, "schedule": "constant"},
}
_SCALARS_AS_MEASURED: Final = {"up": "int32", "down": "int32"}

PRESETS: Final = {
    "mezo": Preset(
        "MeZO: Malladi et al., Fine-Tuning Language Models with Just Forward Passes, NeurIPS 2023",
        "directions are ±1 from a pool of 4,096, not Gaussian and new every step; a step is the "
        "mean over the workers; weights are never restored by subtraction",
        {**_TWO_LOSSES_A_ROUND, "codec": _SCALARS_AS_MEASURED},
    ),
    "feedsign": Preset(
        "FeedSign: Robust Full-parameter Federated Fine-tuning of Large Models with Extremely Low "
        "Communication Overhead of One Bit, arXiv 2501.17610",
        "directions are ±1 from a pool of 4,096, not Gaussian and new every step",
        {
            **_TWO_LOSSES_A_ROUND,
            "codec": {"up": "sign", "down": "sign"},
            "rounds": {"aggregation": "majority"},
        },
    ),
    "fzoo": Preset(
        "FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards "
        "Adam-Scale Speed, arXiv 2506.09034",
        "the workers' mean takes the place of one machine's losses; learning_rate is the change of "
        "a weight in a round, the paper's times the root of the number of directions",
        {
            **_ALL_ALIKE,
            "estimator": {
                "kind": "one-sided",
                "batch_size": 16,
                "perturbation_scale": 0.001,
                "directions_per_round": 8,
            },
            "codec": _SCALARS_AS_MEASURED,
            "optimizer": {"learning_rate": 1e-4, "spread_decay": 0.0, "schedule": "constant"},
        },
    ),
    "lorand-zo": Preset(
        "LoRand by forward passes alone",
        "our own defaults: one byte a scalar, a head that moves further, a step normalised by the "
        "running spread of the scalars, linear decay",
        {"model": {"trainable": "all"}},
    ),
    "lorand-fo": Preset(
        "LoRand with one backward pass a round",
        "our own defaults: the gradient on 65,536 directions, one bit each way with error "
        "feedback at the coordinator, Adam on the coefficients",
        {
            "run": {"rounds": 120},
            "directions": {"pool_size": 65536},
            "estimator": {"kind": "backprop", "batch_size": 64},
            "codec": {"up": "sign", "down": "sign"},
            "optimizer": {"kind": "adam", "learning_rate": 0.001},
        },
    ),
}


def render(name: str = "") -> str:
    """Return the run file of a preset, or the template. Raises ConfigError for an unknown name."""
    template = resources.files("lorand_coordinator").joinpath("run_template.toml")
    text = template.read_text(encoding="utf-8")
    if not name:
        return text
    preset = PRESETS.get(name)
    if preset is None:
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(sorted(PRESETS))}")
    text = with_values(text, preset.settings)
    return f"{_comment(preset.paper)}\n{_comment('Here ' + preset.differs)}\n#\n{text}"


def _comment(text: str) -> str:
    return textwrap.fill(f"{text}.", width=98, initial_indent="# ", subsequent_indent="# ")
