"""Contributions that their workers sign for, as real processes; a coordinator that changes one."""

import signal
import threading
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from tests import tiny
from tests.commands import Command, MakeRoom, Room, committed, wait_for
from tests.end_to_end.peers import LIMIT_S, served
from tests.end_to_end.test_bytes import Silent, Stand
from tests.end_to_end.test_sums import members
from tests.runs import IDENTITY
from tests.unit.signed_histories import rewritten

from lorand import ledger, statements
from lorand.privacy.primitives import IdentityKey
from lorand.privacy.roster import Members
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import show, signing, verification
from lorand_coordinator.stating import Standing
from lorand_coordinator.store import SqliteStore
from lorand_worker.feedback import Place
from lorand_worker.link import Link
from lorand_worker.session import Session
from lorand_worker.stating import Statements

ROUNDS = 40
SETTINGS = tiny.settings(
    "spsa",
    run={"rounds": ROUNDS},
    # A pool so small that whoever comes back leaps to a checkpoint.
    directions={"pool_size": 64},
    estimator={"directions_per_round": 8},
    rounds={"quorum": 2, "start_with": 3, "deadline_s": 3.0},
    service={"heartbeat_timeout_s": 60.0, "checkpoint_every": 3, "statements_every": 4},
)


def contributions(path: Path) -> dict[tuple[int, int], bytes]:
    """All that is stored, by sequence and worker."""
    with closing(SqliteStore(path, read_only=True)) as store:
        parts = [(s, part) for s in range(len(store)) for part in store.contributions(s)]
    return {(s, pb.StoredContribution.FromString(part).worker): part for s, part in parts}


def run_to_the_end(room: Room) -> dict[str, int]:
    """Have three workers take part: one is killed and comes back, one is interrupted for good.

    Returns the numbers of those who stayed.
    """
    flags = members(room)
    with room.coordinator() as (_, address):
        workers: dict[str, Command] = {
            name: room.join(address, name, *flags[name]) for name in flags
        }
        try:
            wait_for(lambda: committed(address) >= 5, "rounds are committed")
            workers["hotels"].kill()
            workers["hotels"] = room.join(address, "hotels", *flags["hotels"])
            wait_for(lambda: committed(address) >= 12, "rounds are committed")
            workers["gadgets"].signal(signal.SIGINT)
            assert workers.pop("gadgets").end()[0] == 130
            results = {name: worker.result() for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.kill()
    return {name: result["worker"] for name, result in results.items()}


def test_a_ledger_is_what_its_workers_signed(make_room: MakeRoom) -> None:
    room = make_room(SETTINGS).lock()
    numbers = run_to_the_end(room)
    assert set(room.state.glob("*.statements.json")) <= {account(room, "gadgets")}

    path = room.folder / "roster.json"
    stored = contributions(room.ledger)
    found = room.once("lr-coordinator", "ledger", "verify", room.ledger, "--roster", path)
    assert (found["committed"], found["contributions_checked"]) == (ROUNDS, len(stored))
    lacking = {each["name"]: each["contributions"] for each in found["not_stated"]}
    # What the interrupted worker had under way, it cannot know the end of.
    assert lacking in ({}, {"gadgets": 1}), found
    assert found["stated"] == len(stored) - sum(lacking.values())
    # Every fourth round, at the end, and where somebody came back: not one a round.
    assert 2 * ROUNDS / 4 <= found["statements_checked"] <= 3 * (ROUNDS / 4 + 2)
    roster = Members.read(path)
    exported = verification.verify(room.export(), roster=roster).standing
    assert exported == Standing(found["statements_checked"], 0, ())
    forge(room, numbers["hotels"], stored)


def account(room: Room, name: str) -> Path:
    """Where a worker keeps what it has not stated yet."""
    run_digest = ledger.origin_of(next(show.bodies(room.ledger))).run_digest
    return Place(room.state, run_digest, name).file("statements.json")


def forge(room: Room, worker: int, stored: dict[tuple[int, int], bytes]) -> None:
    """Change one contribution, and with the coordinator's key everything that hangs on it."""
    at = sorted(sequence for sequence, who in stored if who == worker)[7]
    index = pb.StoredContribution.FromString(stored[at, worker]).contribution.round_index

    def change(entry: pb.Entry, parts: list[bytes]) -> list[bytes]:
        changed = []
        for body in parts:
            part = pb.StoredContribution.FromString(body)
            if (entry.sequence, part.worker) == (at, worker):
                part.contribution.codes = bytes(~code & 127 for code in part.contribution.codes)
            changed.append(part.SerializeToString(deterministic=True))
        assert (changed != parts) == (entry.sequence == at)
        return changed

    key = signing.key_at(signing.key_beside(room.ledger))
    forged = rewritten(room.ledger, room.folder / "forged.ledger", key, change)
    assert verification.verify(forged, key.public).position.committed == ROUNDS
    verify = ("lr-coordinator", "ledger", "verify", forged, "--key", key.public.hex())
    path = room.folder / "roster.json"
    code, told = room.failure(*verify, "--roster", path)
    assert code == 6
    assert f"worker {worker} ('hotels') signed other contributions for rounds " in told
    first, last = (int(word) for word in told.split("for rounds ")[1].split(" (")[0].split(" to "))
    assert first <= index <= last < first + 12
    assert told.count(" signed other ") == 1

    # Without the workers' keys it can leave their statements out, and that is told.
    with closing(SqliteStore(forged)) as store:
        store._database.execute("DELETE FROM statement")
    found = verification.verify(forged, key.public, roster=Members.read(path)).standing
    assert found is not None
    assert (found.stated, found.statements) == (0, 0)
    assert sum(each.contributions for each in found.unstated) == len(stored)


# ------------------------------------------------------------- what may go wrong on the way


class Notes(Silent):
    """Keeps what a session says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        """Keep it."""
        self.said.append(text)


def play(room: Room, address: str, reports: dict[str, Notes]) -> None:
    """Have two workers take part, or come back, until the run is finished."""
    links = [Link(address, give_up_s=10.0) for _ in reports]
    threads = []
    for seed, (link, (name, report)) in enumerate(zip(links, reports.items(), strict=True)):
        one = Session(
            *(link, room.config, IDENTITY, Stand(seed), name, report, room.state), key=KEYS[name]
        )
        threads.append(threading.Thread(target=one.run, daemon=True))
    for thread in threads:
        thread.start()
    for thread, link in zip(threads, links, strict=True):
        thread.join(LIMIT_S)
        assert not thread.is_alive()
        link.close()


KEYS = {name: IdentityKey(name.encode().ljust(32)) for name in ("one", "two")}
SHORT = tiny.settings(
    "spsa",
    run={"rounds": 6},
    rounds={"quorum": 2, "start_with": 2},
    service={"statements_every": 2},
)


def standing_of(room: Room) -> Standing | None:
    roster = Members.of({name: key.public for name, key in KEYS.items()})
    return verification.verify(room.ledger, roster=roster).standing


def test_what_is_not_taken_is_kept_for_the_same_command(
    make_room: MakeRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends while no statement arrives; asked again, the worker hands it in."""
    room = make_room(SHORT)
    with served(room) as (_, address):
        with monkeypatch.context() as patch:

            def away(self: Link, *_: object) -> None:
                raise grpc.RpcError("away")

            patch.setattr(Statements, "due", lambda self, committed, every: False)
            patch.setattr(Link, "post_statement", away)
            reports = {name: Notes() for name in KEYS}
            play(room, address, reports)
        for report in reports.values():
            assert "the same command hands it in later" in report.said[-1]
        assert len(list(room.state.glob("*.statements.json"))) == 2
        found = standing_of(room)
        assert found is not None
        assert (found.stated, [each.contributions for each in found.unstated]) == (0, [6, 6])
        play(room, address, {name: Notes() for name in KEYS})
    assert not list(room.state.glob("*.statements.json"))
    assert standing_of(room) == Standing(2, 12, ())


def test_a_refused_statement_is_said_and_the_run_goes_on(
    make_room: MakeRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here because two processes sign with another run's digest, as an other program might."""
    room = make_room(SHORT)
    sign = statements.sign
    false = "lorand_worker.stating.statements.sign"
    monkeypatch.setattr(false, lambda key, run, made: sign(key, bytes(32), made))
    reports = {name: Notes() for name in KEYS}
    with served(room) as (coordinator, address):
        play(room, address, reports)
        assert "a statement was refused: the statement is not signed" in coordinator.errors()
    for report in reports.values():
        assert any("statement of this worker was refused" in said for said in report.said)
    found = standing_of(room)
    assert found is not None
    assert (found.statements, sum(each.contributions for each in found.unstated)) == (0, 12)
