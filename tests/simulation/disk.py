"""The coordinator's disk: a real SQLite file that outlives its process, and what can go wrong.

Faults are injected where SQLite commits, so everything above it, the store included, is real.
"""

import random
import shutil
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any, Final, Literal

from lorand_coordinator.store import SqliteStore

Fault = Literal[
    "full", "told it failed", "told and blind", "crash before", "crash during", "crash after"
]
CRASHES: Final[tuple[Fault, ...]] = ("crash before", "crash during", "crash after")
FAULTS: Final[tuple[Fault, ...]] = ("full", "told it failed", *CRASHES)
PLANNED: Final[tuple[Fault, ...]] = (*FAULTS, "told and blind")
"""Also: done, told otherwise, and nothing can be read to find out."""


class Crash(BaseException):
    """The coordinator's process ends here; no code of it runs after this."""


class Disk:
    """The files of one ledger.

    `full` and `lying` are conditions, `next_crash` happens once; `plan` says what happens to which
    transaction of all, counted from 0.
    """

    forgets = False
    """Whether a crash undoes the last write: no disk that the ledger could be safe on."""

    def __init__(self, folder: Path, template: Path, rng: random.Random) -> None:
        """Begin with a copy of an empty ledger (making one waits for a real disk)."""
        self.full = False
        self.lying = False
        self.next_crash: Fault | None = None
        self.plan: dict[int, Fault] = {}
        self.transactions = 0
        self.blind = False
        self.faults: Counter[str] = Counter()
        self._folder, self._rng = folder, rng
        self._copies = 0
        self._log_before = b""
        self._path = folder / "0.ledger"
        shutil.copy(template, self._path)

    def open(self) -> "SimulatedStore":
        """Return a store on what is on the disk, as a new process does."""
        store = SimulatedStore(self._path)
        store.connection.disk = self
        store.connection.execute("PRAGMA synchronous = OFF")  # nobody pulls the plug here
        return store

    def crash(self, store: SqliteStore, crashed: Fault | None = None) -> None:
        """Keep what a kill -9 leaves: the bytes written so far, the last write perhaps torn."""
        self._copies += 1
        target = self._folder / f"{self._copies}.ledger"
        shutil.copy(self._path, target)
        log = self._read_log()
        if crashed == "crash during":
            log = self._torn(self._log_before, log)
        elif self.forgets:
            log = self._log_before
        self._log(target).write_bytes(log)
        store.close()
        for old in self._folder.glob(self._path.name + "*"):
            old.unlink()
        self._path = target

    def heal(self) -> None:
        """Work from now on."""
        self.full = self.lying = False
        self.next_crash = None

    def fate(self) -> Fault | None:
        """Return what happens to the transaction that is about to commit."""
        fault: Fault | None = self.plan.get(self.transactions)
        self.transactions += 1
        self.blind = fault == "told and blind"
        if fault is not None:
            pass
        elif self.next_crash is not None:
            fault, self.next_crash = self.next_crash, None
        elif self.full:
            fault = "full"
        elif self.lying:
            fault = self._rng.choice(["full", "told it failed", None])
        if fault is not None:
            self.faults[fault] += 1
        return fault

    def commit(self, database: sqlite3.Connection, fault: Fault | None) -> None:
        """Commit; keep what SQLite's log was before where that is wanted."""
        if self.forgets or fault == "crash during":
            self._log_before = self._read_log()
        database.commit()

    def _log(self, path: Path) -> Path:
        return path.with_name(path.name + "-wal")

    def _read_log(self) -> bytes:
        log = self._log(self._path)
        return log.read_bytes() if log.exists() else b""

    def _torn(self, before: bytes, after: bytes) -> bytes:
        """Return a log of which only some of the last write reached the disk."""
        changed = next(i for i, b in enumerate(after) if before[i : i + 1] != bytes([b]))
        cut = self._rng.randrange(changed, len(after))
        return after[:cut] + before[cut:]


class FaultyConnection(sqlite3.Connection):
    """A connection on a simulated disk."""

    disk: Disk | None = None

    def execute(self, query: str, *parameters: Any) -> sqlite3.Cursor:
        """Run a query; just after a lie there may be no answer, once."""
        if self.disk is not None and self.disk.blind and query.startswith("SELECT"):
            self.disk.blind = False
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(query, *parameters)

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> Literal[False]:
        """Commit, fail, or be the last thing the process did."""
        if self.disk is None or kind is not None:
            return super().__exit__(kind, value, traceback)
        fault = self.disk.fate()
        if fault in ("full", "crash before"):
            self.rollback()
        else:
            self.disk.commit(self, fault)
        if fault in CRASHES:
            raise Crash(fault)
        if fault is not None:
            told = "database or disk is full" if fault == "full" else "disk I/O error"
            raise sqlite3.OperationalError(told)
        return False


class SimulatedStore(SqliteStore):
    """The real store on a faulty connection."""

    connection: FaultyConnection

    def _open(self, read_only: bool) -> sqlite3.Connection:
        assert not read_only
        self.connection = sqlite3.connect(
            self._path, isolation_level=None, factory=FaultyConnection
        )
        return self.connection
