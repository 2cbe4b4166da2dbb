"""A session with a PostgreSQL server: every wait has a limit, and what was lost is opened again.

Server and client both keep time. `statement_timeout` ends what a living server does for too long;
a server that is stopped, or behind a network that swallows packets, ends nothing, so the client
stops waiting by itself and gives the connection up.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Final, Protocol, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from lorand.errors import ConfigError, LedgerError
from lorand_coordinator.store import StoreUnavailable

CONNECT_S: Final = 5
STATEMENT_S: Final = 5
ANSWER_S: Final = 8
"""Longer than a statement may take: a server that lives answers that it ran out of time."""
RETRY_S: Final = 0.2
OLDEST_SERVER: Final = 140000
PASSWORD_FILE: Final = "LORAND_DATABASE_PASSWORD_FILE"
"""Names a file that holds the password, as containers are given secrets.

libpq's own .pgpass must be its owner's alone to read, which mounted secrets are not.
"""

_SETTINGS: Final = f"""
SET search_path = lorand;
SET synchronous_commit = on;
SET default_transaction_isolation = 'read committed';
SET statement_timeout = '{STATEMENT_S}s';
SET idle_in_transaction_session_timeout = '{STATEMENT_S}s';
"""
_Result = TypeVar("_Result", covariant=True)


class Connection(psycopg.Connection[TupleRow]):
    """A connection that waits ANSWER_S for an answer, then raises OperationalError."""

    def wait(
        self, gen: PQGen[_Result], interval: float = 0.1, timeout: float | None = ANSWER_S
    ) -> _Result:
        """See psycopg: everything but connecting comes through here."""
        return super().wait(gen, interval, timeout)


class Prepare(Protocol):
    """What a new connection needs before it is used. May raise LedgerError."""

    def __call__(self, connection: Connection) -> None:
        """Prepare it."""


class Session:
    """At most one connection at a time, opened when it is needed."""

    def __init__(self, url: str, prepare: Prepare) -> None:
        """Nothing is opened yet. Raises LedgerError when the URL cannot be read."""
        self._url, self._prepare = url, prepare
        self._connection: Connection | None = None
        self._retry_at = 0.0
        try:
            parts = conninfo_to_dict(url)
        except psycopg.Error as error:
            raise LedgerError(f"not a PostgreSQL URL: {_first_line(error)}") from error
        port = f":{parts['port']}" if parts.get("port") else ""
        self.name = f"postgresql://{parts.get('host') or ''}{port}/{parts.get('dbname') or ''}"
        """The database without user and password, for messages."""

    @contextmanager
    def use(self) -> Iterator[Connection]:
        """Yield a connection; one that fails is closed, for the next use to open another.

        Raises StoreUnavailable.
        """
        connection = self._open()
        try:
            yield connection
        except psycopg.Error as error:
            # Which errors leave a connection usable is not worth knowing: a new one costs little.
            self.close()
            raise StoreUnavailable(f"{self.name}: {_first_line(error)}") from error

    def _open(self) -> Connection:
        if self._connection is not None and not self._connection.closed:
            return self._connection
        began = time.monotonic()
        if began < self._retry_at:
            raise StoreUnavailable(f"{self.name} could not be reached; trying again soon")
        try:
            self._connection = self._connect()
        except psycopg.Error as error:
            # As long as the attempt took nobody was served: as long again others go first.
            now = time.monotonic()
            self._retry_at = now + max(RETRY_S, now - began)
            raise StoreUnavailable(
                f"{self.name} cannot be reached: {_first_line(error)}; check that the server runs, "
                "its address, user and database"
            ) from error
        return self._connection

    def _connect(self) -> Connection:
        # A replica may lag behind, or show a history that never was: the ledger is the primary's.
        connection = Connection.connect(
            self._url,
            password=_password(),
            autocommit=True,
            connect_timeout=CONNECT_S,
            target_session_attrs="read-write",
            application_name="lorand",
            client_encoding="utf8",  # a database without an encoding gives bytes otherwise
            tcp_user_timeout=ANSWER_S * 1000,
        )
        try:
            if connection.info.server_version < OLDEST_SERVER:
                raise LedgerError(f"{self.name} is older than PostgreSQL 14; upgrade the server")
            connection.execute(_SETTINGS)
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _password() -> str | None:
    """Return the password of the environment's file; None: libpq finds it. Raises ConfigError."""
    path = os.environ.get(PASSWORD_FILE)
    if not path:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the database's password ({PASSWORD_FILE}): {error}; write it there "
            "on one line, for the coordinator's user to read"
        ) from error


def migrate(connection: Connection) -> None:
    """Bring the schema to this release's, one coordinator at a time.

    Raises LedgerError when a newer release has been there.
    """
    steps = sorted(
        (file.name, file.read_text(encoding="utf-8"))
        for file in resources.files("lorand_coordinator").joinpath("migrations").iterdir()
        if file.name.endswith(".sql")
    )
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('lorand/schema', 0))")
        connection.execute("CREATE SCHEMA IF NOT EXISTS lorand")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS lorand.migration "
            "(name text PRIMARY KEY, applied timestamptz NOT NULL DEFAULT now())"
        )
        done = {name for (name,) in connection.execute("SELECT name FROM lorand.migration")}
        unknown = done - {name for name, _ in steps}
        if unknown:
            raise LedgerError(
                f"the database was migrated by a newer release of lorand ({min(unknown)}); "
                "install that release here"
            )
        for name, statements in steps:
            if name not in done:
                connection.execute(statements.encode())
                connection.execute("INSERT INTO lorand.migration (name) VALUES (%s)", (name,))


def _first_line(error: psycopg.Error) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
