"""The members' file and the identity folder: what lasts, what is kept, who may read it."""

import sqlite3
import stat
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from tests.unit.identity.office import RUN, certified

from lorand.credentials import Role, Subject, new_key
from lorand.errors import ConfigError, HandshakeError
from lorand_coordinator.identity import authority as authorities
from lorand_coordinator.identity.admission import LOCAL, Admission
from lorand_coordinator.identity.authority import Authority, read_pair
from lorand_coordinator.identity.members import Members, Peer
from lorand_coordinator.identity_cli import line
from lorand_coordinator.store import StoreUnavailable

HOUR = 3600.0


class Clock:
    """A clock that is set."""

    now = 1_000_000.0

    def __call__(self) -> float:
        """Return what it shows."""
        return self.now


def peer(name: str, serial: str = "a", expires: float = 2_000_000.0) -> Peer:
    """Somebody who holds a certificate."""
    return Peer(Subject(RUN, Role.WORKER, name), serial, expires)


def states(members: Members) -> dict[str, str]:
    """What `lr-coordinator members` says of each."""
    return {each.name: each.state for each in members.listed()}


def test_memberships_last_and_are_seen_by_other_processes(tmp_path: Path) -> None:
    path = tmp_path / "members.db"
    one, other = Members(path, Clock()), Members(path, Clock())
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
    again = Members(path, Clock())
    assert states(again) == {"hotels": "revoked"}
    again.close()


def test_a_member_is_its_name_its_role_and_its_two_newest_certificates(tmp_path: Path) -> None:
    members = Members(tmp_path / "members.db", Clock())
    members.admit(peer("hotels", "1"))
    key = new_key()
    authority = Authority.create(tmp_path / "authority.pem", RUN)
    made = [
        authority.issue(Subject(RUN, Role.WORKER, "hotels"), key.public_key()) for _ in range(2)
    ]
    members.renew(peer("hotels", "1"), made[0])
    members.check(peer("hotels", "1"))
    members.renew(Peer.of(made[0]), made[1])
    members.check(Peer.of(made[0]))
    members.check(Peer.of(made[1]))
    for stranger in (
        peer("hotels", "1"),
        peer("gadgets", "1"),
        Peer(Subject(RUN, Role.OPERATOR, "hotels"), Peer.of(made[1]).serial, 2e6),
    ):
        with pytest.raises(HandshakeError, match="no longer, a member's"):
            members.check(stranger)
    with pytest.raises(HandshakeError, match="no longer"):
        members.renew(peer("hotels", "1"), made[0])
    members.close()


def test_who_can_be_invited(tmp_path: Path) -> None:
    clock = Clock()
    members = Members(tmp_path / "members.db", clock)
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
    members.close()


def test_what_is_shown_of_members(tmp_path: Path) -> None:
    clock = Clock()
    members = Members(tmp_path / "members.db", clock)
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
    members.close()


def test_no_token_and_no_members_key_is_kept(tmp_path: Path) -> None:
    admission = Admission.create_or_open(tmp_path / "identity", RUN)
    admission.certify("127.0.0.1:0", [])
    admission.note_served(7700, 7701)
    token = admission.invite("hotels", Role.WORKER, 1.0).token
    assert len(token) == 43
    files = {path.name: path.read_bytes() for path in admission.folder.iterdir()}
    assert b"hotels" in b"".join(files.values())
    assert not [name for name, content in files.items() if token.encode() in content]
    assert stat.S_IMODE(admission.folder.stat().st_mode) == 0o700
    for name in ("authority.pem", "server.pem", "operator.pem"):
        assert stat.S_IMODE((admission.folder / name).stat().st_mode) == 0o600
    admission.close()


def test_a_failed_redemption_spends_nothing(tmp_path: Path) -> None:
    members = Members(tmp_path / "members.db")
    token = members.invite("hotels", Role.WORKER, 1.0)

    def fails(role: Role) -> x509.Certificate:
        raise HandshakeError("no certificate")

    with pytest.raises(HandshakeError, match="no certificate"):
        members.redeem("hotels", token, fails)
    authority = Authority.create(tmp_path / "authority.pem", RUN)
    key = new_key().public_key()
    made = members.redeem(
        "hotels", token, lambda role: authority.issue(Subject(RUN, role, "hotels"), key)
    )
    members.check(Peer.of(made))
    members.close()


def test_a_file_that_cannot_be_used_is_trouble_and_no_refusal(tmp_path: Path) -> None:
    path = tmp_path / "members.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(StoreUnavailable, match=r"members\.db"):
        Members(path)
    path.unlink()
    members = Members(path)
    with sqlite3.connect(path) as other:
        other.execute("DROP TABLE member")
    other.close()
    with pytest.raises(StoreUnavailable, match="no such table"):
        members.check(peer("hotels"))
    members.close()


# -- the folder ------------------------------------------------------------------------------------


def names(admission: Admission) -> list[str]:
    """Whom the coordinator's certificate is for."""
    _, certificate = read_pair(admission.folder / "server.pem")
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return [str(name.value) for name in extension.value]


def test_the_coordinator_is_certified_for_where_it_is_reached(tmp_path: Path) -> None:
    admission = Admission.create_or_open(tmp_path / "identity", RUN)
    for everywhere in ("0.0.0.0:7700", "[::]:7700"):
        with pytest.raises(ConfigError, match="say with --host-name"):
            admission.certify(everywhere, [])
    admission.certify("127.0.0.1:7700", [])
    assert names(admission) == ["127.0.0.1", "localhost", "::1"]
    with pytest.raises(ConfigError, match="say with --host-name"):
        admission.certify("0.0.0.0:7700", [])
    admission.certify("0.0.0.0:7700", ["coordinator.example", "10.0.0.5"])
    assert names(admission) == ["coordinator.example", "10.0.0.5", *LOCAL]
    first = (admission.folder / "server.pem").read_bytes()
    admission.certify("0.0.0.0:7700", [])
    assert (admission.folder / "server.pem").read_bytes() == first, "nothing has changed"
    admission.certify("10.0.0.9:7700", [])
    assert names(admission)[:2] == ["10.0.0.9", "coordinator.example"]
    assert admission.note_served(7700, 7701) == "10.0.0.9:7701"
    assert admission.rotate([])[0] == "10.0.0.9"
    with pytest.raises(ConfigError, match="no host name"):
        admission.rotate(["no..host"])
    admission.close()


def test_certificates_begin_before_they_are_made_and_are_renewed_before_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admission = Admission.create_or_open(tmp_path / "identity", RUN)
    admission.certify("127.0.0.1:7700", [])
    made = certified(tmp_path / "m.pem", admission.authority, Subject(RUN, Role.WORKER, "m"))
    _, server = read_pair(admission.folder / "server.pem")
    slow = authorities.now() - timedelta(days=6)
    for each in (admission.authority.certificate, server, made.certificate):
        assert each.not_valid_before_utc < slow
    later = authorities.now() + timedelta(days=310)
    monkeypatch.setattr(authorities, "now", lambda: later)
    monkeypatch.setattr("lorand_coordinator.identity.admission.now", lambda: later)
    admission.certify("127.0.0.1:7700", [])
    assert read_pair(admission.folder / "server.pem")[1] != server
    admission.close()


def test_a_folder_is_one_runs_and_not_begun_anew(tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    with pytest.raises(ConfigError, match="makes it on its first start"):
        Admission.open(folder, RUN)
    Admission.create_or_open(folder, RUN).close()
    with pytest.raises(ConfigError, match="authority of another run, not of 'large'"):
        Admission.create_or_open(folder, "large")
    admission = Admission.open(folder, RUN)
    with pytest.raises(ConfigError, match="start `lr-coordinator serve` first"):
        admission.invite("hotels", Role.WORKER, 1.0)
    admission.close()
    (folder / "authority.pem").unlink()
    with pytest.raises(ConfigError, match="its members are there"):
        Admission.create_or_open(folder, RUN)
    (folder / "authority.pem").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="restore it from a copy"):
        Admission.open(folder, RUN)
