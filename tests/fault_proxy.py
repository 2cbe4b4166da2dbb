"""A TCP proxy that does what networks do: delays, limits, resets, black holes, half-open ends.

It runs in a thread of its own, between real processes. Conditions hold until they are changed;
what a black hole swallowed is delivered when it heals, as TCP does. Delays follow from a seed.
"""

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, TypeVar

Way = Literal["up", "down"]
WAYS: Final[tuple[Way, ...]] = ("up", "down")
CHUNK: Final = 16 << 10
LIMIT_S: Final = 30.0

_Result = TypeVar("_Result")


@dataclass
class Conditions:
    """What the network is like: seconds a chunk takes, and bytes a second (0: no limit).

    `refuses` closes every new connection at once; with `slow_close_s` the other end hears late
    that one has closed.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_a_s: float = 0.0
    refuses: bool = False
    slow_close_s: float = 0.0


class FaultProxy:
    """Listens on a port of its own and forwards to a target; counts connections and resets."""

    def __init__(self, target: tuple[str, int], seed: int = 0) -> None:
        """Nothing yet: `with` starts and ends it."""
        self.conditions = Conditions()
        self.connections = 0
        self.resets = 0
        self._target, self._rng = target, random.Random(seed)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Self:
        """Listen."""
        self._thread.start()
        assert self._listening.wait(LIMIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        """Break everything and stop."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    # -- what a test does ------------------------------------------------------------------------

    def black_hole(self, *ways: Way) -> None:
        """Let nothing through any more, in these directions (default: both); connections stay."""
        self._call(lambda: self._set(ways or WAYS, passes=False))

    def heal(self) -> None:
        """Let everything through, also what was held."""
        self.conditions = Conditions()
        self._call(lambda: self._set(WAYS, passes=True))

    def reset(self) -> int:
        """Reset all connections (RST to both ends); return how many ends."""
        return self._call(self._reset)

    def _call(self, action: Callable[[], _Result]) -> _Result:
        async def act() -> _Result:
            return action()

        coroutine: Coroutine[Any, Any, _Result] = act()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(LIMIT_S)

    # -- what it does ----------------------------------------------------------------------------

    def _set(self, ways: Sequence[Way], *, passes: bool) -> None:
        for way in ways:
            (self._open[way].set if passes else self._open[way].clear)()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._open = {way: asyncio.Event() for way in WAYS}
        for event in self._open.values():
            event.set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(server.sockets[0].getsockname()[1])
        self._listening.set()
        await self._stop.wait()
        server.close()
        self._reset()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        ends = {writer}
        try:
            if self.conditions.refuses:
                return
            there = await asyncio.open_connection(*self._target)
            ends.add(there[1])
            self._writers |= ends
            pipes = (self._pipe(reader, there[1], "up"), self._pipe(there[0], writer, "down"))
            await asyncio.gather(*pipes)
        except (OSError, asyncio.CancelledError):
            return  # one end is gone, or the target does not listen: as any network would; or stop
        finally:
            self._writers -= ends
            for end in ends:
                end.close()

    async def _pipe(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way
    ) -> None:
        while data := await reader.read(CHUNK):
            conditions = self.conditions
            seconds = conditions.delay_s + self._rng.uniform(0, conditions.jitter_s)
            if conditions.bytes_a_s:
                seconds += len(data) / conditions.bytes_a_s
            await asyncio.sleep(seconds)
            await self._open[way].wait()
            writer.write(data)
            await writer.drain()
        await asyncio.sleep(self.conditions.slow_close_s)
        await self._open[way].wait()
        with suppress(OSError):
            writer.write_eof()

    def _reset(self) -> int:
        count = len(self._writers)
        for writer in list(self._writers):
            end = writer.get_extra_info("socket")
            with suppress(OSError):  # closed by now
                # Without lingering, closing sends RST instead of FIN.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        self._writers.clear()
        self.resets += count
        return count
