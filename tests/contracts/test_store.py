"""The contract of stores: durable, chained, whole or not at all (DESIGN §4, §5 invariant 3).

Every store passes the first part; the second is about SQLite's files: damage, other programs, a
second coordinator and a full disk.
"""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorand.errors import LedgerError
from lorand.ledger import GENESIS, entry_digest, parse
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.store import PAGE, Checkpoint, SqliteStore, Store, StoreUnavailable

OPEN: Final[dict[str, Callable[[Path], Store]]] = {
    "file": lambda folder: SqliteStore(folder / "run.ledger"),
    "memory": lambda folder: SqliteStore(":memory:"),
}


@pytest.fixture(params=OPEN)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with closing(OPEN[request.param](tmp_path)) as opened:
        yield opened


def commit(number: int) -> pb.Entry:
    """Some entry; stores do not look inside."""
    return pb.Entry(round_index=number, commit=pb.Commit(scale=number, codes=b"\1\2\3"))


def fill(store: Store, count: int) -> list[bytes]:
    return [store.append(commit(number), [b"a%d" % number, b"b"])[0] for number in range(count)]


def checkpoint(sequence: int) -> Checkpoint:
    return Checkpoint(sequence, b"h" * 32, sequence, b"A" * 512, b"state %d" % sequence)


# ------------------------------------------------------------- every store


def test_a_new_store_is_empty(store: Store) -> None:
    assert len(store) == 0
    assert store.head() == GENESIS == store.digest(-1)
    assert list(store.entries()) == []
    assert store.contributions(0) == []
    assert store.newest_checkpoint() is None


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
    assert isinstance(store, SqliteStore)
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
    assert isinstance(store, SqliteStore)
    assert rows(store, "SELECT sequence FROM checkpoint ORDER BY sequence") == [(2,), (4,)]


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


def rows(store: SqliteStore, query: str) -> list[tuple[object, ...]]:
    return store._database.execute(query).fetchall()


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
        assert store.newest_checkpoint() is None
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


def assert_whole(path: Path, count: int) -> None:
    """It opens (so no contribution is without its entry) and has so many entries."""
    with closing(SqliteStore(path, read_only=True)) as store:
        assert len(store) == count == len(list(store.entries()))
        assert rows(store, "PRAGMA integrity_check") == [("ok",)]


# ------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of six entries and two checkpoints, closed."""
    path = tmp_path_factory.mktemp("template") / "run.ledger"
    with closing(SqliteStore(path)) as store:
        fill(store, 6)
        store.save_checkpoint(checkpoint(2))
        store.save_checkpoint(checkpoint(5))
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copy(template, tmp_path))


def test_everything_is_there_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "that" / "is new" / "run.ledger"
    with closing(SqliteStore(path)) as store:
        bodies = fill(store, 3)
        store.save_checkpoint(checkpoint(2))
        head = store.head()
    with closing(SqliteStore(path)) as store:
        assert list(store.entries()) == bodies
        assert (len(store), store.head()) == (3, head)
        assert store.contributions(1) == [b"a1", b"b"]
        assert store.newest_checkpoint() == checkpoint(2)
        body, digest = store.append(commit(3))
        assert digest == entry_digest(head, body)
    assert_whole(path, 4)


def test_an_entry_is_durable_when_append_returns(tmp_path: Path) -> None:
    """What a kill -9 leaves, a copy of the files, has every entry that was returned."""
    with closing(SqliteStore(tmp_path / "run.ledger")) as store:
        for count in range(1, 5):
            store.append(commit(count), [b"x"])
            copy = tmp_path / f"copy-{count}.ledger"
            for suffix in ("", "-wal"):
                shutil.copy(f"{tmp_path / 'run.ledger'}{suffix}", f"{copy}{suffix}")
            assert_whole(copy, count)
        assert rows(store, "PRAGMA synchronous") == [(2,)]
        assert rows(store, "PRAGMA journal_mode") == [("wal",)]


def test_a_torn_write_is_as_if_never_made(tmp_path: Path) -> None:
    """The log cut off anywhere within the last append: the entry is gone, whole."""
    with closing(SqliteStore(tmp_path / "run.ledger")) as store:
        fill(store, 3)
        wal = tmp_path / "run.ledger-wal"
        before = wal.stat().st_size
        store.append(commit(3), [b"x" * 5000])
        after = wal.stat().st_size
        copy = tmp_path / "copy.ledger"
        for size in range(before, after, (after - before) // 7):
            shutil.copy(tmp_path / "run.ledger", copy)
            Path(f"{copy}-wal").write_bytes(wal.read_bytes()[:size])
            assert_whole(copy, 3)


def test_reading_only_changes_nothing(path: Path) -> None:
    whole = path.read_bytes()
    with closing(SqliteStore(path, read_only=True)) as store:
        assert [parse(body).sequence for body in store.entries()] == list(range(6))
        assert store.contributions(5) == [b"a5", b"b"]
        assert store.newest_checkpoint() == checkpoint(5)
        with pytest.raises(StoreUnavailable):
            store.append(commit(6))
        assert len(store) == 6
    assert path.read_bytes() == whole


def test_one_may_read_while_another_writes(path: Path) -> None:
    with closing(SqliteStore(path)) as writer:
        writer.append(commit(6))
        with closing(SqliteStore(path, read_only=True)) as reader:
            assert len(reader) == 7
            writer.append(commit(7))
            assert len(list(reader.entries())) == 7
        assert_whole(path, 8)


def test_reading_only_needs_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no ledger at"):
        SqliteStore(tmp_path / "run.ledger", read_only=True)
    (tmp_path / "empty").touch()
    with pytest.raises(LedgerError, match="database of another program"):
        SqliteStore(tmp_path / "empty", read_only=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]


# ------------------------------------------------------------- damage


def locate(path: Path, entry: int) -> int:
    """Where in the file the body of an entry is."""
    with closing(SqliteStore(path, read_only=True)) as store:
        body = next(store.entries(entry, 1))
    whole = path.read_bytes()
    assert whole.count(body) == 1
    return whole.index(body)


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("entry", [0, 3, 5])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_flipped_bit_in_a_body_names_the_entry(path: Path, entry: int, read_only: bool) -> None:
    flip(path, locate(path, entry) + 2, 3)
    with pytest.raises(LedgerError, match=rf"hash chain breaks at entry {entry}; .*from a backup"):
        SqliteStore(path, read_only=read_only)


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_flipped_bit_is_found_or_does_not_matter(path: Path, data: st.DataObject) -> None:
    """Wherever it is: never other entries, never another exception than ours."""
    whole = path.read_bytes()
    with closing(SqliteStore(path, read_only=True)) as store:
        bodies = list(store.entries())
    flip(path, data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7)))
    try:
        with closing(SqliteStore(path, read_only=True)) as store:
            assert list(store.entries()) == bodies
    except LedgerError:
        pass
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("entry", [0, 2])
def test_a_missing_entry_is_found(path: Path, entry: int) -> None:
    edit(path, f"DELETE FROM entry WHERE sequence = {entry}")
    with pytest.raises(LedgerError, match=f"hash chain breaks at entry {entry}; the file was"):
        SqliteStore(path)


@pytest.mark.parametrize("kept", ["contribution", "checkpoint"])
def test_missing_entries_at_the_end_are_found(path: Path, kept: str) -> None:
    """A chain that stops early is a chain; what belongs to later entries tells."""
    other = {"contribution": "checkpoint", "checkpoint": "contribution"}[kept]
    edit(path, "DELETE FROM entry WHERE sequence >= 4", f"DELETE FROM {other}")
    with pytest.raises(LedgerError, match=r"entries are missing from 4 on; .*from a backup"):
        SqliteStore(path)


def edit(path: Path, *queries: str) -> None:
    """Change a ledger's database as its owner could."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for query in queries:
            database.execute(query)


@pytest.mark.parametrize(
    "change",
    ["sequence = 9", "body = CAST(body AS TEXT)", "digest = zeroblob(32)", "body = zeroblob(9)"],
)
def test_an_edited_entry_is_found(path: Path, change: str) -> None:
    """Also the last one, where no other hangs on it."""
    edit(path, f"UPDATE entry SET {change} WHERE sequence = 5", "DELETE FROM contribution")
    with pytest.raises(LedgerError, match="hash chain breaks at entry 5; the file was"):
        SqliteStore(path)


def test_exchanged_entries_are_found(path: Path) -> None:
    renumber = "UPDATE entry SET sequence = {1} WHERE sequence = {0}"
    edit(path, *(renumber.format(*pair) for pair in [(1, 99), (2, 1), (99, 2)]))
    with pytest.raises(LedgerError, match="hash chain breaks at entry 1"):
        SqliteStore(path)


def test_a_truncated_file_is_refused(path: Path) -> None:
    """From half a header on; SQLite takes a file of no bytes for a new one."""
    whole = path.read_bytes()
    for length in (50, 512, 4095, 4096, 5000, len(whole) // 2, len(whole) - 4096):
        path.write_bytes(whole[:length])
        for read_only in (False, True):
            with pytest.raises(LedgerError, match=r"cannot be used as a ledger: .*from a backup"):
                SqliteStore(path, read_only=read_only)


def test_what_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"Dear diary, " * 1000)
    for read_only in (False, True):
        with pytest.raises(LedgerError, match=r"file is not a database; .*move it away"):
            SqliteStore(path, read_only=read_only)
    assert path.read_bytes() == b"Dear diary, " * 1000


def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "photos.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE photo (name TEXT)")
    whole = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(LedgerError, match="it is a database of another program"):
            SqliteStore(path, read_only=read_only)
    assert path.read_bytes() == whole


def test_a_failed_opening_holds_nothing(path: Path) -> None:
    """The file can be repaired and opened by the same process."""
    whole = path.read_bytes()
    flip(path, locate(path, 3))
    with pytest.raises(LedgerError, match="hash chain breaks"):
        SqliteStore(path)
    path.write_bytes(whole)
    with closing(SqliteStore(path)) as store:
        assert len(store) == 6


# ------------------------------------------------------------- one writer


def test_a_second_coordinator_is_refused(path: Path) -> None:
    with closing(SqliteStore(path)) as store:
        with pytest.raises(LedgerError, match="in use by another coordinator; stop that one first"):
            SqliteStore(path)
        store.append(commit(6))
    with closing(SqliteStore(path)) as store:
        assert len(store) == 7


# ------------------------------------------------------------- disk and folder


def test_a_full_disk_is_reported_and_nothing_is_half_written(path: Path) -> None:
    """SQLite's own limit on pages stands for the disk; with room again it goes on."""
    with closing(SqliteStore(path)) as store:
        pages = rows(store, "PRAGMA page_count")[0][0]
        store._database.execute(f"PRAGMA max_page_count = {pages}")
        large = [b"x" * 3000] * 9
        head, bodies = store.head(), list(store.entries())
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match=r"full; free space at .*run.ledger"):
                store.append(commit(6), large)
            with pytest.raises(StoreUnavailable, match="full"):
                store.save_checkpoint(Checkpoint(5, b"", 5, b"A" * 9000, b""))
            assert (len(store), store.head(), list(store.entries())) == (6, head, bodies)
            assert store.contributions(6) == []
            assert store.newest_checkpoint() == checkpoint(5)
        store._database.execute(f"PRAGMA max_page_count = {2**30}")
        store.append(commit(6), large)
        assert store.contributions(6) == large
    assert_whole(path, 7)


def test_a_folder_that_cannot_be_made_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LedgerError, match="cannot write beside the ledger"):
        SqliteStore(tmp_path / "file" / "run.ledger")


def test_a_lock_that_cannot_be_opened_is_our_error(tmp_path: Path) -> None:
    """As in a folder one may not write to (tests may run as root, who may)."""
    (tmp_path / "run.ledger.lock").mkdir()
    with pytest.raises(LedgerError, match="cannot write beside the ledger"):
        SqliteStore(tmp_path / "run.ledger")


@pytest.mark.parametrize("read_only", [False, True])
def test_a_folder_in_place_of_the_ledger_is_our_error(tmp_path: Path, read_only: bool) -> None:
    (tmp_path / "run.ledger").mkdir()
    with pytest.raises(LedgerError, match="cannot be used as a ledger: "):
        SqliteStore(tmp_path / "run.ledger", read_only=read_only)
