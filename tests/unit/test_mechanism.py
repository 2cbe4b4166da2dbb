"""What is released, how far one example moves it, and where the noise comes from."""

import inspect
import math
import random
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from lorand import codec
from lorand.codec import Codec, Floats
from lorand.privacy import sampler
from lorand.privacy.accountant import Noise
from lorand.privacy.mechanism import GRID, Mechanism, clip

Draw = Callable[[int, sampler.Below], int]


def below(seed: int) -> sampler.Below:
    return random.Random(seed).randrange


# ------------------------------------------------------------- sensitivity

NUMBERS = st.floats(width=64, allow_nan=True, allow_infinity=True) | st.floats(-3, 3)
BOUNDS = st.floats(1e-6, 1e6)
NOISES: st.SearchStrategy[Noise] = st.sampled_from(["gaussian", "laplace"])


@st.composite
def batches(draw: st.DrawFn) -> tuple[Floats, int]:
    """Vectors of a batch, shape (batch, K), and the number of one of them."""
    size, count = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    rows = draw(st.lists(st.lists(NUMBERS, min_size=count, max_size=count), min_size=size))
    return np.array(rows, np.float64), draw(st.integers(0, len(rows) - 1))


def norm_of(steps: list[int], noise: Noise) -> Fraction:
    """Square of the norm that the noise is made for, exactly."""
    if noise == "laplace":
        return Fraction(sum(map(abs, steps))) ** 2
    return Fraction(sum(part * part for part in steps))


@settings(deadline=None, max_examples=300)
@given(batches(), BOUNDS, NOISES)
def test_one_example_moves_the_sum_by_the_bound_at_most(
    batch: tuple[Floats, int], bound: float, noise: Noise
) -> None:
    """Of neighbouring batches, with and without it, whatever the others are; in exact integers."""
    vectors, gone = batch
    made = Mechanism(noise, bound, 1.0, 1)
    whole = made.clipped(vectors).sum(axis=0)
    rest = made.clipped(np.delete(vectors, gone, axis=0)).sum(axis=0)
    away = [int(a) - int(b) for a, b in zip(whole, rest, strict=True)]
    assert norm_of(away, noise) <= GRID**2


@given(st.lists(st.integers(-(2**52), 2**52), min_size=1, max_size=20), NOISES)
def test_clipping_only_shortens(vector: list[int], noise: Noise) -> None:
    clipped = clip(vector, noise)
    assert norm_of(clipped, noise) <= GRID**2
    if norm_of(vector, noise) <= GRID**2:
        assert clipped == vector
        return
    assert all(abs(c) <= abs(v) and c * v >= 0 for c, v in zip(clipped, vector, strict=True))
    assert norm_of(clipped, noise) >= (GRID - len(vector)) ** 2, "and no more than it must"


def test_rounding_comes_first() -> None:
    """Each of these is half a step short of the next number: rounded after, they were too long."""
    vectors = np.full((1, 4), (0.5 + 0.25 / GRID))
    steps = Mechanism("gaussian", 1.0, 1.0, 1).clipped(vectors)[0]
    assert sum(int(s) ** 2 for s in steps) <= GRID**2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_counts_as_nothing(value: float) -> None:
    """An example, and it alone: the others of its batch stay as they are."""
    made = Mechanism("gaussian", 2.0, 1.0, 1)
    steps = made.clipped(np.array([[1.0, value], [0.5, -0.25]]))
    assert steps.tolist() == [[0, 0], [GRID // 4, -GRID // 8]]


def test_huge_vectors_keep_their_direction() -> None:
    made = Mechanism("gaussian", 1.0, 1.0, 1)
    steps = made.clipped(np.array([[3e200, -4e200], [3e12, -4e12]]))
    assert steps / GRID == pytest.approx(np.array([[0.6, -0.8], [0.6, -0.8]]))


# ------------------------------------------------------------- the release


def test_a_release_is_the_clipped_sum_with_noise_over_a_public_number() -> None:
    made = Mechanism("gaussian", 4.0, 0.5, 16)
    vectors = np.array([[3.0, 0.0], [1.0, 2.0], [30.0, 40.0]])
    draws = np.array([made.release(vectors, below(seed)) for seed in range(400)])
    expected = np.array([[3.0, 0.0], [1.0, 2.0], [2.4, 3.2]]).sum(axis=0) / 16
    error = 4.0 * 0.5 / 16
    assert draws.mean(axis=0) == pytest.approx(expected, abs=4 * error / 20)
    assert draws.std(axis=0) == pytest.approx(np.full(2, error), rel=0.15)


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_an_empty_batch_releases_noise(noise: Noise) -> None:
    """T3: whether anyone was sampled is private, so nothing tells it from another batch."""
    made = Mechanism(noise, 1.0, 2.0, 8)
    draws = np.array([made.release(np.empty((0, 3)), below(seed)) for seed in range(300)])
    wide = 2.0 / 8 * (1.0 if noise == "gaussian" else math.sqrt(2))
    assert draws.shape == (300, 3)
    assert draws.std() == pytest.approx(wide, rel=0.12)
    assert abs(draws.mean()) < 4 * wide / 30


def test_what_is_divided_by_does_not_depend_on_the_batch() -> None:
    made = Mechanism("gaussian", 1.0, 0.01, 4)
    for size in (1, 4, 9):
        value = made.release(np.ones((size, 1)), below(1))[0]
        assert value == pytest.approx(size / 4, abs=0.05)


@pytest.mark.parametrize("up", ["int8", "log8", "sign", "int32"])
def test_codes_are_a_function_of_what_was_released(up: Codec) -> None:
    """T6: neither the codes nor their scale see anything of a batch but the noisy values."""
    made = Mechanism("gaussian", 1.0, 1.0, 4)
    few, many = np.array([[0.5, -0.25]]), np.array([[0.25, 0.0], [0.25, -0.25], [0.0, 0.0]])
    values = [made.release(batch, below(7)) for batch in (few, many)]
    codes = [codec.encode(up, value, -6).tolist() for value in values]
    assert codes[0] == codes[1], "batches with one sum"
    parameters = inspect.signature(codec.encode).parameters
    assert list(parameters) == ["codec", "values", "scale_exponent", "uniform"]


# ------------------------------------------------------------- the samplers


def probabilities(draw: Draw, scale: int, reach: int) -> dict[int, float]:
    def weight(x: int) -> float:
        if draw is sampler.gaussian:
            return math.exp(-x * x / (2 * scale * scale))
        return math.exp(-abs(x) / scale)

    weights = {x: weight(x) for x in range(-40 * scale, 40 * scale + 1)}
    total = sum(weights.values())
    return {x: weights[x] / total for x in range(-reach, reach + 1)}


@pytest.mark.parametrize("draw", [sampler.gaussian, sampler.laplace])
@pytest.mark.parametrize("scale", [1, 2, 5])
def test_samples_have_the_distribution(draw: Draw, scale: int) -> None:
    """Chi-square over the middle and the two tails; seeds are fixed, so it cannot flake."""
    count, source = 6000, below(scale)
    seen = Counter(draw(scale, source) for _ in range(count))
    expected = probabilities(draw, scale, 2 * scale)
    tail = (1 - sum(expected.values())) / 2
    observed = [seen[x] for x in expected]
    observed += [sum(n for x, n in seen.items() if s * x > 2 * scale) for s in (-1, 1)]
    wanted = [count * p for p in (*expected.values(), tail, tail)]
    assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


def test_a_deviation_may_be_a_fraction() -> None:
    """As shares of a sum have them: here σ = 5/2."""
    count, source = 6000, below(1)
    seen = Counter(sampler.gaussian(5, source, denominator=2) for _ in range(count))
    weights = {x: math.exp(-x * x / 12.5) for x in range(-100, 101)}
    total = sum(weights.values())
    observed, wanted = [], []
    for part in (range(-100, -3), *([x] for x in range(-3, 4)), range(4, 101)):
        observed.append(sum(seen[x] for x in part))
        wanted.append(count * sum(weights[x] for x in part) / total)
    assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize(("draw", "variance"), [(sampler.gaussian, 1.0), (sampler.laplace, 2.0)])
def test_samples_of_the_grid_have_mean_and_variance(draw: Draw, variance: float) -> None:
    scale, source = GRID, below(3)
    values = np.array([draw(scale, source) / scale for _ in range(3000)])
    assert abs(values.mean()) < 4 * math.sqrt(variance / 3000)
    assert values.var() == pytest.approx(variance, rel=0.2)


@pytest.mark.parametrize(("numerator", "denominator"), [(0, 1), (1, 3), (1, 1), (7, 2)])
def test_a_chance_of_an_exponential(numerator: int, denominator: int) -> None:
    source, count = below(11), 8000
    hits = sum(sampler.bernoulli_exp(numerator, denominator, source) for _ in range(count))
    chance = math.exp(-numerator / denominator)
    assert hits == pytest.approx(count * chance, abs=4 * math.sqrt(count * chance) + 1e-9)


def test_noise_is_integers_of_a_fine_grid() -> None:
    """T9: no float is drawn, and what is added is an integer, whatever the vectors are."""
    asked: list[int] = []

    def counting(n: int) -> int:
        assert isinstance(n, int)
        asked.append(n)
        return below(len(asked))(n)

    made = Mechanism("gaussian", 0.3, 1.1, 7)
    value = made.release(np.array([[0.1, 0.2]]), counting)
    assert asked
    steps = value * 7 * GRID / 0.3
    assert steps == pytest.approx(np.rint(steps), abs=1e-3)
    assert made.noise_steps >= 1.1 * GRID
    source = inspect.getsource(sampler)
    assert "float(" not in source
    assert "random." not in source


# ------------------------------------------------------------- where the noise comes from

DRAW = """
import random, numpy, torch
from lorand.privacy.mechanism import Mechanism
random.seed(1); numpy.random.seed(1); torch.manual_seed(1)
print(Mechanism("gaussian", 1.0, 1.0, 1).release(numpy.zeros((1, 4))).tolist())
"""


def test_equal_seeds_give_other_noise() -> None:
    """T4: two processes with the same seeds everywhere."""
    said = [
        subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert said[0].stdout != said[1].stdout
    assert said[0].stdout.startswith("[")


def test_no_seeded_generator_is_read_or_moved() -> None:
    """T4: directions seed generators with public numbers."""
    made, zeros = Mechanism("gaussian", 1.0, 1.0, 1), np.zeros((2, 4))

    def states() -> list[object]:
        old: tuple[object, ...] = np.random.get_state(legacy=True)  # type: ignore[assignment]  # noqa: NPY002
        return [random.getstate(), str(old), torch.get_rng_state().tolist()]

    def seeded() -> list[float]:
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        torch.manual_seed(5)
        return list(made.release(zeros))

    first, before = seeded(), states()
    made.release(zeros)
    assert states() == before
    assert seeded() != first


@pytest.mark.parametrize("function", [Mechanism.release, sampler.gaussian, sampler.laplace])
def test_noise_is_the_operating_systems_unless_a_test_says_otherwise(
    function: Callable[..., object],
) -> None:
    default = inspect.signature(function).parameters["below"].default
    assert default is secrets.randbelow
