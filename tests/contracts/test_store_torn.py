"""What a crash leaves of SQLite's log, and writes that fail at any byte.

A ledger that opens again holds a prefix of what was appended, with everything whose last byte is
there, and goes on from it; or it refuses loudly. That it does not show another history to those who
saw more is the business of their kept heads (tests/unit/test_witness.py).
"""

import random
import resource
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import pytest
from tests.contracts.store_cases import assert_whole, commit
from tests.unit.signed_histories import KEY, RUN

from lorand import heads, merkle
from lorand.errors import LedgerError
from lorand_coordinator.store import SqliteStore, StoreUnavailable

ENTRIES: Final = 12
FRAME: Final = 4096 + 24
HEADER: Final = 32
"""Of SQLite's log (WAL): a header, then frames of a page with its own header."""


class Written:
    """A ledger as a kill leaves it, and after which byte of its log each entry was durable."""

    def __init__(self, folder: Path) -> None:
        """Append; copy the files while they are open."""
        path = folder / "run.ledger"
        self.ends: list[int] = []
        self.bodies: list[bytes] = []
        with closing(SqliteStore(path)) as store:
            store.signer = heads.signer(KEY, RUN)
            self.before = store_log(path).stat().st_size
            for number in range(ENTRIES):
                parts = [b"%d" % number * 300 * (number % 4)]
                self.bodies.append(store.append(commit(number), parts)[0])
                self.ends.append(store_log(path).stat().st_size)
            self.path = folder / "left.ledger"
            shutil.copy(path, self.path)
            self.log = store_log(path).read_bytes()
        self._source = random.Random(5)

    def reopened(self, log: bytes) -> int:
        """Open what is left, with this log; check it; return how many entries it has."""
        copy = self.path.with_name("copy.ledger")
        shutil.copy(self.path, copy)
        store_log(copy).write_bytes(log)
        with closing(SqliteStore(copy)) as store:
            store._database.execute("PRAGMA synchronous = OFF")
            bodies = list(store.entries())
            assert bodies == self.bodies[: len(bodies)], "not a prefix"
            for sequence, body in enumerate(bodies):
                signature = store.signature(sequence)
                assert signature is not None, f"entry {sequence} lost its signature"
                assert len(store.contributions(sequence)) == 1, body
            tree = merkle.Tree()
            for body in bodies:
                tree.add(merkle.leaf_hash(body))
            assert tree.root() == store.tree.root()
            store.append(commit(99))
        assert_whole(copy, len(bodies) + 1)
        for suffix in ("", "-wal", "-shm"):
            copy.with_name(copy.name + suffix).unlink(missing_ok=True)
        return len(bodies)

    def durable_by(self, size: int) -> int:
        """How many entries are there whose last byte is within so much of the log."""
        return sum(end <= size for end in self.ends)

    def some(self, count: int) -> list[int]:
        """Some places in the log."""
        return [self._source.randrange(self.before, len(self.log)) for _ in range(count)]


def store_log(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("torn"))


def torn_at(written: Written, size: int) -> None:
    assert written.reopened(written.log[:size]) == written.durable_by(size)


def test_a_log_cut_between_pages(written: Written) -> None:
    """At each page's end: an entry is there exactly when its last page is."""
    cuts = range(HEADER, len(written.log) + 1, FRAME)
    assert len(cuts) > 2 * ENTRIES
    for size in [size for size in cuts if size >= written.before][::5]:
        torn_at(written, size)


@pytest.mark.slow
def test_a_log_cut_anywhere(written: Written) -> None:
    """At every page's end and on both sides of it, and at random bytes."""
    cuts = {
        HEADER + FRAME * n + off for n in range(len(written.log) // FRAME) for off in (-1, 0, 1)
    }
    for size in sorted({*(c for c in cuts if c >= written.before), *written.some(200)}):
        torn_at(written, size)


@pytest.mark.parametrize("count", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_a_log_with_a_flipped_bit(written: Written, count: int) -> None:
    """Pages have checksums: what comes after the damage is not read."""
    for place in written.some(count):
        log = bytearray(written.log)
        log[place] ^= 16
        assert written.reopened(bytes(log)) >= written.durable_by(place)


def test_a_log_whose_middle_never_reached_the_disk(written: Written) -> None:
    """Pages are written in any order; a hole is the end of what is believed."""
    for place in written.some(8):
        hole = written.log[:place] + bytes(FRAME) + written.log[place + FRAME :]
        assert written.reopened(hole) == written.durable_by(place)


def test_a_main_file_without_its_log_is_shorter_or_refused(written: Written) -> None:
    """Nothing was moved into the main file yet: it is an empty ledger, whatever was promised."""
    copy = written.path.with_name("alone.ledger")
    shutil.copy(written.path, copy)
    try:
        with closing(SqliteStore(copy)) as store:
            assert len(store) == 0
    except LedgerError as error:
        assert "restore it from a backup" in str(error)  # noqa: PT017 (either is right)


# ------------------------------------------------------------- writes that fail


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Have this process's writes beyond so many bytes of a file fail, in part or whole."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("step", [1999, pytest.param(101, marks=pytest.mark.slow)])
def test_a_disk_that_ends_at_any_byte(step: int, tmp_path: Path) -> None:
    """The log grows up to somewhere within the entry: it is done whole, or later."""
    path = tmp_path / "run.ledger"
    failed = done = 0
    with closing(SqliteStore(path)) as store:
        store._database.execute("PRAGMA wal_autocheckpoint = 0")
        store.signer = heads.signer(KEY, RUN)
        while not done or failed < 8:
            before, head = len(store), store.head()
            room = (failed * step) % (6 * FRAME)
            with files_end_at(store_log(path).stat().st_size + room):
                try:
                    store.append(commit(before), [b"x" * 5000])
                    done += 1
                except StoreUnavailable:
                    assert (len(store), store.head(), len(store.tree)) == (before, head, before)
                    failed += 1
            if len(store) == before:
                store.append(commit(before), [b"x" * 5000])
            assert store.signature(before) is not None
            copy = tmp_path / "copy.ledger"
            for suffix in ("", "-wal"):
                shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
            assert_whole(copy, before + 1)
            for suffix in ("", "-wal", "-shm"):
                copy.with_name(copy.name + suffix).unlink(missing_ok=True)
