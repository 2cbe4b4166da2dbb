"""Calls passed on to a leader, with real sockets: nothing of them changes, and nothing piles up."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn, TypeVar

import grpc
import pytest
from tests.commands import free_port, wait_for
from tests.raw_http2 import DATA, RawPeer, frame, message

from lorand import transport
from lorand_coordinator.gate import Bounds, Context, Gate
from lorand_coordinator.identity import callers
from lorand_coordinator.relay import Relay, connecting
from lorand_worker import link

LIMIT_S: Final = 20.0
CHUNK: Final = bytes(10_000)
HELD: Final = 100
"""Messages of CHUNK that windows and buffers on the way may hold, with room to spare."""
ECHO, CHAT, ENDLESS, SWALLOW, REFUSE, HANG, NONE = (
    "/lorand.v1.CoordinationService/GetRun",
    "/lorand.v1.CoordinationService/Participate",
    "/lorand.v1.LedgerService/ReadEntries",
    "/lorand.v1.LedgerService/GetCheckpoint",
    "/lorand.v1.LedgerService/PostEvaluation",
    "/lorand.v1.LedgerService/GetHead",
    "/lorand.v1.LedgerService/ThereIsNone",
)
_Result = TypeVar("_Result")


class Leader(grpc.GenericRpcHandler):
    """Methods of members that do simple things with bytes."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.made = self.hanging = self.ended = 0
        self.remaining: float | None = None
        self.peers: set[str] = set()
        self.named: list[tuple[str, str | bytes]] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method
        unary: dict[str, Any] = {ECHO: self.echo, REFUSE: self.refuse, HANG: self.hang}
        if method in unary:
            return grpc.unary_unary_rpc_method_handler(unary[method])
        streams: dict[str, Any] = {CHAT: self.chat, SWALLOW: self.swallow, ENDLESS: self.endless}
        return grpc.stream_stream_rpc_method_handler(streams[method])

    async def echo(self, request: bytes, context: Context) -> bytes:
        sent = dict(context.invocation_metadata() or ())
        self.named += [(key, value) for key, value in sent.items() if "lorand" in key]
        return self.name + request

    async def refuse(self, request: bytes, context: Context) -> NoReturn:
        pushback = (transport.PUSHBACK, "70")
        code = grpc.StatusCode[request.decode() or "RESOURCE_EXHAUSTED"]
        await context.abort(code, "too many of them", (pushback,))

    async def hang(self, request: bytes, context: Context) -> bytes:
        self.hanging, self.remaining = self.hanging + 1, context.time_remaining()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended += 1
        return b""

    async def chat(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        self.peers.add(context.peer())
        async for request in requests:
            yield self.name + request

    async def endless(self, _: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        while True:
            self.made += 1
            yield CHUNK

    async def swallow(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[bytes]:
        """Read nothing until the call ends."""
        yield b"begun"
        await asyncio.Event().wait()


class Coordinators:
    """Two leaders and a coordinator that passes calls on to one of them, in a thread."""

    def __init__(self) -> None:
        self.leaders = [Leader(b"a "), Leader(b"b ")]
        self.relay = Relay(connecting(None))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._servers: list[grpc.aio.Server] = []
        *self.addresses, self.front = (
            self.do(self.serve(each)) for each in (*self.leaders, self.relay)
        )

    async def serve(self, handler: grpc.GenericRpcHandler) -> str:
        gate = Gate(Bounds(1e6, 1e6, 1000, at_once=1000))
        server = grpc.aio.server(interceptors=[gate], options=transport.bounds(1 << 20, 1000))
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self._servers.append(server)
        return f"127.0.0.1:{port}"

    def do(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(LIMIT_S)

    def follow(self, leader: str, reason: str = "") -> None:
        self.do(self.relay.follow(leader, reason))

    def close(self) -> None:
        self.follow("")
        for server in self._servers:
            self.do(server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LIMIT_S)
        self._loop.close()


@pytest.fixture
def served() -> Iterator[Coordinators]:
    made = Coordinators()
    made.follow(made.addresses[0])
    try:
        yield made
    finally:
        made.close()


@contextmanager
def channel(address: str) -> Iterator[grpc.Channel]:
    own = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, own) as made:
        yield made


def unary(
    through: grpc.Channel, method: str, request: bytes = b"", limit_s: float = LIMIT_S
) -> bytes:
    call: Any = through.unary_unary(method)
    return bytes(call(request, timeout=limit_s))


def echo(through: grpc.Channel, request: bytes = b"x") -> bytes:
    return unary(through, ECHO, request)


def failure(call: Callable[[], object]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def stream(through: grpc.Channel, method: str, requests: Iterator[bytes]) -> Any:
    call: Any = through.stream_stream(method)
    return call(requests, timeout=LIMIT_S)


def test_calls_of_all_kinds_go_both_ways(served: Coordinators) -> None:
    with channel(served.front) as through:
        assert echo(through, b"one") == b"a one"
        said = [b"%d" % number for number in range(50)]
        assert list(stream(through, CHAT, iter(said))) == [b"a " + each for each in said]
        call: Any = through.unary_stream(ENDLESS)
        assert list(itertools.islice(call(b"", timeout=LIMIT_S), 100)) == [CHUNK] * 100


def test_an_answer_comes_while_its_sender_still_speaks(served: Coordinators) -> None:
    heard = threading.Event()

    def requests() -> Iterator[bytes]:
        yield b"first"
        assert heard.wait(LIMIT_S)
        yield b"second"

    with channel(served.front) as through:
        answers = stream(through, CHAT, requests())
        assert next(answers) == b"a first"
        heard.set()
        assert list(answers) == [b"a second"]


def test_a_refusal_comes_back_as_it_was(served: Coordinators) -> None:
    with channel(served.front) as through:
        error = failure(lambda: unary(through, REFUSE))
    assert (error.code(), error.details()) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "too many of them",
    )
    assert dict(error.trailing_metadata())[transport.PUSHBACK] == "70"
    assert link._explain(served.front, error) == "resource_exhausted: too many of them"
    assert len(served.relay) == 1, "the connection is as good as before"


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "CANCELLED", "UNAVAILABLE"])
def test_what_is_between_coordinators_is_no_reason_to_leave(
    served: Coordinators, code: str
) -> None:
    """The caller has shown its certificate here: a leader that misses one means this coordinator.

    One of an older release does, which takes no calls that are passed on.
    """
    with channel(served.front) as through:
        error = failure(lambda: unary(through, REFUSE, code.encode()))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert error.details() == (
            f"this coordinator stands by: {served.addresses[0]} leads; too many of them"
        )
        assert link._explain(served.front, error).startswith("unavailable: ")
        assert echo(through) == b"a x"


def test_what_no_member_may_call_is_passed_to_nobody(served: Coordinators) -> None:
    with channel(served.front) as through:
        error = failure(lambda: unary(through, NONE))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_deadline_is_the_leaders_too(served: Coordinators) -> None:
    leader = served.leaders[0]
    with channel(served.front) as through:
        error = failure(lambda: unary(through, HANG, limit_s=0.5))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert leader.remaining is not None
    assert 0 < leader.remaining <= 0.5
    wait_for(lambda: leader.ended == 1, "the leader's call ends", LIMIT_S)


def test_a_caller_that_goes_ends_its_call_at_the_leader(served: Coordinators) -> None:
    leader = served.leaders[0]
    with channel(served.front) as through:
        call: Any = through.unary_unary(HANG)
        waiting = call.future(b"")
        wait_for(lambda: leader.hanging == 1, "it hangs", LIMIT_S)
        assert leader.remaining is None
        waiting.cancel()
        wait_for(lambda: leader.ended == 1, "the leader's call ends", LIMIT_S)
        assert echo(through) == b"a x"


def test_a_reader_that_does_not_read_holds_the_leader_back(served: Coordinators) -> None:
    """While others are served: else nothing would have been made anyway."""
    leader = served.leaders[0]
    with RawPeer(served.front, window=0) as slow, channel(served.front) as through:
        slow.call(ENDLESS)
        slow.send(frame(DATA, 1, 1, message(b"")))
        wait_for(lambda: leader.made > 0, "it begins", LIMIT_S)
        for _ in range(200):
            echo(through)
        assert leader.made < HELD


def test_a_leader_that_does_not_read_holds_the_sender_back(served: Coordinators) -> None:
    sent = itertools.count()
    taken = [0]

    def requests() -> Iterator[bytes]:
        for taken[0] in sent:
            yield CHUNK

    with channel(served.front) as through:
        answers = stream(through, SWALLOW, requests())
        assert next(answers) == b"begun"
        for _ in range(200):
            echo(through)
        assert 0 < taken[0] < HELD
        answers.cancel()


def test_a_connection_has_as_many_calls_as_a_leader_takes(served: Coordinators) -> None:
    """More are reset by it; and one caller that is slow holds few others up."""
    held, count = threading.Event(), 3 * transport.STREAMS

    def requests() -> Iterator[bytes]:
        yield b"hello"
        held.wait(LIMIT_S)

    each = [channel(served.front) for _ in range(count)]
    opened = [one.__enter__() for one in each]
    try:
        calls = [stream(one, CHAT, requests()) for one in opened]
        assert [next(call) for call in calls] == [b"a hello"] * count
        assert len(served.relay) == len(served.leaders[0].peers) == 3
        held.set()
        assert [list(call) for call in calls] == [[]] * count
        assert echo(opened[0]) == b"a x"
        assert len(served.relay) == 3
    finally:
        held.set()
        for one in each:
            one.__exit__(None, None, None)


def test_another_leader_ends_what_went_to_the_one_before(served: Coordinators) -> None:
    """That one may sleep, and would end nothing."""
    hanging = served.leaders[0]
    with channel(served.front) as through:
        call: Any = through.unary_unary(HANG)
        waiting = call.future(b"", timeout=LIMIT_S)
        wait_for(lambda: hanging.hanging == 1, "it hangs", LIMIT_S)
        served.follow(served.addresses[1])
        error = failure(waiting.result)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert f"{served.addresses[0]} leads no longer" in error.details()
        assert echo(through) == b"b x"
        assert len(served.relay) == 1


def test_without_a_leader_callers_are_told_why_to_come_back(served: Coordinators) -> None:
    served.follow("", "asking the database who leads")
    with channel(served.front) as through:
        error = failure(lambda: echo(through))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert error.details() == "this coordinator stands by: asking the database who leads"
        served.follow(served.addresses[0])
        assert echo(through) == b"a x"


@pytest.mark.parametrize("leader", ["port", "192.0.2.1:7700", "no address"])
def test_a_leader_that_is_not_there_is_told_of(served: Coordinators, leader: str) -> None:
    """Nor is anything sent off this machine without certificates."""
    address = f"127.0.0.1:{free_port()}" if leader == "port" else leader
    served.follow(address)
    with channel(served.front) as through:
        error = failure(lambda: echo(through))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert error.details().startswith(f"this coordinator stands by: {address} leads; ")
        assert len(served.relay) == 0, "the next call is tried anew"
        served.follow(served.addresses[0])
        assert echo(through) == b"a x"


def test_a_call_is_passed_on_once(served: Coordinators) -> None:
    """Two that believe each other to lead, as one that believes itself to stand by."""
    served.follow(served.front, "somebody leads")
    with channel(served.front) as through:
        passed: Any = through.unary_unary(ECHO)
        named = [(callers.CALLER, b"ipv4:127.0.0.1:5")]
        twice = failure(lambda: passed(b"x", timeout=LIMIT_S, metadata=named))
        error = failure(lambda: echo(through))
    assert twice.code() == error.code() == grpc.StatusCode.UNAVAILABLE
    assert "this coordinator stands by: somebody leads" in twice.details()
    assert "this coordinator stands by" in error.details()


def test_the_leader_is_told_whose_connection_it_is(served: Coordinators) -> None:
    """And nothing else of what a caller sent along."""
    with channel(served.front) as through:
        call: Any = through.unary_unary(ECHO)
        call(b"", timeout=LIMIT_S, metadata=[("lorand-other", "mine")])
    ((key, peer),) = served.leaders[0].named
    assert key == callers.CALLER
    assert isinstance(peer, bytes)
    assert peer.startswith(b"ipv4:127.0.0.1:")
