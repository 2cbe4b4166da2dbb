"""A worker's part in the protocol, without a network: entries in, contributions out.

The gRPC session and the simulator drive the same object.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lorand import codec, ledger
from lorand.codec import Codes, Floats
from lorand.coefficients import Coefficients
from lorand.config import PROTOCOL_VERSION, RunConfig
from lorand.directions import Indices
from lorand.errors import ContributionError, HandshakeError, LorandError
from lorand.ledger import Position
from lorand.manifest import Identity
from lorand.privacy.mechanism import Integers
from lorand.privacy.secure_sum import SumMember
from lorand.subspaces import cosines, elections
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_worker.budget import Budget
from lorand_worker.estimators import Measurement, NonFiniteLoss, Order
from lorand_worker.feedback import Awaited, Memory

Request = wire.ParticipateRequest


class Bench(Protocol):
    """Where scalars are measured: a model with data, or a stand-in."""

    @property
    def examples(self) -> int:
        """Number of local examples."""

    def adopt(self, position: Position) -> None:
        """Make the weights those of a position, never of an earlier one than before."""

    def measure(self, order: Order) -> Measurement:
        """Measure on fresh batches at w(A), or after steps from there. Raises NonFiniteLoss."""

    def release(self, indices: Indices) -> Integers:
        """Return what may leave of a fresh sample, in grid steps: one number a direction."""


@dataclass
class Counts:
    """What this worker did since it started."""

    measured: int = 0
    committed: int = 0
    rejected: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Coded:
    """Codes of a contribution, the quanta that one stands for (local steps), and what was lost."""

    codes: Codes
    scale: int
    lost: Floats


def encode(
    config: RunConfig,
    values: Floats,
    scale_exponent: int,
    feedback: Floats,
    uniform: Floats | None = None,
) -> Coded:
    """Return the codes of what was measured, shape (count,).

    Scalars are coded in the round's scale. Where local steps led is coded in quanta with a scale of
    its own, together with the `feedback` that earlier codes lost at these directions (Karimireddy
    et al., ICML 2019, algorithm 2); all zero where the run keeps none. Raises ContributionError.
    """
    if not config.local.taken:
        codes = codec.encode(config.codec.up, values, scale_exponent, uniform)
        return Coded(codes, 0, np.zeros(0))
    wanted = -values * 2.0**config.directions.quantum_exponent + feedback
    assert config.codec.up != "log8", "the run file refuses it"
    scale, codes = codec.quantise_delta(config.codec.up, wanted, uniform)
    moved = codec.delta(scale, codes)
    codec.check_move(moved, config.directions.quantum_exponent)
    return Coded(codes, scale, wanted - moved)


def hello(name: str, position: Position, identity: Identity) -> wire.Hello:
    """Return what a worker of this name says when it joins at a position, with what it has."""
    begun = position.next_sequence > 0
    return wire.Hello(
        protocol_version=PROTOCOL_VERSION,
        name=name,
        run_digest=position.run_digest,
        base_digest=identity.base_digest,
        tokenizer_digest=identity.tokenizer_digest,
        manifest_digest=identity.manifest.digest(),
        manifest="" if begun else identity.manifest.to_json(),
        next_sequence=position.next_sequence,
        head=position.head if begun else b"",
        cosines_digest=cosines.digest_of(position.config, identity.manifest),
    )


class Participant:
    """Follows the ledger and answers rounds. `position` says how far it has come."""

    def __init__(
        self,
        position: Position,
        bench: Bench,
        uniform: Callable[[int], Floats] = codec.system_uniform,
        memory: Memory | None = None,
        budget: Budget | None = None,
        member: SumMember | None = None,
    ) -> None:
        """Start at a position; the bench is brought there before the first measurement.

        `uniform` draws numbers for unbiased rounding; experiments inject a seeded one. `memory`
        keeps error feedback across a restart; without it, feedback lives as long as this object.
        `budget` is what a private run is charged to, and such a run is not answered without;
        `member` this worker's part in the secure sums of a run that has them.
        """
        if position.config.privacy.noised and budget is None:
            raise LorandError("a private run needs a budget, in a folder that outlives this worker")
        if position.config.privacy.mode == "secure-sum" and member is None:
            raise LorandError("a run of secure sums needs an identity key and a roster")
        self.member = member
        self._budget = budget if position.config.privacy.noised else None
        self._uniform = uniform
        self._memory = memory or Memory(position.config.directions.pool_size)
        self.position = position
        self.counts = Counts()
        self.worker: int | None = None
        self.last_loss: float | None = None
        self._bench = bench
        self._adopted: Coefficients | None = None
        self._answer: tuple[tuple[int, int, int | None], Request] | None = None
        awaited = self._memory.awaited
        if awaited is not None:
            place = (awaited.contribution.round_index, awaited.committed, awaited.worker)
            self._answer = (place, Request(contribution=awaited.contribution))
        if self._budget is not None and (last := self._budget.account.answer) is not None:
            self._answer = (last.asked, Request(contribution=last.contribution))

    def catch_up(self, position: Position) -> None:
        """Jump to a later position of the same run."""
        assert position.run_digest == self.position.run_digest
        self.position = position
        self._memory.move_to(len(position.closed))
        if position.finished:
            self._memory.end()

    @property
    def awaited_from(self) -> int | None:
        """The sequence from which the ledger says what became of the last contribution."""
        awaited = self._memory.awaited
        return None if awaited is None else awaited.sequence

    def look_up(self, bodies: Iterable[bytes]) -> None:
        """Read what became of the last contribution, from entries that a jump leaves out."""
        awaited = self._memory.awaited
        if awaited is None:
            return
        for body in bodies:
            entry = ledger.parse(body)
            if entry.HasField("commit"):
                self._memory.committed(entry.round_index, entry.commit.workers)
            ended = entry.HasField("commit") or entry.HasField("abandon")
            if ended and entry.round_index >= awaited.contribution.round_index:
                return

    def on_entry(self, body: bytes) -> pb.Entry:
        """Apply a durable entry. Raises LedgerError when it does not follow."""
        entry = ledger.parse(body)
        self.follow(entry, ledger.apply(self.position, body))
        return entry

    def follow(self, entry: pb.Entry, position: Position) -> None:
        """Go on to the position after one more entry; those who have one history may share it."""
        self.position = position
        if entry.HasField("commit"):
            self.counts.committed += self.worker in entry.commit.workers
            self._memory.committed(entry.round_index, entry.commit.workers)
        self._memory.move_to(len(self.position.closed))
        if entry.HasField("finish"):
            self._memory.end()

    def on_round_start(self, start: wire.RoundStart) -> Request:
        """Measure and return the contribution, or a skip with the reason.

        Asked again for the same round at the same place of the history (the coordinator, the
        connection or this worker with its memory came back), it repeats its answer instead of
        measuring anew. Raises HandshakeError for what no coordinator of this release asks.
        """
        place = (start.round_index, self.position.committed, self.worker)
        if self._answer is not None and self._answer[0] == place:
            return self._answer[1]
        answer = self._measure(start)
        self._answer = (place, answer)
        return answer

    def sit_out(self, round_index: int, why: str) -> Request:
        """Return the word that this worker takes no part in a round."""
        self.counts.skipped += 1
        return Request(skip=wire.Skip(round_index=round_index, reason=why))

    def settle(self) -> None:
        """Bring the weights to the position, so that they can be read."""
        if self._adopted is not self.position.coefficients:
            self._bench.adopt(self.position)
            self._adopted = self.position.coefficients

    def _measure(self, start: wire.RoundStart) -> Request:
        if self.worker is None:
            raise LorandError("a round began before the coordinator gave this worker a number")
        if start.scale_exponent not in codec.SCALE_EXPONENTS:
            raise HandshakeError(
                f"the coordinator asks for codes in units of 2^{start.scale_exponent}, which no "
                "codec has; install the same release of lorand on both"
            )
        self.settle()
        config = self.position.config
        draws = self.position.draws
        # Whatever is asked for, no more than the run's file says.
        count = min(start.directions, config.estimator.max_directions_per_round)
        batch_size = min(start.batch_size, config.estimator.max_batch_size)
        indices = draws.of(start.round_index, self.worker, count)
        factors = draws.importance(indices)
        manifest, committed = self.position.identity.manifest, self.position.committed
        elect = self.position.elections.due(config, manifest, committed)
        curvature = self.position.elections.probing(config)
        before = self.position.before
        order = Order(indices, factors, committed, batch_size, elect, curvature, before)
        if self._budget is not None:
            return self._release(start, order, self._budget, self.worker)
        try:
            measured = self._bench.measure(order)
            coded = self._encode(measured.values, indices, start.scale_exponent)
        except (NonFiniteLoss, ContributionError) as error:
            return self.sit_out(start.round_index, str(error))
        self.last_loss = measured.loss
        contribution = pb.Contribution(
            round_index=start.round_index,
            codes=codec.pack(config.codec.up, coded.codes),
            scale=coded.scale,
            votes=elections.pack(measured.votes),
        )
        if config.rounds.telemetry == "loss" and measured.loss is not None:
            contribution.loss = measured.loss
            if measured.curvature is not None:
                contribution.curvature = measured.curvature
        if config.rounds.weighting == "examples":
            contribution.examples = self._bench.examples
        if config.keeps_feedback:
            after = self._memory.with_lost(indices, coded.lost)
            sequence = self.position.next_sequence
            self._memory.await_commit(
                Awaited(contribution, self.worker, committed, sequence, after)
            )
        self.counts.measured += 1
        return Request(contribution=contribution)

    def _release(
        self, start: wire.RoundStart, order: Order, budget: Budget, worker: int
    ) -> Request:
        """Measure with noise and return the codes alone, charged before anyone has them.

        Nothing here depends on the data but the codes: no skip and no reason, whatever the losses
        are. An error ends this worker instead.
        """
        budget.check(order.committed)
        contribution = pb.Contribution(round_index=start.round_index)
        match self.position.config.privacy.mode:
            case "worker":
                measured = self._bench.measure(order)
                assert measured.loss is None, "what comes with noise comes alone"
                coded = self._encode(measured.values, order.indices, start.scale_exponent)
                contribution.codes = codec.pack(self.position.config.codec.up, coded.codes)
            case "central":
                contribution.sum = self._bench.release(order.indices).astype("<i8").tobytes()
            case "secure-sum":
                contribution.sum = self._masked(start, order.indices)
        budget.charge((start.round_index, order.committed, worker), contribution)
        self.counts.measured += 1
        return Request(contribution=contribution)

    def _masked(self, start: wire.RoundStart, indices: Indices) -> bytes:
        """Return what may leave of a sample that is drawn for this attempt, under its masks.

        Raises HandshakeError where the sum is not what this worker agreed to.
        """
        assert self.member is not None
        attempt = self.member.open(
            start.sum_attempt,
            round_index=start.round_index,
            length=len(indices),
            state_digest=self.position.head,
        )
        return attempt.mask(self._bench.release(indices))

    def _encode(self, values: Floats, indices: Indices, scale_exponent: int) -> Coded:
        assert values.shape == indices.shape
        assert np.isfinite(values).all()
        config = self.position.config
        uniform = self._uniform(len(indices)) if config.codec.rounding == "unbiased" else None
        return encode(config, values, scale_exponent, self._memory.feedback[indices], uniform)
