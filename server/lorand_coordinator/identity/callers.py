"""Whose call it is: of whoever its connection's certificate names, or of whom a coordinator names.

A coordinator that stands by passes its members' calls on to the leader, with the certificate that
each caller showed. That is believed on connections of the run's coordinators alone, which have a
certificate of a kind that no member gets. Without certificates everybody is who they say they are.
"""

from typing import Any, Final
from urllib.parse import quote

import grpc
from cryptography import x509

from lorand.credentials import Subject
from lorand.errors import HandshakeError

CALLER: Final = "lorand-caller-bin"
"""Metadata of a call that is passed on: the caller's certificate, or without any its connection."""
_SCHEME: Final = "lorand-coordinator://"

Context = grpc.aio.ServicerContext[Any, Any]


def coordinator_uri(run: str) -> str:
    """Return what stands in a certificate for passing calls on; `Subject.parse` refuses it."""
    return _SCHEME + quote(run, safe="")


def shown(context: Context) -> bytes:
    """Return the certificate of a call's connection, PEM; empty without one."""
    (certificate,) = context.auth_context().get("x509_pem_cert", [b""])
    return certificate


def passed_on(context: Context) -> bytes | None:
    """Return the caller that a coordinator names; None: nobody who may has passed this call on.

    Empty where a coordinator names nobody.
    """
    identities = context.peer_identities()
    if identities and not any(each.startswith(_SCHEME.encode()) for each in identities):
        return None
    said = dict(context.invocation_metadata() or ()).get(CALLER)
    if said is None:
        return b"" if identities else None
    return said.encode() if isinstance(said, str) else said


def naming(context: Context) -> tuple[str, bytes]:
    """Return the metadata that passes a call on as its caller's."""
    return CALLER, shown(context) or context.peer().encode()


def share(passed: bytes) -> str | None:
    """Return whose share of calls one that was passed on is of; None: that cannot be told.

    As of a call that comes by itself: the names in a certificate, or a connection.
    """
    if not passed.startswith(b"-----BEGIN"):
        return passed.decode(errors="replace") or None
    try:
        return Subject.of(x509.load_pem_x509_certificate(passed)).uri()
    except (ValueError, HandshakeError):
        return None
