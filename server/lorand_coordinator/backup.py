"""Copies of whole ledgers from any store to any other, with signatures, statements, a checkpoint.

A backup is a ledger in one SQLite file, whatever store it was made from: every command reads it,
and a coordinator can go on with it as it is. Both ways a copy is there whole or not at all.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from lorand import ledger
from lorand.errors import LedgerError
from lorand.ledger import Position
from lorand_coordinator import ledgers, verification
from lorand_coordinator.ledgers import Location
from lorand_coordinator.store import Record, SqliteStore, Store


def backup(source: Location, target: Path) -> Position:
    """Write a ledger that may be in use to a new file; return where the copy ends.

    Raises LedgerError when the source is damaged or the file is there already.
    """
    if ledger.is_file(source):
        raise LedgerError(
            f"{source} is an exported ledger, which has no contributions: no coordinator can go on "
            "with it; give the coordinator's own ledger or a backup of it"
        )
    if target.exists():
        raise LedgerError(f"{target} is there already; choose another name, or move it away")
    try:
        # Beside its place, so that it is moved there in one step, checked.
        with (
            closing(ledgers.reader(source)) as store,
            TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as folder,
        ):
            part = Path(folder) / target.name
            with closing(SqliteStore(part)) as copy:
                _copy(store, copy)
            position = verification.verify(part).position
            part.rename(target)
    except OSError as error:
        raise LedgerError(f"cannot write {target}: {error}") from error
    return position


def restore(source: Path, target: Location) -> Position:
    """Write a backup to a new file or into a database; return where the ledger ends.

    A database gets the run under the name in its config. Raises LedgerError when the target holds
    entries already, or a coordinator leads the run there.
    """
    if not ledgers.in_database(target):
        return backup(source, Path(target))
    position = verification.verify(source).position
    run = position.config.run.name
    url, _, named = str(target).partition("#")
    if named not in ("", run):
        raise LedgerError(f"{source} is of run {run!r}, not of {named!r}; leave out #{named}")
    with (
        closing(SqliteStore(source, read_only=True)) as store,
        closing(ledgers.database(url, run, "lr-coordinator ledger restore")) as copy,
    ):
        _copy(store, copy)
    return position


def _copy(source: Store, target: Store) -> None:
    count = len(source)
    checkpoint = source.newest_checkpoint()
    if checkpoint is not None and checkpoint.sequence >= count:
        checkpoint = None  # made since the source was opened, of entries that are not in the copy
    target.load(_records(source), checkpoint, source.statements())
    assert (len(target), target.head()) == (count, source.head())


def _records(source: Store) -> Iterator[Record]:
    for sequence, body in enumerate(source.entries()):
        yield Record(body, source.contributions(sequence), source.signature(sequence))
