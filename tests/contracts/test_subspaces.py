"""The contract of a lift, over all kinds, and of replicas on coordinates: the same bits always."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Final

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import runs
from tests.contracts.kernel_cases import GPU, INTERPRETED, device_of

from lorand.config import RunConfig
from lorand.directions import Pool
from lorand.kernels import Backend
from lorand.kernels.cpu import CpuBackend
from lorand.kernels.reference import ReferenceBackend
from lorand.ledger import pool_of
from lorand.manifest import Identity, Manifest, TensorSpec
from lorand.subspaces import cosines, lifts
from lorand.subspaces.basis import Basis, Layout, coordinates_shape, drawn, length, side
from lorand.subspaces.lifts import Full, Lift, lift
from lorand.subspaces.replica import SubspaceReplica
from lorand_worker.bench import kept_of

KINDS: Final = ("full", "coordinate", "dct")
SHAPES: Final = ((12, 7), (7, 12), (9, 9), (40, 33))
MANIFEST: Final = Manifest(
    (
        TensorSpec("bias", (40,), "float32"),
        TensorSpec("head", (2, 13), "float32", 4),
        TensorSpec("square", (13, 13), "float32", 0, 5),
        TensorSpec("tall", (30, 13), "float32", -1, 4),
        TensorSpec("wide", (13, 50), "float32", 2, 4),
    )
)
IDENTITY: Final = Identity(b"\1" * 32, b"\2" * 32, MANIFEST)
BACKENDS: Final = [
    pytest.param(lambda: ReferenceBackend(), id="reference"),
    pytest.param(lambda: CpuBackend(), id="cpu"),
    # Interpreted, two hundred rounds would take minutes: the kernels have a contract of their own.
    *([] if INTERPRETED else [GPU]),
]


def spec_of(shape: tuple[int, int], exponent: int = 3, dtype: str = "float32") -> TensorSpec:
    return TensorSpec("w", shape, dtype, exponent, 4)


def lifted_on(kind: str, spec: TensorSpec, dtype: torch.dtype = torch.float32) -> Lift:
    manifest = Manifest((spec,))
    basis = (
        None
        if kind == "full"
        else drawn("dct" if kind == "dct" else "coordinate", manifest, (1, 2))
    )
    base = torch.linspace(-1, 1, spec.size).reshape(spec.shape).to(dtype)
    return lift(base, spec, 0, basis)


def coordinates_of(part: Lift, seed: int = 0) -> torch.Tensor:
    shape = part.spec.shape if isinstance(part, Full) else coordinates_shape(part.spec)
    numbers = np.random.default_rng(seed).normal(0, 2.0**-9, shape)
    return torch.from_numpy(numbers).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_coordinates_are_the_base(kind: str, shape: tuple[int, int]) -> None:
    part = lifted_on(kind, spec_of(shape))
    base = part.live.clone()
    part.write(coordinates_of(part))
    assert not torch.equal(part.live, base)
    part.write(torch.zeros_like(coordinates_of(part)))
    assert torch.equal(part.live, base)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gather_is_the_lift_transposed(kind: str, shape: tuple[int, int]) -> None:
    part = lifted_on(kind, spec_of(shape))
    u = coordinates_of(part)
    gradient = torch.from_numpy(np.random.default_rng(7).normal(size=shape)).float()
    there = float((part.lifted(u).double() * gradient.double()).sum())
    back = part.factor * float((u.double() * part.gather(gradient).double()).sum())
    assert there == pytest.approx(back, abs=1e-5 * float(u.norm() * gradient.norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_write_is_one_rounding_of_the_lifted(kind: str, dtype: torch.dtype) -> None:
    part = lifted_on(kind, spec_of((12, 7), dtype=str(dtype).removeprefix("torch.")), dtype)
    base = part.live.clone()
    u = coordinates_of(part)
    part.write(u)
    assert torch.equal(part.live, (base.float() + part.lifted(u)).to(dtype))


@pytest.mark.parametrize("tile", [1, 7, 40, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_do_not_change_what_is_written(
    shape: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = lifted_on("dct", spec_of(shape))
    base, u = part.live.clone(), coordinates_of(part)
    monkeypatch.setattr(lifts, "TILE", tile)
    part.write(u)
    assert torch.equal(part.live, base + part.lifted(u))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rebound_lift_goes_on_from_where_the_weights_are(kind: str) -> None:
    part = lifted_on(kind, spec_of((12, 7)))
    u = coordinates_of(part)
    part.write(u)
    moved = part.live.clone()
    part.bind()
    part.write(torch.zeros_like(u))
    assert torch.equal(part.live, moved)
    part.write(u)
    assert torch.equal(part.live, moved + part.lifted(u))


def test_columns_by_index_leave_all_others_alone() -> None:
    part = lifted_on("coordinate", spec_of((12, 7)))
    base = part.live.clone()
    part.write(coordinates_of(part))
    moved = (part.live != base).any(dim=0).nonzero().squeeze(1).tolist()
    assert moved == drawn("coordinate", Manifest((part.spec,)), (1, 2)).indices[0].tolist()
    assert part.kept_bytes < base.nbytes


@given(st.integers(0, 2**32 - 1), st.sampled_from(SHAPES), st.integers(-60, 60))
def test_the_cosine_lift_is_exact_in_rational_numbers(
    seed: int, shape: tuple[int, int], power: int
) -> None:
    """Whatever the coordinates are: each entry is one rounding of an exact sum of products."""
    part = lifted_on("dct", spec_of(shape, exponent=0))
    u = coordinates_of(part, seed) * 2.0**power
    spec, n = part.spec, length(part.spec)
    basis = drawn("dct", Manifest((spec,)), (1, 2))
    rows = cosines.table(n)[basis.indices[0]].astype(int) * basis.signs[0].astype(int)
    largest = Fraction(float(u.abs().max()))
    unit = Fraction(2) ** int(np.frexp(float(largest))[1]) / 2**22
    wide = u if side(spec) == 1 else u.T
    grid = [[round(Fraction(float(x)) / unit) for x in row] for row in wide]
    scale = unit * Fraction(2) ** (cosines.exponent(n) - cosines.BITS)
    expected = np.array(
        [
            [float(sum(a * int(rows[c, j]) for c, a in enumerate(row)) * scale) for j in range(n)]
            for row in grid
        ]
    ).astype(np.float32)
    got = part.lifted(u).numpy()
    assert np.array_equal(got if side(spec) == 1 else got.T, expected)


# -- replicas --------------------------------------------------------------------------------------


def config_of(kind: str, more: str = "none") -> RunConfig:
    """A run of 200 rounds and four refreshes; `more` is a state, or how matrices are rounded."""
    kept = {"weights": more} if more.startswith("int8") else {"state": more}
    rotate = {"none": 16, "int8": 48, "int8-stochastic": 48}.get(more, 1)
    return runs.config_of(
        run={"rounds": 200},
        directions={"rotate_every": rotate},
        subspace={"kind": kind, "rank": 4, "refresh_every": 48, **kept},
        optimizer={"learning_rate": 0.003},
    )


def tensors() -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(5)
    return {spec.name: torch.randn(spec.shape, generator=source) for spec in MANIFEST.tensors}


def replica_of(config: RunConfig, backend: Backend) -> SubspaceReplica:
    held = {name: t.to(device_of(backend)) for name, t in tensors().items()}
    kept = kept_of(config, MANIFEST)
    return SubspaceReplica(held, MANIFEST, pool_of(config, IDENTITY, 0), backend, **kept)


def changes(rounds: int = 200) -> Iterator[np.ndarray]:
    source = np.random.default_rng(3)
    for _ in range(rounds):
        change = np.zeros(64, np.int64)
        change[source.choice(64, 3, replace=False)] = source.integers(-(2**24), 2**24, 3)
        yield change


def follow(config: RunConfig, replica: SubspaceReplica, stop: int = 200, look: bool = False) -> str:
    """Bring a replica through the rounds; `look` has its weights written, perturbed and read."""
    coefficients = np.zeros(64, np.int64)
    for number, change in enumerate(changes(stop)):
        coefficients = coefficients + change
        before, after = config.pool_after(number), config.pool_after(number + 1)
        if look and number % 7 == 0:
            replica.settle()
            with replica.perturbed(5, 1 << 20):
                replica.settle()
        if after != before:
            replica.fold(coefficients, pool_of(config, IDENTITY, after))
            coefficients = np.zeros(64, np.int64)
        elif look:
            replica.set(coefficients)
    replica.set(coefficients)
    return replica.digest().hex()


RUNS: Final = [("coordinate", "none"), ("dct", "none"), ("coordinate", "adam"), ("dct", "adam")]
RUNS_WITH_REST: Final = [
    *RUNS,
    ("coordinate", "frugal"),
    ("coordinate", "fira"),
    ("coordinate", "int8"),
    ("dct", "int8-stochastic"),
]


@pytest.fixture(scope="module")
def expected() -> Callable[[RunConfig], str]:
    """The digest after 200 rounds on the reference, on one thread."""
    known: dict[str, str] = {}

    def of(config: RunConfig) -> str:
        key = config.canonical()
        if key not in known:
            known[key] = follow(config, replica_of(config, ReferenceBackend()))
        return known[key]

    return of


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "state"), RUNS_WITH_REST)
def test_same_weights_after_two_hundred_rounds_and_four_refreshes(
    kind: str,
    state: str,
    backend: Callable[[], Backend],
    threads: int,
    expected: Callable[[RunConfig], str],
) -> None:
    config = config_of(kind, state)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = follow(config, replica_of(config, backend()), look=True)
    finally:
        torch.set_num_threads(before)
    assert got == expected(config)


@pytest.mark.parametrize(("kind", "state"), RUNS_WITH_REST)
def test_directions_and_gradients_are_each_others_transposed(kind: str, state: str) -> None:
    """Zᵀg of a replica is what its directions have in common with the gradient."""
    config = config_of(kind, state)
    replica = replica_of(config, CpuBackend())
    source = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(t.shape, generator=source) for name, t in tensors().items()}
    shares = torch.zeros(64, dtype=torch.float64)
    for name, gradient in gradients.items():
        replica.project(name, gradient, shares)
    scalars = replica.scalars(shares)
    for index in (0, 1, 37, 63):
        along = replica.direction(index)
        products = [(along[n].double() * g.double()).flatten() for n, g in gradients.items()]
        slope = float(torch.cat(products).sum())
        # Against what is summed, of either sign: a slope can be as near to nothing as it likes.
        rounding = 1e-6 * float(torch.cat(products).norm())
        assert scalars[index] == pytest.approx(slope, rel=0, abs=rounding)


@pytest.mark.parametrize(("kind", "state"), [("coordinate", "none"), ("dct", "none")])
def test_a_perturbation_moves_along_the_direction(kind: str, state: str) -> None:
    config = config_of(kind, state)
    replica = replica_of(config, CpuBackend())
    before = {name: t.clone() for name, t in replica.live.items()}
    along = replica.direction(9)
    with replica.perturbed(9, 1 << 22):
        for name, weights in replica.live.items():
            moved = before[name].double() + along[name].double() * 2.0**-10
            assert torch.allclose(weights.double(), moved, atol=1e-6)
    assert all(torch.equal(before[name], t) for name, t in replica.live.items())


@pytest.mark.parametrize("kind", ["coordinate", "dct"])
@pytest.mark.parametrize("state", ["adam", "frugal", "fira"])
def test_a_state_has_two_numbers_a_coordinate_and_the_indices(kind: str, state: str) -> None:
    if kind == "dct" and state != "adam":
        pytest.skip("refused by the run file")
    replica = replica_of(config_of(kind, state), CpuBackend())
    q = Layout(MANIFEST).size
    indices = sum(8 * spec.rank for spec in MANIFEST.tensors)
    powers = 3 * 8 * len(MANIFEST.tensors)
    assert replica.state is not None
    assert replica.state.nbytes == 8 * 2 * q + indices + powers


def test_up_to_k_coordinates_are_known_exactly_from_k_scalars() -> None:
    """Coordinates of all tensors are one vector, so that none of up to K share a bucket."""
    manifest = Manifest(
        (TensorSpec("a", (20, 9), "float32", 0, 2), TensorSpec("b", (20,), "float32"))
    )
    identity = Identity(b"\1" * 32, b"\2" * 32, manifest)
    config = runs.config_of(subspace={"kind": "coordinate", "rank": 2})
    pool: Pool = pool_of(config, identity, 0)
    held = {"a": torch.randn(20, 9), "b": torch.randn(20)}
    replica = SubspaceReplica(held, manifest, pool, CpuBackend())
    q = Layout(manifest).size
    assert q == 60
    drift = torch.randn(q)
    scalars = replica.scalars_of(drift.clone()) / 64
    quanta = np.rint(scalars * 2.0**32).astype(np.int64)
    replica.set(quanta)
    assert torch.allclose(
        replica.coordinates(), drift, rtol=0, atol=1e-5 * float(drift.abs().max())
    )


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_drawn_columns_are_distinct_ascending_and_follow_the_key(low: int, high: int) -> None:
    basis: Basis = drawn("dct", MANIFEST, (low, high))
    for tid, spec in enumerate(MANIFEST.tensors):
        if not spec.rank:
            assert tid not in basis.indices
            continue
        indices = basis.indices[tid]
        assert len(indices) == spec.rank
        assert indices[0] >= 0
        assert indices[-1] < length(spec)
        assert np.all(np.diff(indices) > 0)
        assert set(basis.signs[tid].tolist()) <= {-1, 1}


def test_drawn_columns_are_uniform() -> None:
    """Each column is in a subspace as often as any other, so that fresh ones are unbiased."""
    manifest = Manifest((TensorSpec("a", (20, 8), "float32", 0, 2),))
    counts = np.zeros(8)
    for key in range(2000):
        counts[drawn("coordinate", manifest, (key, 1)).indices[0]] += 1
    chi_square = float(((counts - 500) ** 2 / 500).sum())
    assert chi_square < 26.0  # 99.95 % of draws from χ² of 7 degrees; these keys are fixed


def test_the_cosines_are_scipys() -> None:
    fft = pytest.importorskip("scipy.fft")
    for n in (8, 33, 384, 1536):
        transform = fft.dct(np.eye(n), type=2, norm="ortho", axis=0)
        assert np.abs(cosines.matrix(n) - transform).max() < 1e-12


def test_the_integer_cosines_are_the_cosines() -> None:
    for n in (8, 33, 384):
        floats = cosines.matrix(n) / np.sqrt(2 / n) * 2**cosines.BITS
        assert np.abs(cosines.table(n) - floats).max() <= 0.5 + 1e-6
        some = np.array([0, 3, n - 1])
        assert np.array_equal(cosines.rows(n, some), cosines.table(n)[some])
        gram = cosines.table(n).astype(np.float64) @ cosines.table(n).T / 2.0 ** (2 * cosines.BITS)
        assert np.abs(gram * 2 / n - np.eye(n)).max() < 1e-5
        assert 2**-0.5 <= 2.0 ** cosines.exponent(n) / np.sqrt(2 / n) <= 2**0.5
