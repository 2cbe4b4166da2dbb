"""A worker's link: which coordinator it tries, what its threads owe an interrupted process."""

import queue
import subprocess
import sys
from contextlib import closing

import pytest
from tests.runs import config_of

from lorand import transport
from lorand.config import PROTOCOL_VERSION
from lorand.errors import Behind, ConfigError
from lorand.v1 import coordination_pb2 as wire
from lorand_worker.link import BEHIND_S, Link, Retry, outgoing

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
    monkeypatch.setattr("threading.Event.wait", lambda event, timeout_s: False)
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


class Clock:
    """Time passes where somebody waits, a second at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("threading.Event.wait", self.wait)
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def wait(self, seconds: float) -> bool:
        self.now += 1.0
        return False


BEHIND = Behind("the ledger has 3 entries, and it signed 5: it was rolled back")


def test_one_of_several_coordinators_may_have_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it shows is not believed, and the next one is asked; the only one is refused at once."""
    clock, tried = Clock(monkeypatch), list[str]()

    def attempt() -> str:
        tried.append(link._addresses[0])
        if tried[-1] == "localhost:1":
            raise BEHIND
        return "let in"

    told: list[str] = []
    with closing(Link("localhost:1,localhost:2", 600.0)) as link:
        assert link.persist(attempt, told.append) == "let in"
    assert tried == ["localhost:1", "localhost:2"]
    assert told == ["localhost:1 shows an older history than was seen"]
    with closing(Link("localhost:1", 600.0)) as link, pytest.raises(Behind, match="rolled back"):
        link.persist(attempt, told.append)
    assert (len(tried), clock.now) == (3, 1.0)


def test_the_only_address_may_be_of_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """It said so: it slept, and will pass calls on when it knows."""
    Clock(monkeypatch)
    tries = 0

    def attempt() -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise BEHIND
        return "let in"

    with closing(Link("localhost:1", 600.0)) as link:
        answer = wire.GetRunResponse(
            protocol_version=PROTOCOL_VERSION,
            config=config_of().to_json(),
            features=[transport.SEVERAL],
        )
        monkeypatch.setattr(link._coordination, "GetRun", lambda request, timeout: answer)
        link.get_run()
        assert link.persist(attempt, lambda why: None) == "let in"
        del answer.features[:]
        link.get_run()
        tries = 0
        with pytest.raises(Behind, match="rolled back"):
            link.persist(attempt, lambda why: None)


@pytest.mark.parametrize("slow", [0.0, 5.0], ids=["at once", "slowly"])
def test_all_coordinators_that_stay_behind_are_refused(
    monkeypatch: pytest.MonkeyPatch, slow: float
) -> None:
    """Within a bound that is shorter than the time for one that is away."""
    clock = Clock(monkeypatch)

    def attempt() -> None:
        clock.now += slow
        raise BEHIND

    link = Link("localhost:1,localhost:2", 600.0)
    with closing(link), pytest.raises(Behind, match="rolled back"):
        link.persist(attempt, lambda why: None)
    assert BEHIND_S < clock.now < BEHIND_S + 20.0


def test_a_while_with_a_leader_ends_the_time_of_those_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two leaders that slept, a day apart, are not one that stays behind."""
    clock, tries = Clock(monkeypatch), list[float]()

    def attempt() -> str:
        tries.append(clock.now)
        if len(tries) == 2:
            clock.now += 86400.0
            raise Retry("the coordinator ended the stream")
        if len(tries) == 4:
            return "let in"
        raise BEHIND

    with closing(Link("localhost:1,localhost:2", 600.0)) as link:
        assert link.persist(attempt, lambda why: None) == "let in"


def test_a_link_needs_an_address() -> None:
    with pytest.raises(ConfigError, match="no coordinator's address"):
        Link(" ,", 1.0)


def test_an_interrupted_process_ends_though_nobody_ends_its_requests() -> None:
    """The reading thread is no daemon: before, such a process was there for ever."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], timeout=120, capture_output=True, check=False
    )
    assert b"KeyboardInterrupt" in done.stderr
