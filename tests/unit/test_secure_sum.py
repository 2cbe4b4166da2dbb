"""The secure sum: exact with all, noise without one, and nothing else is taken.

Golden values are in secure_sum.json beside this file. They are normative: a member that derives
other masks cannot be summed. `python -m tests.unit.test_secure_sum` writes them anew, for a new
version of the tags.
"""

import copy
import dataclasses
import hashlib
import hmac
import json
import pickle
import struct
import threading
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st

from lorand.errors import ConfigError, ContributionError, HandshakeError
from lorand.privacy import primitives
from lorand.privacy.attempts import ANNOUNCEMENT_BYTES, ATTEMPT_BYTES, MAX_ATTEMPTS, MAX_BOUND
from lorand.privacy.secure_sum import (
    Attempt,
    IdentityKey,
    Keys,
    MaskedSum,
    OneVector,
    Roster,
    SumMember,
    masked_bytes,
)
from lorand.privacy.shared_noise import local_noise, tau
from lorand.privacy.vectors import IntVector

GOLDEN: Final = Path(__file__).with_name("secure_sum.json")
RUN, OTHER_RUN, STATE = bytes(range(32)), bytes(32), bytes(range(32, 64))
HALF: Final = 1 << 63


def secret(number: int, purpose: str) -> bytes:
    """Private bytes that are the same every time."""
    return hashlib.sha256(f"{purpose} {number}".encode()).digest()


class SameKeys:
    """In place of X25519PrivateKey: the same keys every time."""

    def __init__(self, first: int = 0) -> None:
        self.numbers = count(first)

    def generate(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(secret(next(self.numbers), "ephemeral"))


def name_of(number: int) -> str:
    return f"worker-{number:02}"


class Cohort:
    """Members that agreed, with the same keys every time, and a coordinator's bookkeeping."""

    def __init__(self, size: int, *, bound: int = MAX_BOUND, n_min: int = 3) -> None:
        identities = [IdentityKey(secret(number, "identity")) for number in range(size)]
        names = [name_of(number) for number in range(size)]
        self.identities = identities
        self.roster = Roster.of(
            {name: key.public for name, key in zip(names, identities, strict=True)}
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(primitives, "X25519PrivateKey", SameKeys())
            self.members = [
                SumMember(identity, self.roster, RUN, bound=bound, n_min=n_min)
                for identity in identities
            ]
        self.bound = bound
        self.announcements = [member.announcement for member in self.members]
        self.keys = Keys.verified(RUN, self.roster, self.announcements)
        for member in self.members:
            member.agree(self.announcements)
        self.rounds = count()

    def attempt(self, length: int, present: Iterable[str] | None = None) -> Attempt:
        """Attempt 0 of the next round."""
        return self.keys.attempt(
            next(self.rounds),
            0,
            self.roster.names if present is None else present,
            length=length,
            bound=self.bound,
            state_digest=STATE,
        )

    def open(self, attempt: Attempt, number: int = 0) -> OneVector:
        return self.members[number].open(
            attempt.to_bytes(),
            round_index=attempt.round_index,
            length=attempt.length,
            state_digest=STATE,
        )

    def masked(self, attempt: Attempt, vectors: dict[int, IntVector]) -> list[bytes]:
        return [self.open(attempt, number).mask(vector) for number, vector in vectors.items()]

    def total(self, attempt: Attempt, messages: Sequence[bytes]) -> IntVector:
        masked_sum = MaskedSum(self.roster, attempt)
        for message in messages:
            masked_sum.add(message)
        return masked_sum.total()


COHORTS: Final = {size: Cohort(size) for size in (3, 8, 32)}
"""For what holds in every round. Statistics make their own, so that they are the same each time."""


def payload(message: bytes) -> Any:
    """The y of a masked vector."""
    length = (len(message) - masked_bytes(0)) // 8
    return np.frombuffer(message, "<u8", count=length, offset=masked_bytes(0) - 64)


def copy_with(attempt: Attempt, **changes: Any) -> Attempt:
    return dataclasses.replace(attempt, **changes)


def integers(*values: int) -> IntVector:
    return np.array(values, np.int64)


@pytest.fixture
def three() -> Cohort:
    return Cohort(3, bound=1000)


@pytest.fixture
def four() -> Cohort:
    return Cohort(4, bound=1000)


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


def chi_square(data: bytes) -> float:
    """Pearson's statistic of bytes against the uniform distribution: 255 degrees of freedom."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())


LIMITS: Final = (160.0, 370.0)
"""Outside with probability below 1e-5; and keys, hence masks, are the same every time."""


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
    retry = cohort.keys.next_attempt(first, cohort.roster.names)
    later = cohort.attempt(8192)
    ys = [payload(cohort.open(attempt).mask(zeros)) for attempt in (first, retry, later)]
    ys.append(payload(cohort.open(later, 1).mask(zeros)))
    for i, one in enumerate(ys):
        for other in ys[:i]:
            assert LIMITS[0] < chi_square((one - other).tobytes()) < LIMITS[1]


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
    retry = four.keys.next_attempt(first, there)
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
    retry = four.keys.next_attempt(first, ["worker-00", "worker-01", "worker-02"])
    after = four.masked(retry, {number: integers(200 + number) for number in range(3)})
    late = stale[3].mask(integers(103))
    assert four.total(first, [*before, late]).tolist() == [406]
    with pytest.raises(ContributionError, match="of another attempt"):
        MaskedSum(four.roster, retry).add(late)
    assert four.total(retry, after).tolist() == [603]


def test_what_was_not_sent_before_a_retry_never_is(four: Cohort) -> None:
    first = four.attempt(1)
    stale = four.open(first)
    retry = four.keys.next_attempt(first, four.roster.names)
    assert four.open(retry).mask(integers(1))
    with pytest.raises(ContributionError, match="fresh batch and fresh noise"):
        stale.mask(integers(1))


def test_too_few_are_not_summed(four: Cohort) -> None:
    first = four.attempt(1)
    with pytest.raises(ContributionError, match="2 members cannot be summed: wait"):
        four.keys.next_attempt(first, ["worker-00", "worker-01"])
    careful = Cohort(4, n_min=4)
    retry = careful.attempt(1, careful.roster.names[:3])
    with pytest.raises(HandshakeError, match="at least 4: wait for the others"):
        careful.open(retry)
    last = copy_with(first, number=MAX_ATTEMPTS - 1)
    with pytest.raises(ContributionError, match=f"{MAX_ATTEMPTS} attempts: abandon it"):
        four.keys.next_attempt(last, four.roster.names)


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
    retry = three.keys.next_attempt(rounds[1], three.roster.names)
    second = three.keys.next_attempt(retry, three.roster.names)
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


# ------------------------------------------------------------- keys that are refused


def resigned(announcement: bytes, identity: IdentityKey, **changes: bytes) -> bytes:
    """An announcement with parts replaced and signed again, by whoever wants to."""
    places = {"tag": (0, 17), "run": (17, 49), "roster": (49, 81), "member": (81, 83)}
    places["key"] = (83, 115)
    body = bytearray(announcement[:115])
    for part, value in changes.items():
        begin, end = places[part]
        body[begin:end] = value
    return bytes(body) + identity.sign(bytes(body))


def outsider_for(cohort: Cohort) -> IdentityKey:
    assert name_of(99) not in cohort.roster.names
    return IdentityKey(secret(99, "identity"))


def test_the_coordinator_cannot_put_its_own_key_in_place(three: Cohort) -> None:
    """The man in the middle that unsigned keys invite."""
    key = primitives.EphemeralKey().public
    forged = resigned(three.announcements[1], outsider_for(three), key=key)
    with pytest.raises(HandshakeError, match="not signed by the member it names"):
        three.members[0].agree([three.announcements[0], forged, three.announcements[2]])


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, ANNOUNCEMENT_BYTES - 1), bit=st.integers(0, 7))
def test_every_bit_of_an_announcement_counts(place: int, bit: int) -> None:
    cohort = COHORTS[3]
    changed = bytearray(cohort.announcements[1])
    changed[place] ^= 1 << bit
    announcements = [cohort.announcements[0], bytes(changed), cohort.announcements[2]]
    with pytest.raises(HandshakeError):
        cohort.members[0].agree(announcements)


def test_swapped_keys_are_refused(three: Cohort) -> None:
    """Member 1's key under member 2's number: its signature is not hers."""
    first, second = three.announcements[1:]
    swapped = [three.announcements[0], first[:81] + second[81:83] + first[83:], second]
    with pytest.raises(HandshakeError, match="not signed by the member it names"):
        three.members[0].agree(swapped)


def test_a_member_cannot_sign_the_key_of_another(three: Cohort) -> None:
    theirs = three.announcements[1][83:115]
    stolen = resigned(three.announcements[2], three.identities[2], key=theirs)
    with pytest.raises(HandshakeError, match="announced the key of another member"):
        three.members[0].agree([*three.announcements[:2], stolen])


def test_keys_of_other_runs_and_rosters_are_refused(three: Cohort, four: Cohort) -> None:
    other = SumMember(three.identities[1], three.roster, OTHER_RUN, bound=1)
    good = three.announcements
    with pytest.raises(HandshakeError, match="for another run"):
        three.members[0].agree([good[0], other.announcement, good[2]])
    with pytest.raises(HandshakeError, match="for another roster"):
        three.members[0].agree([good[0], four.announcements[1], good[2]])


def test_an_old_key_of_the_same_run_is_found_out(three: Cohort) -> None:
    """By its owner, and by whoever holds the new one, before anything is masked."""
    old = SumMember(three.identities[1], three.roster, RUN, bound=three.bound).announcement
    replayed = [three.announcements[0], old, three.announcements[2]]
    with pytest.raises(HandshakeError, match="an old one, of this worker"):
        three.members[1].agree(replayed)
    attempt = Keys.verified(RUN, three.roster, replayed).attempt(
        0, 0, three.roster.names, length=1, bound=three.bound, state_digest=STATE
    )
    with pytest.raises(HandshakeError, match="other keys"):
        three.open(attempt)
    with pytest.raises(HandshakeError, match="announced twice"):
        three.members[0].agree([*three.announcements, old])


def test_a_key_of_small_order_is_refused(three: Cohort) -> None:
    """Its shared secret would be known to everyone."""
    for point in (bytes(32), b"\1" + bytes(31)):
        unsound = resigned(three.announcements[1], three.identities[1], key=point)
        with pytest.raises(HandshakeError, match="hides nothing"):
            three.members[0].agree([three.announcements[0], unsound, three.announcements[2]])


@pytest.mark.parametrize("number", [3, 31, 65535])
def test_a_number_beyond_the_roster_is_refused(three: Cohort, number: int) -> None:
    changed = resigned(
        three.announcements[1], three.identities[1], member=number.to_bytes(2, "little")
    )
    with pytest.raises(HandshakeError, match="not signed by the member it names"):
        Keys.verified(RUN, three.roster, [changed])


def test_announcements_of_another_length(three: Cohort) -> None:
    for data in (b"", three.announcements[0][:-1], three.announcements[0] + b"\0"):
        with pytest.raises(HandshakeError, match="install the same version"):
            Keys.verified(RUN, three.roster, [data])


def test_an_attempt_waits_for_all_keys(three: Cohort) -> None:
    keys = Keys.verified(RUN, three.roster, three.announcements[:2])
    with pytest.raises(HandshakeError, match="no key of worker-02: wait"):
        keys.attempt(0, 0, three.roster.names, length=1, bound=1, state_digest=STATE)
    fresh = SumMember(three.identities[0], three.roster, RUN, bound=three.bound)
    with pytest.raises(HandshakeError, match="agree again"):
        fresh.open(three.attempt(1).to_bytes(), round_index=0, length=1, state_digest=STATE)


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


# ------------------------------------------------------------- roster and identity


def test_a_roster_is_the_same_in_any_order(three: Cohort) -> None:
    backwards = Roster.of(dict(reversed(three.roster.members)))
    assert backwards == three.roster == Roster.from_json(three.roster.to_json())
    assert backwards.digest() == hashlib.sha256(three.roster.to_json().encode()).digest()


def test_rosters_that_cannot_be(three: Cohort) -> None:
    (a, ka), (b, kb), (c, kc) = three.roster.members
    many = {name_of(n): IdentityKey(secret(n, "identity")).public for n in range(33)}
    wrong = [
        (((a, ka), (b, kb)), "3 to 32 members, not 2"),
        (tuple(sorted(many.items())), "3 to 32 members, not 33"),
        (((b, kb), (a, ka), (c, kc)), "sorted by name"),
        (((a, ka), (a, kb), (c, kc)), "sorted by name"),
        (((a, ka), (b, ka), (c, kc)), "its own key"),
        (((a, ka), (b, kb[1:]), (c, kc)), "its own key"),
        ((("", ka), (b, kb), (c, kc)), "no name"),
        ((("a\n", ka), (b, kb), (c, kc)), "no name"),
    ]
    for members, message in wrong:
        with pytest.raises(ConfigError, match=message):
            Roster(members)
    for text in ("", "[]", "{}", '{"format":"x","members":[]}', three.roster.to_json()[:-3]):
        with pytest.raises(ConfigError, match="not with the coordinator"):
            Roster.from_json(text)
    with pytest.raises(ConfigError, match="identity key is not in the roster"):
        SumMember(outsider_for(three), three.roster, RUN, bound=1)
    with pytest.raises(ConfigError, match="nobody not in the roster"):
        three.roster.numbers(["nobody"])


def test_an_identity_key_is_restored_from_its_bytes() -> None:
    key = IdentityKey()
    again = IdentityKey(key.private_bytes())
    assert again.public == key.public != IdentityKey().public
    assert primitives.signed_by(key.public, again.sign(b"body"), b"body")
    assert not primitives.signed_by(key.public, again.sign(b"body"), b"other")
    assert not primitives.signed_by(b"", again.sign(b"body"), b"body")
    with pytest.raises(ConfigError, match="restore the file"):
        IdentityKey(b"short")


# ------------------------------------------------------------- golden values


def transcript() -> dict[str, Any]:
    """Four members, a first attempt that misses one, and a second that succeeds."""
    cohort = Cohort(4, bound=1000)
    first = cohort.attempt(3)
    vectors = {number: integers(number, -number, 1000) for number in range(4)}
    before = cohort.masked(first, {number: vectors[number] for number in range(3)})
    retry = cohort.keys.next_attempt(first, cohort.roster.names[:3])
    fresh = {number: integers(-1000, 7 * number, 0) for number in range(3)}
    after = cohort.masked(retry, fresh)
    return {
        "roster": json.loads(cohort.roster.to_json()),
        "roster_digest": cohort.roster.digest().hex(),
        "announcements": [announcement.hex() for announcement in cohort.announcements],
        "attempts": [first.to_bytes().hex(), retry.to_bytes().hex()],
        "masked": [[message.hex() for message in messages] for messages in (before, after)],
        "sum": cohort.total(retry, after).tolist(),
    }


def test_the_transcript_is_the_committed_one() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["sum"] == [-3000, 21, 0]
    assert transcript() == golden


def test_the_committed_transcript_is_the_formula() -> None:
    """Masks derived a second time, from private keys and the layout that `attempts` documents."""
    golden = json.loads(GOLDEN.read_text())
    attempt = bytes.fromhex(golden["attempts"][1])
    keys = [X25519PrivateKey.from_private_bytes(secret(n, "ephemeral")) for n in range(4)]
    publics = [key.public_key() for key in keys]
    raw = [public.public_bytes_raw() for public in publics]
    head = struct.unpack("<QIIIQ", attempt[21:49])
    assert (attempt[:21], head) == (b"lorand/sum/attempt/v1", (0, 1, 3, 0b111, 1000))
    roster = hashlib.sha256(json.dumps(golden["roster"], separators=(",", ":")).encode()).digest()
    digests = hashlib.sha256(b"lorand/sum/keys/v1" + b"".join(raw[:3])).digest()
    assert attempt[49:] == RUN + roster + STATE + digests
    vectors = [[-1000, 7 * number, 0] for number in range(3)]
    for number, vector in enumerate(vectors):
        message = bytes.fromhex(golden["masked"][1][number])
        expected = [value % 2**64 for value in vector]
        for other in {0, 1, 2} - {number}:
            pair = struct.pack("<HH", min(number, other), max(number, other))
            info = b"lorand/sum/mask/v1" + attempt + pair
            extracted = hmac.digest(bytes(32), keys[number].exchange(publics[other]), "sha256")
            key = hmac.digest(extracted, info + b"\1", "sha256")
            cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
            stream = struct.unpack("<3Q", cipher.update(bytes(24)))
            sign = 1 if number < other else -1
            expected = [(y + sign * r) % 2**64 for y, r in zip(expected, stream, strict=True)]
        body = b"lorand/sum/masked/v1" + hashlib.sha256(attempt).digest()
        body += struct.pack("<H3Q", number, *expected)
        identity = Ed25519PrivateKey.from_private_bytes(secret(number, "identity"))
        assert message == body + identity.sign(body)


# ------------------------------------------------------------- shared noise


def rounded_normal(std: float, size: int) -> IntVector:
    return np.rint(np.random.default_rng(1).normal(0, std, size)).astype(np.int64)


@pytest.mark.parametrize(
    ("std", "expected"), [(0.5, 2.10), (1.0, 5.4e-4), (2.0, 7e-17), (4.0, 2.6e-68)]
)
def test_how_far_a_sum_of_eight_is_from_gaussian(std: float, expected: float) -> None:
    """τ of arXiv 2102.06387."""
    assert tau(std, 8) == pytest.approx(expected, rel=0.03)
    assert tau(std, 1) == 0


@pytest.mark.parametrize("honest", [1, 3, 8, 32])
def test_the_honest_shares_are_enough(honest: int) -> None:
    """Their variances add up to σ²C², and to hardly more."""
    share = local_noise(3.7, 100, members=32, honest_min=honest)
    assert 370**2 <= honest * share.std**2 < 370.01**2
    assert share.tau <= tau(4, honest)
    noise = share.draw(rounded_normal, 10_000)
    assert noise.std() == pytest.approx(share.std, rel=0.03)
    assert share.bound(100) >= 100 + 16 * share.std


def test_epsilon_of_a_hundred_sums() -> None:
    """Eight shares, C = 64 steps, σ = 4, δ = 1e-5: 14.13 by Rényi divergences."""
    share = local_noise(4.0, 64, members=8, honest_min=8)
    orders = np.arange(1.5, 20, 0.05)
    spent = [
        100 * share.renyi(a, 64, 64)
        + (np.log(1e5) + (a - 1) * np.log(1 - 1 / a) - np.log(a)) / (a - 1)
        for a in orders
    ]
    assert min(spent) == pytest.approx(14.13, abs=0.01)


def test_noise_on_a_coarse_grid_is_refused() -> None:
    with pytest.raises(ConfigError, match="the clip bound is at least 12 steps"):
        local_noise(1.0, 11, members=9, honest_min=9)
    assert local_noise(1.0, 12, members=9, honest_min=9).std == 4.0


@pytest.mark.parametrize(
    ("multiplier", "clip", "members", "honest", "message"),
    [
        (0.0, 8, 8, 8, "hides nothing"),
        (float("nan"), 8, 8, 8, "hides nothing"),
        (float("inf"), 8, 8, 8, "hides nothing"),
        (1.0, 0, 8, 8, "hides nothing"),
        (9.0, 8, 8, 0, "cannot be the honest ones"),
        (9.0, 8, 8, 9, "cannot be the honest ones"),
        (9.0, 8, 33, 9, "cannot be the honest ones"),
    ],
)
def test_noise_that_cannot_be(
    multiplier: float, clip: int, members: int, honest: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        local_noise(multiplier, clip, members=members, honest_min=honest)


def test_a_sampler_of_another_shape_is_refused() -> None:
    share = local_noise(4.0, 64, members=8, honest_min=4)
    with pytest.raises(ValueError, match="the sampler gave"):
        share.draw(lambda std, size: np.zeros(size + 1, np.int64), 3)


def test_noise_and_sum_together() -> None:
    """Eight workers, noise of each, one sum: the data and a noise of at least σC."""
    cohort = Cohort(8, bound=local_noise(4.0, 64, members=8, honest_min=6).bound(64))
    share = local_noise(4.0, 64, members=8, honest_min=6)
    generator = np.random.default_rng(2)
    noises = [
        share.draw(lambda std, n: np.rint(generator.normal(0, std, n)).astype(np.int64), 4096)
        for _ in range(8)
    ]
    attempt = cohort.attempt(4096)
    messages = cohort.masked(attempt, {n: noise + 64 for n, noise in enumerate(noises)})
    total = cohort.total(attempt, messages) - 8 * 64
    assert total.tolist() == np.sum(noises, axis=0).tolist()
    assert total.std() == pytest.approx(256 * (8 / 6) ** 0.5, rel=0.05)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(transcript(), indent=1) + "\n")
