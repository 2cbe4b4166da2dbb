"""A worker's measuring and applying as OpenTelemetry spans; only where --otel is given."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from lorand import ledger
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.ledger import Position
from lorand.manifest import Identity
from lorand.otel import Attributes, Meter, RoundId
from lorand.privacy.mechanism import Integers
from lorand_worker.estimators import Measurement, Order
from lorand_worker.participant import Bench

if TYPE_CHECKING:
    from lorand.otlp import Sender

Figures = Callable[[int, dict[str, float | None]], None]
"""Takes figures of a step."""
Watch = Callable[[int], AbstractContextManager[None]]
"""Follows what is done for a round of this index."""

METERS: Final[dict[str, tuple[str, Literal["counter", "gauge"], Literal["", "bytes"], str]]] = {
    "local_loss": ("local_loss", "gauge", "", "Of the last batch of this worker."),
    "contributions": ("contributions", "counter", "", "In committed rounds."),
    "skipped": ("skipped", "counter", "", "Rounds that this worker sat out."),
    "rejected": ("rejected", "counter", "", "Rounds that went on without its answer."),
    "bytes_sent": ("sent", "counter", "bytes", "Message bytes sent."),
    "bytes_received": ("received", "counter", "bytes", "Message bytes received."),
}
"""What a worker's figures are called where they are sent."""


def unwatched(round_index: int) -> AbstractContextManager[None]:
    """Follow nothing."""
    return nullcontext()


@dataclass(frozen=True)
class Watched:
    """What a session is given: its bench, where its figures go, and what follows its rounds."""

    bench: Bench
    figures: Figures
    round: Watch = unwatched


@contextmanager
def watched(
    asked: str, config: RunConfig, identity: Identity, who: str, bench: Bench, figures: Figures
) -> Iterator[Watched]:
    """Have what a session does sent to the collector of --otel, if there is one, meanwhile."""
    if not asked:
        yield Watched(bench, figures)
        return
    from lorand import otlp

    about = {"lorand.run": config.run.name}
    sender = otlp.connected(asked, "lorand-worker", who, about)
    try:
        yield watching(sender, ledger.origin(config, identity), bench, figures)
    finally:
        sender.close()


def watching(sender: "Sender", origin: Position, bench: Bench, figures: Figures) -> Watched:
    """Return what sends spans and figures of a run besides."""

    def both(step: int, values: dict[str, float | None]) -> None:
        figures(step, values)
        sender.show(meters(step, values))

    def of_round(round_index: int) -> AbstractContextManager[None]:
        which = RoundId.of(origin.run_digest, round_index)
        about: Attributes = {"lorand.run": origin.config.run.name, "lorand.round": round_index}
        return sender.of_round(which, "answer", about)

    return Watched(TracedBench(bench, sender), both, of_round)


def meters(committed: int, values: dict[str, float | None]) -> Iterator[Meter]:
    """Yield a worker's figures after so many rounds, as far as they are known."""
    yield Meter("rounds_committed", "Rounds committed since the run began.", committed, "counter")
    for name, (called, kind, unit, about) in METERS.items():
        if (value := values.get(name)) is not None:
            yield Meter(called, about, value, kind, unit)


class TracedBench:
    """A bench whose work is seen; it does nothing else."""

    def __init__(self, bench: Bench, sender: "Sender") -> None:
        """Watch a bench."""
        self._bench, self._sender = bench, sender

    @property
    def examples(self) -> int:
        """See Bench."""
        return self._bench.examples

    def adopt(self, position: Position) -> None:
        """See Bench."""
        with self._sender.span("apply", {"lorand.committed": position.committed}):
            self._bench.adopt(position)

    def measure(self, order: Order) -> Measurement:
        """See Bench."""
        with self._sender.span("measure", {"lorand.directions": len(order.indices)}):
            return self._bench.measure(order)

    def release(self, indices: Indices) -> Integers:
        """See Bench."""
        with self._sender.span("measure", {"lorand.directions": len(indices)}):
            return self._bench.release(indices)
