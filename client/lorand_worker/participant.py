"""A worker's part in the protocol, without a network: entries in, contributions out.

The gRPC session and the simulator drive the same object.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lorand import codec, ledger
from lorand.codec import Floats
from lorand.coefficients import Coefficients
from lorand.directions import Indices
from lorand.errors import LorandError
from lorand.ledger import Position
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_worker.estimators import Measurement, NonFiniteLoss

Request = wire.ParticipateRequest


class Bench(Protocol):
    """Where scalars are measured: a model with data, or a stand-in."""

    @property
    def examples(self) -> int:
        """Number of local examples."""

    def adopt(self, coefficients: Coefficients) -> None:
        """Make the weights w(A)."""

    def measure(self, indices: Indices) -> Measurement:
        """Measure on a fresh batch at w(A). Raises NonFiniteLoss."""


@dataclass
class Counts:
    """What this worker did since it started."""

    measured: int = 0
    committed: int = 0
    rejected: int = 0
    skipped: int = 0


class Participant:
    """Follows the ledger and answers rounds. `position` says how far it has come."""

    def __init__(
        self,
        position: Position,
        bench: Bench,
        uniform: Callable[[int], Floats] = codec.system_uniform,
    ) -> None:
        """Start at a position; the bench is brought there before the first measurement.

        `uniform` draws numbers for unbiased rounding; experiments inject a seeded one.
        """
        self._uniform = uniform
        self.position = position
        self.counts = Counts()
        self.worker: int | None = None
        self.last_loss: float | None = None
        self._bench = bench
        self._adopted: Coefficients | None = None
        self._answer: tuple[int, int, Request] | None = None

    def catch_up(self, position: Position) -> None:
        """Jump to a later position of the same run (a checkpoint)."""
        assert position.run_digest == self.position.run_digest
        self.position = position

    def on_entry(self, body: bytes) -> pb.Entry:
        """Apply a durable entry. Raises LedgerError when it does not follow."""
        entry = ledger.parse(body)
        self.position = ledger.apply(self.position, body)
        if entry.HasField("commit") and self.worker in entry.commit.workers:
            self.counts.committed += 1
        return entry

    def on_round_start(self, start: wire.RoundStart) -> Request:
        """Measure and return the contribution, or a skip with the reason.

        Asked again for the same round at the same place of the history (the coordinator or the
        connection came back), it repeats its answer instead of measuring anew.
        """
        place = (start.round_index, self.position.committed)
        if self._answer is not None and self._answer[:2] == place:
            return self._answer[2]
        answer = self._measure(start)
        self._answer = (*place, answer)
        return answer

    def settle(self) -> None:
        """Bring the weights to the position, so that they can be read."""
        if self._adopted is not self.position.coefficients:
            self._bench.adopt(self.position.coefficients)
            self._adopted = self.position.coefficients

    def _measure(self, start: wire.RoundStart) -> Request:
        if self.worker is None:
            raise LorandError("a round began before the coordinator gave this worker a number")
        self.settle()
        config = self.position.config
        indices = self.position.draws.of(start.round_index, self.worker)
        try:
            measured = self._bench.measure(indices)
        except NonFiniteLoss as error:
            self.counts.skipped += 1
            skip = wire.Skip(round_index=start.round_index, reason=str(error))
            return Request(skip=skip)
        assert measured.values.shape == indices.shape
        assert np.isfinite(measured.values).all()
        self.last_loss = measured.loss
        uniform = self._uniform(len(indices)) if config.codec.rounding == "unbiased" else None
        codes = codec.encode(config.codec.up, measured.values, start.scale_exponent, uniform)
        contribution = pb.Contribution(
            round_index=start.round_index, codes=codec.pack(config.codec.up, codes)
        )
        if config.rounds.telemetry == "loss":
            contribution.loss = measured.loss
        if config.rounds.weighting == "examples":
            contribution.examples = self._bench.examples
        self.counts.measured += 1
        return Request(contribution=contribution)
