"""What waits for a worker is bounded in bytes, too; a stop leaves the round as it is."""

from collections.abc import Iterator

import pytest
from tests import tiny
from tests.runs import IDENTITY, hello

from lorand import ledger
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import hub as hubs
from lorand_coordinator.hub import CatchUpFirst, Hub, Outbox
from lorand_coordinator.sequencer import Message, Outgoing, Sequencer
from lorand_coordinator.store import SqliteStore


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A run that begins with its first worker."""
    config = tiny.config("spsa", rounds={"start_with": 1, "quorum": 1})
    store = SqliteStore(":memory:")
    yield Hub(Sequencer(config, store, IDENTITY), clock=lambda: 0.0)
    store.close()


def greeting(hub: Hub, name: str) -> wire.Hello:
    return hello(ledger.origin(hub.config, IDENTITY), name)


def test_an_outbox_is_full_by_messages_or_by_bytes() -> None:
    large = Message(entry=bytes(1000))
    box = Outbox(messages=3, size=1500)
    box.put_nowait(large)
    assert not box.full()
    box.put_nowait(large)
    assert box.full()
    assert box.get_nowait() is large
    assert not box.full()
    for _ in range(2):
        box.put_nowait(Message())
    assert box.full()


def test_who_does_not_read_large_entries_is_dropped(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hubs, "OUTBOX_BYTES", 10_000)
    connection = hub.join(greeting(hub, "one"))
    while not connection.closing:
        assert connection.outbox.qsize() < 30
        hub.deliver([Outgoing(connection.worker, Message(entry=bytes(1000)))])
    assert connection.closing == "it does not read its messages"


def test_who_lacks_many_bytes_reads_the_ledger_first(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = pb.Evaluation(evaluator="e" * 64, accuracy=0.5, loss=1.0)
    run_digest = ledger.origin(hub.config, IDENTITY).run_digest
    for _ in range(20):
        hub.sequencer.post_evaluation(evaluation, run_digest)
    monkeypatch.setattr(hubs, "OUTBOX_BYTES", 1000)
    with pytest.raises(CatchUpFirst, match="read the ledger first"):
        hub.join(greeting(hub, "one"))
    assert hub.connections == {}


@pytest.mark.parametrize("draining", [False, True])
def test_only_a_worker_that_leaves_by_itself_leaves_the_round(hub: Hub, draining: bool) -> None:
    connection = hub.join(greeting(hub, "one"))
    assert hub.sequencer.engine.members == {connection.worker}
    hub.draining = draining
    hub.drop(connection, "the coordinator is shutting down")
    assert hub.sequencer.engine.members == ({connection.worker} if draining else frozenset())
    assert hub.connections == {}
