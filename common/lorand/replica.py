"""A replica: the trainable tensors of a model, kept equal to w(A), bit for bit."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from lorand.coefficients import Coefficients, zeros
from lorand.directions import Pool, seed_keys
from lorand.displacement import Displacement, Target, displacement
from lorand.errors import ModelError
from lorand.kernels import Backend, backend_for
from lorand.manifest import Manifest
from lorand.transform import fwht_float

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

OnGradient = Callable[[str, torch.Tensor], None]
"""Takes a tensor's name and its gradient, which is freed afterwards."""


class Replica(ABC):
    """Weights w(A), or w(A + c·e_k) inside `perturbed`; written when somebody needs them.

    `CopyReplica` keeps them beside the base weights, `lorand.layerwise.LayerwiseReplica` makes
    them as each layer runs. A model runs on them without further ado; who reads its parameters
    himself calls `settle` before.
    """

    def __init__(self, manifest: Manifest, pool: Pool, backend: Backend) -> None:
        """Start at A = 0."""
        self.manifest = manifest
        self.backend = backend
        self._places = {spec.name: (tid, spec) for tid, spec in enumerate(manifest.tensors)}
        self._perturbed: Displacement | None = None
        self._take(pool)

    def set(self, coefficients: Coefficients) -> None:
        """Adopt A, shape (K,): the weights are w(A) from here on.

        The array is kept, not copied: coefficients are never changed in place. Raises ValueError
        when A is of another pool size, LedgerError when its sums could overflow.
        """
        if coefficients.shape != (self.pool.size,):
            raise ValueError(
                f"coefficients of shape {coefficients.shape} on a pool of {self.pool.size}"
            )
        assert self._perturbed is None, "a measurement is under way"
        self._settled = self._displacement(coefficients)
        self.coefficients = coefficients
        self._moved()

    def fold(self, coefficients: Coefficients, pool: Pool) -> None:
        """Have w(A) for the base, and A = 0 on another pool (DESIGN §2 step 9).

        Float32 weights alone are added pool by pool without another rounding: raises ModelError
        for others.
        """
        if any(spec.dtype != "float32" for spec in self.manifest.tensors):
            raise ModelError(
                'only float32 weights move to another pool; set model.dtype = "float32"'
            )
        self.set(coefficients)
        self._fold()
        self._take(pool)

    def _take(self, pool: Pool) -> None:
        """Have directions of this pool, A = 0."""
        self.pool = pool
        self._keys = seed_keys(pool) if pool.family == "independent" else []
        self.set(zeros(pool.size))

    @abstractmethod
    def _fold(self) -> None:
        """Write the weights over the base weights."""

    @contextmanager
    def perturbed(self, index: int, quanta: int) -> Iterator[None]:
        """Within it the weights are w(A + quanta · e_index); A itself stays.

        They are written from the base, never by adding and subtracting, so that nothing has to be
        restored between two perturbations. Raises LedgerError when sums could overflow.
        """
        assert self._perturbed is None, "perturbations do not nest"
        self._perturbed = self._settled.moved(index, quanta)
        self._moved()
        try:
            self.ready()
            yield
        finally:
            self._perturbed = None
            self._moved()

    @abstractmethod
    def settle(self) -> None:
        """Write the weights where they are not yet what they should be."""

    def ready(self) -> None:
        """Have the module run at the weights it should have, whatever its parameters hold."""
        self.settle()

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and weights of each tensor; a tensor may be gone when the next is yielded."""

    @abstractmethod
    def on_gradient(self, call: OnGradient) -> None:
        """Have backward passes hand over each tensor's gradient as it is known, and free it."""

    def digest(self) -> bytes:
        """Return SHA-256 over name and bytes of all trainable weights: equal on all replicas."""
        total = hashlib.sha256()
        for name, tensor in self.weights():
            total.update(name.encode() + b"\0")
            total.update(tensor_bytes(tensor))
        return total.digest()

    def project(self, name: str, gradient: torch.Tensor, shares: torch.Tensor) -> None:
        """Add one tensor's share of Zᵀg to `shares`, shape (K,), by bucket (hadamard) or by seed.

        Begin with `kernels.zero_sums`; after all tensors call `scalars`.
        """
        tid, spec = self._places[name]
        factor = 2.0**spec.scale_exponent
        if self.pool.family == "independent":
            self.backend.project_independent(gradient, self._keys, shares, tid=tid, factor=factor)
        else:
            self.backend.project(gradient, shares, key=self.pool.key, tid=tid, factor=factor)

    def scalars(self, shares: torch.Tensor) -> NDArray[np.float64]:
        """Return Zᵀg, shape (K,), from the shares that `project` summed."""
        sums: NDArray[np.float64] = shares.cpu().numpy()
        return sums if self.pool.family == "independent" else fwht_float(sums)

    def _displacement(self, coefficients: Coefficients) -> Displacement:
        return displacement(
            coefficients,
            self.pool,
            self.backend,
            keys=self._keys,
            scale_exponents=self._scale_exponents(),
        )

    def _scale_exponents(self) -> frozenset[int]:
        """Return those that targets may have."""
        return frozenset(spec.scale_exponent for spec in self.manifest.tensors)

    def _target(self, name: str, base: torch.Tensor, out: torch.Tensor) -> Target:
        tid, spec = self._places[name]
        return Target(base, out, tid, spec.scale_exponent)

    def _write(self, targets: Sequence[Target]) -> None:
        """Write weights, as they should be now."""
        (self._perturbed or self._settled).write(targets)

    def _moved(self) -> None:  # noqa: B027 - a replica that keeps no weights has nothing to note
        """Note that the weights should be others now."""


class WholeReplica(Replica):
    """The model's own parameters hold w(A), whole; they are overwritten in place.

    `tensors` maps the manifest's names to those parameters. Raises ModelError when names, shapes or
    dtypes are not the manifest's.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        manifest: Manifest,
        pool: Pool,
        backend: Backend | None = None,
    ) -> None:
        """Take the parameters, which hold the base weights."""
        check_tensors(tensors, manifest)
        self._parameters = {spec.name: tensors[spec.name] for spec in manifest.tensors}
        self._live = {name: t.detach() for name, t in self._parameters.items()}
        self._hooks: list[RemovableHandle] = []
        self._call: OnGradient | None = None
        self._stale = True
        first = next(iter(self._live.values()))
        super().__init__(manifest, pool, backend or backend_for(first.device))

    @property
    def live(self) -> Mapping[str, torch.Tensor]:
        """The model's own tensors, settled, by name."""
        self.settle()
        return self._live

    @property
    def parameters(self) -> Mapping[str, torch.Tensor]:
        """The model's own parameters by name, for those who step on them."""
        return self._parameters

    def disturbed(self) -> None:
        """Note that others wrote to the parameters: they are written again when next needed."""
        self._stale = True

    @abstractmethod
    def direction(self, index: int) -> dict[str, torch.Tensor]:
        """Return z_index · 2^s of each tensor by name, in its shape, dtype and device."""

    @abstractmethod
    def _write_all(self) -> None:
        """Write all weights, as they should be now."""

    def settle(self) -> None:
        """See Replica: one pass over the weights, whatever K is, or none."""
        if self._stale:
            self._write_all()
            self._stale = False

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See Replica."""
        yield from self.live.items()

    def on_gradient(self, call: OnGradient) -> None:
        """See Replica."""
        for hook in self._hooks:
            hook.remove()
        self._call, self._hooks = call, []
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(True)
            self._hooks.append(hand_over(name, parameter, call))

    @contextmanager
    def gradients_to(self, call: OnGradient) -> Iterator[None]:
        """Within it another call gets the gradients."""
        usual = self._call
        self.on_gradient(call)
        try:
            yield
        finally:
            if usual is not None:
                self.on_gradient(usual)

    def _one(self, index: int) -> Coefficients:
        """The coefficients of z_index itself."""
        one = zeros(self.pool.size)
        one[index] = 1 << self.pool.quantum_exponent
        return one

    def _moved(self) -> None:
        self._stale = True


class CopyReplica(WholeReplica):
    """Base weights (copied at construction) beside the model's own parameters."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        manifest: Manifest,
        pool: Pool,
        backend: Backend | None = None,
    ) -> None:
        """Copy the base weights."""
        super().__init__(tensors, manifest, pool, backend)
        self.base = {
            name: t.clone(memory_format=torch.contiguous_format) for name, t in self._live.items()
        }
        self._targets = [self._target(n, self.base[n], out) for n, out in self._live.items()]

    @staticmethod
    def of(module: nn.Module, manifest: Manifest, pool: Pool) -> "CopyReplica":
        """Return the replica of a module, which from now on only runs on settled weights."""
        return settling(module, CopyReplica(dict(module.named_parameters()), manifest, pool))

    def drift(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each tensor's name and what its weights are away from w(A)."""
        for target in self._targets:
            name = self.manifest.tensors[target.tid].name
            should_be = torch.empty_like(target.out)
            self._write([Target(target.base, should_be, target.tid, target.scale_exponent)])
            yield name, target.out - should_be

    def direction(self, index: int) -> dict[str, torch.Tensor]:
        """See WholeReplica: ±2^s."""
        made = {name: torch.zeros_like(tensor) for name, tensor in self._live.items()}
        targets = [self._target(name, tensor, tensor) for name, tensor in made.items()]
        self._displacement(self._one(index)).write(targets)
        return made

    def _write_all(self) -> None:
        self._write(self._targets)

    def _fold(self) -> None:
        self._write([self._target(name, base, base) for name, base in self.base.items()])


_Whole = TypeVar("_Whole", bound=WholeReplica)


def settling(module: nn.Module, replica: _Whole) -> _Whole:
    """Return the replica of a module, which from now on only runs on its replica's weights."""
    module.register_forward_pre_hook(lambda *_: replica.ready())
    return replica


def hand_over(name: str, leaf: torch.Tensor, call: OnGradient) -> RemovableHandle:
    """Have a leaf tensor's gradient handed to `call` and freed as soon as backward yields it."""

    def take(tensor: torch.Tensor) -> None:
        gradient, tensor.grad = tensor.grad, None
        assert gradient is not None
        call(name, gradient)

    handle: RemovableHandle = leaf.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
    return handle


def check_tensors(tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
    """Raise ModelError unless the manifest's tensors are among these, as it says they are."""
    for spec in manifest.tensors:
        tensor = tensors.get(spec.name)
        if tensor is None:
            raise ModelError(f"the run trains {spec.name!r}, which this model does not have")
        if tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES.get(spec.dtype):
            raise ModelError(
                f"{spec.name!r} is {spec.dtype} {spec.shape} in the run, but "
                f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} in this model"
            )


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    array: Any = flat.numpy()  # numpy's types do not say that an array is a buffer
    return memoryview(array)
