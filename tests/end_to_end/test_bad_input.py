"""What goes wrong at the start of a command: the message says what to do."""

import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests import tiny
from tests.commands import MakeRoom, free_port, wait_for
from tests.end_to_end.peers import LIMIT_S, joined, peers, served, two
from tests.runs import IDENTITY

from lorand.config import PROTOCOL_VERSION
from lorand.manifest import Identity
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import coordination_pb2_grpc as coordination

# ------------------------------------------------------------- the coordinator's command


def test_a_port_in_use(make_room: MakeRoom) -> None:
    room = make_room(two())
    with served(room) as (_, address):
        other = ("--address", address, "--ledger", room.folder / "other.ledger")
        code, text = room.failure("lr-coordinator", "serve", room.run, *other)
    assert code == 2
    assert f"cannot listen on {address}: the port is in use" in text
    assert "set service.address" in text


@pytest.mark.slow
def test_run_files_that_are_missing_or_wrong(make_room: MakeRoom) -> None:
    room = make_room(two())
    serve = ("lr-coordinator", "serve")
    code, text = room.failure(*serve, room.folder / "nowhere.toml")
    assert code == 2
    assert "cannot read the run file" in text
    assert "lr-coordinator init" in text
    code, text = room.failure(*serve, room.run)
    assert code == 2
    assert f"there is no {room.folder / 'run.lock'}; write it with `lr-worker prepare" in text
    wrong = room.folder / "wrong.toml"
    content = two(optimizer={"learning_rat": 1.0}, rounds={"quorum": 0})
    wrong.write_text(tiny.to_toml(content), encoding="utf-8")
    code, text = room.failure(*serve, wrong)
    assert code == 2
    assert "optimizer.learning_rat: no such setting" in text
    assert "rounds.quorum: Input should be greater than or equal to 1" in text
    wrong.write_text("[run\n", encoding="utf-8")
    assert "is not valid TOML" in room.failure(*serve, wrong)[1]
    (room.folder / "run.lock").write_bytes(b"\xff\xfe")
    code, text = room.failure(*serve, room.run)
    assert code == 2
    assert "write it again with `lr-worker prepare" in text


@pytest.mark.slow
def test_ledgers_that_cannot_be_used(make_room: MakeRoom) -> None:
    room = make_room(two())
    with served(room):
        code, text = room.failure("lr-coordinator", "serve", room.run)
        assert code == 6
        assert "is in use by another coordinator; stop that one first" in text
    changed = room.folder / "changed.toml"
    changed.write_text(tiny.to_toml(two(task={"labels": ["a", "b"]})), encoding="utf-8")
    code, text = room.failure("lr-coordinator", "serve", changed, "--ledger", room.ledger)
    assert code == 6
    assert "with another config" in text
    assert "another ledger file for a new run" in text
    other = Identity(b"\7" * 32, IDENTITY.tokenizer_digest, IDENTITY.manifest)
    (room.folder / "run.lock").write_text(other.to_lock(), encoding="utf-8")
    code, text = room.failure("lr-coordinator", "serve", room.run)
    assert code == 6
    assert "restore the run.lock of this run" in text


@pytest.mark.slow
def test_a_ledger_that_was_damaged(make_room: MakeRoom) -> None:
    room = make_room(two())
    with served(room) as (_, address), peers(address, room.config) as (one, two_):
        for peer in (one, two_):
            peer.report(1)
        one.until_committed(1)
    exported = room.export()
    cut = room.folder / "cut.bin"
    cut.write_bytes(exported.read_bytes()[:-3])
    code, text = room.failure("lr-worker", "replay", cut)
    assert code == 6
    assert "is cut off; export the ledger again" in text
    database = sqlite3.connect(room.ledger)
    database.execute(
        "UPDATE contribution SET body = CAST(body || x'00' AS BLOB) WHERE position = 1"
    )
    database.commit()
    code, text = room.failure("lr-coordinator", "ledger", "verify", room.ledger)
    assert code == 6
    assert "are not those it was made of" in text
    database.execute("UPDATE entry SET body = CAST(body || x'00' AS BLOB) WHERE sequence = 2")
    database.commit()
    database.close()
    for command in (("ledger", "verify", room.ledger), ("serve", room.run)):
        code, text = room.failure("lr-coordinator", *command)
        assert code == 6
        assert "the hash chain breaks at entry 2" in text
        assert "restore it from a backup" in text
    room.ledger.write_bytes(b"not a database, whatever its name says" * 100)
    code, text = room.failure("lr-coordinator", "serve", room.run)
    assert code == 6
    assert "cannot be used as a ledger" in text
    code, text = room.failure("lr-coordinator", "ledger", "verify", room.folder / "none")
    assert code == 6
    assert "there is no ledger at" in text


def test_no_coordinator_to_ask(make_room: MakeRoom) -> None:
    room = make_room(two())
    address = f"127.0.0.1:{free_port()}"
    for command in ("status", "health"):
        code, text = room.failure("lr-coordinator", command, address)
        assert code == 7
        assert f"no coordinator answers at {address}" in text


# ------------------------------------------------------------- the worker's command


@pytest.mark.slow
def test_a_worker_that_does_not_fit_says_why(
    make_room: MakeRoom, tmp_path: Path, tiny_model: Path
) -> None:
    """Each is refused with a reason and an exit code, and none of them stands in the ledger."""
    room = make_room(tiny.settings("spsa")).lock()
    weights = tiny.write_model(tmp_path / "weights", seed=1)
    words = tiny.write_model(tmp_path / "words", more_words=["unheard"])
    empty = tmp_path / "empty"
    empty.mkdir()
    data = tiny.write_csv(tmp_path / "data.csv", [("fine", "positive"), ("so so", "neutral")])

    def refused(address: str, *arguments: object) -> tuple[int, str]:
        return room.failure("lr-worker", *room.join_arguments(address, "hotels"), *arguments)

    with room.coordinator() as (_, address):
        for arguments, code, sentences in [
            (("--model", weights), 5, ("the base weights here (", "`--model` may point")),
            (("--model", words), 5, ("the tokenizer here (", "comes with the run's model")),
            (("--model", tmp_path / "no"), 2, ("is not a folder",)),
            (("--model", empty), 4, ("cannot load the model", "give a folder with config.json")),
            (("--data", tmp_path / "no.csv"), 3, ("cannot read the data file",)),
            (("--data", data), 3, ("line 3: the label 'neutral' is not one of", "correct the")),
            (("--seed-pool", 4096), 5, ("seed pool of 4096, the run", "`--seed-pool 256`")),
            (("--seed-pool", 100), 2, ("must be a power of two",)),
            (("--device", "abacus"), 2, ("use cpu, cuda or auto",)),
            (("--name", "n" * 65), 5, ("1 to 64 characters; choose one with --name",)),
        ]:
            found, text = refused(address, *arguments)
            assert found == code, text
            for sentence in sentences:
                assert sentence in text
            assert "Traceback" not in text
        with room.join(address, "hotels", "--seed-pool") as allowed:
            wait_for(lambda: joined(address) == ["hotels"], "any finite pool is allowed")
            code, text = refused(address, "--give-up-s", 1)
            assert code == 5
            assert "a worker named 'hotels' is connected; choose another --name" in text
            assert allowed.running()
    began = time.monotonic()
    code, text = refused(f"127.0.0.1:{free_port()}", "--give-up-s", 1)
    assert code == 7
    assert "could not be reached for 1 s" in text
    assert "give the same command again" in text
    assert time.monotonic() - began < 20


class OtherVersion(coordination.CoordinationServiceServicer):
    """A coordinator of the future."""

    def GetRun(self, request: wire.GetRunRequest, context: Any) -> wire.GetRunResponse:
        return wire.GetRunResponse(protocol_version=PROTOCOL_VERSION + 1)

    def Participate(self, request_iterator: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.INTERNAL, "nobody comes this far")


def test_a_coordinator_of_another_version(make_room: MakeRoom) -> None:
    room = make_room(two())
    for future, sentence in [
        (True, f"speaks protocol version {PROTOCOL_VERSION + 1}, this worker {PROTOCOL_VERSION}"),
        (False, "the server there is no lorand coordinator of this version"),
    ]:
        with ThreadPoolExecutor(2) as pool:
            server = grpc.server(pool)
            if future:
                coordination.add_CoordinationServiceServicer_to_server(OtherVersion(), server)
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            join = room.join_arguments(f"127.0.0.1:{port}", "hotels")
            code, text = room.failure("lr-worker", *join)
            server.stop(0).wait(LIMIT_S)
        assert code == 5
        assert sentence in text
