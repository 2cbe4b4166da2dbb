"""A replica's weights are f(base, A), bit for bit, however it got there (DESIGN §1, §5.4)."""

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.replicas import FAMILIES, MANIFEST, pool_of, random_coefficients, tensors_of

from lorand.coefficients import Coefficients, add, zeros
from lorand.directions import Family, Indices
from lorand.displacement import HadamardDisplacement, displacement
from lorand.errors import LedgerError, ModelError
from lorand.kernels import Backend, Place
from lorand.kernels.cpu import CpuBackend
from lorand.kernels.reference import ReferenceBackend
from lorand.manifest import Manifest, TensorSpec
from lorand.philox import Key
from lorand.replica import CopyReplica, tensor_bytes
from lorand.transform import Table, fwht

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS: Final[list[Backend]] = [ReferenceBackend(), CpuBackend()]


def replica_of(
    family: Family = "hadamard", backend: Backend | None = None, size: int = 64
) -> CopyReplica:
    return CopyReplica(tensors_of(), MANIFEST, pool_of(family, size), backend)


def bits(replica: CopyReplica) -> dict[str, bytes]:
    return {name: bytes(tensor_bytes(tensor)) for name, tensor in replica.live.items()}


# ------------------------------------------------------------- one digest for one ledger


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("hadamard", "89b3ce219a9eadca9f475855dc3696677db508ec4040395a2b88dac371587e2a"),
        ("independent", "573583df74f36de0c9f30b7fa4260c0278689bcee9a7b9ee26919e30100aa839"),
    ],
    ids=FAMILIES,
)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_the_weights_of_a_ledger_are_normative(
    family: Family, backend: Backend, expected: str
) -> None:
    """Invariant 4 across machines: every machine, backend and build must recompute this digest."""
    replica = replica_of(family, backend)
    replica.set(np.arange(-31, 33, dtype=np.int64) ** 5)
    assert replica.digest().hex() == expected


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_any_order_any_backend_any_time_of_joining(family: Family, data: st.DataObject) -> None:
    """One replica followed and measured, one was elsewhere, one joins at the end: same bits."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    most = 64 if family == "hadamard" else 6  # a pass a direction
    updates: list[tuple[Indices, Coefficients]] = [
        (rng.permutation(64)[:count], rng.integers(-(2**24), 2**24, count, dtype=np.int64))
        for count in data.draw(st.lists(st.integers(1, most), min_size=1, max_size=4))
    ]
    follower = replica_of(family, BACKENDS[0])
    for indices, delta in updates:
        follower.set(add(follower.coefficients, indices, delta))
        with follower.perturbed(int(indices[0]), 12345):
            pass
    elsewhere = replica_of(family, BACKENDS[1])
    for indices, delta in data.draw(st.permutations(updates)):
        elsewhere.set(add(elsewhere.coefficients, indices, delta))
    joined = replica_of(family)
    joined.set(follower.coefficients)
    assert follower.digest() == elsewhere.digest() == joined.digest()
    assert follower.digest() != replica_of(family).digest()


@pytest.mark.parametrize("family", FAMILIES)
def test_returning_to_zero_returns_to_the_base(family: Family) -> None:
    """Undo is exact: w(A) after any history depends on A alone."""
    replica = replica_of(family)
    before = replica.digest()
    replica.set(random_coefficients(1))
    replica.set(zeros(64))
    assert replica.digest() == before


def test_a_negative_zero_in_the_base_does_not_tell_replicas_apart() -> None:
    """w(0) has fl32(−0.0 + 0.0): a replica that measured and one that just joined must agree."""
    tensors = tensors_of()
    tensors["b.bias"][::2] = -0.0
    fresh = CopyReplica(tensors, MANIFEST, pool_of())
    before = fresh.digest()
    with fresh.perturbed(3, 1000):
        assert fresh.digest() != before
    assert fresh.digest() == before


def test_the_digest_is_of_names_and_row_major_bytes() -> None:
    """However the tensors lie in memory."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors_of().items()):
        total.update(name.encode() + b"\0" + bytes(tensor_bytes(tensor)))
    assert replica_of().digest() == total.digest()
    turned = tensors_of()
    turned["a.weight"] = turned["a.weight"].t().contiguous().t()
    assert CopyReplica(turned, MANIFEST, pool_of()).digest() == total.digest()


def test_memory_order_does_not_change_the_weights() -> None:
    """DESIGN §2 step 1: element i counts row-major."""
    turned = tensors_of()
    turned["a.weight"] = turned["a.weight"].t().contiguous().t()
    turned["b.weight"] = turned["b.weight"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for backend in BACKENDS:
        other = CopyReplica({n: t.clone() for n, t in turned.items()}, MANIFEST, pool_of(), backend)
        other.set(random_coefficients(3))
        plain = replica_of()
        plain.set(random_coefficients(3))
        assert other.digest() == plain.digest()


# ------------------------------------------------------------- perturb and restore


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_perturb_then_restore_returns_exactly_the_same_bits(
    family: Family, backend: Backend
) -> None:
    """DESIGN §1: restore is w(A), never a subtraction; A itself stays."""
    replica = replica_of(family, backend)
    replica.set(add(zeros(64), [1, 17, 40], random_coefficients(2)[:3]))
    before, coefficients = bits(replica), replica.coefficients.copy()
    for index in (0, 17, 63):
        for quanta in (42949673, -42949673):
            with replica.perturbed(index, quanta):
                assert all(bits(replica)[name] != before[name] for name in before)
    assert bits(replica) == before
    assert replica.coefficients.tolist() == coefficients.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perturbation_is_the_weights_of_other_coefficients(family: Family) -> None:
    """w(A + c·e_k): what was measured is exactly what an update by it would give."""
    measured, updated = replica_of(family), replica_of(family)
    measured.set(random_coefficients(4))
    updated.set(add(random_coefficients(4), [9], np.array([-1000])))
    with measured.perturbed(9, -1000):
        assert measured.digest() == updated.digest()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_quantum_moves_every_weight_by_one_quantum(family: Family) -> None:
    """Times 2^s, the tensor's direction scale (DESIGN §2 step 10)."""
    replica = CopyReplica(tensors_of(zero=True), MANIFEST, pool_of(family, quantum_exponent=8))
    with replica.perturbed(5, -3):
        for spec in MANIFEST.tensors:
            move = 3 * 2.0 ** (spec.scale_exponent - 8)
            assert set(replica.live[spec.name].double().abs().reshape(-1).tolist()) == {move}


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), index=st.integers(0, 63), c=st.integers(-(2**60), 2**60))
def test_the_transform_of_a_perturbation_is_derived_exactly(seed: int, index: int, c: int) -> None:
    """F ± c·H[:, k] in O(K), or LedgerError exactly where the transform itself would refuse."""
    rng = np.random.default_rng(seed)
    coefficients = rng.integers(-(2**55), 2**55, 64, dtype=np.int64)
    at = displacement(coefficients, pool_of(), BACKENDS[0], keys=[], scale_exponents=frozenset({0}))
    moved = coefficients.copy()
    moved[index] += c
    try:
        expected = fwht(moved).tolist()
    except LedgerError:
        with pytest.raises(LedgerError, match="above the limit"):
            at.moved(index, c)
        return
    derived = at.moved(index, c)
    assert isinstance(derived, HadamardDisplacement)
    assert derived.transform.tolist() == expected
    assert derived.coefficients.tolist() == moved.tolist()
    back = derived.moved(index, -c)
    assert isinstance(back, HadamardDisplacement)
    assert back.transform.tolist() == fwht(coefficients).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quanta", [2**62, -(2**62), 2**63, 2**80])
def test_a_perturbation_beyond_the_limit_is_refused(family: Family, quanta: int) -> None:
    replica = replica_of(family)
    before = replica.digest()
    with pytest.raises(LedgerError), replica.perturbed(3, quanta):
        raise AssertionError
    assert replica.digest() == before


# ------------------------------------------------------------- written when needed, and only then


class Counting(ReferenceBackend):
    """Counts passes over the weights; the one at `fails_at` breaks off half way."""

    def __init__(self, fails_at: int = -1) -> None:
        """Count from zero."""
        self.passes = 0
        self.fails_at = fails_at

    def materialise_all(
        self, places: Sequence[Place], tables: Sequence[Table], *, key: Key
    ) -> None:
        self.passes += 1
        if self.passes == self.fails_at:
            super().materialise_all(places[:2], tables, key=key)
            raise MemoryError
        super().materialise_all(places, tables, key=key)


def test_weights_are_written_when_they_are_needed() -> None:
    """Adopting is free, and so is settling twice."""
    backend = Counting()
    replica = replica_of(backend=backend)
    assert backend.passes == 0
    replica.set(random_coefficients(1))
    replica.set(random_coefficients(2))
    assert backend.passes == 0
    replica.settle()
    replica.settle()
    assert replica.live["a.weight"] is replica.live["a.weight"]
    replica.digest()
    assert backend.passes == 1


def test_a_measurement_costs_a_pass_a_perturbation_and_none_between() -> None:
    backend = Counting()
    replica = replica_of(backend=backend)
    for index in (3, 9):
        for quanta in (77, -77):
            with replica.perturbed(index, quanta):
                replica.settle()
    replica.set(random_coefficients(3))
    assert backend.passes == 4, "two a direction: no restoring, no applying"
    expected = replica_of()
    expected.set(random_coefficients(3))
    assert replica.digest() == expected.digest()
    assert backend.passes == 5


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_pass_that_breaks_off_leaves_a_replica_stale_not_wrong(fails_at: int) -> None:
    """Half-written weights are never taken for w(A), whatever was being written."""
    backend = Counting(fails_at)
    replica = replica_of(backend=backend)
    replica.set(random_coefficients(5))
    failures = 0
    for _ in range(3):
        try:
            with replica.perturbed(5, 999):
                pass
            replica.settle()
        except MemoryError:
            failures += 1
    assert failures == 1
    expected = replica_of()
    expected.set(random_coefficients(5))
    assert replica.digest() == expected.digest()


def test_an_error_while_perturbed_ends_the_perturbation() -> None:
    replica = replica_of()
    before = replica.digest()
    with pytest.raises(ZeroDivisionError), replica.perturbed(5, 999):
        raise ZeroDivisionError
    assert replica.digest() == before


def test_coefficients_stay_while_a_measurement_is_under_way() -> None:
    replica = replica_of()
    with replica.perturbed(5, 999):
        with pytest.raises(AssertionError, match="do not nest"), replica.perturbed(6, 1):
            pass
        with pytest.raises(AssertionError, match="under way"):
            replica.set(random_coefficients(1))


def test_a_model_never_runs_on_stale_weights() -> None:
    """Nobody has to remember to settle: the module's own forward does."""
    module = torch.nn.Linear(9, 7)
    manifest = Manifest((TensorSpec("weight", (7, 9), "float32"),))
    x = torch.arange(9.0)
    replica = CopyReplica.of(module, manifest, pool_of())

    def answer() -> list[float]:
        return [float(y) for y in module(x).detach()]

    first = answer()
    replica.set(random_coefficients(9))
    second = answer()
    with replica.perturbed(2, 2**28):
        third = answer()
    assert answer() == second
    assert len({tuple(y) for y in (first, second, third)}) == 3
    replica.set(zeros(64))
    assert answer() == first


# ------------------------------------------------------------- the model's own tensors


def test_a_replica_writes_into_the_models_parameters() -> None:
    """In place, without a gradient's trace; the base is a copy the model cannot change."""
    module = torch.nn.Linear(9, 7)
    manifest = Manifest(
        (TensorSpec("bias", (7,), "float32"), TensorSpec("weight", (7, 9), "float32"))
    )
    replica = CopyReplica(dict(module.named_parameters()), manifest, pool_of())
    address, before = module.weight.data_ptr(), module.weight.detach().clone()
    replica.set(random_coefficients(9))
    replica.settle()
    assert module.weight.data_ptr() == address
    assert module.weight.requires_grad
    assert module.weight.grad_fn is None
    assert not torch.equal(module.weight.detach(), before)
    module.weight.data.fill_(3)
    replica.set(zeros(64))
    replica.settle()
    assert torch.equal(module.weight.detach(), before)


def test_tensors_the_run_does_not_train_are_left_alone() -> None:
    tensors = {**tensors_of(), "frozen": torch.ones(5)}
    replica = CopyReplica(tensors, MANIFEST, pool_of())
    replica.set(random_coefficients(9))
    assert tensors["frozen"].tolist() == [1] * 5
    assert set(replica.live) == {spec.name for spec in MANIFEST.tensors}


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b.bias", None, "the run trains 'b.bias', which this model does not have"),
        ("b.bias", torch.zeros(301).bfloat16(), r"'b\.bias' is bfloat16 \(300,\) in the run, but "),
        ("b.bias", torch.zeros(300, 1).bfloat16(), r"bfloat16 \(300, 1\) in this model"),
        ("b.bias", torch.zeros(300), r"float32 \(300,\) in this model"),
        ("c.scale", torch.zeros(1), r"float32 \(1,\) in this model"),
        ("a.weight", torch.zeros(70, 63).double(), r"float64 \(70, 63\) in this model"),
    ],
    ids=["missing", "length", "rank", "dtype", "scalar", "float64"],
)
def test_a_model_that_does_not_fit_is_refused(
    name: str, tensor: torch.Tensor | None, message: str
) -> None:
    """ModelError names the tensor and both sides."""
    tensors = tensors_of()
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    with pytest.raises(ModelError, match=message):
        CopyReplica(tensors, MANIFEST, pool_of())


def test_a_dtype_no_kernel_knows_is_refused() -> None:
    manifest = Manifest((TensorSpec("w", (4,), "float64"),))
    with pytest.raises(ModelError, match="'w' is float64"):
        CopyReplica({"w": torch.zeros(4).double()}, manifest, pool_of())


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficients_beyond_the_limit_leave_the_replica_as_it_was(family: Family) -> None:
    """DESIGN §2 step 7 refuses them; the live tensors still hold w(A) for the A it states."""
    replica = replica_of(family)
    replica.set(random_coefficients(10))
    before = replica.digest()
    with pytest.raises(LedgerError):
        replica.set(np.full(64, 2**57, np.int64))
    assert replica.coefficients.tolist() == random_coefficients(10).tolist()
    assert replica.digest() == before
