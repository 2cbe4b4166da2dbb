"""A store in PostgreSQL: lost connections, servers that restart, leaders that are gone."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, Final, Literal

import psycopg
import pytest
from tests.contracts.store_cases import checkpoint, commit, fill
from tests.postgres import Server

from lorand import heads
from lorand.errors import LedgerError
from lorand.heads import Head
from lorand.ledger import parse
from lorand.privacy.primitives import IdentityKey
from lorand_coordinator import postgres as sessions
from lorand_coordinator.store import Stated, StoreUnavailable
from lorand_coordinator.store_postgres import InUse, PostgresStore, TakenOver

pytestmark = pytest.mark.postgres

STATEMENTS: Final = 5
"""Of a signed append: BEGIN, the entry, its contributions, its signature, COMMIT."""
SIGNER: Final = heads.signer(IdentityKey(bytes(range(32))), bytes(32))
When = Literal["before", "after"]


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    """A run's name that no other test uses."""
    return str(request.node.nodeid)


@pytest.fixture
def store(postgres: Server, run: str) -> Iterator[PostgresStore]:
    with closing(postgres.store(run)) as opened:
        opened.signer = SIGNER
        yield opened


def assert_whole(postgres: Server, run: str, count: int) -> None:
    """It opens, so the chain holds, has so many entries, and epochs only rise along it.

    What is signed is the history up to there.
    """
    assert SIGNER is not None
    with closing(PostgresStore(postgres.url, run, read_only=True)) as reader:
        assert len(reader) == count == len(list(reader.entries()))
        for sequence in range(count):
            size = sequence + 1
            head = Head(size, reader.tree.root(size), reader.digest(sequence))
            assert reader.signature(sequence) in (None, SIGNER(head))
    query = "SELECT epoch FROM lorand.entry WHERE run = %s ORDER BY sequence"
    epochs = [int(str(row[0])) for row in postgres.execute(query, run)]
    assert epochs == sorted(epochs)
    assert len(epochs) == count


def backend(store: PostgresStore) -> int:
    """The server's process behind a store."""
    with store._session.use() as connection:
        return connection.info.backend_pid


def eventually(store: PostgresStore, number: int, contributions: list[bytes]) -> None:
    """Append as the engine does: again, while the store is not there."""
    end = time.monotonic() + 30.0
    while True:
        try:
            store.append(commit(number), contributions)
            return
        except TakenOver:
            raise
        except StoreUnavailable:
            assert time.monotonic() < end, "the store did not come back"
            threading.Event().wait(0.05)


# ------------------------------------------------------------- connections that are lost


class Cut:
    """Ends the store's session from outside, before or after its n-th wait for the server."""

    def __init__(self, postgres: Server, at: int, when: When) -> None:
        self.postgres, self.at, self.when, self.waits = postgres, at, when, 0

    def wait(self, connection: sessions.Connection, gen: Any, *more: Any) -> Any:
        number, self.waits = self.waits, self.waits + 1
        if number == self.at and self.when == "before":
            self.postgres.terminate(connection.info.backend_pid)
        result = psycopg.Connection.wait(connection, gen, *more)
        if number == self.at and self.when == "after":
            self.postgres.terminate(connection.info.backend_pid)
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return result


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", range(STATEMENTS))
def test_a_connection_lost_at_any_statement_loses_and_doubles_nothing(
    postgres: Server,
    store: PostgresStore,
    run: str,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    when: When,
) -> None:
    """Lost after the commit, the append is done and says so; before it, nothing is there."""
    fill(store, 2)
    cut = Cut(postgres, at, when)
    monkeypatch.setattr(sessions.Connection, "wait", lambda self, *a: cut.wait(self, *a))
    committed = (at, when) == (STATEMENTS - 1, "after")
    if committed:
        store.append(commit(2), [b"x", b"y"])
    else:
        with pytest.raises(StoreUnavailable):
            store.append(commit(2), [b"x", b"y"])
        assert len(store) == 2
        assert (store.contributions(2), store.signature(2)) == ([], None)
        store.append(commit(2), [b"x", b"y"])
    assert len(store.tree) == len(store) == 3
    assert store.signature(2) is not None
    assert cut.waits > at, "the cut was made"
    assert store.contributions(2) == [b"x", b"y"]
    store.append(commit(3))
    assert_whole(postgres, run, 4)


def test_an_append_waits_for_the_server_as_often_as_the_cuts_are(
    store: PostgresStore, postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = Cut(postgres, -1, "before")
    monkeypatch.setattr(sessions.Connection, "wait", lambda self, *a: cut.wait(self, *a))
    store.append(commit(0), [b"x", b"y"])
    assert cut.waits == STATEMENTS


def test_a_commit_that_could_not_be_looked_up_is_found_on_the_next_try(
    postgres: Server, store: PostgresStore, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another entry must not take its place meanwhile, and whoever confirms is told."""
    with monkeypatch.context() as patch:
        cut = Cut(postgres, STATEMENTS - 1, "after")
        patch.setattr(sessions.Connection, "wait", lambda self, *a: cut.wait(self, *a))
        patch.setattr(store, "_has", lambda digest: False)
        with pytest.raises(StoreUnavailable):
            store.append(commit(0), [b"x", b"y"])
    with pytest.raises(StoreUnavailable, match="duplicate key"):
        store.append(commit(1))
    with pytest.raises(TakenOver, match="reported as failed"):
        store.confirm()
    store.append(commit(0), [b"x", b"y"])
    store.confirm()
    store.append(commit(1))
    assert_whole(postgres, run, 2)


@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_a_restarted_server_costs_a_try(
    postgres: Server, store: PostgresStore, run: str, mode: str
) -> None:
    fill(store, 2)
    store.save_checkpoint(checkpoint(1))
    postgres.control("restart", mode)
    eventually(store, 2, [b"x"])
    assert store.epoch == 1
    assert store.newest_checkpoint() == checkpoint(1)
    assert_whole(postgres, run, 3)


def test_a_server_that_is_gone_is_unavailable_until_it_is_back(
    postgres: Server, store: PostgresStore, run: str
) -> None:
    fill(store, 2)
    postgres.control("stop")
    try:
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                store.append(commit(2))
            with pytest.raises(StoreUnavailable):
                store.contributions(1)
            with pytest.raises(StoreUnavailable):
                store.confirm()
        assert len(store) == 2
        with pytest.raises(StoreUnavailable, match=r"cannot be reached: .*; check that the server"):
            postgres.store(run)
    finally:
        postgres.control("start")
    eventually(store, 2, [])
    assert_whole(postgres, run, 3)


def test_a_server_that_does_not_answer_is_given_up(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own clock: a stopped server ends no statement."""
    monkeypatch.setattr(sessions.Connection.wait, "__defaults__", (0.05, 0.2))
    began = time.monotonic()
    with pytest.raises(StoreUnavailable), store._session.use() as connection:
        connection.execute("SELECT pg_sleep(4)")
    assert time.monotonic() - began < 2.0
    monkeypatch.undo()
    store._session.close()


@pytest.mark.parametrize("at", range(STATEMENTS))
def test_a_session_that_hangs_may_commit_late_and_only_once(
    postgres: Server, store: PostgresStore, run: str, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Stopped at any statement and given up, the server's process goes on later with what it has.

    It holds the lock until it ends, so nobody builds on a history that could still grow.
    """
    fill(store, 2)
    pid, cut = backend(store), Cut(postgres, -1, "before")

    def wait(connection: sessions.Connection, gen: Any, *_: Any) -> Any:
        if cut.waits == at:
            os.kill(pid, signal.SIGSTOP)
        return cut.wait(connection, gen, 0.02, 0.3)

    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(sessions.Connection, "wait", wait)
        try:
            with pytest.raises(StoreUnavailable):
                store.append(commit(2), [b"x", b"y"])
            with pytest.raises(StoreUnavailable, match="another session holds the run's lock"):
                store.confirm()
        finally:
            os.kill(pid, signal.SIGCONT)
    assert time.monotonic() - began < 5.0
    eventually(store, 2, [b"x", b"y"])
    assert store.contributions(2) == [b"x", b"y"]
    store.confirm()
    assert_whole(postgres, run, 3)


def test_every_session_has_its_limits(postgres: Server, store: PostgresStore) -> None:
    expected = {
        "synchronous_commit": "on",
        "statement_timeout": "5s",
        "idle_in_transaction_session_timeout": "5s",
        "idle_session_timeout": "10min",
        "default_transaction_isolation": "read committed",
    }
    assert {name: store._rows(f"SHOW {name}")[0][0] for name in expected} == expected
    store.begin_lease()
    assert store._rows("SHOW idle_session_timeout") == [("15s",)]
    postgres.terminate(backend(store))
    with pytest.raises(StoreUnavailable):
        store.confirm()
    assert store._rows("SHOW idle_session_timeout") == [("15s",)]


# ------------------------------------------------------------- one leader


def test_a_second_coordinator_is_told_who_leads(postgres: Server, run: str) -> None:
    with closing(PostgresStore(postgres.url, run, leader="10.0.0.1:7700")) as store:
        with pytest.raises(InUse, match=r"10\.0\.0\.1:7700 leads run .* \(epoch 1\)"):
            postgres.store(run)
        store.append(commit(0))
    with closing(postgres.store(run)) as store:
        assert (len(store), store.epoch) == (1, 2)


def test_runs_in_one_database_do_not_meet(postgres: Server, run: str) -> None:
    with closing(postgres.store(run)) as one, closing(postgres.store(run + " two")) as two:
        fill(one, 3)
        fill(two, 1)
        two.save_checkpoint(checkpoint(0))
        assert one.newest_checkpoint() is None
        assert [parse(body).sequence for body in one.entries()] == [0, 1, 2]
        assert two.contributions(2) == []
        two.keep(Stated(1, 0, b"of two"))
        assert (list(one.statements()), one.last_stated(1)) == ([], None)
    assert_whole(postgres, run, 3)
    assert_whole(postgres, run + " two", 1)


def test_an_old_leader_never_writes_again(postgres: Server, store: PostgresStore, run: str) -> None:
    """Its session was ended while it looked elsewhere, and another took over."""
    fill(store, 2)
    postgres.terminate(backend(store))
    with closing(postgres.store(run)) as other:
        other.append(commit(2), [b"theirs"])
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                store.append(commit(2), [b"ours"])
            with pytest.raises(TakenOver, match=r"another coordinator took over .* of epoch 1"):
                store.confirm()
        with pytest.raises(StoreUnavailable):
            store.save_checkpoint(checkpoint(1))
        with pytest.raises(StoreUnavailable):
            store.keep(Stated(1, 1, b"ours"))
        other.append(commit(3))
        assert list(other.statements()) == []
        assert other.contributions(2) == [b"theirs"]
    with pytest.raises(TakenOver):
        store.append(commit(2), [b"ours"])
    assert_whole(postgres, run, 4)


def test_an_epoch_fences_also_without_a_lock(
    postgres: Server, store: PostgresStore, run: str
) -> None:
    """The lock is courtesy: an old leader whose session lives writes nothing either."""
    fill(store, 2)
    postgres.execute("UPDATE lorand.run SET epoch = epoch + 1 WHERE name = %s", run)
    with pytest.raises(TakenOver):
        store.append(commit(2))
    with pytest.raises(TakenOver):
        store.save_checkpoint(checkpoint(1))
    with pytest.raises(TakenOver):
        store.keep(Stated(1, 1, b"ours"))
    with pytest.raises(TakenOver):
        store.confirm()
    assert_whole(postgres, run, 2)


def test_a_takeover_waits_for_a_write_that_has_begun(
    postgres: Server, store: PostgresStore, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised between a leader's insert and its commit, the epoch comes after the entry."""
    took_over: list[bool] = []
    raised = "UPDATE lorand.run SET epoch = epoch + 1 WHERE name = %s"
    other = threading.Thread(target=lambda: postgres.execute(raised, run))
    cut = Cut(postgres, -1, "before")

    def wait(connection: sessions.Connection, *more: Any) -> Any:
        if cut.waits == STATEMENTS - 1:  # about to commit
            other.start()
            other.join(0.3)
            took_over.append(not other.is_alive())
        return cut.wait(connection, *more)

    monkeypatch.setattr(sessions.Connection, "wait", wait)
    store.append(commit(0), [b"x", b"y"])
    other.join(30.0)
    assert took_over == [False]
    with pytest.raises(TakenOver):
        store.append(commit(1))
    assert_whole(postgres, run, 1)


def test_a_leader_keeps_its_lock_over_a_lost_connection(
    postgres: Server, store: PostgresStore, run: str
) -> None:
    fill(store, 1)
    postgres.terminate(backend(store))
    with pytest.raises(StoreUnavailable):
        store.confirm()
    store.confirm()
    with pytest.raises(InUse):
        postgres.store(run)
    assert store.epoch == 1


# ------------------------------------------------------------- reading, damage, schema


def test_readers_need_no_lock_and_write_nothing(
    postgres: Server, store: PostgresStore, run: str
) -> None:
    fill(store, 3)
    store.save_checkpoint(checkpoint(1))
    with closing(PostgresStore(f"{postgres.url}#{run}", read_only=True)) as reader:
        assert len(list(reader.entries())) == 3
        assert reader.newest_checkpoint() == checkpoint(1)
        with pytest.raises(StoreUnavailable, match="opened for reading"):
            reader.append(commit(3))
        with pytest.raises(StoreUnavailable, match="opened for reading"):
            reader.save_checkpoint(checkpoint(2))
        with pytest.raises(StoreUnavailable, match="opened for reading"):
            reader.keep(Stated(1, 1, b"said"))
        store.append(commit(3), [b"x"])
        store.keep(Stated(1, 3, b"of an entry that the reader does not have"))
        assert list(reader.statements()) == []
        assert len(list(reader.entries())) == 3
    assert_whole(postgres, run, 4)


def test_a_reader_is_told_which_runs_there_are(postgres: Server, store: PostgresStore) -> None:
    with pytest.raises(LedgerError, match=r"no run 'other' at .* holds the runs .*: write #RUN"):
        PostgresStore(postgres.url, "other", read_only=True)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("UPDATE lorand.entry SET body = 'x' WHERE run = %s AND sequence = 1", "breaks at entry 1"),
        ("UPDATE lorand.entry SET digest = '' WHERE run = %s AND sequence = 3", "at entry 3"),
        ("UPDATE lorand.entry SET sequence = 9 WHERE run = %s AND sequence = 3", "at entry 3"),
        ("DELETE FROM lorand.entry WHERE run = %s AND sequence = 0", "breaks at entry 0"),
    ],
)
def test_damage_is_found_on_opening(postgres: Server, run: str, damage: str, found: str) -> None:
    with closing(postgres.store(run)) as store:
        for number in range(4):
            store.append(commit(number))
    postgres.execute(damage, run)
    for read_only in (False, True):
        with pytest.raises(LedgerError, match=rf"{found}; the rows were .*from a backup"):
            PostgresStore(postgres.url, run, read_only=read_only)


def test_missing_entries_at_the_end_are_found(postgres: Server, run: str) -> None:
    """The database refuses this itself, but a table may have been restored without its keys."""
    with closing(postgres.store(run)) as store:
        fill(store, 3)
    postgres.execute(
        "SET session_replication_role = replica; DELETE FROM lorand.entry WHERE sequence = 2"
        " AND run = '" + run + "'"
    )
    with pytest.raises(LedgerError, match="entries are missing from 2 on"):
        postgres.store(run)


def test_a_newer_schema_is_left_alone(postgres: Server, store: PostgresStore, run: str) -> None:
    fill(store, 1)
    postgres.execute("INSERT INTO lorand.migration (name) VALUES ('9999_future.sql')")
    try:
        with pytest.raises(LedgerError, match=r"newer release of lorand \(9999_future.sql\)"):
            postgres.store(run + " other")
    finally:
        postgres.execute("DELETE FROM lorand.migration WHERE name = '9999_future.sql'")


def test_a_database_without_ledgers_has_nothing_to_read(postgres: Server) -> None:
    postgres.execute("CREATE DATABASE bare")
    with pytest.raises(LedgerError, match=r"no run 'some' at .*, which holds none"):
        PostgresStore(postgres.url.replace("/postgres?", "/bare?"), "some", read_only=True)


def test_coordinators_that_come_at_once_migrate_once(postgres: Server) -> None:
    postgres.execute("CREATE DATABASE fresh")
    url = postgres.url.replace("/postgres?", "/fresh?")
    opened: list[PostgresStore] = []
    threads = [
        threading.Thread(target=lambda n=n: opened.append(PostgresStore(url, f"run {n}")))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert len(opened) == 4
    for store in opened:
        store.close()


def test_what_is_no_url_is_our_error() -> None:
    with pytest.raises(LedgerError, match="not a PostgreSQL URL"):
        PostgresStore("postgresql://[host/db", "run")


def test_messages_do_not_tell_passwords() -> None:
    with pytest.raises(LedgerError) as caught:
        PostgresStore("postgresql://user:secret@127.0.0.1:1/db", "run")
    assert "postgresql://127.0.0.1:1/db" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("table", ["signature", "statement"])
def test_a_ledger_from_before_there_was_a_table_is_read(
    postgres: Server, store: PostgresStore, run: str, table: str
) -> None:
    """A reader does not bring the schema up to date."""
    fill(store, 2)
    postgres.execute(f"ALTER TABLE lorand.{table} RENAME TO away")
    try:
        with closing(PostgresStore(postgres.url, run, read_only=True)) as reader:
            assert (reader.signature(0) is None) == (table == "signature")
            assert (len(reader), list(reader.statements())) == (2, [])
    finally:
        postgres.execute(f"ALTER TABLE lorand.away RENAME TO {table}")
