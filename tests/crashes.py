"""Runs under random kill -9: coordinator and workers, one at a time and several at once.

Every process is a real command, forked from one that has imported everything, so that a kill and
the same command again take well under a second: the coordinator with its SQLite ledger, signed, and
mutual TLS, three workers with a tiny model, and what they keep. What they see and send outlives
them in journals, which are compared with the ledger when the run is over. A seed chooses the run
and the moments.
"""

import random
import select
import signal
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from tests import tiny
from tests.commands import Command, MakeRoom, Nursery, Room, free_port, wait_for
from tests.journal import Compared, Journal, compare, rows_of

from lorand.heads import KeptHead
from lorand_coordinator import verification

ROUNDS: Final = 160
LIMIT_S: Final = 120.0
"""For everything that is waited for: three processes that start on a busy machine."""
COORDINATOR: Final = "coordinator"
STRIKES: Final = {
    "coordinator": 8,
    "worker": 6,
    "coordinator and worker": 3,
    "two workers": 2,
    "all": 1,
}
"""What is killed at once, and how often of twenty."""


def settings(seed: int) -> tiny.Settings:
    """A zeroth-order run; every other one of local steps, whose workers keep error feedback."""
    local: dict[str, dict[str, Any]] = {
        "local": {"steps": 3, "learning_rate": 0.001},
        "codec": {"up": "sign"},
        "optimizer": {"learning_rate": 1.0, "normalise": False},
    }
    return tiny.settings(
        "spsa",
        run={"name": f"kills-{seed}", "rounds": ROUNDS},
        estimator={"directions_per_round": 2, "batch_size": 4},
        rounds={"deadline_s": 2.0},
        service={"checkpoint_every": 7, "tail_entries": 40},
        **(local if seed % 2 else {}),
    )


@dataclass
class Outcome:
    """What one or several runs came to. All that must be 0 is counted, not asserted."""

    kills: Counter[str] = field(default_factory=Counter)
    """Processes killed, by their kind."""
    strikes: Counter[str] = field(default_factory=Counter)
    """How often what was killed at once."""
    seeds: list[int] = field(default_factory=list)
    entries: int = 0
    rounds: int = 0
    lives: int = 0
    """Times that a worker began to take part."""
    acknowledged: int = 0
    lost: int = 0
    twice: int = 0
    forked: int = 0
    digests_differ: int = 0
    """Weights that are not the ones of a replay by a process that nobody killed."""
    longest_standstill_s: float = 0.0
    """From a strike to the entry or two that were awaited after it, as a worker saw them."""

    def add(self, compared: Compared) -> None:
        """Count what journals and ledger say."""
        self.acknowledged += compared.acknowledged
        self.lost += compared.lost
        self.twice += compared.twice
        self.forked += compared.forked

    def assert_unharmed(self) -> None:
        """Nothing is lost, twice or forked, and all weights are a replay's."""
        assert (self.lost, self.twice, self.forked, self.digests_differ) == (0, 0, 0, 0), self


class Crashes:
    """One run and its four processes, killed and started again until it is over."""

    def __init__(self, room: Room, nursery: Nursery, source: random.Random) -> None:
        """Start everything."""
        self.room, self._nursery, self._source = room, nursery, source
        self._address = f"127.0.0.1:{free_port()}"
        self.standstill_s = 0.0
        self._struck_at: float | None = None
        self._started = 0
        self._stack = ExitStack()
        self._all: list[Command] = []
        self.journals = {n: Journal(room.folder / f"{n}.journal") for n in tiny.DOMAINS}
        self._running = {COORDINATOR: self._start(COORDINATOR)}
        self._running[COORDINATOR].line(LIMIT_S)
        self._credentials = {name: room.enrol(name) for name in tiny.DOMAINS}
        self._running |= {name: self._start(name) for name in tiny.DOMAINS}

    def _start(self, target: str) -> Command:
        room, journal = self.room, None
        if target == COORDINATOR:
            program = "lr-coordinator"
            arguments = ["serve", str(room.run), "--address", self._address, "--json"]
        else:
            program, journal = "lr-worker", self.journals[target].path
            arguments = [*room.join_arguments(self._address, target)]
            arguments += ["--credentials", str(self._credentials[target])]
        self._started += 1
        log = room.folder / f"{self._started:04}-{target}.log"
        command = self._nursery.fork(room.folder, log, program, *arguments, journal=journal)
        self._all.append(self._stack.enter_context(command))
        return command

    def close(self) -> None:
        """End everything."""
        self._stack.close()

    def seen(self) -> int:
        """Return the largest number of entries that a worker has seen."""
        return max(journal.follow() for journal in self.journals.values())

    def living(self) -> list[str]:
        """Return the workers that have not finished. AssertionError for one that failed."""
        names = [name for name in tiny.DOMAINS if self._running[name].running()]
        for name in tiny.DOMAINS:
            command = self._running[name]
            assert name in names or command.code == 0, f"{name}: {command.errors()}"
        coordinator = self._running[COORDINATOR]
        assert coordinator.running(), coordinator.errors()
        return names

    def targets(self, strike: str) -> list[str]:
        """Return whom a strike kills."""
        workers = self.living()
        count = {"coordinator": 0, "two workers": 2, "all": 3}.get(strike, 1)
        chosen = self._source.sample(workers, min(count, len(workers)))
        return [*([COORDINATOR] if strike == "all" or COORDINATOR in strike else []), *chosen]

    def wait(self) -> None:
        """Wait for an entry or two and then a moment; one time in four only for the moment."""
        if self._source.random() < 0.75:
            goal = self.seen() + self._source.randint(1, 2)
            wait_for(lambda: self.seen() >= goal or not self.living(), f"entry {goal}", LIMIT_S)
            if self._struck_at is not None:
                self.standstill_s = max(self.standstill_s, time.monotonic() - self._struck_at)
        select.select([], [], [], self._source.uniform(0.0, 0.3))

    def kill(self, targets: list[str]) -> None:
        """Kill processes at once, and give the same commands again, in any order."""
        for target in targets:
            self._running[target].signal(signal.SIGKILL)
        self._struck_at = time.monotonic()
        for target in targets:
            self._running[target].kill()
        self._source.shuffle(targets)
        for target in targets:
            self._running[target] = self._start(target)

    def finish(self, outcome: Outcome) -> None:
        """Wait for the end, and count what is wrong."""
        results = [self._running[name].result(LIMIT_S) for name in tiny.DOMAINS]
        self.seen()
        room = self.room
        room.once("lr-coordinator", "ledger", "verify", room.ledger)
        for kept in room.state.glob("*.head.json"):
            verification.verify(room.ledger, None, KeptHead.from_json(kept.read_bytes()))
        replayed = room.once("lr-worker", "replay", room.export(), "--model", room.model)
        digest = replayed["weights_digest"]
        outcome.rounds += replayed["rounds"]
        outcome.digests_differ += sum(result["weights_digest"] != digest for result in results)
        outcome.lives += sum(journal.lives for journal in self.journals.values())
        outcome.longest_standstill_s = max(outcome.longest_standstill_s, self.standstill_s)
        rows = list(rows_of(room.ledger))
        outcome.entries += len(rows)
        repeats = room.config.keeps_feedback
        outcome.add(compare(self.journals.values(), rows, repeats=repeats))
        troubled = [command.errors() for command in self._all if "Traceback" in command.errors()]
        assert not troubled, troubled[0]


def live(make_room: MakeRoom, nursery: Nursery, seed: int, kills: int, outcome: Outcome) -> None:
    """Live one run to its end, with so many kills or a few more, unless it ends before."""
    source = random.Random(seed)
    room = make_room(settings(seed), starter=nursery.fork).lock()
    room.insecure = False
    crashes = Crashes(room, nursery, source)
    outcome.seeds.append(seed)
    struck = 0
    try:
        while struck < kills and crashes.living():
            crashes.wait()
            strike = source.choices(list(STRIKES), list(STRIKES.values()))[0]
            targets = crashes.targets(strike)
            crashes.kill(targets)
            struck += len(targets)
            outcome.strikes[strike] += 1
            kinds = (COORDINATOR if target == COORDINATOR else "worker" for target in targets)
            outcome.kills.update(kinds)
        crashes.finish(outcome)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}, {struck} kills: {error}") from error
    finally:
        crashes.close()


def campaign(make_room: MakeRoom, nursery: Nursery, kills: int, seed: int) -> Outcome:
    """Live runs, one after the other, until so many processes were killed."""
    outcome = Outcome()
    while (left := kills - outcome.kills.total()) > 0:
        live(make_room, nursery, seed + len(outcome.seeds), left, outcome)
    return outcome
