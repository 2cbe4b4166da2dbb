"""A coordinator that shows another history than before, as real processes: workers refuse it."""

import json
import threading
from contextlib import closing
from pathlib import Path

import pytest
from tests import tiny
from tests.commands import MakeRoom, Room
from tests.end_to_end.peers import LIMIT_S, served
from tests.end_to_end.test_bytes import Silent, Stand
from tests.runs import IDENTITY

from lorand import ledger
from lorand.errors import Behind, HandshakeError, LedgerError
from lorand.heads import KeptHead
from lorand_coordinator import signing, verification
from lorand_coordinator.store import SqliteStore
from lorand_worker.link import Link
from lorand_worker.session import Session

SETTINGS = tiny.settings(
    "spsa",
    run={"rounds": 3},
    directions={"pool_size": 4096},
    rounds={"quorum": 2, "start_with": 2},
    service={"checkpoint_every": 1},
)


def session(room: Room, address: str, index: int, seed: int, state: Path | None) -> Session:
    link = Link(address, give_up_s=10.0)
    bench = Stand(seed + index)
    return Session(link, room.config, IDENTITY, bench, f"worker-{index}", Silent(), state)


def play(room: Room, seed: int, state: Path | None) -> bytes:
    """Have two workers take part to the end; return the digest of the last entry."""
    with served(room) as (_, address):
        pair = [session(room, address, index, seed, state) for index in (1, 2)]
        threads = [threading.Thread(target=one.run, daemon=True) for one in pair]
        for thread in threads:
            thread.start()
        for thread, one in zip(threads, pair, strict=True):
            thread.join(LIMIT_S)
            assert not thread.is_alive()
            one.link.close()
    return pair[0].participant.position.head


def remove(room: Room) -> None:
    """Have the run begin again, with the same key."""
    for suffix in ("", "-wal", "-shm"):
        room.ledger.with_name(room.ledger.name + suffix).unlink(missing_ok=True)


def test_a_worker_refuses_a_forked_history(make_room: MakeRoom) -> None:
    """Run, key and ledger's length are the same, and the worker would leap to a checkpoint."""
    room = make_room(SETTINGS)
    head = play(room, 10, room.state)
    key = signing.key_at(signing.key_beside(room.ledger)).public
    kept = sorted(room.state.glob("*.head.json"))
    assert {json.loads(path.read_text())["digest"] for path in kept} == {head.hex()}
    found = verification.verify(room.ledger, key)
    assert (found.position.head, found.signatures) == (head, 7)
    assert verification.verify(room.export(), key).position.head == head

    remove(room)
    assert play(room, 50, None) != head
    with served(room) as (_, address):
        one = session(room, address, 1, 70, room.state)
        with pytest.raises(HandshakeError, match=r"does not begin with the 7 entries .* forked"):
            one.run()
        one.link.close()
        assert one.participant.counts.measured == 0
    with pytest.raises(LedgerError, match="its owner showed two histories"):
        verification.verify(room.ledger, key, KeptHead.from_json(kept[0].read_bytes()))


def older(room: Room, entries: int) -> Path:
    """Write a ledger that ends where the run's once did."""
    path = room.folder / "older.ledger"
    with (
        closing(SqliteStore(room.ledger, read_only=True)) as now,
        closing(SqliteStore(path)) as old,
    ):
        for sequence, body in enumerate(now.entries()):
            if sequence < entries:
                old.append(ledger.parse(body), now.contributions(sequence))
    return path


def test_of_two_coordinators_one_slept(make_room: MakeRoom) -> None:
    """Its shorter history is no reason to end, and not believed; the other one's is.

    The worker that was started again knows from its file how long the history was, one that was
    there from its position.
    """
    room = make_room(SETTINGS)
    head = play(room, 10, room.state)
    key = signing.key_beside(room.ledger)
    past = ("--ledger", older(room, 4), "--signing-key", key)
    with served(room, *past) as (_, behind), served(room) as (_, address):
        one = session(room, f"{behind},{address}", 1, 70, room.state)
        assert one.run().position.head == head
        one.link.close()
        again = session(room, behind, 1, 70, room.state)
        with pytest.raises(Behind, match="has 4 entries, and it signed 7 for this worker"):
            again.run()
        again.link.close()
        one.link = Link(behind, give_up_s=10.0)
        one.link.signs = True
        with closing(one.link), pytest.raises(Behind, match="holds 4 entries, not 7"):
            one._check_history()
