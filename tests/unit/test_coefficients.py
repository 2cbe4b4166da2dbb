"""The K integers: exact, guarded, and the same in whatever order they were summed (DESIGN §1)."""

from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorand.coefficients import (
    MAGNITUDE_LIMIT,
    add,
    check_magnitude,
    check_size,
    quanta,
    total_magnitude,
    zeros,
)
from lorand.errors import LedgerError
from lorand.transform import fwht, table

INT64: Final = np.iinfo(np.int64)


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


# ------------------------------------------------------------- quantum


def test_quanta_is_the_nearest_integer() -> None:
    assert quanta(0.01, 32) == 42949673
    assert quanta(-0.01, 32) == -42949673
    assert quanta(2.0**-9, 8) == 0
    assert quanta(3.0, 8) == 768
