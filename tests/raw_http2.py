"""A peer that speaks HTTP/2 by hand, so that it can speak it badly (RFC 9113, RFC 7541)."""

import socket
import struct
import time
from typing import Final, Self

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_HEADERS: Final = 4
ACK: Final = 1
INITIAL_WINDOW_SIZE: Final = 4
LIMIT_S: Final = 30.0


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + _u32(stream) + payload


def headers(path: str, more: dict[str, str] | None = None) -> bytes:
    """Return a call's header block, every field literal."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
        **(more or {}),
    }
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())


def message(body: bytes) -> bytes:
    """Return a gRPC message: not compressed, its length, itself."""
    return b"\0" + _u32(len(body)) + body


def _u32(value: int) -> bytes:
    return struct.pack(">I", value)


def _text(value: str) -> bytes:
    """A string literal, its length as an integer of a 7-bit prefix (RFC 7541, 5.1 and 5.2)."""
    body, length = value.encode(), b""
    rest = len(body)
    if rest < 127:
        return bytes([rest]) + body
    rest -= 127
    while rest >= 128:
        length += bytes([rest % 128 + 128])
        rest //= 128
    return b"\x7f" + length + bytes([rest]) + body


class RawPeer:
    """One connection; what is sent is the test's."""

    def __init__(self, address: str, *, greets: bool = True, window: int | None = None) -> None:
        """Connect; greet as HTTP/2 asks, with a window of so many bytes for each stream."""
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), LIMIT_S)
        self._rest = b""
        if greets:
            chosen = b"" if window is None else struct.pack(">HI", INITIAL_WINDOW_SIZE, window)
            self.send(PREFACE + frame(SETTINGS, 0, 0, chosen))

    def send(self, content: bytes) -> None:
        """Send bytes."""
        self._socket.sendall(content)

    def call(self, path: str, stream: int = 1, more: dict[str, str] | None = None) -> None:
        """Begin a call."""
        self.send(frame(HEADERS, END_HEADERS, stream, headers(path, more)))

    def say(self, body: bytes, stream: int = 1) -> None:
        """Send a message of a call."""
        self.send(frame(DATA, 0, stream, message(body)))

    def read(self) -> tuple[int, int, int, bytes]:
        """Return kind, flags, stream and payload of the next frame; EOFError at the end."""
        length = int.from_bytes(self._take(3), "big")
        kind, flags = self._take(2)
        stream = int.from_bytes(self._take(4), "big")
        return kind, flags, stream, self._take(length)

    def until(self, *kinds: int) -> tuple[int, int, bytes]:
        """Return kind, stream and payload of the next frame of these kinds."""
        while True:
            kind, flags, stream, payload = self.read()
            if kind == SETTINGS and not flags & ACK:
                self.send(frame(SETTINGS, ACK, 0))
            if kind == PING and not flags & ACK:
                self.send(frame(PING, ACK, 0, payload))
            if kind in kinds:
                return kind, stream, payload

    def lasts(self, limit_s: float) -> float | None:
        """Read on; return the seconds until the other side closes, None if it does not in time."""
        began = time.monotonic()
        try:
            while (left := limit_s - (time.monotonic() - began)) > 0:
                self._socket.settimeout(left)
                self.until(PING)
        except TimeoutError:
            return None
        except (EOFError, OSError):
            return time.monotonic() - began
        return None

    def _take(self, count: int) -> bytes:
        while len(self._rest) < count:
            more = self._socket.recv(1 << 16)
            if not more:
                raise EOFError
            self._rest += more
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.close()
