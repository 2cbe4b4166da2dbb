"""What a run's ledger says of its subspaces: columns voted for, and whether they were given up."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorand.errors import LedgerError
from lorand.manifest import Manifest
from lorand.subspaces import periods
from lorand.subspaces.basis import (
    Basis,
    Indices,
    Kind,
    check_indices,
    drawn,
    from_gaps,
    largest,
    to_gaps,
)
from lorand.subspaces.lazy import Lazy
from lorand.v1 import ledger_pb2 as pb

if TYPE_CHECKING:
    from lorand.config import RunConfig
    from lorand.philox import Key

Columns = Mapping[int, Indices]
"""Ascending columns (or rows) by the number of their tensor."""


@dataclass(frozen=True, eq=False)
class Elections:
    """The elected bases of periods 1, 2, …, and from which period on all is full space again."""

    bases: tuple[Basis, ...] = ()
    lazy: Mapping[int, Lazy] = field(default_factory=dict)
    given_up: int | None = None

    def due(self, config: "RunConfig", manifest: Manifest, committed: int) -> list[int]:
        """Return the tensors whose columns the round after so many commits elects, ascending.

        All that have a rank, or those whose interval is over where refreshes are lazy.
        """
        period = periods.elects(config, committed)
        if not period or self.given_up is not None:
            return []
        ranked = [tid for tid, spec in enumerate(manifest.tensors) if spec.rank]
        if not config.subspace.lazy:
            return ranked
        return [tid for tid in ranked if tid not in self.lazy or self.lazy[tid].due(period)]

    def probing(self, config: "RunConfig") -> bool:
        """Return whether participants still measure what tells whether the subspace pays."""
        return config.subspace.probe and self.given_up is None

    def after(
        self, config: "RunConfig", manifest: Manifest, committed: int, commit: pb.Commit
    ) -> "Elections":
        """Return them after the round that follows so many commits. Raises LedgerError."""
        due = self.due(config, manifest, committed)
        elected = read(manifest, commit.basis, due)
        result = self
        if due:
            result = self._with(config, periods.elects(config, committed), elected)
        elif periods.elects(config, committed) and self.bases:
            result = replace(self, bases=(*self.bases, self.bases[-1]))
        if commit.gives_up_subspace and self.given_up is None:
            pool = periods.pool_after(config, committed + 1)
            result = replace(result, given_up=periods.period(config, pool))
        return result

    def _with(self, config: "RunConfig", period: int, elected: Columns) -> "Elections":
        before = self.bases[-1] if self.bases else Basis(_kind(config), {})
        lazy = dict(self.lazy)
        for tid, indices in elected.items():
            if tid in lazy:
                lazy[tid] = lazy[tid].after(period, before.indices[tid], indices)
            else:
                lazy[tid] = Lazy(next_due=period + 1)
        return replace(self, bases=(*self.bases, before.with_indices(elected)), lazy=lazy)

    def to_arrays(self) -> dict[str, NDArray[np.int32]]:
        """Return all bases as one array, shape (periods, sum of ranks); nothing where none is."""
        if not self.bases:
            return {}
        rows = [np.concatenate([b.indices[tid] for tid in sorted(b.indices)]) for b in self.bases]
        return {"elected": np.stack(rows).astype(np.int32)}

    @staticmethod
    def from_arrays(
        config: "RunConfig",
        manifest: Manifest,
        arrays: Mapping[str, NDArray[Any]],
        given_up: int | None = None,
    ) -> "Elections":
        """Return what rebuilds weights, from `to_arrays`. Raises LedgerError, ValueError."""
        ranked = [(tid, spec) for tid, spec in enumerate(manifest.tensors) if spec.rank]
        ends = np.cumsum([0, *(spec.rank for _, spec in ranked)])
        elected = arrays.get("elected", np.zeros((0, int(ends[-1])), np.int32))
        if elected.dtype.kind != "i" or elected.ndim != 2 or elected.shape[1] != ends[-1]:
            raise ValueError("elected columns do not fit the manifest")
        bases = []
        for row in elected.astype(np.int64):
            parts = np.split(row, ends[1:-1])
            for (_, spec), indices in zip(ranked, parts, strict=True):
                check_indices(spec, indices)
            tids = [tid for tid, _ in ranked]
            bases.append(Basis(_kind(config), dict(zip(tids, parts, strict=True))))
        return Elections(tuple(bases), given_up=given_up)

    def basis(self, config: "RunConfig", manifest: Manifest, pool: int, key: "Key") -> Basis | None:
        """Return the basis of a pool; `key` is that of its period's first. None: full space."""
        period = periods.period(config, pool)
        if periods.in_full_space(config, period):
            return None
        if self.given_up is not None and period >= self.given_up:
            return None
        if periods.voted(config):
            return self.bases[period - 1]
        return drawn(_kind(config), manifest, key)


def _kind(config: "RunConfig") -> Kind:
    return "dct" if config.subspace.kind == "dct" else "coordinate"


def pack(columns: Columns) -> list[pb.Columns]:
    """Return columns as messages, by ascending tensor."""
    return [pb.Columns(tensor=tid, gaps=to_gaps(columns[tid])) for tid in sorted(columns)]


def read(manifest: Manifest, messages: Iterable[pb.Columns], due: Sequence[int]) -> Columns:
    """Return the columns of exactly the tensors that are due. Raises LedgerError."""
    found: dict[int, Indices] = {}
    for message in messages:
        if message.tensor not in due or message.tensor in found:
            raise LedgerError(
                f"columns of tensor {message.tensor} came where {len(due)} others were due, once "
                "each"
            )
        spec = manifest.tensors[message.tensor]
        if len(message.gaps) != spec.rank or sum(message.gaps) >= 2**31:
            raise LedgerError(
                f"{len(message.gaps)} columns came for {spec.name!r}, whose subspace has rank "
                f"{spec.rank}"
            )
        indices = from_gaps(message.gaps)
        check_indices(spec, indices)
        found[message.tensor] = indices
    if len(found) != len(due):
        raise LedgerError(f"columns of {len(found)} tensors came where {len(due)} were due")
    return found


def most_votes(manifest: Manifest, votes: Sequence[Columns]) -> Columns:
    """Return for each tensor the `rank` columns that most participants voted for.

    Ties are broken by the lower index, so that the result does not depend on an order of arrival.
    """
    chosen: dict[int, Indices] = {}
    for tid in votes[0]:
        counts = np.bincount(np.concatenate([vote[tid] for vote in votes]))
        chosen[tid] = largest(counts, manifest.tensors[tid].rank)
    return chosen
