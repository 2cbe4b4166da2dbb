"""A replica: the trainable tensors of a model, kept equal to w(A), bit for bit."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorand.coefficients import Coefficients, fwht, fwht_float, table, zeros
from lorand.directions import Pool, seed_keys
from lorand.errors import ModelError
from lorand.kernels import Backend, backend_for
from lorand.manifest import Manifest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Replica:
    """Base weights w0 (copied at construction) and live tensors that always hold w(A).

    `tensors` maps the manifest's names to the model's own parameters; they are overwritten in
    place. Raises ModelError when names, shapes or dtypes are not the manifest's.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        manifest: Manifest,
        pool: Pool,
        backend: Backend | None = None,
    ) -> None:
        """Copy the base weights; A starts at zero."""
        check_tensors(tensors, manifest)
        self.manifest = manifest
        self.pool = pool
        self.live = {spec.name: tensors[spec.name].detach() for spec in manifest.tensors}
        self.base = {
            name: t.clone(memory_format=torch.contiguous_format) for name, t in self.live.items()
        }
        self.backend = backend or backend_for(next(iter(self.live.values())).device)
        self.coefficients = zeros(pool.size)
        self._places = {spec.name: (tid, spec) for tid, spec in enumerate(manifest.tensors)}
        self._keys = seed_keys(pool) if pool.family == "independent" else []
        self.restore()  # w(0) differs from w0 where a base weight is −0.0

    def set(self, coefficients: Coefficients) -> None:
        """Adopt A, shape (K,), and materialise it: one pass over the weights, whatever K is.

        The array is kept, not copied: coefficients are never changed in place. Raises ValueError
        when A is of another pool size, LedgerError when its sums could overflow.
        """
        if coefficients.shape != (self.pool.size,):
            raise ValueError(
                f"coefficients of shape {coefficients.shape} on a pool of {self.pool.size}"
            )
        self._materialise(coefficients)
        self.coefficients = coefficients

    def perturb(self, index: int, quanta: int) -> None:
        """Materialise w(A + quanta · e_index); A itself stays. `restore` ends a measurement.

        Each perturbation writes from the base, so none is needed between two of them.
        """
        moved = self.coefficients.copy()
        moved[index] += quanta
        self._materialise(moved)

    def restore(self) -> None:
        """Write w(A) again, from the base; never by subtraction."""
        self._materialise(self.coefficients)

    def project(self, name: str, gradient: torch.Tensor) -> NDArray[np.float64]:
        """Return one tensor's share of Zᵀg in the bucket basis (hadamard) or by seed.

        Shape (K,). Sum the shares of all tensors, then call `scalars`.
        """
        tid, spec = self._places[name]
        factor = 2.0**spec.scale_exponent
        if self.pool.family == "independent":
            return factor * self.backend.project_independent(gradient, self._keys, tid=tid)
        key = self.pool.key
        return factor * self.backend.project(gradient, self.pool.size, key=key, tid=tid)

    def scalars(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return Zᵀg, shape (K,), from the summed shares of `project`."""
        return shares if self.pool.family == "independent" else fwht_float(shares)

    def digest(self) -> bytes:
        """Return SHA-256 over name and bytes of all trainable weights: equal on all replicas."""
        total = hashlib.sha256()
        for name, tensor in self.live.items():
            total.update(name.encode() + b"\0")
            total.update(tensor_bytes(tensor))
        return total.digest()

    def _materialise(self, coefficients: Coefficients) -> None:
        if self.pool.family == "independent":
            self._materialise_independent(coefficients)
            return
        transform = fwht(coefficients)
        tables = {
            s: table(transform, self.pool.quantum_exponent, s)
            for s in {spec.scale_exponent for spec in self.manifest.tensors}
        }
        for tid, spec in enumerate(self.manifest.tensors):
            self.backend.materialise(
                self.base[spec.name],
                tables[spec.scale_exponent],
                self.live[spec.name],
                key=self.pool.key,
                tid=tid,
            )

    def _materialise_independent(self, coefficients: Coefficients) -> None:
        used = np.flatnonzero(coefficients)
        keys = [self._keys[k] for k in used]
        for tid, spec in enumerate(self.manifest.tensors):
            self.backend.materialise_independent(
                self.base[spec.name],
                keys,
                coefficients[used],
                self.live[spec.name],
                tid=tid,
                exponent=spec.scale_exponent - self.pool.quantum_exponent,
            )


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
