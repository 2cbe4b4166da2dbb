"""Enrolment: this machine makes a key that never leaves it, and has it certified."""

import hmac
import ssl
from pathlib import Path
from typing import Final

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from lorand import credentials, transport
from lorand.credentials import Credentials
from lorand.durable import replace
from lorand.errors import ConfigError, ConnectionLost, HandshakeError
from lorand.invitation import Invitation
from lorand.v1 import enrolment_pb2 as pb
from lorand.v1 import enrolment_pb2_grpc as service

TIMEOUT_S: Final = 30.0
REFUSALS: Final = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
)


def enrol(line: str, given: Path | None, state: Path | None) -> tuple[Credentials, str]:
    """Spend an invitation; return the credentials, now in a file, and the coordinator's HOST:PORT.

    The token is sent only to whom the authority with the invitation's fingerprint has certified.
    Raises ConfigError, ConnectionLost, and HandshakeError when either side refuses.
    """
    invitation = Invitation.parse(line)
    authority = _authority(invitation)
    key = credentials.new_key()
    with grpc.secure_channel(
        invitation.address,
        grpc.ssl_channel_credentials(credentials.pem(authority)),
        transport.channel_options(),
    ) as channel:
        stub = service.EnrolmentServiceStub(channel)
        path = None
        try:
            address = stub.GetAuthority(pb.GetAuthorityRequest(), timeout=TIMEOUT_S).address
            path = given or credentials.default_path(address, state)
            _reserve(path, key)
            request = pb.EnrolRequest(
                name=invitation.name, token=invitation.token, signing_request=_signing_request(key)
            )
            answer = stub.Enrol(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            if path is not None:
                path.unlink(missing_ok=True)
            raise _failure(invitation.address, error) from error
    return _keep(path, key, answer.certificate, authority, invitation.name), address


def renew(address: str, present: Credentials) -> Credentials:
    """Replace a member's key and certificate, while the present one is good.

    Raises ConnectionLost, and HandshakeError when either side refuses.
    """
    key = credentials.new_key()
    with credentials.channel(address, present) as channel:
        request = pb.RenewRequest(signing_request=_signing_request(key))
        try:
            answer = service.EnrolmentServiceStub(channel).Renew(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise _failure(address, error) from error
    name = present.subject.name
    return _keep(present.path, key, answer.certificate, present.authority, name)


def _authority(invitation: Invitation) -> x509.Certificate:
    """Return the certificate of the run's authority, which has the invitation's fingerprint.

    Nothing but this question goes to a server that nobody has vouched for yet.
    """
    address = invitation.address
    try:
        shown = ssl.get_server_certificate(transport.split(address), timeout=TIMEOUT_S)
    except OSError as error:  # TLS's own errors are among them
        raise ConnectionLost(
            f"no coordinator enrols members at {address} ({error}); check that `lr-coordinator "
            "serve` runs, and ask for a new invitation if its address changed"
        ) from error
    with grpc.secure_channel(
        address, grpc.ssl_channel_credentials(shown.encode()), transport.channel_options()
    ) as channel:
        stub = service.EnrolmentServiceStub(channel)
        try:
            answer = stub.GetAuthority(pb.GetAuthorityRequest(), timeout=TIMEOUT_S)
            authority = x509.load_der_x509_certificate(answer.certificate)
        except (grpc.RpcError, ValueError) as error:
            raise _failure(address, error) from error
    if not hmac.compare_digest(credentials.fingerprint(authority), invitation.fingerprint):
        raise HandshakeError(
            f"the authority at {address} is not the one of the invitation (its fingerprint is "
            f"{credentials.fingerprint(authority)}): somebody may be in between. Nothing was sent; "
            "ask the run's operator"
        )
    return authority


def _reserve(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write the key alone: what is wrong with the place shows before the token is spent."""
    try:
        if path.exists() and b"BEGIN CERTIFICATE" in path.read_bytes():
            raise ConfigError(
                f"{path} holds credentials already: replace them with `lr-worker enrol --renew`, "
                "move them away, or keep the new ones elsewhere with --credentials"
            )
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace(path, credentials.key_pem(key))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; choose another --credentials") from error


def _signing_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a PKCS #10 request (DER); the coordinator knows better than it who asks."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def _keep(
    path: Path,
    key: ec.EllipticCurvePrivateKey,
    certificate: bytes,
    authority: x509.Certificate,
    name: str,
) -> Credentials:
    """Write the credentials, if they are what was asked for. Raises HandshakeError, ConfigError."""
    try:
        made = x509.load_der_x509_certificate(certificate)
        made.verify_directly_issued_by(authority)
        if made.public_key() != key.public_key():
            raise ValueError("it is for another key")
        if credentials.Subject.of(made).name != name:
            raise ValueError("it is for another name")
    except (ValueError, TypeError, InvalidSignature, HandshakeError) as error:
        raise HandshakeError(
            f"the coordinator's certificate cannot be used ({error}); install the same release of "
            "lorand on both sides and ask for a new invitation"
        ) from error
    try:
        return Credentials.write(path, key, made, authority)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error}; choose another --credentials, and ask for a new "
            "invitation: this one is spent"
        ) from error


def _failure(address: str, error: Exception) -> ConnectionLost | HandshakeError:
    """Return what a failed call means to the owner of this machine."""
    code = error.code() if isinstance(error, grpc.Call) else None
    detail = (error.details() if isinstance(error, grpc.Call) else "") or str(error)
    if code in REFUSALS:
        return HandshakeError(f"the coordinator refused: {detail}")
    if (distrust := credentials.distrust(address, detail)) is not None:
        return distrust
    return ConnectionLost(
        f"the coordinator at {address} did not answer ({detail[:200]}); check that `lr-coordinator "
        "serve` runs, and give the same command again"
    )
