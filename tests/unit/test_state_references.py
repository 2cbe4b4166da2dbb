"""Optimizer state in a subspace, against the field's libraries."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.state_steps import CHOSEN, COLUMNS, RANK, REST, ROWS, Parts, gradients, run

from lorand.codec import Floats
from lorand.directions import Indices
from lorand.subspaces.state_optimizers import Settings, advance, reset, start

pytestmark = pytest.mark.usefixtures("one_thread")


def split(options: Settings, matrices: list[Floats], basis: Floats, rest: Floats) -> Parts:
    """Coordinates in the basis, shape (r, n), and in what completes it, shape (n − r, n)."""
    with_rest = options.kind != "adam"
    return [(g @ basis.T, g @ rest.T if with_rest else None) for g in matrices]


def ours(options: Settings, matrices: list[Floats], basis: Floats) -> list[Floats]:
    """Our steps as matrices, shape (m, n)."""
    rest = completed(basis)
    result = []
    for _, step_inside, step_outside in run(options, split(options, matrices, basis, rest)):
        step = step_inside @ basis
        result.append(step if step_outside is None else step + step_outside @ rest)
    return result


def completed(basis: Floats) -> Floats:
    """An orthonormal basis of what the rows leave over."""
    complement = np.linalg.svd(basis)[2][len(basis) :]
    return np.asarray(complement, np.float64)


def assert_steps(actual: list[Floats], expected: list[Floats], tolerance: float = 1e-5) -> None:
    """Relative to a step's largest element, and to its norm."""
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        assert np.abs(mine - theirs).max() <= tolerance * np.abs(theirs).max()
        assert np.linalg.norm(mine - theirs) <= tolerance * np.linalg.norm(theirs)


def walked(optimizer: Any, weight: torch.Tensor, matrices: list[Floats]) -> list[Floats]:
    """A library's steps at learning rate 1: what it subtracts from the weight."""
    result = []
    for gradient in matrices:
        before = weight.detach().clone()
        weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        result.append((before - weight.detach()).numpy())
    return result


def library_steps(
    name: str, matrices: list[Floats], *, scale: float = 1.0, columns: Indices | None = None
) -> tuple[list[Floats], Floats]:
    """Steps of pytorch_optimizer's GaLore or Fira, and the basis in which it took them.

    Its own, of the first gradient's singular vectors, or `columns` of the longer side.
    """
    library = pytest.importorskip("pytorch_optimizer")
    projectors = pytest.importorskip("pytorch_optimizer.optimizer.utils.galore")
    weight = torch.nn.Parameter(torch.zeros(matrices[0].shape, dtype=torch.float64))
    group = {"rank": RANK, "update_proj_gap": 1000, "scale": scale, "projection_type": "std"}
    optimizer = getattr(library, name)([{"params": [weight], **group}], lr=1.0)
    wide = len(matrices[0]) < matrices[0].shape[1]
    if columns is not None:
        rows = np.eye(COLUMNS)[columns]
        projector = projectors.GaLoreProjector(RANK, 1000, scale, "std")
        projector.ortho_matrix = torch.from_numpy(rows.T.copy() if wide else rows)
        optimizer.state[weight]["projector"] = projector
    steps = walked(optimizer, weight, matrices)
    basis = optimizer.state[weight]["projector"].ortho_matrix.numpy()
    return steps, basis.T if wide else basis


@pytest.mark.parametrize("columns", [None, CHOSEN], ids=["singular", "columns"])
@pytest.mark.parametrize("name", ["GaLore", "Fira"])
def test_steps_are_those_of_pytorch_optimizer(name: str, columns: Indices | None) -> None:
    matrices = gradients(20)
    expected, basis = library_steps(name, matrices, columns=columns)
    options = Settings("adam" if name == "GaLore" else "fira")
    # Singular vectors are theirs in float32, so not quite orthonormal.
    assert_steps(ours(options, matrices, basis), expected, 1e-5 if columns is None else 1e-12)


@pytest.mark.parametrize("name", ["GaLore", "Fira"])
def test_a_projection_from_the_left_is_the_transposed(name: str) -> None:
    """What φ counts along is the dimension that is not projected, whichever it is."""
    matrices = gradients(20)
    expected, basis = library_steps(name, [g.T for g in matrices])
    options = Settings("adam" if name == "GaLore" else "fira")
    assert_steps(ours(options, matrices, basis), [step.T for step in expected])


def test_scale_is_galores_alpha() -> None:
    matrices = gradients(20)
    expected, basis = library_steps("GaLore", matrices, scale=0.25)
    assert_steps(ours(Settings(scale=0.25), matrices, basis), expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_steps_are_those_of_the_fira_package(side: str) -> None:
    """Version 1.0.2, when it happens to be installed; it is no dependency."""
    library = pytest.importorskip("fira")
    matrices = gradients(20)
    given = matrices if side == "right" else [g.T for g in matrices]
    weight = torch.nn.Parameter(torch.zeros(given[0].shape, dtype=torch.float64))
    group = {"rank": RANK, "update_proj_gap": 1000, "alpha": 1.0, "proj_type": "std"}
    optimizer = library.FiraAdamW(
        [{"params": [weight], **group}], lr=1.0, no_deprecation_warning=True
    )
    expected = walked(optimizer, weight, given)
    basis = optimizer.state[weight]["projector"].ortho_matrix.numpy()
    if side == "left":
        expected, basis = [step.T for step in expected], basis.T
    assert_steps(ours(Settings("fira"), matrices, basis), expected)


def test_the_limiter_was_at_work_where_steps_are_compared() -> None:
    parts = [(g[:, CHOSEN], g[:, REST]) for g in gradients(20)]
    limited = run(Settings("fira"), parts)
    unlimited = run(Settings("fira", limiter=1e6), parts)
    apart = [
        mine[0].residual_norm != theirs[0].residual_norm
        for mine, theirs in zip(limited, unlimited, strict=True)
    ]
    assert 3 < sum(apart) < 20


def test_at_another_scale_firas_code_adds_a_part_of_the_gradient_inside() -> None:
    """It takes G − scale·up(R) for what lies outside; at the first step nothing is limited."""
    scale, matrices = 0.25, gradients(1)
    (expected,), _ = library_steps("Fira", matrices, scale=scale, columns=CHOSEN)
    inside, outside = matrices[0][:, CHOSEN], matrices[0][:, REST]
    ((_, step_inside, step_outside),) = run(Settings("fira", scale=scale), [(inside, outside)])
    assert step_outside is not None
    assert_steps([step_outside], [expected[:, REST]])
    steps = 0.1 * inside / (np.sqrt(0.001) * np.abs(inside) + 1e-6)
    ratios = np.linalg.norm(steps, axis=1) / (np.linalg.norm(inside, axis=1) + 1e-8)
    correction = math.sqrt(0.001) / 0.1
    addend = correction * (1 - scale) * ratios[:, np.newaxis] * inside
    assert_steps([step_inside + addend], [expected[:, CHOSEN]])


def test_adam_is_torchs_on_the_coordinates() -> None:
    """torch corrects before it adds ε, which is why ε is small here."""
    matrices = gradients(20)
    weight = torch.nn.Parameter(torch.zeros((ROWS, RANK), dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=1.0, betas=(0.8, 0.95), eps=1e-15)
    expected = walked(optimizer, weight, [g[:, CHOSEN] for g in matrices])
    options = Settings(beta1=0.8, beta2=0.95, epsilon=1e-15)
    steps = run(options, [(g[:, CHOSEN], None) for g in matrices])
    assert_steps([step for _, step, _ in steps], expected, 1e-9)


def test_frugal_is_adam_inside_and_a_sign_outside() -> None:
    """W −= lr·up(Adam(down(G))) + lr·inactive_lr_scale·sign(G − up(down(G))), moments reset."""
    options = Settings("frugal", beta1=0.8, beta2=0.95, epsilon=1e-3, inactive_scale=0.1)
    m, v = np.zeros((ROWS, RANK)), np.zeros((ROWS, RANK))
    state, t = start(ROWS, RANK), 0
    for number, gradient in enumerate(gradients(20)):
        if number == 12:
            m, v, t, state = np.zeros_like(m), np.zeros_like(v), 0, reset(state)
        inside = gradient[:, CHOSEN]
        remaining = gradient.copy()
        remaining[:, CHOSEN] = 0.0
        t += 1
        m = 0.8 * m + 0.2 * inside
        v = 0.95 * v + 0.05 * inside**2
        expected = 0.1 * np.sign(remaining)
        expected[:, CHOSEN] = np.sqrt(1 - 0.95**t) / (1 - 0.8**t) * m / (np.sqrt(v) + 1e-3)
        state, step_inside, step_outside = advance(options, state, inside, gradient[:, REST])
        actual = np.zeros_like(gradient)
        actual[:, CHOSEN], actual[:, REST] = step_inside, step_outside
        assert actual == pytest.approx(expected, rel=1e-9)
