"""How far a direction moves each tensor: exponents by a rule (DESIGN §2 step 10)."""

import math
from collections.abc import Mapping
from typing import Final, Literal

import torch

from lorand.errors import ConfigError, ModelError
from lorand.manifest import Manifest

Rule = Literal["head", "size", "calibrated"]
MOST: Final = 4
"""Largest exponent, either way, that a rule finds by itself."""
ALLOWED: Final = 10
"""Largest exponent that a worker takes from a run."""


def exponents(
    rule: Rule,
    tensors: Mapping[str, torch.Tensor],
    *,
    new: frozenset[str],
    head_exponent: int,
    shifts: Mapping[str, int] | None = None,
    theirs: Manifest | None = None,
) -> dict[str, int]:
    """Return each trainable tensor's exponent s: its part of a direction is ±2^s.

    `head`: head_exponent for tensors that are `new`, 0 for all others. `size`: new ones the same,
    others by their own root mean square (`by_size`). `calibrated`: as measured when the run was
    prepared. `shifts` are added to what a rule finds (`ranks.shifts`). `theirs` is the run's
    manifest, where there is one: sizes are then not computed again, since sums of floats differ in
    their last bits from machine to machine.

    Raises ConfigError for a calibrated run without a manifest, ModelError for exponents beyond
    `ALLOWED`.
    """
    shift = dict.fromkeys(tensors, 0) | dict(shifts or {})
    first = {name: head_exponent if name in new else 0 for name in tensors}
    if rule == "head":
        return {name: first[name] + shift[name] for name in tensors}
    if theirs is not None:
        given = {spec.name: spec.scale_exponent for spec in theirs.tensors}
        beyond = [name for name, s in given.items() if abs(s - shift.get(name, 0)) > ALLOWED]
        if beyond:
            raise ModelError(
                f"the run moves {beyond[0]!r} by 2^{given[beyond[0]]}, which is beyond "
                f"2^±{ALLOWED}; prepare the run again"
            )
        return {name: given.get(name, 0) for name in tensors}
    if rule == "size":
        found = first | by_size({n: t for n, t in tensors.items() if n not in new})
        return {name: found[name] + shift[name] for name in tensors}
    raise ConfigError(
        'directions.scale_rule = "calibrated" needs a run.lock with measured scales beside the run '
        "file: write it with `lr-worker prepare run.toml --calibrate DATA`"
    )


def by_size(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return log2 of each tensor's root mean square against that of all weights, rounded, bounded.

    A direction then changes every tensor by about the same share of itself. A tensor of zeros has
    no size: 0.

    >>> by_size({"small": torch.full((4,), 0.25), "large": torch.ones(100), "zero": torch.zeros(2)})
    {'small': -2, 'large': 0, 'zero': 0}
    """
    squares = {name: float(t.detach().double().square().sum()) for name, t in tensors.items()}
    counted = sum(t.numel() for name, t in tensors.items() if squares[name])
    if not counted:
        return dict.fromkeys(tensors, 0)
    mean = sum(squares.values()) / counted
    return {
        name: bounded(math.log2(squares[name] / t.numel() / mean) / 2) if squares[name] else 0
        for name, t in tensors.items()
    }


def bounded(exponent: float) -> int:
    """Return the nearest integer within ±MOST."""
    return max(-MOST, min(MOST, round(exponent)))
