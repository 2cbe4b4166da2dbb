"""Directions of a replica: orthogonal, scaled, and what scalars along them keep of a gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.unit.replicas import FAMILIES, MANIFEST, pool_of, random_coefficients, tensors_of

from lorand.directions import Family
from lorand.kernels import zero_sums
from lorand.manifest import Manifest, TensorSpec
from lorand.replica import CopyReplica, Replica

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------- geometry of the directions


def direction_matrix(family: Family, weights: int, size: int) -> NDArray[np.float64]:
    """Z, one row a direction: e_k materialised from zero base weights."""
    manifest = Manifest((TensorSpec("w", (weights,), "float32"),))
    replica = CopyReplica(tensors_of(manifest, zero=True), manifest, pool_of(family, size, 8))
    rows = []
    for k in range(size):
        with replica.perturbed(k, 1):
            rows.append(replica.live["w"].double().numpy() * 2**8)
    return np.stack(rows)


@pytest.mark.parametrize("size", [64, 256])
def test_directions_of_a_block_are_orthogonal(size: int) -> None:
    """DESIGN §2 step 6: on every whole block the K × K matrix Z is √K times an orthogonal one."""
    directions = direction_matrix("hadamard", 4 * size + 20, size)
    assert set(np.unique(directions)) == {-1.0, 1.0}
    for block in range(4):
        part = directions[:, block * size : (block + 1) * size]
        assert (part @ part.T == size * np.eye(size)).all()
        assert (part.T @ part == size * np.eye(size)).all()


def test_blocks_are_shuffled_independently() -> None:
    """Steps 4 and 5: signs D, and with them out of the way the shifts r_b, differ by block."""
    directions = direction_matrix("hadamard", 64 * 32, 64)
    for matrix, least in ((directions, 32), (directions[1:] * directions[:1], 17)):
        assert len({part.tobytes() for part in np.split(matrix, 32, axis=1)}) >= least


def test_independent_directions_are_nearly_orthogonal() -> None:
    """Step 8: signs of unrelated seeds; inner products of size √d."""
    directions = direction_matrix("independent", 4096, 64)
    inner = directions @ directions.T / np.sqrt(4096) - 64 * np.eye(64)
    assert np.abs(inner).max() < 5
    assert np.sqrt((inner**2).sum() / (64 * 63)) == pytest.approx(1, abs=0.1)


def scalars_of(replica: Replica, gradient: dict[str, torch.Tensor]) -> NDArray[np.float64]:
    shares = zero_sums(replica.pool.size, torch.device("cpu"))
    for name, g in gradient.items():
        replica.project(name, g, shares)
    return replica.scalars(shares)


def reconstruction_cosine(family: Family, shapes: list[tuple[int, ...]], size: int) -> float:
    """cos(g, Z Zᵀ g), by the replica's own projection and materialisation from zero weights."""
    specs = [TensorSpec(f"w{n}", shape, "float32") for n, shape in enumerate(shapes)]
    manifest = Manifest(tuple(specs))
    replica = CopyReplica(tensors_of(manifest, zero=True), manifest, pool_of(family, size))
    generator = torch.Generator().manual_seed(7)
    gradient = {s.name: torch.randn(s.shape, generator=generator) for s in specs}
    replica.set(np.rint(scalars_of(replica, gradient) * 2.0**12).astype(np.int64))
    g = torch.cat([gradient[s.name].reshape(-1) for s in specs]).double()
    w = torch.cat([replica.live[s.name].reshape(-1) for s in specs]).double()
    return float(g @ w / (g.norm() * w.norm()))


@pytest.mark.parametrize("size", [1024, 4096, 16384])
def test_the_scalars_keep_the_gradients_direction(size: int) -> None:
    """K scalars point along ∇L with cosine √(K/d): what a step in the pool's span can keep."""
    shapes: list[tuple[int, ...]] = [(500, 700), (53_001,)]
    cosine = reconstruction_cosine("hadamard", shapes, size)
    assert cosine == pytest.approx(np.sqrt(size / 403_001), rel=0.05)


def test_as_many_scalars_as_weights_keep_everything() -> None:
    """K = d: Z/√K is orthogonal, so nothing is lost but the rounding to quanta."""
    assert reconstruction_cosine("hadamard", [(64, 64)], 4096) == pytest.approx(1, abs=1e-6)


def test_independent_scalars_keep_the_gradients_direction() -> None:
    """As well as the structured ones, to the spread of 256 random scalars."""
    cosine = reconstruction_cosine("independent", [(25_600,)], 256)
    assert cosine == pytest.approx(np.sqrt(256 / 25_600), rel=0.1)


# ------------------------------------------------------------- direction scales


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_exponents_multiply(family: Family) -> None:
    """2^s multiplies the move and, by the chain rule, the tensor's share of Zᵀg."""

    def scaled(exponent: int) -> tuple[torch.Tensor, NDArray[np.float64]]:
        manifest = Manifest((TensorSpec("w", (900,), "float32", exponent),))
        replica = CopyReplica(tensors_of(manifest, zero=True), manifest, pool_of(family))
        replica.set(random_coefficients(6))
        gradient = torch.linspace(-1, 2, 900)
        return replica.live["w"], scalars_of(replica, {"w": gradient})

    weights, scalars = scaled(0)
    for exponent in (4, -3, 10):
        moved, measured = scaled(exponent)
        assert torch.equal(moved, weights * 2.0**exponent)
        assert measured.tolist() == (scalars * 2.0**exponent).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_project_is_the_derivative_along_each_direction(family: Family) -> None:
    """g_k = (L(w(A + c·e_k)) − L(w(A − c·e_k))) / 2μ on a linear loss, scales included."""
    exact = Manifest(tuple(replace(spec, dtype="float32") for spec in MANIFEST.tensors))
    replica = CopyReplica(tensors_of(exact), exact, pool_of(family, quantum_exponent=8))
    generator = torch.Generator().manual_seed(8)
    gradient = {s.name: torch.randn(s.shape, generator=generator) for s in exact.tensors}
    scalars = scalars_of(replica, gradient)

    def loss(index: int, quanta: int) -> float:
        with replica.perturbed(index, quanta):
            return sum(float((replica.live[n].double() * g).sum()) for n, g in gradient.items())

    for index in (0, 1, 31, 63):
        measured = (loss(index, 4) - loss(index, -4)) / (2 * 4 * 2.0**-8)
        assert scalars[index] == pytest.approx(measured, rel=1e-5, abs=1e-3)
