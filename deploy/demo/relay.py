"""A TCP relay that counts: every payload byte of a connection passes through, both ways."""

import asyncio
from dataclasses import dataclass
from typing import Final

BLOCK: Final = 1 << 16


@dataclass
class Relay:
    """Forwards one local port to the coordinator and counts bytes on the socket.

    `sent` is what clients sent (TCP payload: HTTP/2 frames and all), `received` what they got.
    """

    target: tuple[str, int]
    sent: int = 0
    received: int = 0
    port: int = 0

    async def start(self) -> None:
        """Listen on a free loopback port."""
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening."""
        self._server.close()
        await asyncio.sleep(0)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.close()
            return
        up = asyncio.create_task(self._pump(reader, there_writer, "sent"))
        down = asyncio.create_task(self._pump(there_reader, writer, "received"))
        try:
            await asyncio.wait({up, down})
        except asyncio.CancelledError:
            return  # the loop ends, connections and all: asyncio's streams would log it as a fault

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counter: str
    ) -> None:
        try:
            while block := await reader.read(BLOCK):
                setattr(self, counter, getattr(self, counter) + len(block))
                writer.write(block)
                await writer.drain()
        except OSError:
            pass  # one side is gone: so is the connection
        finally:
            writer.close()
