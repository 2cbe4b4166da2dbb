"""Secure sums, round by round: who is lost, who lies, and what late vectors tell."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.runs import IDENTITY
from tests.unit.summing.party import MULTIPLIER, SEED, Life, Party, Sample, run

from lorand import codec, ledger
from lorand.directions import Indices
from lorand.errors import ContributionError, HandshakeError, LorandError
from lorand.privacy import plan
from lorand.privacy.mechanism import Integers
from lorand.privacy.secure_sum import IdentityKey, Roster, SumMember
from lorand.v1 import coordination_pb2 as wire
from lorand_worker import budget as budgets
from lorand_worker.budget import Budget
from lorand_worker.feedback import Place
from lorand_worker.participant import Participant


def test_who_is_lost_costs_a_retry_and_nothing_is_sent_twice(make: Callable[..., Party]) -> None:
    """The others bring fresh batches and noise to the next round, charged again."""
    party = make("secure-sum", joined=2)
    party.lost = lambda name, request: name == "worker-3"
    third = party.start("worker-3")
    party.connect(third)
    assert party.commits() == []
    party.leave("worker-3")
    assert party.abandoned() == ["the sum of 3 participants is nothing without worker 3"]
    party.lost = lambda name, request: False
    party.connect(party.start("worker-3"))
    party.tick(1.1)
    assert len(party.commits()) == 6
    for name in ("worker-1", "worker-2"):
        sent = [r.contribution.sum for who, r in party.log if who == name]
        assert len(sent) == len(set(sent)) == 7
    assert budgets.read(party.lives[0].budget.path).charged == 7
    # The third process began anew: its batch for the lost round was charged too.
    assert budgets.read(party.lives[3].budget.path).charged == 7
    released = [steps.tolist() for steps in party.lives[0].bench.released]
    assert len({tuple(steps) for steps in released}) == 7


def test_what_left_late_opens_nothing(make: Callable[..., Party]) -> None:
    """With the late vector the lost sum is complete; the next one tells nothing of its sender.

    Had the others sent the same vectors again, the difference of the sums would be its own.
    """
    party = make("secure-sum", joined=0, start_with=4)
    party.lost = lambda name, request: (name, request.contribution.round_index) == ("worker-4", 1)
    for number in (1, 2, 3, 4):
        party.connect(party.start(f"worker-{number}"))
    party.tick(10.1)
    party.tick(1.1)
    first = {who: r.contribution for who, r in party.log if r.contribution.round_index == 1}
    assert sorted(first) == ["worker-1", "worker-2", "worker-3", "worker-4"]
    assert len(party.abandoned()) == 1
    entry, _ = party.commits()[0]
    assert list(entry.commit.workers) == [1, 2, 3], "the late one is left out"
    complete = np.sum([life.bench.released[0] for life in party.lives], axis=0)
    second = np.sum([life.bench.released[1] for life in party.lives[:3]], axis=0)
    late = party.lives[3].bench.released[0]
    assert (complete - second).tolist() != late.tolist()
    request = wire.ParticipateRequest(contribution=first["worker-4"])
    (answer,) = party.sequencer.receive(4, request, party.now)
    assert "takes no contributions" in answer.message.rejection.reason


def test_a_coordinator_that_comes_back_gives_up_the_round_it_was_in(
    make: Callable[..., Party],
) -> None:
    """Its masked vectors are gone; workers that are still there go on with the same keys."""
    party = make("secure-sum", joined=2)
    party.lost = lambda name, request: name == "worker-3"
    party.connect(party.start("worker-3"))
    party.connected.clear()
    party.lost = lambda name, request: False
    party.sequencer = party.coordinator()
    assert party.abandoned() == ["the coordinator was started again"]
    for life in party.lives:
        party.connect(life)
    assert len(party.commits()) == 6
    assert [budgets.read(life.budget.path).charged for life in party.lives] == [7, 7, 7]
    assert party.coordinator().engine.phase == "finished", "and then nothing is given up"
    assert len(party.abandoned()) == 1


def test_a_worker_that_answered_may_come_back_with_another_key(
    make: Callable[..., Party],
) -> None:
    party = make("secure-sum", joined=2)
    party.lost = lambda name, request: name == "worker-3"
    third = party.start("worker-3")
    party.connect(third)
    kept = party.log[-1][1]
    party.leave("worker-1")
    party.connect(party.start("worker-1"))
    party.lost = lambda name, request: False
    party.deliver(party.sequencer.receive(3, kept, party.now))
    assert len(party.commits()) == 6
    assert party.abandoned() == []


def test_a_sum_beyond_its_bound_is_given_up(make: Callable[..., Party]) -> None:
    """One member breaks the protocol: nobody can tell which, and the run goes on without end."""
    party = make("secure-sum", joined=2)
    liar = party.start("worker-3")
    assert liar.member is not None
    bound = plan.largest_number(party.config, MULTIPLIER)
    honest = liar.bench.release
    lies = [np.full(3, 2**62)]

    def beyond(indices: Indices) -> Integers:
        return lies.pop() if lies else honest(indices)

    open_ = liar.member.open

    def unchecked(request: bytes, **known: Any) -> Any:
        attempt = open_(request, **known)
        attempt._checked = lambda values: values  # type: ignore[method-assign]
        return attempt

    liar.bench.release = beyond  # type: ignore[method-assign]
    liar.member.open = unchecked  # type: ignore[method-assign]
    party.connect(liar)
    assert party.abandoned() == [
        f"the sum is beyond {3 * bound}: a member broke the protocol; look at who was there, and "
        "begin another attempt"
    ]
    party.tick(1.1)
    assert len(party.commits()) == 6


def test_whose_key_it_is(make: Callable[..., Party]) -> None:
    party = make("secure-sum", joined=2)
    stranger = IdentityKey()
    other = Roster.of({"worker-3": stranger.public, "x": SEED, "y": bytes(32)})
    digest = ledger.origin(party.config, IDENTITY).run_digest
    bound = plan.largest_number(party.config, MULTIPLIER)
    life = party.start("worker-3")
    ours = life.member
    for member, why in (
        (SumMember(stranger, other, digest, bound=bound), "for another roster"),
        (party.member("worker-4"), "brings the key of 'worker-4'"),
        (SumMember(party.keys["worker-3"], party.roster, SEED, bound=bound), "for another run"),
    ):
        life.member = member
        with pytest.raises(HandshakeError, match=why):
            party.connect(life)
    life.member = None
    with pytest.raises(HandshakeError, match="an announcement has 179 bytes, not 0"):
        party.connect(life)
    life.member = ours
    party.connect(life)
    assert len(party.commits()) == 6


def test_a_vector_of_another_member_or_attempt_is_refused(make: Callable[..., Party]) -> None:
    party = make("secure-sum", joined=2)
    party.lost = lambda name, request: True
    party.connect(party.start("worker-3"))
    sent = dict(party.log)
    (answer,) = party.sequencer.receive(1, sent["worker-2"], party.now)
    assert answer.message.rejection.reason == "'worker-1' sent the vector of 'worker-2'"
    broken = wire.ParticipateRequest()
    broken.CopyFrom(sent["worker-1"])
    forged = broken.contribution.sum
    broken.contribution.sum = forged[:-1] + bytes([forged[-1] ^ 1])
    (answer,) = party.sequencer.receive(1, broken, party.now)
    assert "not signed by 'worker-1'" in answer.message.rejection.reason
    for number in (1, 2, 3):
        party.deliver(party.sequencer.receive(number, sent[f"worker-{number}"], party.now))
    assert len(party.commits()) == 1


def test_a_worker_refuses_a_sum_it_did_not_agree_to(make: Callable[..., Party]) -> None:
    party = make("secure-sum", joined=2)
    party.lost = lambda name, request: True
    third = party.start("worker-3")
    assert third.member is not None
    party.connect(third)
    start = wire.RoundStart(round_index=2, sum_attempt=b"")
    with pytest.raises(ContributionError, match="cannot be read"):
        third.participant.on_round_start(start)
    summing = party.sequencer._summing
    assert summing is not None
    position = party.sequencer.position
    assert position is not None
    names = ["worker-1", "worker-2", "worker-3"]
    start.sum_attempt = summing.begin(2, names, replace(position, head=SEED))
    with pytest.raises(HandshakeError, match="another state than this worker's"):
        third.participant.on_round_start(start)
    assert budgets.read(third.budget.path).charged == 1, "nothing was drawn"


def test_without_a_key_a_run_of_secure_sums_is_not_answered(tmp_path: Path) -> None:
    config = run("secure-sum")
    origin = ledger.origin(config, IDENTITY)
    place = Place(tmp_path, origin.run_digest, "worker-1")
    noise = plan.release_of(config, MULTIPLIER)
    budget = Budget(place, config, tmp_path / "data.csv", planned=lambda _: noise)
    with pytest.raises(LorandError, match="identity key and a roster"):
        Participant(origin, Sample(config, 0), budget=budget)
    budget.close()


def test_a_sample_is_drawn_after_the_attempt_is_known(make: Callable[..., Party]) -> None:
    """Not before: a batch that waits for another attempt would be in two sums."""
    party = make("secure-sum", joined=2)
    third = party.start("worker-3")
    assert third.member is not None
    seen: list[int] = []
    open_ = third.member.open

    def watched(request: bytes, **known: Any) -> Any:
        seen.append(len(third.bench.released))
        return open_(request, **known)

    third.member.open = watched  # type: ignore[method-assign]
    party.connect(third)
    assert seen == list(range(6))


@pytest.mark.parametrize("quorum", [3, 8, 31])
def test_sums_of_many_are_exact(quorum: int, make: Callable[..., Party]) -> None:
    party = make("secure-sum", joined=quorum, quorum=quorum)
    entry, stored = party.commits()[-1]
    assert len(entry.commit.workers) == quorum
    codes = codec.unpack("int32", stored[0].contribution.codes, 3)
    total = np.sum([life.bench.released[-1] for life in party.lives], axis=0)
    mean = party.sequencer._summing.mechanism.mean(total, quorum)  # type: ignore[union-attr]
    assert codes.tolist() == codec.encode("int32", mean, -20).tolist()


def test_random_losses_and_restarts_end_with_equal_ledgers(make: Callable[..., Party]) -> None:
    """Whoever leaves whenever: nothing is committed twice, and no vector is sent twice."""
    source = random.Random(5)
    party = make("secure-sum", joined=0)
    alive: dict[str, Life] = {}
    party.lost = lambda name, request: source.random() < 0.15
    for _ in range(400):
        if party.sequencer.engine.phase == "finished":
            break
        name = f"worker-{source.randint(1, 4)}"
        if name not in alive:
            alive[name] = party.start(name)
            party.connect(alive[name])
        elif source.random() < 0.3:
            party.leave(name)
            del alive[name]
        party.tick(source.choice([0.2, 1.1, 10.1]))
    assert party.sequencer.engine.phase == "finished"
    assert len(party.abandoned()) > 3
    for name in ("worker-1", "worker-2", "worker-3", "worker-4"):
        sent = [(r.contribution.round_index, r.contribution.sum) for w, r in party.log if w == name]
        by_round = dict(sent)
        assert all(by_round[index] == vector for index, vector in sent)
        assert len(set(by_round.values())) == len(by_round)
        charged = max(life.budget.account.charged for life in party.lives if life.name == name)
        assert charged == len(by_round)
