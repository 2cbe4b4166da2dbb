"""A replica whose directions act on the coordinates of subspaces, which lifts take to weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from lorand.codec import Floats
from lorand.coefficients import Coefficients
from lorand.directions import Pool
from lorand.displacement import Target
from lorand.kernels import Backend, zero_sums
from lorand.manifest import Manifest
from lorand.replica import WholeReplica, settling
from lorand.subspaces.basis import Basis, Layout, same
from lorand.subspaces.factored import LinearLayers
from lorand.subspaces.int8 import Int8, Rounding, Stochastic
from lorand.subspaces.lifts import Cosine, Lift, lift
from lorand.subspaces.state import ReplicatedState


class SubspaceReplica(WholeReplica):
    """The coordinates of all tensors are one vector of q numbers, U = u · Z·A, tensor number 0 of
    the pool's kernels; each tensor is w = cast(fl32(fl32(w0) + 2^s · lift(U))).

    Memory beside the live weights is the q coordinates and what the lifts keep: with columns by
    index that is these columns alone. With a `state`, a pool that is closed moves the base weights
    by the state's step instead of by what was committed.

    On a cosine basis linear layers may keep the weights of some U' within `perturbed` and add what
    they are away, as `subspaces.factored` has it; then U', q numbers, is kept as well.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        manifest: Manifest,
        pool: Pool,
        backend: Backend | None = None,
        *,
        state: ReplicatedState | None = None,
        rounding: Literal["none", "nearest", "stochastic"] = "none",
    ) -> None:
        """Take the parameters. Raises ModelError when they are not the manifest's.

        `rounding` is that of matrices in subspaces to 8 bits, with each new pool.
        """
        self._lifts: dict[str, Lift] = {}
        self._basis: Basis | None = None
        self.state, self._rounding = state, rounding
        self._flat = torch.empty(0)
        self._layers = LinearLayers()
        self._held: torch.Tensor | None = None
        """U' of the live weights, shape (q,); None where it is not known, or nobody asks."""
        self._gradient: torch.Tensor | None = None
        super().__init__(tensors, manifest, pool, backend)

    @staticmethod
    def of(module: nn.Module, manifest: Manifest, pool: Pool, **options: Any) -> "SubspaceReplica":
        """Return the replica of a module, which from now on only runs on its replica's weights."""
        tensors = dict(module.named_parameters())
        replica = SubspaceReplica(tensors, manifest, pool, **options)
        ranked = {name for name, part, *_ in replica.parts() if isinstance(part, Cosine)}
        replica._layers = LinearLayers.of(module, ranked)
        return settling(module, replica)

    @property
    def kept_bytes(self) -> int:
        """Memory beside the live weights: coordinates, bases, and the optimizer's state."""
        kept = sum(part.kept_bytes for part in self._lifts.values()) + self._flat.nbytes
        kept += 0 if self._held is None else self._held.nbytes
        return kept + (self.state.nbytes if self.state else 0)

    def parts(self) -> Iterator[tuple[str, Lift, slice, tuple[int, ...]]]:
        """Yield each tensor's name, its lift, and place and shape of its coordinates."""
        for _, spec, place, shape in self.layout.places():
            yield spec.name, self._lifts[spec.name], place, shape

    def lift(self, name: str) -> Lift:
        """Return the lift of a tensor in the present pool."""
        return self._lifts[name]

    def coordinates(self) -> torch.Tensor:
        """Return U as it should be now, shape (q,), float32; overwritten by the next call."""
        self._flat.zero_()
        self._write([Target(self._flat, self._flat, 0, 0)])
        return self._flat

    def write_at(self, coordinates: torch.Tensor) -> None:
        """Write the weights of these coordinates, shape (q,); `disturbed` brings w(A) back."""
        self._layers.written()
        with torch.no_grad():
            for _, part, place, shape in self.parts():
                part.write(coordinates[place].view(shape))
        self._held = coordinates.clone() if self._layers.chosen else None

    def set(self, coefficients: Coefficients) -> None:
        """See Replica."""
        super().set(coefficients)
        self._layers.choose()

    @contextmanager
    def perturbed(self, index: int, quanta: int) -> Iterator[None]:
        """See Replica; who reads parameters within it calls `settle` before."""
        with self._layers.running(), super().perturbed(index, quanta):
            yield

    def ready(self) -> None:
        """See Replica: within `perturbed`, layers that were chosen keep the weights they hold."""
        if self._perturbed is None or self._held is None or not self._layers.chosen:
            self.settle()
        elif self._stale:
            self._move_to(self.coordinates(), self._held)
            self._stale = False

    def settle(self) -> None:
        """See Replica."""
        self._stale |= self._layers.active
        super().settle()

    def disturbed(self) -> None:
        """See WholeReplica."""
        super().disturbed()
        self._held = None

    @torch.no_grad()
    def _move_to(self, coordinates: torch.Tensor, held: torch.Tensor) -> None:
        """Write these coordinates, but where layers were chosen have them add the difference."""
        for name, part, place, shape in self.parts():
            if name in self._layers.chosen and isinstance(part, Cosine):
                away = coordinates[place] - held[place]
                self._layers.away(name, part.factors(away.view(shape)))
            else:
                part.write(coordinates[place].view(shape))
                held[place] = coordinates[place]

    def direction(self, index: int) -> dict[str, torch.Tensor]:
        """See WholeReplica."""
        one = torch.zeros_like(self._flat)
        self._displacement(self._one(index)).write([Target(one, one, 0, 0)])
        return {
            name: part.lifted(one[place].view(shape)).to(part.live.dtype)
            for name, part, place, shape in self.parts()
        }

    def project(self, name: str, gradient: torch.Tensor, shares: torch.Tensor) -> None:
        """See Replica: kept as coordinates until `scalars`."""
        tid, spec = self._places[name]
        part = self._lifts[name].gather(gradient.detach()).reshape(-1)
        end = self.layout.ends[tid]
        self._gathered()[end - len(part) : end] = part * 2.0**spec.scale_exponent

    def scalars(self, shares: torch.Tensor) -> Floats:
        """See Replica."""
        gathered, self._gradient = self._gathered(), None
        return self.scalars_of(gathered, shares)

    def scalars_of(self, coordinates: torch.Tensor, shares: torch.Tensor | None = None) -> Floats:
        """Return Zᵀ of coordinates, shape (q,): (K,), on top of what is in `shares`."""
        if shares is None:
            shares = zero_sums(self.pool.size, coordinates.device)
        if self.pool.family == "independent":
            self.backend.project_independent(coordinates, self._keys, shares, tid=0)
        else:
            self.backend.project(coordinates, shares, key=self.pool.key, tid=0)
        return super().scalars(shares)

    def _take(self, pool: Pool) -> None:
        """Have the directions and the basis of this pool; the live weights are its base."""
        basis = pool.basis
        if self.state is not None:
            self.state.follow(basis)
            basis = None if self.state.whole else basis
        stored = self._snapped(pool)
        if self._lifts and same(self._basis, basis):
            for name, part in self._lifts.items():
                part.bind(stored.get(name))
        else:
            self._bind(basis, stored)
        self._gradient = self._held = None
        super()._take(pool)

    def _snapped(self, pool: Pool) -> dict[str, Int8]:
        """Round matrices with a subspace to 8 bits in place; return their codes.

        Q-GaLore (arXiv 2407.08296), but once a pool and not once a step: between two pools the
        coordinates hold what was learned, so that no step is too small for the grid.
        """
        stored: dict[str, Int8] = {}
        for tid, spec in enumerate(self.manifest.tensors):
            if spec.rank and self._rounding != "none":
                live, noise = self._live[spec.name], Stochastic(pool.key, pool.index, tid)
                rounding: Rounding = "nearest" if self._rounding == "nearest" else noise
                stored[spec.name] = Int8.of(live, rounding)
                live.copy_(stored[spec.name].dense())
        return stored

    def _bind(self, basis: Basis | None, stored: Mapping[str, Int8]) -> None:
        self.layout = Layout(self.manifest, whole=basis is None)
        self._lifts.clear()  # gone before there are others
        for tid, spec in enumerate(self.manifest.tensors):
            live, kept = self._live[spec.name], stored.get(spec.name)
            self._lifts[spec.name] = lift(live, spec, tid, basis, kept)
        if self._flat.shape != (self.layout.size,):
            device = next(iter(self._live.values())).device
            self._flat = torch.empty(self.layout.size, device=device)
        self._basis = basis

    def _fold(self) -> None:
        """See Replica; with a state, the weights move by its step for what the pool committed."""
        if self.state is None:
            self._write_all()
            return
        moved = self.coordinates()
        for tid, spec, place, shape in self.layout.places():
            part = self._lifts[spec.name]
            part.write(self.state.step(tid, moved[place].view(shape), self.pool.index))

    def _write_all(self) -> None:
        self.write_at(self.coordinates())

    def _gathered(self) -> torch.Tensor:
        if self._gradient is None:
            self._gradient = torch.zeros_like(self._flat)
        return self._gradient

    def _scale_exponents(self) -> frozenset[int]:
        return frozenset({0})
