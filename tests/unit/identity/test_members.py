"""The members' file and the identity folder: what is kept, who may read it."""

import sqlite3
import stat
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from tests.runs import config_of
from tests.unit.identity.office import RUN, certified

from lorand.credentials import Role, Subject
from lorand.errors import ConfigError
from lorand_coordinator import identity_cli
from lorand_coordinator.identity import authority as authorities
from lorand_coordinator.identity.admission import LOCAL, Admission
from lorand_coordinator.identity.authority import read_pair
from lorand_coordinator.identity.members import Members, Peer
from lorand_coordinator.identity.rows import FileRows
from lorand_coordinator.store import StoreUnavailable

BEFORE = """
CREATE TABLE member (
    name TEXT PRIMARY KEY, role TEXT NOT NULL, serial TEXT NOT NULL, serial_before TEXT NOT NULL,
    expires REAL NOT NULL, revoked INTEGER NOT NULL);
CREATE TABLE invitation (
    name TEXT PRIMARY KEY, role TEXT NOT NULL, token_hash BLOB NOT NULL, expires REAL NOT NULL);
CREATE TABLE served (
    only INTEGER PRIMARY KEY CHECK (only = 1), address TEXT NOT NULL, enrolment TEXT NOT NULL);
CREATE TABLE coordinator (serial TEXT PRIMARY KEY, expires REAL NOT NULL);
INSERT INTO member VALUES ('hotels', 'worker', 'a', '', 2e12, 0);
INSERT INTO invitation VALUES ('gadgets', 'worker', x'00', 2e12);
INSERT INTO served VALUES (1, 'old:7700', 'old:7701');
INSERT INTO coordinator VALUES ('c', 2e12);
"""
PEER = Peer(Subject(RUN, Role.WORKER, "hotels"), "a", 2_000_000_000_000.0)


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


def test_a_file_that_cannot_be_used_is_trouble_and_no_refusal(tmp_path: Path) -> None:
    path = tmp_path / "members.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(StoreUnavailable, match=r"members\.db"):
        Members(FileRows(path))
    path.unlink()
    members = Members(FileRows(path))
    with sqlite3.connect(path) as other:
        other.execute("DROP TABLE member")
    other.close()
    with pytest.raises(StoreUnavailable, match="no such table"):
        members.check(PEER)
    members.close()


def test_members_of_a_file_from_before_there_were_databases_stay(tmp_path: Path) -> None:
    path = tmp_path / "members.db"
    with closing(sqlite3.connect(path)) as before, before:
        before.executescript(BEFORE)
    members = Members(FileRows(path))
    members.check(PEER)
    assert [(each.name, each.state) for each in members.listed()] == [
        ("gadgets", "invited"),
        ("hotels", "member"),
    ]
    members.check_coordinator("c")
    assert members.served() is None, "`serve` writes it when it starts"
    members.note_served("a:7700", "a:7701")
    members.admit(replace(PEER, serial="b"), before="a")
    members.close()
    again = Members(FileRows(path))
    again.check(PEER)
    assert again.served() == ("a:7700", "a:7701")
    again.close()


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
    assert admission.reached_at(7701) == "10.0.0.9:7701"
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


def test_a_database_of_members_has_a_databases_address() -> None:
    config = config_of(service={"members": "members.db"})
    with pytest.raises(ConfigError, match=r"service\.members = 'members\.db' is no database"):
        identity_cli.opened(config, Path("run.toml"), None)
