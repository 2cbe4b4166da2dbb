"""Run a layer without keeping its activations, and again, with weights made anew, in backward."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lorand.errors import ModelError

Made = Callable[[bool], AbstractContextManager[None]]
"""A context in which the layer's weights are there; True: as leaves that take gradients."""


class _Call:
    """A layer's call: its arguments without their tensors, and how it is repeated."""

    def __init__(self, made: Made, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.made = made
        self._forward = forward
        leaves, self._structure = pytree.tree_flatten((args, kwargs))
        self._at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors = [leaves[i] for i in self._at]
        self._others = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        if any(hasattr(other, "get_seq_length") for other in self._others):
            raise ModelError(
                "this model keeps keys and values from call to call, so its layers cannot be run "
                "again in the backward pass; set use_cache to false in its config.json"
            )
        kind = self.tensors[0].device.type if self.tensors else "cpu"
        # Backward may run in another thread and outside of the caller's autocast.
        self._precision: dict[str, Any] = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
            "cache_enabled": False,
        }

    def run(self, tensors: list[torch.Tensor]) -> Any:
        """Call the layer's forward with these tensors in the place of its own."""
        leaves = list(self._others)
        for i, tensor in zip(self._at, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        with torch.autocast(**self._precision):
            return self._forward(*args, **kwargs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, result: list[Any], _: Any, *tensors: torch.Tensor) -> Any:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        with call.made(False):
            output = call.run(list(tensors))
        leaves, structure = pytree.tree_flatten(output)
        result += [leaves, structure]
        outputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        ctx.mark_non_differentiable(*[t for t in outputs if not t.is_floating_point()])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        needs = ctx.needs_input_grad[3:]
        inputs = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needs, strict=True)
        ]
        with torch.enable_grad(), ctx.call.made(True):
            roots = _roots(ctx.call.run(inputs))
            pairs = [(e, g) for e, g in zip(roots, gradients, strict=True) if e is not None]
            torch.autograd.backward([edge for edge, _ in pairs], [g for _, g in pairs])
        return None, None, None, *[tensor.grad for tensor in inputs]


def _roots(output: Any) -> list[Any]:
    """Where the graph of each tensor in a layer's output begins; the tensors are not kept."""
    leaves, _ = pytree.tree_flatten(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    edge = torch.autograd.graph.get_gradient_edge
    return [edge(tensor) if tensor.requires_grad else None for tensor in tensors]


def recomputed(
    made: Made, forward: Callable[..., Any], args: Any, kwargs: Any, *, trains: bool
) -> Any:
    """Return forward(*args, **kwargs), run in `made(False)` without a graph.

    Backward runs it again in `made(True)` with a graph, which ends before the context does. With
    `trains`, it does so even where no input asks for a gradient, for the sake of the weights.
    Chen et al., Training deep nets with sublinear memory cost, 2016.
    """
    call = _Call(made, forward, args, kwargs)
    tensors, call.tensors = call.tensors, []
    anchor = torch.zeros((), requires_grad=trains)
    result: list[Any] = []
    flat = _Recomputed.apply(call, result, anchor, *tensors)  # type: ignore[no-untyped-call]
    leaves, structure = result
    rest = iter(flat)
    whole = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(whole, structure)
