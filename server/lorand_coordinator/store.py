"""Where the ledger lives: the contract of stores, and one SQLite file that keeps it.

An entry is durable before anyone sees it: WAL with synchronous=FULL, one transaction an entry with
its contributions and, where there is a signer, the signature of the history up to it. The hash
chain is computed here and checked as a whole when a store is opened. PostgreSQL keeps the same
contract in `store_postgres`.
"""

import fcntl
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, Protocol

from lorand import merkle
from lorand.errors import LedgerError
from lorand.heads import Head, Signature
from lorand.ledger import GENESIS, entry_digest
from lorand.merkle import Tree
from lorand.v1 import ledger_pb2 as pb

PAGE: Final = 512
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS entry (
    sequence INTEGER PRIMARY KEY, body BLOB NOT NULL, digest BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS contribution (
    sequence INTEGER NOT NULL, position INTEGER NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (sequence, position)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS signature (
    sequence INTEGER PRIMARY KEY, key BLOB NOT NULL, value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS statement (
    worker INTEGER NOT NULL, sequence INTEGER NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (worker, sequence)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS checkpoint (
    sequence INTEGER PRIMARY KEY, head BLOB NOT NULL, committed INTEGER NOT NULL,
    coefficients BLOB NOT NULL, state BLOB NOT NULL);
"""
_APPLICATION_ID: Final = 0x4C6F5261  # "LoRa": marks the file as a LoRand ledger


Signer = Callable[[Head], Signature]
"""Signs the history that ends with the entry about to be written."""


class Record(NamedTuple):
    """What a store keeps of an entry; the signature is of the history up to it, if it has one."""

    body: bytes
    contributions: Sequence[bytes]
    signature: Signature | None


class Stated(NamedTuple):
    """A worker's statement as it is kept, serialised; `sequence` is the last it is about."""

    worker: int
    sequence: int
    body: bytes


class StoreUnavailable(LedgerError):
    """Nothing was written; trying again later may help (disk full, I/O error)."""


@dataclass(frozen=True)
class Checkpoint:
    """A and the optimizer's state (opaque here) after entry `sequence`, whose digest is `head`."""

    sequence: int
    head: bytes
    committed: int
    coefficients: bytes
    state: bytes


class Store(Protocol):
    """An append-only, hash-chained list of entries, their contributions, and checkpoints.

    `tree` has the hash of every entry; `signer`, where set, signs every history that is written.
    """

    tree: Tree
    signer: Signer | None

    def append(self, entry: pb.Entry, contributions: Sequence[bytes] = ()) -> tuple[bytes, bytes]:
        """Give the entry its sequence and make it durable; return (body, digest).

        Raises StoreUnavailable when nothing was written.
        """

    def load(
        self,
        records: Iterable[Record],
        checkpoint: Checkpoint | None,
        statements: Iterable[Stated] = (),
    ) -> None:
        """Fill an empty store with another's history, whole or not at all.

        Raises LedgerError when it is not empty, StoreUnavailable when nothing was written.
        """

    def __len__(self) -> int:
        """Number of entries."""

    def head(self) -> bytes:
        """Digest of the last entry, or GENESIS."""

    def digest(self, sequence: int) -> bytes:
        """Digest of an entry; of −1: GENESIS."""

    def entries(self, start: int = 0, limit: int | None = None) -> Iterator[bytes]:
        """Yield bodies from a sequence on, in order."""

    def contributions(self, sequence: int) -> list[bytes]:
        """Return the contributions stored with a commit."""

    def signature(self, sequence: int) -> Signature | None:
        """Return the signature of the history that an entry ends, if it was signed."""

    def keep(self, stated: Stated) -> None:
        """Make a statement durable, of entries that are there.

        Raises StoreUnavailable when nothing was written, also where there is one of this worker
        and sequence.
        """

    def statements(self) -> Iterator[Stated]:
        """Yield all statements, a worker's after another's, each worker's in order."""

    def last_stated(self, worker: int) -> Stated | None:
        """Return a worker's newest statement."""

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, and of the older ones only the one before."""

    def newest_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint nearest to the head."""

    def close(self) -> None:
        """Release the file, or the connection."""


def serialised(entry: pb.Entry, sequence: int) -> bytes:
    """Return the body of an entry at a place in the ledger; the argument is left alone."""
    numbered = pb.Entry()
    numbered.CopyFrom(entry)
    numbered.sequence = sequence
    return numbered.SerializeToString(deterministic=True)


def check_empty(store: Store, place: str) -> None:
    """Raise LedgerError when a store that is to be filled holds entries."""
    if len(store):
        raise LedgerError(
            f"{place} holds {len(store)} entries already; restore to another place, or move them "
            "away first"
        )


def signed(store: Store, body: bytes, digest: bytes) -> Signature | None:
    """Return the signature of a store's history with one more entry; None without a signer."""
    if store.signer is None:
        return None
    root = store.tree.frontier().add(merkle.leaf_hash(body)).root()
    return store.signer(Head(len(store) + 1, root, digest))


def check_chain(rows: Iterable[tuple[Any, ...]], place: str, what: str) -> tuple[Tree, bytes]:
    """Return the tree of the entries and the digest of the last.

    A row is sequence, body and digest. Raises LedgerError where the chain breaks: `place` and
    `what` ("file was") say in which ledger.
    """
    head, tree = GENESIS, Tree()
    for sequence, body, digest in rows:
        if not (
            sequence == len(tree)
            and isinstance(body, bytes)
            and isinstance(digest, bytes)
            and entry_digest(head, body) == digest
        ):
            raise LedgerError(
                f"{place}: the hash chain breaks at entry {len(tree)}; the {what} damaged or "
                "edited: restore it from a backup"
            )
        tree.add(merkle.leaf_hash(body))
        head = digest
    return tree, head


class SqliteStore:
    """The ledger in one SQLite file, or in memory (`:memory:`) for tests."""

    def __init__(self, path: Path | str, *, read_only: bool = False) -> None:
        """Open or create. Raises LedgerError when it is in use, damaged or no ledger."""
        self.signer: Signer | None = None
        self._path = str(path)
        self._lock: IO[bytes] | None = None
        if read_only and not Path(path).exists():
            raise LedgerError(f"there is no ledger at {path}")
        if not read_only and self._path != ":memory:":
            self._lock = _lock(Path(path))
        with ExitStack() as undo:
            if self._lock is not None:
                undo.callback(self._lock.close)
            try:
                self._database = self._open(read_only)
                undo.callback(self._database.close)
                self._prepare(read_only)
                self._head = self._check_chain()
            except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter: a damaged schema
                raise LedgerError(
                    f"{path} cannot be used as a ledger: {error}; restore it from a backup, or "
                    "move it away to start a new run"
                ) from error
            undo.pop_all()

    def _open(self, read_only: bool) -> sqlite3.Connection:
        if read_only:
            uri = Path(self._path).resolve().as_uri() + "?mode=ro"
            return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=5)
        return sqlite3.connect(self._path, isolation_level=None, timeout=5, check_same_thread=False)

    def _prepare(self, read_only: bool) -> None:
        database = self._database
        found = database.execute("PRAGMA application_id").fetchone()[0]
        tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if found != _APPLICATION_ID and (tables or read_only):
            raise sqlite3.DatabaseError("it is a database of another program")
        if not read_only:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            if found != _APPLICATION_ID:  # before the tables: a crash between leaves a ledger
                database.execute(f"PRAGMA application_id={_APPLICATION_ID}")
            database.executescript(_SCHEMA)

    def _check_chain(self) -> bytes:
        rows = self._database.execute("SELECT sequence, body, digest FROM entry ORDER BY sequence")
        self.tree, head = check_chain(rows, self._path, "file was")
        self._count = len(self.tree)
        self._check_end(self._count)
        return head

    def _check_end(self, count: int) -> None:
        """Raise LedgerError when entries are missing at the end: a chain cannot tell."""
        kept = ["contribution", "checkpoint", *["statement"] * self._has_table("statement")]
        found = "SELECT 1 FROM {} WHERE sequence >= ?1"
        if self._rows(" UNION ALL ".join(map(found.format, kept)) + " LIMIT 1", count):
            raise LedgerError(
                f"{self._path}: entries are missing from {count} on; the file was damaged or "
                "edited: restore it from a backup"
            )

    def append(self, entry: pb.Entry, contributions: Sequence[bytes] = ()) -> tuple[bytes, bytes]:
        """See Store.append."""
        body = serialised(entry, self._count)
        digest = entry_digest(self._head, body)
        try:
            record = Record(body, contributions, signed(self, body, digest))
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                self._insert(self._count, record, digest)
        except sqlite3.Error as error:
            if not self._has(digest):
                raise StoreUnavailable(f"{error}; free space at {self._path}") from error
        self._head, self._count = digest, self._count + 1
        self.tree.add(merkle.leaf_hash(body))
        return body, digest

    def _insert(self, sequence: int, record: Record, digest: bytes) -> None:
        row = (sequence, record.body, digest)
        self._database.execute("INSERT INTO entry VALUES (?, ?, ?)", row)
        self._database.executemany(
            "INSERT INTO contribution VALUES (?, ?, ?)",
            [(sequence, i, part) for i, part in enumerate(record.contributions)],
        )
        if record.signature is not None:
            signature = (sequence, record.signature.key, record.signature.value)
            self._database.execute("INSERT INTO signature VALUES (?, ?, ?)", signature)

    def load(
        self,
        records: Iterable[Record],
        checkpoint: Checkpoint | None,
        statements: Iterable[Stated] = (),
    ) -> None:
        """See Store."""
        check_empty(self, self._path)
        tree, head = Tree(), GENESIS
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                for record in records:
                    head = entry_digest(head, record.body)
                    self._insert(len(tree), record, head)
                    tree.add(merkle.leaf_hash(record.body))
                self._database.executemany("INSERT INTO statement VALUES (?, ?, ?)", statements)
        except sqlite3.Error as error:
            raise StoreUnavailable(f"{error}; free space at {self._path}") from error
        self.tree, self._count, self._head = tree, len(tree), head
        if checkpoint is not None:
            self.save_checkpoint(checkpoint)

    def _has(self, digest: bytes) -> bool:
        """Whether the next entry is there already: a commit that reported failure may be done."""
        try:
            row = self._database.execute(
                "SELECT digest FROM entry WHERE sequence = ?", (self._count,)
            ).fetchone()
        except sqlite3.Error:
            return False
        return not self._database.in_transaction and row is not None and row[0] == digest

    def __len__(self) -> int:
        """See Store."""
        return self._count

    def head(self) -> bytes:
        """See Store."""
        return self._head

    def digest(self, sequence: int) -> bytes:
        """See Store."""
        if sequence < 0:
            return GENESIS
        rows = self._rows("SELECT digest FROM entry WHERE sequence = ?", sequence)
        if not rows:
            raise LedgerError(f"{self._path} has no entry {sequence}; restore it from a backup")
        return bytes(rows[0][0])

    def entries(self, start: int = 0, limit: int | None = None) -> Iterator[bytes]:
        """See Store. Reads in pages, so that a long history is never in memory whole."""
        stop = self._count if limit is None else min(self._count, start + limit)
        while start < stop:
            rows = self._rows(
                "SELECT body FROM entry WHERE sequence >= ? AND sequence < ? ORDER BY sequence",
                start,
                min(stop, start + PAGE),
            )
            if not rows:
                raise LedgerError(f"{self._path} lost entry {start}; restore it from a backup")
            for (body,) in rows:
                yield bytes(body)
            start += len(rows)

    def contributions(self, sequence: int) -> list[bytes]:
        """See Store."""
        rows = self._rows(
            "SELECT body FROM contribution WHERE sequence = ? ORDER BY position", sequence
        )
        return [bytes(body) for (body,) in rows]

    def signature(self, sequence: int) -> Signature | None:
        """See Store."""
        if not self._has_table("signature"):
            return None
        rows = self._rows("SELECT key, value FROM signature WHERE sequence = ?", sequence)
        return Signature(bytes(rows[0][0]), bytes(rows[0][1])) if rows else None

    def keep(self, stated: Stated) -> None:
        """See Store."""
        assert stated.sequence < self._count
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.execute("INSERT INTO statement VALUES (?, ?, ?)", stated)
        except sqlite3.Error as error:
            raise StoreUnavailable(f"{error}; free space at {self._path}") from error

    def statements(self) -> Iterator[Stated]:
        """See Store. Of a ledger in use: those of the entries that it had when it was opened."""
        if not self._has_table("statement"):
            return
        worker, sequence = -1, -1
        while rows := self._rows(
            "SELECT worker, sequence, CAST(body AS BLOB) FROM statement"
            " WHERE (worker, sequence) > (?, ?)"
            f" AND sequence < ? ORDER BY worker, sequence LIMIT {PAGE}",
            *(worker, sequence, self._count),
        ):
            for worker, sequence, body in rows:
                yield Stated(worker, sequence, bytes(body))

    def last_stated(self, worker: int) -> Stated | None:
        """See Store."""
        rows = self._rows(
            "SELECT worker, sequence, body FROM statement WHERE worker = ?"
            " ORDER BY sequence DESC LIMIT 1",
            worker,
        )
        return Stated(worker, rows[0][1], bytes(rows[0][2])) if rows else None

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """See Store."""
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.execute(
                    "INSERT OR REPLACE INTO checkpoint VALUES (?, ?, ?, ?, ?)",
                    (
                        checkpoint.sequence,
                        checkpoint.head,
                        checkpoint.committed,
                        checkpoint.coefficients,
                        checkpoint.state,
                    ),
                )
                self._database.execute(
                    "DELETE FROM checkpoint WHERE sequence NOT IN "
                    "(SELECT sequence FROM checkpoint ORDER BY sequence DESC LIMIT 2)"
                )
        except sqlite3.Error as error:
            raise StoreUnavailable(f"{error}; free space at {self._path}") from error

    def newest_checkpoint(self) -> Checkpoint | None:
        """See Store."""
        rows = self._rows("SELECT * FROM checkpoint ORDER BY sequence DESC LIMIT 1")
        if not rows:
            return None
        sequence, head, committed, coefficients, state = rows[0]
        return Checkpoint(sequence, bytes(head), committed, bytes(coefficients), bytes(state))

    def _has_table(self, name: str) -> bool:
        """Whether there is a table that a ledger of an older release, opened to read, lacks."""
        return bool(self._rows(f"SELECT 1 FROM sqlite_master WHERE name = '{name}'"))

    def _rows(self, query: str, *parameters: int) -> list[tuple[Any, ...]]:
        """Return what a query finds. Raises LedgerError for damage found on the way."""
        try:
            return self._database.execute(query, parameters).fetchall()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise LedgerError(
                f"{self._path} cannot be read: {error}; restore it from a backup"
            ) from error

    def close(self) -> None:
        """See Store."""
        self._database.close()
        if self._lock is not None:
            self._lock.close()


def in_use(path: Path) -> bool:
    """Return whether a coordinator has a ledger open at this moment."""
    try:
        with path.with_name(path.name + ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nobody ever had it
        return False
    return False


def _lock(path: Path) -> IO[bytes]:
    """Hold an exclusive lock as long as this process lives: one sequencer a ledger."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(path.name + ".lock").open("ab")
    except OSError as error:
        raise LedgerError(f"cannot write beside the ledger {path}: {error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise LedgerError(
            f"the ledger {path} is in use by another coordinator; stop that one first"
        ) from error
    return file
