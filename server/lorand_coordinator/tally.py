"""Figures for the status page: kept in memory, rebuilt from the ledger after a restart."""

from dataclasses import dataclass, field
from typing import Final

from lorand.v1 import ledger_pb2 as pb

EVALUATIONS_KEPT: Final = 1000


@dataclass
class Account:
    """What is known of a worker, since the run began or since this process did (rejected)."""

    name: str
    contributions: int = 0
    rejected: int = 0


@dataclass
class Tally:
    """Who took part, what evaluators posted last, and the newest loss."""

    accounts: dict[int, Account] = field(default_factory=dict)
    evaluations: list[pb.Evaluation] = field(default_factory=list)
    loss: float | None = None

    def note(self, entry: pb.Entry) -> None:
        """Take in a new member or an evaluation; other entries change nothing."""
        if entry.HasField("member"):
            self.accounts[entry.member.worker] = Account(entry.member.name)
        if entry.HasField("evaluation"):
            self.evaluations = [*self.evaluations, entry.evaluation][-EVALUATIONS_KEPT:]
