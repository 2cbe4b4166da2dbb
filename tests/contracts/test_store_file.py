"""A store in SQLite's files: damage, other programs, a second coordinator and a full disk."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.contracts.store_cases import assert_whole, checkpoint, commit, fill, rows

from lorand.errors import LedgerError
from lorand.ledger import entry_digest, parse
from lorand_coordinator.store import Checkpoint, SqliteStore, StoreUnavailable

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
