"""A worker's part in the protocol: entries in, contributions out (DESIGN §3)."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from tests.runs import IDENTITY, config_of, hello, history

from lorand import codec, ledger
from lorand.codec import Floats
from lorand.coefficients import Coefficients
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.errors import LedgerError, LorandError
from lorand.ledger import Position
from lorand.privacy.mechanism import Integers
from lorand.v1 import coordination_pb2 as wire
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import SqliteStore
from lorand_worker.estimators import Measurement, NonFiniteLoss, Order
from lorand_worker.participant import Participant

CONFIG = config_of()
VALUES = np.array([0.4, -0.2, 0.0])


class Stand:
    """A bench without a model that always measures the same."""

    examples = 11

    def __init__(self, values: Floats) -> None:
        """`values` is one scalar a direction."""
        self.values = values
        self.adopted: list[Coefficients] = []
        self.measured: list[Indices] = []
        self.curvature: list[bool] = []

    def adopt(self, position: Position) -> None:
        """See Bench."""
        self.adopted.append(position.coefficients)

    def measure(self, order: Order) -> Measurement:
        """See Bench."""
        self.measured.append(order.indices)
        self.curvature.append(order.curvature)
        if np.isnan(self.values).any():
            raise NonFiniteLoss("the loss of this batch is nan")
        return Measurement(self.values, 0.5, curvature=3.5 if order.curvature else None)

    def release(self, indices: Indices) -> Integers:
        """No test of these is of a private run."""
        raise NotImplementedError


def started(
    config: RunConfig = CONFIG, values: Floats = VALUES, rounds: int = 0
) -> tuple[Participant, Stand]:
    """Worker 1 of a run, after some rounds of its history."""
    bench = Stand(values)
    participant = Participant(ledger.origin(config, IDENTITY), bench)
    participant.worker = 1
    for body in history(config, rounds):
        participant.on_entry(body)
    return participant, bench


def test_a_contribution_is_the_codes_of_what_was_measured() -> None:
    participant, bench = started()
    request = participant.on_round_start(wire.RoundStart(round_index=1, scale_exponent=-6))
    contribution = request.contribution
    assert contribution.round_index == 1
    assert codec.unpack("int8", contribution.codes, 3).tolist() == [26, -13, 0]
    assert contribution.loss == pytest.approx(0.5)
    assert contribution.examples == 0
    drawn = participant.position.draws.of(1, 1)
    assert [indices.tolist() for indices in bench.measured] == [drawn.tolist()]
    assert (participant.counts.measured, participant.last_loss) == (1, 0.5)


def test_unbiased_rounding_takes_the_chance_it_is_given() -> None:
    """Scalars between two codes go to either; by default the operating system decides."""
    config = config_of(codec={"rounding": "unbiased"})
    values = np.array([0.5, -0.5, 0.0]) * 2.0**-6
    codes = []
    for uniform in (0.0, 0.75):
        draw = partial(np.full, fill_value=uniform)
        participant = Participant(ledger.origin(config, IDENTITY), Stand(values), draw)
        participant.worker = 1
        start = wire.RoundStart(round_index=1, scale_exponent=-6)
        sent = participant.on_round_start(start).contribution.codes
        codes.append(codec.unpack("int8", sent, 3).tolist())
    assert codes == [[1, 0, 0], [0, -1, 0]]


def test_only_what_the_run_asks_for_is_sent_with_it() -> None:
    config = config_of(rounds={"telemetry": "none", "weighting": "examples"})
    participant, _ = started(config)
    request = participant.on_round_start(wire.RoundStart(round_index=1))
    assert not request.contribution.HasField("loss")
    assert request.contribution.examples == 11


def test_curvature_goes_along_while_the_run_probes() -> None:
    """Until the ledger says that the subspace was given up."""
    config = config_of(
        run={"rounds": 40},
        directions={"rotate_every": 4},
        subspace={"kind": "coordinate", "rank": 1, "probe": True},
    )
    participant, bench = started(config)
    first = participant.on_round_start(wire.RoundStart(round_index=1)).contribution
    assert (bench.curvature, first.curvature) == ([True], 3.5)
    given_up = replace(participant.position.elections, given_up=1)
    participant.position = replace(participant.position, elections=given_up)
    later = participant.on_round_start(wire.RoundStart(round_index=2)).contribution
    assert bench.curvature == [True, False]
    assert not later.HasField("curvature")
    plain, bench = started()
    plain.on_round_start(wire.RoundStart(round_index=1))
    assert bench.curvature == [False]


def test_asked_again_it_repeats_its_answer() -> None:
    """After a reconnect: the coordinator may have the first answer, which must stay the same."""
    participant, bench = started()
    start = wire.RoundStart(round_index=1, scale_exponent=-6)
    first = participant.on_round_start(start)
    bench.values = -VALUES
    assert participant.on_round_start(start) == first
    assert len(bench.measured) == 1
    assert participant.on_round_start(wire.RoundStart(round_index=2)) != first
    assert len(bench.measured) == 2


def test_the_weights_are_brought_up_to_date_before_a_measurement() -> None:
    participant, bench = started(rounds=2)
    assert bench.adopted == []
    participant.on_round_start(wire.RoundStart(round_index=3))
    participant.settle()
    assert len(bench.adopted) == 1
    assert np.array_equal(bench.adopted[0], ledger.replay(history(CONFIG, 2)).coefficients)


def test_without_a_finite_loss_it_sits_out() -> None:
    participant, _ = started(values=np.array([np.nan] * 3))
    request = participant.on_round_start(wire.RoundStart(round_index=4))
    assert request.skip == wire.Skip(round_index=4, reason="the loss of this batch is nan")
    assert (participant.counts.skipped, participant.counts.measured) == (1, 0)


def test_what_does_not_follow_is_not_applied() -> None:
    participant, _ = started(rounds=1)
    before = participant.position
    with pytest.raises(LedgerError, match="came where entry"):
        participant.on_entry(history(CONFIG, 1)[-1])
    assert participant.position is before
    participant.worker = None
    with pytest.raises(LorandError, match="before the coordinator gave this worker a number"):
        participant.on_round_start(wire.RoundStart(round_index=2))


def test_a_late_one_jumps_to_a_checkpoint_of_its_own_run_only() -> None:
    participant, _ = started()
    other = ledger.origin(config_of(run={"name": "other"}), IDENTITY)
    with pytest.raises(AssertionError):
        participant.catch_up(other)
    whole = ledger.replay(history(CONFIG, 4))
    participant.catch_up(whole)
    assert participant.position is whole


def test_the_ledger_applies_the_codes_and_not_what_was_measured() -> None:
    """Scalars that differ and have the same codes commit the same ΔA, byte for byte."""
    config = config_of(
        codec={"up": "sign"}, rounds={"quorum": 1, "telemetry": "none"}, run={"rounds": 1}
    )
    ends = []
    for values in (np.array([0.1, -5.0, 2.0]), np.array([30.0, -0.01, 1e-9])):
        store = SqliteStore(":memory:")
        sequencer = Sequencer(config, store, IDENTITY)
        participant = Participant(ledger.origin(config, IDENTITY), Stand(values))
        participant.worker, _ = sequencer.admit(hello(participant.position, "one"))
        for body in sequencer.tail(0):
            participant.on_entry(body)
        (start,) = sequencer.connect(participant.worker, now=0.0)
        request = participant.on_round_start(start.message.round_start)
        for item in sequencer.receive(participant.worker, request, now=0.0):
            participant.on_entry(item.message.entry)
        assert participant.position.finished
        assert participant.counts.committed == 1
        assert sequencer.position is not None
        assert np.array_equal(sequencer.position.coefficients, participant.position.coefficients)
        assert np.count_nonzero(participant.position.coefficients) == 3
        ends.append(participant.position.head)
        store.close()
    assert ends[0] == ends[1]
