"""What Prometheus reads of a coordinator, made from the hub's state when it is asked for."""

from collections.abc import Callable, Iterable
from itertools import groupby

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lorand.otel import Durations
from lorand_coordinator import meters
from lorand_coordinator.hub import Hub
from lorand_coordinator.page.view import Spent

Now = Callable[[], tuple[Hub | None, Spent | None]]
"""Returns the hub of the run that is led here, if any, and what a private run spent."""


class Metrics:
    """Two histograms, which follow rounds as they commit, and the state as it is when read."""

    def __init__(self, run: str, now: Now) -> None:
        """Count nothing yet."""
        self._registry = CollectorRegistry()
        self._registry.register(_State(run, now))
        self._commits, self._rounds = map(self._histogram, (meters.COMMITS, meters.ROUNDS))

    def _histogram(self, of: Durations) -> Histogram:
        name = f"lorand_{of.name}_seconds"
        return Histogram(name, of.about, registry=self._registry, buckets=of.buckets)

    def committed(self, commit_s: float, round_s: float) -> None:
        """Take in a committed round."""
        self._commits.observe(commit_s)
        self._rounds.observe(round_s)

    def text(self) -> tuple[bytes, str]:
        """Return the exposition and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _State(Collector):
    def __init__(self, run: str, now: Now) -> None:
        self._run, self._now = run, now

    def describe(self) -> Iterable[Metric]:
        return []  # what there is depends on the run

    def collect(self) -> Iterable[Metric]:
        now = meters.of(self._run, *self._now())
        for _, group in groupby(now, key=lambda meter: meter.name):
            each = list(group)
            first = each[0]
            kind = CounterMetricFamily if first.kind == "counter" else GaugeMetricFamily
            name = "_".join(filter(None, ("lorand", first.name, first.unit)))
            family = kind(name, first.about, labels=list(first.labels))
            for meter in each:
                family.add_metric(list(meter.labels.values()), meter.value)
            yield family
