"""What the coordinator carries from commit to commit, and what a round adds to it (pure).

The same fold makes a commit and repeats it from what the ledger keeps: a restarted coordinator
goes on where it was, and a round that does not repeat shows.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from lorand import codec
from lorand.config import RunConfig
from lorand.ledger import Position
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import aggregation, optimizer, payoff
from lorand_coordinator.aggregation import Report, UnsoundRound


@dataclass(frozen=True)
class Carried:
    """A fold over the commits of a run."""

    optimizer: optimizer.State
    comparison: payoff.Comparison


@dataclass(frozen=True)
class Folded:
    """What a round adds: the state after it, and the part of its commit that follows from that."""

    after: Carried
    scale: int
    codes: bytes
    gives_up_subspace: bool
    reports: Mapping[int, Report]

    @property
    def written(self) -> tuple[int, bytes, bool]:
        """What the commit holds of it."""
        return self.scale, self.codes, self.gives_up_subspace


def start(config: RunConfig) -> Carried:
    """Return the state before the first round."""
    return Carried(optimizer.start(config), payoff.Comparison())


def counted(
    stored: Iterable[pb.StoredContribution], uncounted: Collection[int]
) -> list[pb.StoredContribution]:
    """Return the contributions that a commit is made of: all but those of some workers.

    Raises UnsoundRound when none is left.
    """
    left = [part for part in stored if part.worker not in uncounted]
    if not left:
        raise UnsoundRound("all contributions point away from the auditor's, and it sent none")
    return left


def reports(
    config: RunConfig, stored: Iterable[pb.StoredContribution], count: int
) -> dict[int, Report]:
    """Return what stored contributions say, by worker."""
    return {part.worker: aggregation.report(config, part.contribution, count) for part in stored}


def fold(
    config: RunConfig,
    position: Position,
    carried: Carried,
    round_index: int,
    stored: Iterable[pb.StoredContribution],
    count: int,
) -> Folded:
    """Return what a round of `count` directions (0: as usual) adds, at the position before it.

    Raises ContributionError for an update that is too large.
    """
    stored = list(stored)
    by_worker = reports(config, stored, count)
    after, update = optimizer.advance(
        config, position.draws, carried.optimizer, round_index, by_worker
    )
    comparison = payoff.after(
        config,
        carried.comparison,
        position.committed,
        carried.optimizer.scale_exponent,
        [by_worker[worker] for worker in sorted(by_worker)],
        payoff.curvatures(stored),
    )
    return Folded(
        Carried(after, comparison),
        update.scale,
        codec.pack(config.codec.down, update.codes),
        comparison.given_up and not carried.comparison.given_up,
        by_worker,
    )
