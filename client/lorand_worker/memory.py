"""Where a worker keeps its weights, by what its memory can hold."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from lorand import free_memory

if TYPE_CHECKING:  # commands are quick to start: torch is imported when it is needed
    import torch

SPARE = 0.8
"""Share of the free memory that weights may take; the rest is for activations."""


class Weights(StrEnum):
    """`copy`: base beside working weights. `layerwise`: made as each layer runs, from the base."""

    AUTO = "auto"
    COPY = "copy"
    LAYERWISE = "layerwise"


def choose(
    asked: Weights, *, quantised: bool, needed_bytes: int, free: int | None
) -> tuple[Weights, str]:
    """Return copy or layerwise, and why, as a sentence for the worker's owner.

    `needed_bytes` is what a copy would take of the `free` bytes of the device (None: unknown).
    """
    if asked != Weights.AUTO:
        return asked, f"weights: {asked}"
    if quantised:
        return Weights.LAYERWISE, "weights: layerwise, since the run's base model is quantised"
    if not fits(needed_bytes, free):
        return Weights.LAYERWISE, (
            f"weights: layerwise, since a copy needs {needed_bytes / 1e9:.1f} GB and little room "
            f"for a batch would be left of {(free or 0) / 1e9:.1f} GB"
        )
    return Weights.COPY, "weights: copy"


def fits(needed_bytes: int, free: int | None) -> bool:
    """Return whether weights leave room for activations; true where nobody knows."""
    return free is None or needed_bytes <= SPARE * free


def free_bytes(device: "torch.device", root: Path = Path("/")) -> int | None:
    """Return the memory that can still be taken on a device; None where it is not known.

    On the CPU see `lorand.free_memory`.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    return free_memory.free_bytes(root)
