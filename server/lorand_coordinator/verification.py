"""Checking a ledger offline: chain, every delta, contributions, tree, signatures, statements."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from lorand import ledger
from lorand.errors import LedgerError
from lorand.heads import Head, KeptHead, Signature
from lorand.ledger import Position
from lorand.privacy.roster import Members
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import ledgers
from lorand_coordinator.ledgers import Location
from lorand_coordinator.stating import Audit, Standing
from lorand_coordinator.store import Store


@dataclass(frozen=True)
class Verified:
    """Where a ledger ends, how much of it was checked, and whose signature its end has."""

    position: Position
    contributions: int
    signatures: int
    key: bytes | None
    standing: Standing | None = None
    """What its workers stand by, where they are known."""


class _Check:
    """Walks through a history; what is wrong with it is raised on the way."""

    def __init__(self, path: Location, kept: KeptHead | None) -> None:
        self._path, self._kept = path, kept
        self.signatures = 0
        self.key: bytes | None = None

    def signed(self, position: Position, signature: Signature | None) -> None:
        """Check the signature of the history so far."""
        self.key = None
        if signature is None:
            return
        if not signature.is_of(position.run_digest, position.history):
            raise LedgerError(
                f"{self._path}: the signature after entry {position.next_sequence - 1} is not of "
                "the entries up to it; the file was damaged or edited: restore it from a backup"
            )
        self.signatures += 1
        self.key = signature.key

    def seen(self, position: Position) -> None:
        """Compare the history so far with the one that a worker kept, where it is as long."""
        if self._kept is not None and position.next_sequence == self._kept.head.size:
            _compare(position.run_digest, position.history, self._kept)

    def end(self, position: Position | None, key: bytes | None) -> Position:
        """Check that the end is signed by this key, and that all that was kept is there."""
        if position is None:
            raise LedgerError(f"{self._path} has no entry")
        if key is not None and self.key != key:
            theirs = "not signed" if self.key is None else f"signed by {self.key.hex()}"
            raise LedgerError(
                f"the end of {self._path} is {theirs}, not by {key.hex()}; ask the coordinator's "
                "owner for the ledger or the key"
            )
        if self._kept is not None and position.next_sequence < self._kept.head.size:
            raise LedgerError(
                f"{self._path} has {position.next_sequence} entries, and {self._kept.head.size} "
                "were signed: entries were taken away"
            )
        return position


def _compare(run_digest: bytes, ours: Head, kept: KeptHead) -> None:
    if run_digest != kept.run_digest:
        raise LedgerError("the kept head is of another run than the ledger")
    if ours != kept.head:
        raise LedgerError(
            f"this is not the history of {kept.head.size} entries that {kept.signature.key.hex()} "
            "signed for a worker: its owner showed two histories, or somebody else has the key"
        )


def verify(
    path: Location,
    key: bytes | None = None,
    kept: KeptHead | None = None,
    roster: Members | None = None,
) -> Verified:
    """Check a ledger, in a store or exported; with a `key`, that its end is signed by it.

    With a head that a worker `kept`, that the ledger has the history that it is of; with the
    workers' `roster`, that it is what they signed. Contributions are checked where they are:
    exported ledgers have none. Raises LedgerError.
    """
    check = _Check(path, kept)
    if ledger.is_file(path):
        stated = ledger.file_statements(Path(path))
        audit = None if roster is None else Audit(roster, stated, contributions=False)
        position = _follow(ledger.read_file(Path(path)), check, audit)
        if position is not None:
            check.signed(position, ledger.file_signature(Path(path)))
        end = check.end(position, key)
        return Verified(end, 0, check.signatures, check.key, audit.end() if audit else None)
    with closing(ledgers.reader(path)) as store:
        bodies = (stated.body for stated in store.statements())
        audit = None if roster is None else Audit(roster, bodies, contributions=True)
        position, checked = None, 0
        for body in store.entries():
            position = ledger.apply(position or ledger.origin_of(body), body)
            check.signed(position, store.signature(position.next_sequence - 1))
            check.seen(position)
            entry = ledger.parse(body)
            parts = _contributions(store, entry)
            checked += len(parts)
            if audit is not None:
                audit.take(entry, parts, position)
        end = check.end(position, key)
        return Verified(end, checked, check.signatures, check.key, audit.end() if audit else None)


def _follow(bodies: Iterable[bytes], check: _Check, audit: Audit | None) -> Position | None:
    position = None
    for body in bodies:
        position = ledger.apply(position or ledger.origin_of(body), body)
        check.seen(position)
        if audit is not None:
            audit.take(ledger.parse(body), (), position)
    return position


def _contributions(store: Store, entry: pb.Entry) -> list[bytes]:
    """Return those of a commit, checked."""
    if not entry.HasField("commit"):
        return []
    parts = store.contributions(entry.sequence)
    ledger.check_contributions(entry, parts)
    return parts
