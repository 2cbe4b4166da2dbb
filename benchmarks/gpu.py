"""The GPU kernels against the bandwidth of a copy, what peers do, and the bits of the CPU.

Claim: perturbing, applying a round and rebuilding are one pass over memory at ≥ 80 % of the speed
of a copy, and give the CPU's bits. Peers (MeZO, FedKSeed) seed a generator, draw a normal a weight
and add it, once a direction. Rows run interleaved; figures are medians by the device's own clock.
`pass` starts from a table that is on the device, as all but the first tensor of a model find it;
`perturb`, `apply64` and `rebuild` start from the K integers. Models have random weights: memory
and speed only. Command: make gpu-check.
"""

import argparse
import hashlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, Final

import numpy as np
import torch

from lorand.coefficients import Coefficients
from lorand.kernels import Backend, Place, backend_for, zero_sums
from lorand.transform import Table, fwht, table

REPEATS: Final = 7
KEY: Final = (0x9ABCDEF0, 0x12345678)
POOL_SIZES: Final = (4096, 65536, 1 << 20)
DTYPES: Final = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
WEIGHTS: Final = (1 << 31) + 4096
"""More than 32 bits can count, and at least 4 GB."""
DIRECTIONS: Final = {"perturb": 1, "apply64": 64, "rebuild4096": 4096}
SAMPLE: Final = (1 << 20) + 77

Shapes = list[tuple[int, ...]]
Row = Callable[[], object]


def opt_1_3b() -> Shapes:
    """Return the tensors of OPT-1.3B; embedding and head are one."""
    layer: Shapes = [(2048, 2048), (2048,)] * 4
    layer += [(8192, 2048), (8192,), (2048, 8192), (2048,), (2048,), (2048,), (2048,), (2048,)]
    return [(50272, 2048), (2050, 2048), *(layer * 24), (2048,), (2048,)]


def llama_7b() -> Shapes:
    """Return the tensors of Llama-7B."""
    layer: Shapes = [(4096, 4096)] * 4
    layer += [(11008, 4096), (11008, 4096), (4096, 11008), (4096,), (4096,)]
    return [(32000, 4096), *(layer * 32), (4096,), (32000, 4096)]


def drawn(size: int) -> Coefficients:
    """Return K coefficients of a run that has gone on for a while."""
    return np.random.default_rng(size).integers(-(10**6), 10**6, size)


def table_of(coefficients: Coefficients) -> Table:
    """Return the table of a tensor: what a replica computes once for all tensors."""
    return table(fwht(coefficients), 40, 0)


def milliseconds(call: Row, device: torch.device) -> float:
    """Return how long the device was busy with a call, waits for the host included."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def medians(rows: dict[str, Row], device: torch.device, repeats: int) -> dict[str, float]:
    """Run all rows in turn, once more than `repeats`: the first turn compiles."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for name, call in rows.items():
            elapsed = milliseconds(call, device)
            if turn:
                times[name].append(elapsed)
    return {f"{name}_ms": round(statistics.median(values), 4) for name, values in times.items()}


def one_tensor(
    backend: Backend,
    dtype: torch.dtype,
    weights: int,
    device: torch.device,
    repeats: int = REPEATS,
) -> dict[str, float]:
    """Measure all rows on one tensor, with ratios to the copy and to the peers."""
    base = torch.empty(weights, dtype=dtype, device=device).normal_(std=0.03)
    live = base.clone()
    coefficients = drawn(4096)

    def peer() -> None:
        generator = torch.Generator(device).manual_seed(1)
        live.add_(torch.empty_like(live).normal_(generator=generator), alpha=1e-9)

    def moved(indices: int) -> None:
        changed = coefficients.copy()
        changed[:indices] += 1000
        backend.materialise(base, table_of(changed), live, key=KEY, tid=0)

    rows: dict[str, Row] = {"copy": lambda: live.copy_(base), "peer": peer}
    for name, indices in DIRECTIONS.items():
        rows[name] = partial(moved, indices)
    for size in POOL_SIZES:
        values = table_of(drawn(size))
        rows[f"pass_k{size}"] = partial(backend.materialise, base, values, live, key=KEY, tid=0)
        sums = zero_sums(size, device)
        rows[f"project_k{size}"] = partial(backend.project, base, sums, key=KEY, tid=0)
    times = medians(rows, device, repeats)
    copy, pair = times["copy_ms"], 2 * base.element_size() * weights
    result = {"copy_tb_s": round(pair / copy / 1e9, 3)} | times
    for name in rows:
        if name.startswith(("pass", "perturb", "apply", "rebuild")):
            result[f"{name}_of_copy"] = round(copy / times[f"{name}_ms"], 3)
        elif name.startswith("project"):  # it reads only: half of a copy's bytes
            result[f"{name}_of_copy"] = round(copy / 2 / times[f"{name}_ms"], 3)
    for name, directions in DIRECTIONS.items():
        # A peer's round of n scalars is its perturbation n times over.
        ratio = directions * times["peer_ms"] / times[f"{name}_ms"]
        result[f"{name}_vs_peer"] = round(ratio, 1)
    return result


def model(
    backend: Backend, shapes: Shapes, device: torch.device, repeats: int = REPEATS
) -> dict[str, float]:
    """Rebuild a whole model in bfloat16, base weights kept beside the working ones."""
    bases = [torch.empty(s, dtype=torch.bfloat16, device=device).normal_(std=0.03) for s in shapes]
    lives = [torch.empty_like(base) for base in bases]
    pairs = zip(bases, lives, strict=True)
    places = [Place(base, live, tid, 0) for tid, (base, live) in enumerate(pairs)]

    def copy() -> None:
        for base, live in zip(bases, lives, strict=True):
            live.copy_(base)

    def rebuild(coefficients: Coefficients) -> None:
        backend.materialise_all(places, [table_of(coefficients)], key=KEY)

    rows: dict[str, Row] = {"copy": copy}
    for size in POOL_SIZES:
        rows[f"rebuild_k{size}"] = partial(rebuild, drawn(size))
        rows[f"table_k{size}"] = partial(table_of, drawn(size))
    result: dict[str, float] = {
        "weights": sum(base.numel() for base in bases),
        "tensors": len(bases),
    }
    result |= medians(rows, device, repeats)
    if device.type == "cuda":
        result["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return result


def digests(
    backend: Backend, device: torch.device, sizes: Sequence[int] = POOL_SIZES
) -> dict[str, str]:
    """Return the SHA-256 of sample weights. Raises SystemExit where device and CPU differ."""
    result = {}
    for name, dtype in DTYPES.items():
        base = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0)).to(dtype)
        for size in sizes:
            values = table_of(drawn(size))
            here = digest(backend_for(base.device), base, values)
            there = digest(backend, base.to(device), values)
            if here != there:
                raise SystemExit(f"{name}, K = {size}: SHA-256 {here} on the CPU, {there} here")
            result[f"{name}_k{size}"] = here
    return result


def digest(backend: Backend, base: torch.Tensor, values: Table) -> str:
    """Return the SHA-256 of the weights that a backend makes of a base."""
    out = torch.empty_like(base)
    backend.materialise(base, values, out, key=KEY, tid=3)
    return hashlib.sha256(out.cpu().view(torch.uint8).numpy().tobytes()).hexdigest()


def provenance(device: torch.device) -> dict[str, Any]:
    """Return hardware and versions; needs nothing that a bare machine with torch lacks."""
    properties = torch.cuda.get_device_properties(device)
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "numba", "numpy")},
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def main() -> None:
    """Compare bits, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--weights", type=int, default=WEIGHTS, help="weights of the one tensor")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu measures a CUDA or ROCm device, and torch finds none here.")
    device = torch.device("cuda", torch.cuda.current_device())
    backend = backend_for(device)
    if backend.name != "gpu":
        sys.exit("benchmarks.gpu measures Triton programs, and Triton cannot be imported here.")
    result: dict[str, Any] = {"sha256_as_on_cpu": digests(backend, device)}
    result |= {"weights": arguments.weights, "repeats": REPEATS}
    for name, dtype in DTYPES.items():
        result[name] = one_tensor(backend, dtype, arguments.weights, device)
        torch.cuda.empty_cache()
    for name, shapes in (("opt_1_3b", opt_1_3b()), ("llama_7b", llama_7b())):
        torch.cuda.reset_peak_memory_stats()
        result[name] = model(backend, shapes, device)
        torch.cuda.empty_cache()
    result["provenance"] = provenance(device)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result.items():
        for part, figure in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"{name} {part:28} {figure}")


if __name__ == "__main__":
    main()
