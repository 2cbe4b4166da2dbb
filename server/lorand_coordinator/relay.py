"""Members' calls passed on to the coordinator that leads, as bytes that nobody reads here.

A call of any kind is a stream each way, with what ends it: so one handler carries all of them. A
message is read when the one before has been written, in both directions, so that a slow reader
slows its sender and nothing piles up. Calls are passed on once: where two coordinators believe that
the other leads, the caller comes back.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NoReturn

import grpc

from lorand import credentials, transport
from lorand.errors import ConfigError, LorandError
from lorand_coordinator.identity import callers
from lorand_coordinator.identity.access import PERMITTED
from lorand_coordinator.identity.admission import LOCAL, Admission

Context = grpc.aio.ServicerContext[Any, Any]
LOST: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INTERNAL,
)
"""What is no answer to the caller. The last two: the leader does not know this coordinator; its
answer came before the request was written, and gRPC has forgotten it."""
Connect = Callable[[str], grpc.aio.Channel]
"""Opens a channel to a leader's HOST:PORT. May raise LorandError."""
_OPTIONS: Final = (
    *transport.channel_options(),
    ("grpc.http2.lookahead_bytes", transport.WINDOW_BYTES),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.use_local_subchannel_pool", 1),  # else alike channels share a connection
)
# A coordinator is certified to its own machine, besides by what name workers reach it: what counts
# is that the run's authority certified it.
_SECURE_OPTIONS: Final = (*_OPTIONS, ("grpc.ssl_target_name_override", LOCAL[0]))


def connecting(admission: Admission | None) -> Connect:
    """Return what opens channels to a leader that shares these identities; None: --insecure."""

    def connect(leader: str) -> grpc.aio.Channel:
        host, _ = transport.split(leader)
        if admission is not None:
            shown = admission.passing_credentials()
            return grpc.aio.secure_channel(leader, shown, _SECURE_OPTIONS)
        if not transport.is_loopback(host):
            raise ConfigError(f"{host} is not this machine, which --insecure serves alone")
        return grpc.aio.insecure_channel(leader, _OPTIONS)

    return connect


@dataclass(eq=False)
class _Line:
    """A connection to the leader, with as many calls as a connection may have."""

    channel: grpc.aio.Channel
    calls: set[grpc.aio.Call] = field(default_factory=set)


class Relay(grpc.GenericRpcHandler):
    """Handles the calls of members that no other handler of a server takes."""

    def __init__(self, connect: Connect) -> None:
        """Nothing is opened yet, and nobody leads."""
        self._connect, self._leader, self._reason = connect, "", ""
        self._lines: list[_Line] = []

    def __len__(self) -> int:
        """Number of connections to the leader."""
        return len(self._lines)

    async def follow(self, leader: str, reason: str) -> None:
        """Pass calls on to the leader at HOST:PORT; empty: to nobody, for this reason.

        Calls that went to another end: it may be one that sleeps, and its callers would wait.
        """
        self._reason = reason
        if leader == self._leader:
            return
        self._leader, before, self._lines = leader, self._lines, []
        for line in before:
            for call in line.calls:
                call.cancel()
            await self._close_unused(line)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a method that members have; None: there is none."""
        method = handler_call_details.method
        if method not in PERMITTED:
            return None
        return grpc.stream_stream_rpc_method_handler(partial(self._pass_on, method))

    async def _pass_on(
        self, method: str, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[bytes]:
        """Be the caller to the leader, and the leader to the caller."""
        if not self._leader or callers.passed_on(context) is not None:
            await _unavailable(context, self._reason)
        leader = self._leader
        try:
            line = self._line()
        except LorandError as error:
            await _unavailable(context, f"{leader} leads; {error}")
        carry: Any = line.channel.stream_stream(method)
        named = grpc.aio.Metadata(callers.naming(context))
        call: Any = carry(requests, timeout=context.time_remaining(), metadata=named)
        line.calls.add(call)
        try:
            async for answer in call:
                yield answer
        except grpc.aio.AioRpcError as error:
            await self._hand_back(error, line, leader, context)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # the caller went, or is a member no more
            await _unavailable(context, f"{leader} leads no longer")
        finally:
            call.cancel()
            line.calls.discard(call)
            await self._close_unused(line)

    def _line(self) -> _Line:
        """Return a connection that may have another call. May raise LorandError."""
        for line in self._lines:
            if len(line.calls) < transport.STREAMS:
                return line
        line = _Line(self._connect(self._leader))
        self._lines.append(line)
        return line

    async def _close_unused(self, line: _Line) -> None:
        """Close a connection with its last call, unless others may come.

        Each by itself: gRPC looks for calls in all tasks there are.
        """
        if line not in self._lines and not line.calls:
            await line.channel.close()

    async def _hand_back(
        self, error: grpc.aio.AioRpcError, line: _Line, leader: str, context: Context
    ) -> NoReturn:
        """End a call as the leader did; where it was lost between the two, with UNAVAILABLE."""
        code, details = error.code(), error.details() or ""
        if code not in LOST:
            await context.abort(code, details, tuple(error.trailing_metadata()))
        if line in self._lines:
            self._lines.remove(line)  # the next call is tried on a connection of its own
        # What TLS says of the leader must not be taken for what it says of this coordinator.
        if credentials.distrust(leader, details) is not None:
            details = "it is not certified by this run's authority (see --identity-dir)"
        await _unavailable(context, f"{leader} leads; {details}")


async def _unavailable(context: Context, why: str) -> NoReturn:
    await context.abort(
        grpc.StatusCode.UNAVAILABLE, f"this coordinator stands by: {why or 'nobody leads'}"
    )
