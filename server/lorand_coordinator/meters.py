"""What a run counts, made from the hub's state: read by Prometheus, and sent by OpenTelemetry."""

from collections.abc import Iterator
from typing import Any, Final

from lorand.otel import Durations, Meter
from lorand_coordinator.hub import Hub
from lorand_coordinator.page import view
from lorand_coordinator.page.view import Spent

COMMITS: Final = Durations(
    "commit_duration",
    "From the event that completed a round to its durable entry.",
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)
ROUNDS: Final = Durations(
    "round_duration",
    "From a round's start to its durable entry.",
    (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)


def of(run: str, hub: Hub | None, spent: Spent | None) -> Iterator[Meter]:
    """Yield the figures of a run, if it is led here; those of a name come in a row."""
    yield Meter("run_info", "The run.", 1.0, labels={"name": run})
    yield Meter("leading", "Whether this coordinator leads the run.", float(hub is not None))
    if hub is not None:
        status = view.status(hub, spent)
        yield from _counters(hub, status)
        yield from _gauges(hub, status)


def _counters(hub: Hub, status: dict[str, Any]) -> Iterator[Meter]:
    size, tally = status["bytes"], hub.sequencer.tally
    contributions = sum(each.contributions for each in tally.accounts.values())

    def count(name: str, about: str, value: float, **labels: str) -> Meter:
        return Meter(name, about, value, "counter", labels=labels)

    def count_bytes(name: str, about: str, value: float) -> Meter:
        return Meter(name, about, value, "counter", "bytes")

    yield count("rounds_committed", "Rounds committed since the run began.", status["committed"])
    yield count("rounds_abandoned", "Rounds given up since the run began.", status["abandoned"])
    yield count("contributions", "Contributions in committed rounds.", contributions)
    yield count_bytes("codes", "Bytes of codes in committed rounds, both ways.", size["codes"])
    yield count_bytes("received", "Message bytes received of workers.", size["received"])
    yield count_bytes("sent", "Message bytes sent to workers.", size["sent"])
    for reason in ("malformed", "untimely", "unexpected"):
        yield count("rejected", "Messages not taken.", tally.rejected[reason], reason=reason)


def _gauges(hub: Hub, status: dict[str, Any]) -> Iterator[Meter]:
    engine, workers = hub.sequencer.engine, status["workers"]
    left = max(0.0, engine.deadline - hub.clock()) if engine.phase == "reporting" else 0.0
    failing = float(status["state"] == "failed")
    warnings = sum(finding["warning"] for finding in status["findings"])
    yield Meter("workers_connected", "Workers connected.", workers["connected"])
    yield Meter("workers_known", "Workers that ever joined.", workers["known"])
    yield Meter(
        "workers_quarantined", "Workers that the run goes on without.", workers["quarantined"]
    )
    yield Meter("rounds_wanted", "Rounds the run is to have.", status["rounds"])
    yield Meter("ledger_entries", "Entries in the ledger.", status["entries"])
    yield Meter("ledger_failing", "Whether the ledger cannot be written.", failing)
    yield Meter(
        "round_deadline", "Seconds to the deadline of the round under way.", left, unit="seconds"
    )
    yield Meter("findings", "Warnings that the scalars give rise to.", warnings)
    if status["loss"] is not None:
        yield Meter("loss", "Mean loss of the last round's participants.", status["loss"])
    if status["signal"] is not None:
        signal = status["signal"][0]
        yield Meter("signal_to_noise", "Of mean scalars, last rounds.", signal, unit="ratio")
    for curve in view.evaluations(hub):
        by = {"evaluator": curve["evaluator"]}
        yield Meter("accuracy", "Of held-out examples.", curve["accuracy"][-1], labels=by)
    if status["privacy"] is not None:
        yield from _privacy(status["privacy"])


def _privacy(budget: dict[str, Any]) -> Iterator[Meter]:
    yield Meter("privacy_releases", "Rounds a participant answered at most.", budget["rounds"])
    yield Meter("privacy_releases_planned", "Rounds the noise is for.", budget["releases"])
    yield Meter("privacy_epsilon_target", "Epsilon of the whole run.", budget["target_epsilon"])
    if budget["epsilon"] is not None:
        yield Meter("privacy_epsilon_spent", "Epsilon spent, at most.", budget["epsilon"])
