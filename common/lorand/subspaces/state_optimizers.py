"""Optimizer state in the coordinates of a subspace: Adam, FRUGAL and Fira, alike on every machine.

A gradient G of shape (m, n) has coordinates `inside` the subspace, R = down(G) of shape (m, r),
and `outside` of it, shape (m, n − r). In an orthonormal basis of n columns, of which r are chosen,
the latter are those of the other columns, and exactly G − up(down(G)). Only R has moments: 2·m·r
numbers. Whoever projects from the left gives and takes everything transposed.

Replicas compute the same steps from the ledger, so they must compute the same bits. Everything is
float64, by + − · / and square roots alone, one element at a time. Sums of squares add columns in
order and then rows exactly (math.fsum), never with numpy's own sums, whose order depends on the
width of a machine's vectors. Powers of the betas are running products. No number here is ever
subnormal: threads may flush those to zero (torch.set_flush_denormal), and they are slow.
"""

import math
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

import numpy as np

from lorand.codec import Floats
from lorand.directions import Indices

Kind = Literal["adam", "frugal", "fira"]

LARGEST: Final = 2.0**240
"""Of a gradient's magnitudes; squares and their sums stay finite below it."""
FLOOR: Final = 2.0**-240
"""Smaller magnitudes count as zero; no square or quotient of others is subnormal."""
TINY: Final = 2.0**-60
"""The smallest setting that is not 0. The root of FLOOR has no effect on an ε that large."""
BELOW_ONE: Final = 1.0 - 2.0**-53
NORM_EPSILON: Final = 1e-8
"""What Fira adds to norms that it divides by; a constant in its code."""


@dataclass(frozen=True)
class Settings:
    """What decides the steps of `advance`.

    `epsilon` is that of the codes of GaLore and Fira alike (FRUGAL's and DCT-AdamW's are 1e-8).
    `scale` is GaLore's α and multiplies the step inside, of every kind; FRUGAL has none of its own.
    `inactive_scale` is FRUGAL's inactive_lr_scale (0.1 for fine-tuning), `limiter` Fira's γ.

    Raises ValueError for values out of range; β1² ≤ β2, for a step could be of any size otherwise.
    """

    kind: Kind = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6
    scale: float = 1.0
    inactive_scale: float = 1.0
    limiter: float = 1.01

    def __post_init__(self) -> None:
        """Check all values."""
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        for name, value, least, most in (
            ("beta1", self.beta1, 0.0, BELOW_ONE),
            ("beta2", self.beta2, 0.0, BELOW_ONE),
            ("epsilon", self.epsilon, TINY, 1.0),
            ("scale", self.scale, TINY, 1 / TINY),
            ("inactive_scale", self.inactive_scale, 0.0, 1 / TINY),
            ("limiter", self.limiter, 1.0, 1 / TINY),
        ):
            if not least <= value <= most or 0.0 < value < TINY:
                raise ValueError(f"{name} is from {least} to {most}, not {value}")
        if self.beta1 * self.beta1 > self.beta2:
            raise ValueError(f"beta1² is at most beta2, not {self.beta1}² with {self.beta2}")


@dataclass(frozen=True)
class State:
    """What one tensor carries from step to step; a fold over the ledger.

    `first` and `second` are Adam's moments of the r subspace coordinates, shape (m, r), in C order.
    After t steps the powers are β1^t and β2^t. `residual_norm` is ‖S‖ of Fira's last step.
    """

    first: Floats
    second: Floats
    beta1_power: float
    beta2_power: float
    residual_norm: float | None


def start(m: int, r: int) -> State:
    """Return the state of a tensor with m rows and r subspace coordinates before its first step.

    Raises ValueError unless both are positive.
    """
    if m < 1 or r < 1:
        raise ValueError(f"a state needs rows and coordinates, not the shape ({m}, {r})")
    return State(np.zeros((m, r)), np.zeros((m, r)), 1.0, 1.0, None)


def advance(
    settings: Settings, state: State, inside: Floats, outside: Floats | None
) -> tuple[State, Floats, Floats | None]:
    """Return the state after a gradient, and the steps inside and outside of the subspace.

    inside: R, shape (m, r). outside: shape (m, n − r), None for `adam`. The steps have the same
    shapes, and weights move by −learning_rate times them.

        M ← β1·M + (1 − β1)·R      V ← β2·V + (1 − β2)·R²      N = M / (√V + ε)
        c_t = √(1 − β2^t) / (1 − β1^t)

        adam     inside  scale·c_t·N   GaLore-Adam (Zhao et al., arXiv 2403.03507, algorithm 2)
        frugal   inside  the same
                 outside inactive_scale·sign(outside)
                                       FRUGAL (Zmushko et al., arXiv 2411.07837, algorithm 1)
        fira     inside  the same
                 outside c_t·S         Fira (Chen et al., arXiv 2410.01623, algorithm 1)

    As in the papers' code ε is added before the correction by c_t. Fira's S is in `_residual`.

    The sum of a row's squares follows the columns' order, so the caller's must be the same
    everywhere. How arrays lie in memory makes no difference, nor does the order of rows.

    Raises ValueError for other shapes and for what is not a number of magnitude 2^240 or less.

    >>> state, step, _ = advance(Settings(), start(1, 2), np.array([[3.0, -0.5]]), None)
    >>> step.round(3).tolist()
    [[1.0, -1.0]]
    """
    inside = _checked(inside, "inside", state.first.shape)
    if (outside is None) != (settings.kind == "adam"):
        raise ValueError(f"outside is {'not ' if outside is None else ''}None for {settings.kind}")
    first = _settled(settings.beta1 * state.first + (1.0 - settings.beta1) * inside)
    second = _settled(settings.beta2 * state.second + (1.0 - settings.beta2) * (inside * inside))
    power1 = _settled_power(settings.beta1 * state.beta1_power)
    power2 = _settled_power(settings.beta2 * state.beta2_power)
    correction = math.sqrt(1.0 - power2) / (1.0 - power1)
    normalised = first / (np.sqrt(second) + settings.epsilon)
    after = State(first, second, power1, power2, state.residual_norm)
    step_inside = (settings.scale * correction) * normalised
    if outside is None:
        return after, step_inside, None
    rows = len(first)
    outside = _checked(outside, "outside", (rows, np.shape(outside)[-1] if np.ndim(outside) else 0))
    if settings.kind == "frugal":
        return after, step_inside, settings.inactive_scale * np.sign(outside)
    residual, norm = _residual(settings, normalised, inside, outside, state.residual_norm)
    return replace(after, residual_norm=norm), step_inside, correction * residual


def _residual(
    settings: Settings, normalised: Floats, inside: Floats, outside: Floats, last: float | None
) -> tuple[Floats, float]:
    """Return Fira's S for the coordinates outside, shape (m, n − r), and ‖S‖.

        φ_i = ‖N_i‖ / (‖R_i‖ + 1e-8)                 over the r coordinates of row i
        S   = φ_i · outside_i,     S_t ← S_t / max(1, ‖S_t‖ / (γ·(‖S_{t−1}‖ + 1e-8)))

    The norm-based scaling and the norm-growth limiter of arXiv 2410.01623. i runs over the
    dimension that is not projected: rows here, the columns of PᵀG in the paper. The fira package
    takes the longer side of R for it, which is the other one where m < r.

    From the first step on ‖S‖ grows by γ a step at most. So after a step with S = 0, which a
    gradient of zeros is enough for, it needs 1,400 steps from 1e-8 to 1, as in both libraries.

    At scale 1 this is their code too. At others that takes G − scale·up(R), not what lies outside:
    its inside step has an addend c_t·(1 − scale)·φ_i·R_i, and ‖S‖ counts it.
    """
    of_steps = np.sqrt(_row_squares(normalised))
    of_gradients = np.sqrt(_row_squares(inside))
    factors = of_steps / (of_gradients + NORM_EPSILON)
    residual = _settled(outside * factors[:, np.newaxis])
    norm = math.sqrt(math.fsum(_row_squares(residual).tolist()))
    if last is None:
        return residual, norm
    growth = max(norm / (last + NORM_EPSILON), settings.limiter) / settings.limiter
    return residual / growth, norm / growth


def carried(state: State, before: Indices, after: Indices) -> State:
    """Return the state on new subspace coordinates, after a refresh of the column indices.

    before: the indices of the state's r columns, after: those of the new ones, shape (r',); both
    ascending. Columns in both keep their moments, others start at zero. That is DCT-AdamW's
    rotation (arXiv 2505.17967) by Q[:, before]ᵀ·Q[:, after], which for an orthogonal Q has a single
    one, or none, a column; gathered here, hence exact.

    The count t stays the tensor's, as DCT-AdamW's does: a new column has no correction of its own,
    so its first step is (1 − β1) / √(1 − β2) = 3.2 times a sign late in a run. Fira's ‖S‖ stays.

    Raises ValueError for indices that do not ascend or do not fit the state.
    """
    for name, indices in (("before", before), ("after", after)):
        if indices.ndim != 1 or indices.dtype != np.int64 or not len(indices) or indices[0] < 0:
            raise ValueError(f"{name} must be int64 indices from 0, shape (r,)")
        if (indices[1:] <= indices[:-1]).any():
            raise ValueError(f"{name} must ascend")
    if len(before) != state.first.shape[1]:
        raise ValueError(f"{len(before)} indices for a state of {state.first.shape[1]} coordinates")
    at = np.searchsorted(before, after)
    survives = before[np.minimum(at, len(before) - 1)] == after
    fresh = start(len(state.first), len(after))
    fresh.first[:, survives] = state.first[:, at[survives]]
    fresh.second[:, survives] = state.second[:, at[survives]]
    return replace(state, first=fresh.first, second=fresh.second)


def reset(state: State) -> State:
    """Return a state of the same shape that remembers nothing: FRUGAL's, after every refresh."""
    m, r = state.first.shape
    return start(m, r)


def nbytes(state: State) -> int:
    """Return the size of a state: two moments a coordinate, and three numbers."""
    return state.first.nbytes + state.second.nbytes + 3 * 8


def _checked(values: Floats, name: str, shape: tuple[int, ...]) -> Floats:
    """Return values in C order without what counts as zero. Raises ValueError as `advance` does."""
    if np.shape(values) != shape:
        raise ValueError(f"{name} has the shape {np.shape(values)}, not {shape}")
    ordered = np.ascontiguousarray(values, np.float64)
    if not (np.abs(ordered) <= LARGEST).all():
        raise ValueError(f"{name} holds what is not a number of magnitude 2^240 or less")
    return _settled(ordered)


def _settled(values: Floats) -> Floats:
    """Return a copy in which magnitudes below FLOOR are zero."""
    return np.where(np.abs(values) >= FLOOR, values, 0.0)


def _settled_power(power: float) -> float:
    """Return a power of a beta, zero below FLOOR, where one minus it has long been one."""
    return power if power >= FLOOR else 0.0


def _row_squares(values: Floats) -> Floats:
    """Return Σ_j x_ij², shape (m,), from column to column: one order on every machine."""
    total = np.zeros(len(values))
    for column in np.ascontiguousarray(values.T):
        total += column * column
    return total
