"""Spans and meters on their way to a collector, by OpenTelemetry's SDK and from its own threads.

Whoever measures never waits: what a collector does not take in time is left out, and the log says
so.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace import TraceFlags as Flags

from lorand.otel import FROM_ENVIRONMENT, Attributes, Durations, Meter, RoundId

CLOSING_S: Final = 2.0
"""How long the end of a process waits for a collector."""
EXPORT_S: Final = 3.0
"""How long an export may take, retries included, unless OTEL_EXPORTER_OTLP_TIMEOUT says."""
METERS_S: Final = 15.0
"""Seconds between two exports of meters, unless OTEL_METRIC_EXPORT_INTERVAL says."""
COMPLAINT_S: Final = 300.0
"""Seconds between two complaints about a collector."""
UNITS: Final = {"": "", "ratio": "1", "bytes": "By", "seconds": "s"}

log = logging.getLogger("lorand.otel")


def connected(asked: str, service: str, instance: str, attributes: Attributes) -> "Sender":
    """Return what sends to the collector of --otel, as an instance of a service.

    OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before what is said here.
    """
    _complain_seldom()
    base = None if asked == FROM_ENVIRONMENT else asked.rstrip("/")
    limit = None if "OTEL_EXPORTER_OTLP_TIMEOUT" in os.environ else EXPORT_S
    spans, meters = (
        None if base is None else f"{base}/v1/{each}" for each in ("traces", "metrics")
    )
    every = None if "OTEL_METRIC_EXPORT_INTERVAL" in os.environ else METERS_S * 1000
    named = {"service.name": service, "service.instance.id": instance}
    resource = Resource.create({**named, **attributes}).merge(OTELResourceDetector().detect())
    reader = PeriodicExportingMetricReader(
        OTLPMetricExporter(meters, timeout=limit), export_interval_millis=every
    )
    return Sender(OTLPSpanExporter(spans, timeout=limit), reader, resource)


class Sender:
    """Takes spans and meters, and never waits for where they go."""

    def __init__(self, spans: SpanExporter, meters: MetricReader, resource: Resource) -> None:
        """Start the threads; `close` ends them."""
        self._ids = _Ids()
        # No hooks at the exit of the interpreter: they would wait for longer than `close` does.
        self._traces = TracerProvider(
            resource=resource, id_generator=self._ids, shutdown_on_exit=False
        )
        self._traces.add_span_processor(BatchSpanProcessor(spans))
        self._metrics = MeterProvider([meters], resource=resource, shutdown_on_exit=False)
        self._tracer = self._traces.get_tracer("lorand")
        self._meter = self._metrics.get_meter("lorand")
        self._shown: Mapping[str, list[Observation]] = {}
        self._known: set[str] = set()

    def show(self, meters: Iterable[Meter]) -> None:
        """Have these sent from now on, and none that were shown before and are not among them."""
        shown: dict[str, list[Observation]] = {}
        for meter in meters:
            if meter.name not in self._known:
                self._known.add(meter.name)
                self._create(meter)
            shown.setdefault(meter.name, []).append(Observation(meter.value, meter.labels))
        self._shown = shown  # replaced whole: the SDK's thread reads it

    def _create(self, meter: Meter) -> None:
        def observe(_: CallbackOptions) -> list[Observation]:
            return self._shown.get(meter.name, [])

        of = self._meter
        counts = meter.kind == "counter"
        make = of.create_observable_counter if counts else of.create_observable_gauge
        make(f"lorand.{meter.name}", [observe], UNITS[meter.unit], meter.about)

    def histogram(self, of: Durations) -> Callable[[float], None]:
        """Return what takes the seconds of a histogram."""
        made = self._meter.create_histogram(
            f"lorand.{of.name}", "s", of.about, explicit_bucket_boundaries_advisory=of.buckets
        )
        return made.record

    def ended(
        self, which: RoundId, name: str, seconds: float, attributes: Attributes, wrong: str = ""
    ) -> None:
        """Take the span of a round that ends now; `wrong` says what went wrong with it, if that."""
        end = time.time_ns()
        with self._ids.being(which):
            span = self._tracer.start_span(
                name,
                trace.set_span_in_context(trace.INVALID_SPAN),  # whatever is under way here
                SpanKind.INTERNAL,
                attributes,
                start_time=end - round(seconds * 1e9),
            )
        if wrong:
            span.set_status(Status(StatusCode.ERROR, wrong))
        span.end(end)

    def of_round(
        self, which: RoundId, name: str, attributes: Attributes
    ) -> AbstractContextManager[None]:
        """Take a span of what is done meanwhile for a round, whose own span is elsewhere."""
        there = SpanContext(which.trace, which.span, True, Flags(Flags.SAMPLED))
        return self._around(name, attributes, trace.set_span_in_context(NonRecordingSpan(there)))

    def span(self, name: str, attributes: Attributes) -> AbstractContextManager[None]:
        """Take a span of what is done meanwhile in this thread, within the one around it."""
        return self._around(name, attributes)

    @contextmanager
    def _around(
        self, name: str, attributes: Attributes, parent: Context | None = None
    ) -> Iterator[None]:
        with self._tracer.start_as_current_span(
            name,
            parent,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                # Its kind alone: a message may tell of data.
                span.set_status(Status(StatusCode.ERROR, type(error).__name__))
                raise

    def close(self) -> None:
        """Have what is left sent, within CLOSING_S; the rest is left behind."""
        threads = [
            threading.Thread(target=provider.shutdown, name="otel-closing", daemon=True)
            for provider in (self._traces, self._metrics)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + CLOSING_S
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            log.warning(
                "the collector of --otel did not take the last spans and metrics within %.1f s: "
                "they are left out",
                CLOSING_S,
            )


class _Ids(RandomIdGenerator):
    """Random ids, but a round's own for the span of a round."""

    def __init__(self) -> None:
        self._being: RoundId | None = None

    @contextmanager
    def being(self, which: RoundId) -> Iterator[None]:
        self._being = which
        try:
            yield
        finally:
            self._being = None

    def generate_trace_id(self) -> int:
        return super().generate_trace_id() if self._being is None else self._being.trace

    def generate_span_id(self) -> int:
        return super().generate_span_id() if self._being is None else self._being.span


class _Complaints(logging.Handler):
    """Turns what the SDK logs of each export that fails into a sentence now and then."""

    last = -COMPLAINT_S
    """When it complained last: there is one, as there is one logger of the SDK's."""

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now - _Complaints.last >= COMPLAINT_S:
            _Complaints.last = now
            log.warning(
                "the collector of --otel does not take what is sent, and the run goes on without "
                "(next word of it in %.0f s): %s",
                COMPLAINT_S,
                record.getMessage(),
            )


def _complain_seldom() -> None:
    theirs = logging.getLogger("opentelemetry")
    if not any(isinstance(handler, _Complaints) for handler in theirs.handlers):
        theirs.addHandler(_Complaints(logging.WARNING))
        theirs.propagate = False
