"""The certificate authority of one run: it certifies members, and the coordinator to them.

X.509 as in RFC 5280. A member's certificate is for clients alone and names no host, so that no
member can pass for the coordinator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lorand.credentials import Subject, key_pem, new_key, pem
from lorand.durable import replace
from lorand.errors import ConfigError, HandshakeError
from lorand_coordinator.identity.callers import coordinator_uri

AUTHORITY_LIFE: Final = timedelta(days=3650)
SERVER_LIFE: Final = timedelta(days=365)
MEMBER_LIFE: Final = timedelta(days=90)
BACKDATED: Final = timedelta(days=7)
"""Certificates begin before they are made: a worker with a slow clock takes the coordinator's."""
MAX_REQUEST_BYTES: Final = 4096


def now() -> datetime:
    """Return the time by this machine's clock, which is compared with no other machine's."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Authority:
    """Key and certificate of a run's authority."""

    run: str
    certificate: x509.Certificate
    _key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, path: Path, run: str) -> Self:
        """Make an authority and keep it in a file for its owner alone. Raises ConfigError."""
        key = new_key()
        common = _common(run)
        builder = _builder(common, common, key.public_key(), AUTHORITY_LIFE)
        usage = _key_usage(key_cert_sign=True, crl_sign=True)
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        write_pair(path, key, certificate)
        return cls(run, certificate, key)

    @classmethod
    def read(cls, path: Path, run: str) -> Self:
        """Return the authority in a file. Raises ConfigError, also when it is another run's."""
        key, certificate = read_pair(path)
        if certificate.subject != _common(run):
            raise ConfigError(
                f"{path} is the authority of another run, not of {run!r}: give this run an "
                "--identity-dir of its own"
            )
        return cls(run, certificate, key)

    def issue(self, subject: Subject, key: ec.EllipticCurvePublicKey) -> x509.Certificate:
        """Return a member's certificate."""
        return self._sign(key, [x509.UniformResourceIdentifier(subject.uri())], MEMBER_LIFE, False)

    def issue_server(
        self, names: Sequence[str], key: ec.EllipticCurvePublicKey
    ) -> x509.Certificate:
        """Return the coordinator's own certificate, for host names and IP addresses."""
        return self._sign(key, [_host(name) for name in names], SERVER_LIFE, True)

    def issue_coordinator(self, key: ec.EllipticCurvePublicKey) -> x509.Certificate:
        """Return a certificate with which a coordinator passes members' calls on to another."""
        name = x509.UniformResourceIdentifier(coordinator_uri(self.run))
        return self._sign(key, [name], SERVER_LIFE, False)

    def _sign(
        self,
        key: ec.EllipticCurvePublicKey,
        names: list[x509.GeneralName],
        life: timedelta,
        server: bool,
    ) -> x509.Certificate:
        oids = ExtendedKeyUsageOID
        purpose = oids.SERVER_AUTH if server else oids.CLIENT_AUTH
        authority_key = self._key.public_key()
        return (
            _builder(x509.Name([]), self.certificate.subject, key, life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key), critical=False
            )
            # Critical, since the subject's own field is empty (RFC 5280 §4.2.1.6).
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .sign(self._key, hashes.SHA256())
        )


def requested_key(signing_request: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key whose possession a request (PKCS #10, DER) proves. Raises HandshakeError."""
    try:
        if len(signing_request) > MAX_REQUEST_BYTES:
            raise ValueError("it is too long")
        request = x509.load_der_x509_csr(signing_request)
        key = request.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise ValueError("its key is not of the curve P-256")
        if not request.is_signature_valid:
            raise ValueError("it is not signed with its key")
    except ValueError as error:
        raise HandshakeError(
            f"the signing request cannot be used ({error}); enrol with the coordinator's release "
            "of lorand"
        ) from error
    return key


def write_pair(path: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    """Keep a key and its certificate in a file for its owner alone. Raises ConfigError."""
    try:
        replace(path, key_pem(key) + pem(certificate))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; choose another --identity-dir") from error


def read_pair(path: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Return a key and its certificate. Raises ConfigError."""
    try:
        content = path.read_bytes()
        key = serialization.load_pem_private_key(content, None)
        certificate = x509.load_pem_x509_certificate(content)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; restore it from a copy") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} has a key of another kind; restore it from a copy")
    return key, certificate


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, life: timedelta
) -> x509.CertificateBuilder:
    begins = now()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - BACKDATED)
        .not_valid_after(begins + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _common(run: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, run)])


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name.encode("idna").decode("ascii"))
    except (UnicodeError, ValueError) as error:
        raise ConfigError(f"{name!r} is no host name or IP address: {error}") from error


def _key_usage(**used: bool) -> x509.KeyUsage:
    names = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment"]
    names += ["key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
    return x509.KeyUsage(**{name: used.get(name, False) for name in names})
