"""The sequencer's handshakes: who is admitted, and whose identity a run adopts (DESIGN §4)."""

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from tests.runs import IDENTITY, OTHER_IDENTITY, config_of, hello
from tests.unit.sequencer.room import OTHERS_RUN, OURS, Room, adopting, entries

from lorand import ledger
from lorand.errors import HandshakeError, LorandError
from lorand.manifest import Identity
from lorand.v1 import coordination_pb2 as wire
from lorand_coordinator.hub import Hub
from lorand_coordinator.store import StoreUnavailable

# ------------------------------------------------------------- handshake


@pytest.mark.parametrize(
    ("change", "theirs", "ours", "advice"),
    [
        ({"protocol_version": 9}, "speaks protocol version 9", "coordinator 1", "same release"),
        ({"base_digest": b"\7" * 32}, "base weights (0707", "(0101", "same model and revision"),
        ({"base_digest": b""}, "base weights (none)", "(0101", "same model and revision"),
        ({"tokenizer_digest": b"\7" * 32}, "tokenizer (0707", "(0202", "with the run's model"),
        (
            {"manifest_digest": b"\7" * 32},
            "parameter manifest (0707",
            f"({IDENTITY.manifest.digest().hex()[:16]})",
            "same release of lorand",
        ),
        (
            {"run_digest": OTHERS_RUN},
            f"run ({OTHERS_RUN.hex()[:16]})",
            f"({OURS.run_digest.hex()[:16]})",
            "the coordinator's run file",
        ),
    ],
    ids=["protocol", "base", "no base", "tokenizer", "manifest", "run"],
)
def test_a_mismatch_names_both_sides_and_the_way_out(
    room: Room, change: dict[str, Any], theirs: str, ours: str, advice: str
) -> None:
    wrong = hello(room.position, "ada")
    for name, value in change.items():
        setattr(wrong, name, value)
    with pytest.raises(HandshakeError) as error:
        room.sequencer.admit(wrong)
    assert "worker" in str(error.value)
    assert "coordinator" in str(error.value)
    for text in (theirs, ours, advice):
        assert text in str(error.value)
    assert len(room.store) == 1, "nobody was made a member"


@pytest.mark.parametrize("name", ["", "x" * 65])
def test_a_name_has_1_to_64_characters(room: Room, name: str) -> None:
    with pytest.raises(HandshakeError, match=r"1 to 64 characters; choose one with --name"):
        room.sequencer.admit(hello(room.position, name))


def test_a_new_name_becomes_a_member_and_keeps_its_number(room: Room) -> None:
    assert [room.join(name) for name in ("ada", "ben", "ada", "cleo", "ben")] == [1, 2, 1, 3, 2]
    members = [ledger.parse(body).member for body in room.store.entries(1)]
    assert [(m.worker, m.name) for m in members] == [(1, "ada"), (2, "ben"), (3, "cleo")]


def test_the_number_of_workers_has_a_limit() -> None:
    full = Room(config_of(service={"max_workers": 2}))
    with closing(full.store):
        assert [full.join(name) for name in ("ada", "ben", "ada")] == [1, 2, 1]
        with pytest.raises(HandshakeError, match="has its 2 workers already"):
            full.join("cleo")


def test_a_member_that_cannot_be_written_may_try_again(room: Room) -> None:
    room.store.full = True
    with pytest.raises(StoreUnavailable):
        room.join("ada")
    room.store.full = False
    assert room.join("ben") == 1
    assert room.join("ada") == 2


def test_a_ledger_that_cannot_be_read_leaves_nobody_half_connected(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database may be away between a worker's admission and its entries."""
    hub, greeting = Hub(room.sequencer, clock=lambda: 0.0), hello(room.position, "ada")

    def away(start: int) -> list[bytes]:
        raise StoreUnavailable("the connection was lost")

    with monkeypatch.context() as patch:
        patch.setattr(room.sequencer, "tail", away)
        with pytest.raises(StoreUnavailable):
            hub.join(greeting)
    assert hub.connections == {}
    assert hub.join(greeting).worker == 1


def test_everyone_connected_hears_of_a_member_before_it_is_welcomed(room: Room) -> None:
    room.join("ada")
    _, outgoing = room.sequencer.admit(hello(room.position, "ben"))
    assert entries(outgoing) == [(1, "member")]


def test_a_rolled_back_ledger_is_noticed(room: Room) -> None:
    """The worker has seen more than the coordinator holds: it must not be overwritten."""
    ahead = replace(room.position, next_sequence=5, head=b"\7" * 32)
    with pytest.raises(HandshakeError, match=r"applied 5 entries, .* holds 1: .*rolled back"):
        room.sequencer.admit(hello(ahead, "ada"))


def test_a_forked_history_is_noticed(room: Room) -> None:
    room.join("ada")
    forked = replace(room.position, head=b"\7" * 32)
    with pytest.raises(HandshakeError) as error:
        room.sequencer.admit(hello(forked, "ada"))
    assert "the histories differ at entry 1: the worker has 0707070707070707" in str(error.value)
    assert room.position.head.hex()[:16] in str(error.value)


@pytest.mark.parametrize("behind", [0, 1, 2])
def test_any_true_prefix_is_welcome(room: Room, behind: int) -> None:
    room.join("ada")
    room.join("ben")
    bodies = list(room.store.entries())
    position = OURS
    for body in bodies[: len(bodies) - behind]:
        position = ledger.apply(position, body)
    assert room.sequencer.admit(hello(position, "ada")) == (1, [])


# ------------------------------------------------------------- the first worker's identity


def first_hello(room: Room, name: str, identity: Identity = IDENTITY) -> wire.Hello:
    return hello(ledger.origin(room.config, identity), name)


def test_the_first_workers_identity_is_adopted_where_the_run_allows_it() -> None:
    room = adopting()
    with closing(room.store):
        assert (room.sequencer.position, room.sequencer.identity) == (None, None)
        assert room.wait(1.0) == []
        assert room.sequencer.admit(first_hello(room, "ada", OTHER_IDENTITY)) == (1, [])
        assert room.sequencer.identity == OTHER_IDENTITY
        assert ledger.origin_of(next(room.store.entries())).identity == OTHER_IDENTITY
        with pytest.raises(HandshakeError, match="base weights"):
            room.sequencer.admit(first_hello(room, "ben"))
        assert room.restart().identity == OTHER_IDENTITY


def test_without_a_lock_and_a_permission_nobody_is_admitted() -> None:
    room = Room(config_of(), None)
    with closing(room.store):
        with pytest.raises(HandshakeError, match=r"run.lock.*prepare.*adopt_first_worker"):
            room.sequencer.admit(first_hello(room, "ada"))
        assert len(room.store) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"run_digest": b"\7" * 32},
        {"base_digest": b""},
        {"tokenizer_digest": b"\7"},
        {"manifest": ""},
        {"manifest": "[]"},
        {"manifest": "?"},
        {"manifest_digest": b"\7" * 32},
        {"protocol_version": 9},
        {"name": ""},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_worker_that_is_refused_leaves_no_identity_behind(change: dict[str, Any]) -> None:
    """Else one worker with the wrong run file would decide over everybody's base model."""
    room = adopting()
    with closing(room.store):
        wrong = first_hello(room, "ada", OTHER_IDENTITY)
        for name, value in change.items():
            setattr(wrong, name, value)
        with pytest.raises(LorandError):
            room.sequencer.admit(wrong)
        assert len(room.store) == 0
        assert room.sequencer.admit(first_hello(room, "ben")) == (1, [])
        assert room.sequencer.identity == IDENTITY
