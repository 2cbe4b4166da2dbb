"""What each role may call, decided before a call reaches its service.

The caller is who its certificate says, as TLS has verified it, and is looked up among the members
once a call; nothing is done a message. Calls that are not in the table are refused. Of a call that
another coordinator passed on, both are looked up: the coordinator, and the caller that it names.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import grpc
from cryptography import x509

from lorand.credentials import Role
from lorand.errors import HandshakeError
from lorand_coordinator.identity import callers
from lorand_coordinator.identity.members import Members, NoCoordinator, Peer, serial_of
from lorand_coordinator.store import StoreUnavailable

REVOKED_WITHIN_S: Final = 1.0
EXPIRED_WITHIN_S: Final = 30.0
"""How often open streams are compared with the members, which others may have changed."""

ALL: Final = frozenset(Role)
PERMITTED: Final[dict[str, frozenset[Role]]] = {
    "/lorand.v1.CoordinationService/GetRun": ALL,
    "/lorand.v1.CoordinationService/Participate": frozenset({Role.WORKER}),
    "/lorand.v1.LedgerService/ReadEntries": ALL,
    "/lorand.v1.LedgerService/GetCheckpoint": ALL,
    "/lorand.v1.LedgerService/GetHead": ALL,
    "/lorand.v1.LedgerService/PostEvaluation": frozenset({Role.EVALUATOR}),
    "/lorand.v1.LedgerService/PostStatement": frozenset({Role.WORKER}),
    "/lorand.v1.StatusService/GetStatus": ALL,
    "/lorand.v1.EnrolmentService/Renew": ALL,
    "/grpc.health.v1.Health/Check": ALL,
}

Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Any, Context], Any]

_caller: ContextVar[Peer | None] = ContextVar("caller", default=None)

log = logging.getLogger("lorand.coordinator")


@dataclass(frozen=True)
class _Caller:
    """Whose call it is; `through` is the certificate of who passed it on, empty: nobody."""

    peer: Peer
    through: str


def caller() -> Peer | None:
    """Return who makes the present call; None: the coordinator serves with --insecure."""
    return _caller.get()


def named(claimed: str) -> str:
    """Return the present caller's name, whatever it claims. Raises HandshakeError.

    A claim is empty or right; without certificates it is all there is.
    """
    peer = caller()
    if peer is None:
        return claimed
    if claimed not in ("", peer.subject.name):
        raise HandshakeError(
            f"{claimed!r} is not the name in the certificate, {peer.subject.name!r}: leave --name "
            "away"
        )
    return peer.subject.name


def may_audit() -> bool:
    """Return whether the present caller may see what single workers reported."""
    peer = caller()
    return peer is None or peer.subject.role == Role.OPERATOR


class Access(grpc.aio.ServerInterceptor):
    """Lets calls of present members through to what their role may call."""

    def __init__(self, members: Members, run: str) -> None:
        """Admit members of this run."""
        self._members, self._run = members, run
        self._streams: dict[asyncio.Task[Any], _Caller] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler behind a check of its caller."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behaviour = getattr(handler, kind)
            if behaviour is not None:
                return handler._replace(**{kind: self._behind(method, behaviour)})
        return handler

    def _behind(self, method: str, behaviour: Method) -> Method:
        async def call(request: Any, context: Context) -> Any:
            await self._admit(method, context)
            return await behaviour(request, context)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            admitted = await self._admit(method, context)
            task = asyncio.current_task()
            assert task is not None
            self._streams[task] = admitted
            try:
                async with aclosing(behaviour(request, context)) as answers:
                    async for answer in answers:
                        yield answer
            except asyncio.CancelledError:
                await self._admit(method, context)  # says why, where it was `watch`
                raise
            finally:
                del self._streams[task]

        return stream if inspect.isasyncgenfunction(behaviour) else call

    async def _admit(self, method: str, context: Context) -> _Caller:
        """Return the caller of a call that it may make; end the call otherwise."""
        try:
            found = self._caller(context)
        except HandshakeError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        try:
            self._check(found)
        except NoCoordinator as error:  # no fault of the caller, who may come back another way
            log.warning("a call was refused: %s", error)
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except HandshakeError as error:
            log.warning("a call was refused: %s", error)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except StoreUnavailable as error:
            log.error("no call can be admitted: %s", error)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the members cannot be read just now")
        peer = found.peer
        role = peer.subject.role
        if role not in PERMITTED.get(method, frozenset()):
            what = method.rpartition("/")[2]
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"{peer.subject.name!r} is a member as {role}, which may not call {what}; ask the "
                "run's operator for an invitation with another --role",
            )
        _caller.set(peer)
        return found

    def _check(self, found: _Caller) -> None:
        """Raise HandshakeError unless a caller, and who passed its call on, may still call."""
        if found.through:
            self._members.check_coordinator(found.through)
        self._members.check(found.peer)

    def _caller(self, context: Context) -> _Caller:
        """Return whose call it is by the certificates it came with. Raises HandshakeError."""
        certificate, through = callers.shown(context), ""
        if not certificate:
            raise HandshakeError("this call came without a certificate; enrol first")
        passed = callers.passed_on(context)
        if passed is not None:
            through = serial_of(x509.load_pem_x509_certificate(certificate))
            certificate = passed
        try:
            peer = Peer.of(x509.load_pem_x509_certificate(certificate))
        except ValueError as error:
            raise HandshakeError("a coordinator passed this call on without its caller") from error
        if peer.subject.run != self._run:
            raise HandshakeError(
                f"this certificate is of the run {peer.subject.run!r}, not of {self._run!r}"
            )
        return _Caller(peer, through)

    async def watch(self) -> None:
        """End streams of members whose certificate was revoked or has expired, until cancelled.

        Revoking is another process's write. All are looked up when there was one, and now and
        then for those that expire: five thousand take a fifth of a second.
        """
        looked = self._members.clock()
        while True:
            await asyncio.sleep(REVOKED_WITHIN_S)
            try:
                changed = self._members.changed()
            except StoreUnavailable as error:
                log.error("members cannot be checked: %s", error)
                continue
            if changed or abs(self._members.clock() - looked) > EXPIRED_WITHIN_S:
                looked = self._members.clock()
                self.end_streams()

    def end_streams(self) -> None:
        """End the streams of callers that would not be admitted now."""
        for task, found in list(self._streams.items()):
            try:
                self._check(found)
            except HandshakeError as error:
                log.warning("a stream was ended: %s", error)
                task.cancel()
            except StoreUnavailable as error:
                log.error("members cannot be checked: %s", error)
                return
