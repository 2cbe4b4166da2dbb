"""Virtual time: workers that go, are slow or measure in their own way."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from experiments import heterogeneity, heterogeneous_runs
from experiments.head_workers import Seat
from experiments.heterogeneous_runs import Row, absence, chosen
from experiments.virtual import Absence, Member, World
from tests import tiny

from lorand import ledger
from lorand.config import RunConfig
from lorand.manifest import Identity, Manifest, TensorSpec
from lorand_coordinator.tally import Outcome
from lorand_worker.chance import Chance
from lorand_worker.estimators import Order
from lorand_worker.participant import Participant
from lorand_worker.precision import Precision

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, WORKERS, ROUNDS = 6, 4, 6
HEAD = (TensorSpec("head.bias", (2,), "float32"), TensorSpec("head.weight", (2, WIDTH), "float32"))
IDENTITY = Identity(b"\1" * 32, b"\2" * 32, Manifest(HEAD))
THERE = Absence()
ALIKE: list[dict[str, Any]] = [{}] * WORKERS


def config_of(**changes: dict[str, Any]) -> RunConfig:
    """A mixed run that commits with two of four."""
    sections: dict[str, dict[str, Any]] = {
        "run": {"rounds": ROUNDS},
        "estimator": {"mixed": True, "directions_per_round": 4, "perturbation_scale": 0.01},
        "rounds": {"quorum": 2, "start_with": WORKERS, "deadline_s": 5.0},
    }
    for section, values in changes.items():
        sections[section].update(values)
    return tiny.config("spsa", **sections)


class Lived:
    """A run that came to its end."""

    def __init__(
        self,
        config: RunConfig,
        ways: Sequence[dict[str, Any]] = ALIKE,
        absence: Absence = THERE,
        slow: int = 0,
    ) -> None:
        """Live it; the first `slow` workers take ten times as long, others about a second."""
        x = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (40, WIDTH)).astype(np.float32))
        y = (x[:, 0] > 0).long()
        self.seats = [
            Seat(config, IDENTITY, (x, y), Chance.of(3, f"w{place}").batches, **way)
            for place, way in enumerate(ways)
        ]
        self.ends: list[float] = []
        self.answers: list[int] = []
        origin = ledger.origin(config, IDENTITY)

        def takes(place: int) -> float:
            return (10.0 if place < slow else 1.0) + place / 100

        self.members = [
            Member(f"w{place}", Participant(origin, seat), partial(takes, place))
            for place, seat in enumerate(self.seats)
        ]

        def observe(now: float, outcome: Outcome) -> None:
            self.ends.append(now)
            self.answers.append(outcome.workers)

        World(config, IDENTITY, self.members, absence, observe).run()
        assert len({seat.replica.digest() for seat in self.seats}) == 1, "replicas differ"
        assert len({m.participant.position.head for m in self.members}) == 1
        assert self.members[0].participant.position.coefficients.any()


def test_a_round_of_workers_that_are_alike_takes_the_slowest_ones_time() -> None:
    lived = Lived(config_of())
    assert lived.ends == pytest.approx([1.03 * n for n in range(1, ROUNDS + 1)])
    assert lived.answers == [WORKERS] * ROUNDS


def away(round_index: int) -> frozenset[int]:
    """Worker 0 misses rounds 3 and 4."""
    return frozenset([0] * (round_index in (3, 4)))


def test_who_was_away_reads_what_it_missed_and_goes_on() -> None:
    lived = Lived(config_of(), absence=Absence(away))
    assert lived.answers == [4, 4, 3, 3, 4, 4]
    assert lived.ends[-1] == pytest.approx(6 * 1.03), "nobody was waited for"
    first, *others = lived.members
    assert (first.returns, first.lives) == (1, 1)
    assert first.caught_up > 0
    assert not any(member.caught_up for member in others)
    assert first.participant.counts.committed == 4


def test_who_is_cut_off_is_waited_for_until_the_deadline() -> None:
    lived = Lived(config_of(), absence=Absence(away, cut_off=True))
    assert lived.answers == [4, 3, 3, 3, 4, 4], "its answer to round 2 is lost"
    assert np.diff([0, *lived.ends]) == pytest.approx([1.03, 5, 1.03, 1.03, 1.03, 1.03], abs=0.11)


def test_a_deadline_that_follows_the_answers_leaves_the_slow_behind() -> None:
    waited = Lived(config_of(rounds={"deadline_s": 60.0}), slow=1)
    left = Lived(config_of(rounds={"deadline_s": 60.0, "deadline_k": 3.0}), slow=1)
    assert waited.answers == [4] * ROUNDS
    assert waited.ends[-1] == pytest.approx(60.0)
    assert left.answers[:2] == [4, 4], "eight answers are waited for first"
    assert left.answers[2:] == [3] * (ROUNDS - 2)
    assert left.ends[-1] < 20 + 4 * 2.5


def test_replicas_agree_whatever_their_workers_pass_in_and_measure_by() -> None:
    ways: list[dict[str, Any]] = [
        {"kind": "backprop"},
        {"precision": Precision.BFLOAT16},
        {"kind": "backprop", "precision": Precision.BFLOAT16},
        {},
    ]
    mixed, plain = Lived(config_of(), ways), Lived(config_of())
    order = Order(np.array([1, 2, 40, 200]))
    exact, rounded, _, two_losses = (seat.measure(order).values for seat in mixed.seats)
    assert exact != pytest.approx(two_losses, rel=1e-9), "another estimator"
    assert rounded != pytest.approx(two_losses, rel=1e-9), "another precision"
    assert mixed.seats[0].replica.digest() != plain.seats[0].replica.digest()


def test_as_many_are_away_as_a_row_says_and_others_every_round() -> None:
    of = absence(Row("churn", "", "uci", away=3), seed=1).of
    assert of(heterogeneous_runs.FIRST_AWAY - 1) == frozenset()
    drawn = [of(r) for r in range(heterogeneous_runs.FIRST_AWAY, 60)]
    assert {len(each) for each in drawn} == {3}
    assert len(set(drawn)) > 30
    assert of(7) == of(7)
    assert [len(chosen(count)) for count in (0, 5, 10)] == [0, 5, 10]


def test_the_page_is_what_the_results_say() -> None:
    written = heterogeneous_runs.PATH.with_suffix(".md").read_text(encoding="utf-8")
    assert written == heterogeneity.page(), "run `python -m experiments.heterogeneity --write`"
