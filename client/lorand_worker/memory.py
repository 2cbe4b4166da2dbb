"""Where a worker keeps its weights, by what its memory can hold."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

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

    On the CPU the smaller of what Linux calls available and what the control group leaves.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    return min(
        (bytes_ for bytes_ in (_available(root), _left_in_group(root)) if bytes_ is not None),
        default=None,
    )


def _available(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(sizes[0]) * 1024 if sizes else None


def _left_in_group(root: Path) -> int | None:
    """What a container may still take (control groups, version 2); file pages count as free."""
    group = root / "sys/fs/cgroup"
    try:
        most = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return None
    stat = dict(line.split() for line in lines)
    return most - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
