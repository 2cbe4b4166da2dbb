"""Enrolment from both ends: who gets a certificate, and to whom a token is never sent."""

import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from tests.commands import wait_for
from tests.unit.identity.office import LIMIT_S, RUN, Office, certified, get_run, opened

from lorand import credentials
from lorand.credentials import Credentials, Role, Subject, key_pem, pem
from lorand.errors import ConfigError, ConnectionLost, HandshakeError
from lorand.invitation import Invitation
from lorand.v1 import enrolment_pb2 as pb
from lorand.v1 import enrolment_pb2_grpc as service
from lorand_coordinator.identity.authority import Authority, requested_key
from lorand_coordinator.identity.members import Members
from lorand_coordinator.store import StoreUnavailable
from lorand_worker import enrolment
from lorand_worker.link import Link


def test_members_are_served_before_it_is_written_down_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their database may be away just when a coordinator takes over."""
    write, tried = Members.note_served, threading.Event()

    def fails_once(members: Members, address: str, enrolment: str) -> None:
        if not tried.is_set():
            tried.set()
            raise StoreUnavailable("the database is away")
        write(members, address, enrolment)

    monkeypatch.setattr(Members, "note_served", fails_once)
    with opened(tmp_path / "identity") as office:
        with credentials.channel(
            office.address, Credentials.read(office.admission.folder / "operator.pem")
        ) as channel:
            get_run(channel)
        wait_for(lambda: office.admission.members.served() is not None, "it is written down")
        assert office.admission.invite("hotels", Role.WORKER, 1.0).address == office.enrolment


def test_an_invitation_makes_a_member_and_is_spent(office: Office, tmp_path: Path) -> None:
    line = office.admission.invite("ward 3/ü", Role.EVALUATOR, 1.0).line()
    made, address = enrolment.enrol(line, None, tmp_path)
    assert address == office.address
    assert made.subject == Subject(RUN, Role.EVALUATOR, "ward 3/ü")
    assert made.path == credentials.default_path(address, tmp_path)
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.path.parent.stat().st_mode) == 0o700
    with credentials.channel(address, Credentials.read(made.path)) as channel:
        get_run(channel)
    with pytest.raises(HandshakeError, match="was used, replaced or withdrawn"):
        enrolment.enrol(line, tmp_path / "again.pem", tmp_path)
    assert not (tmp_path / "again.pem").exists()


def expired(office: Office, monkeypatch: pytest.MonkeyPatch) -> Invitation:
    made = office.admission.invite("late", Role.WORKER, 24.0)
    later = time.time() + 25 * 3600
    monkeypatch.setattr(office.served.members, "clock", lambda: later)
    return made


def wrong_token(office: Office, monkeypatch: pytest.MonkeyPatch) -> Invitation:
    return replace(office.admission.invite("wrong", Role.WORKER, 1.0), token="t" * 43)


def another_members(office: Office, monkeypatch: pytest.MonkeyPatch) -> Invitation:
    office.admission.invite("somebody", Role.OPERATOR, 1.0)
    return replace(office.admission.invite("else", Role.WORKER, 1.0), name="somebody")


def replaced(office: Office, monkeypatch: pytest.MonkeyPatch) -> Invitation:
    made = office.admission.invite("twice", Role.WORKER, 1.0)
    office.admission.invite("twice", Role.WORKER, 1.0)
    return made


def withdrawn(office: Office, monkeypatch: pytest.MonkeyPatch) -> Invitation:
    made = office.admission.invite("withdrawn", Role.WORKER, 1.0)
    office.admission.members.revoke("withdrawn")
    return made


@pytest.mark.parametrize("made", [expired, wrong_token, another_members, replaced, withdrawn])
def test_tokens_that_are_refused(
    made: Any, office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = made(office, monkeypatch)
    with pytest.raises(HandshakeError, match=r"ask.* for a new one"):
        enrolment.enrol(invitation.line(), tmp_path / "m.pem", tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- somebody in between ---------------------------------------------------------------------------


class Impostor(service.EnrolmentServiceServicer):
    """A server that is not the coordinator's, and shows an authority's certificate."""

    def __init__(self, shown: x509.Certificate) -> None:
        """Show this one."""
        self.shown, self.tokens = shown, []  # type: tuple[x509.Certificate, list[str]]

    def GetAuthority(self, request: pb.GetAuthorityRequest, context: Any) -> Any:
        return pb.GetAuthorityResponse(certificate=self.shown.public_bytes(Encoding.DER))

    def Enrol(self, request: pb.EnrolRequest, context: Any) -> Any:
        self.tokens.append(request.token)
        return pb.EnrolResponse()

    def Renew(self, request: pb.RenewRequest, context: Any) -> Any:
        raise NotImplementedError


@contextmanager
def impostor(
    shown: x509.Certificate, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate
) -> Iterator[tuple[Impostor, str]]:
    """Serve an impostor with this key and certificate."""
    with ThreadPoolExecutor(2) as pool:
        server, served = grpc.server(pool), Impostor(shown)
        service.add_EnrolmentServiceServicer_to_server(served, server)
        pair = grpc.ssl_server_credentials([(key_pem(key), pem(certificate))])
        port = server.add_secure_port("127.0.0.1:0", pair)
        server.start()
        yield served, f"127.0.0.1:{port}"
        server.stop(0).wait(LIMIT_S)


@pytest.mark.parametrize("case", ["own authority", "the run's authority", "a member's certificate"])
def test_the_token_goes_to_no_impostor(case: str, office: Office, tmp_path: Path) -> None:
    own, key = Authority.create(tmp_path / "authority.pem", RUN), credentials.new_key()
    certificate = own.issue_server(["127.0.0.1"], key.public_key())
    shown = own.certificate if case == "own authority" else office.authority.certificate
    if case == "a member's certificate":
        mine = certified(tmp_path / "m.pem", office.authority, Subject(RUN, Role.WORKER, "m"))
        key, certificate = mine.key, mine.certificate
    invitation = office.admission.invite("careful", Role.WORKER, 1.0)
    with impostor(shown, key, certificate) as (served, address):
        line = replace(invitation, address=address).line()
        with pytest.raises(HandshakeError, match="in between"):
            enrolment.enrol(line, tmp_path / "new.pem", tmp_path)
    assert served.tokens == []
    assert not (tmp_path / "new.pem").exists()


def test_a_member_is_no_coordinator_to_other_members(office: Office, tmp_path: Path) -> None:
    mine, other = office.member(tmp_path, "mallory"), office.member(tmp_path, "alice")
    with impostor(office.authority.certificate, mine.key, mine.certificate) as (_, address):
        link = Link(address, 0.1, other)
        with pytest.raises(HandshakeError, match="in between"):
            link.persist(link.get_run, lambda why: None)
        link.close()


def test_where_nobody_enrols_members(office: Office, tmp_path: Path) -> None:
    invitation = replace(office.admission.invite("a", Role.WORKER, 1.0), address="127.0.0.1:1")
    with pytest.raises(ConnectionLost, match="no coordinator enrols members at 127"):
        enrolment.enrol(invitation.line(), tmp_path / "m.pem", tmp_path)


# -- requests --------------------------------------------------------------------------------------


def request(key: Any, digest: Any) -> bytes:
    """A signing request by any kind of key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, digest).public_bytes(Encoding.DER)


def test_a_request_proves_possession_of_a_p256_key() -> None:
    key = credentials.new_key()
    good = request(key, hashes.SHA256())
    assert requested_key(good) == key.public_key()
    bad = bytearray(good)
    bad[-1] ^= 1
    for refused, why in [
        (bytes(bad), "not signed with its key"),
        (request(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()), "curve P-256"),
        (request(ed25519.Ed25519PrivateKey.generate(), None), "curve P-256"),
        (b"", "cannot be used"),
        (good[:-9], "cannot be used"),
        (good + bytes(5000), "too long"),
    ]:
        with pytest.raises(HandshakeError, match=why):
            requested_key(refused)


# -- afterwards ------------------------------------------------------------------------------------


def test_a_renewal_replaces_the_file_and_both_certificates_are_good(
    office: Office, tmp_path: Path
) -> None:
    """A member whose answer is lost goes on with the old one; a link takes the new one up."""
    before = office.member(tmp_path, "renews")
    link = Link(office.address, 5.0, before)
    link.persist(link.get_run, lambda why: None)
    after = enrolment.renew(office.address, before)
    assert after.subject == before.subject
    assert after.key != before.key
    assert Credentials.read(before.path).certificate == after.certificate
    for each in (before, after):
        with credentials.channel(office.address, each) as channel:
            get_run(channel)
    tries = iter([grpc.RpcError(), None])

    def lost_once() -> None:
        if (error := next(tries)) is not None:
            raise error
        link.get_run()

    link.persist(lost_once, lambda why: None)
    assert link.shown is not None
    assert link.shown.certificate == after.certificate
    link.close()


def test_a_revoked_member_cannot_renew(office: Office, tmp_path: Path) -> None:
    mine = office.member(tmp_path, "gone")
    office.admission.members.revoke("gone")
    with pytest.raises(HandshakeError, match="was revoked"):
        enrolment.renew(office.address, mine)


def test_a_coordinator_has_its_new_certificate_when_it_is_started_again(tmp_path: Path) -> None:
    """Members trust the authority: to them nothing has changed."""
    folder = tmp_path / "identity"
    option = ("grpc.ssl_target_name_override", "coordinator.example")
    with opened(folder) as office:
        mine = office.member(tmp_path, "stays")
        names = office.admission.rotate(["127.0.0.1", "coordinator.example"])
        assert names[:2] == ["127.0.0.1", "coordinator.example"]
        with credentials.channel(office.address, mine) as channel:
            get_run(channel)
    with opened(folder) as office:
        with credentials.channel(office.address, mine) as channel:
            get_run(channel)
        # As the name that the new certificate alone is good for.
        with grpc.secure_channel(office.address, mine.channel_credentials(), [option]) as channel:
            get_run(channel)


def test_credentials_are_not_overwritten_before_a_token_is_spent(
    office: Office, tmp_path: Path
) -> None:
    mine = office.member(tmp_path, "kept")
    line = office.admission.invite("other", Role.WORKER, 1.0).line()
    with pytest.raises(ConfigError, match="holds credentials already"):
        enrolment.enrol(line, mine.path, tmp_path)
    with pytest.raises(ConfigError, match="cannot write"):
        enrolment.enrol(line, mine.path / "below" / "a file.pem", tmp_path)
    unfinished = tmp_path / "unfinished.pem"
    unfinished.write_bytes(key_pem(credentials.new_key()))
    with pytest.raises(ConfigError, match="enrolment did not finish"):
        Credentials.read(unfinished)
    made, _ = enrolment.enrol(line, unfinished, tmp_path)
    assert made.subject.name == "other"
