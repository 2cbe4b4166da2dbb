"""Optimizer state in the coordinates of subspaces, kept at every replica alike from the ledger."""

from collections.abc import Callable

import numpy as np
import torch

from lorand.codec import Floats
from lorand.manifest import Manifest, TensorSpec
from lorand.subspaces import state_optimizers
from lorand.subspaces.basis import Basis, Indices, coordinates_shape, length, side
from lorand.subspaces.state_optimizers import Settings, State


class ReplicatedState:
    """A state a tensor, moved on by what the ledger commits.

    A committed U = −η · ĝ is a step along a gradient estimate ĝ whose typical number is 1 (the
    coordinator's SGD is normalised); the weights move by −η · step(ĝ). With `adam` U is in
    coordinates, with `frugal` and `fira` directions act on whole matrices and the state has a
    part. Tensors without a subspace have Adam.
    """

    def __init__(
        self, manifest: Manifest, settings: Settings, rate: Callable[[int], float]
    ) -> None:
        """`rate` gives η of the round after so many commits."""
        self._manifest, self._settings, self._rate = manifest, settings, rate
        self._plain = Settings("adam")
        self._indices: dict[int, Indices] = {}
        self._states: dict[int, State] = {}

    @property
    def whole(self) -> bool:
        """Whether directions act on whole matrices."""
        return self._settings.kind != "adam"

    @property
    def nbytes(self) -> int:
        """Memory of moments and indices."""
        moments = sum(state_optimizers.nbytes(state) for state in self._states.values())
        return moments + sum(indices.nbytes for indices in self._indices.values())

    def follow(self, basis: Basis | None) -> None:
        """Have the state on this basis: of what survives, or reset, as the kind has it."""
        assert basis is not None, "the run file refuses a state without a basis"
        for tid, spec in enumerate(self._manifest.tensors):
            if tid not in self._states:
                self._states[tid] = state_optimizers.start(*_oriented_shape(spec))
            elif spec.rank and not np.array_equal(self._indices[tid], basis.indices[tid]):
                before, after = self._indices[tid], basis.indices[tid]
                self._states[tid] = (
                    state_optimizers.reset(self._states[tid])
                    if self._settings.kind == "frugal"
                    else state_optimizers.carried(self._states[tid], before, after)
                )
            if spec.rank:
                self._indices[tid] = basis.indices[tid]

    def step(self, tid: int, committed: torch.Tensor, number: int) -> torch.Tensor:
        """Return the coordinates by which a tensor moves for what was committed in a round.

        Both of one shape, float32. `number` counts the rounds committed before.
        """
        rate, spec = self._rate(number), self._manifest.tensors[tid]
        if rate == 0.0:
            return torch.zeros_like(committed)
        gradient = committed.double().cpu().numpy() / -rate
        turned = spec.rank > 0 and side(spec) == 0
        gradient = gradient.T if turned else gradient
        shape = gradient.shape
        if not spec.rank:
            gradient = gradient.reshape(-1, 1)
        step = self._step(tid, gradient).reshape(shape) * -rate
        step = np.ascontiguousarray(step.T if turned else step)
        return torch.from_numpy(step).float().to(committed.device)

    def _step(self, tid: int, gradient: Floats) -> Floats:
        """Columns of the gradient, shape (m, n) or (m, r), are along the projected side."""
        spec, state = self._manifest.tensors[tid], self._states[tid]
        if not self.whole or not spec.rank:
            settings = self._settings if spec.rank else self._plain
            self._states[tid], step, _ = state_optimizers.advance(settings, state, gradient, None)
            return step
        inside = self._indices[tid]
        outside = np.setdiff1d(np.arange(length(spec)), inside)
        self._states[tid], first, second = state_optimizers.advance(
            self._settings, state, gradient[:, inside], gradient[:, outside]
        )
        step = np.empty_like(gradient)
        step[:, inside], step[:, outside] = first, second
        return step


def _oriented_shape(spec: TensorSpec) -> tuple[int, int]:
    if not spec.rank:
        return int(np.prod(spec.shape, dtype=np.int64)), 1
    first, second = coordinates_shape(spec)
    return (first, second) if side(spec) == 1 else (second, first)
