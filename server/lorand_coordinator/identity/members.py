"""The members of a run and its open invitations, shared by `serve` and other commands."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from cryptography import x509

from lorand.credentials import Role, Subject, check_name
from lorand.errors import ConfigError, HandshakeError
from lorand_coordinator.identity.rows import Execute, Rows, insert, row_of, rows_of

Clock = Callable[[], float]
WALL: Final[Clock] = time.time
"""Seconds since the epoch by this machine's clock."""


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


class Member(NamedTuple):
    """What is kept of a member: a row."""

    name: str
    role: str
    serial: str
    serial_before: str
    expires: float
    revoked: int


class Members:
    """Who is a member, and who may become one. Times are those of this machine's clock alone.

    Every method raises StoreUnavailable when the rows cannot be read or written.
    """

    def __init__(self, rows: Rows, clock: Clock = WALL) -> None:
        """Keep them there. `clock` is seconds since the epoch."""
        self._rows, self._run, self.clock = rows, rows.run, clock
        self._version = rows.version()

    def invite(self, name: str, role: Role, hours: float) -> str:
        """Return a new token for a name; an older one of that name is void. Raises ConfigError."""
        check_name(name)
        token = secrets.token_urlsafe(32)
        with self._rows.writing() as execute:
            found = self._member(execute, name)
            if found is not None and not found.revoked and found.expires > self.clock():
                raise ConfigError(
                    f"{name!r} is a member already: it renews its certificate with `lr-worker "
                    "enrol --renew`; if it lost its key, revoke it, then invite it again"
                )
            self._uninvite(execute, name)
            values = (name, role.value, _hash(token), self.clock() + 3600 * hours)
            insert(execute, "invitation", self._run, values)
        return token

    def redeem(
        self, name: str, token: str, issue: Callable[[Role], x509.Certificate]
    ) -> x509.Certificate:
        """Spend an invitation; return what `issue` makes, admitted. Raises HandshakeError."""
        with self._rows.writing() as execute:
            found = row_of(execute, "invitation", self._run, name)
            if found is None or not hmac.compare_digest(bytes(found[2]), _hash(token)):
                raise HandshakeError(
                    "this invitation is not open: it was used, replaced or withdrawn, or was never "
                    "made here; ask the run's operator for a new one"
                )
            if found[3] <= self.clock():
                raise HandshakeError("this invitation has expired: ask for a new one")
            role = Role(found[1])
            self._uninvite(execute, name)
            certificate = issue(role)
            self._admit(execute, Peer.of(certificate), before="")
        return certificate

    def admit(self, peer: Peer, before: str = "") -> None:
        """Make a member of whoever holds this certificate, in place of its certificates so far.

        `before` is the serial of one that stays good, so that a member whose answer is lost is
        not locked out.
        """
        with self._rows.writing() as execute:
            self._admit(execute, peer, before)

    def renew(self, peer: Peer, certificate: x509.Certificate) -> None:
        """Admit a certificate that follows a peer's present one. Raises HandshakeError."""
        with self._rows.writing() as execute:
            judge(self._member(execute, peer.subject.name), peer, self.clock())
            self._admit(execute, Peer.of(certificate), before=peer.serial)

    def revoke(self, name: str) -> None:
        """End a membership or withdraw an invitation. Raises ConfigError when there is neither."""
        with self._rows.writing() as execute:
            withdrawn = self._uninvite(execute, name)
            ended = execute(
                "UPDATE member SET revoked = 1 WHERE run = ? AND name = ?", (self._run, name)
            )
            if not withdrawn and not ended.rowcount:
                raise ConfigError(
                    f"there is no member {name!r}, and no invitation: see `lr-coordinator members`"
                )

    def check(self, peer: Peer) -> None:
        """Raise HandshakeError unless this certificate is a present member's."""
        with self._rows.reading() as execute:
            found = self._member(execute, peer.subject.name)
        judge(found, peer, self.clock())

    def admit_coordinator(self, certificate: x509.Certificate) -> None:
        """Let whoever holds this certificate pass calls on, beside those who may."""
        expires = certificate.not_valid_after_utc.timestamp()
        with self._rows.writing() as execute:
            execute(
                "DELETE FROM coordinator WHERE run = ? AND expires <= ?", (self._run, self.clock())
            )
            insert(execute, "coordinator", self._run, (serial_of(certificate), expires))

    def check_coordinator(self, serial: str) -> None:
        """Raise NoCoordinator unless this certificate is for passing calls on, and still good."""
        with self._rows.reading() as execute:
            found = row_of(execute, "coordinator", self._run, serial)
        judge_coordinator(None if found is None else found[1], self.clock())

    def forget_coordinators(self) -> None:
        """Let nobody pass calls on with the certificates there are."""
        with self._rows.writing() as execute:
            execute("DELETE FROM coordinator WHERE run = ?", (self._run,))

    def changed(self) -> bool:
        """Return whether another process has written since this was last asked."""
        before, self._version = self._version, self._rows.version()
        return before != self._version

    def listed(self) -> list[Listed]:
        """Return all members and open invitations, by name."""
        present = self.clock()
        with self._rows.reading() as execute:
            members = [Member(*row) for row in rows_of(execute, "member", self._run)]
            invited = rows_of(execute, "invitation", self._run)
        lines = [
            Listed(
                each.name,
                Role(each.role),
                "revoked" if each.revoked else _state(each.expires, present, "member"),
                each.expires,
            )
            for each in members
        ]
        lines += [
            Listed(n, Role(r), _state(e, present, "invited", "invitation expired"), e)
            for n, r, _, e in invited
        ]
        return sorted(lines, key=lambda line: (line.name, line.state))

    def note_served(self, address: str, enrolment: str) -> None:
        """Remember where the coordinator is reached, for invitations."""
        with self._rows.writing() as execute:
            execute("DELETE FROM served WHERE run = ?", (self._run,))
            execute(
                "INSERT INTO served (run, address, enrolment) VALUES (?, ?, ?)",
                (self._run, address, enrolment),
            )

    def served(self) -> tuple[str, str] | None:
        """Return the addresses of the service and of its port for enrolment, as last served."""
        with self._rows.reading() as execute:
            row = execute(
                "SELECT address, enrolment FROM served WHERE run = ?", (self._run,)
            ).fetchone()
        return None if row is None else (row[0], row[1])

    def close(self) -> None:
        """Close the rows."""
        self._rows.close()

    def _member(self, execute: Execute, name: str) -> Member | None:
        row = row_of(execute, "member", self._run, name)
        return None if row is None else Member(*row)

    def _admit(self, execute: Execute, peer: Peer, before: str) -> None:
        name, role = peer.subject.name, peer.subject.role.value
        execute("DELETE FROM member WHERE run = ? AND name = ?", (self._run, name))
        values = (name, role, peer.serial, before, peer.expires, 0)
        insert(execute, "member", self._run, values)

    def _uninvite(self, execute: Execute, name: str) -> int:
        query = "DELETE FROM invitation WHERE run = ? AND name = ?"
        return execute(query, (self._run, name)).rowcount


def judge(found: Member | None, peer: Peer, present: float) -> None:
    """Raise HandshakeError unless a peer's certificate is good for what is kept under its name."""
    name = peer.subject.name
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
    if peer.expires <= present:
        raise HandshakeError(
            f"the certificate of {name!r} has expired; ask the run's operator for an invitation"
        )


def judge_coordinator(expires: float | None, present: float) -> None:
    """Raise NoCoordinator unless a certificate for passing calls on is known, and still good."""
    if expires is None or expires <= present:
        raise NoCoordinator(
            "this call was passed on with a certificate that is not, or no longer, a "
            "coordinator's of this run"
        )


def serial_of(certificate: x509.Certificate) -> str:
    """Return the serial number by which a certificate is looked up."""
    return f"{certificate.serial_number:x}"


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _state(expires: float, present: float, good: str, bad: str = "expired") -> str:
    return good if expires > present else bad
