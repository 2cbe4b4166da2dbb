"""Runs whose workers sign what they contributed, without a network."""

from pathlib import Path
from typing import Final

import numpy as np
from tests.runs import IDENTITY, config_of
from tests.unit.signed_histories import KEY

from lorand import codec, heads, ledger, statements
from lorand.ledger import Position
from lorand.privacy.primitives import KEY_BYTES, IdentityKey
from lorand.privacy.roster import Members
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import stating
from lorand_coordinator.store import SqliteStore
from lorand_worker.feedback import Place
from lorand_worker.stating import Statements

CONFIG: Final = config_of(run={"rounds": 100})
NAMES: Final = ("a", "b", "c")
KEYS: Final = {name: IdentityKey(name.encode().ljust(KEY_BYTES)) for name in NAMES}
ROSTER: Final = Members.of({name: key.public for name, key in KEYS.items()})


class Run:
    """A coordinator's ledger, written as rounds would."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "run.ledger"
        self.store = SqliteStore(self.path)
        self.store._database.execute("PRAGMA synchronous = OFF")
        origin = ledger.origin(CONFIG, IDENTITY)
        self.store.signer = heads.signer(KEY, origin.run_digest)
        self.bodies: list[bytes] = []
        self.positions = [origin]
        self.append(ledger.start_entry(CONFIG, IDENTITY))
        for number, name in enumerate(NAMES, start=1):
            self.append(pb.Entry(member=pb.Member(worker=number, name=name)))
        self.workers = [Worker(self, number) for number in range(1, len(NAMES) + 1)]

    @property
    def position(self) -> Position:
        return self.positions[-1]

    def append(self, entry: pb.Entry, parts: list[bytes] | None = None) -> None:
        body, _ = self.store.append(entry, parts or [])
        self.bodies.append(body)
        self.positions.append(ledger.apply(self.position, body))

    def end_round(self, index: int, said: dict[int, pb.Contribution]) -> None:
        """Commit what was said, or abandon the round if nothing was."""
        if not said:
            self.append(pb.Entry(round_index=index, abandon=pb.Abandon(reason="nobody")))
            return
        parts = [statements.stored(worker, said[worker]) for worker in sorted(said)]
        commit = pb.Commit(
            scale=1,
            codes=codec.pack(CONFIG.codec.down, np.zeros(3, np.int64)),
            workers=sorted(said),
            contributions_digest=ledger.contributions_digest(parts),
        )
        self.append(pb.Entry(round_index=index, commit=commit), parts)

    def contributions(self) -> set[tuple[int, int]]:
        """Worker and sequence of each that is stored."""
        entries = map(ledger.parse, self.bodies)
        return {(w, e.sequence) for e in entries for w in e.commit.workers}


class Worker:
    """One process after another of a worker, and what a test knows of it."""

    def __init__(self, run: Run, number: int) -> None:
        self.run, self.number, self.present = run, number, True
        self.name = NAMES[number - 1]
        self.position = run.position
        self.place = Place(run.folder / "state", run.position.run_digest, self.name)
        self.told: list[str] = []
        self.stated_to = -1
        self.unknown: set[int] = set()
        """Sequences of what it contributed and has lost the memory of."""
        self.open()

    def open(self) -> None:
        run_digest = self.place.run_digest
        self.statements = Statements(KEYS[self.name], run_digest, self.place, self.told.append)

    def answer(self, index: int, seed: int) -> pb.Contribution:
        said = pb.Contribution(round_index=index, codes=bytes([seed % 100, self.number, index]))
        self.statements.sent(self.number, said, self.position)
        return said

    def catch_up(self, *, leaps: bool) -> None:
        """Follow what it lacks, or jump over it."""
        run = self.run
        if leaps and self.position is not run.position:
            if (awaited := self.statements.awaited_from) is not None:
                self.statements.look_up(iter(run.bodies[awaited:]))
            self.statements.jump(run.position)
        else:
            for sequence in range(self.position.next_sequence, len(run.bodies)):
                self.statements.follow(run.bodies[sequence], run.positions[sequence + 1])
        self.position = run.position

    def restart(self, *, leaps: bool) -> None:
        """End, and begin again from nothing but what is on the disk."""
        self.open()
        self.position = self.run.positions[0]
        self.catch_up(leaps=leaps)

    def lose(self, awaited: int | None) -> None:
        """End, and begin again from nothing at all."""
        ours = {sequence for worker, sequence in self.run.contributions() if worker == self.number}
        self.unknown |= {sequence for sequence in ours if sequence > self.stated_to}
        if awaited is not None:
            self.unknown.add(awaited)
        self.place.file("statements.json").unlink(missing_ok=True)
        self.restart(leaps=False)

    def state(self) -> None:
        """Sign, and have the coordinator keep it; handed in twice it is the same."""
        self.statements.state()
        while (made := self.statements.next) is not None:
            for _ in range(2):
                stating.take(pb.Statement.FromString(made.SerializeToString()), *self.ledger)
            self.stated_to = made.last
            self.statements.posted()

    @property
    def ledger(self) -> tuple[SqliteStore, Position]:
        return self.run.store, self.run.position


def after_three_rounds(folder: Path) -> Run:
    """A run in which everybody contributed to three rounds, and stated nothing."""
    run = Run(folder)
    for index in (1, 2, 3):
        run.end_round(index, {w.number: w.answer(index, index) for w in run.workers})
        for worker in run.workers:
            worker.catch_up(leaps=False)
    return run
