"""Who somebody is in a run: a key, a certificate, and channels that show it (mutual TLS).

The name and the role stand in the certificate, as a URI (RFC 5280 §4.2.1.6), and nowhere else:
`lorand://RUN/ROLE/NAME`, each part percent-encoded. Keys are ECDSA on P-256, which the TLS of
gRPC takes with its defaults.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote, unquote

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lorand import transport
from lorand.durable import replace, state_folder
from lorand.errors import ConfigError, HandshakeError

MAX_NAME: Final = 64
_SCHEME: Final = "lorand://"
_DISTRUST: Final = (
    "CERTIFICATE_VERIFY_FAILED",
    "WRONG_VERSION_NUMBER",
    "certificate signature failure",
    "is not in peer certificate",
)
"""What gRPC says of a server that is not the expected one; other failures may pass."""


class Role(StrEnum):
    """What a member may do."""

    WORKER = "worker"
    EVALUATOR = "evaluator"
    OBSERVER = "observer"
    OPERATOR = "operator"


@dataclass(frozen=True)
class Subject:
    """Whom a certificate speaks of."""

    run: str
    role: Role
    name: str

    def uri(self) -> str:
        """Return what stands in the certificate."""
        return _SCHEME + "/".join(quote(part, safe="") for part in (self.run, self.role, self.name))

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Return the subject of a URI. Raises HandshakeError unless `uri` would return just it."""
        parts = [unquote(part) for part in uri.removeprefix(_SCHEME).split("/")]
        if len(parts) == 3 and parts[1] in frozenset(Role):
            found = cls(parts[0], Role(parts[1]), parts[2])
            if found.uri() == uri and found.name:
                return found
        raise HandshakeError(f"a certificate with the name {uri[:200]!r} is no member's of a run")

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Self:
        """Return the subject of a certificate. Raises HandshakeError when it is no member's."""
        try:
            extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            (uri,) = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
        except (x509.ExtensionNotFound, ValueError) as error:
            raise HandshakeError("the certificate is no member's of a run") from error
        return cls.parse(uri)


def check_name(name: str) -> None:
    """Raise ConfigError unless a member can be called so."""
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ConfigError(f"a name has 1 to {MAX_NAME} printable characters, not {name[:80]!r}")


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate, 64 hexadecimal digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a key, with the operating system's randomness."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a secret key for a file that only its owner can read."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate in PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True)
class Credentials:
    """A member's key and certificate, and the authority of its run; one file, `path`."""

    path: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    authority: x509.Certificate
    subject: Subject

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the credentials in a file. Raises ConfigError."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"cannot read the credentials {path}: {error}; ask the run's operator for an "
                "invitation and give it to `lr-worker enrol`"
            ) from error
        try:
            key = serialization.load_pem_private_key(content, None)
            certificate, authority = x509.load_pem_x509_certificates(content)
            subject = Subject.of(certificate)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise ValueError("the key is of another kind")
            if key.public_key() != certificate.public_key():
                raise ValueError("the key is another certificate's")
        except (ValueError, TypeError, HandshakeError) as error:
            raise ConfigError(
                f"{path} does not hold a key and its two certificates ({error}): the enrolment "
                "did not finish, or the file was damaged; remove it and ask for a new invitation"
            ) from error
        return cls(path, key, certificate, authority, subject)

    @classmethod
    def write(
        cls,
        path: Path,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        authority: x509.Certificate,
    ) -> Self:
        """Keep them in a file for its owner alone, and return them. Raises OSError."""
        replace(path, key_pem(key) + pem(certificate) + pem(authority))
        return cls(path, key, certificate, authority, Subject.of(certificate))

    @property
    def expires(self) -> datetime:
        """Until when the certificate is good, by the coordinator's clock."""
        return self.certificate.not_valid_after_utc

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return what gRPC needs to show this certificate and to take none but its authority's."""
        return grpc.ssl_channel_credentials(
            pem(self.authority), key_pem(self.key), pem(self.certificate)
        )


def default_path(address: str, state: Path | None = None) -> Path:
    """Return where a member's credentials for a coordinator are, unless told otherwise."""
    place = address if len(address) <= 200 else hashlib.sha256(address.encode()).hexdigest()
    return (state or state_folder()) / "credentials" / f"{quote(place, safe='[]:')}.pem"


def find(
    address: str, given: Path | None, insecure: bool, state: Path | None = None
) -> Credentials | None:
    """Return the credentials for a coordinator; None: none are wanted.

    Raises ConfigError when there are none, or both flags are given.
    """
    if insecure:
        if given is not None:
            raise ConfigError("--insecure shows no credentials: leave one of the two flags away")
        return None
    path = given or default_path(address, state)
    if given is None and not path.exists():
        raise ConfigError(
            f"this user is no member at {address} ({path} is missing): ask the run's operator for "
            "an invitation and give it to `lr-worker enrol`; if you have, give its file with "
            "--credentials. A coordinator on this machine that serves with --insecure is reached "
            "with --insecure"
        )
    return Credentials.read(path)


def distrust(address: str, detail: str) -> HandshakeError | None:
    """Return what is wrong where a call failed because of who answered; None: something else."""
    if not any(words in detail for words in _DISTRUST):
        return None
    return HandshakeError(
        f"who answers at {address} is not certified for it by the run's authority: another "
        "coordinator, one that serves with --insecure, or somebody in between. Nothing was sent; "
        f"check the address, and ask the run's operator ({detail[-120:]})"
    )


def channel(address: str, credentials: Credentials | None) -> grpc.Channel:
    """Open a channel to HOST:PORT that shows the credentials; nothing is sent yet.

    Without any it is neither encrypted nor authenticated: raises ConfigError off this machine.
    """
    host, _ = transport.split(address)
    if credentials is not None:
        return grpc.secure_channel(
            address, credentials.channel_credentials(), transport.channel_options()
        )
    if not transport.is_loopback(host):
        raise ConfigError(
            f"{host} is not this machine: --insecure is for addresses such as 127.0.0.1 alone; ask "
            "the run's operator for an invitation and give it to `lr-worker enrol`"
        )
    return grpc.insecure_channel(address, transport.channel_options())
