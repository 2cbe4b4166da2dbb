"""Enrolment: certificates for invitations, and new ones for members (gRPC)."""

from typing import Any, Final, NoReturn

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from lorand import transport
from lorand.credentials import Role, Subject
from lorand.errors import HandshakeError
from lorand.v1 import enrolment_pb2 as pb
from lorand.v1 import enrolment_pb2_grpc as service
from lorand_coordinator import limits
from lorand_coordinator.gate import Bounds, Gate
from lorand_coordinator.identity.access import caller, log
from lorand_coordinator.identity.authority import Authority, requested_key
from lorand_coordinator.identity.members import Members
from lorand_coordinator.store import StoreUnavailable

MAX_MESSAGE_BYTES: Final = 16 << 10
MAX_CALLS: Final = 64

Context = grpc.aio.ServicerContext[Any, Any]


class Enrolment(service.EnrolmentServiceServicer):
    """Issues certificates for keys that others keep."""

    def __init__(self, authority: Authority, members: Members) -> None:
        """Certify and record with these."""
        self._authority, self._members = authority, members

    async def GetAuthority(
        self, request: pb.GetAuthorityRequest, context: Context
    ) -> pb.GetAuthorityResponse:
        """See enrolment.proto."""
        try:
            served = self._members.served()
        except StoreUnavailable as error:
            await self._unavailable(context, error)
        return pb.GetAuthorityResponse(
            certificate=self._authority.certificate.public_bytes(Encoding.DER),
            address=served[0] if served is not None else "",
        )

    async def Enrol(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolResponse:
        """See enrolment.proto."""
        key = await self._key(request.signing_request, context)
        try:
            certificate = self._members.redeem(
                request.name,
                request.token,
                lambda role: self._authority.issue(self._subject(role, request.name), key),
            )
        except HandshakeError as error:
            log.warning("an enrolment was refused: %s", error)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except StoreUnavailable as error:
            await self._unavailable(context, error)
        log.info("%r enrolled", request.name)
        return pb.EnrolResponse(certificate=certificate.public_bytes(Encoding.DER))

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        """See enrolment.proto."""
        peer = caller()
        if peer is None:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "renewing takes the certificate that is to be followed: call the port of the run",
            )
        key = await self._key(request.signing_request, context)
        certificate = self._authority.issue(peer.subject, key)
        try:
            self._members.renew(peer, certificate)
        except HandshakeError as error:
            log.warning("a renewal was refused: %s", error)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except StoreUnavailable as error:
            await self._unavailable(context, error)
        log.info("%r has a new certificate", peer.subject.name)
        return pb.RenewResponse(certificate=certificate.public_bytes(Encoding.DER))

    async def _key(self, signing_request: bytes, context: Context) -> ec.EllipticCurvePublicKey:
        try:
            return requested_key(signing_request)
        except HandshakeError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def _unavailable(self, context: Context, error: StoreUnavailable) -> NoReturn:
        log.error("nobody can enrol: %s", error)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the members' file is not available")

    def _subject(self, role: Role, name: str) -> Subject:
        return Subject(self._authority.run, role, name)


def server(enrolment: Enrolment) -> grpc.aio.Server:
    """Return a server for callers without a certificate: it issues first ones, and nothing else."""
    rate, burst = limits.ENROLMENT_CALLS_PER_S, limits.ENROLMENT_BURST
    made = grpc.aio.server(
        interceptors=[Gate(Bounds(rate, burst, MAX_CALLS, by_address=True))],
        options=transport.bounds(MAX_MESSAGE_BYTES, MAX_CALLS),
    )
    service.add_EnrolmentServiceServicer_to_server(enrolment, made)
    return made
