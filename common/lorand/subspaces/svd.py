"""GaLore's basis: singular vectors of a gradient. For a worker's own steps, never for replicas."""

import re
from typing import TYPE_CHECKING

import torch

from lorand.manifest import TensorSpec
from lorand.subspaces.basis import side
from lorand.subspaces.int8 import Int4, Int8
from lorand.subspaces.lifts import Lift

if TYPE_CHECKING:
    from lorand.config import RunConfig


def has_basis(config: "RunConfig", spec: TensorSpec) -> bool:
    """Return whether a tensor's local steps stay in a subspace of `subspace.rank`."""
    section = config.subspace
    if len(spec.shape) != 2 or min(spec.shape) <= section.rank:
        return False
    return bool(re.search(section.targets, spec.name))


class Svd(Lift):
    """The r singular vectors with the largest values, along a matrix's smaller side.

    Right ones of G = U Σ Vᵀ for m ≥ n, P = V[:, :r] and R = G P, else left ones (Zhao et al., ICML
    2024, §4). SVD in float32 of whatever library torch has: its bits and signs differ between
    machines.
    """

    def __init__(self, live: torch.Tensor, spec: TensorSpec, gradient: torch.Tensor) -> None:
        """Take the live weights for the base, and the basis of a gradient, in 4 bits."""
        super().__init__(live, spec)
        self._side = side(spec)
        left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
        rows = right[: spec.rank] if self._side == 1 else left[:, : spec.rank].T
        self._rows = Int4.of(rows.contiguous())
        self.bind()

    def bind(self, stored: Int8 | None = None) -> None:
        """See Lift."""
        self._base = self.live.clone()

    def write(self, coordinates: torch.Tensor) -> None:
        """See Lift."""
        self.live.copy_(self._base.float() + self.lifted(coordinates))

    def lifted(self, coordinates: torch.Tensor) -> torch.Tensor:
        """See Lift."""
        rows = self._rows.dense() * self.factor
        return coordinates @ rows if self._side == 1 else rows.T @ coordinates

    def gather(self, gradient: torch.Tensor) -> torch.Tensor:
        """See Lift."""
        rows, wide = self._rows.dense(), gradient.float()
        return wide @ rows.T if self._side == 1 else rows @ wide

    @property
    def kept_bytes(self) -> int:
        """See Lift."""
        return self._base.nbytes + self._rows.nbytes
