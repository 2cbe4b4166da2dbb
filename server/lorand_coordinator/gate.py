"""Before every call of a server: how many a peer may make, and how many be open.

A peer is who its certificate says; without certificates, at the port for enrolment, its address,
and with --insecure, where all are on this machine, its connection. A call that a coordinator passed
on is its caller's, not that coordinator's.
"""

import asyncio
import inspect
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Any, Final, NoReturn
from urllib.parse import unquote

import grpc

from lorand import transport
from lorand.config import RunConfig
from lorand_coordinator import limits
from lorand_coordinator.identity import callers
from lorand_coordinator.limits import Buckets

LOGGED_EVERY_S: Final = 60.0

log = logging.getLogger("lorand.coordinator")

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Any]


@dataclass(frozen=True)
class Bounds:
    """What a server stands."""

    calls_per_s: float
    burst: float
    calls: int
    """Open calls of all peers together."""
    at_once: int = limits.CALLS_AT_ONCE
    request_s: float = limits.REQUEST_S
    by_address: bool = False

    @classmethod
    def of_run(cls, config: RunConfig) -> "Bounds":
        """Return the bounds of a run's server."""
        rate = config.service.calls_per_s
        return cls(rate, rate * limits.CALLS_BURST_S, transport.most_connections(config))


class Gate(grpc.aio.ServerInterceptor):
    """Bounds calls before anything else looks at them."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is monotonic seconds."""
        self._bounds, self._clock = bounds, clock
        self._buckets = Buckets(bounds.calls_per_s, bounds.burst)
        self._logged = Buckets(1 / LOGGED_EVERY_S, 1)
        self._open: Counter[str] = Counter()
        self._all_open = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler behind the bounds."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_stream
        if handler.unary_stream and not inspect.isasyncgenfunction(behaviour):
            return handler  # health.Watch, which writes its answers itself: no member may call it
        # A handler of streams is told of a call at once, one of requests when these have come.
        return grpc.stream_stream_rpc_method_handler(
            self._behind(behaviour, streams=bool(handler.stream_stream)),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _behind(self, behaviour: Behaviour, *, streams: bool) -> Behaviour:
        answers_once = not inspect.isasyncgenfunction(behaviour)

        async def call(requests: AsyncIterator[Any], context: Context) -> None:
            peer = who(context, by_address=self._bounds.by_address)
            await self._check(peer, context)
            self._open[peer] += 1  # until its last answer was read
            self._all_open += 1
            try:
                request = requests if streams else await self._request(requests, context)
                if answers_once:
                    await context.write(await behaviour(request, context))
                    return
                async with aclosing(behaviour(request, context)) as answers:
                    async for answer in answers:
                        await context.write(answer)
            finally:
                self._all_open -= 1
                self._open[peer] -= 1
                if not self._open[peer]:
                    del self._open[peer]

        async def freed(requests: AsyncIterator[Any], context: Context) -> None:
            try:
                await call(requests, context)
            except grpc.aio.AbortError as error:
                # gRPC has it, and raises it again. It and its call would keep each other, and count
                # among the calls of its connection, until garbage is collected.
                error.__traceback__ = error.__context__ = None

        return freed

    async def _check(self, peer: str, context: Context) -> None:
        """End a call that is one too many."""
        bounds = self._bounds
        if wait := self._buckets.take(peer, self._clock()):
            why = f"more than {bounds.calls_per_s:g} calls a second"
            await self._refuse(peer, why, wait, context)
        if self._open[peer] >= bounds.at_once:
            await self._refuse(peer, f"{bounds.at_once} calls are open", 1.0, context)
        if self._all_open >= bounds.calls:
            why = f"{bounds.calls} calls of all are open"
            await self._refuse(peer, why, 1.0, context)

    async def _refuse(self, peer: str, why: str, wait: float, context: Context) -> NoReturn:
        if not self._logged.take(peer, self._clock()):
            log.warning("calls are refused: %s from %s", why, peer)
        pushback = (transport.PUSHBACK, f"{1000 * wait:.0f}")
        await context.abort(
            grpc.StatusCode.RESOURCE_EXHAUSTED, f"{why}: come back later", (pushback,)
        )

    async def _request(self, requests: AsyncIterator[Any], context: Context) -> Any:
        """Return the only request; read to its end, or its stream would stay open."""
        try:
            async with asyncio.timeout(self._bounds.request_s):
                request = await anext(requests, None)
                more = None if request is None else await anext(requests, None)
        except TimeoutError:
            why = f"the request did not come within {self._bounds.request_s:.0f} s"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, why)
        if request is None or more is not None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this call takes one request")
        return request


def who(context: Context, *, by_address: bool = False) -> str:
    """Return whose share a call is of."""
    passed = None if by_address else callers.passed_on(context)
    if passed and (share := callers.share(passed)) is not None:
        return share
    identities = context.peer_identities()
    if identities:
        return b" ".join(identities).decode(errors="replace")
    peer = unquote(context.peer())
    return neighbourhood(peer) if by_address else peer


def neighbourhood(peer: str) -> str:
    """Return the address of gRPC's name for a peer: of IPv6, the network that one site has.

    >>> neighbourhood("ipv4:192.0.2.7:5555"), neighbourhood("ipv6:[2001:db8::7]:5555")
    ('192.0.2.7', '2001:db8::/64')
    """
    host = peer.partition(":")[2].rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ip_address(host)
    except ValueError:
        return peer
    if not isinstance(address, IPv6Address):
        return host
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"
