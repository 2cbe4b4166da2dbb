"""`--otel` of real processes: a round is one trace of all who took part; nobody waits for it."""

import signal
import time

import pytest
from tests import tiny
from tests.commands import Command, MakeRoom

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from tests.collector import collecting

from lorand import otlp

pytestmark = pytest.mark.slow
ROUNDS = 3
SLACK_S = 2.0


def stop(command: Command) -> None:
    """Interrupt a command, and wait for its end."""
    command.signal(signal.SIGINT)
    assert command.end()[0] == 0, command.errors()


def test_a_round_is_one_trace_of_all(make_room: MakeRoom) -> None:
    names = ("hotels", "gadgets")
    room = make_room(
        tiny.settings("backprop", run={"rounds": ROUNDS}, rounds={"start_with": len(names)})
    ).lock()
    with collecting() as collector:
        to = ("--otel", collector.url)
        with room.coordinator(*to) as (command, address):
            workers = [room.join(address, name, *to) for name in names]
            heads = {worker.result()["head"] for worker in workers}
            stop(command)
    assert len(heads) == 1
    rounds = {span.span_id: span for span in collector.spans if span.name == "round"}
    answers = [span for span in collector.spans if span.name == "answer"]
    assert len(rounds) == ROUNDS
    assert len(answers) == ROUNDS * len(names)
    for answer in answers:
        assert rounds[answer.parent_span_id].trace_id == answer.trace_id
    measured = [span.parent_span_id for span in collector.spans if span.name == "measure"]
    assert sorted(measured) == sorted(answer.span_id for answer in answers)
    assert {"lorand-worker hotels", "lorand-worker gadgets"} < collector.instances
    assert collector.meters["lorand.rounds_committed"] == [ROUNDS]


def test_a_coordinator_ends_though_its_collector_is_silent(make_room: MakeRoom) -> None:
    room = make_room(tiny.settings("backprop")).lock()
    with (
        collecting(answers=False) as collector,
        room.coordinator("--otel", collector.url) as (it, _),
    ):
        began = time.monotonic()
        stop(it)
        draining = room.config.service.drain_s
        assert time.monotonic() - began < otlp.CLOSING_S + draining + SLACK_S
        assert "did not take the last spans" in it.errors()
