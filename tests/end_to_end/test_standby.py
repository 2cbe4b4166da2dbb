"""Three coordinators on one PostgreSQL server: whoever dies, one writes and nothing is lost."""

import random
import select
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from tests import tiny
from tests.commands import (
    Command,
    MakeRoom,
    Nursery,
    Room,
    committed,
    free_port,
    start,
    status,
    wait_for,
)
from tests.journal import Compared, Journal, compare, rows_of
from tests.postgres import Server
from tests.unit.identity.office import certified

from lorand.credentials import Credentials, Role, Subject
from lorand.heads import KeptHead
from lorand.v1 import status_pb2 as pb
from lorand_coordinator import signing, verification
from lorand_coordinator.identity.admission import Admission
from lorand_coordinator.identity.members import Peer

pytestmark = pytest.mark.postgres

COORDINATORS: Final = 3
SEED: Final = 4


def settings(rounds: int, **service: Any) -> tiny.Settings:
    """A run of three workers, whose rounds wait for nobody for long."""
    return tiny.settings(
        "spsa",
        run={"rounds": rounds},
        estimator={"directions_per_round": 2, "batch_size": 4},
        rounds={"deadline_s": 2.0},
        service={"checkpoint_every": 7, "tail_entries": 40, **service},
    )


def led_by(address: str, shown: Credentials | None = None) -> pb.GetStatusResponse | None:
    """Return the status of a run from the coordinator that leads it; None: this one does not."""
    answer = status(address, shown)
    return None if answer is None or answer.phase == "standing by" else answer


class Several:
    """A run with several coordinators and three workers, and what was seen from outside.

    Where the room is not insecure, workers are members.
    """

    def __init__(
        self, room: Room, nursery: Nursery, postgres: Server, *, one_each: bool = False
    ) -> None:
        """Start everything; with `one_each` each worker knows another coordinator alone."""
        self.room, self.postgres, self._one_each = room, postgres, one_each
        self.admission: Admission | None = None
        self.shown: Credentials | None = None
        if not room.insecure:
            folder = room.folder / f"{room.config.run.name}.identity"
            self.admission = Admission.create_or_open(folder, room.config.run.name)
            self.admission.certify("127.0.0.1:0", [])
            self.shown = Credentials.read(folder / "operator.pem")
        self.location = f"{postgres.url}#{room.config.run.name}"
        self.addresses = [f"127.0.0.1:{free_port()}" for _ in range(COORDINATORS)]
        self.seen = Journal(room.folder / "outside.journal")
        self.journals = {n: Journal(room.folder / f"{n}.journal") for n in tiny.DOMAINS}
        self.leaders: list[str] = []
        self._nursery, self._started = nursery, 0
        self._stack = ExitStack()
        self.coordinators = {address: self._serve(address) for address in self.addresses}
        self.workers = {name: self._join(name) for name in tiny.DOMAINS}

    def _log(self, name: str) -> Path:
        self._started += 1
        return self.room.folder / f"{self._started:03}-{name}.log"

    def _serve(self, address: str) -> Command:
        room, program = self.room, "lr-coordinator"
        arguments = ("--ledger", self.postgres.url, "--address", address, "--json")
        given = room.flagged("serve", room.run, *arguments)
        return self._stack.enter_context(start(room.folder, self._log(program), program, *given))

    def _join(self, name: str) -> Command:
        room, journal = self.room, self.journals[name].path
        number = list(tiny.DOMAINS).index(name)
        known = [self.addresses[number]] if self._one_each else self.addresses
        given = room.flagged(*room.join_arguments(",".join(known), name), *self._member(name))
        fork = partial(self._nursery.fork, room.folder, self._log(name), "lr-worker", *given)
        return self._stack.enter_context(fork(journal=journal))

    def _member(self, name: str) -> tuple[object, ...]:
        """Make a member of a worker where there are any; return the flags of its command."""
        if self.admission is None:
            return ()
        path = self.room.folder / f"{name}.pem"
        if not path.exists():
            subject = Subject(self.room.config.run.name, Role.WORKER, name)
            made = certified(path, self.admission.authority, subject)
            self.admission.members.admit(Peer.of(made.certificate))
        return "--credentials", path

    def kill(self, address: str) -> None:
        """Kill a coordinator and give the same command again."""
        self.coordinators[address].kill()
        self.coordinators[address] = self._serve(address)

    def kill_worker(self, name: str) -> None:
        """Kill a worker and give the same command again."""
        self.workers[name].kill()
        self.workers[name] = self._join(name)

    def look(self) -> int:
        """Return the committed rounds, and keep the head that was shown; -1 without a leader."""
        for address in self.addresses:
            answer = led_by(address, self.shown)
            if answer is not None:
                if answer.entries:
                    self.seen.saw(answer.entries, answer.head.hex())
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
        if self.admission is not None:
            self.admission.close()

    def check(self) -> None:
        """Assert the invariants after the end of a run; every worker must have finished."""
        results = [worker.result() for worker in self.workers.values()]
        self.look()
        room, rounds = self.room, self.room.config.run.rounds
        exported = room.export(self.location)
        replayed = room.once("lr-worker", "replay", exported, "--model", room.model)
        assert replayed["rounds"] == rounds
        assert {result["weights_digest"] for result in results} == {replayed["weights_digest"]}
        for journal in self.journals.values():
            journal.follow()
        found = compare([self.seen, *self.journals.values()], rows_of(self.location))
        assert found == Compared(found.acknowledged, lost=0, twice=0, forked=0)
        assert found.acknowledged >= rounds
        epochs = self.epochs()
        assert epochs == sorted(epochs)
        key = signing.key_at(signing.key_beside(room.ledger)).public
        verified = verification.verify(self.location, key)
        assert verified.signatures == len(epochs), "every entry is signed"
        kept = [KeptHead.from_json(path.read_bytes()) for path in room.state.glob("*.head.json")]
        assert {(one.head, one.signature.key) for one in kept} == {(verified.position.history, key)}
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


def pause(several: Several, leader: str, committed: int = 0) -> None:
    """Stop the leader until another has led to so many rounds, then let it go on in its belief."""
    stopped = several.coordinators[leader]
    stopped.signal(signal.SIGSTOP)
    others = [address for address in several.addresses if address != leader]

    def leads(address: str) -> bool:
        answer = led_by(address)
        return answer is not None and answer.committed >= committed

    try:
        wait_for(
            lambda: any(leads(address) for address in others),
            "another takes over from a leader that hangs",
            limit_s=60.0,
        )
    finally:
        stopped.signal(signal.SIGCONT)


def run(
    make_room: MakeRoom, nursery: Nursery, postgres: Server, rounds: int, faults: list[str]
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
    make_room: MakeRoom, nursery: Nursery, postgres: Server
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


def test_workers_that_know_one_coordinator_each_outlive_the_leader(
    make_room: MakeRoom, nursery: Nursery, postgres: Server
) -> None:
    """Two of three are passed on all the time, and after a kill others than before."""
    room = make_room(settings(80)).lock()
    several = Several(room, nursery, postgres, one_each=True)
    try:
        break_things(several, ["leader"], random.Random(SEED))
        assert several.look() < 80
        several.check()
        assert len(set(several.leaders)) == 2
    finally:
        several.close()
        postgres.execute("DROP SCHEMA IF EXISTS lorand CASCADE")


def test_members_take_part_through_any_coordinator_until_they_are_revoked(
    make_room: MakeRoom, nursery: Nursery, postgres: Server
) -> None:
    room = make_room(settings(100_000)).lock()
    room.insecure = False
    several = Several(room, nursery, postgres, one_each=True)
    try:
        wait_for(lambda: several.reached(3), "it goes on")
        leader = several.leaders[-1]
        names = dict(zip(several.addresses, tiny.DOMAINS, strict=True))
        other, through = next(pair for pair in names.items() if pair[0] != leader)
        assert several.admission is not None
        shown = ("--credentials", several.admission.folder / "operator.pem")
        answer = room.once("lr-coordinator", "health", other, "--through", *shown)
        assert answer == {"serving": True}
        began = time.monotonic()
        several.admission.members.revoke(through)
        assert several.workers[through].end()[0] == 5
        assert time.monotonic() - began < 5.0
        assert f"the membership of '{through}' was revoked" in several.workers[through].errors()
        goal = several.look() + 3
        wait_for(lambda: several.reached(goal), "the others go on")
    finally:
        several.close()
        postgres.execute("DROP SCHEMA IF EXISTS lorand CASCADE")


def test_members_in_the_database_are_invited_and_revoked_on_any_machine(
    make_room: MakeRoom, postgres: Server
) -> None:
    """Two machines: the second has the first one's authority.pem and signing key, and no more."""
    service = {"members": postgres.url, "enrol_address": "127.0.0.1:0"}
    rounds = {"quorum": 1, "start_with": 1}
    room = make_room(tiny.settings("spsa", run={"rounds": 9**5}, service=service, rounds=rounds))
    room.lock().insecure = False
    one, two = (room.folder / name for name in ("one", "two"))
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]

    through = ("lr-coordinator", "health", addresses[1], "--through")

    def serve(address: str, folder: Path) -> Command:
        at = ("--ledger", postgres.url, "--address", address, "--identity-dir", folder)
        return room.start("lr-coordinator", "serve", room.run, *at, "--json")

    def enrol(name: str, machine: Path) -> tuple[str, Path]:
        made = room.once("lr-coordinator", "invite", name, "--identity-dir", machine)
        path = room.folder / f"{name}.pem"
        room.once("lr-worker", "enrol", made["invitation"], "--credentials", path)
        return "--credentials", path

    try:
        with serve(addresses[0], one) as leader:
            wait_for(lambda: (one / "operator.pem").exists(), "it has begun")
            operator = Credentials.read(one / "operator.pem")
            wait_for(lambda: led_by(addresses[0], operator) is not None, "it leads")
            two.mkdir()
            shutil.copy(one / "authority.pem", two)
            with serve(addresses[1], two):
                operators = ("--credentials", two / "operator.pem")
                wait_for(lambda: (two / "operator.pem").exists(), "it has begun")
                operator = Credentials.read(two / "operator.pem")
                wait_for(lambda: status(addresses[1], operator) is not None, "it stands by")
                shown = enrol("hotels", two)
                with room.join(addresses[1], "hotels", *shown) as hotels:
                    wait_for(lambda: committed(addresses[0], operator) >= 3, "it takes part")
                    assert room.once(*through, *operators) == {"serving": True}
                    began = time.monotonic()
                    room.once("lr-coordinator", "revoke", "hotels", "--identity-dir", two)
                    assert hotels.end()[0] == 5
                    assert time.monotonic() - began < 10.0, "the command's own start-up included"
                    assert "the membership of 'hotels' was revoked" in hotels.errors()
                leader.kill()
                wait_for(lambda: led_by(addresses[1], operator) is not None, "the other leads")
                before = committed(addresses[1], operator)
                with room.join(addresses[1], "gadgets", *enrol("gadgets", one)):
                    wait_for(lambda: committed(addresses[1], operator) > before, "it goes on")
    finally:
        postgres.execute("DROP SCHEMA IF EXISTS lorand CASCADE")


def test_a_run_outlives_its_leaders_and_its_database(
    make_room: MakeRoom, nursery: Nursery, postgres: Server
) -> None:
    faults = ["leader", "primary", "any coordinator", "leader", "primary"]
    # So many rounds that a quick machine is still at work when the last fault comes: one look at a
    # coordinator that is starting may take five seconds.
    several = run(make_room, nursery, postgres, 240, faults)
    assert len(set(several.leaders)) > 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_restarts_twenty_kills_and_two_leaders_that_hang(
    make_room: MakeRoom, nursery: Nursery, postgres: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = ["primary"] * 20 + ["leader"] * 12 + ["any coordinator"] * 8 + ["pause"] * 2
    random.Random(SEED).shuffle(faults)
    began = time.monotonic()
    several = run(make_room, nursery, postgres, 600, faults)
    duration, leaders = time.monotonic() - began, len(several.leaders)
    assert len(set(several.leaders)) == COORDINATORS
    with capsys.disabled():
        sys.stdout.write(f"\n{len(faults)} faults in {duration:.0f} s, {leaders} leaders seen\n")


@pytest.mark.slow
@pytest.mark.timeout(290)
@pytest.mark.parametrize("one_each", [False, True], ids=["all addresses", "one each"])
def test_a_leader_that_sleeps_through_its_lease_writes_nothing_more(
    one_each: bool, make_room: MakeRoom, nursery: Nursery, postgres: Server
) -> None:
    """The run goes on under another leader before the first one wakes up, in its belief.

    What it acknowledged before is there in the end. A worker that was started again begins with its
    address, and is let in by the one that leads, which it may know through the sleeper alone.
    """
    room = make_room(settings(400, heartbeat_s=0.5, heartbeat_timeout_s=2.0)).lock()
    several = Several(room, nursery, postgres, one_each=one_each)
    try:
        wait_for(lambda: several.reached(5), "it goes on")
        first = several.leaders[-1]
        sleeper = several.coordinators[first]
        several.addresses = [first, *(a for a in several.addresses if a != first)]
        acknowledged = len(several.epochs())
        pause(several, first, several.look() + 5)
        several.kill_worker("hotels")
        wait_for(lambda: "took over run" in sleeper.errors(), "it learns that another leads")
        several.check()
        epochs = several.epochs()
        assert set(epochs) == {1, 2}
        assert epochs.count(1) >= acknowledged
        assert several.journals["hotels"].lives == 2
        assert sleeper.running()
    finally:
        several.close()
        postgres.execute("DROP SCHEMA IF EXISTS lorand CASCADE")
