"""Reading the scalars of a run back from its ledger: what `diagnose` and `refine` look at."""

from collections.abc import Iterator
from dataclasses import dataclass

from lorand import ledger
from lorand.config import RunConfig
from lorand.directions import Draws
from lorand.errors import LedgerError
from lorand.ledger import Position
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import folding, ledgers, payoff
from lorand_coordinator.aggregation import Report
from lorand_coordinator.ledgers import Location
from lorand_coordinator.store import Store


@dataclass(frozen=True)
class Round:
    """A committed round: its participants' reports, the scale of their codes, the round's draws.

    `curvatures` are those that came with them, `committed` counts the rounds before it.
    """

    round_index: int
    draws: Draws
    scale_exponent: int
    reports: dict[int, Report]
    curvatures: list[float]
    committed: int


def read(path: Location) -> tuple[RunConfig, Iterator[Round]]:
    """Return a run's config and its committed rounds in order.

    The ledger may be in use. Raises LedgerError when it is missing, damaged, or exported: an
    exported ledger has no contributions.
    """
    if ledger.is_file(path):
        raise LedgerError(
            f"{path} is an exported ledger, which has no contributions; give the coordinator's own "
            "ledger file (NAME.ledger)"
        )
    store = ledgers.reader(path)
    first = next(store.entries(0, 1), None)
    if first is None:
        store.close()
        raise LedgerError(f"{path} has no entry yet; come back when a worker has joined")
    start = ledger.origin_of(first)
    return start.config, _rounds(start, store)


def _rounds(position: Position, store: Store) -> Iterator[Round]:
    config = position.config
    try:
        for body in store.entries():
            entry, draws, committed = ledger.parse(body), position.draws, position.committed
            position = ledger.apply(position, body)  # what is drawn may follow from what was moved
            if not entry.HasField("commit"):
                continue
            parts = store.contributions(entry.sequence)
            ledger.check_contributions(entry, parts)
            stored = [pb.StoredContribution.FromString(part) for part in parts]
            count = entry.commit.directions
            reports = folding.reports(config, stored, count)
            yield Round(
                entry.round_index,
                draws,
                entry.commit.scale_exponent,
                reports,
                payoff.curvatures(stored),
                committed,
            )
    finally:
        store.close()
