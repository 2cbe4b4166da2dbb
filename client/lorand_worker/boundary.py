"""Hidden states at the frozen boundary: what the layers below the first trained one give.

Where only the last layers are trained, everything below them gives the same output for an example
in every round. A pass may therefore stop at the boundary, and a later one start there.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


class _Reached(Exception):
    """Ends a pass at the boundary; it never leaves this module."""

    def __init__(self, output: Any) -> None:
        self.output = output


class Boundary:
    """The deepest stack of layers of a module, and how many of them are frozen from below.

    Nothing stays on the module between calls. A frozen layer is skipped by an attribute `forward`
    of the instance, so whatever its class's forward does, such as making its weights, is skipped
    as well; the layers above run as they are, with their hooks.
    """

    def __init__(self, module: nn.Module, trainable: set[str]) -> None:
        """Find the boundary; `depth` is 0 where nothing can be kept."""
        self._module = module
        self.layers, prefix = _stack(module)
        self.depth = _frozen_depth(module, prefix, len(self.layers), trainable)
        self._tuple_output = False

    @torch.no_grad()
    def verify(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Set `depth` to 0 unless a pass that starts at the boundary is the whole pass.

        It is not where a layer runs more than once (ALBERT) or where more than the hidden states
        goes from one layer to the next (T5). Costs two passes on ids and mask, (batch, length).
        """
        if self.depth == 0:
            return
        whole, logits = self._trace(ids, mask)
        output = whole[self.depth - 1][1] if len(whole) == len(self.layers) else None
        hidden, *others = output if isinstance(output, tuple) else (output,)
        self._tuple_output = isinstance(output, tuple)
        alone = (
            [place for place, _ in whole] == list(range(len(self.layers)))
            and isinstance(hidden, torch.Tensor)
            and hidden.shape[:-1] == ids.shape
            and all(other is None for other in others)
        )
        if alone:
            with self.resume(hidden):
                resumed, again = self._trace(ids, mask)
            alone = _close(logits, again) and _close(_first(whole[-1][1]), _first(resumed[-1][1]))
        if not alone:
            self.depth = 0

    @torch.no_grad()
    def states(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the hidden states at the boundary, (batch, length, width), in their own dtype.

        The pass stops there: what lies above does not run.
        """

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _Reached(output)

        handle = self.layers[self.depth - 1].register_forward_hook(stop)
        try:
            self._module(ids, mask)
        except _Reached as reached:
            return torch.as_tensor(_first(reached.output))
        finally:
            handle.remove()
        raise AssertionError("a verified boundary was not reached")

    @contextmanager
    def resume(self, hidden: torch.Tensor) -> Iterator[None]:
        """Passes inside skip the frozen layers and go on from `hidden`."""

        def skip(*_: Any, **__: Any) -> Any:
            return (hidden,) if self._tuple_output else hidden

        frozen = [self.layers[i] for i in range(self.depth)]
        for layer in frozen:
            layer.forward = skip
        try:
            yield
        finally:
            for layer in frozen:
                del layer.forward

    def _trace(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[list[tuple[int, Any]], Any]:
        """Run a pass; return (place, output) of every call of a layer, in order, and the logits."""
        calls: list[tuple[int, Any]] = []
        with ExitStack() as hooks:
            for place, layer in enumerate(self.layers):

                def note(_module: nn.Module, _inputs: Any, output: Any, place: int = place) -> None:
                    calls.append((place, output))

                hooks.enter_context(layer.register_forward_hook(note))
            return calls, self._module(ids, mask)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results of the same computation agree; bfloat16 has three digits."""
    return torch.allclose(a.float(), b.float(), rtol=0.02, atol=1e-3, equal_nan=True)


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
