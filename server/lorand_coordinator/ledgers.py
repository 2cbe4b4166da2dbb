"""Which store a ledger is in: a file's path, or the URL of a PostgreSQL database.

A database holds the ledgers of many runs. `postgresql://…#RUN` names one; a coordinator knows its
run's name anyway, and a reader needs none where there is one run.
"""

from importlib import util
from pathlib import Path
from typing import Final

from lorand.errors import ConfigError
from lorand_coordinator.store import SqliteStore, Store

Location = str | Path
SCHEMES: Final = ("postgresql://", "postgres://")


def in_database(location: Location) -> bool:
    """Whether a location is a database's URL, not a file."""
    return str(location).startswith(SCHEMES)


def database(url: str, run: str, leader: str) -> Store:
    """Take a run over in a database; see PostgresStore. Raises ConfigError without psycopg."""
    check_installed()
    from lorand_coordinator.store_postgres import PostgresStore

    return PostgresStore(url, run, leader=leader)


def check_installed() -> None:
    """Raise ConfigError unless the client library of databases is there."""
    if util.find_spec("psycopg") is None:
        raise ConfigError("a ledger in PostgreSQL needs psycopg: pip install 'lorand[postgres]'")


def reader(location: Location) -> Store:
    """Open a ledger that may be in use. Raises LedgerError, or ConfigError without psycopg."""
    if not in_database(location):
        return SqliteStore(location, read_only=True)
    check_installed()
    from lorand_coordinator.store_postgres import PostgresStore

    return PostgresStore(str(location), read_only=True)
