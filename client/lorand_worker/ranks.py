"""The rank of each trainable matrix's subspace: decided once, when a run is prepared.

Ranks are integers of the manifest. Singular values differ in their last bits from machine to
machine, so whoever joins takes what was decided from the run.
"""

import math
import re
from collections.abc import Mapping
from typing import Final

import torch

from lorand.errors import ConfigError, ModelError
from lorand.manifest import Manifest
from lorand.sections import SubspaceSection

MIN_PRUNED: Final = (4999, 10_000)
"""Share of a matrix's singular values that WeLore must do without to call it a low-rank one."""


def ranks(
    section: SubspaceSection,
    tensors: Mapping[str, torch.Tensor],
    new: frozenset[str],
    theirs: Manifest | None = None,
) -> dict[str, int]:
    """Return the rank of each tensor that is trained; 0: directions act on all of it.

    `targets` selects matrices; all where it is empty, but those of a `new` head and those without
    both sides above `rank`. Other tensors have rank 0. `fixed`: each selected matrix has `rank`.
    `welore`: those that `low_rank` finds have its ranks, and the others are frozen: they are not
    in the result. `theirs` is the run's manifest, where there is one: it says what was found, and
    only whether it can be so is checked.

    Raises ModelError for tensors that have no such subspace, and for ranks no rule gives.
    """
    if not section.restricts:
        return dict.fromkeys(tensors, 0)
    matrices = _matrices(section, tensors, new)
    if section.rank_rule == "fixed":
        return {name: section.rank if name in matrices else 0 for name in tensors}
    if theirs is None:
        found = low_rank(matrices, section.rank)
    else:
        found = _given(tensors, matrices, theirs)
    return {name: found.get(name, 0) for name in tensors if name in found or name not in matrices}


def check_decided(section: SubspaceSection, theirs: object) -> None:
    """Raise ConfigError when ranks follow from measurements that the run does not hold."""
    if theirs is None and section.measures_ranks:
        raise ConfigError(
            'subspace.rank_rule = "welore" needs a run.lock with the ranks beside the run file: '
            "write it with `lr-worker prepare run.toml`"
        )


def shifts(section: SubspaceSection, found: Mapping[str, int]) -> dict[str, int]:
    """Return what subspace.scale = 2^n adds to each tensor's scale exponent: n where it has a rank.

    >>> shifts(SubspaceSection(kind="dct", scale=4.0), {"layer": 8, "bias": 0})
    {'layer': 2, 'bias': 0}
    """
    shift = round(math.log2(section.scale))
    return {name: shift if rank else 0 for name, rank in found.items()}


def _matrices(
    section: SubspaceSection, tensors: Mapping[str, torch.Tensor], new: frozenset[str]
) -> dict[str, torch.Tensor]:
    """The matrices that `targets` selects. Raises ModelError where one of them cannot be one."""
    rank = section.rank
    large = {name: t for name, t in tensors.items() if t.dim() == 2 and min(t.shape) > rank}
    if not section.targets:
        found = {name: matrix for name, matrix in large.items() if name not in new}
        if not found:
            raise ModelError(
                f"no trainable matrix has both sides above subspace.rank = {rank}: lower it, train "
                'more with model.trainable, or set subspace.kind = "full"'
            )
        return found
    selected = [name for name in tensors if re.search(section.targets, name)]
    where = f"subspace.targets = {section.targets!r}"
    if not selected:
        raise ModelError(
            f"{where} matches no trainable tensor; there are, for example, "
            + ", ".join(list(tensors)[:4])
        )
    for name in selected:
        shape = tuple(tensors[name].shape)
        if len(shape) != 2:
            raise ModelError(
                f"{where} matches {name!r} of shape {shape}, which is no matrix: match weights of "
                r"linear layers alone, e.g. 'query\.weight$'"
            )
        if name not in large:
            raise ModelError(
                f"{where} matches {name!r} of shape {shape}, which has no subspace of rank {rank}: "
                f"set subspace.rank below {min(shape)}, or match other tensors"
            )
    return {name: large[name] for name in selected}


def low_rank(matrices: Mapping[str, torch.Tensor], average: int) -> dict[str, int]:
    """Return the matrices of low rank with their ranks (WeLore, Jaiswal et al., arXiv 2407.11239).

    Singular values of each matrix are normalised to 0…1, σ' = (σ - min) / (max - min). One
    threshold for all matrices is where they keep `average` of them each in the mean; a matrix's
    rank is how many of its own are not below. A matrix that loses more than .4999 of them is a
    low-rank component, and is returned.

    Raises ModelError for a matrix of no spectrum, and where no matrix is of low rank.

    >>> steep, flat = torch.diag(0.5 ** torch.arange(8)), torch.diag(8.0 - torch.arange(8))
    >>> low_rank({"steep": steep, "flat": flat}, 4)
    {'steep': 2}
    """
    spectra = {name: _normalised(name, matrix) for name, matrix in matrices.items()}
    # As many are kept as average · number: the threshold that WeLore finds by bisection.
    kept = torch.cat(list(spectra.values())).sort(descending=True).values
    threshold = kept[average * len(spectra) - 1]
    found = {name: int((values >= threshold).sum()) for name, values in spectra.items()}
    low = {name: rank for name, rank in found.items() if _is_low(rank, len(spectra[name]))}
    if not low:
        raise ModelError(
            f"no matrix is of low rank at subspace.rank = {average} on average: lower it, or set "
            'subspace.rank_rule = "fixed"'
        )
    return low


def _normalised(name: str, matrix: torch.Tensor) -> torch.Tensor:
    """Singular values of a matrix between 0 and 1, descending."""
    wide = matrix.detach().float()
    if not bool(wide.any()) or not bool(wide.isfinite().all()):
        raise ModelError(
            f"{name!r} is zero or not finite, so that it has no singular values to go by: leave "
            'it out with subspace.targets, or set subspace.rank_rule = "fixed"'
        )
    values = torch.linalg.svdvals(wide)
    span = values[0] - values[-1]
    return (values - values[-1]) / span if span > 0 else torch.ones_like(values)


def _is_low(rank: int, full: int) -> bool:
    share, of = MIN_PRUNED
    return rank > 0 and (full - rank) * of > share * full


def _given(
    tensors: Mapping[str, torch.Tensor], matrices: Mapping[str, torch.Tensor], theirs: Manifest
) -> dict[str, int]:
    """Ranks of low-rank matrices as the run has them. Raises ModelError where that cannot be."""
    given = {spec.name: spec.rank for spec in theirs.tensors if spec.name in tensors}
    for name, rank in given.items():
        as_it_must = _is_low(rank, min(tensors[name].shape)) if name in matrices else rank == 0
        if not as_it_must:
            raise ModelError(
                f"the run trains {name!r} at rank {rank}, which its settings do not lead to; "
                "prepare the run again"
            )
    return {name: rank for name, rank in given.items() if name in matrices}
