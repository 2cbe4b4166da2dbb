"""What crosses the network in a round, counted: the claim of the project (DESIGN §3)."""

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pytest
from tests import tiny
from tests.commands import MakeRoom, status
from tests.runs import IDENTITY, hello

from lorand import ledger
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.ledger import Position
from lorand.privacy.mechanism import Integers
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand.v1 import status_pb2
from lorand_coordinator.sequencer import Outgoing, Sequencer
from lorand_coordinator.store import SqliteStore
from lorand_worker.estimators import Measurement, Order
from lorand_worker.link import Link
from lorand_worker.participant import Participant
from lorand_worker.session import Session

WORKERS: Final = (1, 2, 3)
POOL: Final = 4096
JOIN_LIMIT_S: Final = 30.0

ZEROTH: Final = tiny.config(
    "spsa",
    run={"rounds": 30},
    directions={"pool_size": POOL},
    estimator={"directions_per_round": 8},
    codec={"up": "int8", "down": "int8"},
)
FIRST: Final = tiny.config(
    "backprop",
    run={"rounds": 10},
    directions={"pool_size": POOL},
    codec={"up": "sign", "down": "sign"},
)


class Stand:
    """A bench without a model: normal scalars, of any size a loss might give."""

    examples = 1

    def __init__(self, seed: int) -> None:
        """`seed` fixes the scalars."""
        self._source = np.random.default_rng(seed)

    def adopt(self, position: Position) -> None:
        """See Bench."""

    def measure(self, order: Order) -> Measurement:
        """See Bench."""
        return Measurement(self._source.normal(0.0, 3.0, len(order.indices)), 0.6931)

    def release(self, indices: Indices) -> Integers:
        """No test of these is of a private run."""
        raise NotImplementedError


@dataclass
class Count:
    """Bytes by (worker, round): protobuf messages of the stream, each way."""

    up: dict[tuple[int, int], int] = field(default_factory=dict)
    down: dict[tuple[int, int], int] = field(default_factory=dict)


def play(config: RunConfig) -> Count:
    """Run to the end without a network; count every message of every round."""
    store = SqliteStore(":memory:")
    sequencer = Sequencer(config, store, IDENTITY)
    participants: dict[int, Participant] = {}
    waiting: deque[Outgoing] = deque()
    for worker in WORKERS:
        participant = Participant(ledger.origin(config, IDENTITY), Stand(worker))
        number, others = sequencer.admit(hello(participant.position, f"worker-{worker}"))
        participant.worker = number
        participants[number] = participant
        waiting.extend(others)
        for body in sequencer.tail(0):
            participant.on_entry(body)
        waiting.extend(sequencer.connect(number, now=0.0))
    count = Count()
    while waiting:
        item = waiting.popleft()
        participant, message = participants[item.worker], item.message
        if message.HasField("entry"):
            entry = participant.on_entry(message.entry)
            if not entry.HasField("commit"):
                continue
            _add(count.down, item.worker, entry.round_index, message.ByteSize())
        else:
            assert message.HasField("round_start"), message
            round_index = message.round_start.round_index
            _add(count.down, item.worker, round_index, message.ByteSize())
            request = participant.on_round_start(message.round_start)
            assert request.HasField("contribution")
            _add(count.up, item.worker, round_index, request.ByteSize())
            waiting.extend(sequencer.receive(item.worker, request, now=0.0))
    assert all(p.position.finished for p in participants.values())
    store.close()
    return count


def _add(counts: dict[tuple[int, int], int], worker: int, round_index: int, size: int) -> None:
    counts[worker, round_index] = counts.get((worker, round_index), 0) + size


@pytest.mark.parametrize(
    ("config", "most_up", "most_down"),
    [(ZEROTH, 64, 128), (FIRST, POOL // 8 + 64, POOL // 8 + 64)],
    ids=["zeroth-order", "first-order"],
)
def test_bytes_of_a_workers_round(config: RunConfig, most_up: int, most_down: int) -> None:
    """Three workers: contribution up; start of the round and its commit down."""
    count = play(config)
    rounds = len(WORKERS) * config.run.rounds
    for sizes, most in ((count.up, most_up), (count.down, most_down)):
        assert len(sizes) == rounds
        assert max(sizes.values()) <= most


def test_the_counters_of_a_real_run_agree(make_room: MakeRoom) -> None:
    """Over gRPC the streams carry what was counted above, and both sides count the same."""
    room = make_room(
        tiny.settings(
            "spsa",
            run={"rounds": 30},
            directions={"pool_size": POOL},
            service={"heartbeat_s": 60.0, "heartbeat_timeout_s": 120.0},
        )
    )
    (room.folder / "run.lock").write_text(IDENTITY.to_lock(), encoding="utf-8")
    with room.coordinator() as (_, address):
        links = [Link(address, give_up_s=10.0) for _ in WORKERS]
        sessions = [
            Session(link, room.config, IDENTITY, Stand(worker), f"worker-{worker}", Silent())
            for worker, link in zip(WORKERS, links, strict=True)
        ]
        threads = [threading.Thread(target=session.run, daemon=True) for session in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(JOIN_LIMIT_S)
            assert not thread.is_alive()
        answer = status(address)
        for link in links:
            link.close()
    assert answer is not None
    whole = sum(map(len, ledger.read_file(room.export())))
    before = sum(len(b) for b in ledger.read_file(room.export()) if not _is_commit(b))
    for session, worker in zip(sessions, by_name(answer.workers), strict=True):
        traffic = session.link.traffic
        requests = [
            wire.GetRunRequest(protocol_version=1),
            pb.GetCheckpointRequest(present=True),
            pb.GetHeadRequest(size=4),  # at the join: the history that the worker found
            pb.GetHeadRequest(size=answer.entries, known_size=4),  # and at the end
        ]
        assert worker.bytes_received == traffic.sent - sum(r.ByteSize() for r in requests)
        assert worker.contributions == 30
        assert worker.bytes_received <= 30 * 64 + 512, "a Hello and thirty contributions"
        assert worker.bytes_sent <= 30 * 128 + before
        assert whole - before <= traffic.received <= worker.bytes_sent + before + 4096


def by_name(workers: Iterable[status_pb2.WorkerStatus]) -> list[status_pb2.WorkerStatus]:
    """Workers in the order of their names."""
    return sorted(workers, key=lambda worker: worker.name)


def _is_commit(body: bytes) -> bool:
    return ledger.parse(body).HasField("commit")


class Silent:
    """A reporter that says nothing."""

    def note(self, text: str) -> None:
        """See Reporter."""

    def progress(self, committed: int, total: int, text: str) -> None:
        """See Reporter."""
