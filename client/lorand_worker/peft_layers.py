"""Adapters of the `peft` library as what a run trains: small matrices beside frozen linear layers.

LoRA: Hu et al., ICLR 2022. RandLoRA: Albert et al., ICLR 2025. What PEFT starts at random starts
here at signs under a fixed key, so that it is the same bits on every machine and with every version
of torch; the base digest covers it.
"""

import math
import warnings
from typing import Any, Final

import torch
from torch import nn

from lorand.errors import ModelError
from lorand.kernels.reference import signs
from lorand.layers import blocks
from lorand.manifest import select_trainable
from lorand.sections import ModelSection
from lorand_worker.libraries import optional

KEY: Final = (0x4C6F5261, 0x6E644164)
"""Key of the signs that adapters start at ("LoRa", "ndAd")."""
ALPHA: Final = {"lora": 2.0, "randlora": 20.0}
"""Default alpha, a rank: common practice for LoRA, PEFT's own for RandLoRA."""
_RANDOM: Final = ("lora_A.", "randlora_A.", "randlora_B.")


def attach(module: nn.Module, section: ModelSection) -> frozenset[str]:
    """Put the section's adapters beside its linear layers; return the names of their parameters.

    They go where `trainable` selects a linear layer's weight inside a block and, where
    `adapter_targets` are given, the layer's name ends in one of them. Outputs are unchanged at
    first. Raises ModelError where there is nothing to adapt or no library to do it.
    """
    if section.adapter == "none":
        return frozenset()
    targets = _targets(module, section)
    before = {name for name, _ in module.named_parameters()}
    tuner, config = _tuner(section)
    with warnings.catch_warnings():  # PEFT tells which of two layouts a weight has, and is right
        warnings.simplefilter("ignore", UserWarning)
        tuner(module, config(targets), "default")
    names = {name for name, _ in module.named_parameters()} - before
    _start_alike(module)
    return frozenset(name for name in names if ".base_layer." not in name)


def _targets(module: nn.Module, section: ModelSection) -> list[str]:
    chosen = set(select_trainable([n for n, _ in module.named_parameters()], section.trainable))
    inside = tuple(f"{block}." for block in blocks(module))
    linear = [
        name
        for name, part in module.named_modules()
        if (isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D")
        and name.startswith(inside)
        and f"{name}.weight" in chosen
    ]
    ends = section.adapter_targets
    found = [n for n in linear if not ends or any(f".{n}".endswith(f".{end}") for end in ends)]
    unmatched = [end for end in ends if not any(f".{n}".endswith(f".{end}") for n in linear)]
    if unmatched or not found:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear})) or "none"
        raise ModelError(
            f"model.adapter_targets: no linear layer that model.trainable = {section.trainable!r} "
            f"selects ends in {unmatched[0]!r}; there are {known}"
            if unmatched
            else f"model.trainable = {section.trainable!r} selects no linear layer in a numbered "
            f"block, which model.adapter = {section.adapter!r} needs"
        )
    return found


def _tuner(section: ModelSection) -> tuple[Any, Any]:
    """PEFT's class that puts adapters into a module, and what makes its settings of targets."""
    needed = "model.adapter trains adapters of the peft library, which is not installed"
    peft: Any = optional("peft", needed, "peft")
    rank = section.adapter_rank
    alpha = section.adapter_alpha or ALPHA[section.adapter] * rank

    def lora(targets: list[str]) -> Any:
        return peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets)

    def randlora(targets: list[str]) -> Any:
        return peft.RandLoraConfig(
            r=rank, randlora_alpha=alpha, randlora_dropout=0.0, target_modules=targets
        )

    if section.adapter == "lora":
        return peft.LoraModel, lora
    return peft.RandLoraModel, randlora


def _start_alike(module: nn.Module) -> None:
    """Put signs in the places of random numbers.

    LoRA's A has entries near 1/sqrt(3 inputs), PEFT's spread, as a power of two. RandLoRA's bases
    have a spread of 1.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    random = [(name, t) for name, t in sorted(tensors) if any(part in name for part in _RANDOM)]
    with torch.no_grad():
        for tid, (name, tensor) in enumerate(random):
            start = signs(0, tensor.numel(), key=KEY, tid=tid, device=torch.device("cpu"))
            lora = "randlora" not in name
            scale = 2.0 ** -round(math.log2(3 * tensor.shape[-1]) / 2) if lora else 1.0
            tensor.copy_((start * scale).reshape(tensor.shape))


def merge(module: nn.Module) -> None:
    """Add every adapter to the weights beside it, and leave the plain layers in their places."""
    remove(module, merged=True)


def remove(module: nn.Module, *, merged: bool = False) -> None:
    """Leave the plain layers in the places of adapters, merged or as they were."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, part in list(module.named_modules()):
        if isinstance(part, BaseTunerLayer):
            layer: Any = part
            if merged:
                layer.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, layer.get_base_layer())
