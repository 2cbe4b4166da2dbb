"""Where the members of a run are kept: rows in a file, or in a database that coordinators share.

Both take the same SQL, with ? for a value; rows hold the name of their run, which is empty in a
file, since that is of one run. A row is replaced by deleting it first.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from lorand_coordinator.store import StoreUnavailable

TABLES: Final = {
    "member": ("name", "role", "serial", "serial_before", "expires", "revoked"),
    "invitation": ("name", "role", "token_hash", "expires"),
    "coordinator": ("serial", "expires"),
}
"""What is kept of who may do what; beside it `served`, where members come to enrol."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS member (
    run TEXT NOT NULL, name TEXT NOT NULL, role TEXT NOT NULL, serial TEXT NOT NULL,
    serial_before TEXT NOT NULL, expires REAL NOT NULL, revoked INTEGER NOT NULL,
    PRIMARY KEY (run, name));
CREATE TABLE IF NOT EXISTS invitation (
    run TEXT NOT NULL, name TEXT NOT NULL, role TEXT NOT NULL, token_hash BLOB NOT NULL,
    expires REAL NOT NULL, PRIMARY KEY (run, name));
CREATE TABLE IF NOT EXISTS coordinator (
    run TEXT NOT NULL, serial TEXT NOT NULL, expires REAL NOT NULL, PRIMARY KEY (run, serial));
CREATE TABLE IF NOT EXISTS served (
    run TEXT PRIMARY KEY, address TEXT NOT NULL, enrolment TEXT NOT NULL);
"""


class Cursor(Protocol):
    """What a statement gave."""

    @property
    def rowcount(self) -> int:
        """How many rows it wrote."""

    def fetchone(self) -> Any:
        """Return the next row; None at the end."""

    def fetchall(self) -> list[Any]:
        """Return all rows."""


class Execute(Protocol):
    """Runs a statement."""

    def __call__(self, query: str, values: Sequence[object] = (), /) -> Cursor:
        """Run it with a value for each ?."""


class Rows(Protocol):
    """The rows of one run. Everything raises StoreUnavailable when they cannot be reached."""

    run: str

    def reading(self) -> AbstractContextManager[Execute]:
        """Yield what reads."""

    def writing(self) -> AbstractContextManager[Execute]:
        """Yield what writes, alone: one transaction, durable at its end, undone by an error."""

    def version(self) -> int:
        """Return a number that is another one when another process has written."""

    def close(self) -> None:
        """Let go of file or database."""


def row_of(execute: Execute, table: str, run: str, key: str) -> Any:
    """Return the row of a key, which is the first column; None: there is none."""
    query = f"SELECT {_columns(table)} FROM {table} WHERE run = ? AND {TABLES[table][0]} = ?"
    return execute(query, (run, key)).fetchone()


def rows_of(execute: Execute, table: str, run: str) -> list[Any]:
    """Return all rows of a run."""
    return execute(f"SELECT {_columns(table)} FROM {table} WHERE run = ?", (run,)).fetchall()


def insert(execute: Execute, table: str, run: str, values: Sequence[object]) -> None:
    """Add a row, whose key must not be there."""
    places = ", ".join("?" * len(values))
    query = f"INSERT INTO {table} ({_columns(table)}, run) VALUES ({places}, ?)"
    execute(query, (*values, run))


def _columns(table: str) -> str:
    return ", ".join(TABLES[table])


class FileRows:
    """Rows in an SQLite file, shared by `serve` and the other commands of one machine."""

    run = ""

    def __init__(self, path: Path) -> None:
        """Open or create the file."""
        self._path = path
        with self._trouble():
            self._database = sqlite3.connect(
                path, isolation_level=None, timeout=5, check_same_thread=False
            )
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._upgrade()
            self._database.executescript(_SCHEMA)

    def _upgrade(self) -> None:
        """Name the run, as none, in a file from before there were databases."""
        with self.writing() as execute:
            columns = [row[1] for row in execute("PRAGMA table_info(member)").fetchall()]
            if not columns or "run" in columns:
                return
            execute("DROP TABLE IF EXISTS served")  # `serve` writes it when it starts
            for table in TABLES:
                if execute(f"PRAGMA table_info({table})").fetchall():
                    execute(f"ALTER TABLE {table} ADD COLUMN run TEXT NOT NULL DEFAULT ''")

    @contextmanager
    def reading(self) -> Iterator[Execute]:
        """See Rows."""
        with self._trouble():
            yield self._database.execute

    @contextmanager
    def writing(self) -> Iterator[Execute]:
        """See Rows."""
        with self._trouble():
            self._database.execute("BEGIN IMMEDIATE")
            with self._database:
                yield self._database.execute

    def version(self) -> int:
        """See Rows; this process's own writes do not count."""
        with self.reading() as execute:
            return int(execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreUnavailable(f"{error}; see to the members' file {self._path}") from error
