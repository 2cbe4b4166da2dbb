"""Which store a ledger is in: a file's path, or the URL of a PostgreSQL database.

A database holds the ledgers of many runs. `postgresql://…#RUN` names one; a coordinator knows its
run's name anyway, and a reader needs none where there is one run.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Final

from lorand.errors import ConfigError
from lorand_coordinator.store import SqliteStore, Store

if TYPE_CHECKING:  # the library behind it is an extra
    from lorand_coordinator.store_postgres import PostgresStore

Location = str | Path
SCHEMES: Final = ("postgresql://", "postgres://")


def in_database(location: Location) -> bool:
    """Whether a location is a database's URL, not a file."""
    return str(location).startswith(SCHEMES)


def reader(location: Location) -> Store:
    """Open a ledger that may be in use. Raises LedgerError, or ConfigError without psycopg."""
    if in_database(location):
        return _postgres()(str(location), read_only=True)
    return SqliteStore(location, read_only=True)


def database(url: str, run: str, leader: str) -> "PostgresStore":
    """Take a run over in a database; see PostgresStore. Raises ConfigError without psycopg."""
    return _postgres()(url, run, leader=leader)


def _postgres() -> "type[PostgresStore]":
    try:
        from lorand_coordinator.store_postgres import PostgresStore
    except ImportError as error:
        raise ConfigError(
            "a ledger in PostgreSQL needs psycopg: pip install 'lorand[postgres]'"
        ) from error
    return PostgresStore
