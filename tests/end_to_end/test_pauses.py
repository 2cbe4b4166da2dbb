"""Processes that stand still (SIGSTOP) for longer than anybody waits for them, and go on."""

import signal

import pytest
from tests.commands import MakeRoom, wait_for
from tests.end_to_end.test_network import LIMIT_S, network

pytestmark = [pytest.mark.slow, pytest.mark.timeout(290)]


def test_a_worker_sleeps_past_deadlines_and_heartbeats(make_room: MakeRoom) -> None:
    """Rounds go on without it; it comes back to what it lacks, and its late answer is none."""
    with network(make_room) as net:
        sleeper = net.workers["gadgets"]
        sleeper.signal(signal.SIGSTOP)
        wait_for(lambda: "gadgets" not in net.connected(), "it is given up", LIMIT_S)
        net.progress(5)
        sleeper.signal(signal.SIGCONT)
        wait_for(lambda: "gadgets" in net.connected(), "it is back", LIMIT_S)


def test_the_coordinator_sleeps_for_longer_than_workers_listen(make_room: MakeRoom) -> None:
    """They leave it, and come back when it wakes up: it finds its round over."""
    with network(make_room) as net:
        before = {name: proxy.connections for name, proxy in net.proxies.items()}
        net.coordinator.signal(signal.SIGSTOP)

        def left() -> bool:
            return all(net.proxies[name].connections > count for name, count in before.items())

        wait_for(left, "all have given it up and knock again", LIMIT_S)
        net.coordinator.signal(signal.SIGCONT)
        wait_for(lambda: len(net.connected()) == 3, "all are back", LIMIT_S)
        net.progress(3)
