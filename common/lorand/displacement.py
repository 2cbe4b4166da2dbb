"""What coefficients add to base weights, ready to be written tensor by tensor.

Nothing is computed twice: the transform of A is kept, a perturbation is derived from it in O(K),
and the tables of all direction scales come from one rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from lorand.coefficients import Coefficients, check_magnitude, check_total, total_magnitude
from lorand.directions import Pool
from lorand.kernels import Backend, Place
from lorand.philox import Key
from lorand.transform import Table, fwht, hadamard_column, tables


@dataclass(frozen=True)
class Target:
    """Tensor number tid of a run, from base into out, which share shape and dtype."""

    base: torch.Tensor
    out: torch.Tensor
    tid: int
    scale_exponent: int


class Displacement(Protocol):
    """Z·A for one A."""

    def moved(self, index: int, quanta: int) -> "Displacement":
        """Return that of A + quanta · e_index. Raises LedgerError beyond the limit of Σ|A|."""

    def write(self, targets: Sequence[Target]) -> None:
        """Write w(A) of each target."""


@dataclass(frozen=True)
class HadamardDisplacement:
    """In a pool of Walsh–Hadamard directions: F = H·A and its tables."""

    backend: Backend
    pool: Pool
    coefficients: Coefficients
    transform: Coefficients
    scale_exponents: frozenset[int]

    def moved(self, index: int, quanta: int) -> "HadamardDisplacement":
        """See Displacement: F ± quanta · H[:, index]."""
        coefficients = _added(self.coefficients, index, quanta, self._magnitude)
        # So |quanta| is below 2^63, and every sum of the new transform below 2^62.
        transform = hadamard_column(index, self.pool.size)
        transform *= quanta
        transform += self.transform
        return HadamardDisplacement(
            self.backend,
            self.pool,
            coefficients,
            transform,
            self.scale_exponents,
        )

    def write(self, targets: Sequence[Target]) -> None:
        """See Displacement."""
        number = {scale: i for i, scale in enumerate(self._tables)}
        places = [Place(t.base, t.out, t.tid, number[t.scale_exponent]) for t in targets]
        self.backend.materialise_all(places, list(self._tables.values()), key=self.pool.key)

    @cached_property
    def _magnitude(self) -> int:
        return total_magnitude(self.coefficients)

    @cached_property
    def _tables(self) -> dict[int, Table]:
        return tables(self.transform, self.pool.quantum_exponent, self.scale_exponents)


@dataclass(frozen=True)
class IndependentDisplacement:
    """Along independent seeds: one key and one integer a direction that A uses."""

    backend: Backend
    pool: Pool
    coefficients: Coefficients
    keys: Sequence[Key]

    def moved(self, index: int, quanta: int) -> "IndependentDisplacement":
        """See Displacement."""
        magnitude = total_magnitude(self.coefficients)
        coefficients = _added(self.coefficients, index, quanta, magnitude)
        return IndependentDisplacement(self.backend, self.pool, coefficients, self.keys)

    def write(self, targets: Sequence[Target]) -> None:
        """See Displacement."""
        keys, coefficients = self._used
        for t in targets:
            exponent = t.scale_exponent - self.pool.quantum_exponent
            self.backend.materialise_independent(
                t.base, keys, coefficients, t.out, tid=t.tid, exponent=exponent
            )

    @cached_property
    def _used(self) -> tuple[list[Key], Coefficients]:
        used = np.flatnonzero(self.coefficients)
        return [self.keys[k] for k in used.tolist()], self.coefficients[used]


def displacement(
    coefficients: Coefficients,
    pool: Pool,
    backend: Backend,
    *,
    keys: Sequence[Key],
    scale_exponents: frozenset[int],
) -> Displacement:
    """Return what A, shape (K,), adds to the weights of a pool's run.

    `keys` are those of an `independent` pool (`directions.seed_keys`). Raises LedgerError when
    sums over A could overflow.
    """
    if pool.family == "independent":
        check_magnitude(coefficients)
        return IndependentDisplacement(backend, pool, coefficients, keys)
    return HadamardDisplacement(
        backend,
        pool,
        coefficients,
        fwht(coefficients),
        scale_exponents,
    )


def _added(coefficients: Coefficients, index: int, quanta: int, magnitude: int) -> Coefficients:
    """Return A + quanta · e_index; `magnitude` is Σ|A|."""
    before = int(coefficients[index])
    check_total(magnitude - abs(before) + abs(before + quanta))
    result = coefficients.copy()
    result[index] = before + quanta
    return result
