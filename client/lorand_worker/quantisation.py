"""Base weights in 8 or 4 bits (bitsandbytes), dequantised when a layer needs them.

w0 is the dequantised weight in the run's dtype. The library's functions are used on an ordinary
model, and not its modules through transformers, so that a weight stays one tensor of the run:
perturbed, hashed and exported like any other. int8 is LLM.int8's absolute maximum a row (Dettmers
et al., NeurIPS 2022), nf4 QLoRA's normal-float code in blocks of 64 (Dettmers et al., NeurIPS
2023), 4.5 bits a weight.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorand.config import Quantisation
from lorand.errors import ModelError
from lorand.layers import Absent, blocks, slots
from lorand_worker.libraries import optional

NF4_BLOCK = 64


@dataclass(frozen=True)
class Quantised:
    """One weight: 8-bit codes with a scale a row, or packed 4-bit codes with their state."""

    codes: torch.Tensor
    scales: Any
    dtype: torch.dtype

    def dense(self) -> torch.Tensor:
        """Return w0 (see `lorand.layerwise.Stored`)."""
        functional = _library()
        if self.codes.dtype == torch.int8:
            wide = functional.int8_vectorwise_dequant(self.codes, self.scales)
        else:
            wide = functional.dequantize_4bit(self.codes, self.scales)
        return torch.as_tensor(wide).to(self.dtype)

    def on(self, device: torch.device) -> "Quantised":
        """Return the same weight on another device."""
        if self.codes.device == device:
            return self
        if self.codes.dtype == torch.int8:
            return Quantised(self.codes.to(device), self.scales.to(device), self.dtype)
        self.scales.to(device)  # bitsandbytes moves its state in place
        return Quantised(self.codes.to(device), self.scales, self.dtype)


def quantise(weight: torch.Tensor, kind: Quantisation) -> Quantised:
    """Return a matrix, shape (rows, columns), as int8 or nf4; columns are even in number."""
    functional = _library()
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight)
        return Quantised(codes, scales, weight.dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    return Quantised(codes, state, weight.dtype)


def quantise_layers(
    module: nn.Module, kind: Quantisation, *, beside: Container[str] = ()
) -> dict[str, Quantised]:
    """Quantise the linear layers inside the model's blocks, and leave stand-ins in their places.

    Embeddings, norms, biases and heads stay as they are, as the field does, and so do the weights
    `beside`, those of adapters. Returns the weights by name. Raises ModelError where there is
    nothing to quantise or no library to do it.
    """
    if kind == "none":
        return {}
    linear = {
        id(part.weight)
        for block in blocks(module).values()
        for part in block.modules()
        # GPT-2's Conv1D is a linear layer with its matrix turned.
        if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"
    }
    result: dict[str, Quantised] = {}
    for _, slot in list(slots(module)):
        weight = slot.holder._parameters[slot.attribute]
        if weight is None or id(weight) not in linear or weight.shape[-1] % 2:
            continue  # for odd rows of 4-bit codes bitsandbytes would compile code at run time
        if slot.name in beside:
            continue
        if slot.name not in result:
            result[slot.name] = quantise(weight.detach(), kind)
        slot.put(Absent.of(slot.name, weight, weight.device))
    if not result:
        raise ModelError(
            f'model.quantisation = "{kind}" needs a model with linear layers in numbered blocks, '
            'which this one lacks; use "none"'
        )
    return result


def expand(module: nn.Module, stored: dict[str, Quantised]) -> None:
    """Put dequantised weights where the stand-ins are: floats again, with the values of w0."""
    dense = {name: nn.Parameter(weight.dense(), False) for name, weight in stored.items()}
    for _, slot in list(slots(module)):
        if slot.name in dense:
            slot.put(dense[slot.name])


def _library() -> Any:
    """bitsandbytes.functional. Raises ModelError when it is not installed."""
    needed = "the base model of this run is quantised, which needs bitsandbytes"
    return optional("bitsandbytes.functional", needed, "quantised")
