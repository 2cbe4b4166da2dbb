"""The two kernels everything is built of, behind one contract.

`materialise(base, A) -> weights` perturbs, restores, applies a round, rebuilds and joins;
`project(gradient) -> Zᵀ·gradient` turns a gradient into scalars. `reference` (torch, in chunks) is
the definition; every backend gives the same bits in `materialise`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lorand.coefficients import Coefficients
from lorand.philox import Key
from lorand.transform import Table


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor is materialised: from base into out, with the table of that number."""

    base: torch.Tensor
    out: torch.Tensor
    tid: int
    table: int


class Backend(Protocol):
    """What a kernel backend offers. Tensors are dense; element i counts row-major."""

    @property
    def name(self) -> str:
        """The word a user reads: `reference`, `cpu`, `gpu`."""

    def materialise(
        self, base: torch.Tensor, table: Table, out: torch.Tensor, *, key: Key, tid: int
    ) -> None:
        """Write out[i] = cast(fl32(fl32(base[i]) + D[i]·table[(i mod K) xor r_b])).

        base and out share shape and dtype (float32, bfloat16 or float16) and may be the same
        tensor; table has shape (K,). D and r are those of tensor number tid under key. A table is
        not changed once it was given: a backend may keep its copy of it on the device.
        """

    def materialise_all(
        self, places: Sequence[Place], tables: Sequence[Table], *, key: Key
    ) -> None:
        """As `materialise` for each place: small tensors then cost little more than their weights.

        tables have one shape (K,); a place says which one it takes.
        """

    def project(
        self,
        gradient: torch.Tensor,
        sums: torch.Tensor,
        *,
        key: Key,
        tid: int,
        factor: float = 1.0,
    ) -> None:
        """Add factor · Σ_i [(i mod K) xor r_b = e] D[i]·gradient[i] to each bucket sums[e].

        sums: shape (K,), of `zero_sums` for the gradient's device. Over all tensors of a model,
        Zᵀ·gradient is their Walsh–Hadamard transform (`transform.fwht_float`).
        """

    def materialise_independent(
        self,
        base: torch.Tensor,
        keys: Sequence[Key],
        coefficients: Coefficients,
        out: torch.Tensor,
        *,
        tid: int,
        exponent: int,
    ) -> None:
        """Write out[i] = cast(fl32(fl32(base[i]) + fl32(2^exponent · fl32(Σ_s A_s D_s[i])))).

        One 64-bit key and one integer a direction; the sum is exact in int64.
        """

    def project_independent(
        self,
        gradient: torch.Tensor,
        keys: Sequence[Key],
        sums: torch.Tensor,
        *,
        tid: int,
        factor: float = 1.0,
    ) -> None:
        """Add factor · Σ_i D_s[i]·gradient[i] to sums[s] for each key, shape (len(keys),)."""


def backend_for(device: torch.device) -> Backend:
    """Return the fastest backend of this build for a device."""
    from lorand.kernels import reference

    if device.type == "cpu":
        try:
            from lorand.kernels import cpu
        except ImportError:  # numba is optional: the reference is slower, never different.
            return reference.ReferenceBackend()
        return cpu.CpuBackend()
    if device.type == "cuda":  # torch's name for ROCm devices too
        try:
            from lorand.kernels import gpu
        except ImportError:  # Triton comes with torch's own builds, not with every platform's.
            return reference.ReferenceBackend()
        return gpu.GpuBackend()
    return reference.ReferenceBackend()


def zero_sums(count: int, device: torch.device) -> torch.Tensor:
    """Return zeros, shape (count,), float64, for projected gradients that are on this device.

    On the CPU where torch's devices need not have float64: on all but CUDA and ROCm ones.
    """
    place = device if device.type == "cuda" else torch.device("cpu")
    return torch.zeros(count, dtype=torch.float64, device=place)


def check_pair(base: torch.Tensor, out: torch.Tensor) -> None:
    """Raise ValueError unless out can hold the materialised base."""
    if base is not out and (
        base.shape != out.shape or base.dtype != out.dtype or base.device != out.device
    ):
        raise ValueError(
            f"base and out must agree: {tuple(base.shape)} {base.dtype} on {base.device} against "
            f"{tuple(out.shape)} {out.dtype} on {out.device}"
        )
    if base.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weights must be float32, bfloat16 or float16, not {base.dtype}")
