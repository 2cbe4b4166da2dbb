"""Runs that keep nothing but noisy sums, over real processes: who is trusted with what."""

import signal
from typing import Any, Final

import pytest
from tests import tiny
from tests.commands import Command, MakeRoom, Room, committed, wait_for
from tests.end_to_end.test_privacy import NAMES, ROUNDS, contributions, settings

from lorand import ledger
from lorand_coordinator.store import SqliteStore
from lorand_worker import budget

LAPLACE: Final[dict[str, Any]] = {"mechanism": "laplace", "delta": 0.0, "target_epsilon": 2.0}


def stored_once(room: Room, rounds: int) -> None:
    """The ledger holds a round's noisy mean, and nothing of any worker."""
    kept = contributions(room.ledger)
    assert len(kept) == rounds
    assert {f.name for part in kept for f, _ in part.ListFields()} <= {"round_index", "codes"}
    store = SqliteStore(room.ledger, read_only=True)
    commits = [ledger.parse(body).commit for body in store.entries()]
    store.close()
    assert [list(c.workers) for c in commits if c.workers] == [[1, 2, 3]] * rounds


@pytest.mark.slow
def test_a_coordinator_that_is_trusted_with_the_noise(make_room: MakeRoom) -> None:
    room = make_room(settings(mode="central", **LAPLACE)).lock()
    with room.coordinator() as (_, address):
        arguments = room.join_arguments(address, "hotels")
        code, said = room.failure("lr-worker", *arguments, "--require-privacy")
        assert code == 5
        assert "join with --trust-coordinator if you do trust it" in said
        flags = ("--require-privacy", "--trust-coordinator")
        workers = [room.join(address, name, *flags) for name in NAMES]
        try:
            results = [worker.result() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    assert len({result["weights_digest"] for result in results}) == 1
    stored_once(room, ROUNDS)
    assert [account.charged for account in budget.accounts(room.state)] == [ROUNDS] * 3


def members(room: Room) -> dict[str, tuple[str, ...]]:
    """Make keys and a roster by the commands of docs/secure-sum.md; return the flags of each."""
    lines = []
    for name in NAMES:
        made = room.once("lr-worker", "sum", "key", room.folder / f"{name}.key")
        lines.append(f"{name}={made['public']}")
    roster = room.folder / "roster.json"
    written = room.once("lr-worker", "sum", "roster", roster, *lines)
    read = room.once("lr-worker", "sum", "roster", roster)
    assert written["digest"] == read["digest"]
    return {
        name: ("--identity", str(room.folder / f"{name}.key"), "--roster", str(roster))
        for name in NAMES
    }


def secure(rounds: int) -> tiny.Settings:
    content = settings(mode="secure-sum", target_epsilon=8.0, honest_min=2, spare_rounds=20)
    content["run"]["rounds"] = rounds
    content["service"]["commit_retry_s"] = 0.2
    return content


@pytest.mark.slow
def test_a_sum_that_nobody_can_open(make_room: MakeRoom) -> None:
    """A worker killed in the middle costs a round; back with another key, it goes on."""
    rounds = 12
    room = make_room(secure(rounds)).lock()
    flags = members(room)
    with room.coordinator() as (_, address):
        workers: dict[str, Command] = {
            name: room.join(address, name, "--max-epsilon", "8", *flags[name]) for name in NAMES
        }
        try:
            wait_for(lambda: committed(address) >= 3, "rounds are committed")
            workers["gadgets"].signal(signal.SIGKILL)
            workers["gadgets"].end()
            workers["gadgets"] = room.join(address, "gadgets", *flags["gadgets"])
            results = [worker.result() for worker in workers.values()]
        finally:
            for worker in workers.values():
                worker.kill()
    replayed = room.once("lr-worker", "replay", room.export(), "--model", room.model)
    assert {result["weights_digest"] for result in results} == {replayed["weights_digest"]}
    stored_once(room, rounds)
    charged = [account.charged for account in budget.accounts(room.state)]
    assert all(rounds <= count <= rounds + 3 for count in charged)


@pytest.mark.slow
def test_what_secure_sums_take(make_room: MakeRoom) -> None:
    room = make_room(secure(ROUNDS)).lock()
    code, said = room.failure("lr-coordinator", "serve", room.run, "--address", "127.0.0.1:0")
    assert code == 2
    assert "cannot read the roster" in said
    flags = members(room)
    again = ("sum", "key", str(room.folder / "hotels.key"))
    code, said = room.failure("lr-worker", *again)
    assert code == 2
    assert "may be in rosters: use it, or choose another name" in said
    with room.coordinator() as (_, address):
        arguments = room.join_arguments(address, "hotels")
        for given, why in (
            ((), "give this worker's --identity and the --roster"),
            (flags["gadgets"], "join with --name gadgets"),
            ((*flags["hotels"], "--min-members", "4"), "this worker wants at least 4"),
        ):
            code, said = room.failure("lr-worker", *arguments, *given)
            assert code in (2, 5)
            assert why in said
