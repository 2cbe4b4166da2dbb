"""Tied weights and tensors shared between modules are one tensor: materialised once."""

from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
import pytest
import torch
from tests.contracts.kernel_cases import (
    KEY,
    QUANTUM_EXPONENT,
    bits,
    by_reference,
    device_of,
    random_coefficients,
    random_table,
)
from torch import nn

from lorand.directions import Pool
from lorand.kernels import Backend, Place
from lorand.manifest import Manifest, TensorSpec
from lorand.replica import CopyReplica

pytestmark = pytest.mark.usefixtures("one_thread")

POOL: Final = Pool(KEY, 64, QUANTUM_EXPONENT, "hadamard")


class Tied(nn.Module):
    """Embedding and head are one tensor; two blocks run the same linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 70)
        self.first = nn.Linear(70, 70)
        self.second = self.first
        self.head = nn.Linear(70, 11, bias=False)
        self.head.weight = self.embedding.weight
        for number, weights in enumerate(self.parameters()):
            steps = torch.arange(weights.numel()).reshape(weights.shape) * 37 % 251 - number
            weights.data = steps / 1024


def tensors_of(module: nn.Module) -> tuple[dict[str, torch.Tensor], Manifest]:
    tensors = {name: weights.detach() for name, weights in sorted(module.named_parameters())}
    specs = (TensorSpec(name, tuple(t.shape), "float32") for name, t in tensors.items())
    return tensors, Manifest(tuple(specs))


class Recorded:
    """A backend that notes which memory was written, one tensor or many a call."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.written: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def materialise(self, base: torch.Tensor, table: Any, out: torch.Tensor, **rest: Any) -> None:
        self.written.append(out.data_ptr())
        self.backend.materialise(base, table, out, **rest)

    def materialise_all(self, places: Sequence[Place], *rest: Any, **named: Any) -> None:
        self.written += [place.out.data_ptr() for place in places]
        self.backend.materialise_all(places, *rest, **named)


def test_each_tensor_is_materialised_once(backend: Backend) -> None:
    """Three tensors under six names: three passes a round, and all names see w(A)."""
    module, recorded = Tied().to(device_of(backend)), Recorded(backend)
    tensors, manifest = tensors_of(module)
    assert list(tensors) == ["embedding.weight", "first.bias", "first.weight"]
    base = {name: tensor.clone() for name, tensor in tensors.items()}
    replica = CopyReplica(tensors, manifest, POOL, cast(Backend, recorded))
    replica.digest()
    recorded.written.clear()
    replica.set(random_coefficients(64))
    replica.digest()
    assert sorted(recorded.written) == sorted(tensor.data_ptr() for tensor in tensors.values())
    for tid, name in enumerate(tensors):
        expected = by_reference(base[name], random_table(64, 0), tid)
        assert torch.equal(bits(module.get_parameter(name)), bits(expected))
    assert module.head.weight.data_ptr() == module.embedding.weight.data_ptr()
    assert module.second is module.first


def test_views_of_one_memory_do_not_touch_each_other(backend: Backend) -> None:
    """Modules that share a buffer, such as a fused projection, each train their own part."""
    memory = torch.arange(3000, device=device_of(backend)) / 1024
    tensors = {"key": memory[:1000], "query": memory[1000:2001], "value": memory[2001:]}
    base = {name: tensor.clone() for name, tensor in tensors.items()}
    manifest = Manifest(tuple(TensorSpec(n, tuple(t.shape), "float32") for n, t in tensors.items()))
    replica = CopyReplica(tensors, manifest, POOL, backend)
    replica.set(random_coefficients(64))
    replica.digest()
    for tid, name in enumerate(tensors):
        expected = by_reference(base[name], random_table(64, 0), tid)
        assert torch.equal(bits(tensors[name]), bits(expected))
    replica.set(np.zeros(64, np.int64))
    replica.digest()
    assert torch.equal(bits(memory), bits(torch.cat(list(base.values()))))
