"""Statements of workers: what a coordinator takes and keeps, and what a ledger says of them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from typing import Final

from google.protobuf.message import DecodeError

from lorand import statements
from lorand.errors import HandshakeError, LedgerError
from lorand.ledger import Position
from lorand.privacy.roster import Members
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.store import Stated, Store

TOLD: Final = 5
"""Contradictions that one error names."""


def take(statement: pb.Statement, store: Store, position: Position) -> None:
    """Keep a statement, durably, of a caller who may make it; the same one again changes nothing.

    Whether it is right about the contributions is told by `Audit`, to those who have the roster.
    Raises HandshakeError where it cannot be one of this ledger, LedgerError where the store is
    away or cannot be read.
    """
    statement.DiscardUnknownFields()
    statements.check(position.run_digest, statement)
    if statement.last >= len(store) or statement.head != store.digest(statement.last):
        raise HandshakeError(
            f"the statement is of a history that ends with entry {statement.last}, and this "
            "ledger has another"
        )
    made = Stated(statement.worker, statement.last, statement.SerializeToString(deterministic=True))
    last = store.last_stated(statement.worker)
    if last == made:
        return
    if last is not None and statement.first <= last.sequence:
        raise HandshakeError(
            f"worker {statement.worker} has stated its contributions up to entry {last.sequence} "
            f"already, and this statement begins with {statement.first}: another process has its "
            "name, or its --state is an old copy"
        )
    store.keep(made)


@dataclass
class Unstated:
    """Contributions of a worker that it does not stand by, in rounds from first to last."""

    worker: int
    name: str
    contributions: int
    first_round: int
    last_round: int


@dataclass(frozen=True)
class Standing:
    """What of a ledger its workers stand by: so many statements, of so many contributions."""

    statements: int
    stated: int
    unstated: tuple[Unstated, ...]


@dataclass
class _Range:
    """A statement, and what the ledger has of its worker in that range, so far."""

    statement: pb.Statement
    digest: bytes = statements.NOTHING
    rounds: list[int] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        entries = f"entries {self.statement.first} to {self.statement.last}"
        if not self.rounds:
            return entries
        return f"rounds {self.rounds[0]} to {self.rounds[-1]} ({entries})"


class Audit:
    """Compares a ledger with what its workers signed, entry by entry.

    Who they are says the auditor's roster, not the coordinator. What is wrong is raised at the
    `end`, so that whose contributions were changed is told, and not who signed the history after.
    """

    def __init__(self, roster: Members, bodies: Iterable[bytes], *, contributions: bool) -> None:
        """Take all statements of a ledger, which comes with or without contributions.

        Raises LedgerError where they cannot be read.
        """
        self._keys, self._contributions = dict(roster.members), contributions
        self._names: dict[int, str] = {}
        self._next: dict[int, list[_Range]] = defaultdict(list)
        self._ending: dict[int, list[_Range]] = defaultdict(list)
        self._unstated: list[Unstated] = []
        self._running: dict[int, Unstated] = {}
        self._contradicted: list[str] = []
        self._elsewhere: list[str] = []
        self._statements = self._stated = 0
        for body in bodies:
            try:
                statement = pb.Statement.FromString(body)
            except DecodeError as error:
                raise LedgerError(f"a statement of a worker cannot be read: {error}") from error
            made = _Range(statement)
            self._next[statement.worker].append(made)
            self._ending[statement.last].append(made)
        for worker, ranges in self._next.items():
            ranges.sort(key=lambda made: made.statement.last, reverse=True)  # the next one is last
            for later, earlier in pairwise(made.statement for made in ranges):
                if later.first <= earlier.last:
                    raise LedgerError(f"two statements of worker {worker} are of the same entries")

    def take(self, entry: pb.Entry, contributions: Sequence[bytes], position: Position) -> None:
        """Take an entry with the contributions that are stored with it, and where it leads."""
        if entry.HasField("member"):
            self._names[entry.member.worker] = entry.member.name
        for body in contributions:
            try:
                worker = pb.StoredContribution.FromString(body).worker
            except DecodeError as error:
                raise LedgerError(
                    f"a contribution of entry {entry.sequence} cannot be read: {error}"
                ) from error
            self._contribution(worker, entry, body)
        for made in self._ending.pop(entry.sequence, ()):
            self._next[made.statement.worker].remove(made)
            self._compare(made, position)

    def _contribution(self, worker: int, entry: pb.Entry, body: bytes) -> None:
        name, ranges = self._names.get(worker, ""), self._next.get(worker)
        if name in self._keys and ranges and ranges[-1].statement.first <= entry.sequence:
            made = ranges[-1]
            made.digest = statements.after(made.digest, entry.sequence, sha256(body).digest())
            made.rounds.append(entry.round_index)
            self._running.pop(worker, None)
            return
        run = self._running.get(worker)
        if run is None:
            run = Unstated(worker, name, 0, entry.round_index, entry.round_index)
            self._running[worker] = run
            self._unstated.append(run)
        run.contributions += 1
        run.last_round = entry.round_index

    def _compare(self, made: _Range, position: Position) -> None:
        """Compare a statement with the history that ends where it does."""
        statement = made.statement
        key, who = self._keys.get(self._names.get(statement.worker, "")), self._who(statement)
        if key is None:
            return  # nobody whom the auditor knows: nothing is stated by it
        if statement.key != key:
            self._contradicted.append(
                f"the statement of {who} for {made.place} is signed by {statement.key.hex()}, and "
                f"the roster has {key.hex()}"
            )
            return
        try:
            statements.check(position.run_digest, statement)
        except HandshakeError as error:
            self._contradicted.append(f"a statement of {who} for {made.place}: {error}")
            return
        if self._contributions and statement.contributions != made.digest:
            self._contradicted.append(f"{who} signed other contributions for {made.place}")
        elif statement.head != position.head:
            self._elsewhere.append(f"{who} signed another history up to entry {statement.last}")
        else:
            self._statements += 1
            self._stated += len(made.rounds)

    def _who(self, statement: pb.Statement) -> str:
        return f"worker {statement.worker} ({self._names.get(statement.worker, '')!r})"

    def end(self) -> Standing:
        """Return what the workers stand by. Raises LedgerError where they say otherwise."""
        self._elsewhere += [
            f"{self._who(made.statement)} signed a history of more entries, up to {last}"
            for last, ending in self._ending.items()
            for made in ending
        ]
        wrong = self._contradicted or self._elsewhere
        if wrong:
            more = f"; and {len(wrong) - TOLD} more" * (len(wrong) > TOLD)
            raise LedgerError(
                f"this ledger is not what its workers signed: {'; '.join(wrong[:TOLD])}{more}. "
                "Either somebody with the coordinator's key changed it, or they signed what they "
                "did not send: ask the coordinator's owner, and them"
            )
        return Standing(self._statements, self._stated, tuple(self._unstated))
