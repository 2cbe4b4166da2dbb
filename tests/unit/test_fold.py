"""Replicas that move to another pool: float32 adds in pool order, on either kind (DESIGN §2.9)."""

import copy
from collections.abc import Callable
from typing import Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.runs import IDENTITY, config_of, history
from torch import nn

from lorand import ledger
from lorand.coefficients import Coefficients, zeros
from lorand.directions import Family, Pool, seed_keys
from lorand.errors import ModelError
from lorand.kernels.cpu import CpuBackend
from lorand.kernels.reference import ReferenceBackend, buckets, signs
from lorand.layerwise import LayerwiseReplica
from lorand.manifest import Manifest, TensorSpec
from lorand.replica import CopyReplica, Replica
from lorand.transform import fwht
from lorand_worker.bench import bring

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE: Final = 64
KEYS: Final = [(1, 2), (3, 4), (5, 6)]
CPU: Final = torch.device("cpu")
FAMILIES: Final[list[Family]] = ["hadamard", "independent"]


def pool_of(number: int, family: Family) -> Pool:
    return Pool(KEYS[number], SIZE, 32, family, number)


def module_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two layers of awkward sizes, the same on every machine."""
    module = nn.Sequential(nn.Linear(13, 37), nn.Linear(37, 3)).to(dtype)
    for parameter in module.parameters():
        steps = torch.arange(parameter.numel()) * 37 % 251 - 125
        parameter.data = (steps.reshape(parameter.shape) / 1024).to(dtype)
        parameter.requires_grad_(False)
    return module


def manifest_of(module: nn.Module) -> Manifest:
    specs = [
        TensorSpec(name, tuple(p.shape), str(p.dtype).removeprefix("torch."), len(name) % 3 - 1)
        for name, p in module.named_parameters()
    ]
    return Manifest(tuple(sorted(specs, key=lambda spec: spec.name)))


def coefficients_of(seed: int) -> Coefficients:
    return np.random.default_rng(seed).integers(-(2**28), 2**28, SIZE, dtype=np.int64)


def replicas_of(family: Family = "hadamard") -> list[Replica]:
    """Both kinds, and another backend."""
    module, pool = module_of(), pool_of(0, family)
    manifest = manifest_of(module)
    tensors = dict(copy.deepcopy(module).named_parameters())
    return [
        CopyReplica(tensors, manifest, pool, ReferenceBackend()),
        CopyReplica.of(copy.deepcopy(module), manifest, pool),
        LayerwiseReplica(copy.deepcopy(module), manifest, pool, CpuBackend()),
    ]


def moved(weights: NDArray[np.float32], a: Coefficients, pool: Pool, tid: int, scale: int) -> None:
    """Steps 4 to 8 of DESIGN §2 by their words, in place; one float32 add a weight."""
    size = len(weights)
    if pool.family == "hadamard":
        places = buckets(0, size, key=pool.key, tid=tid, size=SIZE, device=CPU).numpy()
        sums = fwht(a)[places] * signs(0, size, key=pool.key, tid=tid, device=CPU).numpy()
    else:
        rows = [signs(0, size, key=key, tid=tid, device=CPU).numpy() for key in seed_keys(pool)]
        sums = a @ np.array(rows, np.int64)
    weights += np.float32(2.0 ** (scale - 32)) * sums.astype(np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_float32_adds_in_pool_order(family: Family) -> None:
    """Two pools left and one open: the definition's bits on every kind of replica."""
    expected = {}
    manifest = manifest_of(module_of())
    for tid, spec in enumerate(manifest.tensors):
        weights = dict(module_of().named_parameters())[spec.name].numpy().reshape(-1).copy()
        for number in range(3):
            pool = pool_of(number, family)
            moved(weights, coefficients_of(number), pool, tid, spec.scale_exponent)
        expected[spec.name] = weights.tobytes()
    digests = set()
    for replica in replicas_of(family):
        for number in range(2):
            replica.set(coefficients_of(number))
            replica.fold(coefficients_of(number), pool_of(number + 1, family))
            assert not replica.coefficients.any()
        replica.set(coefficients_of(2))
        for name, tensor in replica.weights():
            assert tensor.numpy().tobytes() == expected[name], name
        digests.add(replica.digest())
    assert len(digests) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_alone_changes_no_weight(family: Family) -> None:
    """A = 0 on the next pool is where the last one ended; what was measured is of the next."""
    for replica in replicas_of(family):
        replica.set(coefficients_of(7))
        before = replica.digest()
        with replica.perturbed(5, 2**28):
            old = replica.digest()
        replica.fold(coefficients_of(7), pool_of(1, family))
        assert replica.digest() == before
        with replica.perturbed(5, 2**28):
            assert replica.digest() not in (before, old)
        replica.set(zeros(SIZE))
        assert replica.digest() == before


def test_the_order_of_pools_counts() -> None:
    """Float32 additions do not commute: nobody may fold pools in another order."""
    digests = []
    for numbers in ([0, 1, 2], [2, 1, 0]):
        replica = CopyReplica(
            dict(module_of().named_parameters()),
            manifest_of(module_of()),
            pool_of(numbers[0], "hadamard"),
        )
        for at, number in enumerate(numbers):
            following = numbers[at + 1] if at < 2 else 0
            replica.fold(coefficients_of(number), pool_of(following, "hadamard"))
        digests.append(replica.digest())
    assert digests[0] != digests[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [CopyReplica.of, LayerwiseReplica], ids=["copy", "layerwise"])
def test_other_dtypes_are_refused_as_they_are(
    dtype: torch.dtype, kind: Callable[[nn.Module, Manifest, Pool], Replica]
) -> None:
    """Each fold would round them once more. Nothing has changed after the refusal."""
    module = module_of(dtype)
    replica = kind(module, manifest_of(module), pool_of(0, "hadamard"))
    before = replica.digest()
    with pytest.raises(ModelError, match=r'set model\.dtype = "float32"'):
        replica.fold(coefficients_of(1), pool_of(1, "hadamard"))
    assert replica.digest() == before
    assert replica.pool == pool_of(0, "hadamard")


class Quantised:
    """A stored base."""

    def __init__(self, dense: torch.Tensor) -> None:
        self._dense = dense

    def dense(self) -> torch.Tensor:
        return self._dense.clone()


def test_a_quantised_base_is_refused() -> None:
    module = module_of()
    weight = dict(module.named_parameters())["0.weight"].detach()
    stored = {"0.weight": Quantised(weight.clone())}
    replica = LayerwiseReplica(
        module, manifest_of(module), pool_of(0, "hadamard"), ReferenceBackend(), stored=stored
    )
    with pytest.raises(ModelError, match=r"'0.weight' is kept quantised .*model.quantisation"):
        replica.fold(coefficients_of(1), pool_of(1, "hadamard"))


@pytest.mark.parametrize("family", FAMILIES)
def test_who_joins_late_has_the_bits_of_who_followed(family: Family) -> None:
    """`bring` goes through the pools closed since, and to A, from wherever a replica stands."""
    directions = {"rotate_every": 1, "family": family}
    config = config_of(directions=directions, run={"rounds": 5})
    position = ledger.origin(config, IDENTITY)
    follower, seldom, late = (
        CopyReplica(
            {"w": torch.arange(6.0).reshape(2, 3) / 7}, IDENTITY.manifest, config.pool(IDENTITY)
        )
        for _ in range(3)
    )
    for number, body in enumerate(history(config, 7)):
        position = ledger.apply(position, body)
        bring(follower, position)
        if number == 4:
            bring(seldom, position)
    assert position.committed == 5
    for replica in (seldom, late):
        bring(replica, position)
        assert replica.digest() == follower.digest()
        assert replica.pool == config.pool(IDENTITY, 4)
