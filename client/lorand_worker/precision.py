"""The precision of a worker's forward passes: its own choice, since only scalars are reported.

bfloat16 means that matrix products, and what autocast puts beside them, run in bfloat16; weights
stay what the manifest says, and the loss is computed in float32.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from lorand.config import RunConfig

if TYPE_CHECKING:  # commands are quick to start: torch is imported when it is needed
    import torch

MIN_PERTURBATION_SCALE: Final = 0.001
"""Smallest μ at which `auto` measures two-point scalars in bfloat16.

There rounding is at most 5 % of a scalar, where another batch changes it by more than 100 %; below,
it grows as 1/μ (benchmarks/results/forward.json).
"""
WORTHWHILE: Final = 1.3
"""How much faster a matrix product in bfloat16 must be for `auto` to choose it."""
TIMINGS: Final = 20
MAX_TIMING_S: Final = 0.5
"""Time to find out which is faster; emulated bfloat16 takes long."""


class Precision(StrEnum):
    """`float32` leaves passes in the weights' own dtype; `auto` is never what passes run in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def choose(asked: Precision, config: RunConfig, device: "torch.device") -> tuple[Precision, str]:
    """Return float32 or bfloat16, and why, as a sentence for the worker's owner.

    `auto` is bfloat16 where the weights are float32, the run's scalars bear it and this machine is
    faster with it.
    """
    if asked is not Precision.AUTO:
        return asked, f"forward passes: {asked}"
    estimator = config.estimator
    if config.model.dtype != "float32":
        return Precision.FLOAT32, f"forward passes: {config.model.dtype}, as the weights"
    two_losses = estimator.kind in ("spsa", "one-sided")
    if two_losses and estimator.perturbation_scale < MIN_PERTURBATION_SCALE:
        return Precision.FLOAT32, (
            f"forward passes: float32, since at a perturbation scale below "
            f"{MIN_PERTURBATION_SCALE} bfloat16 would drown the scalars"
        )
    if config.subspace.probe:
        return Precision.FLOAT32, (
            "forward passes: float32, since the run compares curvatures, which rounding in "
            "bfloat16 would change"
        )
    faster = bfloat16_speedup(device)
    chosen = Precision.BFLOAT16 if faster >= WORTHWHILE else Precision.FLOAT32
    return chosen, f"forward passes: {chosen} (bfloat16 is {faster:.1f} times as fast here)"


def passes(precision: Precision, device: "torch.device") -> AbstractContextManager[None]:
    """Return the context in which forward passes run."""
    import torch

    if precision is Precision.BFLOAT16:
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def bfloat16_speedup(device: "torch.device") -> float:
    """Return how much faster a layer's matrix product is in bfloat16, casting included.

    Timed on a CPU, within half a second: processors and builds of torch differ too much to tell
    from a name. A CUDA device is taken at its word: 2 where it has bfloat16. Others count as 1.
    """
    import torch

    if device.type == "cuda":
        return 2.0 if torch.cuda.is_bf16_supported(including_emulation=False) else 1.0
    if device.type != "cpu":
        return 1.0
    x, weight = torch.full((512, 384), 0.5), torch.full((1536, 384), 0.01)
    best = dict.fromkeys((Precision.FLOAT32, Precision.BFLOAT16), math.inf)
    until = time.perf_counter() + MAX_TIMING_S
    with torch.no_grad():
        for timing in range(TIMINGS):  # the least counts: some warm up, some are interrupted
            if timing and time.perf_counter() > until:
                break
            for precision in best:
                began = time.perf_counter()
                with passes(precision, device):
                    torch.nn.functional.linear(x, weight)
                best[precision] = min(best[precision], time.perf_counter() - began)
    return best[Precision.FLOAT32] / best[Precision.BFLOAT16]
