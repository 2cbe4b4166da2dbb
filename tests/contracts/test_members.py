"""Members in a file and in a database: what lasts, what is kept, who is let in."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from cryptography import x509

from lorand.credentials import Role, Subject, new_key
from lorand.errors import ConfigError, HandshakeError
from lorand_coordinator.identity.authority import Authority
from lorand_coordinator.identity.members import Members, NoCoordinator, Peer, serial_of
from lorand_coordinator.identity.rows import FileRows
from lorand_coordinator.identity_cli import line

RUN = "letters"
HOUR = 3600.0


class Clock:
    """A clock that is set."""

    now = 1_000_000.0

    def __call__(self) -> float:
        """Return what it shows."""
        return self.now


Open = Callable[[], Members]


@pytest.fixture
def clock() -> Clock:
    """What all members of a test go by."""
    return Clock()


@pytest.fixture(params=["file", pytest.param("database", marks=pytest.mark.postgres)])
def opening(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Open]:
    """Opens the same members, as often as it is called: each as a process would."""
    with ExitStack() as stack:

        def of_file() -> Members:
            made = Members(FileRows(tmp_path / "members.db"), clock)
            return stack.enter_context(closing(made))

        if request.param == "file":
            yield of_file
            return
        from lorand_coordinator.identity.shared import DatabaseRows, SharedMembers

        url = request.getfixturevalue("postgres").url
        others = DatabaseRows(url, "another run")
        others.claim("theirs", tmp_path / "none.db")
        stranger = stack.enter_context(closing(SharedMembers(others, clock)))
        if not stranger.listed():
            stranger.admit(peer("hotels", "of another run"))

        def of_database() -> Members:
            rows = DatabaseRows(url, request.node.nodeid)
            rows.claim("ours", tmp_path / "none.db")
            return stack.enter_context(closing(SharedMembers(rows, clock)))

        yield of_database
        assert [each.name for each in stranger.listed()] == ["hotels"], "as it was"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """The run's."""
    return Authority.create(tmp_path / "authority.pem", RUN)


def peer(name: str, serial: str = "a", expires: float = 2_000_000.0) -> Peer:
    """Somebody who holds a certificate."""
    return Peer(Subject(RUN, Role.WORKER, name), serial, expires)


def states(members: Members) -> dict[str, str]:
    """What `lr-coordinator members` says of each."""
    return {each.name: each.state for each in members.listed()}


def test_memberships_last_and_are_seen_by_other_processes(opening: Open) -> None:
    one, other = opening(), opening()
    one.admit(peer("hotels"))
    assert other.changed()
    assert not other.changed()
    other.check(peer("hotels"))
    other.revoke("hotels")
    assert one.changed()
    with pytest.raises(HandshakeError, match="'hotels' was revoked"):
        one.check(peer("hotels"))
    one.close()
    other.close()
    assert states(opening()) == {"hotels": "revoked"}


def test_who_was_let_in_elsewhere_is_let_in_at_once(opening: Open) -> None:
    one, other = opening(), opening()
    one.admit(peer("hotels"))
    other.check(peer("hotels"))
    assert other.changed(), "and open streams are looked at"
    one.admit(peer("hotels", "b"), before="a")
    other.check(peer("hotels", "b"))
    other.check(peer("hotels", "a"))


def test_a_member_is_its_name_its_role_and_its_two_newest_certificates(
    opening: Open, authority: Authority
) -> None:
    members, key = opening(), new_key()
    members.admit(peer("hotels", "1"))
    made = [
        authority.issue(Subject(RUN, Role.WORKER, "hotels"), key.public_key()) for _ in range(2)
    ]
    members.renew(peer("hotels", "1"), made[0])
    members.check(peer("hotels", "1"))
    members.renew(Peer.of(made[0]), made[1])
    members.changed()  # as is asked once a second
    members.check(Peer.of(made[0]))
    members.check(Peer.of(made[1]))
    for stranger in (
        peer("hotels", "1"),
        peer("gadgets", "1"),
        peer("hotels", "of another run"),
        Peer(Subject(RUN, Role.OPERATOR, "hotels"), Peer.of(made[1]).serial, 2e6),
    ):
        with pytest.raises(HandshakeError, match="no longer, a member's"):
            members.check(stranger)
    with pytest.raises(HandshakeError, match="no longer"):
        members.renew(peer("hotels", "1"), made[0])


def test_who_can_be_invited(opening: Open, clock: Clock) -> None:
    members = opening()
    members.admit(peer("hotels"))
    with pytest.raises(ConfigError, match="is a member already"):
        members.invite("hotels", Role.WORKER, 1.0)
    members.revoke("hotels")
    members.invite("hotels", Role.WORKER, 1.0)
    members.admit(peer("hotels", "b"))
    clock.now = 2_000_000.0
    with pytest.raises(HandshakeError, match="has expired"):
        members.check(peer("hotels", "b"))
    assert [each.state for each in members.listed()] == ["expired", "invitation expired"]
    members.invite("hotels", Role.WORKER, 1.0)
    for name in ("", "n" * 65, "two\nlines", "bell\a"):
        with pytest.raises(ConfigError, match="1 to 64 printable"):
            members.invite(name, Role.WORKER, 1.0)
    with pytest.raises(ConfigError, match="there is no member 'nobody'"):
        members.revoke("nobody")


def test_what_is_shown_of_members(opening: Open, clock: Clock) -> None:
    members = opening()
    members.admit(peer("early", expires=clock.now + 10 * 24 * HOUR))
    members.admit(peer("long", expires=clock.now + 80 * 24 * HOUR))
    members.invite("new", Role.EVALUATOR, 2.5)
    members.admit(peer("out"))
    members.revoke("out")
    assert [line(each, clock.now) for each in members.listed()] == [
        "early  worker  member, for 10 days; WARNING: renew with `lr-worker enrol --renew`",
        "long  worker  member, for 80 days",
        "new  evaluator  invited, for 2.5 h",
        "out  worker  revoked",
    ]
    clock.now += 3 * HOUR
    assert states(members)["new"] == "invitation expired"


def test_an_invitation_is_spent_once_wherever_and_by_success_alone(
    opening: Open, authority: Authority
) -> None:
    one, other, key = opening(), opening(), new_key().public_key()
    token = one.invite("hotels", Role.WORKER, 1.0)

    def fails(role: Role) -> x509.Certificate:
        raise HandshakeError("no certificate")

    def issue(role: Role) -> x509.Certificate:
        return authority.issue(Subject(RUN, role, "hotels"), key)

    with pytest.raises(HandshakeError, match="no certificate"):
        other.redeem("hotels", token, fails)
    with pytest.raises(HandshakeError, match="not open"):
        other.redeem("hotels", token + "x", issue)
    made = other.redeem("hotels", token, issue)
    one.check(Peer.of(made))
    with pytest.raises(HandshakeError, match="not open"):
        one.redeem("hotels", token, issue)


def test_calls_are_passed_on_by_coordinators_alone(
    opening: Open, authority: Authority, clock: Clock
) -> None:
    one, other = opening(), opening()
    made = authority.issue_coordinator(new_key().public_key())
    with pytest.raises(NoCoordinator, match="no longer"):
        other.check_coordinator(serial_of(made))
    one.admit_coordinator(made)
    other.check_coordinator(serial_of(made))
    clock.now = made.not_valid_after_utc.timestamp()
    with pytest.raises(NoCoordinator, match="no longer"):
        other.check_coordinator(serial_of(made))
    clock.now = 0.0
    one.forget_coordinators()
    assert other.changed()
    with pytest.raises(NoCoordinator, match="no longer"):
        other.check_coordinator(serial_of(made))


def test_where_members_enrol_is_where_it_was_served_last(opening: Open) -> None:
    one, other = opening(), opening()
    assert one.served() is None
    one.note_served("a:7700", "a:7701")
    other.note_served("b:7700", "b:7701")
    assert one.served() == ("b:7700", "b:7701")
