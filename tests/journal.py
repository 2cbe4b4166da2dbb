"""What a worker's process saw and sent, line by line in a file that outlives kill -9.

`record` is called in the worker's own process (tests/nursery.py); everything else compares such
journals, of all lives of all workers, with the ledger that is there in the end.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from lorand import ledger
from lorand.ledger import Position
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import ledgers
from lorand_coordinator.ledgers import Location


def record(path: Path) -> None:
    """Have this process's participant write down its entries and contributions from now on."""
    from lorand_worker.participant import Participant

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    catch_up, on_entry = Participant.catch_up, Participant.on_entry
    on_round_start = Participant.on_round_start

    def note(kind: str, *values: object) -> None:
        os.write(descriptor, json.dumps([kind, *values]).encode() + b"\n")

    def at(position: Position) -> None:
        note("at", position.next_sequence, position.head.hex())

    def catching_up(self: Participant, position: Position) -> None:
        catch_up(self, position)
        at(position)

    def entering(self: Participant, body: bytes) -> pb.Entry:
        entry = on_entry(self, body)
        at(self.position)
        if entry.HasField("commit"):
            note("commit", entry.round_index, list(entry.commit.workers))
        return entry

    def answering(self: Participant, start: wire.RoundStart) -> wire.ParticipateRequest:
        answer = on_round_start(self, start)
        if answer.HasField("contribution"):
            # Before it leaves: what was killed in between may or may not have left.
            note("sent", start.round_index, self.worker, digest_of(answer.contribution))
        return answer

    Participant.catch_up = catching_up  # type: ignore[method-assign]
    Participant.on_entry = entering  # type: ignore[method-assign]
    Participant.on_round_start = answering  # type: ignore[method-assign]
    note("began")


def digest_of(contribution: pb.Contribution) -> str:
    """Return the digest of what was sent, or of what is stored."""
    return hashlib.sha256(contribution.SerializeToString(deterministic=True)).hexdigest()


@dataclass
class Journal:
    """What one worker saw and sent in all its lives, as far as it was read."""

    path: Path
    lives: int = 0
    heads: dict[int, set[str]] = field(default_factory=dict)
    """Digests of the history by number of entries; more than one is a fork."""
    commits: dict[int, set[int]] = field(default_factory=dict)
    """Workers whose contributions were acknowledged, by round."""
    sent: dict[int, set[str]] = field(default_factory=dict)
    numbers: set[int] = field(default_factory=set)
    """What the coordinator called this worker; more than one is a member twice."""
    _read: int = 0

    def follow(self) -> int:
        """Read what is new; return the largest number of entries that were seen."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read += len(whole)
            for line in whole.splitlines():
                self._take(*json.loads(line))
        return max(self.heads, default=0)

    def saw(self, entries: int, head: str) -> None:
        """Note a history that was shown."""
        self.heads.setdefault(entries, set()).add(head)

    def _take(self, kind: str, *values: object) -> None:
        match kind, *values:
            case "began", *_:
                self.lives += 1
            case "at", int(count), str(head):
                self.saw(count, head)
            case "commit", int(index), list(workers):
                self.commits.setdefault(index, set()).update(workers)
            case "sent", int(index), int(number), str(digest):
                self.sent.setdefault(index, set()).add(digest)
                self.numbers.add(number)
            case _:
                raise AssertionError(f"no line of a journal: {kind} {values}")

    @property
    def acknowledged(self) -> set[int]:
        """Rounds in which this worker's contribution was acknowledged to it."""
        return {index for index, workers in self.commits.items() if workers & self.numbers}


@dataclass(frozen=True)
class Compared:
    """What journals say against a ledger. All but `acknowledged` must be 0."""

    acknowledged: int
    lost: int
    """Acknowledged, and not in the ledger as it was sent; and rounds without an outcome."""
    twice: int
    """Rounds with two outcomes, a worker twice in one, members twice, answers that changed."""
    forked: int
    """Histories that were shown and are not the beginning of the ledger."""


def rows_of(location: Location) -> Iterator[tuple[bytes, list[pb.StoredContribution]]]:
    """Yield a ledger's entries, each with its stored contributions."""
    with closing(ledgers.reader(location)) as store:
        for sequence, body in enumerate(store.entries()):
            parts = store.contributions(sequence)
            yield body, [pb.StoredContribution.FromString(part) for part in parts]


def compare(
    journals: Iterable[Journal],
    rows: Iterable[tuple[bytes, list[pb.StoredContribution]]],
    *,
    repeats: bool = False,
) -> Compared:
    """Compare what workers saw with the ledger's entries, each with its stored contributions.

    `repeats` says that workers owe the same answer to a round in every life (error feedback).
    """
    heads, head = {0: ledger.GENESIS.hex()}, ledger.GENESIS
    stored: dict[tuple[int, int], str] = {}
    outcomes: set[int] = set()
    acknowledged = lost = twice = forked = 0
    for count, (body, parts) in enumerate(rows, 1):
        head = ledger.entry_digest(head, body)
        heads[count] = head.hex()
        entry = ledger.parse(body)
        if entry.WhichOneof("kind") in ("commit", "abandon"):
            twice += entry.round_index in outcomes
            outcomes.add(entry.round_index)
        for part in parts:
            place = (entry.round_index, part.worker)
            twice += place in stored or part.contribution.round_index != entry.round_index
            stored[place] = digest_of(part.contribution)
    lost += max(outcomes, default=0) - len(outcomes)
    for journal in journals:
        twice += max(0, len(journal.numbers) - 1)
        twice += repeats and sum(len(answers) > 1 for answers in journal.sent.values())
        forked += sum(seen != {heads.get(count)} for count, seen in journal.heads.items())
        for index in journal.acknowledged:
            found = {stored.get((index, number)) for number in journal.numbers}
            acknowledged += 1
            lost += not found & journal.sent.get(index, set())
    return Compared(acknowledged, lost, twice, forked)
