"""Messages that do not fit are refused, and a run goes on."""

from typing import Any

import grpc
import pytest
from tests import tiny
from tests.commands import MakeRoom, status, wait_for
from tests.end_to_end.peers import LIMIT_S, Peer, joined, peers, served, two
from tests.runs import IDENTITY, contribution, hello

from lorand import ledger
from lorand.transport import message_limit
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand.v1 import ledger_pb2_grpc as ledger_service
from lorand_coordinator.hub import Hub
from lorand_coordinator.sequencer import Outgoing, Sequencer
from lorand_coordinator.store import SqliteStore


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
