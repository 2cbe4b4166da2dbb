"""Workers made of a raw stub, and a coordinator for them."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import grpc
import pytest
from tests import tiny
from tests.commands import Command, Room, status
from tests.runs import IDENTITY, contribution, hello

from lorand import ledger
from lorand.config import RunConfig
from lorand.ledger import Position
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import coordination_pb2_grpc as coordination

LIMIT_S = 30.0


def two(**changes: dict[str, Any]) -> tiny.Settings:
    """A zeroth-order run of two workers, long enough that no test sees its end."""
    basis: tiny.Settings = {
        "run": {"rounds": 1000},
        "model": {"name": "none"},
        "rounds": {"start_with": 2},
    }
    sections = [*basis, *(name for name in changes if name not in basis)]
    merged = {name: {**basis.get(name, {}), **changes.get(name, {})} for name in sections}
    return tiny.settings("spsa", **merged)


class Peer:
    """A worker made of a raw stub: it has no model, and sends what it is told to."""

    def __init__(self, address: str, config: RunConfig, name: str) -> None:
        """Open a channel; nothing is sent yet."""
        self._channel = grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)])
        self.name = name
        self.worker = 0
        self.position: Position = ledger.origin(config, IDENTITY)

    def join(self) -> Self:
        """Say Hello and be welcomed."""
        self.open(wire.ParticipateRequest(hello=hello(self.position, self.name)))
        self.worker = self.until("welcome").welcome.worker
        return self

    def open(self, first: wire.ParticipateRequest) -> None:
        """Open the stream with any message."""
        self._requests: queue.Queue[wire.ParticipateRequest | None] = queue.Queue()
        self.send(first)
        stub = coordination.CoordinationServiceStub(self._channel)
        self._call = stub.Participate(iter(self._requests.get, None), timeout=LIMIT_S)

    def send(self, request: wire.ParticipateRequest) -> None:
        """Send a message."""
        self._requests.put(request)

    def report(self, round_index: int, seed: int = 0) -> None:
        """Send some contribution of the right length."""
        self.send(contribution(self.position.config, round_index, seed))

    def until(self, kind: str) -> wire.ParticipateResponse:
        """Return the next message of a kind; entries on the way are applied."""
        for message in self._call:
            if message.HasField("entry"):
                self.position = ledger.apply(self.position, message.entry)
            if message.WhichOneof("message") == kind:
                return message
        raise AssertionError(f"the stream ended before a {kind}")

    def until_committed(self, count: int) -> None:
        """Follow until so many rounds are committed."""
        while self.position.committed < count:
            self.until("entry")

    def failure(self) -> grpc.StatusCode:
        """Return the status code that ends the stream."""
        with pytest.raises(grpc.RpcError) as caught:
            list(self._call)
        assert isinstance(caught.value, grpc.Call)
        code = caught.value.code()
        assert isinstance(code, grpc.StatusCode)
        return code

    def close(self) -> None:
        """Leave."""
        self._call.cancel()
        self._requests.put(None)
        self._channel.close()


@contextmanager
def served(room: Room, *arguments: object) -> Iterator[tuple[Command, str]]:
    """Serve a run of IDENTITY, whose model nobody has."""
    (room.folder / "run.lock").write_text(IDENTITY.to_lock(), encoding="utf-8")
    with room.coordinator(*arguments) as pair:
        yield pair


@contextmanager
def peers(address: str, config: RunConfig) -> Iterator[tuple[Peer, Peer]]:
    """Two workers that have joined, in round 1."""
    pair = Peer(address, config, "one").join(), Peer(address, config, "two").join()
    try:
        for peer in pair:
            assert peer.until("round_start").round_start.round_index == 1
        yield pair
    finally:
        for peer in pair:
            peer.close()


def joined(address: str) -> list[str]:
    """Names of everyone who ever joined."""
    answer = status(address)
    return [] if answer is None else [worker.name for worker in answer.workers]
