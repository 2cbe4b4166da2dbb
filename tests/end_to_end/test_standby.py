"""Three coordinators on one PostgreSQL server: whoever dies, one writes and nothing is lost."""

import random
import select
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from typing import Final

import pytest
from tests import tiny
from tests.commands import Command, MakeRoom, Room, Starter, free_port, start, status, wait_for
from tests.end_to_end.histories import assert_nothing_lost, assert_nothing_twice
from tests.postgres import Server

from lorand.heads import KeptHead
from lorand_coordinator import signing, verification

pytestmark = pytest.mark.postgres

COORDINATORS: Final = 3
SEED: Final = 4


def settings(rounds: int) -> tiny.Settings:
    """A run of three workers, whose rounds wait for nobody for long."""
    return tiny.settings(
        "spsa",
        run={"rounds": rounds},
        estimator={"directions_per_round": 2, "batch_size": 4},
        rounds={"deadline_s": 2.0},
        service={"checkpoint_every": 7, "tail_entries": 40},
    )


class Several:
    """A run with several coordinators and three workers, and what was seen from outside."""

    def __init__(self, room: Room, nursery: Starter, postgres: Server) -> None:
        """Start everything."""
        self.room, self.postgres = room, postgres
        self.location = f"{postgres.url}#{room.config.run.name}"
        self.addresses = [f"127.0.0.1:{free_port()}" for _ in range(COORDINATORS)]
        self.seen: dict[int, str] = {}
        self.leaders: list[str] = []
        self._started = 0
        self._stack = ExitStack()
        self.coordinators = {address: self._serve(address) for address in self.addresses}
        several = ",".join(self.addresses)
        self.workers = [
            self._start(nursery, "lr-worker", *room.flagged(*room.join_arguments(several, name)))
            for name in tiny.DOMAINS
        ]

    def _start(self, starter: Starter, program: str, *arguments: object) -> Command:
        self._started += 1
        log = self.room.folder / f"{self._started:03}-{program}.log"
        return self._stack.enter_context(starter(self.room.folder, log, program, *arguments))

    def _serve(self, address: str) -> Command:
        arguments = ("--ledger", self.postgres.url, "--address", address, "--json")
        given = self.room.flagged("serve", self.room.run, *arguments)
        return self._start(start, "lr-coordinator", *given)

    def kill(self, address: str) -> None:
        """Kill a coordinator and give the same command again."""
        self.coordinators[address].kill()
        self.coordinators[address] = self._serve(address)

    def look(self) -> int:
        """Return the committed rounds, and keep the head that was shown; -1 without a leader."""
        for address in self.addresses:
            answer = status(address)
            if answer is not None and answer.phase != "standing by":
                if answer.entries:
                    self.seen[answer.entries] = answer.head.hex()
                if self.leaders[-1:] != [address]:
                    self.leaders.append(address)
                return answer.committed
        return -1

    def reached(self, rounds: int) -> bool:
        """Whether so many rounds are committed."""
        return self.look() >= rounds

    def close(self) -> None:
        """End everything."""
        self._stack.close()

    def check(self) -> None:
        """Assert the invariants after the end of a run; every worker must have finished."""
        results = [worker.result() for worker in self.workers]
        self.look()
        room, rounds = self.room, self.room.config.run.rounds
        exported = room.export(self.location)
        replayed = room.once("lr-worker", "replay", exported, "--model", room.model)
        assert replayed["rounds"] == rounds
        assert {result["weights_digest"] for result in results} == {replayed["weights_digest"]}
        assert_nothing_lost(self.location, self.seen)
        assert_nothing_twice(self.location)
        epochs = self.epochs()
        assert epochs == sorted(epochs)
        key = signing.key_at(signing.key_beside(room.ledger)).public
        found = verification.verify(self.location, key)
        assert found.signatures == len(epochs), "every entry is signed"
        kept = [KeptHead.from_json(path.read_bytes()) for path in room.state.glob("*.head.json")]
        assert {(one.head, one.signature.key) for one in kept} == {(found.position.history, key)}
        assert len(kept) == len(tiny.DOMAINS)

    def epochs(self) -> list[int]:
        """The epoch of every entry, in order."""
        query = "SELECT epoch FROM lorand.entry WHERE run = %s ORDER BY sequence"
        return [int(str(row[0])) for row in self.postgres.execute(query, self.room.config.run.name)]


def break_things(several: Several, faults: list[str], source: random.Random) -> None:
    """Cause the faults in order, each some rounds after the one before."""
    for fault in faults:
        goal = max(0, several.look()) + source.randint(1, 3)
        wait_for(partial(several.reached, goal), f"{goal} rounds before: {fault}", limit_s=90.0)
        select.select([], [], [], source.uniform(0.0, 0.4))
        leader = several.leaders[-1]
        if fault == "leader":
            several.kill(leader)
        elif fault == "any coordinator":
            several.kill(source.choice(several.addresses))
        elif fault == "primary":
            several.postgres.control("restart")
        else:
            assert fault == "pause"
            pause(several, leader)


def pause(several: Several, leader: str) -> None:
    """Stop the leader until another leads, then let it go on in its belief."""
    stopped = several.coordinators[leader]
    stopped.signal(signal.SIGSTOP)
    others = [address for address in several.addresses if address != leader]
    try:
        wait_for(
            lambda: any((s := status(a)) is not None and s.phase != "standing by" for a in others),
            "another takes over from a leader that hangs",
            limit_s=60.0,
        )
    finally:
        stopped.signal(signal.SIGCONT)


def run(
    make_room: MakeRoom, nursery: Starter, postgres: Server, rounds: int, faults: list[str]
) -> Several:
    """Run to the end under faults; return what was seen, checked."""
    room = make_room(settings(rounds)).lock()
    several = Several(room, nursery, postgres)
    try:
        break_things(several, faults, random.Random(SEED))
        at_last_fault = several.look()
        wait_for(lambda: several.look() == rounds, "the run finishes", limit_s=120.0)
        assert at_last_fault < rounds, "the last fault came before the end"
        several.check()
    finally:
        several.close()
        postgres.execute("DROP SCHEMA IF EXISTS lorand CASCADE")
    return several


def test_commands_on_a_run_in_a_database(
    make_room: MakeRoom, nursery: Starter, postgres: Server
) -> None:
    """Those of docs/operations.md: status of who stands by, verify, backup of a run in use."""
    room = make_room(settings(60)).lock()
    several = Several(room, nursery, postgres)
    try:
        wait_for(lambda: several.reached(2), "it goes on")
        leader = several.leaders[-1]
        other = next(address for address in several.addresses if address != leader)
        answer = room.once("lr-coordinator", "status", other)
        assert (answer["phase"], answer["rounds"]) == ("standing by", 60)
        assert f":{leader.rpartition(':')[2]} leads run 'tiny-spsa' (epoch 1)" in answer["reason"]
        assert room.once("lr-coordinator", "health", leader) == {"serving": True}
        with room.start("lr-coordinator", "health", other, "--json") as health:
            code, output = health.end()
            assert (code, output) == (7, '{"serving": false}\n')
        copy = room.folder / "copy.ledger"
        backed_up = room.once("lr-coordinator", "ledger", "backup", several.location, copy)
        assert room.once("lr-coordinator", "ledger", "verify", copy)["head"] == backed_up["head"]
        several.coordinators[leader].signal(signal.SIGTERM)
        assert several.coordinators[leader].end()[0] == 0
        wait_for(lambda: several.reached(0) and several.leaders[-1] != leader, "it is handed over")
        several.check()
        verified = room.once("lr-coordinator", "ledger", "verify", several.location)
        assert verified["committed"] == 60
    finally:
        several.close()
        postgres.execute("DROP SCHEMA IF EXISTS lorand CASCADE")


def test_a_run_outlives_its_leaders_and_its_database(
    make_room: MakeRoom, nursery: Starter, postgres: Server
) -> None:
    faults = ["leader", "primary", "any coordinator", "leader", "primary"]
    several = run(make_room, nursery, postgres, 40, faults)
    assert len(set(several.leaders)) > 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_restarts_twenty_kills_and_two_leaders_that_hang(
    make_room: MakeRoom, nursery: Starter, postgres: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = ["primary"] * 20 + ["leader"] * 12 + ["any coordinator"] * 8 + ["pause"] * 2
    random.Random(SEED).shuffle(faults)
    began = time.monotonic()
    several = run(make_room, nursery, postgres, 600, faults)
    duration, leaders = time.monotonic() - began, len(several.leaders)
    assert len(set(several.leaders)) == COORDINATORS
    with capsys.disabled():
        sys.stdout.write(f"\n{len(faults)} faults in {duration:.0f} s, {leaders} leaders seen\n")
