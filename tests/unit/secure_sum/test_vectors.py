"""The secure sum: exact with all, noise without one, and nothing beyond its bounds."""

from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.secure_sum.cohort import (
    COHORTS,
    LIMITS,
    RUN,
    Cohort,
    chi_square,
    integers,
    name_of,
    payload,
)

from lorand.errors import ConfigError, ContributionError
from lorand.privacy.attempts import ANNOUNCEMENT_BYTES, ATTEMPT_BYTES, MAX_BOUND
from lorand.privacy.secure_sum import MaskedSum, SumMember, masked_bytes
from lorand.privacy.vectors import IntVector

HALF: Final = 1 << 63


# ------------------------------------------------------------- the sum


@pytest.mark.parametrize("length", [1, 64, 4096])
@pytest.mark.parametrize("size", [3, 8, 32])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_sums_are_exact(size: int, length: int, data: st.DataObject) -> None:
    """Also where every number is the largest or the least."""
    cohort = COHORTS[size]
    extremes = st.sampled_from([-MAX_BOUND, -1, 0, 1, MAX_BOUND])
    corner = data.draw(st.lists(extremes, min_size=size, max_size=size))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    vectors = generator.integers(-MAX_BOUND, MAX_BOUND, (size, length), np.int64, endpoint=True)
    vectors[:, 0] = corner
    attempt = cohort.attempt(length)
    messages = cohort.masked(attempt, dict(enumerate(vectors)))
    total = cohort.total(attempt, messages)
    assert total.dtype == np.int64
    assert total.tolist() == [sum(map(int, column)) for column in vectors.T]


def test_the_largest_sum_does_not_wrap_around() -> None:
    cohort = COHORTS[32]
    for value in (MAX_BOUND, -MAX_BOUND):
        attempt = cohort.attempt(1)
        messages = cohort.masked(attempt, {number: integers(value) for number in range(32)})
        assert cohort.total(attempt, messages).tolist() == [32 * value]
    assert 32 * MAX_BOUND < HALF


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(8)), values=st.lists(st.integers(-9, 9), min_size=8, max_size=8))
def test_order_does_not_matter(order: list[int], values: list[int]) -> None:
    cohort = COHORTS[8]
    attempt = cohort.attempt(1)
    messages = cohort.masked(attempt, {i: integers(value) for i, value in enumerate(values)})
    shuffled = [messages[place] for place in order]
    assert cohort.total(attempt, shuffled).tolist() == [sum(values)]


def test_the_same_message_again_changes_nothing(three: Cohort) -> None:
    attempt = three.attempt(2)
    messages = three.masked(attempt, {number: integers(number, -5) for number in range(3)})
    masked_sum = MaskedSum(three.roster, attempt)
    assert masked_sum.missing == three.roster.names
    assert [masked_sum.add(m) for m in (messages[0], messages[0])] == ["worker-00"] * 2
    assert masked_sum.missing == ("worker-01", "worker-02")
    for message in messages[::-1]:
        masked_sum.add(message)
    for _ in range(2):
        assert masked_sum.total().tolist() == [3, -15]


def test_bytes_on_the_wire() -> None:
    cohort = COHORTS[32]
    attempt = cohort.attempt(64)
    assert {len(a) for a in cohort.announcements} == {ANNOUNCEMENT_BYTES} == {179}
    assert len(attempt.to_bytes()) == ATTEMPT_BYTES == 177
    assert len(cohort.open(attempt).mask(np.zeros(64, np.int64))) == masked_bytes(64) == 118 + 512


# ------------------------------------------------------------- what a mask hides


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_masks_cancel_only_with_all(missing: int) -> None:
    """Whoever is left out, what the others add up to is uniform."""
    cohort = Cohort(3)
    attempt = cohort.attempt(8192)
    messages = cohort.masked(attempt, {n: np.zeros(8192, np.int64) for n in range(3)})
    whole = np.sum([payload(message) for message in messages], axis=0, dtype=np.uint64)
    assert not whole.any()
    rest = np.sum([payload(m) for n, m in enumerate(messages) if n != missing], axis=0)
    assert LIMITS[0] < chi_square(rest.astype(np.uint64).tobytes()) < LIMITS[1]
    masked_sum = MaskedSum(cohort.roster, attempt)
    for number, message in enumerate(messages):
        if number != missing:
            masked_sum.add(message)
    with pytest.raises(ContributionError, match=f"without {name_of(missing)}: begin another"):
        masked_sum.total()


@pytest.mark.parametrize("value", [0, 1, -MAX_BOUND, MAX_BOUND])
@pytest.mark.parametrize("size", [3, 8])
def test_one_masked_vector_is_uniform_whatever_it_hides(size: int, value: int) -> None:
    """In all its bytes, in the highest and in the lowest of each number."""
    cohort = Cohort(size)
    vector = np.full(65536, value, np.int64)
    attempt = cohort.attempt(len(vector))
    y = payload(cohort.open(attempt, size - 1).mask(vector)).view(np.uint8).reshape(-1, 8)
    for part in (y, y[:, 0], y[:, 7]):
        assert LIMITS[0] < chi_square(part.tobytes()) < LIMITS[1]


def test_one_masked_vector_tells_nothing_of_its_numbers() -> None:
    """Bytes of y beside bytes of x: chi-square of the table of their top four bits."""
    cohort = Cohort(3)
    x = np.random.default_rng(0).integers(-MAX_BOUND, MAX_BOUND, 65536, np.int64, endpoint=True)
    y = payload(cohort.open(cohort.attempt(len(x))).mask(x))
    rows = ((x + MAX_BOUND) >> 55).astype(np.int64)
    columns = (y >> np.uint64(60)).astype(np.int64)
    table = np.bincount(rows * 16 + columns, minlength=256).reshape(16, 16)
    expected = table.sum(0) * table.sum(1)[:, None] / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    assert 140 < statistic < 330  # 225 degrees of freedom, 4 to 5 standard deviations


def test_masks_of_two_attempts_share_nothing() -> None:
    """Differences of equal vectors of two attempts, two rounds and two members are uniform."""
    cohort = Cohort(8)
    zeros = np.zeros(8192, np.int64)
    first = cohort.attempt(8192)
    retry = cohort.retry(first, cohort.roster.names)
    later = cohort.attempt(8192)
    ys = [payload(cohort.open(attempt).mask(zeros)) for attempt in (first, retry, later)]
    ys.append(payload(cohort.open(later, 1).mask(zeros)))
    for i, one in enumerate(ys):
        for other in ys[:i]:
            assert LIMITS[0] < chi_square((one - other).tobytes()) < LIMITS[1]


# ------------------------------------------------------------- bounds


@pytest.mark.parametrize("values", [(1001, 0), (0, -1001), (-(2**63), 0), (2**63 - 1, 0)])
def test_a_worker_masks_nothing_beyond_its_bound(three: Cohort, values: tuple[int, int]) -> None:
    """And the attempt is over for it: asking until a vector fits would tell of the others."""
    one = three.open(three.attempt(2))
    with pytest.raises(ContributionError, match="beyond the bound 1000: clip before noise"):
        one.mask(integers(*values))
    with pytest.raises(ContributionError, match="is over"):
        one.mask(integers(0, 0))


def test_a_worker_masks_only_vectors_of_integers(three: Cohort) -> None:
    wrong: list[Any] = [np.zeros(2), np.zeros(2, np.int32), np.zeros(2, np.uint64)]
    wrong += [np.zeros(3, np.int64), np.zeros((1, 2), np.int64)]
    for values in wrong:
        with pytest.raises(ContributionError, match="a vector of 2 int64 is summed"):
            three.open(three.attempt(2)).mask(values)


def raised(three: Cohort, by: int) -> IntVector:
    """The sum where a dishonest member 0, with a sound signature, adds so much to its vector."""
    attempt = three.attempt(1)
    messages = three.masked(attempt, {number: integers(1000) for number in range(3)})
    y = (payload(messages[0]) + np.uint64(by % 2**64)).astype("<u8").tobytes()
    body = messages[0][:54] + y
    return three.total(attempt, [body + three.identities[0].sign(body), *messages[1:]])


@pytest.mark.parametrize("by", [1, -6001, HALF, HALF - 1])
def test_a_sum_beyond_the_bound_is_refused(three: Cohort, by: int) -> None:
    with pytest.raises(ContributionError, match="beyond 3000: a member broke the protocol"):
        raised(three, by)


def test_within_the_bound_a_member_shifts_the_sum_as_it_likes(three: Cohort) -> None:
    """There is no range proof; the documentation says so."""
    assert raised(three, -6000).tolist() == [-3000]


@pytest.mark.parametrize(("bound", "n_min"), [(0, 3), (MAX_BOUND + 1, 3), (1, 2), (1, 4)])
def test_limits_of_a_member(three: Cohort, bound: int, n_min: int) -> None:
    with pytest.raises(ConfigError, match="set 3 members or more, and a bound of 1"):
        SumMember(three.identities[0], three.roster, RUN, bound=bound, n_min=n_min)
