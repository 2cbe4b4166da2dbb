"""From coordinates to weights and back: the linear lift of each kind, bit for bit the same.

A lift is bound to a live tensor at the start of a pool and keeps what it needs of the base weights.
Coordinates are float32, written by a kernel; from there only integer-valued products, powers of two
and one rounding an operation follow, so that no order of summation can change a bit.
"""

from abc import ABC, abstractmethod
from typing import Final

import numpy as np
import torch

from lorand.manifest import TensorSpec
from lorand.subspaces import cosines
from lorand.subspaces.basis import Basis, Indices, length, side
from lorand.subspaces.int8 import Int8

GRID_BITS = 22
"""Of a coordinate before it is multiplied by cosines, relative to the tensor's largest: a sum over
rank ≤ 2,048 of products with 20 bits is then below 2^53, exact in float64 in any order."""
TILE: Final = 1 << 20
"""Numbers of a product in float64 at a time: a product of 4,096 x 1,024 at once takes 1.5 to 2.7
times as long, and smaller tiles have threads wait for each other more often (`tiled_vs_whole` in
benchmarks/results/subspace_forward.json)."""


class Lift(ABC):
    """w = cast(fl32(fl32(w0) + 2^s · lift(U))) for one tensor and its coordinates U.

    The base weights are those that the live tensor holds when a lift is made or bound anew. Where
    they are `stored` in 8 bits, that is kept instead of a copy.
    """

    def __init__(self, live: torch.Tensor, spec: TensorSpec) -> None:
        """Take the live tensor, which holds the base weights at this moment."""
        self.live, self.spec = live, spec
        self.factor = 2.0**spec.scale_exponent

    @abstractmethod
    def bind(self, stored: Int8 | None = None) -> None:
        """Have the weights that the live tensor holds now for the base."""

    @abstractmethod
    def write(self, coordinates: torch.Tensor) -> None:
        """Write w of these coordinates, float32, into the live tensor."""

    @abstractmethod
    def lifted(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Return what coordinates add to the weights, in the tensor's shape, float32."""

    @abstractmethod
    def gather(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the transposed lift of a gradient, without 2^s: float32 coordinates."""

    @property
    @abstractmethod
    def kept_bytes(self) -> int:
        """Memory that the lift keeps beside the live weights."""


class Full(Lift):
    """A tensor that is its own coordinates."""

    def __init__(self, live: torch.Tensor, spec: TensorSpec, stored: Int8 | None = None) -> None:
        """Keep the base weights."""
        super().__init__(live, spec)
        self._base = _Base(live, stored)

    def bind(self, stored: Int8 | None = None) -> None:
        """See Lift."""
        self._base.follow(self.live, stored)

    def write(self, coordinates: torch.Tensor) -> None:
        """See Lift."""
        self.live.copy_(self._base.dense().float() + coordinates * self.factor)

    def lifted(self, coordinates: torch.Tensor) -> torch.Tensor:
        """See Lift."""
        return coordinates * self.factor

    def gather(self, gradient: torch.Tensor) -> torch.Tensor:
        """See Lift."""
        return gradient.float()

    @property
    def kept_bytes(self) -> int:
        """See Lift."""
        return self._base.nbytes


class Coordinate(Lift):
    """Columns (or rows) of a matrix; all others stay as they are and are not copied."""

    def __init__(self, live: torch.Tensor, spec: TensorSpec, indices: Indices) -> None:
        """Copy these columns."""
        super().__init__(live, spec)
        self._side = side(spec)
        self._indices = torch.from_numpy(np.array(indices)).to(live.device)
        self.bind()

    def bind(self, stored: Int8 | None = None) -> None:
        """See Lift."""
        self._base = self.live.index_select(self._side, self._indices)

    def write(self, coordinates: torch.Tensor) -> None:
        """See Lift."""
        moved = (self._base.float() + coordinates * self.factor).to(self.live.dtype)
        self.live.index_copy_(self._side, self._indices, moved)

    def lifted(self, coordinates: torch.Tensor) -> torch.Tensor:
        """See Lift."""
        result = torch.zeros(self.spec.shape, device=self.live.device)
        return result.index_copy_(self._side, self._indices, coordinates * self.factor)

    def gather(self, gradient: torch.Tensor) -> torch.Tensor:
        """See Lift."""
        return gradient.index_select(self._side, self._indices).float()

    @property
    def kept_bytes(self) -> int:
        """See Lift."""
        return self._base.nbytes + self._indices.nbytes


class Cosine(Lift):
    """Rows of an integer cosine transform along a matrix's smaller side (FFT-based subspaces,
    arXiv 2505.17967), after random signs where the basis has them.

    U goes to a grid of 22 bits of its own largest, so that U · C is a product of integers.
    """

    def __init__(
        self,
        live: torch.Tensor,
        spec: TensorSpec,
        tid: int,
        basis: Basis,
        stored: Int8 | None = None,
    ) -> None:
        """Keep the base weights, and take the basis C: shape (rank, n), integers below 2^21."""
        super().__init__(live, spec)
        self._side, n = side(spec), length(spec)
        rows = cosines.rows(n, basis.indices[tid]).astype(np.float32)
        if tid in basis.signs:
            rows *= basis.signs[tid]
        self._rows = torch.from_numpy(rows).to(live.device)
        self._exponent = cosines.exponent(n) - cosines.BITS
        self._base = _Base(live, stored)

    def bind(self, stored: Int8 | None = None) -> None:
        """See Lift."""
        self._base.follow(self.live, stored)

    def write(self, coordinates: torch.Tensor) -> None:
        """See Lift; a tile at a time, since the product in float64 is larger than the weights."""
        base, factors = self._base.dense(), self._exact(coordinates)
        if factors is None:
            self.live.copy_(base.float() + 0.0)  # as if a product of 0 were added: no −0
            return
        left, right = factors
        rows, columns = self.spec.shape
        on_cpu = self.live.device.type == "cpu"
        height = max(1, TILE // columns) if on_cpu else rows
        for start in range(0, rows, height):
            tile = slice(start, start + height)
            live, product = self.live[tile], left[tile] @ right
            if live.dtype == torch.float32:
                live.copy_(product).add_(base[tile])
            else:
                live.copy_(product.float().add_(base[tile].float()))

    def lifted(self, coordinates: torch.Tensor) -> torch.Tensor:
        """See Lift."""
        factors = self._exact(coordinates)
        if factors is None:
            return torch.zeros(self.spec.shape, device=self.live.device)
        return (factors[0] @ factors[1]).float()

    def factors(self, coordinates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return L, (m, r), and R, (r, n), float32: L · R is what is lifted, but for rounding."""
        scaled = coordinates * (self.factor * 2.0**self._exponent)
        return (scaled, self._rows) if self._side == 1 else (self._rows.T, scaled)

    def _exact(self, coordinates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the factors in float64, of integers times a power of two; None where all are 0.

        Each sum of their products is one such integer below 2^53, exact in any order.
        """
        largest = float(coordinates.abs().max())
        if largest == 0.0:
            return None
        grid = int(np.frexp(largest)[1]) - GRID_BITS
        integers = torch.round(coordinates.double() * 2.0**-grid)
        scaled = integers.mul_(self.factor * 2.0 ** (grid + self._exponent))
        rows = self._rows.double()
        return (scaled, rows) if self._side == 1 else (rows.T, scaled)

    def gather(self, gradient: torch.Tensor) -> torch.Tensor:
        """See Lift: in float32, since only its sender needs it."""
        rows = self._rows * 2.0**self._exponent
        wide = gradient.float()
        return wide @ rows.T if self._side == 1 else rows @ wide

    @property
    def kept_bytes(self) -> int:
        """See Lift."""
        return self._base.nbytes + self._rows.nbytes


class _Base:
    """Base weights: a copy, or what they are stored as."""

    def __init__(self, live: torch.Tensor, stored: Int8 | None) -> None:
        self._held: torch.Tensor | Int8 = (
            live.clone(memory_format=torch.contiguous_format) if stored is None else stored
        )

    def follow(self, live: torch.Tensor, stored: Int8 | None) -> None:
        if stored is not None:
            self._held = stored
        elif isinstance(self._held, torch.Tensor):
            self._held.copy_(live)

    def dense(self) -> torch.Tensor:
        return self._held if isinstance(self._held, torch.Tensor) else self._held.dense()

    @property
    def nbytes(self) -> int:
        return self._held.nbytes


def lift(
    live: torch.Tensor,
    spec: TensorSpec,
    tid: int,
    basis: Basis | None,
    stored: Int8 | None = None,
) -> Lift:
    """Return the lift of a tensor: on a basis, or whole where it has none."""
    if basis is None or not spec.rank:
        return Full(live, spec, stored)
    if basis.kind == "dct":
        return Cosine(live, spec, tid, basis, stored)
    return Coordinate(live, spec, basis.indices[tid])
