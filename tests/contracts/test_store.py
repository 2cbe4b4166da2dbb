"""The contract of stores: durable, chained, whole or not at all (DESIGN §4, §5 invariant 3)."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest
from tests.contracts.store_cases import assert_whole, checkpoint, checkpoints, commit, fill

from lorand import heads, merkle
from lorand.errors import LedgerError
from lorand.heads import Head, Signature
from lorand.ledger import GENESIS, entry_digest, parse
from lorand.merkle import Frontier
from lorand.privacy.primitives import IdentityKey
from lorand_coordinator.store import (
    PAGE,
    Checkpoint,
    Record,
    SqliteStore,
    Stated,
    Store,
    StoreUnavailable,
)

OPEN: Final[dict[str, Callable[[Path], Store]]] = {
    "file": lambda folder: SqliteStore(folder / "run.ledger"),
    "memory": lambda folder: SqliteStore(":memory:"),
}


@pytest.fixture(params=[*OPEN, pytest.param("postgres", marks=pytest.mark.postgres)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "postgres":
        made: Store = request.getfixturevalue("postgres").store(run=tmp_path.name)
    else:
        made = OPEN[request.param](tmp_path)
    with closing(made):
        yield made


# ------------------------------------------------------------- every store


def test_a_new_store_is_empty(store: Store) -> None:
    assert len(store) == 0
    assert store.head() == GENESIS == store.digest(-1)
    assert list(store.entries()) == []
    assert store.contributions(0) == []
    assert store.newest_checkpoint() is None
    assert list(store.statements()) == []
    assert store.last_stated(1) is None


def test_append_numbers_and_chains(store: Store) -> None:
    head = GENESIS
    for number in range(5):
        body, digest = store.append(commit(number))
        head = entry_digest(head, body)
        assert digest == head == store.head() == store.digest(number)
        assert parse(body).sequence == number
        assert parse(body).commit == commit(number).commit
        assert len(store) == number + 1


def test_append_leaves_its_argument_alone(store: Store) -> None:
    """The engine may ask for the same entry again."""
    entry = commit(7)
    for _ in range(2):
        store.append(entry)
    assert entry == commit(7)
    assert [parse(body).sequence for body in store.entries()] == [0, 1]


def test_entries_are_the_bytes_that_were_appended(store: Store) -> None:
    bodies = fill(store, 5)
    assert list(store.entries()) == bodies


@pytest.mark.parametrize(
    ("start", "limit", "expected"),
    [
        (0, None, [0, 1, 2, 3]),
        (2, None, [2, 3]),
        (1, 2, [1, 2]),
        (3, 9, [3]),
        (0, 0, []),
        (4, None, []),
        (9, 3, []),
    ],
)
def test_entries_start_and_limit(
    store: Store, start: int, limit: int | None, expected: list[int]
) -> None:
    fill(store, 4)
    assert [parse(body).sequence for body in store.entries(start, limit)] == expected


def test_a_long_history_is_read_in_pages(store: Store) -> None:
    """Appending while one reads disturbs nobody: the reader sees what was there."""
    if isinstance(store, SqliteStore):
        store._database.execute("PRAGMA synchronous = OFF")  # for speed: a thousand commits
    bodies = fill(store, 2 * PAGE + 3)
    reader = store.entries(1)
    read = [next(reader)]
    store.append(commit(0))
    read += reader
    assert read == bodies[1:]


def test_contributions_keep_their_order_and_their_entry(store: Store) -> None:
    parts = [bytes([99 - number]) * number for number in range(12)]
    store.append(commit(0), parts)
    store.append(commit(1))
    store.append(commit(2), [b"x"])
    assert store.contributions(0) == parts
    assert store.contributions(1) == []
    assert store.contributions(2) == [b"x"]


def test_of_checkpoints_two_are_kept(store: Store) -> None:
    fill(store, 5)
    for sequence in (1, 2, 4):
        store.save_checkpoint(checkpoint(sequence))
        assert store.newest_checkpoint() == checkpoint(sequence)
    assert checkpoints(store) == [2, 4]


def test_a_checkpoint_may_be_saved_again(store: Store) -> None:
    fill(store, 2)
    store.save_checkpoint(checkpoint(1))
    again = Checkpoint(1, b"H" * 32, 9, b"B", b"other")
    store.save_checkpoint(again)
    assert store.newest_checkpoint() == again


def test_an_entry_that_is_not_there_is_our_error(store: Store) -> None:
    fill(store, 2)
    with pytest.raises(LedgerError, match="has no entry 2"):
        store.digest(2)


def test_an_empty_store_takes_anothers_history(store: Store) -> None:
    with closing(SqliteStore(":memory:")) as other:
        bodies = fill(other, 2)
        other.signer = heads.signer(IdentityKey(bytes(range(32))), bytes(32))
        bodies += fill(other, 3)
        root = other.tree.root(5)
        records = [
            Record(body, other.contributions(n), other.signature(n))
            for n, body in enumerate(bodies)
        ]
        for stated in (Stated(2, 1, b"of two"), Stated(1, 4, b"of one")):
            other.keep(stated)
        store.load(records, checkpoint(3), other.statements())
        assert (len(store), store.head()) == (5, other.head())
        assert list(store.statements()) == [Stated(1, 4, b"of one"), Stated(2, 1, b"of two")]
    assert list(store.entries()) == bodies
    assert [store.contributions(n) for n in range(5)] == [
        record.contributions for record in records
    ]
    assert [store.signature(n) for n in range(5)] == [record.signature for record in records]
    assert [record.signature is None for record in records] == [True] * 2 + [False] * 3
    assert store.tree.root(5) == root
    assert store.newest_checkpoint() == checkpoint(3)
    with pytest.raises(LedgerError, match="holds 5 entries already"):
        store.load(records, None)
    store.append(commit(5))
    assert parse(next(store.entries(5))).sequence == 5


def test_a_history_that_breaks_off_leaves_nothing(store: Store) -> None:
    def breaks_off() -> Iterator[Record]:
        yield Record(b"first", [b"part"], Signature(b"key", b"value"))
        raise LedgerError("the other store is gone")

    with pytest.raises(LedgerError, match="the other store is gone"):
        store.load(breaks_off(), None)
    assert (len(store), store.head(), store.contributions(0)) == (0, GENESIS, [])
    assert (len(store.tree), store.signature(0)) == (0, None)
    fill(store, 1)


def test_statements_that_break_off_leave_nothing(store: Store) -> None:
    def breaks_off() -> Iterator[Stated]:
        yield Stated(1, 0, b"first")
        raise LedgerError("the other store is gone")

    with pytest.raises(LedgerError, match="the other store is gone"):
        store.load([Record(b"first", [], None)], None, breaks_off())
    assert (len(store), list(store.statements())) == (0, [])
    fill(store, 1)


# ------------------------------------------------------------- statements


def test_statements_are_kept_by_worker_in_order(store: Store) -> None:
    """Whatever the order in which they come; the newest is who says most, not who came last."""
    fill(store, 5)
    kept = [Stated(w, s, b"%d of %d" % (s, w)) for w, s in ((2, 1), (1, 4), (2, 3), (1, 0), (9, 2))]
    for stated in kept:
        store.keep(stated)
    assert list(store.statements()) == sorted(kept)
    assert [store.last_stated(w) for w in (1, 2, 3, 9)] == [kept[1], kept[2], None, kept[4]]


def test_a_statement_is_not_replaced(store: Store) -> None:
    fill(store, 2)
    store.keep(Stated(1, 1, b"first"))
    with pytest.raises(StoreUnavailable):
        store.keep(Stated(1, 1, b"second"))
    assert list(store.statements()) == [Stated(1, 1, b"first")]
    store.append(commit(2))
    store.keep(Stated(1, 2, b"second"))
    assert store.last_stated(1) == Stated(1, 2, b"second")


def test_many_statements_are_read_in_pages(store: Store) -> None:
    fill(store, 3)
    kept = [Stated(worker, worker % 3, b"s") for worker in range(1, PAGE + 4)]
    records = [Record(body, store.contributions(n), None) for n, body in enumerate(store.entries())]
    with closing(SqliteStore(":memory:")) as other:
        other.load(records, None, kept)
        assert list(other.statements()) == kept
    if isinstance(store, SqliteStore):
        store._database.execute("PRAGMA synchronous = OFF")  # for speed
    for stated in kept:
        store.keep(stated)
    assert list(store.statements()) == kept


# ------------------------------------------------------------- signed histories


def test_the_tree_has_every_entry(store: Store) -> None:
    frontier = Frontier()
    for number, body in enumerate(fill(store, 5), start=1):
        frontier = frontier.add(merkle.leaf_hash(body))
        assert store.tree.root(number) == frontier.root()
    assert len(store.tree) == 5


def test_every_history_is_signed_from_when_there_is_a_signer(store: Store) -> None:
    fill(store, 2)
    key = IdentityKey(bytes(range(32)))
    store.signer = heads.signer(key, bytes(32))
    fill(store, 3)
    for sequence in range(5):
        signature = store.signature(sequence)
        assert (signature is not None) == (sequence >= 2)
        if signature is not None:
            size = sequence + 1
            head = Head(size, store.tree.root(size), store.digest(sequence))
            assert signature == heads.sign(key, bytes(32), head)
    assert store.signature(5) is None


# ------------------------------------------------------------- a commit that goes wrong

PROBLEMS: Final = {
    "full": sqlite3.OperationalError("database or disk is full"),
    "broken": sqlite3.OperationalError("disk I/O error"),
    "malformed": sqlite3.DatabaseError("database disk image is malformed"),
}


class Faulty(sqlite3.Connection):
    """A connection whose transactions fail, before they are committed or after."""

    problem: sqlite3.Error | None = None
    executed = False

    def __exit__(self, kind: object, value: object, traceback: object) -> bool:  # type: ignore[override]
        if self.problem is None or kind is not None:
            return super().__exit__(kind, value, traceback)  # type: ignore[arg-type]
        (self.commit if self.executed else self.rollback)()
        raise self.problem


def faulty(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[SqliteStore, Faulty]:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Faulty))
    store = OPEN["file"](folder)
    monkeypatch.undo()
    assert isinstance(store, SqliteStore)
    assert isinstance(store._database, Faulty)
    return store, store._database


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_failed_append_writes_nothing_and_can_be_repeated(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, database = faulty(monkeypatch, tmp_path)
    with closing(store):
        fill(store, 2)
        head = store.head()
        database.problem = PROBLEMS[problem]
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match=f"{PROBLEMS[problem]}; free space at "):
                store.append(commit(2), [b"x"])
            assert (len(store), store.head()) == (2, head)
            assert store.contributions(2) == []
        with pytest.raises(StoreUnavailable):
            store.save_checkpoint(checkpoint(1))
        with pytest.raises(StoreUnavailable, match="free space at "):
            store.keep(Stated(1, 1, b"said"))
        assert store.newest_checkpoint() is None
        assert list(store.statements()) == []
        database.problem = None
        store.append(commit(2), [b"x"])
        assert store.contributions(2) == [b"x"]
    assert_whole(tmp_path / "run.ledger", 3)


def test_an_append_that_was_done_but_reported_failure_counts_as_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Executed and told otherwise: repeating it would write the round twice."""
    store, database = faulty(monkeypatch, tmp_path)
    with closing(store):
        fill(store, 2)
        database.problem, database.executed = PROBLEMS["broken"], True
        body, digest = store.append(commit(2), [b"x"])
        assert (len(store), store.head()) == (3, digest)
        database.problem = None
        assert list(store.entries(2)) == [body]
        store.append(commit(3))
    assert_whole(tmp_path / "run.ledger", 4)


def test_a_store_that_fell_behind_its_file_refuses_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Done, told otherwise, and it could not be looked up: another entry must not take its place.

    Asked for the same entry again, as the engine does, or opened anew, it finds it done.
    """
    store, database = faulty(monkeypatch, tmp_path)
    with closing(store):
        database.problem, database.executed = PROBLEMS["broken"], True
        monkeypatch.setattr(store, "_has", lambda digest: False)
        with pytest.raises(StoreUnavailable):
            store.append(commit(0), [b"x"])
        monkeypatch.undo()
        with pytest.raises(StoreUnavailable):
            store.append(commit(1))
        assert len(store) == 0
        database.problem = None
        store.append(commit(0), [b"x"])
        store.append(commit(1))
    assert_whole(tmp_path / "run.ledger", 2)
