"""Linear layers that run at other weights than they hold: x Wᵀ + (x Rᵀ) Lᵀ is the layer at W + L R.

A perturbed loss need not be bit-exact, since only its scalar leaves a worker. With few tokens it is
cheaper to add what a layer's output is away than to write the weights that give it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import nn

from lorand.layers import slots

Factors = tuple[torch.Tensor, torch.Tensor]
"""L, (m, r), and R, (r, n), float32: the weights, (m, n), are away by L · R."""

TOKENS_A_COLUMN: Final = 0.5
"""Up to how many tokens t, as a share of the smaller of m and n, adding is faster.

Writing costs 2·m·n·r operations and passes over m·n numbers, adding 2·t·r·(m + n) and passes over
t·m, so that where they are equal hardly depends on r. On one thread adding was 1.5 to 2.2 times as
fast at a quarter of the smaller side, 1.3 to 1.7 times at two thirds and no faster at all of it
(`factored_vs_written` in benchmarks/results/subspace_forward.json).
"""


def pays(tokens: int, shape: tuple[int, ...]) -> bool:
    """Return whether so many tokens run faster through factors than through written weights.

    >>> pays(64, (1536, 384)), pays(1024, (1536, 384)), pays(0, (1536, 384))
    (True, False, False)
    """
    return 0 < tokens <= TOKENS_A_COLUMN * min(shape)


def added(output: torch.Tensor, x: torch.Tensor, factors: Factors) -> torch.Tensor:
    """Return x (W + L R)ᵀ + b for the output x Wᵀ + b, (..., m), of inputs x, (..., n).

    The term is computed in float32 also where a pass runs in bfloat16: a perturbation is small.
    """
    left, right = factors
    with torch.autocast(output.device.type, enabled=False):
        rows = x.reshape(-1, x.shape[-1]).float()
        whole = output.reshape(-1, output.shape[-1]).float()
        return torch.addmm(whole, rows @ right.T, left.T).to(output.dtype).view(output.shape)


class LinearLayers:
    """The layers of a module whose weights may stay, and which of them do.

    What a loss is like is known from those before: a layer stays out of it unless it was called
    then, with few tokens. So weights that something else reads than the layer itself are written.
    """

    def __init__(self, layers: Mapping[str, nn.Linear] | None = None) -> None:
        """Take the layers by their weights' names; they are observed from the first loss on."""
        self._layers = dict(layers or {})
        self._seen: dict[str, int] = {}
        self._chosen: frozenset[str] = frozenset()
        self._factors: dict[str, Factors] = {}

    @staticmethod
    def of(module: nn.Module, names: set[str]) -> "LinearLayers":
        """Return those of a module whose weights have these names and no other holder.

        Float32 on a CPU, where it was measured what pays; subclasses may compute something else.
        """
        holders: dict[str, set[int]] = {}
        found: dict[str, nn.Linear] = {}
        for _, slot in slots(module):
            holders.setdefault(slot.name, set()).add(id(slot.holder))
            asked = slot.attribute == "weight" and slot.name in names
            if asked and (layer := _plain(slot.holder)) is not None:
                found[slot.name] = layer
        return LinearLayers({name: one for name, one in found.items() if len(holders[name]) == 1})

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._layers)

    @property
    def chosen(self) -> frozenset[str]:
        """The names of the weights that may stay where they are in the next losses."""
        return self._chosen

    @property
    def active(self) -> bool:
        """Whether a layer runs at other weights than it holds."""
        return bool(self._factors)

    def choose(self) -> None:
        """Choose by the losses since the last choice; without any, it stays.

        Between two choices nothing changes, so that the losses of a measurement take one path.
        """
        if self._seen:
            self._chosen = frozenset(
                name
                for name, tokens in self._seen.items()
                if pays(tokens, tuple(self._layers[name].weight.shape))
            )
            self._seen = {}

    def away(self, name: str, factors: Factors) -> None:
        """Have a layer run at W + L R until `written` or the end of `running`."""
        self._factors[name] = factors

    def written(self) -> None:
        """Have all layers run at the weights they hold."""
        self._factors.clear()

    @contextmanager
    def running(self) -> Iterator[None]:
        """One loss: within it tokens are counted, and layers run at the weights they are told."""
        tokens: dict[str, int] = {}
        with ExitStack() as hooks:
            hooks.callback(self.written)
            for name, layer in self._layers.items():
                # First of all hooks, so that those of others see the output at W + L R.
                hooks.enter_context(
                    layer.register_forward_hook(
                        self._hook(name, tokens), prepend=True, with_kwargs=True
                    )
                )
            yield
            for name, count in tokens.items():
                self._seen[name] = max(self._seen.get(name, 0), count)

    def _hook(self, name: str, tokens: dict[str, int]) -> Callable[..., torch.Tensor | None]:
        def run(
            layer: nn.Linear, inputs: tuple[Any, ...], named: dict[str, Any], output: torch.Tensor
        ) -> torch.Tensor | None:
            x: torch.Tensor = inputs[0] if inputs else named["input"]
            tokens[name] = tokens.get(name, 0) + x.numel() // layer.in_features
            factors = self._factors.get(name)
            return None if factors is None else added(output, x, factors)

        return run


def _plain(module: nn.Module) -> nn.Linear | None:
    if not isinstance(module, nn.Linear) or type(module) is not nn.Linear:
        return None
    weight = module.weight
    return module if weight.dtype == torch.float32 and weight.device.type == "cpu" else None
