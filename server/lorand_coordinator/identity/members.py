"""The members of a run and its open invitations: SQLite, shared by `serve` and other commands."""

import hashlib
import hmac
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from cryptography import x509

from lorand.credentials import Role, Subject, check_name
from lorand.errors import ConfigError, HandshakeError
from lorand_coordinator.store import StoreUnavailable

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS member (
    name TEXT PRIMARY KEY, role TEXT NOT NULL, serial TEXT NOT NULL, serial_before TEXT NOT NULL,
    expires REAL NOT NULL, revoked INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS invitation (
    name TEXT PRIMARY KEY, role TEXT NOT NULL, token_hash BLOB NOT NULL, expires REAL NOT NULL);
CREATE TABLE IF NOT EXISTS served (
    only INTEGER PRIMARY KEY CHECK (only = 1), address TEXT NOT NULL, enrolment TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS coordinator (serial TEXT PRIMARY KEY, expires REAL NOT NULL);
"""


class NoCoordinator(HandshakeError):
    """Who passed a call on is no coordinator of the run."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a call, all from its certificate."""

    subject: Subject
    serial: str
    expires: float

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Self:
        """Return the peer of a certificate that TLS has verified. Raises HandshakeError."""
        expires = certificate.not_valid_after_utc.timestamp()
        return cls(Subject.of(certificate), serial_of(certificate), expires)


@dataclass(frozen=True)
class Listed:
    """A line of `lr-coordinator members`; `expires` is by this machine's clock."""

    name: str
    role: Role
    state: str
    expires: float


class _Member(NamedTuple):
    """A row of the table."""

    name: str
    role: str
    serial: str
    serial_before: str
    expires: float
    revoked: int


class Members:
    """Who is a member, and who may become one. Times are those of this machine's clock alone.

    Every method raises StoreUnavailable when the file cannot be read or written.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Open or create the file. `clock` is seconds since the epoch."""
        self._path, self.clock = path, clock
        with self._trouble():
            self._database = sqlite3.connect(
                path, isolation_level=None, timeout=5, check_same_thread=False
            )
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(_SCHEMA)
        self._version = self._data_version()

    def invite(self, name: str, role: Role, hours: float) -> str:
        """Return a new token for a name; an older one of that name is void. Raises ConfigError."""
        check_name(name)
        token = secrets.token_urlsafe(32)
        with self._writing():
            found = self._member(name)
            if found is not None and not found.revoked and found.expires > self.clock():
                raise ConfigError(
                    f"{name!r} is a member already: it renews its certificate with `lr-worker "
                    "enrol --renew`; if it lost its key, revoke it, then invite it again"
                )
            self._database.execute(
                "INSERT OR REPLACE INTO invitation VALUES (?, ?, ?, ?)",
                (name, role, _hash(token), self.clock() + 3600 * hours),
            )
        return token

    def redeem(
        self, name: str, token: str, issue: Callable[[Role], x509.Certificate]
    ) -> x509.Certificate:
        """Spend an invitation; return what `issue` makes, admitted. Raises HandshakeError."""
        with self._writing():
            row = self._row("SELECT role, token_hash, expires FROM invitation WHERE name = ?", name)
            if row is None or not hmac.compare_digest(bytes(row[1]), _hash(token)):
                raise HandshakeError(
                    "this invitation is not open: it was used, replaced or withdrawn, or was never "
                    "made here; ask the run's operator for a new one"
                )
            if row[2] <= self.clock():
                raise HandshakeError("this invitation has expired: ask for a new one")
            role = Role(row[0])
            self._database.execute("DELETE FROM invitation WHERE name = ?", (name,))
            certificate = issue(role)
            self._admit(Peer.of(certificate), before="")
        return certificate

    def admit(self, peer: Peer, before: str = "") -> None:
        """Make a member of whoever holds this certificate, in place of its certificates so far.

        `before` is the serial of one that stays good, so that a member whose answer is lost is
        not locked out.
        """
        with self._writing():
            self._admit(peer, before)

    def renew(self, peer: Peer, certificate: x509.Certificate) -> None:
        """Admit a certificate that follows a peer's present one. Raises HandshakeError."""
        with self._writing():
            self._check(peer)
            self._admit(Peer.of(certificate), before=peer.serial)

    def _admit(self, peer: Peer, before: str) -> None:
        subject = peer.subject
        self._database.execute(
            "INSERT OR REPLACE INTO member VALUES (?, ?, ?, ?, ?, 0)",
            (subject.name, subject.role, peer.serial, before, peer.expires),
        )

    def revoke(self, name: str) -> None:
        """End a membership or withdraw an invitation. Raises ConfigError when there is neither."""
        with self._writing():
            cursor = self._database.execute("DELETE FROM invitation WHERE name = ?", (name,))
            withdrawn = cursor.rowcount
            cursor = self._database.execute("UPDATE member SET revoked = 1 WHERE name = ?", (name,))
            if not withdrawn and not cursor.rowcount:
                raise ConfigError(
                    f"there is no member {name!r}, and no invitation: see `lr-coordinator members`"
                )

    def check(self, peer: Peer) -> None:
        """Raise HandshakeError unless this certificate is a present member's."""
        with self._trouble():
            self._check(peer)

    def _check(self, peer: Peer) -> None:
        name = peer.subject.name
        found = self._member(name)
        known = found is not None and peer.serial in (found.serial, found.serial_before)
        if found is None or not known or found.role != peer.subject.role:
            raise HandshakeError(
                f"this certificate of {name!r} is not, or no longer, a member's: use the newest, "
                "or ask the run's operator for an invitation"
            )
        if found.revoked:
            raise HandshakeError(
                f"the membership of {name!r} was revoked; ask the run's operator about it"
            )
        if peer.expires <= self.clock():
            raise HandshakeError(
                f"the certificate of {name!r} has expired; ask the run's operator for an invitation"
            )

    def admit_coordinator(self, certificate: x509.Certificate) -> None:
        """Let whoever holds this certificate pass calls on, beside those who may."""
        expires = certificate.not_valid_after_utc.timestamp()
        with self._writing():
            self._database.execute("DELETE FROM coordinator WHERE expires <= ?", (self.clock(),))
            self._database.execute(
                "INSERT INTO coordinator VALUES (?, ?)", (serial_of(certificate), expires)
            )

    def check_coordinator(self, serial: str) -> None:
        """Raise NoCoordinator unless this certificate is for passing calls on, and still good."""
        with self._trouble():
            row = self._row("SELECT expires FROM coordinator WHERE serial = ?", serial)
        if row is None or row[0] <= self.clock():
            raise NoCoordinator(
                "this call was passed on with a certificate that is not, or no longer, a "
                "coordinator's of this run"
            )

    def forget_coordinators(self) -> None:
        """Let nobody pass calls on with the certificates there are."""
        with self._writing():
            self._database.execute("DELETE FROM coordinator")

    def changed(self) -> bool:
        """Return whether another process has written since this was last asked."""
        before, self._version = self._version, self._data_version()
        return before != self._version

    def listed(self) -> list[Listed]:
        """Return all members and open invitations, by name."""
        present = self.clock()
        with self._trouble():
            rows = self._database.execute("SELECT name, role, expires, revoked FROM member")
            lines = [
                Listed(n, Role(r), "revoked" if gone else _state(e, present, "member"), e)
                for n, r, e, gone in rows
            ]
            rows = self._database.execute("SELECT name, role, expires FROM invitation")
            lines += [
                Listed(n, Role(r), _state(e, present, "invited", "invitation expired"), e)
                for n, r, e in rows
            ]
        return sorted(lines, key=lambda line: (line.name, line.state))

    def note_served(self, address: str, enrolment: str) -> None:
        """Remember where the coordinator is reached, for invitations."""
        with self._writing():
            self._database.execute(
                "INSERT OR REPLACE INTO served VALUES (1, ?, ?)", (address, enrolment)
            )

    def served(self) -> tuple[str, str] | None:
        """Return the addresses of the service and of its port for enrolment, as last served."""
        with self._trouble():
            row = self._row("SELECT address, enrolment FROM served")
        return None if row is None else (row[0], row[1])

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _member(self, name: str) -> _Member | None:
        row = self._row("SELECT * FROM member WHERE name = ?", name)
        return None if row is None else _Member(*row)

    def _row(self, query: str, *parameters: str) -> Any:
        return self._database.execute(query, parameters).fetchone()

    def _data_version(self) -> int:
        with self._trouble():
            return int(self._database.execute("PRAGMA data_version").fetchone()[0])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, durable at its end; nothing of it stays after an error."""
        with self._trouble():
            self._database.execute("BEGIN IMMEDIATE")
            with self._database:
                yield

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreUnavailable(f"{error}; see to the members' file {self._path}") from error


def serial_of(certificate: x509.Certificate) -> str:
    """Return the serial number by which a certificate is looked up."""
    return f"{certificate.serial_number:x}"


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _state(expires: float, present: float, good: str, bad: str = "expired") -> str:
    return good if expires > present else bad
