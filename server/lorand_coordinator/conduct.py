"""What committed contributions tell of who sent them, and whom a run goes on without (pure).

A fold over the ledger's rounds and contributions, so that a restarted coordinator, and anyone with
the ledger, comes to the same. Three signs, each a running mean over about forty rounds:

- copies: codes that another participant sent in the same round (the lowest number keeps them), or
  that anyone sent in the round before, which measured other directions;
- loud: scalars more than LOUD times as long as the typical participant's;
- against: scalars that point away from the auditor's, by the cosine's mean and standard error. An
  auditor is a worker that the operator runs on public data, after the trusted direction of FLTrust
  (Cao et al., NDSS 2021). The others' sum is no such direction: who has labels unlike theirs points
  away from it too.

Nothing here tells a lie about private data from other data, so less than half of those who took
part are ever sent away. To be sure takes some tens of rounds. Meanwhile who points away from the
auditor's scalars, surely or not, is not counted, and is again as soon as it does not: the zeros of
FLTrust's weight ReLU(cosine), of the running mean in place of one round's cosine.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Final

import numpy as np

from lorand import codec
from lorand.codec import Floats
from lorand.config import RunConfig
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import folding, rules
from lorand_coordinator.aggregation import Report, decoded
from lorand_coordinator.diagnostics import Finding
from lorand_coordinator.tally import Account

DECAY: Final = 0.95
EFFECTIVE_ROUNDS: Final = (1 + DECAY) / (1 - DECAY)
"""A running mean has the variance of the mean over so many rounds: 39."""
FEWEST_ROUNDS: Final = 20
LOUD: Final = 3.0
MOSTLY: Final = 0.5
"""Copies and loud rounds are a sign when they are more than this share."""
ERRORS: Final = 4.0
"""Standard errors that the mean cosine has to be below zero: it is looked at every round."""
FEWEST_BYTES: Final = 8
"""Codes of fewer bytes may be alike by chance."""


@dataclass(frozen=True)
class Record:
    """Running means over the rounds that a worker was in; `along` and `squares` of its cosine."""

    rounds: int = 0
    copied: float = 0.0
    loud: float = 0.0
    along: float = 0.0
    squares: float = 0.0

    def after(self, copied: bool, loud: bool, cosine: float) -> "Record":
        """Return the record one round further; the first rounds count alike."""
        decay = min(DECAY, self.rounds / (self.rounds + 1))

        def mean(before: float, now: float) -> float:
            return decay * before + (1 - decay) * now

        return Record(
            self.rounds + 1,
            mean(self.copied, copied),
            mean(self.loud, loud),
            mean(self.along, cosine),
            mean(self.squares, cosine**2),
        )

    def sign(self) -> str:
        """Return why the run goes on without this worker; empty: it does not."""
        if self.rounds < FEWEST_ROUNDS:
            return ""
        if self.copied > MOSTLY:
            return f"{self.copied:.0%} of its contributions were copies of others"
        if self.loud > MOSTLY:
            return (
                f"its scalars were over {LOUD:g} times the typical size in {self.loud:.0%} of "
                "rounds"
            )
        deviation = sqrt(max(self.squares - self.along**2, 0.0))
        error = deviation / sqrt(min(self.rounds, EFFECTIVE_ROUNDS))
        if self.along < -ERRORS * error:
            return (
                f"its scalars point away from the auditor's (mean cosine {self.along:.2f} ± "
                f"{error:.2f})"
            )
        return ""


@dataclass(frozen=True)
class Conduct:
    """Everyone's record, the codes of the last round, and why whom the run goes on without."""

    records: Mapping[int, Record] = field(default_factory=dict)
    last: frozenset[bytes] = frozenset()
    reasons: Mapping[int, str] = field(default_factory=dict)

    @property
    def doubted(self) -> frozenset[int]:
        """Whose contributions are not counted for now. Nobody's where there is no auditor."""
        return frozenset(worker for worker, record in self.records.items() if record.along < 0)


def after(
    config: RunConfig,
    conduct: Conduct,
    scale_exponent: int,
    reports: Mapping[int, Report],
    auditor: int = 0,
) -> Conduct:
    """Return the conduct after a committed round; `auditor` is a worker's number, 0: none."""
    workers = sorted(reports)
    packed = {w: codec.pack(config.codec.up, reports[w].codes) for w in workers}
    rows = np.stack([decoded(config, reports[w], scale_exponent) for w in workers])
    cosines = _cosines(rows, workers.index(auditor) if auditor in reports else None)
    lengths = np.sqrt(np.sum(rows**2, axis=1))
    loud = lengths > LOUD * lengths[rules.typical(rows)]
    records, reasons = dict(conduct.records), dict(conduct.reasons)
    seen = set(conduct.last)
    for place, worker in enumerate(workers):
        telling = len(packed[worker]) >= FEWEST_BYTES and bool(reports[worker].codes.any())
        copied = telling and packed[worker] in seen
        seen.add(packed[worker])
        record = records.get(worker, Record())
        records[worker] = record.after(copied, bool(loud[place]), float(cosines[place]))
    for worker in workers:
        why = records[worker].sign()
        if why and worker != auditor and 2 * (len(reasons) + 1) < len(records):
            reasons.setdefault(worker, why)
    return Conduct(records, frozenset(packed.values()), reasons)


def _cosines(rows: Floats, auditor: int | None) -> Floats:
    """Return each row's cosine with the auditor's, shape (n,); 0 where nothing can be compared."""
    if auditor is None:
        return np.zeros(len(rows))
    dots = rows @ rows[auditor]
    lengths = np.sqrt(np.sum(rows**2, axis=1) * np.sum(rows[auditor] ** 2))
    cosines: Floats = np.divide(dots, lengths, out=np.zeros(len(rows)), where=lengths > 0)
    return cosines


class Watch:
    """A run's conduct, where the operator wants to know (`service.quarantine`)."""

    def __init__(self, config: RunConfig) -> None:
        """Begin before the first round."""
        self.on = config.service.quarantine
        self._config = config
        self._conduct = Conduct()

    def take(
        self,
        commit: pb.Commit,
        stored: Iterable[pb.StoredContribution],
        numbers: Mapping[str, int],
    ) -> None:
        """Take a commit and what it came from; `numbers` are the workers', by name."""
        if self.on:
            config, auditor = self._config, numbers.get(self._config.service.auditor, 0)
            reports = folding.reports(config, stored, commit.directions)
            self._conduct = after(config, self._conduct, commit.scale_exponent, reports, auditor)

    @property
    def apart(self) -> frozenset[int]:
        """Whom the run goes on without."""
        return frozenset(self._conduct.reasons)

    @property
    def doubted(self) -> frozenset[int]:
        """Whose contributions are kept, and not counted for now."""
        return self._conduct.doubted - self.apart

    def why(self, worker: int) -> str:
        """Return why the run goes on without a worker; empty: it does not."""
        why = self._conduct.reasons.get(worker, "")
        return f"in quarantine: {why}" if why else ""

    def findings(self, accounts: Mapping[int, Account]) -> list[Finding]:
        """Return who is in quarantine or not counted and why, for the operator."""
        told = {w: (f"quarantine {w}", self.why(w)) for w in self.apart}
        for w in self.doubted:
            mean = self._conduct.records[w].along
            told[w] = (
                f"not counted {w}",
                f"is not counted for now: its scalars point away from the auditor's (mean cosine "
                f"{mean:.2f})",
            )
        return [
            Finding(kind, f"worker {w} ({accounts[w].name}) {why}")
            for w, (kind, why) in sorted(told.items())
        ]
