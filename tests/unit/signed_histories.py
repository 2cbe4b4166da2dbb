"""Signed histories of the small run: a coordinator's answers, without a coordinator."""

from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Final

from tests.runs import IDENTITY, config_of, history, numbered

from lorand import heads, ledger
from lorand.ledger import Position
from lorand.privacy.primitives import IdentityKey
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import signing
from lorand_coordinator.store import SqliteStore

CONFIG: Final = config_of()
RUN: Final = ledger.origin(CONFIG, IDENTITY).run_digest
KEY: Final = IdentityKey(bytes(range(32)))
OTHER_KEY: Final = IdentityKey(bytes(range(1, 33)))


def _with_digests(bodies: list[bytes]) -> list[bytes]:
    """Have the commits say that they are made of the nothing that is stored with them."""
    entries = [ledger.parse(body) for body in bodies]
    for entry in entries:
        if entry.HasField("commit"):
            entry.commit.contributions_digest = ledger.contributions_digest([])
    return numbered(entries)


BODIES: Final = _with_digests(history(CONFIG, 7))


def forked(at: int) -> list[bytes]:
    """Another history of the run, the same before entry `at`: from there on, nobody came."""
    later = [
        pb.Entry(sequence=s, round_index=s, abandon=pb.Abandon(reason="nobody came at all"))
        for s in range(at, len(BODIES))
    ]
    return [*BODIES[:at], *(entry.SerializeToString(deterministic=True) for entry in later)]


def store_of(
    bodies: list[bytes], key: IdentityKey | None = KEY, path: Path | str = ":memory:"
) -> SqliteStore:
    """A store with these entries, signed."""
    store = SqliteStore(path)
    if path != ":memory:":
        store._database.execute("PRAGMA synchronous = OFF")
    store.signer = heads.signer(key, RUN)
    for body in bodies:
        assert store.append(ledger.parse(body))[0] == body
    return store


Change = Callable[[pb.Entry, list[bytes]], list[bytes]]
"""Changes an entry in its place; returns the contributions to be stored with it."""


def rewritten(source: Path, target: Path, key: IdentityKey, change: Change) -> Path:
    """Write another history, as whoever has the coordinator's key can: all of it fits together."""
    with (
        closing(SqliteStore(source, read_only=True)) as old,
        closing(SqliteStore(target)) as new,
    ):
        new._database.execute("PRAGMA synchronous = OFF")
        new.signer = heads.signer(key, ledger.origin_of(next(old.entries())).run_digest)
        for body in old.entries():
            entry = ledger.parse(body)
            parts = change(entry, old.contributions(entry.sequence))
            if entry.HasField("commit"):
                entry.commit.contributions_digest = ledger.contributions_digest(parts)
            new.append(entry, parts)
        for stated in old.statements():
            new.keep(stated)
    return target


def answer(
    bodies: list[bytes], size: int, known: int, key: IdentityKey = KEY
) -> pb.GetHeadResponse:
    """What a coordinator with this history and key says of its first `size` entries."""
    request = pb.GetHeadRequest(size=size, known_size=known)
    return signing.head_for(request, store_of(bodies, None), position_of(bodies), key)


def position_of(bodies: list[bytes]) -> Position:
    """Where a reader of these entries is."""
    return _position_of(tuple(bodies))


@cache
def _position_of(bodies: tuple[bytes, ...]) -> Position:
    return ledger.replay(bodies)
