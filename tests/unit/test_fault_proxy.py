"""The proxy between real processes does what it is told, and nothing else."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from tests.fault_proxy import LIMIT_S, Conditions, FaultProxy


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that sends back what it gets, in threads."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(end: socket.socket) -> None:
        with end:
            try:
                while data := end.recv(65536):
                    end.sendall(data)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                end, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(end,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.fixture
def proxy(echo: tuple[str, int]) -> Iterator[FaultProxy]:
    with FaultProxy(echo) as running:
        yield running


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=LIMIT_S) as end:
        yield end


def receive(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = end.recv(size - len(data))
        assert more, "it was closed"
        data += more
    return data


def test_bytes_come_through_in_order(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.conditions = Conditions(jitter_s=0.002)
    content = bytes(range(256)) * 800
    threading.Thread(target=client.sendall, args=(content,), daemon=True).start()
    assert receive(client, len(content)) == content


def test_a_delay_and_a_limit_take_their_time(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.conditions = Conditions(delay_s=0.05, bytes_a_s=10_000)
    began = time.monotonic()
    client.sendall(b"x" * 500)
    receive(client, 500)
    assert time.monotonic() - began >= 2 * (0.05 + 0.05)


def test_a_black_hole_holds_everything_until_it_heals(
    proxy: FaultProxy, client: socket.socket
) -> None:
    proxy.black_hole()
    client.sendall(b"lost?")
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.settimeout(LIMIT_S)
    proxy.heal()
    assert receive(client, 5) == b"lost?"


def test_half_open_one_way_is_dead(proxy: FaultProxy, client: socket.socket) -> None:
    """What is sent arrives; the answer does not."""
    client.sendall(b"a")
    assert receive(client, 1) == b"a"
    proxy.black_hole("down")
    client.sendall(b"b")
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.settimeout(LIMIT_S)
    proxy.heal()
    assert receive(client, 1) == b"b"


def test_a_reset_is_no_ordinary_end(proxy: FaultProxy, client: socket.socket) -> None:
    client.sendall(b"a")
    receive(client, 1)
    assert proxy.reset() == 2
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_refused_connection_ends_at_once(proxy: FaultProxy) -> None:
    proxy.conditions = Conditions(refuses=True)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=LIMIT_S) as end:
        assert end.recv(1) == b""
    assert proxy.connections == 1


def test_a_slow_close_is_heard_late(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.conditions = Conditions(slow_close_s=0.1)
    began = time.monotonic()
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    assert time.monotonic() - began >= 0.2
