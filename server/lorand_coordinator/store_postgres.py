"""Where the ledgers of several runs live: one PostgreSQL database, one row an entry.

Several coordinators may know a run, one leads it. A session's advisory lock says who may try; what
makes it safe is the **epoch**, a number in the run's row that every takeover raises by one. An
append writes only where the row still holds the epoch of its writer, in one transaction that locks
the row, so a leader that was paused, cut off or slow can never write after another took over.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from lorand import merkle
from lorand.errors import LedgerError
from lorand.heads import Signature
from lorand.ledger import GENESIS, entry_digest
from lorand.merkle import Tree
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import postgres
from lorand_coordinator.store import (
    PAGE,
    Checkpoint,
    Record,
    Signer,
    Stated,
    StoreUnavailable,
    check_chain,
    check_empty,
    serialised,
    signed,
)

SCHEME: Final = "postgresql://"
LEASE_S: Final = 15
"""After so long without a statement the server ends a leader's session, and with it its lock."""
OPENING_S: Final = 600
"""The same while the leader still reads and repeats the ledger."""
_LEASE: Final = "SELECT set_config('idle_session_timeout', %s, false)"
_LOCK: Final = "SELECT pg_try_advisory_lock(hashtextextended('lorand/run/' || %s, 0))"
_TAKE_OVER: Final = """
INSERT INTO run (name, epoch, leader) VALUES (%s, 1, %s)
ON CONFLICT (name) DO UPDATE SET epoch = run.epoch + 1, leader = excluded.leader
RETURNING epoch"""
# FOR UPDATE: a takeover waits for this transaction, or this statement sees the epoch it set.
_APPEND: Final = """
INSERT INTO entry (run, sequence, epoch, body, digest)
SELECT name, %s, epoch, %s, %s FROM run WHERE name = %s AND epoch = %s FOR UPDATE"""
_CONTRIBUTE: Final = """
INSERT INTO contribution (run, sequence, position, body)
SELECT %s, %s, number - 1, body
FROM unnest(%b::bytea[]) WITH ORDINALITY AS part (body, number)"""
_SIGN: Final = "INSERT INTO signature (run, sequence, key, value) VALUES (%s, %s, %s, %s)"
_STATE: Final = """
INSERT INTO statement (run, worker, sequence, body)
SELECT name, %s, %s, %s FROM run WHERE name = %s AND epoch = %s FOR UPDATE"""
_SAVE: Final = """
INSERT INTO checkpoint (run, sequence, head, committed, coefficients, state)
SELECT name, %s, %s, %s, %s, %s FROM run WHERE name = %s AND epoch = %s FOR UPDATE
ON CONFLICT (run, sequence) DO UPDATE SET head = excluded.head, committed = excluded.committed,
    coefficients = excluded.coefficients, state = excluded.state"""
_FORGET: Final = """
DELETE FROM checkpoint WHERE run = %s AND sequence NOT IN
    (SELECT sequence FROM checkpoint WHERE run = %s ORDER BY sequence DESC LIMIT 2)"""


class InUse(LedgerError):
    """Another coordinator leads the run, and is reached at `leader`; empty: it does not say."""

    def __init__(self, text: str, leader: str) -> None:
        """`leader` is its HOST:PORT."""
        super().__init__(text)
        self.leader = leader


class TakenOver(StoreUnavailable):
    """Another coordinator leads the run by now: this store never writes again."""


class PostgresStore:
    """The ledger of one run in a PostgreSQL database."""

    def __init__(
        self, url: str, run: str = "", *, read_only: bool = False, leader: str = ""
    ) -> None:
        """Take the run over, or only read it.

        `url` is libpq's, with the run's name behind a `#` where `run` does not give it; a reader
        may leave it out where the database holds one run. `leader` is the HOST:PORT at which others
        reach who leads. Raises InUse when another coordinator does, StoreUnavailable when the
        server cannot be reached, LedgerError when the ledger is damaged or not there.
        """
        url, _, fragment = url.partition("#")
        self.signer: Signer | None = None
        self._run, self._leader = run or fragment, leader
        self._epoch: int | None = None
        self._lacks: set[str] = set()
        prepare = self._find if read_only else self._lead
        self._session = postgres.Session(url, prepare)
        try:
            with self._session.use():
                pass
            self.tree, self._head = check_chain(self._stored(), self.name, "rows were")
            self._count = len(self.tree)
            self._check_end()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The database and the run, for messages."""
        return f"{self._session.name}#{self._run}"

    @property
    def epoch(self) -> int | None:
        """The epoch that this store writes in; None where it only reads."""
        return self._epoch

    # -- opening ---------------------------------------------------------------------------------

    def _find(self, connection: postgres.Connection) -> None:
        """Find the run to read."""
        found = connection.execute("SELECT to_regclass('lorand.run')").fetchone()
        names: list[str] = []
        if found is not None and found[0] is not None:
            names = [name for (name,) in connection.execute("SELECT name FROM run ORDER BY name")]
        if not self._run and len(names) == 1:
            self._run = names[0]
        if self._run not in names:
            held = (
                f"the runs {', '.join(names)}: write #RUN behind the address" if names else "none"
            )
            asked = f"no run {self._run!r}" if self._run else "no single run"
            raise LedgerError(f"there is {asked} at {self._session.name}, which holds {held}")
        # A reader does not migrate: the ledger may be from before there were these.
        for table in ("signature", "statement"):
            found = connection.execute("SELECT to_regclass(%s)", (f"lorand.{table}",)).fetchone()
            if found is None or found[0] is None:
                self._lacks.add(table)

    def _lead(self, connection: postgres.Connection) -> None:
        """Get the run's lock, and its next epoch if this is the first connection.

        A later one goes on in the epoch it had: while nobody raised it nobody else wrote. And the
        lock is free only when the connection before has ended at the server, so that what it was
        about to commit is either there by now or never will be.
        """
        (locked,) = connection.execute(_LOCK, (self._run,)).fetchone() or (False,)
        if self._epoch is None:
            if not locked:
                raise self._in_use(connection)
            connection.execute(_LEASE, (f"{OPENING_S}s",))
            postgres.migrate(connection)
            row = connection.execute(_TAKE_OVER, (self._run, self._leader)).fetchone()
            assert row is not None
            self._epoch = row[0]
            return
        row = connection.execute("SELECT epoch FROM run WHERE name = %s", (self._run,)).fetchone()
        if row is None or row[0] != self._epoch:
            raise self._taken_over()
        if not locked:
            raise StoreUnavailable(
                f"{self.name}: another session holds the run's lock: this coordinator's last one "
                "has not ended yet, or another coordinator is taking over"
            )
        connection.execute(_LEASE, (f"{LEASE_S}s",))

    def _in_use(self, connection: postgres.Connection) -> InUse:
        row = connection.execute(
            "SELECT leader, epoch FROM run WHERE name = %s", (self._run,)
        ).fetchone()
        leader, epoch = row or ("", 0)
        text = f"{leader or 'another coordinator'} leads run {self._run!r} (epoch {epoch})"
        return InUse(text, leader)

    def _taken_over(self) -> TakenOver:
        return TakenOver(
            f"another coordinator took over run {self._run!r} at {self._session.name}; this one, "
            f"of epoch {self._epoch}, writes no more"
        )

    def _stored(self) -> Iterator[tuple[Any, ...]]:
        """Yield sequence, body and digest of all entries, read in pages."""
        after = -1
        while rows := self._rows(
            "SELECT sequence, body, digest FROM entry WHERE run = %s AND sequence > %s"
            " ORDER BY sequence LIMIT %s",
            *(self._run, after, PAGE),
        ):
            yield from rows
            after = rows[-1][0]

    def _check_end(self) -> None:
        """Raise LedgerError when entries are missing at the end: a chain cannot tell."""
        kept = "SELECT sequence FROM {} AS kept WHERE run = %(run)s AND sequence >= %(count)s"
        # In one statement, so that what a leader appends meanwhile is seen whole or not at all.
        entry = " AND NOT EXISTS (SELECT FROM entry AS e WHERE (e.run, e.sequence) = "
        beyond = " UNION ALL ".join(
            kept.format(table) + entry + "(kept.run, kept.sequence))"
            for table in ("contribution", "checkpoint", "statement")
            if table not in self._lacks
        )
        if self._rows(beyond + " LIMIT 1", run=self._run, count=self._count):
            raise LedgerError(
                f"{self.name}: entries are missing from {self._count} on; the rows were damaged or "
                "edited: restore the run from a backup"
            )

    # -- writing ---------------------------------------------------------------------------------

    def append(self, entry: pb.Entry, contributions: Sequence[bytes] = ()) -> tuple[bytes, bytes]:
        """See Store.append. Raises TakenOver when another coordinator leads the run by now."""
        body = serialised(entry, self._count)
        digest = entry_digest(self._head, body)
        record = Record(body, contributions, signed(self, body, digest))
        try:
            with self._session.use() as connection, connection.transaction():
                self._insert(connection, self._count, record, digest)
        except StoreUnavailable:
            if not self._has(digest):
                raise
        self._head, self._count = digest, self._count + 1
        self.tree.add(merkle.leaf_hash(body))
        return body, digest

    def _insert(
        self, connection: postgres.Connection, sequence: int, record: Record, digest: bytes
    ) -> None:
        row = (sequence, record.body, digest, self._run, self._writing())
        if connection.execute(_APPEND, row).rowcount == 0:
            raise self._taken_over()
        if record.contributions:
            connection.execute(_CONTRIBUTE, (self._run, sequence, [*record.contributions]))
        if record.signature is not None:
            signature = (record.signature.key, record.signature.value)
            connection.execute(_SIGN, (self._run, sequence, *signature))

    def load(
        self,
        records: Iterable[Record],
        checkpoint: Checkpoint | None,
        statements: Iterable[Stated] = (),
    ) -> None:
        """See Store."""
        check_empty(self, self.name)
        tree, head = Tree(), GENESIS
        with self._session.use() as connection, connection.transaction():
            for record in records:
                head = entry_digest(head, record.body)
                self._insert(connection, len(tree), record, head)
                tree.add(merkle.leaf_hash(record.body))
            for stated in statements:
                self._state(connection, stated)
        self.tree, self._count, self._head = tree, len(tree), head
        if checkpoint is not None:
            self.save_checkpoint(checkpoint)

    def _has(self, digest: bytes) -> bool:
        """Whether the next entry is there already: a commit that reported failure may be done."""
        try:
            return self.digest(self._count) == digest
        except LedgerError:
            return False

    def keep(self, stated: Stated) -> None:
        """See Store."""
        assert stated.sequence < self._count
        with self._session.use() as connection, connection.transaction():
            self._state(connection, stated)

    def _state(self, connection: postgres.Connection, stated: Stated) -> None:
        row = (*stated, self._run, self._writing())
        if connection.execute(_STATE, row).rowcount == 0:
            raise self._taken_over()

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """See Store."""
        c = checkpoint
        row = (c.sequence, c.head, c.committed, c.coefficients, c.state)
        epoch = self._writing()
        with self._session.use() as connection, connection.transaction():
            if connection.execute(_SAVE, (*row, self._run, epoch)).rowcount == 0:
                raise self._taken_over()
            connection.execute(_FORGET, (self._run, self._run))

    def begin_lease(self) -> None:
        """Promise to `confirm` more often than every LEASE_S: else the run is another's."""
        self._rows(_LEASE, f"{LEASE_S}s")

    def confirm(self) -> None:
        """Raise TakenOver unless this store leads the run still and knows its last entry.

        The latter fails after a commit whose outcome could not be learnt: who opens anew sees it.
        """
        rows = self._rows(
            "SELECT epoch, EXISTS (SELECT FROM entry WHERE run = %(run)s AND sequence >= %(next)s)"
            " FROM run WHERE name = %(run)s",
            run=self._run,
            next=self._count,
        )
        if not rows or rows[0][0] != self._epoch:
            raise self._taken_over()
        if rows[0][1]:
            raise TakenOver(f"{self.name} holds an entry that was reported as failed; opening anew")

    def _writing(self) -> int:
        if self._epoch is None:
            raise StoreUnavailable(f"{self.name} was opened for reading")
        return self._epoch

    # -- reading ---------------------------------------------------------------------------------

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
        rows = self._rows(
            "SELECT digest FROM entry WHERE run = %s AND sequence = %s", self._run, sequence
        )
        if not rows:
            raise LedgerError(f"{self.name} has no entry {sequence}; restore it from a backup")
        return bytes(rows[0][0])

    def entries(self, start: int = 0, limit: int | None = None) -> Iterator[bytes]:
        """See Store. Reads in pages, so that a long history is never in memory whole."""
        stop = self._count if limit is None else min(self._count, start + limit)
        while start < stop:
            rows = self._rows(
                "SELECT body FROM entry WHERE run = %s AND sequence >= %s AND sequence < %s"
                " ORDER BY sequence",
                *(self._run, start, min(stop, start + PAGE)),
            )
            if not rows:
                raise LedgerError(f"{self.name} lost entry {start}; restore it from a backup")
            for (body,) in rows:
                yield bytes(body)
            start += len(rows)

    def contributions(self, sequence: int) -> list[bytes]:
        """See Store."""
        rows = self._rows(
            "SELECT body FROM contribution WHERE run = %s AND sequence = %s ORDER BY position",
            *(self._run, sequence),
        )
        return [bytes(body) for (body,) in rows]

    def signature(self, sequence: int) -> Signature | None:
        """See Store."""
        if "signature" in self._lacks:
            return None
        rows = self._rows(
            "SELECT key, value FROM signature WHERE run = %s AND sequence = %s",
            *(self._run, sequence),
        )
        return Signature(bytes(rows[0][0]), bytes(rows[0][1])) if rows else None

    def statements(self) -> Iterator[Stated]:
        """See Store. Of a ledger in use: those of the entries that it had when it was opened."""
        if "statement" in self._lacks:
            return
        worker, sequence = -1, -1
        while rows := self._rows(
            "SELECT worker, sequence, body FROM statement WHERE run = %s"
            " AND (worker, sequence) > (%s, %s) AND sequence < %s"
            " ORDER BY worker, sequence LIMIT %s",
            *(self._run, worker, sequence, self._count, PAGE),
        ):
            yield from (Stated(*row) for row in rows)
            worker, sequence, _ = rows[-1]

    def last_stated(self, worker: int) -> Stated | None:
        """See Store."""
        rows = self._rows(
            "SELECT worker, sequence, body FROM statement WHERE run = %s AND worker = %s"
            " ORDER BY sequence DESC LIMIT 1",
            *(self._run, worker),
        )
        return Stated(*rows[0]) if rows else None

    def newest_checkpoint(self) -> Checkpoint | None:
        """See Store."""
        rows = self._rows(
            "SELECT sequence, head, committed, coefficients, state FROM checkpoint WHERE run = %s"
            " ORDER BY sequence DESC LIMIT 1",
            self._run,
        )
        return Checkpoint(*rows[0]) if rows else None

    def _rows(self, query: Any, *parameters: object, **named: object) -> list[tuple[Any, ...]]:
        """Return what a query finds. Raises StoreUnavailable."""
        with self._session.use() as connection:
            return connection.execute(query, parameters or named, binary=True).fetchall()

    def close(self) -> None:
        """See Store. The lock goes with the session."""
        self._session.close()
