"""Attempts at a secure sum: one vector for each, and only for the one that was agreed."""

import copy
import dataclasses
import pickle
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.secure_sum.cohort import (
    COHORTS,
    LIMITS,
    OTHER_RUN,
    RUN,
    STATE,
    Cohort,
    chi_square,
    integers,
    payload,
)

from lorand.errors import ContributionError, HandshakeError
from lorand.privacy import primitives
from lorand.privacy.attempts import MAX_ATTEMPTS, MAX_BOUND
from lorand.privacy.secure_sum import Attempt, Keys, MaskedSum, OneVector, SumMember, masked_bytes


def copy_with(attempt: Attempt, **changes: Any) -> Attempt:
    return dataclasses.replace(attempt, **changes)


# ------------------------------------------------------------- a member drops out


def test_a_dropped_member_costs_a_retry_with_other_masks(four: Cohort) -> None:
    first = four.attempt(1024)
    vectors = {number: np.full(1024, number, np.int64) for number in range(4)}
    before = four.masked(first, {n: vectors[n] for n in range(3)})
    masked_sum = MaskedSum(four.roster, first)
    for message in before:
        masked_sum.add(message)
    assert masked_sum.missing == ("worker-03",)
    there = [name for name in four.roster.names if name not in masked_sum.missing]
    retry = four.retry(first, there)
    assert (retry.number, retry.present) == (1, (0, 1, 2))
    fresh = {n: 10 + vectors[n] for n in range(3)}
    after = four.masked(retry, fresh)
    assert four.total(retry, after).tolist() == [33] * 1024
    for old, new, number in zip(before, after, range(3), strict=True):
        difference = payload(new) - payload(old) - np.uint64(10)
        assert LIMITS[0] < chi_square(difference.tobytes()) < LIMITS[1], number
        assert not np.intersect1d(payload(new), payload(old)).size


def test_the_late_vector_completes_only_its_own_attempt(four: Cohort) -> None:
    """Why vectors must be fresh: both sums are open then, and each was charged."""
    first = four.attempt(1)
    stale = {number: four.open(first, number) for number in range(4)}
    before = [stale[number].mask(integers(100 + number)) for number in range(3)]
    retry = four.retry(first, ["worker-00", "worker-01", "worker-02"])
    after = four.masked(retry, {number: integers(200 + number) for number in range(3)})
    late = stale[3].mask(integers(103))
    assert four.total(first, [*before, late]).tolist() == [406]
    with pytest.raises(ContributionError, match="of another attempt"):
        MaskedSum(four.roster, retry).add(late)
    assert four.total(retry, after).tolist() == [603]


def test_what_was_not_sent_before_a_retry_never_is(four: Cohort) -> None:
    first = four.attempt(1)
    stale = four.open(first)
    retry = four.retry(first, four.roster.names)
    assert four.open(retry).mask(integers(1))
    with pytest.raises(ContributionError, match="fresh batch and fresh noise"):
        stale.mask(integers(1))


def test_too_few_are_not_summed(four: Cohort) -> None:
    first = four.attempt(1)
    with pytest.raises(ContributionError, match="2 members cannot be summed: wait"):
        four.retry(first, ["worker-00", "worker-01"])
    careful = Cohort(4, n_min=4)
    retry = careful.attempt(1, careful.roster.names[:3])
    with pytest.raises(HandshakeError, match="at least 4: wait for the others"):
        careful.open(retry)
    last = copy_with(first, number=MAX_ATTEMPTS - 1)
    with pytest.raises(ContributionError, match=f"{MAX_ATTEMPTS} attempts: abandon it"):
        four.retry(last, four.roster.names)


# ------------------------------------------------------------- one vector an attempt


def test_a_second_vector_is_refused(three: Cohort) -> None:
    attempt = three.attempt(1)
    one = three.open(attempt)
    one.mask(integers(1))
    for values in (integers(1), integers(2)):
        with pytest.raises(ContributionError, match="over for this worker: begin another"):
            one.mask(values)
    with pytest.raises(ContributionError, match="over for this worker: begin another"):
        three.open(attempt)


def test_attempts_only_rise(three: Cohort) -> None:
    rounds = [three.attempt(1) for _ in range(3)]
    three.open(rounds[1])
    with pytest.raises(ContributionError, match="attempt 0 of round 0 is over"):
        three.open(rounds[0])
    retry = three.retry(rounds[1], three.roster.names)
    second = three.retry(retry, three.roster.names)
    three.open(second)
    with pytest.raises(ContributionError, match="attempt 1 of round 1 is over"):
        three.open(retry)
    three.open(rounds[2])


def test_agreeing_again_opens_nothing_twice(three: Cohort) -> None:
    attempt = three.attempt(1)
    three.open(attempt).mask(integers(1))
    three.members[0].agree(three.announcements)
    with pytest.raises(ContributionError, match="is over"):
        three.open(attempt)


def test_threads_do_not_get_two(three: Cohort) -> None:
    """Neither two openings of one attempt, nor two vectors of one opening."""
    attempt = three.attempt(4096)
    opened: list[OneVector] = []
    masked: list[bytes] = []
    refused: list[ContributionError] = []
    barrier = threading.Barrier(8)

    def open_and_mask() -> None:
        barrier.wait()
        try:
            opened.append(three.open(attempt))
        except ContributionError as error:
            refused.append(error)
        barrier.wait()
        try:
            masked.append(opened[0].mask(np.zeros(4096, np.int64)))
        except ContributionError as error:
            refused.append(error)

    threads = [threading.Thread(target=open_and_mask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(opened), len(masked), len(refused)) == (1, 1, 14)


def test_holders_of_secrets_cannot_be_copied(three: Cohort) -> None:
    member = three.members[0]
    for holder in (member, three.open(three.attempt(1)), primitives.EphemeralKey()):
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied"):
                copied(holder)


def test_a_restarted_member_has_another_key(three: Cohort) -> None:
    again = SumMember(three.identities[0], three.roster, RUN, bound=three.bound)
    assert again.announcement != three.announcements[0]
    with pytest.raises(HandshakeError, match="an old one, of this worker: announce again"):
        again.agree(three.announcements)
    renewed = [again.announcement, *three.announcements[1:]]
    again.agree(renewed)
    attempt = Keys.verified(RUN, three.roster, renewed).attempt(
        7, 0, three.roster.names, length=1, bound=three.bound, state_digest=STATE
    )
    with pytest.raises(HandshakeError, match="other keys than those this worker verified"):
        three.open(attempt, 1)
    three.members[0] = again
    for member in three.members:
        member.agree(renewed)
    messages = three.masked(attempt, {number: integers(5) for number in range(3)})
    assert three.total(attempt, messages).tolist() == [15]


# ------------------------------------------------------------- attempts that are refused


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"run_digest": OTHER_RUN}, HandshakeError),
        ({"roster_digest": OTHER_RUN}, HandshakeError),
        ({"state_digest": OTHER_RUN}, HandshakeError),
        ({"keys_digest": OTHER_RUN}, HandshakeError),
        ({"round_index": 1}, ContributionError),
        ({"length": 3}, ContributionError),
        ({"bound": 999}, HandshakeError),
        ({"present": (1, 2, 3)}, HandshakeError),
        ({"present": (0, 1, 2)}, HandshakeError),
        ({"present": (0, 1, 2, 3, 4)}, HandshakeError),
    ],
)
def test_a_worker_enters_no_other_attempt(
    four: Cohort, changes: dict[str, Any], error: type[Exception]
) -> None:
    """And refusing costs nothing: the right one can still be entered."""
    attempt = four.attempt(2)
    other = copy_with(attempt, **changes)
    with pytest.raises(error):
        four.members[0].open(other.to_bytes(), round_index=0, length=2, state_digest=STATE)
    assert four.open(attempt).mask(integers(1, 2))


@pytest.mark.parametrize(
    "changes",
    [
        {"run_digest": OTHER_RUN},
        {"state_digest": OTHER_RUN},
        {"keys_digest": OTHER_RUN},
        {"round_index": 1},
        {"number": 1},
        {"bound": 999},
        {"present": (0, 1, 2)},
    ],
)
def test_a_vector_of_another_attempt_is_refused(four: Cohort, changes: dict[str, Any]) -> None:
    attempt = four.attempt(2)
    message = four.open(attempt).mask(integers(1, 2))
    other = copy_with(attempt, **changes)
    with pytest.raises(ContributionError, match="of another attempt: answer this one"):
        MaskedSum(four.roster, other).add(message)


def test_a_worker_masks_for_no_sum_without_it(four: Cohort) -> None:
    others = four.attempt(2, four.roster.names[1:])
    with pytest.raises(HandshakeError, match="wants to be one of at least 3"):
        four.open(others)


def test_members_told_different_things_do_not_cancel(four: Cohort) -> None:
    """A coordinator that lies about who is there gets noise, not a smaller sum."""
    first = four.attempt(1024)
    told = [first, copy_with(first, present=(0, 1, 2)), first]
    told[1] = copy_with(told[1], keys_digest=four.keys.digest((0, 1, 2)))
    zeros = np.zeros(1024, np.int64)
    messages = [four.open(attempt, number).mask(zeros) for number, attempt in enumerate(told)]
    messages.append(four.open(first, 3).mask(zeros))
    total = np.sum([payload(message) for message in messages], axis=0, dtype=np.uint64)
    assert LIMITS[0] < chi_square(total.tobytes()) < LIMITS[1]


@pytest.mark.parametrize("length", [1, 3])
def test_another_length_is_refused(three: Cohort, length: int) -> None:
    attempt = three.attempt(2)
    message = three.open(attempt).mask(integers(1, 2))
    with pytest.raises(ContributionError, match="a masked vector has"):
        MaskedSum(three.roster, copy_with(attempt, length=length)).add(message)


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, masked_bytes(2) - 1), bit=st.integers(0, 7))
def test_every_bit_of_a_masked_vector_counts(place: int, bit: int) -> None:
    cohort = COHORTS[3]
    attempt = cohort.attempt(2)
    message = bytearray(cohort.open(attempt).mask(integers(1, 2)))
    message[place] ^= 1 << bit
    with pytest.raises(ContributionError):
        MaskedSum(cohort.roster, attempt).add(bytes(message))


def test_a_member_cannot_speak_for_another_nor_twice(three: Cohort) -> None:
    attempt = three.attempt(1)
    mine = three.open(attempt).mask(integers(1))
    body = mine[:52] + b"\1\0" + mine[54:-64]
    forged = body + three.identities[0].sign(body)
    masked_sum = MaskedSum(three.roster, attempt)
    with pytest.raises(ContributionError, match="not signed by 'worker-01'"):
        masked_sum.add(forged)
    masked_sum.add(mine)
    changed = mine[:54] + bytes(8)
    second = changed + three.identities[0].sign(changed)
    with pytest.raises(ContributionError, match="sent two vectors: give the attempt up"):
        masked_sum.add(second)
    assert masked_sum.missing == ("worker-01", "worker-02")


def test_attempts_that_cannot_be(three: Cohort, four: Cohort) -> None:
    attempt = three.attempt(1)
    data = attempt.to_bytes()
    for broken in (b"", data[:-1], data + b"\0", b"x" + data[1:]):
        with pytest.raises(ContributionError, match="cannot be read"):
            Attempt.from_bytes(broken)
    assert Attempt.from_bytes(data) == attempt
    for changes in (
        {"length": 0},
        {"length": (1 << 20) + 1},
        {"bound": 0},
        {"bound": MAX_BOUND + 1},
        {"number": -1},
        {"round_index": -1},
        {"round_index": 1 << 64},
        {"present": (0, 1)},
        {"state_digest": b""},
    ):
        with pytest.raises(ContributionError):
            copy_with(attempt, **changes)
    with pytest.raises(HandshakeError, match="another roster"):
        MaskedSum(four.roster, attempt)
    with pytest.raises(ValueError, match="32 bytes"):
        SumMember(three.identities[0], three.roster, b"short", bound=1)
