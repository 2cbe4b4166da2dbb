"""A worker's link: which coordinator it tries, what its threads owe an interrupted process."""

import queue
import subprocess
import sys
from contextlib import closing

import pytest

from lorand.errors import ConfigError
from lorand.v1 import coordination_pb2 as wire
from lorand_worker.link import Link, Retry, outgoing

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


def test_of_several_coordinators_the_next_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is away, one that sends the worker on, and one that leads, which is kept."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    tried: list[str] = []
    with closing(Link("127.0.0.1:1, localhost:2,[::1]:3", 60.0)) as link:

        def attempt() -> str:
            tried.append(link._addresses[0])
            if tried[-1] == "127.0.0.1:1":
                link.get_run()
            if tried[-1] == "localhost:2":
                raise Retry("it stands by")
            return "let in"

        for _ in range(2):
            assert link.persist(attempt, lambda why: None) == "let in"
    assert tried == ["127.0.0.1:1", "localhost:2", "[::1]:3", "[::1]:3"]


def test_a_link_needs_an_address() -> None:
    with pytest.raises(ConfigError, match="no coordinator's address"):
        Link(" ,", 1.0)


def test_an_interrupted_process_ends_though_nobody_ends_its_requests() -> None:
    """The reading thread is no daemon: before, such a process was there for ever."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], timeout=120, capture_output=True, check=False
    )
    assert b"KeyboardInterrupt" in done.stderr
