"""What tests put into stores."""

from contextlib import closing
from pathlib import Path

from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.store import Checkpoint, SqliteStore, Store
from lorand_coordinator.store_postgres import PostgresStore


def commit(number: int) -> pb.Entry:
    """Some entry; stores do not look inside."""
    return pb.Entry(round_index=number, commit=pb.Commit(scale=number, codes=b"\1\2\3"))


def fill(store: Store, count: int) -> list[bytes]:
    return [store.append(commit(number), [b"a%d" % number, b"b"])[0] for number in range(count)]


def checkpoint(sequence: int) -> Checkpoint:
    return Checkpoint(sequence, b"h" * 32, sequence, b"A" * 512, b"state %d" % sequence)


def checkpoints(store: Store) -> list[int]:
    """Where checkpoints are kept: the contract only shows the newest."""
    query = "SELECT sequence FROM checkpoint ORDER BY sequence"
    if isinstance(store, PostgresStore):
        query = query.replace("ORDER", "WHERE run = %s ORDER")
        return [sequence for (sequence,) in store._rows(query, store._run)]
    assert isinstance(store, SqliteStore)
    return [sequence for (sequence,) in store._rows(query)]


def rows(store: SqliteStore, query: str) -> list[tuple[object, ...]]:
    return store._database.execute(query).fetchall()


def assert_whole(path: Path, count: int) -> None:
    """It opens (so no contribution is without its entry) and has so many entries."""
    with closing(SqliteStore(path, read_only=True)) as store:
        assert len(store) == count == len(list(store.entries()))
        assert rows(store, "PRAGMA integrity_check") == [("ok",)]
