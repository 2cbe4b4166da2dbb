"""The members of a run whose coordinators are on several machines: rows in PostgreSQL.

Each coordinator keeps what it read of them in memory, where every call is looked up, and asks once
a second whether there was a write (`Access.watch`). A call that would be refused asks first.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lorand.errors import ConfigError, HandshakeError
from lorand_coordinator import postgres
from lorand_coordinator.identity.members import (
    WALL,
    Clock,
    Member,
    Members,
    Peer,
    judge,
    judge_coordinator,
)
from lorand_coordinator.identity.rows import TABLES, Cursor, Execute, FileRows, insert, rows_of

# First in each transaction that writes: others wait for the row, and see another version then.
_WRITE: Final = "UPDATE membership SET version = version + 1 WHERE run = %s"
_CLAIM: Final = """
INSERT INTO membership (run, authority, version) VALUES (%s, %s, 1) ON CONFLICT (run) DO NOTHING"""


class DatabaseRows:
    """Rows of one run in a PostgreSQL database, beside its ledger or elsewhere."""

    def __init__(self, url: str, run: str) -> None:
        """Connect, and bring the schema to this release's. Raises StoreUnavailable, LedgerError."""
        self.run = run
        self._session = postgres.Session(url.partition("#")[0], postgres.migrate)
        with self._session.use():
            pass

    @property
    def name(self) -> str:
        """The database, for messages."""
        return self._session.name

    def members(self) -> "SharedMembers":
        """Return the members that are in these rows."""
        return SharedMembers(self)

    def claim(self, authority: str, before: Path) -> None:
        """Begin a run's members here, or see that they are this authority's (a fingerprint).

        Those of a file from `before` there was this database come along. Raises ConfigError.
        """
        with self._session.use() as connection, connection.transaction():
            if connection.execute(_CLAIM, (self.run, authority)).rowcount:
                if before.exists():
                    self._take_over(_executing(connection), before)
                return
        found = self.authority()
        if found != authority:
            raise ConfigError(
                f"the members of run {self.run!r} at {self.name} have another authority than this "
                "identity folder: copy authority.pem from where the run was first served"
            )

    def authority(self) -> str:
        """Return the fingerprint of the run's authority; empty: no members were begun here."""
        with self._session.use() as connection:
            query = "SELECT authority FROM membership WHERE run = %s"
            row = connection.execute(query, (self.run,)).fetchone()
        return "" if row is None else str(row[0])

    def _take_over(self, execute: Execute, path: Path) -> None:
        file = FileRows(path)
        try:
            with file.reading() as read:
                for table in TABLES:
                    for row in rows_of(read, table, file.run):
                        insert(execute, table, self.run, row)
        finally:
            file.close()

    @contextmanager
    def reading(self) -> Iterator[Execute]:
        """See Rows."""
        with self._session.use() as connection:
            yield _executing(connection)

    @contextmanager
    def writing(self) -> Iterator[Execute]:
        """See Rows."""
        with self._session.use() as connection, connection.transaction():
            connection.execute(_WRITE, (self.run,))
            yield _executing(connection)

    def version(self) -> int:
        """See Rows; every write counts."""
        with self._session.use() as connection:
            query = "SELECT version FROM membership WHERE run = %s"
            row = connection.execute(query, (self.run,)).fetchone()
        return 0 if row is None else int(row[0])

    def close(self) -> None:
        """Close the connection."""
        self._session.close()


def _executing(connection: postgres.Connection) -> Execute:
    def execute(query: str, values: Sequence[object] = (), /) -> Cursor:
        return connection.execute(query.replace("?", "%s").encode(), values)

    return execute


class SharedMembers(Members):
    """Members in a database. Who may call is answered from memory, a second old at most."""

    def __init__(self, rows: DatabaseRows, clock: Clock = WALL) -> None:
        """Read them. `clock` is seconds since the epoch."""
        super().__init__(rows, clock)
        self._known: dict[str, Member] = {}
        self._passing: dict[str, float] = {}
        self._as_of = -1
        self._look()

    def changed(self) -> bool:
        """Return whether anybody has written since this was last asked, and read it."""
        self._look()
        before, self._version = self._version, self._as_of
        return before != self._version

    def _look(self) -> bool:
        """Read what was written since the last look; return whether there was anything."""
        version = self._rows.version()
        if version == self._as_of:
            return False
        # The version before what it is of: a write in between is read twice, not never.
        with self._rows.reading() as execute:
            members = [Member(*row) for row in rows_of(execute, "member", self._run)]
            passing = rows_of(execute, "coordinator", self._run)
        self._known = {member.name: member for member in members}
        self._passing, self._as_of = dict(passing), version
        return True

    def check(self, peer: Peer) -> None:
        """Raise HandshakeError unless this certificate is a present member's."""
        self._asking_twice(lambda: judge(self._known.get(peer.subject.name), peer, self.clock()))

    def check_coordinator(self, serial: str) -> None:
        """Raise NoCoordinator unless this certificate is for passing calls on, and still good."""
        self._asking_twice(lambda: judge_coordinator(self._passing.get(serial), self.clock()))

    def _asking_twice(self, judged: Callable[[], None]) -> None:
        try:
            judged()
        except HandshakeError:
            if not self._look():
                raise
            judged()
