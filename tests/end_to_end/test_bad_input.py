"""What goes wrong on the outside: the message says what to do, and a run goes on."""

import queue
import resource
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import pytest
from tests import tiny
from tests.commands import Command, MakeRoom, Room, committed, free_port, status, wait_for
from tests.runs import IDENTITY, contribution, hello

from lorand import ledger
from lorand.config import PROTOCOL_VERSION, RunConfig
from lorand.privacy.mechanism import Integers
from lorand.directions import Indices
from lorand.ledger import Position
from lorand.manifest import Identity
from lorand.transport import message_limit
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import coordination_pb2_grpc as coordination
from lorand.v1 import ledger_pb2 as pb
from lorand.v1 import ledger_pb2_grpc as ledger_service
from lorand_coordinator.hub import Hub
from lorand_coordinator.sequencer import Outgoing, Sequencer
from lorand_coordinator.store import SqliteStore
from lorand_worker.estimators import Measurement, NonFiniteLoss, Order
from lorand_worker.link import Link
from lorand_worker.session import Session

LIMIT_S = 30.0


def two(**changes: dict[str, Any]) -> tiny.Settings:
    """A zeroth-order run of two workers, long enough that no test sees its end."""
    basis: tiny.Settings = {
        "run": {"rounds": 1000},
        "model": {"name": "none"},
        "rounds": {"start_with": 2},
    }
    sections = [*basis, *(name for name in changes if name not in basis)]
    merged = {name: {**basis.get(name, {}), **changes.get(name, {})} for name in sections}
    return tiny.settings("spsa", **merged)


class Peer:
    """A worker made of a raw stub: it has no model, and sends what it is told to."""

    def __init__(self, address: str, config: RunConfig, name: str) -> None:
        """Open a channel; nothing is sent yet."""
        self._channel = grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)])
        self.name = name
        self.worker = 0
        self.position: Position = ledger.origin(config, IDENTITY)

    def join(self) -> Self:
        """Say Hello and be welcomed."""
        self.open(wire.ParticipateRequest(hello=hello(self.position, self.name)))
        self.worker = self.until("welcome").welcome.worker
        return self

    def open(self, first: wire.ParticipateRequest) -> None:
        """Open the stream with any message."""
        self._requests: queue.Queue[wire.ParticipateRequest | None] = queue.Queue()
        self.send(first)
        stub = coordination.CoordinationServiceStub(self._channel)
        self._call = stub.Participate(iter(self._requests.get, None), timeout=LIMIT_S)

    def send(self, request: wire.ParticipateRequest) -> None:
        """Send a message."""
        self._requests.put(request)

    def report(self, round_index: int, seed: int = 0) -> None:
        """Send some contribution of the right length."""
        self.send(contribution(self.position.config, round_index, seed))

    def until(self, kind: str) -> wire.ParticipateResponse:
        """Return the next message of a kind; entries on the way are applied."""
        for message in self._call:
            if message.HasField("entry"):
                self.position = ledger.apply(self.position, message.entry)
            if message.WhichOneof("message") == kind:
                return message
        raise AssertionError(f"the stream ended before a {kind}")

    def until_committed(self, count: int) -> None:
        """Follow until so many rounds are committed."""
        while self.position.committed < count:
            self.until("entry")

    def failure(self) -> grpc.StatusCode:
        """Return the status code that ends the stream."""
        with pytest.raises(grpc.RpcError) as caught:
            list(self._call)
        assert isinstance(caught.value, grpc.Call)
        code = caught.value.code()
        assert isinstance(code, grpc.StatusCode)
        return code

    def close(self) -> None:
        """Leave."""
        self._call.cancel()
        self._requests.put(None)
        self._channel.close()


@contextmanager
def served(room: Room, *arguments: object) -> Iterator[tuple[Command, str]]:
    """Serve a run of IDENTITY, whose model nobody has."""
    (room.folder / "run.lock").write_text(IDENTITY.to_lock(), encoding="utf-8")
    with room.coordinator(*arguments) as pair:
        yield pair


@contextmanager
def peers(address: str, config: RunConfig) -> Iterator[tuple[Peer, Peer]]:
    """Two workers that have joined, in round 1."""
    pair = Peer(address, config, "one").join(), Peer(address, config, "two").join()
    try:
        for peer in pair:
            assert peer.until("round_start").round_start.round_index == 1
        yield pair
    finally:
        for peer in pair:
            peer.close()


# ------------------------------------------------------------- the coordinator's command


def test_a_port_in_use(make_room: MakeRoom) -> None:
    room = make_room(two())
    with served(room) as (_, address):
        other = ("--address", address, "--ledger", room.folder / "other.ledger")
        code, text = room.failure("lr-coordinator", "serve", room.run, *other)
    assert code == 2
    assert f"cannot listen on {address}: the port is in use" in text
    assert "set service.address" in text


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


def joined(address: str) -> list[str]:
    """Names of everyone who ever joined."""
    answer = status(address)
    return [] if answer is None else [worker.name for worker in answer.workers]


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


# ------------------------------------------------------------- raw messages


def test_who_is_not_let_in(make_room: MakeRoom) -> None:
    """Every handshake that does not fit is refused with a sentence, and writes nothing."""
    room = make_room(two())
    with served(room) as (_, address):
        good = hello(ledger.origin(room.config, IDENTITY), "one")

        def refusal(first: wire.ParticipateRequest) -> wire.Refusal:
            peer = Peer(address, room.config, "one")
            peer.open(first)
            answer = peer.until("refusal").refusal
            peer.close()
            return answer

        cases: list[tuple[dict[str, Any], str]] = [
            ({"protocol_version": 9}, "speaks protocol version 9, the coordinator 1; install"),
            ({"name": ""}, "a worker's name has 1 to 64 characters"),
            ({"base_digest": b"\7" * 32}, "the worker's base weights (0707070707070707) is not"),
            ({"tokenizer_digest": b""}, "the worker's tokenizer (none) is not the coordinator's"),
            ({"manifest_digest": b"\7" * 32}, "parameter manifest"),
            ({"run_digest": b"\7" * 32}, "use the coordinator's run file"),
            ({"next_sequence": 5, "head": b"\7" * 32}, "it was rolled back; restore the ledger"),
            ({"next_sequence": 1, "head": b"\7" * 32}, "the histories differ at entry 0"),
        ]
        for changes, sentence in cases:
            request = wire.Hello()
            request.CopyFrom(good)
            for name, value in changes.items():
                setattr(request, name, value)
            answer = refusal(wire.ParticipateRequest(hello=request))
            assert sentence in answer.reason
            assert not answer.retry
        beat = wire.ParticipateRequest(heartbeat=wire.Heartbeat())
        assert refusal(beat).reason == "the first message of a stream must be Hello"
        assert joined(address) == []


def test_the_first_worker_cannot_poison_a_run_that_adopts_it(make_room: MakeRoom) -> None:
    """A Hello that contradicts itself is refused before entry 0 is written from it."""
    room = make_room(two(run={"adopt_first_worker": True}))
    with room.coordinator() as (coordinator, address):
        good = hello(ledger.origin(room.config, IDENTITY), "one")
        for changes in (
            {"base_digest": b"short"},
            {"manifest": "[]"},
            {"manifest": "not JSON"},
            {"run_digest": b"\7" * 32},
        ):
            request = wire.Hello()
            request.CopyFrom(good)
            for name, value in changes.items():
                setattr(request, name, value)
            peer = Peer(address, room.config, "one")
            peer.open(wire.ParticipateRequest(hello=request))
            assert not peer.until("refusal").refusal.retry
            peer.close()
        answer = status(address)
        assert answer is not None
        assert answer.entries == 0
        with peers(address, room.config):
            assert joined(address) == ["one", "two"]
        assert "Traceback" not in coordinator.errors()


def test_contributions_that_do_not_fit_are_rejected_and_the_run_goes_on(
    make_room: MakeRoom,
) -> None:
    room = make_room(two())
    with served(room) as (coordinator, address), peers(address, room.config) as (one, other):

        def rejection(request: wire.ParticipateRequest) -> str:
            one.send(request)
            return one.until("rejection").rejection.reason

        short = pb.Contribution(round_index=1, codes=b"abc")
        assert rejection(wire.ParticipateRequest(contribution=short)) == (
            "8 int8 codes take 8 bytes, not 3"
        )
        unused = pb.Contribution(round_index=1, codes=b"\x80" * 8)
        assert rejection(wire.ParticipateRequest(contribution=unused)) == "-128 is not an int8 code"
        late = contribution(room.config, 7, seed=0)
        assert rejection(late) == "round 7 takes no contributions: round 1 is under way"
        again = wire.ParticipateRequest(hello=hello(one.position, "one"))
        assert rejection(again) == "a worker does not send hello here"
        assert rejection(wire.ParticipateRequest()) == "a worker does not send nothing here"
        one.report(1)
        one.report(1)  # delivered twice: no answer, counted once
        assert "already reported other scalars" in rejection(contribution(room.config, 1, seed=5))
        other.report(1, seed=2)
        for peer in (one, other):
            peer.until_committed(1)
        assert account(address, "one") == (1, 6)
        # A message above the limit ends its sender's stream, and nobody else's.
        large = pb.Contribution(round_index=2, codes=bytes(message_limit(room.config)))
        other.send(wire.ParticipateRequest(contribution=large))
        assert other.failure() == grpc.StatusCode.RESOURCE_EXHAUSTED
        wait_for(lambda: not is_connected(address, "two"), "the coordinator lets it go")
        other.join()
        for peer in (one, other):
            assert peer.until("round_start").round_start.round_index == 2
            peer.report(2, seed=peer.worker)
        for peer in (one, other):
            peer.until_committed(2)
        assert one.position.head == other.position.head
        assert "Traceback" not in coordinator.errors()
    room.export()


def account(address: str, name: str) -> tuple[int, int]:
    """Contributions and rejections of a worker."""
    answer = status(address)
    assert answer is not None
    (worker,) = [w for w in answer.workers if w.name == name]
    return worker.contributions, worker.rejected


def is_connected(address: str, name: str) -> bool:
    """Whether a worker is connected."""
    answer = status(address)
    return answer is not None and any(w.name == name and w.connected for w in answer.workers)


def test_evaluations_that_do_not_fit_are_refused(make_room: MakeRoom) -> None:
    room = make_room(two())
    run_digest = ledger.origin(room.config, IDENTITY).run_digest
    with served(room) as (_, address):
        with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            stub = ledger_service.LedgerServiceStub(channel)

            def post(evaluation: pb.Evaluation, run: bytes = run_digest) -> str:
                request = pb.PostEvaluationRequest(evaluation=evaluation, run_digest=run)
                with pytest.raises(grpc.RpcError) as caught:
                    stub.PostEvaluation(request, timeout=LIMIT_S)
                assert isinstance(caught.value, grpc.Call)
                assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
                return str(caught.value.details())

            assert "of another run" in post(pb.Evaluation(accuracy=0.5), b"other")
            assert "accuracy in 0" in post(pb.Evaluation(accuracy=1.5))
            assert "finite loss" in post(pb.Evaluation(loss=float("nan")))
            assert "at most 64 characters" in post(pb.Evaluation(evaluator="n" * 65))
        answer = status(address)
        assert answer is not None
        assert answer.entries == 1


def test_a_worker_that_does_not_read_is_dropped_without_a_hole_in_its_history() -> None:
    """What is left in a full outbox may not reach it: the next entries would not follow."""
    config = tiny.config(
        "spsa",
        run={"rounds": 1000},
        rounds={"start_with": 1, "quorum": 1},
        service={"outbox_messages": 8},
    )
    store = SqliteStore(":memory:")
    try:
        hub = Hub(Sequencer(config, store, IDENTITY), clock=lambda: 0.0)
        connection = hub.join(hello(ledger.origin(config, IDENTITY), "one"))
        beat = wire.ParticipateResponse(heartbeat=wire.Heartbeat())
        while not connection.closing:
            assert connection.outbox.qsize() < 20
            hub.deliver([Outgoing(connection.worker, beat)])
        assert connection.closing == "it does not read its messages"
        assert hub.connections == {}
        assert connection.outbox.get_nowait() is None, "nothing is sent after a gap"
    finally:
        store.close()


# ------------------------------------------------------------- trouble in the middle


class Stand:
    """A bench without a model; some of its rounds have no finite loss."""

    examples = 1

    def __init__(self, bad: set[int]) -> None:
        """`bad` counts measurements from 1."""
        self._bad, self.measured = bad, 0

    def adopt(self, position: Position) -> None:
        """See Bench."""

    def measure(self, order: Order) -> Measurement:
        """See Bench."""
        self.measured += 1
        if self.measured in self._bad:
            raise NonFiniteLoss("the loss of this batch is nan")
        return Measurement(np.full(len(order.indices), 0.1), 0.5)

    def release(self, indices: Indices) -> Integers:
        """No test of these is of a private run."""
        raise NotImplementedError


class Quiet:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """See Reporter."""
        self.notes.append(text)

    def progress(self, committed: int, total: int, text: str) -> None:
        """See Reporter."""


def test_a_loss_that_is_not_finite_costs_one_worker_one_round(make_room: MakeRoom) -> None:
    """It sits the round out and says why; where the quorum is lost, the round is abandoned."""
    room = make_room(tiny.settings("spsa", run={"rounds": 4}))
    benches = [Stand({2, 3}), Stand({3}), Stand(set())]
    reports = [Quiet() for _ in benches]
    with served(room) as (_, address):
        links = [Link(address, give_up_s=10.0) for _ in benches]
        sessions = [
            Session(link, room.config, IDENTITY, bench, f"worker-{i}", report)
            for i, (link, bench, report) in enumerate(zip(links, benches, reports, strict=True))
        ]
        threads = [threading.Thread(target=session.run, daemon=True) for session in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        for link in links:
            link.close()
    entries = [ledger.parse(body) for body in ledger.read_file(room.export())]
    outcomes = [e for e in entries if e.WhichOneof("kind") in ("commit", "abandon")]
    numbers = {s.name: s.participant.worker for s in sessions}
    everyone = sorted(n for n in numbers.values() if n is not None)
    assert [list(e.commit.workers) for e in outcomes] == [
        everyone,
        [n for n in everyone if n != numbers["worker-0"]],
        [],
        everyone,
        everyone,
    ]
    # The third may report before or after the round is given up.
    assert outcomes[2].abandon.reason in {
        f"{reported} of 3 participants reported, the quorum is 2; 2 sat the round out"
        for reported in (0, 1)
    }
    assert "sitting out round 2: the loss of this batch is nan" in reports[0].notes
    assert [s.participant.counts.skipped for s in sessions] == [2, 1, 0]
    heads = {s.participant.position.head for s in sessions}
    assert len(heads) == 1


def commit_while_full(room: Room, address: str, fill: Any, free: Any) -> None:
    """Fill the disk, report a round, see that it waits; free it, see that it commits."""
    with peers(address, room.config) as (one, other):
        for peer in (one, other):
            peer.report(1, seed=peer.worker)
        for peer in (one, other):
            peer.until("round_start")
        fill()
        for peer in (one, other):
            peer.report(2, seed=peer.worker)

        def stuck() -> bool:
            answer = status(address)
            return answer is not None and "the ledger cannot be written" in answer.reason

        wait_for(stuck, "the coordinator says that it cannot write")
        assert committed(address) == 1
        free()
        for peer in (one, other):
            peer.until_committed(2)
        assert one.position.head == other.position.head


def test_a_ledger_that_cannot_grow_waits_and_goes_on(make_room: MakeRoom) -> None:
    """A limit on the size of files stands in for a full disk."""
    room = make_room(two())
    unlimited = resource.RLIM_INFINITY
    with served(room) as (coordinator, address):

        def limit(size: int) -> None:
            resource.prlimit(coordinator.pid, resource.RLIMIT_FSIZE, (size, unlimited))

        journal = room.ledger.with_name(room.ledger.name + "-wal")
        commit_while_full(
            room, address, lambda: limit(journal.stat().st_size), lambda: limit(unlimited)
        )
        assert "Traceback" not in coordinator.errors()
    room.export()


def test_a_full_disk_waits_and_goes_on(make_room: MakeRoom, tmp_path: Path) -> None:
    """The same on a small file system of its own, where this process may mount one."""
    room = make_room(two())
    small = tmp_path / "small"
    small.mkdir()
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("there is no mount")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(command, capture_output=True, timeout=10, check=False).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        room.ledger = small / "run.ledger"
        with served(room, "--ledger", room.ledger) as (_, address):
            filler = small / "filler"
            commit_while_full(room, address, lambda: fill_up(filler), filler.unlink)
        room.export()
    finally:
        subprocess.run(["umount", str(small)], timeout=10, check=True)


def fill_up(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return
