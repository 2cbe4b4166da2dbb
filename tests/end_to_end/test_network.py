"""Real coordinators and workers with a bad network between them (tests/fault_proxy.py).

Whatever the network does, a run goes on with those who are reached, the others come back when it
heals, and everybody ends with the weights that a replay of the ledger has.
"""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import pytest
from tests import tiny
from tests.commands import Command, MakeRoom, Room, committed, status, wait_for
from tests.fault_proxy import Conditions, FaultProxy

from lorand.heads import KeptHead
from lorand_coordinator import verification

ROUNDS: Final = 250
LIMIT_S: Final = 120.0
HEARTBEAT_TIMEOUT_S: Final = 3.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(290)]


def settings(**rounds: Any) -> tiny.Settings:
    return tiny.settings(
        "spsa",
        run={"rounds": ROUNDS},
        estimator={"directions_per_round": 2, "batch_size": 4},
        rounds={"deadline_s": 2.0, "quorum": 2, "start_with": 3, **rounds},
        service={
            "checkpoint_every": 7,
            "tail_entries": 40,
            "heartbeat_s": 0.5,
            "heartbeat_timeout_s": HEARTBEAT_TIMEOUT_S,
        },
    )


class Network:
    """A run of three workers, each behind a proxy of its own."""

    def __init__(self, room: Room, coordinator: Command, address: str, stack: ExitStack) -> None:
        """Start the workers."""
        self.coordinator = coordinator
        host, port = address.rsplit(":", 1)
        self.room, self.address = room, address
        self.proxies = {
            name: stack.enter_context(FaultProxy((host, int(port)), seed))
            for seed, name in enumerate(tiny.DOMAINS)
        }
        self.workers: dict[str, Command] = {
            name: stack.enter_context(room.join(proxy.address, name))
            for name, proxy in self.proxies.items()
        }

    def progress(self, rounds: int) -> None:
        """Wait until so many more rounds are committed."""
        goal = committed(self.address) + rounds
        assert goal < ROUNDS, "the run is too short for what is to happen in it"
        wait_for(lambda: committed(self.address) >= goal, f"round {goal} commits", LIMIT_S)

    def connected(self) -> set[str]:
        """Names of the connected workers."""
        answer = status(self.address)
        return {w.name for w in answer.workers if w.connected} if answer else set()

    def finish(self) -> None:
        """Heal, wait for the end, and compare everybody's weights with a replay's."""
        for proxy in self.proxies.values():
            proxy.heal()
        results = [worker.result(LIMIT_S) for worker in self.workers.values()]
        replayed = self.room.once(
            "lr-worker", "replay", self.room.export(), "--model", self.room.model
        )
        assert replayed["rounds"] == ROUNDS
        assert {result["weights_digest"] for result in results} == {replayed["weights_digest"]}
        for kept in self.room.state.glob("*.head.json"):
            verification.verify(self.room.ledger, None, KeptHead.from_json(kept.read_bytes()))


@contextmanager
def network(make_room: MakeRoom, **rounds: Any) -> Iterator[Network]:
    room = make_room(settings(**rounds)).lock()
    with room.coordinator() as (coordinator, address), ExitStack() as stack:
        running = Network(room, coordinator, address, stack)
        wait_for(lambda: committed(address) >= 2, "the run begins", LIMIT_S)
        yield running
        running.finish()
        assert "Traceback" not in coordinator.errors()


def test_a_partition_heals(make_room: MakeRoom) -> None:
    """One worker is cut off, then all: the run waits, and goes on."""
    with network(make_room) as net:
        net.proxies["hotels"].black_hole()
        net.progress(5)
        net.proxies["hotels"].heal()
        wait_for(lambda: len(net.connected()) == 3, "the third is back", LIMIT_S)
        for proxy in net.proxies.values():
            proxy.black_hole()
        wait_for(lambda: not net.connected(), "nobody is heard any more", LIMIT_S)
        before = committed(net.address)
        for proxy in net.proxies.values():
            proxy.heal()
        net.progress(2)
        assert committed(net.address) > before


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_black_hole_longer_than_a_heartbeats_timeout(make_room: MakeRoom, way: Any) -> None:
    """A half-open connection: one side still sends. The coordinator gives the worker up."""
    with network(make_room) as net:
        net.proxies["gadgets"].black_hole(way)
        wait_for(lambda: "gadgets" not in net.connected(), "it is given up", LIMIT_S)
        net.progress(3)
        assert net.workers["gadgets"].running()
        net.proxies["gadgets"].heal()
        wait_for(lambda: "gadgets" in net.connected(), "it is back", LIMIT_S)


def test_a_storm_of_resets(make_room: MakeRoom) -> None:
    """Every connection is reset again and again, refused in between, with delays and limits.

    At most one worker at a time is refused: of two alone the quorum would not be there.
    """
    source, ends = random.Random(11), 0
    with network(make_room) as net:
        for _ in range(25):
            for one in net.proxies.values():
                one.conditions.refuses = False
            proxy = net.proxies[source.choice(list(net.proxies))]
            proxy.conditions = Conditions(
                delay_s=source.choice([0.0, 0.005]),
                jitter_s=source.choice([0.0, 0.02]),
                bytes_a_s=source.choice([0.0, 64_000.0]),
                refuses=source.random() < 0.2,
                slow_close_s=source.choice([0.0, 0.2]),
            )
            ends += proxy.reset()
            net.progress(source.choice([0, 1, 2]))
        assert ends > 25
        assert net.proxies["hotels"].connections > 3
