"""Where a model's weights are used, and stepping into its layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lorand.errors import ModelError
from lorand.layers import Absent, blocks, checkpoint, intercept, layers


class Deep(nn.Module):
    """Two stacks, experts inside a block, tied weights, and parameters outside of all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.encoder = nn.ModuleList([self._block() for _ in range(2)])
        self.decoder = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    @staticmethod
    def _block() -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])})


def test_blocks_are_the_outermost_lists() -> None:
    assert list(blocks(Deep())) == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    assert blocks(nn.Linear(2, 2)) == {}
    assert list(blocks(nn.ModuleList([nn.Linear(2, 2)]))) == ["0"]


def test_every_use_of_a_parameter_lies_in_one_layer() -> None:
    module = Deep()
    found = {id(layer.module): sorted(s.name for s in layer.slots) for layer in layers(module)}
    assert found == {
        id(module): ["scale"],
        id(module.table): ["table.weight"],
        id(module.head): ["table.weight"],
        id(module.encoder[0]): [
            f"encoder.0.experts.{i}.{p}" for i in "01" for p in ("bias", "weight")
        ],
        id(module.encoder[1]): [
            f"encoder.1.experts.{i}.{p}" for i in "01" for p in ("bias", "weight")
        ],
        id(module.decoder[0]): ["decoder.0.bias", "decoder.0.weight"],
        id(module.decoder[1]): ["decoder.1.bias", "decoder.1.weight"],
    }


def test_a_module_shared_between_blocks_lies_in_each() -> None:
    shared = nn.Linear(4, 4)
    module = nn.ModuleList([nn.Sequential(shared), nn.Sequential(nn.ReLU(), shared)])
    assert [sorted(s.name for s in layer.slots) for layer in layers(module)] == [
        ["0.0.bias", "0.0.weight"]
    ] * 2


def test_stepping_into_a_forward() -> None:
    """The class changes, not the instance: an instance's own forward still goes first."""
    module = nn.Linear(3, 2)
    expected = module(torch.ones(3)).tolist()
    seen: list[Any] = []

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return forward(*args, **kwargs)

    intercept(module, around)
    assert isinstance(module, nn.Linear)
    assert type(module).__name__ == "Linear"
    assert module(input=torch.ones(3)).tolist() == expected
    assert len(seen) == 1
    assert list(seen[0][1]) == ["input"]
    module.forward = lambda x: x  # type: ignore[method-assign,assignment]
    assert module(torch.ones(3)).tolist() == [1, 1, 1]
    del module.forward
    module(torch.ones(3))
    assert len(seen) == 2


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: nn.functional.linear(x, w),
        lambda x, w: x @ w.T,
        lambda x, w: x + w[0],
        lambda x, w: nn.functional.embedding(torch.tensor([0]), w),
        lambda x, w: w.sum(),
        lambda x, w: float(w[0, 0]),
        lambda x, w: x.clone().copy_(w),
        lambda x, w: w.to(torch.bfloat16),
        lambda x, w: w.detach(),
        lambda x, w: torch.stack([x, w]),
        lambda x, w: w.numpy(),
    ],
)
def test_nobody_computes_with_an_absent_weight(
    use: Callable[[torch.Tensor, torch.Tensor], Any],
) -> None:
    """A `meta` tensor would not do: torch multiplies by it in silence on some paths."""
    absent = Absent.of("a.weight", torch.empty(2, 4), torch.device("cpu"))
    with pytest.raises((ModelError, RuntimeError)):
        use(torch.ones(2, 4), absent)
    with pytest.raises(ModelError, match=r"uses 'a\.weight' outside of the layer"):
        torch.mm(absent, torch.ones(4, 1))


def test_what_may_be_asked_of_an_absent_weight() -> None:
    absent = Absent.of("w", torch.empty(3, 5, dtype=torch.bfloat16), torch.device("cpu"))
    assert (absent.shape, absent.dtype, absent.device.type) == ((3, 5), torch.bfloat16, "cpu")
    assert (absent.numel(), absent.nbytes, absent.requires_grad) == (15, 30, False)


def test_checkpointing_changes_no_bit_and_keeps_less() -> None:
    """Gradients are those of the plain backward pass; only the blocks' inputs are kept."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(3)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6)) for _ in range(3)
            )
            for p in self.parameters():
                p.data = torch.randn(p.shape, generator=generator)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x.square().sum()

    def kept(module: nn.Module) -> tuple[list[torch.Tensor], int]:
        sizes: list[int] = []
        own = {p.data_ptr() for p in module.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(0 if tensor.data_ptr() in own else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = module(torch.linspace(-1, 1, 30).reshape(5, 6))
        before_backward = sum(sizes)
        value.backward()
        return [p.grad for p in module.parameters() if p.grad is not None], before_backward

    plain, less = Stack(), Stack()
    checkpoint(less)
    expected, most = kept(plain)
    gradients, few = kept(less)
    assert [g.tolist() for g in gradients] == [g.tolist() for g in expected]
    assert few < most / 3
