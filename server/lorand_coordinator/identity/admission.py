"""The identity folder of a run: its authority, its members, and the coordinator's certificates.

authority.pem   key and certificate of the authority: whoever reads it can make members
server.pem      key and certificate that the coordinator shows
operator.pem    credentials of the operator on this machine, for status and health
coordinator.pem key and certificate with which a coordinator that stands by calls the leader
members.db      members and open invitations, unless they are in a database (service.members)
"""

from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Final, Self

import grpc
from cryptography import x509

from lorand import transport
from lorand.credentials import (
    MAX_NAME,
    Credentials,
    Role,
    Subject,
    fingerprint,
    key_pem,
    new_key,
    pem,
)
from lorand.errors import ConfigError
from lorand.invitation import Invitation
from lorand_coordinator import ledgers
from lorand_coordinator.identity import enrolment
from lorand_coordinator.identity.access import Access
from lorand_coordinator.identity.authority import Authority, now, read_pair, write_pair
from lorand_coordinator.identity.members import Members, NoCoordinator, Peer, serial_of
from lorand_coordinator.identity.rows import FileRows

if TYPE_CHECKING:
    from lorand_coordinator.identity.shared import DatabaseRows

OPERATOR: Final = "operator"
LOCAL: Final = ("localhost", "127.0.0.1", "::1")
"""The coordinator is always certified to its own machine: health checks and relays come from it."""
EVERYWHERE: Final = ("0.0.0.0", "::")
RENEW_BEFORE: Final = timedelta(days=60)


@dataclass(frozen=True)
class Admission:
    """Everything about who is let in."""

    folder: Path
    authority: Authority
    members: Members
    operator: str = OPERATOR
    """The name of the operator on this machine."""
    host: str = ""
    """By which name members reach this coordinator; empty: the first in its certificate."""

    @classmethod
    def create_or_open(cls, folder: Path, run: str, members_at: str = "") -> Self:
        """Return a run's, made now if there is none. Raises ConfigError, StoreUnavailable.

        `members_at` is the URL of a database with the members; by default they are in the folder.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make {folder}: {error}; choose another --identity-dir"
            ) from error
        if not (folder / "authority.pem").exists():
            if (folder / "members.db").exists():
                raise ConfigError(
                    f"{folder / 'authority.pem'} is missing, but its members are there: restore it "
                    "from a copy, or choose another --identity-dir to begin with no members"
                )
            if members_at:
                _begun_nowhere(folder, run, members_at)
            Authority.create(folder / "authority.pem", run)
        return cls.open(folder, run, members_at)

    @classmethod
    def open(cls, folder: Path, run: str, members_at: str = "") -> Self:
        """Return a run's. Raises ConfigError when there is none, StoreUnavailable."""
        path = folder / "authority.pem"
        if not path.exists():
            raise ConfigError(
                f"there is no {path}: `lr-coordinator serve` makes it on its first start; if it "
                "serves with --identity-dir, give the same here"
            )
        authority = Authority.read(path, run)
        if not members_at:
            return cls(folder, authority, Members(FileRows(folder / "members.db")))
        with ExitStack() as undo:
            rows = _database(members_at, run)
            undo.callback(rows.close)
            rows.claim(fingerprint(authority.certificate), folder / "members.db")
            # Each machine has an operator.pem: under one name the newest would end all others.
            operator = f"{OPERATOR}-{gethostname()}"[:MAX_NAME]
            opened = cls(folder, authority, rows.members(), operator)
            undo.pop_all()
        return opened

    def close(self) -> None:
        """Close the members' file or database."""
        self.members.close()

    def certify(self, address: str, names: Sequence[str]) -> None:
        """See to the coordinator's certificates before it serves at HOST:PORT.

        They are renewed when they expire soon or name other hosts. Raises ConfigError when no name
        is known by which workers could reach it.
        """
        path = self.folder / "server.pem"
        present = _names(path) if path.exists() else []
        before = [name for name in present if name not in LOCAL]
        host, _ = transport.split(address)
        if host in EVERYWHERE and not names and not before:
            raise ConfigError(
                f"{host} is every address of this machine: say with --host-name by which name or "
                "address workers reach it"
            )
        wanted = _with_local(names or [*(() if host in EVERYWHERE else (host,)), *before])
        if wanted != present or _expires_soon(path):
            self._certify_server(wanted)
        operator = self.folder / "operator.pem"
        if not operator.exists() or _expires_soon(operator):
            self._certify_operator(operator)
        self._certify_coordinator()  # now, so that it is in copies of this folder

    def rotate(self, names: Sequence[str]) -> list[str]:
        """Replace the coordinator's keys and certificates; return the names certified.

        A coordinator that serves takes them when it is started again. Raises ConfigError.
        """
        path = self.folder / "server.pem"
        wanted = _with_local(names or _names(path))
        self._certify_server(wanted)
        self._certify_operator(self.folder / "operator.pem")
        self.members.forget_coordinators()
        self._certify_coordinator()
        return wanted

    def _certify_server(self, names: list[str]) -> None:
        key = new_key()
        certificate = self.authority.issue_server(names, key.public_key())
        write_pair(self.folder / "server.pem", key, certificate)

    def _certify_operator(self, path: Path) -> None:
        """Whoever can read this folder can make any member, so this gives nothing away."""
        key = new_key()
        subject = Subject(self.authority.run, Role.OPERATOR, self.operator)
        certificate = self.authority.issue(subject, key.public_key())
        self.members.admit(Peer.of(certificate))
        try:
            Credentials.write(path, key, certificate, self.authority.certificate)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error}") from error

    def invite(self, name: str, role: Role, hours: float) -> Invitation:
        """Return an invitation. Raises ConfigError."""
        served = self.members.served()
        if served is None:
            raise ConfigError(
                "where members enrol is known once the run was served: start `lr-coordinator "
                "serve` first"
            )
        token = self.members.invite(name, role, hours)
        return Invitation(served[1], name, token, fingerprint(self.authority.certificate))

    def reached_at(self, port: int) -> str:
        """Return the HOST:PORT at which members reach a port of this coordinator."""
        names = _names(self.folder / "server.pem")
        return transport.join(self.host if self.host in names else names[0], port)

    def note_served(self, port: int, enrolment_port: int) -> None:
        """Remember the ports served, for invitations. Raises StoreUnavailable."""
        self.members.note_served(self.reached_at(port), self.reached_at(enrolment_port))

    def access(self) -> Access:
        """Return what lets this run's members through."""
        return Access(self.members, self.authority.run)

    def service(self) -> enrolment.Enrolment:
        """Return the service that certifies members."""
        return enrolment.Enrolment(self.authority, self.members)

    def server_credentials(self, *, ask: bool) -> grpc.ServerCredentials:
        """Return what gRPC needs to show server.pem as it is now.

        With `ask`, callers must show a certificate of this run's authority. Not gRPC's dynamic
        credentials, which would follow the file: handshakes use the old certificate's memory while
        another thread replaces it, and a thousand workers that come back at once end the process.
        """
        key, certificate = read_pair(self.folder / "server.pem")
        pairs = [(key_pem(key), pem(certificate))]
        authority = pem(self.authority.certificate) if ask else None
        return grpc.ssl_server_credentials(pairs, authority, ask)

    def passing_credentials(self) -> grpc.ChannelCredentials:
        """Return what gRPC needs to pass calls on to another coordinator of this run.

        Several that make a certificate at once are let in with any. Raises ConfigError,
        StoreUnavailable.
        """
        self._certify_coordinator()
        key, certificate = read_pair(self.folder / "coordinator.pem")
        authority = pem(self.authority.certificate)
        return grpc.ssl_channel_credentials(authority, key_pem(key), pem(certificate))

    def _certify_coordinator(self) -> None:
        """See that calls can be passed on with coordinator.pem."""
        path = self.folder / "coordinator.pem"
        if path.exists() and not _expires_soon(path):
            with suppress(NoCoordinator):
                return self.members.check_coordinator(serial_of(read_pair(path)[1]))
        key = new_key()
        certificate = self.authority.issue_coordinator(key.public_key())
        self.members.admit_coordinator(certificate)
        write_pair(path, key, certificate)


def _database(url: str, run: str) -> "DatabaseRows":
    ledgers.check_installed()
    from lorand_coordinator.identity.shared import DatabaseRows

    return DatabaseRows(url, run)


def _begun_nowhere(folder: Path, run: str, members_at: str) -> None:
    """Raise ConfigError when the run's members in a database have an authority already."""
    with closing(_database(members_at, run)) as rows:
        if rows.authority():
            raise ConfigError(
                f"the members of run {run!r} at {rows.name} have an authority already: copy "
                f"authority.pem into {folder} from where the run was first served"
            )


def _with_local(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*names, *LOCAL]))


def _names(path: Path) -> list[str]:
    """Return host names and addresses in a certificate, in order."""
    _, certificate = read_pair(path)
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return [str(name.value) for name in extension.value]


def _expires_soon(path: Path) -> bool:
    """Return whether a certificate made on this machine ends soon, by the clock that began it."""
    _, certificate = read_pair(path)
    return certificate.not_valid_after_utc - now() < RENEW_BEFORE
