"""What holds of the GPU backend alone. The contract is in the other files; without a device, the
programs run in Triton's interpreter (TRITON_INTERPRET=1) and are compiled for one that is not here.
"""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from tests.contracts.kernel_cases import (
    GPU,
    INTERPRETED,
    KEY,
    TRITON,
    bits,
    device_of,
    random_table,
)

from lorand.kernels import Backend, backend_for, reference

ROOT: Final = Path(__file__).resolve().parents[2]
TYPES: Final = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
COMPILES: Final = pytest.mark.skipif(
    not TRITON or INTERPRETED, reason="Triton is not installed, or set to interpret"
)


@pytest.fixture(params=[GPU])
def gpu(request: pytest.FixtureRequest) -> Backend:
    made: Backend = request.param()
    return made


def test_the_backend_of_a_device() -> None:
    """Without Triton a GPU gets the reference: slower, never different."""
    assert backend_for(torch.device("cpu")).name == "cpu"
    assert backend_for(torch.device("meta")).name == "reference"
    assert backend_for(torch.device("cuda")).name == ("gpu" if TRITON else "reference")


def test_triton_is_imported_for_a_device_only() -> None:
    code = "import sys, torch, lorand.kernels as k; k.backend_for(torch.device('cpu'));"
    code += "assert 'lorand.kernels.gpu' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "common")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# ------------------------------------------------------------- on a device, or interpreted


def test_the_kernels_are_trusted(gpu: Backend, dtype: torch.dtype) -> None:
    """Otherwise the reference would pass the contract in their place."""
    from lorand.kernels.gpu import GpuBackend

    assert isinstance(gpu, GpuBackend)
    weights = torch.zeros(1, dtype=dtype, device=device_of(gpu))
    assert gpu.trusted("hadamard", weights)
    assert gpu.trusted("independent", weights)


def test_a_table_is_copied_to_the_device_once(gpu: Backend) -> None:
    """291 tensors of a model take one table; its copy goes when the table does."""
    from lorand.kernels.gpu import GpuBackend

    assert isinstance(gpu, GpuBackend)
    values, device = random_table(64, 0).copy(), device_of(gpu)
    there = gpu._on_device(values, device)
    assert gpu._on_device(values, device) is there
    assert gpu._on_device(values.copy(), device) is not there
    assert len(gpu._tables) == 1
    del values
    gc.collect()
    assert not gpu._tables


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, and Triton")
def test_the_benchmark_runs(gpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """At toy size: what `make gpu-check` calls on a device."""
    from benchmarks import gpu as benchmark

    monkeypatch.setattr(benchmark, "POOL_SIZES", (4096, 8192))
    monkeypatch.setattr(benchmark, "SAMPLE", 4097)
    here = torch.device("cpu")
    assert len(benchmark.digests(gpu, here, (4096, 8192))) == 6
    assert benchmark.one_tensor(gpu, torch.bfloat16, 4097, here, 1)["pass_k4096_of_copy"] >= 0
    assert benchmark.model(gpu, [(40, 50), (50,)], here, 1)["weights"] == 2050


@pytest.mark.gpu
@pytest.mark.parametrize("size", [4096, 65536, 1 << 20])
def test_offsets_beyond_32_bits(gpu: Backend, size: int) -> None:
    """The last weights of a tensor of more than 2^31, and the first."""
    if INTERPRETED or torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs a device with 10 GB of free memory")
    count, looked_at = (1 << 31) + 70_001, 100_000
    base = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    out, values = torch.empty_like(base), random_table(size, 0)
    gpu.materialise(base, values, out, key=KEY, tid=3)
    for start in (0, (count - looked_at) >> 12 << 12):
        place = {"key": KEY, "tid": 3, "device": torch.device("cpu")}
        where = reference.buckets(start, looked_at, size=size, **place)  # type: ignore[arg-type]
        expected = reference.signs(start, looked_at, **place) * torch.from_numpy(values)[where]  # type: ignore[arg-type]
        found = out[start : start + looked_at]
        assert torch.equal(bits(found), bits(expected.to(torch.bfloat16)[: len(found)]))


# ------------------------------------------------------------- compiled for a device elsewhere


def compiled(
    program: str, target: Any, dtype: torch.dtype, constants: dict[str, int], warps: int
) -> Any:
    """A program as Triton compiles it for large aligned tensors; needs no device."""
    import triton
    from triton.compiler import ASTSource

    from lorand.kernels import gpu_programs

    function = getattr(gpu_programs, program)
    types = {
        "table": "*fp32",
        "sums": "*fp64",
        "seeds": "*i64",
        "amounts": "*i64",
        "factor": "fp32",
    }
    types |= {"seed": "i64"} | dict.fromkeys(("base", "out", "gradient"), "*" + TYPES[dtype])
    signature = {
        n: "constexpr" if n in constants else types.get(n, "i32") for n in function.arg_names
    }
    aligned = [(i,) for i, (n, t) in enumerate(signature.items()) if t[0] == "*" or n == "rest"]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(n),): value for n, value in constants.items()},
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


@COMPILES
@pytest.mark.parametrize("size", [4096, 65536, 1 << 20])
def test_materialise_reads_and_writes_vectors(dtype: torch.dtype, size: int) -> None:
    """Four weights an access, table included; no exchange between lanes; nothing spilled."""
    from triton.backends.compiler import GPUTarget

    constants = {"SIZE": size, "LANES": 256, "ROWS": 8}
    made = compiled("materialise", GPUTarget("cuda", 90, 32), dtype, constants, 8)
    ptx = made.asm["ptx"]
    width = "v4.b32" if dtype == torch.float32 else "v2.b32"
    loads, stores = re.findall(r"ld\.global\.(\S+)", ptx), re.findall(r"st\.global\.(\S+)", ptx)
    assert stores == [width] * 8
    assert sorted(loads) == sorted(["v4.b32"] * 8 + [width] * 8)
    assert made.metadata.shared == 0
    assert not re.search(r"\.local\b", ptx)


@COMPILES
@pytest.mark.parametrize(
    ("program", "constants"),
    [
        ("materialise", {"SIZE": 4096, "LANES": 256, "ROWS": 8}),
        ("materialise", {"SIZE": 256, "LANES": 32, "ROWS": 8}),
        ("materialise_independent", {"LANES": 128}),
    ],
    ids=["4096", "256", "independent"],
)
def test_no_multiply_is_fused_and_no_small_number_flushed(
    dtype: torch.dtype, program: str, constants: dict[str, int]
) -> None:
    """Rounding to nearest even after every operation, on both makes of device."""
    from triton.backends.compiler import GPUTarget

    warps = constants["LANES"] // 32
    ptx = compiled(program, GPUTarget("cuda", 90, 32), dtype, constants, warps).asm["ptx"]
    float_operations = re.findall(r"\b(?:add|sub|mul|fma|mad|cvt)\.\S*f(?:16|32)\S*", ptx)
    rounded = {
        "add.rn.f32",
        "mul.rn.f32",
        "cvt.rn.f32.s64",
        "cvt.rn.bf16x2.f32",
        "cvt.rn.f16x2.f32",
    }
    assert set(float_operations) <= rounded | {"cvt.f32.bf16", "cvt.f32.f16"}
    made = compiled(program, GPUTarget("hip", "gfx942", 64), dtype, constants, max(1, warps // 2))
    assert not re.search(r"\bv_(?:pk_)?(?:fma|fmac|mac|mad)_(?:f|mix)", made.asm["amdgcn"])
    assert re.search(r"amdhsa_float_denorm_mode_32 3", made.asm["amdgcn"])


@pytest.mark.slow
@COMPILES
@pytest.mark.timeout(600)
def test_the_contract_in_the_interpreter() -> None:
    """The whole contract, interpreted: every operation of the programs, on any machine."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreted", "tests/contracts"]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"})
