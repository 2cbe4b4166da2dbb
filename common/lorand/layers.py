"""The layers of a model: where its weights are used, and how to step between them."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorand.errors import ModelError

Around = Callable[..., Any]
"""Called as around(forward, *args, **kwargs) in place of a layer's forward."""


class Absent(torch.Tensor):
    """Stands for a weight while its layer does not run; whoever computes with it is refused."""

    parameter: str

    @staticmethod
    def of(parameter: str, like: torch.Tensor, device: torch.device) -> "Absent":
        """Return a stand-in of the same shape and dtype, which says it is on `device`."""
        absent: Absent = torch.Tensor._make_wrapper_subclass(
            Absent, like.shape, dtype=like.dtype, device=device
        )
        absent.parameter = parameter
        return absent

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        """Refuse every operation on the values."""
        names = [repr(a.parameter) for a in args if isinstance(a, Absent)]
        raise ModelError(
            f"this model uses {' and '.join(names) or 'a weight'} outside of the layer that holds "
            "it, so its weights cannot be made layer by layer; join with `--weights copy`"
        )


@dataclass(frozen=True)
class Slot:
    """Where a module uses a parameter; tied parameters have several slots and one name."""

    holder: nn.Module
    attribute: str
    name: str

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Have the module use this tensor; return the one before."""
        before = self.holder._parameters[self.attribute]
        assert before is not None
        self.holder._parameters[self.attribute] = tensor  # type: ignore[assignment]
        return before


@dataclass(frozen=True)
class Layer:
    """A module whose forward is where all its `slots` are used."""

    module: nn.Module
    slots: tuple[Slot, ...]


def blocks(module: nn.Module) -> dict[str, nn.Module]:
    """Return the elements of the outermost module lists by name: transformer blocks and the like.

    >>> list(blocks(nn.ModuleDict({"h": nn.ModuleList([nn.Identity(), nn.Identity()])})))
    ['h.0', 'h.1']
    """
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and _block_of(name, found) is None:
            found |= {f"{name}.{i}".lstrip("."): element for i, element in enumerate(part)}
    return found


def layers(module: nn.Module) -> list[Layer]:
    """Return the blocks and, for every parameter outside of them, the module that holds it."""
    inside = blocks(module)
    owners: dict[int, tuple[nn.Module, dict[tuple[int, str], Slot]]] = {
        id(block): (block, {}) for block in inside.values()
    }
    for path, slot in slots(module):
        block = _block_of(path, inside)
        owner = slot.holder if block is None else inside[block]
        _, mine = owners.setdefault(id(owner), (owner, {}))
        mine[id(slot.holder), slot.attribute] = slot
    return [Layer(owner, tuple(mine.values())) for owner, mine in owners.values()]


def slots(module: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Yield each slot of each parameter, and the path of the module that holds it."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for path, holder in module.named_modules(remove_duplicate=False):
        for attribute, parameter in holder._parameters.items():
            if parameter is not None:
                yield path, Slot(holder, attribute, names[id(parameter)])


def intercept(module: nn.Module, around: Around) -> None:
    """Have calls of the module's forward go through `around`, in a class of its own.

    The class and not the instance, so that others may still replace this instance's forward for a
    while.
    """
    kind = type(module)

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(kind.forward, self), *args, **kwargs)

    content = {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    module.__class__ = type(kind.__name__, (kind,), content)


def checkpoint(module: nn.Module) -> None:
    """Keep only the inputs of each block for the backward pass, and run blocks again in it.

    Chen et al., Training deep nets with sublinear memory cost, 2016.
    """
    from torch.utils.checkpoint import checkpoint as run_again

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return run_again(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    for block in {id(block): block for block in blocks(module).values()}.values():
        intercept(block, around)


def _block_of(path: str, names: dict[str, nn.Module]) -> str | None:
    """The block that a path lies in."""
    parts = path.split(".")
    prefixes = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return next((prefix for prefix in prefixes if prefix in names), None)
