"""Which columns of each matrix a worker votes for: those with most of its own gradient."""

from collections.abc import Callable, Sequence
from typing import Final

import torch

from lorand.manifest import TensorSpec
from lorand.replica import WholeReplica
from lorand.subspaces import cosines
from lorand.subspaces.basis import largest, length, side
from lorand.subspaces.elections import Columns
from lorand_worker.estimators import Loss, finite

BATCHES: Final = 4
"""A vote is of so many batches, whose energies add up."""


def vote(
    replica: WholeReplica,
    loss: Loss,
    batches: Callable[[], Sequence[int]],
    elect: Sequence[int],
    kind: str,
) -> Columns:
    """Return the `rank` columns (or rows) with most gradient energy ‖G_:,j‖² of each tensor.

    `elect` are numbers of tensors. For kind `dct` columns are of the transformed gradient, G Cᵀ,
    as in FFT-based subspaces (arXiv 2505.17967) but by the squared norm, which the captured energy
    is made of. Raises NonFiniteLoss.
    """
    energies = {tid: torch.zeros(0) for tid in elect}
    specs = replica.manifest.tensors
    number = {spec.name: tid for tid, spec in enumerate(specs)}

    def add(name: str, gradient: torch.Tensor) -> None:
        tid = number[name]
        if tid in energies:
            now = energy(specs[tid], gradient, kind)
            energies[tid] = energies[tid] + now if energies[tid].numel() else now

    replica.settle()
    with replica.gradients_to(add):
        for _ in range(BATCHES):
            value = loss(batches())
            finite(value.detach())
            value.backward()  # type: ignore[no-untyped-call]
    return {tid: largest(now.cpu().numpy(), specs[tid].rank) for tid, now in energies.items()}


def energy(spec: TensorSpec, gradient: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the squared norm of each column (or row) of a gradient, shape (n,), float32."""
    wide = gradient.detach().float()
    wide = wide if side(spec) == 1 else wide.T
    if kind == "dct":
        n = length(spec)
        rows = torch.from_numpy(cosines.table(n)).to(wide.device).float()
        wide = wide @ rows.T * 2.0**-cosines.BITS
    return wide.square().sum(dim=0)
