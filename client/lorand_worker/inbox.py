"""What the coordinator sends, read ahead while a worker measures.

A measurement may take longer than several rounds. Their starts would be measured one after the
other, each for nothing: what has arrived behind a start tells that its round is over.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Final

import grpc

from lorand import ledger
from lorand.v1 import coordination_pb2 as wire

AHEAD: Final = 256
"""Messages read ahead; what comes then waits with the coordinator."""
CLOSED_POLL_S: Final = 1.0

Message = wire.ParticipateResponse


class Inbox:
    """The messages of a call, taken in a thread of its own as they come. Iterate over it."""

    def __init__(self, call: Iterable[Message], received: Callable[[int], None]) -> None:
        """Begin to read; `received` is told the bytes of each message, in the reader's thread."""
        self._received = received
        self._arrived: queue.Queue[Message | grpc.RpcError | None] = queue.Queue(AHEAD)
        self._waiting: deque[Message | grpc.RpcError | None] = deque()
        self._closed = threading.Event()
        self._heard = time.monotonic()
        self._listening = True
        threading.Thread(target=self._listen, args=(call,), name="inbox", daemon=True).start()

    def silent_s(self) -> float:
        """Return for how long nothing has come; 0 while there is no room for it."""
        return time.monotonic() - self._heard if self._listening else 0.0

    def close(self) -> None:
        """Take no more; the call is ended by its owner."""
        self._closed.set()

    def __iter__(self) -> Iterator[Message]:
        """Yield messages in order, those of batches one by one.

        Raises grpc.RpcError where the call failed.
        """
        while True:
            if not self._waiting:
                self._take(self._arrived.get())
            message = self._waiting.popleft()
            if message is None:
                return
            if isinstance(message, grpc.RpcError):
                raise message
            yield message

    def is_over(self, round_index: int) -> bool:
        """Return whether what has arrived ends this round. Raises LedgerError for what is damaged.

        To be called by whom it is iterated over by.
        """
        with suppress(queue.Empty):
            while len(self._waiting) < AHEAD:
                self._take(self._arrived.get_nowait())
        return any(ends(round_index, each) for each in self._waiting if isinstance(each, Message))

    def _take(self, item: Message | grpc.RpcError | None) -> None:
        if isinstance(item, Message):
            self._received(item.ByteSize())
            self._waiting.extend(item.batch.messages or (item,))
        else:
            self._waiting.append(item)

    def _listen(self, call: Iterable[Message]) -> None:
        end = None
        try:
            for message in call:
                self._listening = False
                self._put(message)
                self._heard, self._listening = time.monotonic(), True
        except grpc.RpcError as error:
            end = error
        self._put(end)

    def _put(self, item: Message | grpc.RpcError | None) -> None:
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._arrived.put(item, timeout=CLOSED_POLL_S)
                return


def ends(round_index: int, message: Message) -> bool:
    """Return whether a message ends a round. Raises LedgerError for an entry that is damaged."""
    if not message.HasField("entry"):
        return False
    entry = ledger.parse(message.entry)
    return entry.WhichOneof("kind") in ("commit", "abandon") and entry.round_index >= round_index
