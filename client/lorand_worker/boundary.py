"""Hidden states at the frozen boundary: computed once an example, then kept.

Where only the last layers are trained, everything below them gives the same output for an example
in every round. The first pass stores it; later passes start at the boundary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Boundary:
    """The deepest stack of layers of a module, and how many of them are frozen from below."""

    def __init__(self, module: nn.Module, trainable: set[str]) -> None:
        """Find the boundary; `depth` is 0 where nothing can be kept."""
        self.layers, prefix = _stack(module)
        self.depth = _frozen_depth(module, prefix, len(self.layers), trainable)
        self._tuple_output = False

    @contextmanager
    def capture(self) -> Iterator[list[torch.Tensor]]:
        """Collect the boundary's hidden states, shape (batch, length, width), of passes inside."""
        seen: list[torch.Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._tuple_output = isinstance(output, tuple)
            seen.append((output[0] if self._tuple_output else output).detach())

        handle = self.layers[self.depth - 1].register_forward_hook(keep)
        try:
            yield seen
        finally:
            handle.remove()

    @contextmanager
    def resume(self, hidden: torch.Tensor) -> Iterator[None]:
        """Passes inside skip the frozen layers and go on from `hidden`."""

        def skip(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            return (hidden,) if self._tuple_output else hidden

        frozen = [self.layers[i] for i in range(self.depth)]
        for layer in frozen:
            layer.forward = skip
        try:
            yield
        finally:
            for layer in frozen:
                del layer.forward


def _stack(module: nn.Module) -> tuple[nn.ModuleList, str]:
    stacks = [(m, name) for name, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    return max(stacks, key=lambda pair: len(pair[0]), default=(nn.ModuleList(), ""))


def _frozen_depth(module: nn.Module, prefix: str, count: int, trainable: set[str]) -> int:
    """Layers below the first trainable one; 0 when something before the stack is trained."""
    depth, inside = count, False
    for name, _ in module.named_parameters():
        in_stack = bool(count) and name.startswith(prefix + ".")
        inside = inside or in_stack
        if name not in trainable:
            continue
        if in_stack:
            depth = min(depth, int(name[len(prefix) + 1 :].split(".", 1)[0]))
        elif not inside:
            return 0
    return depth if inside else 0
