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
_THE_MEAN_OF_STEPS: Final = {"learning_rate": 1.0, "normalise": False, "schedule": "constant"}
_FEDKSEED: Final[Settings] = {
    **_ALL_ALIKE,
    "run": {"rounds": 40},
    "directions": {"head_scale": 1.0, "mode": "own"},
    "estimator": {
        "kind": "spsa",
        "batch_size": 1,
        "perturbation_scale": 0.0005,
        "directions_per_round": 1,
    },
    "local": {"steps": 200, "learning_rate": 3e-7},
    "codec": _SCALARS_AS_MEASURED,
    "optimizer": _THE_MEAN_OF_STEPS,
    "rounds": {"weighting": "examples"},
}
_FEDKSEED_DIFFERS: Final = (
    "directions are ±1 from the pool, not Gaussian; a worker's 200 of a round all differ and "
    "follow from its number, so that none is sent"
)

PRESETS: Final = {
    "mezo": Preset(
        "MeZO: Malladi et al., Fine-Tuning Language Models with Just Forward Passes, NeurIPS 2023",
        "directions are ±1 from a pool of 4,096, not Gaussian and new every step; a step is the "
        "mean over the workers; weights are never restored by subtraction",
        {**_TWO_LOSSES_A_ROUND, "codec": _SCALARS_AS_MEASURED},
    ),
    "just-one-byte": Preset(
        "Just One Byte (per gradient): Zelikman et al., arXiv 2306.10015",
        "directions are ±1, from a new pool of 4,096 each round; a worker measures its 30 on one "
        "batch; a step is the mean over all scalars, theirs their sum over the root of their "
        "number; a byte's scale follows the scalars",
        {
            **_ALL_ALIKE,
            "run": {"rounds": 1000},
            "directions": {"head_scale": 1.0, "mode": "own", "rotate_every": 1},
            "estimator": {
                "kind": "spsa",
                "batch_size": 64,
                "perturbation_scale": 0.001,
                "directions_per_round": 30,
            },
            "codec": {"up": "log8", "down": "int32"},
            "optimizer": {"learning_rate": 0.1, "normalise": False, "schedule": "constant"},
        },
    ),
    "fedkseed": Preset(
        "FedKSeed: Qin et al., Federated Full-Parameter Tuning of Billion-Sized Language Models "
        "with Communication Cost under 18 Kilobytes, ICML 2024",
        _FEDKSEED_DIFFERS,
        _FEDKSEED,
    ),
    "fedkseed-pro": Preset(
        "FedKSeed-Pro: Qin et al., Federated Full-Parameter Tuning of Billion-Sized Language "
        "Models with Communication Cost under 18 Kilobytes, ICML 2024",
        f"{_FEDKSEED_DIFFERS}; directions are weighted by what the ledger holds, the mean over "
        "workers, not by each worker's scalars",
        {
            **_FEDKSEED,
            "directions": {**_FEDKSEED["directions"], "pool_size": 1024, "drawing": "weighted"},
        },
    ),
    "decomfl": Preset(
        "DeComFL: Li et al., Achieving Dimension-Free Communication in Federated Learning via "
        "Zeroth-Order Optimization, ICLR 2025",
        "directions are ±1 from a pool of 4,096, not Gaussian and new every step",
        {
            **_ALL_ALIKE,
            "run": {"rounds": 3000},
            "estimator": {
                "kind": "spsa",
                "batch_size": 32,
                "perturbation_scale": 0.001,
                "directions_per_round": 10,
            },
            "local": {"steps": 1, "learning_rate": 1e-4},
            "codec": _SCALARS_AS_MEASURED,
            "optimizer": _THE_MEAN_OF_STEPS,
        },
    ),
    "ferret": Preset(
        "Ferret: Shu et al., Federated Full-Parameter Tuning at Scale for Large Language Models, "
        "ICML 2025",
        "directions are ±1 from a fixed pool of 8,192 for all tensors, not truncated normal and "
        "block by block: a projection costs one pass whatever K is",
        {
            **_ALL_ALIKE,
            "run": {"rounds": 12},
            "directions": {"head_scale": 1.0, "pool_size": 8192},
            "estimator": {"kind": "backprop", "batch_size": 4},
            "local": {
                "steps": 10,
                "space": "weights",
                "optimizer": "AdamW",
                "learning_rate": 1e-4,
                "error_feedback": False,
            },
            "codec": _SCALARS_AS_MEASURED,
            "optimizer": _THE_MEAN_OF_STEPS,
        },
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
        "our own defaults: nine losses for eight scalars of a byte each, a head that moves more, "
        "a step normalised by the running spread of the scalars, linear decay",
        {
            "model": {"trainable": "all"},
            "directions": {"head_scale": 64.0},
            "estimator": {"kind": "one-sided", "perturbation_scale": 0.0003},
            "optimizer": {"learning_rate": 0.0003},
        },
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
    return textwrap.fill(
        f"{text}.", width=98, break_on_hyphens=False, initial_indent="# ", subsequent_indent="# "
    )
