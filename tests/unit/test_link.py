"""A worker's link: what its threads owe an interrupted process."""

import queue
import subprocess
import sys

from lorand.v1 import coordination_pb2 as wire
from lorand_worker.link import outgoing

INTERRUPTED = """
import queue, threading
from lorand_worker.link import outgoing
threading.Thread(target=list, args=(outgoing(queue.Queue()),)).start()
raise KeyboardInterrupt
"""


def test_requests_come_in_order_until_none() -> None:
    waiting: queue.Queue[wire.ParticipateRequest | None] = queue.Queue()
    sent = [wire.ParticipateRequest(hello=wire.Hello(name=name)) for name in ("a", "b")]
    for request in (*sent, None, sent[0]):
        waiting.put(request)
    assert list(outgoing(waiting)) == sent


def test_an_interrupted_process_ends_though_nobody_ends_its_requests() -> None:
    """The reading thread is no daemon: before, such a process was there for ever."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], timeout=120, capture_output=True, check=False
    )
    assert b"KeyboardInterrupt" in done.stderr
