"""The K integers: exact, guarded, and the same in whatever order they were summed (DESIGN §1)."""

from fractions import Fraction
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorand.coefficients import (
    MAGNITUDE_LIMIT,
    Coefficients,
    add,
    check_magnitude,
    check_size,
    fwht,
    fwht_float,
    hadamard_column,
    quanta,
    table,
    tables,
    total_magnitude,
    zeros,
)
from lorand.errors import LedgerError

INT64: Final = np.iinfo(np.int64)


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


# ------------------------------------------------------------- the guard at 2^62


@pytest.mark.parametrize(
    "large",
    [
        [MAGNITUDE_LIMIT],
        [-MAGNITUDE_LIMIT],
        [2**61, -(2**61)],
        [INT64.min],
        [INT64.min, INT64.min],
        [INT64.max, INT64.max, 2],
        [INT64.min] * 64,
        [2**56] * 64,
    ],
    ids=["2^62", "-2^62", "2 x 2^61", "min", "2 x min", "wraps to 0", "64 x min", "64 x 2^56"],
)
def test_a_total_of_2_to_the_62_is_refused(large: list[int]) -> None:
    """DESIGN §2 step 7; sums that wrap in int64 do not slip through."""
    coefficients = zeros(64)
    coefficients[: len(large)] = large
    assert total_magnitude(coefficients) == sum(map(abs, large))
    for refuse in (check_magnitude, fwht):
        with pytest.raises(LedgerError, match="lower the learning rate or quantum_exponent"):
            refuse(coefficients)


@pytest.mark.parametrize("value", [MAGNITUDE_LIMIT - 1, 1 - MAGNITUDE_LIMIT])
def test_one_less_is_accepted(value: int) -> None:
    coefficients = zeros(64)
    coefficients[5] = value
    check_magnitude(coefficients)
    assert abs(int(fwht(coefficients)[0])) == MAGNITUDE_LIMIT - 1


@settings(deadline=None)
@given(st.lists(st.integers(int(INT64.min), int(INT64.max)), max_size=40))
def test_total_magnitude_is_exact(values: list[int]) -> None:
    assert total_magnitude(np.array(values, np.int64)) == sum(map(abs, values))


def test_add_refuses_a_delta_or_a_sum_beyond_the_limit() -> None:
    half = np.array([2**61], np.int64)
    once = add(zeros(64), [3], half)
    with pytest.raises(LedgerError):
        add(once, [4], half)
    with pytest.raises(LedgerError):
        add(once, [3], 2 * half)
    assert add(once, [3], -half).tolist() == [0] * 64


@pytest.mark.parametrize("size", [0, 1, 32, 63, 65, 4095, 2**21, -64])
def test_sizes_outside_the_design_are_refused(size: int) -> None:
    """DESIGN §2 step 5: K = 2^κ, 6 ≤ κ ≤ 20."""
    with pytest.raises(ValueError, match="power of two from 64 to 1048576"):
        check_size(size)
    with pytest.raises(ValueError, match="power of two from 64 to 1048576"):
        zeros(size)


# ------------------------------------------------------------- order does not matter


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_updates_in_any_order_give_the_same_coefficients_and_moves(data: st.DataObject) -> None:
    """DESIGN §1: the same bits in whatever order things were summed."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    updates = [
        (
            rng.permutation(128)[:count],
            rng.integers(-(2**50), 2**50, count, dtype=np.int64),
        )
        for count in data.draw(st.lists(st.integers(1, 128), min_size=1, max_size=8))
    ]
    results = []
    for order in (updates, data.draw(st.permutations(updates))):
        coefficients = zeros(128)
        for indices, delta in order:
            coefficients = add(coefficients, indices, delta)
        results.append((coefficients.tobytes(), table(fwht(coefficients), 32, 4).tobytes()))
    assert results[0] == results[1]


def test_add_leaves_its_argument_alone() -> None:
    before = zeros(64)
    after = add(before, [1, 9], np.array([5, -7], np.int64))
    assert not before.any()
    assert {i: int(a) for i, a in enumerate(after) if a} == {1: 5, 9: -7}


# ------------------------------------------------------------- table and quantum


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


def test_quanta_is_the_nearest_integer() -> None:
    assert quanta(0.01, 32) == 42949673
    assert quanta(-0.01, 32) == -42949673
    assert quanta(2.0**-9, 8) == 0
    assert quanta(3.0, 8) == 768
