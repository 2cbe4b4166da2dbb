"""The curve of a run: figures of single rounds, evenly spaced and never more than a page needs."""

from collections.abc import Iterator
from typing import Any, Final

from lorand import ledger
from lorand.config import RunConfig
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import diagnostics, folding
from lorand_coordinator.store import Store
from lorand_coordinator.tally import Outcome, code_bytes, mean_loss

POINTS: Final = 400
"""Most points that are kept, one a pixel or two. Of longer runs every second round is shown, then
every fourth, and so on: a point stays what one round measured."""


class Curve:
    """Every stride-th committed round from the first on, and the newest."""

    def __init__(self, points: int = POINTS) -> None:
        """Begin without a point."""
        self._most = points
        self._kept: list[Outcome] = []
        self._newest: Outcome | None = None
        self.stride = 1

    def add(self, outcome: Outcome) -> None:
        """Take the next committed round; one that is there already changes nothing."""
        if self._newest is not None and outcome.committed <= self._newest.committed:
            return
        self._newest = outcome
        if (outcome.committed - 1) % self.stride:
            return
        self._kept.append(outcome)
        while len(self._kept) > self._most:
            self.stride *= 2
            self._kept = self._kept[::2]

    def points(self) -> list[Outcome]:
        """Return the points in order, the newest round last."""
        if self._newest is None or self._kept[-1] is self._newest:
            return self._kept
        return [*self._kept, self._newest]

    def columns(self) -> dict[str, Any]:
        """Return them as a page draws them: one list a figure."""
        points = self.points()
        return {
            "committed": [point.committed for point in points],
            "bytes": [point.code_bytes for point in points],
            "loss": [_short(point.loss) for point in points],
            "signal": [_short(point.signal_to_noise) for point in points],
            "stride": self.stride,
        }


def stride_of(committed: int, points: int = POINTS) -> int:
    """Return the stride of a curve after so many rounds.

    >>> stride_of(400), stride_of(401), stride_of(801)
    (1, 2, 4)
    """
    stride = 1
    while -(-committed // stride) > points:
        stride *= 2
    return stride


def read(config: RunConfig, store: Store, points: int = POINTS) -> Iterator[Outcome]:
    """Yield the rounds of a ledger's curve; contributions of no other round are read."""
    committed = sum(ledger.parse(body).HasField("commit") for body in store.entries())
    stride, count, total = stride_of(committed, points), 0, 0
    for body in store.entries():
        entry = ledger.parse(body)
        if not entry.HasField("commit"):
            continue
        count, total = count + 1, total + code_bytes(config, entry.commit)
        if (count - 1) % stride and count != committed:
            continue
        bodies = store.contributions(entry.sequence)
        stored = [pb.StoredContribution.FromString(part) for part in bodies]
        reports = folding.reports(config, stored, entry.commit.directions)
        figures = diagnostics.of_round(config, entry.commit.scale_exponent, list(reports.values()))
        ratio = figures.signal_to_noise
        yield Outcome(
            entry.round_index,
            count,
            total,
            len(entry.commit.workers),
            mean_loss(stored),
            ratio[0] if ratio else None,
        )


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
