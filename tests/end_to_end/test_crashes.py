"""Fifty kill -9 in one run, coordinator and workers: nothing is lost, nothing is applied twice."""

import random
import select
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

import pytest
from tests import tiny
from tests.commands import Command, MakeRoom, Room, Starter, free_port, start, status, wait_for

from lorand import ledger
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.store import SqliteStore

COORDINATOR_KILLS: Final = 30
WORKER_KILLS: Final = 20
REAL_RESTARTS: Final = 3
"""Workers that come back as a console command, with its seconds of imports."""
ROUNDS: Final = 400
SEED: Final = 20

SETTINGS: Final = tiny.settings(
    "spsa",
    run={"rounds": ROUNDS},
    estimator={"directions_per_round": 2, "batch_size": 4},
    rounds={"deadline_s": 2.0},
    service={"checkpoint_every": 7, "tail_entries": 40},
)


class Crashes:
    """One run, its four processes, and what of it was seen from outside."""

    def __init__(self, room: Room, nursery: Starter) -> None:
        """Start everything."""
        self.room, self._nursery = room, nursery
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.seen: dict[int, str] = {}
        self._started = 0
        self._stack = ExitStack()
        self.coordinator = self._serve()
        self.workers = {name: self._join(name, nursery) for name in tiny.DOMAINS}

    def _start(self, starter: Starter, program: str, *arguments: object) -> Command:
        self._started += 1
        log = self.room.folder / f"{self._started:03}-{program}.log"
        command = starter(self.room.folder, log, program, *self.room.flagged(*arguments))
        return self._stack.enter_context(command)

    def _serve(self) -> Command:
        serve = ("serve", self.room.run, "--address", self.address, "--json")
        return self._start(start, "lr-coordinator", *serve)

    def _join(self, name: str, starter: Starter) -> Command:
        return self._start(starter, "lr-worker", *self.room.join_arguments(self.address, name))

    def kill(self, target: str, *, real: bool = False) -> None:
        """Kill a process and give the same command again."""
        if target == "coordinator":
            self.coordinator.kill()
            self.coordinator = self._serve()
        else:
            self.workers[target].kill()
            self.workers[target] = self._join(target, start if real else self._nursery)

    def look(self) -> int:
        """Return the committed rounds, and keep the head that was shown; -1 without an answer."""
        answer = status(self.address)
        if answer is None:
            return -1
        if answer.entries:
            self.seen[answer.entries] = answer.head.hex()
        return answer.committed

    def close(self) -> None:
        """End everything."""
        self._stack.close()


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_fifty_kills(
    make_room: MakeRoom, nursery: Starter, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at any moment and started again by the same command, the run ends as replay says."""
    source = random.Random(SEED)
    targets = ["coordinator"] * COORDINATOR_KILLS
    targets += [list(tiny.DOMAINS)[i % 3] for i in range(WORKER_KILLS)]
    source.shuffle(targets)
    room = make_room(SETTINGS).lock()
    began = time.monotonic()
    crashes = Crashes(room, nursery)
    real = REAL_RESTARTS
    try:
        for target in targets:
            pause(crashes, source)
            is_real = target != "coordinator" and real > 0
            real -= is_real
            crashes.kill(target, real=is_real)
        at_last_kill = crashes.look()
        wait_for(lambda: crashes.look() == ROUNDS, "the run finishes", limit_s=120.0)
        results = [worker.result() for worker in crashes.workers.values()]
        crashes.look()
    finally:
        crashes.close()
    duration = time.monotonic() - began
    assert at_last_kill < ROUNDS, "the last kill came before the end"
    replayed = room.once("lr-worker", "replay", room.export(), "--model", room.model)
    assert replayed["rounds"] == ROUNDS
    assert {result["weights_digest"] for result in results} == {replayed["weights_digest"]}
    assert_nothing_lost(room, crashes.seen)
    assert_nothing_twice(room)
    with capsys.disabled():
        sys.stdout.write(f"\n{len(targets)} kills in {duration:.0f} s, {len(crashes.seen)} heads\n")


def pause(crashes: Crashes, source: random.Random) -> None:
    """Wait for some rounds and then a moment; one time in five only for the moment."""
    if source.random() < 0.8:
        goal = max(0, crashes.look()) + source.randint(1, 4)
        wait_for(lambda: crashes.look() >= goal, f"{goal} rounds are committed", limit_s=60.0)
    select.select([], [], [], source.uniform(0.0, 0.4))


def assert_nothing_lost(room: Room, seen: dict[int, str]) -> None:
    """Every head that was ever shown is in the history, at its place."""
    heads, head = {0: ""}, ledger.GENESIS
    for count, body in enumerate(ledger.read_file(room.export()), 1):
        head = ledger.entry_digest(head, body)
        heads[count] = head.hex()
    assert len(seen) > COORDINATOR_KILLS
    assert {count: heads[count] for count in seen} == seen


def assert_nothing_twice(room: Room) -> None:
    """A round has one outcome, and in it a worker's one contribution, made for that round."""
    outcomes: set[int] = set()
    for entry, stored in rounds_of(room):
        assert entry.round_index not in outcomes
        outcomes.add(entry.round_index)
        if entry.HasField("commit"):
            workers = [part.worker for part in stored]
            assert workers == sorted(set(workers)) == list(entry.commit.workers)
            assert {part.contribution.round_index for part in stored} == {entry.round_index}
    assert outcomes == set(range(1, len(outcomes) + 1))


def rounds_of(room: Room) -> Iterator[tuple[pb.Entry, list[pb.StoredContribution]]]:
    """The entries that end rounds, each with its stored contributions."""
    store = SqliteStore(room.ledger, read_only=True)
    try:
        for body in store.entries():
            entry = ledger.parse(body)
            if entry.WhichOneof("kind") in ("commit", "abandon"):
                bodies = store.contributions(entry.sequence)
                yield entry, [pb.StoredContribution.FromString(body) for body in bodies]
    finally:
        store.close()
