"""From coefficients to tables: the Walsh–Hadamard transform, exact and rounded once (DESIGN §2)."""

import logging
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorand import transform
from lorand.coefficients import Coefficients
from lorand.kernels import butterflies
from lorand.transform import (
    COMPILED,
    fwht,
    fwht_float,
    hadamard_column,
    table,
    tables,
)


@st.composite
def vectors(draw: st.DrawFn, log2_magnitude: int = 53) -> Coefficients:
    """K = 64, 128 or 256 integers of all magnitudes, Σ|A| < 2^62."""
    size = draw(st.sampled_from([64, 128, 256]))
    limit = 1 << draw(st.integers(0, log2_magnitude))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.integers(-limit, limit, size, dtype=np.int64, endpoint=True)


def explicit_transform(coefficients: Coefficients) -> list[int]:
    """F[e] = Σ_k A_k (−1)^popcount(e & k), in Python integers."""
    values = coefficients.tolist()
    return [
        sum(-a if (e & k).bit_count() % 2 else a for k, a in enumerate(values))
        for e in range(len(values))
    ]


# ------------------------------------------------------------- the transform (DESIGN §2 step 7)


@settings(deadline=None, max_examples=30)
@given(vectors())
def test_fwht_is_the_explicit_sum(coefficients: Coefficients) -> None:
    assert fwht(coefficients).tolist() == explicit_transform(coefficients)


@settings(deadline=None, max_examples=50)
@given(vectors(44))
def test_fwht_twice_is_k_times_the_identity(coefficients: Coefficients) -> None:
    """H·H·A = K·A: the rows of H are orthogonal."""
    twice = fwht(fwht(coefficients))
    assert twice.tolist() == (coefficients * len(coefficients)).tolist()


@settings(deadline=None, max_examples=50)
@given(vectors(40), st.integers(-1000, 1000), st.integers(0, 2**32))
def test_fwht_is_linear(a: Coefficients, factor: int, seed: int) -> None:
    b = np.random.default_rng(seed).integers(-(2**40), 2**40, len(a), dtype=np.int64)
    assert fwht(a + factor * b).tolist() == (fwht(a) + factor * fwht(b)).tolist()


@settings(deadline=None, max_examples=50)
@given(st.integers(6, 10), st.data())
def test_a_column_is_the_transform_of_a_unit_vector(log2_size: int, data: st.DataObject) -> None:
    """F + c·H[:, k] is then the transform of A + c·e_k: a perturbation costs O(K)."""
    size = 1 << log2_size
    index = data.draw(st.integers(0, size - 1))
    unit = np.eye(1, size, index, dtype=np.int64)[0]
    assert hadamard_column(index, size).tolist() == fwht(unit).tolist()


def test_fwht_leaves_its_argument_alone() -> None:
    coefficients = np.arange(64, dtype=np.int64)
    fwht(coefficients)
    assert coefficients.tolist() == list(range(64))


@settings(deadline=None, max_examples=30)
@given(vectors(40))
def test_the_senders_transform_is_the_same_one(coefficients: Coefficients) -> None:
    """`fwht_float` differs only in type: exact while every sum fits 53 bits."""
    transformed = fwht_float(coefficients.astype(np.float64))
    assert transformed.tolist() == fwht(coefficients).tolist()


def test_fwht_of_the_largest_allowed_coefficients() -> None:
    """Just below the limit nothing wraps, at any depth of the transform."""
    coefficients = np.full(64, 2**56, np.int64)
    coefficients[0] -= 1
    assert fwht(coefficients).tolist() == explicit_transform(coefficients)


# ------------------------------------------------------------- compiled, for large pools


@pytest.mark.parametrize("log2_size", [12, 13, 14, 15, 16, 17, 20])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_large_transforms_are_compiled_and_exact(
    log2_size: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of K columns holds its own coefficient: H·H·A = K·A, and samples of the explicit sum."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    size = 1 << log2_size
    assert size >= COMPILED
    coefficients = np.random.default_rng(size).integers(-(2**22), 2**22, size, dtype=np.int64)
    made = fwht(coefficients)
    for e in (0, 1, 7, 8, size // 2, size - 1, 12_345 % size):
        assert made[e] == int((coefficients * hadamard_column(e, size)).sum())
    assert np.array_equal(fwht(made), coefficients * size)
    assert np.array_equal(fwht_float(coefficients.astype(np.float64)), made)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As in a new process: the compiled transform has not been looked at."""
    transform._compiled.cache_clear()
    yield
    transform._compiled.cache_clear()


@pytest.mark.usefixtures("unchecked")
def test_a_wrong_compiled_transform_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(butterflies, "transform", lambda values: None)
    with caplog.at_level(logging.ERROR, "lorand.kernels"):
        made = fwht(np.eye(1, COMPILED, 3, dtype=np.int64)[0])
    assert np.array_equal(made, hadamard_column(3, COMPILED))
    assert "does not agree with numpy's" in caplog.text


# ------------------------------------------------------------- tables


def nearest_float32(value: int) -> Fraction:
    """The nearest number with 24 significant bits, ties to even."""
    spacing = 1 << max(0, abs(value).bit_length() - 24)
    return Fraction(round(Fraction(value, spacing)) * spacing)


@settings(deadline=None)
@given(
    st.lists(st.integers(-(2**62) + 1, 2**62 - 1), min_size=1, max_size=64),
    st.integers(8, 48),
    st.integers(-10, 10),
)
def test_table_rounds_once(transform: list[int], quantum: int, scale: int) -> None:
    """T[e] = 2^(s−q) · fl32(F[e]): by way of float64 some values would round twice."""
    values = table(np.array(transform, np.int64), quantum, scale)
    assert values.dtype == np.float32
    factor = Fraction(2) ** (scale - quantum)
    assert [Fraction(float(t)) for t in values] == [nearest_float32(f) * factor for f in transform]


def test_table_rounds_once_where_two_roundings_would_differ() -> None:
    """2^60 + 2^36 + 1 is just above a tie of float32; float64 would drop the 1 and tie to even."""
    transform = np.array([2**60 + 2**36 + 1], np.int64)
    assert float(table(transform, 0, 0)[0]) == 2**60 + 2**37
    assert float(np.float32(transform.astype(np.float64)[0])) == 2**60


@settings(deadline=None, max_examples=30)
@given(vectors(), st.lists(st.integers(-10, 10), min_size=1, max_size=4, unique=True))
def test_tables_of_all_scales_are_power_of_two_multiples(
    coefficients: Coefficients, scales: list[int]
) -> None:
    """One rounding serves them all, bit for bit."""
    together = tables(fwht(coefficients), 32, scales)
    assert list(together) == scales
    for scale in scales:
        assert together[scale].tobytes() == table(fwht(coefficients), 32, scale).tobytes()
        first = together[scales[0]] * np.float32(2.0 ** (scale - scales[0]))
        assert together[scale].tobytes() == first.tobytes()
