"""What all viewers are sent: the newest event of each kind, made once, as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Final

ALIVE_S: Final = 5.0
"""Seconds after which a viewer hears that the connection stands, if nothing else happened."""
ALIVE: Final = b"event: alive\ndata: 1\n\n"
VIEWERS: Final = 64


class Feed:
    """The newest event of each kind. Who reads slowly misses older ones, and nothing piles up."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.viewers = 0
        self._newest: dict[str, tuple[int, bytes, bytes]] = {}
        self._count = 0
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, kind: str, content: dict[str, Any]) -> None:
        """Send an event to all viewers, unless it says what the last of its kind did."""
        body = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
        if kind in self._newest and self._newest[kind][1] == body:
            return
        self._count += 1
        self._newest[kind] = self._count, body, b"event: %s\ndata: %s\n\n" % (kind.encode(), body)
        self._wake()

    def newest(self, kind: str) -> bytes:
        """Return the newest content of a kind as JSON."""
        return self._newest[kind][1] if kind in self._newest else b"null"

    async def follow(self) -> AsyncIterator[bytes]:
        """Yield the newest event of each kind, then those that come, until the feed is closed."""
        self.viewers += 1
        sent = 0
        try:
            while not self._closed:
                changed = self._changed
                events = sorted(event for event in self._newest.values() if event[0] > sent)
                sent = self._count
                if events:
                    yield b"".join(event[2] for event in events)
                try:
                    await asyncio.wait_for(changed.wait(), ALIVE_S)
                except TimeoutError:
                    yield ALIVE
        finally:
            self.viewers -= 1

    def close(self) -> None:
        """End what all viewers follow."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
