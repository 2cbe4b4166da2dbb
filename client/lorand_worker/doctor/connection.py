"""The way to the coordinator: certificate and clock, name, port, TLS, and the run it serves."""

import socket
import ssl
from datetime import UTC, datetime
from typing import Final

from lorand import transport
from lorand.credentials import Credentials, pem
from lorand.errors import LorandError
from lorand.findings import Finding, failed, ok, warning
from lorand_worker import guard
from lorand_worker.doctor.patient import GIVE_UP_S, Patient

RENEW_DAYS: Final = 14
NOT_YET_VALID: Final = 9
EXPIRED: Final = 10
"""What OpenSSL calls certificates outside of their dates."""


def now() -> datetime:
    """Return this machine's time: certificates have dates, and nothing else of a run has."""
    return datetime.now(UTC)


def certificate(patient: Patient) -> Finding | None:
    """This member's certificate is there, and good by this machine's clock."""
    if not patient.address:
        return None
    shown = patient.shown
    if shown is None:
        return ok("none: --insecure, on this machine alone")
    begins, ends = shown.certificate.not_valid_before_utc, shown.expires
    present, who = now(), f"{shown.subject.name!r}, {shown.subject.role}"
    if present < begins:
        return failed(
            f"{who}: this machine's clock says {present:%Y-%m-%d %H:%M}, before its certificate "
            f"began ({begins:%Y-%m-%d %H:%M}): set the clock (UTC); nothing else of a run depends "
            "on it"
        )
    if present > ends:
        return failed(
            f"{who}: expired on {ends:%Y-%m-%d} by this machine's clock ({present:%Y-%m-%d}): ask "
            "the run's operator for a new invitation, or set the clock if it is wrong"
        )
    if (ends - present).days < RENEW_DAYS:
        return warning(
            f"{who}: good until {ends:%Y-%m-%d}: `lr-worker enrol --renew {patient.address}`"
        )
    return ok(f"{who}, good until {ends:%Y-%m-%d}")


def port(patient: Patient) -> Finding | None:
    """Each address is known, and somebody listens there."""
    if not patient.address:
        return None
    reached, away = [], []
    for address in patient.addresses:
        host, number = transport.split(address)
        try:
            socket.create_connection((host, number), GIVE_UP_S).close()
        except socket.gaierror:
            away.append(f"{host} is no name that this machine knows: check it, or its DNS")
        except TimeoutError:
            away.append(
                f"{address} does not answer within {GIVE_UP_S:.0f} s: check that a firewall lets "
                "this machine through to it"
            )
        except OSError as error:
            away.append(
                f"{address}: {error.strerror or error}: check that `lr-coordinator serve` runs "
                "there, and the port"
            )
        else:
            reached.append(address)
    if not reached:
        return failed("; ".join(away))
    return warning("; ".join(away)) if away else ok(f"{', '.join(reached)} answers")


def tls(patient: Patient) -> Finding | None:
    """The coordinator's certificate is the run's, and good by this machine's clock."""
    shown = _shown(patient)
    if shown is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=pem(shown.authority).decode())
    context.load_cert_chain(shown.path)
    context.set_alpn_protocols(["h2"])
    why = ""
    for address in patient.addresses:
        host, number = transport.split(address)
        try:
            with (
                socket.create_connection((host, number), GIVE_UP_S) as plain,
                context.wrap_socket(plain, server_hostname=host) as secured,
            ):
                until = str((secured.getpeercert() or {}).get("notAfter", ""))
                return ok(
                    f"{secured.version()}; the coordinator's certificate is good until {until}"
                )
        except ssl.SSLCertVerificationError as error:
            return failed(_distrusted(address, error))
        except OSError as error:
            why = f"{address}: {error}"
    return failed(
        f"no TLS ({why}): check that the coordinator does not serve with --insecure, and that "
        "nothing in between ends connections"
    )


def _shown(patient: Patient) -> Credentials | None:
    if not patient.address:
        return None
    try:
        return patient.shown
    except LorandError:
        return None  # `certificate` has said so


def _distrusted(address: str, error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in (NOT_YET_VALID, EXPIRED):
        when = "has not begun" if error.verify_code == NOT_YET_VALID else "has expired"
        return (
            f"the certificate of {address} {when} by this machine's clock "
            f"({now():%Y-%m-%d %H:%M} UTC): set the clock if it is wrong, else have the operator "
            "start `lr-coordinator serve` again, which renews it"
        )
    return (
        f"who answers at {address} is not certified for it by the run's authority "
        f"({error.verify_message}): check the address, that these are this run's credentials, and "
        "that the operator named this host with --host-name"
    )


def run(patient: Patient) -> Finding | None:
    """The coordinator lets this member in, and its run is one for this release."""
    if not patient.address:
        return None
    if not patient.insecure and _shown(patient) is None:
        return None
    config, theirs = patient.served
    guard.check(config, guard.Policy())
    known = "" if theirs is not None else "; its model waits for the first worker"
    return ok(
        f"{config.run.name}: {config.task.kind} on {config.model.name}, {config.run.rounds} rounds"
        f"{known}"
    )
