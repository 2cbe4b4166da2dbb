"""Peers that cost too much: a run goes on, and the coordinator's memory and descriptors stay."""

import os
import resource
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest
from tests import tiny
from tests.commands import (
    Command,
    MakeRoom,
    Room,
    committed,
    free_port,
    status,
    wait_for,
)
from tests.end_to_end.peers import Peer, peers, served, two
from tests.journal import Journal, compare, rows_of
from tests.raw_http2 import DATA, GOAWAY, HEADERS, RST_STREAM, RawPeer, frame, message
from tests.runs import IDENTITY, hello

from lorand import ledger, transport
from lorand.credentials import Credentials
from lorand.v1 import coordination_pb2 as wire
from lorand_coordinator import limits

SILENT: Final = 500
PARTICIPATE: Final = "/lorand.v1.CoordinationService/Participate"
READ: Final = "/lorand.v1.LedgerService/ReadEntries"
BEAT: Final = wire.ParticipateRequest(heartbeat=wire.Heartbeat())


def memory(process: Command) -> float:
    """Resident memory, MiB."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


def descriptors(process: Command) -> int:
    """Open files and sockets."""
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def cpu(process: Command) -> float:
    """Seconds of processor time."""
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    return sum(map(int, fields.split()[11:13])) / os.sysconf("SC_CLK_TCK")


def pause(seconds: float) -> None:
    """Let time pass at the other side."""
    select.select([], [], [], seconds)


@contextmanager
def silent(address: str, count: int) -> Iterator[list[socket.socket]]:
    """Connections that say nothing."""
    host, port = address.rsplit(":", 1)
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(count)
        ]


@pytest.mark.slow
def test_slow_handshakes_keep_nobody_out_and_end(make_room: MakeRoom) -> None:
    """500 connections, half of them a byte now and then, at both ports of a run with members."""
    room = make_room(two())
    room.insecure = False
    (room.folder / "run.lock").write_text(IDENTITY.to_lock(), encoding="utf-8")
    listen = ("--address", "127.0.0.1:0", "--json")
    with room.start("lr-coordinator", "serve", room.run, *listen) as coordinator:
        told = coordinator.line()
        address = told["address"]
        operator = Credentials.read(room.folder / f"{room.config.run.name}.identity/operator.pem")
        assert status(address, operator) is not None
        before, began = descriptors(coordinator), time.monotonic()
        enrolment = "127.0.0.1:" + told["enrolment"].rsplit(":", 1)[1]
        with silent(address, SILENT) as main, silent(enrolment, 2 * 64) as door:
            trickles = (main + door)[::2]
            hello = bytes.fromhex("16030101fc010001f80303")  # how a ClientHello begins
            for i in range(len(hello)):
                for each in trickles:
                    try:
                        each.send(hello[i : i + 1])
                    except OSError:
                        assert each not in main, "the run's port has room for them"
                assert status(address, operator) is not None
            assert descriptors(coordinator) > before + SILENT
            assert descriptors(coordinator) < before + SILENT + 64 + 30, "enrolment's are refused"
            limit = transport.HANDSHAKE_MS / 1000 + 5
            wait_for(lambda: descriptors(coordinator) < before + 10, "they are closed", limit)
        assert time.monotonic() - began > transport.HANDSHAKE_MS / 1000 - 1
        assert status(address, operator) is not None


@pytest.mark.slow
def test_connections_are_bounded_and_descriptors_last(make_room: MakeRoom) -> None:
    """With few descriptors left the coordinator neither ends nor spins, and serves again."""
    room = make_room(two(service={"max_workers": 4}))
    most = 2 * 4 + transport.SPARE_CONNECTIONS
    with served(room) as (coordinator, address), peers(address, room.config) as (one, other):
        with silent(address, 2 * most):
            pause(0.5)
            assert descriptors(coordinator) < most + 40
        wait_for(lambda: status(address) is not None, "there is room again")
        soft = resource.prlimit(coordinator.pid, resource.RLIMIT_NOFILE)
        few = max(map(int, os.listdir(f"/proc/{coordinator.pid}/fd"))) + 5
        resource.prlimit(coordinator.pid, resource.RLIMIT_NOFILE, (few, soft[1]))
        spent = cpu(coordinator)
        with silent(address, 40):
            for index in (1, 2):
                for peer in (one, other):
                    peer.report(index, seed=peer.worker)
                for peer in (one, other):
                    peer.until_committed(index)
            pause(3.0)
        assert cpu(coordinator) - spent < 2.0, "it waits, it does not spin"
        resource.prlimit(coordinator.pid, resource.RLIMIT_NOFILE, soft)
        wait_for(lambda: committed(address) == 2, "it answers again")
        assert "Traceback" not in coordinator.errors()


@pytest.mark.slow
def test_a_worker_that_floods_is_held_back_and_sent_away(make_room: MakeRoom) -> None:
    """Others go on meanwhile; it may come back."""
    room = make_room(two(rounds={"deadline_s": 1.0}, service={"messages_per_s": 50.0}))
    with served(room) as (coordinator, address), peers(address, room.config) as (one, other):
        with RawPeer(address) as flood:
            greeting = hello(ledger.origin(room.config, IDENTITY), "three")
            flood.call(PARTICIPATE)
            flood.say(wire.ParticipateRequest(hello=greeting).SerializeToString())
            began, many = time.monotonic(), frame(DATA, 0, 1, message(BEAT.SerializeToString()))
            flood.send(2000 * many)  # within the window, and more than it takes in 30 s
            for index in range(1, 4):
                for peer in (one, other):
                    peer.report(index, seed=peer.worker)
                for peer in (one, other):
                    peer.until_committed(index)
            while True:
                kind, _, payload = flood.until(DATA, HEADERS, RST_STREAM, GOAWAY)
                assert kind in (DATA, HEADERS), "it is told, not cut off"
                if kind == DATA and b"50 messages a second" in payload:
                    answer = wire.ParticipateResponse.FromString(payload[5:])
                    break
            took = time.monotonic() - began
        assert answer.refusal.retry
        assert limits.PATIENCE_S - 1 < took < limits.PATIENCE_S + 5
        log = coordinator.errors()
        assert "worker 3 is sent away: more than 50 messages a second came for 10 s" in log
        assert "Traceback" not in log


@pytest.mark.slow
def test_readers_that_do_not_read_cost_little(make_room: MakeRoom) -> None:
    """Workers and readers of the ledger whose windows stay shut, twenty connections of each."""
    room = make_room(two(service={"outbox_messages": 16}))
    with served(room) as (coordinator, address), peers(address, room.config) as (one, other):
        position = ledger.origin(room.config, IDENTITY)
        with ExitStack() as stack:

            def shut() -> RawPeer:
                return stack.enter_context(RawPeer(address, window=0))

            def flock(first: int) -> None:
                for number in range(first, first + 20):
                    worker, reader = shut(), shut()
                    worker.call(PARTICIPATE)
                    greeting = hello(position, f"worker-{number}")
                    worker.say(wire.ParticipateRequest(hello=greeting).SerializeToString())
                    for _ in range(40):
                        worker.say(BEAT.SerializeToString())
                    for stream in range(1, 2 * transport.STREAMS, 2):
                        reader.call(READ, stream)
                        reader.send(frame(DATA, 1, stream, message(b"")))

            flock(0)
            why = "it does not read its messages"
            wait_for(lambda: coordinator.errors().count(why) == 20, "they are dropped")
            before = memory(coordinator)
            flock(100)
            wait_for(lambda: coordinator.errors().count(why) == 40, "these are dropped, too")
            assert memory(coordinator) - before < 20.0
            for peer in (one, other):
                peer.report(1, seed=peer.worker)
            for peer in (one, other):
                peer.until_committed(1)
        Peer(address, room.config, "late").join().close()


# -- a stop -----------------------------------------------------------------------------------


class Stops:
    """A run with real workers whose coordinator is stopped and started."""

    def __init__(self, room: Room, stack: ExitStack) -> None:
        """Start everything."""
        self.room, self._stack = room, stack
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.seen = Journal(room.folder / "status.journal")
        self.coordinator = self.serve()
        self.workers = {n: stack.enter_context(room.join(self.address, n)) for n in tiny.DOMAINS}

    def serve(self) -> Command:
        """Start a coordinator, and wait until it serves."""
        listen = ("--address", self.address, "--json")
        started = self._stack.enter_context(
            self.room.start("lr-coordinator", "serve", self.room.run, *listen)
        )
        started.line()
        return started

    def reach(self, goal: int) -> None:
        """Wait until so many rounds are committed."""
        wait_for(lambda: self.look() >= goal, f"{goal} rounds are committed", 180.0)

    def look(self) -> int:
        """Return the committed rounds and keep the head that was shown."""
        answer = status(self.address)
        if answer is None:
            return -1
        if answer.entries:
            self.seen.saw(answer.entries, answer.head.hex())
        return answer.committed


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_stops_in_the_middle_of_rounds_lose_nothing(make_room: MakeRoom) -> None:
    """SIGTERM while contributions are on their way, again and again; it always ends with 0."""
    drain_s, rounds = 1.0, 150
    room = make_room(
        tiny.settings(
            "spsa",
            run={"rounds": rounds},
            estimator={"directions_per_round": 2, "batch_size": 4},
            service={"drain_s": drain_s, "checkpoint_every": 7},
        )
    ).lock()
    with ExitStack() as stack:
        run = Stops(room, stack)
        for stop in range(6):
            goal = 4 + 12 * stop
            run.reach(goal)
            pause(0.013 * stop)
            began = time.monotonic()
            run.coordinator.signal(signal.SIGTERM)
            code, _ = run.coordinator.end(drain_s + 10.0)
            assert code == 0, run.coordinator.errors()
            assert time.monotonic() - began < drain_s + 3.0
            errors = run.coordinator.errors()
            assert "the coordinator is shutting down" in errors
            assert "stopped; the ledger is whole" in errors
            assert "Traceback" not in errors
            run.coordinator = run.serve()
        run.reach(rounds)
        results = [worker.result() for worker in run.workers.values()]
    replayed = room.once("lr-worker", "replay", room.export(), "--model", room.model)
    assert {result["weights_digest"] for result in results} == {replayed["weights_digest"]}
    assert replayed["rounds"] == rounds
    abandoned = sum("abandoned" in worker.errors() for worker in run.workers.values())
    assert not abandoned, "a stop is no reason to give a round up"
    found = compare([run.seen], rows_of(room.ledger))
    assert (found.lost, found.twice, found.forked) == (0, 0, 0)


def test_while_it_drains_it_is_not_healthy_and_a_second_signal_ends_it(
    make_room: MakeRoom,
) -> None:
    """A call that stays open holds a stop up for drain_s, and an impatient operator not."""
    room = make_room(two(service={"drain_s": 600.0}))
    with served(room) as (coordinator, address), RawPeer(address, window=0) as shut:
        shut.call(READ)
        shut.send(frame(DATA, 1, 1, message(b"\x10\x01")))  # follow: it would never end
        shut.until(HEADERS)
        coordinator.signal(signal.SIGTERM)
        wait_for(lambda: "asked again" in coordinator.errors(), "it drains")
        pause(0.2)
        assert coordinator.running()
        with room.start("lr-coordinator", "health", address) as asked:
            assert asked.end()[0] == 7
        coordinator.signal(signal.SIGTERM)
        assert coordinator.end(5.0)[0] == -signal.SIGTERM
    room.export()
