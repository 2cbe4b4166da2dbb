"""What a coordinator bounds before it looks at a call, with real sockets."""

import asyncio
import gc
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from tests.raw_http2 import DATA, GOAWAY, HEADERS, PING, RST_STREAM, RawPeer, frame, message

from lorand import transport
from lorand.errors import HandshakeError
from lorand_coordinator.gate import Bounds, Context, Gate, who
from lorand_coordinator.identity import callers
from lorand_worker import link

LIMIT_S = 20.0
ECHO, COUNT = "/test/Echo", "/test/Count"
MESSAGE_BYTES = 100_000


class Served:
    """A server of two methods behind a gate, in a thread."""

    def __init__(self, bounds: Bounds) -> None:
        """Serve."""
        self.gate, self.address = Gate(bounds, clock=lambda: 0.0), ""
        self._loop, self._done = asyncio.new_event_loop(), asyncio.Event()
        ready = threading.Event()
        self._thread = threading.Thread(
            target=lambda: self._loop.run_until_complete(self._run(ready))
        )
        self._thread.start()
        assert ready.wait(LIMIT_S)

    async def _run(self, ready: threading.Event) -> None:
        options = transport.bounds(MESSAGE_BYTES, 64)
        server = grpc.aio.server(interceptors=[self.gate], options=options)
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Echo": grpc.unary_unary_rpc_method_handler(self._echo),
            "Count": grpc.unary_stream_rpc_method_handler(self._count),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        ready.set()
        await self._done.wait()
        await server.stop(0)
        await asyncio.sleep(0)  # tasks of grpc that are done but for this

    @staticmethod
    async def _echo(request: bytes, context: Context) -> bytes:
        return request

    @staticmethod
    async def _count(request: bytes, context: Context) -> AsyncIterator[bytes]:
        while True:
            yield bytes(10_000)
            await asyncio.sleep(0)

    def close(self) -> None:
        """End it."""
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(LIMIT_S)
        self._loop.close()


@contextmanager
def served(**changes: Any) -> Iterator[Served]:
    made = Served(Bounds(**{"calls_per_s": 1.0, "burst": 1000.0, "calls": 100, **changes}))
    try:
        yield made
    finally:
        made.close()


@contextmanager
def caller(address: str) -> Iterator[Callable[[bytes], bytes]]:
    own = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, own) as channel:
        echo: Any = channel.unary_unary(ECHO)
        yield lambda request: echo(request, timeout=LIMIT_S)


def test_calls_above_the_rate_are_told_to_come_back_and_a_worker_does() -> None:
    with served(burst=3.0) as server, caller(server.address) as echo:
        assert [echo(b"x") for _ in range(3)] == [b"x"] * 3
        with pytest.raises(grpc.RpcError) as caught:
            echo(b"x")
        error: Any = caught.value
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "more than 1 calls a second: come back later"
        assert dict(error.trailing_metadata())[transport.PUSHBACK] == "1000"
        assert link._explain(server.address, error) == (
            "resource_exhausted: more than 1 calls a second: come back later"
        )
        with caller(server.address) as other:
            assert other(b"y") == b"y"  # another connection's share is its own


def test_a_refusal_for_good_stays_one() -> None:
    """gRPC's own RESOURCE_EXHAUSTED, as for a message too large, does not get better."""
    with served() as server, caller(server.address) as echo:
        with pytest.raises(grpc.RpcError) as caught:
            echo(bytes(MESSAGE_BYTES + 1))
        with pytest.raises(HandshakeError, match="the coordinator refused"):
            link._explain(server.address, caught.value)


def test_an_open_call_counts_until_its_answer_was_read() -> None:
    """A reader with no window holds what it was asked to hold, and no more."""
    with served(at_once=2) as server, RawPeer(server.address, window=0) as slow:
        for stream in (1, 3, 5):
            slow.call(COUNT, stream)
            slow.send(frame(DATA, 1, stream, message(b"")))
        while True:
            _, stream, payload = slow.until(HEADERS)
            if b"grpc-status" in payload:
                break
        assert stream == 5
        assert b"2 calls are open: come back later" in payload
        with caller(server.address) as echo:
            assert echo(b"x") == b"x"


def test_refused_calls_are_none_that_a_connection_has_open() -> None:
    """However long garbage is not collected: gRPC resets those above its connection's bound."""
    gc.collect()
    gc.disable()
    try:
        with served(burst=1.0) as server, caller(server.address) as echo:
            assert echo(b"x") == b"x"
            for _ in range(3 * transport.STREAMS):
                with pytest.raises(grpc.RpcError, match="more than 1 calls a second"):
                    echo(b"x")
    finally:
        gc.enable()


def test_all_calls_together_are_bounded() -> None:
    with served(calls=2) as server, RawPeer(server.address, window=0) as slow:
        for stream in (1, 3):
            slow.call(COUNT, stream)
            slow.send(frame(DATA, 1, stream, message(b"")))
            slow.until(HEADERS)
        with caller(server.address) as echo, pytest.raises(grpc.RpcError) as caught:
            echo(b"x")
        assert caught.value.details() == "2 calls of all are open: come back later"


def test_calls_that_end_make_room() -> None:
    with served(at_once=1, calls=1) as server, caller(server.address) as echo:
        assert [echo(b"x") for _ in range(20)] == [b"x"] * 20


@pytest.mark.parametrize("sent", [b"", message(bytes(100))[:50]], ids=["none", "half"])
def test_a_request_that_does_not_come_ends_its_call(sent: bytes) -> None:
    with served(request_s=0.2) as server, RawPeer(server.address) as peer:
        peer.call(ECHO)
        peer.send(frame(DATA, 0, 1, sent))
        assert b"the request did not come within 0 s" in peer.until(HEADERS)[2]


def test_two_requests_of_a_call_that_takes_one_end_it() -> None:
    with served() as server, RawPeer(server.address) as peer:
        peer.call(ECHO)
        peer.say(b"one")
        peer.say(b"two")
        assert b"this call takes one request" in peer.until(HEADERS)[2]


def test_more_streams_than_a_connection_may_have_are_refused() -> None:
    with served(at_once=100) as server, RawPeer(server.address, window=0) as peer:
        for stream in range(1, 2 * transport.STREAMS + 4, 2):
            peer.call(COUNT, stream)
            peer.send(frame(DATA, 1, stream, message(b"")))
        _, stream, code = peer.until(RST_STREAM)
        assert stream == 2 * transport.STREAMS + 1
        assert struct.unpack(">I", code)[0] in (7, 11), "REFUSED_STREAM or ENHANCE_YOUR_CALM"


def test_a_flood_of_pings_ends_its_connection() -> None:
    with served() as server, RawPeer(server.address) as peer:
        peer.send(10 * frame(PING, 0, 0, bytes(8)))
        assert peer.lasts(LIMIT_S) is not None


def test_a_header_too_large_ends_its_connection() -> None:
    with served() as server, RawPeer(server.address) as peer:
        peer.call(ECHO, more={"x-large": "x" * (transport.METADATA_BYTES + 8000)})
        assert peer.lasts(LIMIT_S) is not None


def test_a_window_that_is_not_kept_to_ends_its_stream() -> None:
    """What is sent but not read yet is bounded, whatever the sender thinks of windows."""
    with served(request_s=LIMIT_S) as server, RawPeer(server.address) as peer:
        peer.call(ECHO)
        peer.send(frame(DATA, 0, 1, b"\0" + struct.pack(">I", MESSAGE_BYTES - 1)))
        for _ in range(3 * transport.WINDOW_BYTES // 16_384):
            peer.send(frame(DATA, 0, 1, bytes(16_384)))
        kind, _, _ = peer.until(RST_STREAM, GOAWAY, HEADERS)
        assert kind in (RST_STREAM, GOAWAY)


MEMBER, PASSES = b"lorand://r/worker/a", callers.coordinator_uri("r").encode()


class Called:
    """A call's context, as far as `who` looks at it."""

    def __init__(self, peer: str, *identities: bytes, passed: bytes | None = None) -> None:
        """From this peer; `passed`: who it is said to be passed on for."""
        self._peer, self._identities = peer, identities
        self._metadata = () if passed is None else ((callers.CALLER, passed),)

    def peer(self) -> str:
        """See grpc."""
        return self._peer

    def invocation_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """See grpc."""
        return self._metadata

    def peer_identities(self) -> tuple[bytes, ...] | None:
        """See grpc."""
        return self._identities or None


@pytest.mark.parametrize(
    ("called", "by_address", "expected"),
    [
        (Called("ipv4:192.0.2.1:5", b"lorand://r/worker/a"), True, "lorand://r/worker/a"),
        (Called("ipv4:127.0.0.1:5"), False, "ipv4:127.0.0.1:5"),
        (Called("ipv4:192.0.2.1:5"), True, "192.0.2.1"),
        (Called("ipv6:%5B2001:db8:1:2:3::4%5D:5"), True, "2001:db8:1:2::/64"),
        (Called("ipv6:%5B::ffff:192.0.2.1%5D:5"), True, "192.0.2.1"),
        (Called("ipv6:%5Bfe80::1%25eth0%5D:5"), True, "fe80::/64"),
        (Called("unix:/some/where"), True, "unix:/some/where"),
        (Called("ipv4:127.0.0.1:5", passed=b"ipv4:127.0.0.1:9"), False, "ipv4:127.0.0.1:9"),
        (Called("ipv4:127.0.0.1:5", passed=b"ipv4:127.0.0.1:9"), True, "127.0.0.1"),
        (Called("ipv4:1.2.3.4:5", MEMBER, passed=b"lorand://r/worker/b"), False, MEMBER.decode()),
        (Called("ipv4:1.2.3.4:5", PASSES, passed=b"-----BEGIN"), False, PASSES.decode()),
        (Called("ipv4:1.2.3.4:5", PASSES), False, PASSES.decode()),
    ],
)
def test_whose_share_a_call_is_of(called: Any, by_address: bool, expected: str) -> None:
    assert who(called, by_address=by_address) == expected
