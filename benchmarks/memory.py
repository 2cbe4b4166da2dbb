"""Peak memory of a step: copy and layerwise against inference, plain backward and AdamW.

Claim: zeroth-order layerwise needs inference and the largest layer; first-order layerwise never
holds a gradient. The model is RoBERTa-base's shape (125M weights, random, built here), all of it
trained, one batch of 16 x 128 tokens. Each mode runs in a process of its own, which builds the
model, takes a step to settle the libraries, resets the kernel's high-water mark of resident memory
(/proc/self/clear_refs, Linux), takes another and reads it; what the process held before the model
was built is subtracted. glibc gives every large block back at once (MALLOC_MMAP_THRESHOLD_), so
that the mark is what was in use. Seconds are from a second process with the usual allocator.
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
from torch import nn

from lorand import layers
from lorand.config import RunConfig
from lorand.directions import Pool
from lorand.layerwise import LayerwiseReplica
from lorand.manifest import Manifest, TensorSpec
from lorand.replica import CopyReplica, hand_over
from lorand_worker import estimators, quantisation
from lorand_worker.model import OwnClassifier

BATCH, LENGTH = 16, 128
STEPS = 5
KEY = (1, 2)
MODES = (
    "inference",
    "zo_copy",
    "zo_layerwise",
    "zo_layerwise_int8",
    "zo_layerwise_nf4",
    "bare_checkpointed",
    "bare_checkpointed_freed",
    "adamw",
    "adamw_checkpointed",
    "fo_copy",
    "fo_copy_checkpointed",
    "fo_layerwise",
)
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
    """Measure one mode in this process."""
    kind = getattr(torch, dtype)
    step_of(mode, classifier(kind, 1, 24))()  # libraries and compiled kernels are not counted
    gc.collect()
    before = resident("VmRSS")
    step = step_of(mode, classifier(kind))
    step()
    gc.collect()
    if timed:
        return {"seconds": statistics.median(_seconds(step) for _ in range(STEPS))}
    between = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return {
        "peak": (resident("VmHWM") - before) / 1e6,
        "between_steps": (between - before) / 1e6,
        "weights": sum(p.nbytes for p in classifier(kind).parameters()) / 1e6,
    }


def _seconds(step: Callable[[], Any]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def start(mode: str, dtype: str, *, timed: bool) -> dict[str, float]:
    """Measure one mode in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", mode, "--dtype", dtype]
    environment = os.environ | ({} if timed else CHILD)
    result = subprocess.run(
        command + (["--timed"] if timed else []),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    answer: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--child", choices=MODES)
    parser.add_argument("--modes", nargs="*", default=MODES)
    parser.add_argument("--dtype", default="")
    parser.add_argument("--timed", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.dtype, timed=arguments.timed)))
        return
    for dtype in [arguments.dtype] if arguments.dtype else ["float32", "bfloat16"]:
        for mode in arguments.modes:
            print(dtype, mode, start(mode, dtype, timed=arguments.timed), flush=True)


if __name__ == "__main__":
    main()
