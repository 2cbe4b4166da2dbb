"""Figures for people, kept in memory and rebuilt from the ledger after a restart."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from lorand import codec
from lorand.config import RunConfig
from lorand.v1 import ledger_pb2 as pb

EVALUATIONS_KEPT: Final = 1000
SUMMED_BYTES: Final = 8
"""Of a number that a participant sends to a sum."""


@dataclass
class Account:
    """What is known of a worker, since the run began or since this process did (rejected)."""

    name: str
    contributions: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class Outcome:
    """A committed round in figures: what is plotted, tracked and counted."""

    round_index: int
    committed: int
    """Rounds committed, this one included."""
    code_bytes: int
    """Bytes of codes that participants exchanged in all rounds up to this one."""
    workers: int
    loss: float | None
    signal_to_noise: float | None


Observer = Callable[[Outcome], None]
"""Hears of a round once its entry is durable; it is quick, and raises nothing."""


def code_bytes(config: RunConfig, commit: pb.Commit) -> int:
    """Return the bytes of codes that a round's participants sent and were sent.

    What a method costs, as papers count it; messages, names and TLS around the codes are not in it.
    """
    count = commit.directions or config.num_directions
    summed = config.privacy.summed
    up = SUMMED_BYTES * count if summed else codec.num_bytes(config.codec.up, count)
    return len(commit.workers) * (up + len(commit.codes))


def mean_loss(stored: Iterable[pb.StoredContribution]) -> float | None:
    """Return the mean of the losses that came with a round; None where none did."""
    losses = [part.contribution.loss for part in stored if part.contribution.HasField("loss")]
    return sum(losses) / len(losses) if losses else None


@dataclass
class Tally:
    """Who took part, what evaluators posted last, the newest loss, and what was exchanged."""

    config: RunConfig
    accounts: dict[int, Account] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    """Workers' numbers by name."""
    evaluations: list[pb.Evaluation] = field(default_factory=list)
    loss: float | None = None
    code_bytes: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Messages not taken since this process began, by what was wrong with them."""

    def note(self, entry: pb.Entry) -> None:
        """Take in a new member, an evaluation or a commit's bytes; others change nothing."""
        if entry.HasField("member"):
            self.accounts[entry.member.worker] = Account(entry.member.name)
            self.numbers[entry.member.name] = entry.member.worker
        if entry.HasField("evaluation"):
            self.evaluations = [*self.evaluations, entry.evaluation][-EVALUATIONS_KEPT:]
        if entry.HasField("commit"):
            self.code_bytes += code_bytes(self.config, entry.commit)
