"""Who is in a secure sum, and whose keys are its members'."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.secure_sum.cohort import COHORTS, OTHER_RUN, RUN, STATE, Cohort, name_of, secret

from lorand.errors import ConfigError, HandshakeError
from lorand.privacy import primitives
from lorand.privacy.attempts import ANNOUNCEMENT_BYTES
from lorand.privacy.roster import Members
from lorand.privacy.secure_sum import IdentityKey, Keys, Roster, SumMember
from lorand_worker import membership

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


def test_a_roster_for_statements_is_of_any_number(tmp_path: Path) -> None:
    """The file is one; that a sum takes 3 to 32 of them is checked where it is read for a sum."""
    for count in (1, 2, 33):
        lines = [f"{name_of(n)}={secret(n, 'identity').hex()}" for n in range(count)]
        path = tmp_path / f"{count}.json"
        written = membership.write_roster(path, lines)
        assert Members.read(path) == written
        assert len(written.members) == count
        with pytest.raises(ConfigError, match=f"3 to 32 members, not {count}"):
            Roster.read(path)


def test_an_identity_key_is_restored_from_its_bytes() -> None:
    key = IdentityKey()
    again = IdentityKey(key.private_bytes())
    assert again.public == key.public != IdentityKey().public
    assert primitives.signed_by(key.public, again.sign(b"body"), b"body")
    assert not primitives.signed_by(key.public, again.sign(b"body"), b"other")
    assert not primitives.signed_by(b"", again.sign(b"body"), b"body")
    with pytest.raises(ConfigError, match="restore the file"):
        IdentityKey(b"short")
