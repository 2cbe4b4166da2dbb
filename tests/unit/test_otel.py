"""What --otel sends, to whom, and that nobody waits for it."""

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.commands import free_port
from tests.runs import IDENTITY, config_of
from tests.unit.page.staging import Stage

from lorand import ledger, otel
from lorand.errors import ConfigError
from lorand.otel import Durations, Meter, RoundId

pytest.importorskip("opentelemetry.sdk")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.collector import SOON_S, collecting

from lorand import otlp
from lorand.otlp import Sender
from lorand_coordinator import meters
from lorand_coordinator.monitoring import Asked, Monitor
from lorand_coordinator.page.view import Spent
from lorand_coordinator.spending import Spending
from lorand_coordinator.traces import Traces
from lorand_worker import traced
from lorand_worker.estimators import NonFiniteLoss

CONFIG = config_of()
RUN = ledger.origin(CONFIG, IDENTITY)


class Kept:
    """A sender whose spans and meters are kept here."""

    def __init__(self) -> None:
        self._spans, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.sender = Sender(self._spans, self.reader, Resource({}))

    def spans(self) -> list[ReadableSpan]:
        """Send what is left, and return all that was sent."""
        self.sender.close()
        return list(self._spans.get_finished_spans())

    def meters(self) -> dict[str, dict[tuple[str, ...], Any]]:
        """Every meter by its name, as points by their labels."""
        data: Any = self.reader.get_metrics_data()
        metrics = data.resource_metrics[0].scope_metrics[0].metrics
        return {
            metric.name: {
                tuple(point.attributes.values()): point for point in metric.data.data_points
            }
            for metric in metrics
        }


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """Threads that a sender left behind give up before the next test, which may read the log."""
    yield
    for thread in threading.enumerate():
        if thread.name.lower().startswith("otel"):
            thread.join(2 * SOON_S)
            assert not thread.is_alive(), thread.name


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.sender.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage(IDENTITY)
    made.join("ada")
    made.join("ben")
    yield made
    made.close()


def about(span: ReadableSpan) -> dict[str, Any]:
    return {key.removeprefix("lorand."): value for key, value in (span.attributes or {}).items()}


# -- what may be asked -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "environment", "told"),
    [
        ("127.0.0.1:4318", {}, "is no URL of a collector; it is like http://127.0.0.1:4318"),
        ("env", {}, "OTEL_EXPORTER_OTLP_ENDPOINT says, which is not set"),
        ("http://a", {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "sends http/protobuf alone"),
    ],
)
def test_what_cannot_be_asked(
    asked: str, environment: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=told):
        Asked(otel=asked).check()


def test_without_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs opentelemetry-sdk, .* 'lorand\[otel\]'"):
        otel.check("http://127.0.0.1:4318")


def test_the_environment_alone_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that set the variable for other programs tell nobody of a run."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(otlp, "connected", lambda *_: pytest.fail("it connects"))
    bench: Any = SimpleNamespace()
    with traced.watched("", CONFIG, IDENTITY, "ada", bench, lambda *_: None) as seen:
        assert seen.bench is bench
        assert seen.round is traced.unwatched

    async def run() -> None:
        async with Monitor(CONFIG, "none").running():
            pass

    asyncio.run(run())


# -- a coordinator ---------------------------------------------------------------------------------


def test_a_round_is_a_span(kept: Kept, stage: Stage) -> None:
    Traces(CONFIG, kept.sender, Spending(CONFIG)).lead(stage.hub)
    first, second = stage.hub.connections.values()
    stage.answer(first)
    stage.answer(first, loss=0.25)  # not taken: it answered already
    stage.now += 2.5
    stage.answer(second)
    stage.commit()
    one, other = kept.spans()
    assert about(one) == {
        **{"run": "small", "round": 1, "participants": 2, "accepted": 2, "skipped": 0},
        **{"rejected": 1, "committed": 1, "loss": 0.5},
    } | {name: value for name, value in about(one).items() if name == "signal_to_noise"}
    assert (about(other)["round"], about(other)["rejected"]) == (2, 0)
    assert one.name == "round"
    assert one.parent is None
    assert one.start_time is not None
    assert one.end_time is not None
    assert one.end_time - one.start_time == 2_500_000_000
    expected = RoundId.of(RUN.run_digest, 1)
    context = one.get_span_context()
    assert context is not None
    assert (context.trace_id, context.span_id) == (expected.trace, expected.span)


def test_a_round_that_is_given_up_says_why(kept: Kept, stage: Stage) -> None:
    Traces(CONFIG, kept.sender, Spending(CONFIG)).lead(stage.hub)
    stage.answer(stage.hub.connections[1])
    stage.wait(CONFIG.rounds.deadline_s)
    stage.wait(CONFIG.service.commit_retry_s)  # what it rests then
    stage.commit()
    one, other = kept.spans()
    assert not one.status.is_ok
    assert "1 of" in str(one.status.description)
    assert (about(one)["round"], about(one)["accepted"]) == (1, 1)
    assert other.status.is_ok or other.status.is_unset
    assert (about(other)["round"], about(other)["committed"]) == (2, 1)


def test_meters_are_those_of_prometheus(kept: Kept, stage: Stage) -> None:
    spending = Spending(CONFIG)
    traces = Traces(CONFIG, kept.sender, spending)
    traces.lead(stage.hub)
    stage.commit(rounds=2)
    traces.refresh()
    found = kept.meters()
    for meter in meters.of("small", stage.hub, spending.spent):
        labels = tuple(meter.labels.values())
        assert found[f"lorand.{meter.name}"][labels].value == meter.value, meter.name
    assert found["lorand.rounds_committed"][()].value == 2
    assert found["lorand.round_duration"][()].count == 2
    assert found["lorand.round_duration"][()].explicit_bounds == meters.ROUNDS.buckets
    traces.rest()
    assert found.keys() > {name for name, points in kept.meters().items() if points}
    assert kept.meters()["lorand.leading"][()].value == 0


def test_what_a_private_run_spent_is_among_them(stage: Stage) -> None:
    section = CONFIG.privacy.model_copy(update={"mode": "worker", "target_epsilon": 4.0})
    stage.hub.config = CONFIG.model_copy(update={"privacy": section})
    found = {meter.name: meter.value for meter in meters.of("small", stage.hub, Spent(7, 1.5))}
    assert (found["privacy_epsilon_spent"], found["privacy_epsilon_target"]) == (1.5, 4.0)


def test_a_ledger_that_cannot_be_read_ends_nothing(
    kept: Kept, stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    traces = Traces(CONFIG, kept.sender, Spending(CONFIG))
    traces.lead(stage.hub)
    monkeypatch.setattr(meters, "of", lambda *_: 1 / 0)
    traces.refresh()
    assert "could not be brought up to date" in caplog.text


# -- a worker --------------------------------------------------------------------------------------


def test_a_worker_measures_in_the_coordinator_s_round(kept: Kept) -> None:
    bench: Any = SimpleNamespace(
        examples=7, adopt=lambda at: None, measure=lambda order: "measured"
    )
    rows: list[tuple[int, dict[str, float | None]]] = []
    seen = traced.watching(kept.sender, RUN, bench, lambda *row: rows.append(row))
    order: Any = SimpleNamespace(indices=range(3))
    with seen.round(5):
        seen.bench.adopt(RUN)
        measured: object = seen.bench.measure(order)
    assert measured == "measured"
    assert seen.bench.examples == 7
    seen.figures(5, {"local_loss": 0.5, "bytes_sent": 60, "skipped": None})
    assert rows == [(5, {"local_loss": 0.5, "bytes_sent": 60, "skipped": None})]
    found = kept.meters()
    assert found["lorand.local_loss"][()].value == 0.5
    assert found["lorand.sent"][()].value == 60
    assert "lorand.skipped" not in found
    apply, measure, answer = kept.spans()
    assert [span.name for span in (apply, measure, answer)] == ["apply", "measure", "answer"]
    there, around = RoundId.of(RUN.run_digest, 5), answer.get_span_context()
    assert answer.parent is not None
    assert (answer.parent.trace_id, answer.parent.span_id) == (there.trace, there.span)
    assert around is not None
    for span in (apply, measure):
        assert span.parent is not None
        assert (span.parent.trace_id, span.parent.span_id) == (there.trace, around.span_id)


def test_what_goes_wrong_is_told_by_its_kind_alone(kept: Kept) -> None:
    """A message may tell of somebody's examples."""

    def measure(order: object) -> None:
        raise NonFiniteLoss("of the review of Mrs Miller")

    bench: Any = SimpleNamespace(measure=measure)
    seen = traced.watching(kept.sender, RUN, bench, lambda *_: None)
    with pytest.raises(NonFiniteLoss), seen.round(1):
        seen.bench.measure(SimpleNamespace(indices=range(3)))  # type: ignore[arg-type]
    for span in kept.spans():
        assert "Miller" not in span.to_json()
        assert span.status.description == "NonFiniteLoss"


# -- collectors ------------------------------------------------------------------------------------


def send(sender: Sender) -> None:
    """Send a little of everything."""
    sender.show([Meter("loss", "Of a round.", 0.5)])
    sender.histogram(Durations("round_duration", "Of rounds.", (1.0,)))(1.5)
    sender.ended(RoundId.of(b"run", 1), "round", 1.5, {"lorand.round": 1})


@pytest.mark.parametrize("by", ["url", "environment"])
def test_a_collector_is_sent_all_of_it(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=ours")
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        asked = "env" if by == "environment" else collector.url
        otel.check(asked)
        sender = otlp.connected(asked, "lorand-worker", "ada", {"lorand.run": "small"})
        send(sender)
        sender.close()
    assert [span.name for span in collector.spans] == ["round"]
    assert collector.spans[0].trace_id == RoundId.of(b"run", 1).trace.to_bytes(16)
    assert collector.meters == {"lorand.loss": [0.5], "lorand.round_duration": [1.5]}
    assert collector.instances == {"ours ada"}


def nobody() -> str:
    return f"http://127.0.0.1:{free_port()}"


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "down"])
def test_nobody_waits_for_a_collector(
    silent: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """More rounds than a queue takes are reported, and then comes the end."""
    monkeypatch.setattr(otlp, "CLOSING_S", 0.3)
    monkeypatch.setattr(otlp, "EXPORT_S", 1.0)
    monkeypatch.setattr(otlp._Complaints, "last", -otlp.COMPLAINT_S)
    with collecting(answers=False) as collector:
        sender = otlp.connected(collector.url if silent else nobody(), "lorand-worker", "ada", {})
        began = time.monotonic()
        for index in range(3000):
            sender.ended(RoundId.of(b"run", index), "round", 1.0, {})
        assert not silent or collector.asked.wait(SOON_S)
        sent = time.monotonic()
        sender.close()
        ended = time.monotonic()
    assert ended - sent < 1.0
    assert sent - began < SOON_S
    if silent:  # who refuses at once is given up at once
        assert "within 0.3 s: they are left out" in caplog.text
    said = [r for r in caplog.records if "does not take what is sent" in r.getMessage()]
    assert len(said) == 1, "of thousands of spans"
    assert said[0].levelno == logging.WARNING


def test_a_run_with_a_silent_collector(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp, "CLOSING_S", 0.2)
    monkeypatch.setattr(otlp, "EXPORT_S", 0.2)

    async def run(url: str) -> float:
        async with Monitor(CONFIG, tmp_path / "none", Asked(otel=url)).running() as monitor:
            monitor.lead(stage.hub)
            stage.commit(rounds=CONFIG.run.rounds)
            ended = time.monotonic()
        return time.monotonic() - ended

    with collecting(answers=False) as collector:
        assert asyncio.run(run(collector.url)) < 1.0
    assert stage.hub.sequencer.engine.phase == "finished"
