"""Peak memory of a step, layer by layer and on a copy, against inference, plain backward and AdamW.

Claim: zeroth-order layerwise needs inference and the largest layer; first-order layerwise never
holds a whole gradient. The model is RoBERTa-base's shape (125M weights, random, built here), all of
it trained, one batch of 16 x 128 tokens.

Each mode runs in a process of its own: a step on a tiny model loads libraries and compiled kernels,
then the model is built and takes a step; the kernel's high-water mark of resident memory is reset
(/proc/self/clear_refs, Linux), another step taken and the mark read. What the process held before
the model was built is subtracted. glibc is told to give every block above 64 KB back at once, so
that the mark is what was in use, not what an allocator kept. Seconds are from processes with the
usual allocator.

Command: python -m benchmarks.memory --json > benchmarks/results/memory.json (about ten minutes).
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from experiments.provenance import provenance
from torch import nn

from lorand import layers
from lorand.config import RunConfig
from lorand.directions import Pool
from lorand.layerwise import LayerwiseReplica
from lorand.manifest import Manifest, TensorSpec
from lorand.replica import CopyReplica, hand_over
from lorand_worker import estimators, quantisation
from lorand_worker.heads import OwnClassifier

BATCH, LENGTH = 16, 128
STEPS = 3
KEY = (1, 2)
TIMED = (
    "inference",
    "zo_copy",
    "zo_layerwise",
    "zo_layerwise_int8",
    "zo_layerwise_nf4",
    "fo_copy",
    "fo_copy_checkpointed",
    "fo_layerwise",
)
MODES = (
    *TIMED,
    "bare_checkpointed",  # forward and backward with checkpointing, gradients kept
    "bare_checkpointed_freed",  # the same, each gradient dropped as backward yields it
    "adamw",
    "adamw_checkpointed",
)
DTYPES = ("float32", "bfloat16")
CHILD = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def classifier(dtype: torch.dtype, num_layers: int = 12, width: int = 768) -> OwnClassifier:
    """Return a random RoBERTa, by default the base size, with a head of two labels."""
    import transformers

    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=50265,
        hidden_size=width,
        num_hidden_layers=num_layers,
        intermediate_size=4 * width,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_labels=2,
    )
    model = transformers.RobertaForSequenceClassification(config).to(dtype)
    return OwnClassifier(model.eval())


def run_config(kind: str) -> RunConfig:
    """Return the run of a mode: one direction a round, or a pool of 65,536."""
    content = {
        "run": {"name": "memory", "rounds": 1},
        "model": {"name": "roberta-base's shape"},
        "task": {"labels": ["a", "b"]},
        "estimator": {"kind": kind, "directions_per_round": 1},
        "directions": {"pool_size": 65536 if kind == "backprop" else 4096},
        "optimizer": {"learning_rate": 0.001},
        "rounds": {"quorum": 1},
    }
    return RunConfig.model_validate(content)


def step_of(mode: str, module: OwnClassifier) -> Callable[[], Any]:
    """Return a call that takes one step of the mode."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50000, (BATCH, LENGTH), generator=generator)
    target = torch.randint(0, 2, (BATCH,), generator=generator)

    def loss(_: Any = None) -> torch.Tensor:
        logits = module(ids, torch.ones_like(ids)).float()
        return nn.functional.cross_entropy(logits, target)

    if mode == "inference":
        return torch.no_grad()(loss)
    if mode.startswith(("adamw", "bare")):
        return plain(mode, module, loss)
    kind = "spsa" if mode.startswith("zo") else "backprop"
    config = run_config(kind)
    specs = [
        TensorSpec(name, tuple(p.shape), str(p.dtype).removeprefix("torch."))
        for name, p in module.named_parameters()
    ]
    manifest = Manifest(tuple(sorted(specs, key=lambda spec: spec.name)))
    section = config.directions
    pool = Pool(KEY, section.pool_size, section.quantum_exponent)
    stored: dict[str, Any] = {}
    if mode.endswith(("int8", "nf4")):
        stored = quantisation.quantise_layers(module, "int8" if mode.endswith("int8") else "nf4")
    if "layerwise" in mode:
        replica: Any = LayerwiseReplica(module, manifest, pool, stored=stored)
    else:
        replica = CopyReplica.of(module, manifest, pool)
    if mode == "fo_copy_checkpointed":
        layers.checkpoint(module)
    estimator = estimators.build(config, replica, module)
    indices = config.draws(bytes(32)).of(0, 0)
    return lambda: estimator.measure(loss, [], indices)


def plain(mode: str, module: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], Any]:
    """Return a step as it is without this library: gradients kept, AdamW if asked for."""
    if "checkpointed" in mode:
        layers.checkpoint(module)
    if mode.endswith("freed"):
        for name, parameter in module.named_parameters():
            hand_over(name, parameter, lambda *_: None)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5) if "adamw" in mode else None

    def step() -> None:
        module.zero_grad(set_to_none=True)
        loss().backward()  # type: ignore[no-untyped-call]
        if optimizer:
            optimizer.step()

    return step


def resident(field: str) -> int:
    """Return VmRSS or VmHWM in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def child(mode: str, dtype: str, *, timed: bool) -> dict[str, float]:
    """Measure one mode in this process: MB, or seconds."""
    kind = getattr(torch, dtype)
    step_of(mode, classifier(kind, 1, 24))()
    gc.collect()
    before = resident("VmRSS")
    module = classifier(kind)
    step = step_of(mode, module)
    step()
    gc.collect()
    if timed:
        return {"step_s": statistics.median(_seconds(step) for _ in range(STEPS))}
    between = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    peak = resident("VmHWM")
    return {"peak_mb": (peak - before) / 1e6, "between_steps_mb": (between - before) / 1e6}


def _seconds(step: Callable[[], Any]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def start(mode: str, dtype: str, *, timed: bool) -> dict[str, float]:
    """Measure one mode in a process of its own."""
    print(dtype, mode, "seconds" if timed else "memory", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.memory", "--child", mode, "--dtype", dtype]
    result = subprocess.run(
        command + (["--timed"] if timed else []),
        env=os.environ | ({} if timed else CHILD),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return {name: round(value, 3) for name, value in answer.items()}


def dequantising() -> dict[str, float]:
    """Return seconds to dequantise all blocks once: what the signs of a direction could share."""
    result = {}
    for kind in ("int8", "nf4"):
        stored = quantisation.quantise_layers(classifier(torch.float32), kind)
        times = [_seconds(lambda: [weight.dense() for weight in stored.values()]) for _ in range(5)]  # noqa: B023
        result[kind] = round(statistics.median(times), 3)
    return result


def bounds(module: nn.Module) -> dict[str, float]:
    """Return bytes of the weights, the largest tensor and the largest layer, in MB."""
    sizes = {name: p.nbytes for name, p in module.named_parameters()}
    largest = max(sum(sizes[slot.name] for slot in part.slots) for part in layers.layers(module))
    return {
        "weights_mb": sum(sizes.values()) / 1e6,
        "largest_tensor_mb": max(sizes.values()) / 1e6,
        "largest_layer_mb": largest / 1e6,
    }


def ratios(peaks: dict[str, float], size: dict[str, float]) -> dict[str, float]:
    """Return peaks against the project's bounds; 1 is the bound."""
    dropped = size["weights_mb"] - size["largest_tensor_mb"]
    result = {
        "zo_layerwise_vs_inference_and_largest_layer": peaks["zo_layerwise"]
        / (peaks["inference"] + size["largest_layer_mb"]),
        "fo_layerwise_vs_bare_minus_gradients": peaks["fo_layerwise"]
        / (peaks["bare_checkpointed"] - dropped),
        "fo_layerwise_vs_bare_with_gradients_dropped": peaks["fo_layerwise"]
        / peaks["bare_checkpointed_freed"],
        "fo_layerwise_vs_adamw": peaks["fo_layerwise"] / peaks["adamw"],
    }
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    """Measure all modes and print, or one as a child."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--child", choices=MODES)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--timed", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.dtype, timed=arguments.timed)))
        return
    result: dict[str, Any] = {"tokens": [BATCH, LENGTH]}
    for dtype in DTYPES:
        size = bounds(classifier(getattr(torch, dtype)))
        measured = {mode: start(mode, dtype, timed=False) for mode in MODES}
        peaks = {mode: values["peak_mb"] for mode, values in measured.items()}
        result[dtype] = size | {"measured": measured, "ratios": ratios(peaks, size)}
    result["step_s"] = {mode: start(mode, "float32", timed=True)["step_s"] for mode in TIMED}
    result["dequantise_all_s"] = dequantising()
    result["provenance"] = provenance()
    print(json.dumps(result, indent=1) if arguments.json else _table(result))


def _table(result: dict[str, Any]) -> str:
    lines = []
    for dtype in DTYPES:
        lines += [
            f"{dtype} {mode:36} {m['peak_mb']:8.0f} MB"
            for mode, m in result[dtype]["measured"].items()
        ]
        lines += [f"{dtype} {name:48} {value}" for name, value in result[dtype]["ratios"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
