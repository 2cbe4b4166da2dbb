"""Runs of which only the noisy sum is kept: central noise, and secure sums, round by round."""

import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from tests.runs import IDENTITY, config_of, hello

from lorand import codec, ledger
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.errors import ContributionError, HandshakeError, LorandError
from lorand.ledger import Position
from lorand.privacy import accountant, plan
from lorand.privacy.mechanism import GRID, Integers
from lorand.privacy.secure_sum import IdentityKey, Roster, SumMember, masked_bytes
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.masked import SecureSum
from lorand_coordinator.sequencer import Message, Outgoing, Sequencer
from lorand_coordinator.store import SqliteStore, StoreUnavailable
from lorand_coordinator.summing import EVERYONE, CentralSum, Summing
from lorand_worker import budget as budgets
from lorand_worker.budget import Budget
from lorand_worker.estimators import Measurement, Order
from lorand_worker.feedback import Place
from lorand_worker.participant import Participant

SEED: Final = bytes(range(32))
MULTIPLIER: Final = 2.0
BATCH: Final = 16


def run(mode: str, quorum: int = 3, start_with: int = 3) -> RunConfig:
    return config_of(
        run={"rounds": 6},
        estimator={"directions_per_round": 3, "batch_size": BATCH},
        codec={"up": "int32"},
        rounds={
            "quorum": quorum,
            "start_with": max(start_with, quorum),
            "telemetry": "none",
            "deadline_s": 10.0,
        },
        privacy={
            "mode": mode,
            "clip_bound": 0.5,
            "sample_rate": 0.5,
            "spare_rounds": 20,
            "honest_min": 2 if mode == "secure-sum" else 0,
        },
        service={"commit_retry_s": 1.0},
    )


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """What noise costs is tested elsewhere, and takes seconds to calculate."""
    monkeypatch.setattr(accountant, "epsilon", lambda *_: 1.0)


class Sample:
    """A bench that releases other numbers each time it is asked."""

    examples = 40

    def __init__(self, config: RunConfig, seed: int) -> None:
        """Nothing is released yet."""
        self.released: list[Integers] = []
        self._mechanism = plan.mechanism(config, MULTIPLIER)
        self._source = np.random.default_rng(seed)

    def adopt(self, position: Position) -> None:
        """See Bench."""

    def measure(self, order: Order) -> Measurement:
        """What is measured without noise is not for a private run."""
        raise AssertionError

    def release(self, indices: Indices) -> Integers:
        """See Bench."""
        vectors = self._source.normal(0.0, 0.3, (20, len(indices)))
        self.released.append(self._mechanism.steps(vectors))
        return self.released[-1]


class Life:
    """One process of a worker, on the budget that is there."""

    def __init__(self, party: "Party", name: str, member: SumMember | None) -> None:
        """It has nothing of the ledger yet."""
        config, origin = party.config, ledger.origin(party.config, IDENTITY)
        self.name, self.member = name, member
        self.bench = Sample(config, len(party.lives))
        place = Place(party.folder, origin.run_digest, name)
        data = party.folder / f"{name}.csv"
        noise = plan.release_of(config, MULTIPLIER)
        self.budget = Budget(place, config, data, planned=lambda _: noise)
        self.participant = Participant(origin, self.bench, budget=self.budget, member=member)


class Party:
    """A sequencer and its workers, with messages delivered in order unless a test keeps them."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Nobody is connected yet."""
        self.config, self.folder, self.now = config, folder, 0.0
        names = [f"worker-{number}" for number in range(1, config.rounds.quorum + 2)]
        self.keys = {name: IdentityKey() for name in names}
        self.roster = Roster.of({name: key.public for name, key in self.keys.items()})
        self.lives: list[Life] = []
        self.connected: dict[int, Life] = {}
        self.log: list[tuple[str, wire.ParticipateRequest]] = []
        self.rejected: list[str] = []
        self.lost: Callable[[str, wire.ParticipateRequest], bool] = lambda name, request: False
        self.store = SqliteStore(":memory:")
        self.sequencer = self.coordinator()

    def coordinator(self) -> Sequencer:
        """A process of the coordinator."""
        return Sequencer(self.config, self.store, IDENTITY, self.summing())

    def summing(self) -> Summing:
        """What makes the sums of this run."""
        if self.config.privacy.mode == "central":
            return CentralSum(self.config, MULTIPLIER)
        return SecureSum(self.config, self.roster, MULTIPLIER)

    def member(self, name: str) -> SumMember | None:
        """A worker's part in the sums, with a new key of the run."""
        if self.config.privacy.mode == "central":
            return None
        return SumMember(
            self.keys[name],
            self.roster,
            ledger.origin(self.config, IDENTITY).run_digest,
            bound=plan.largest_number(self.config, MULTIPLIER),
        )

    def start(self, name: str) -> Life:
        """A process of a worker begins."""
        life = Life(self, name, self.member(name))
        self.lives.append(life)
        return life

    def connect(self, life: Life) -> None:
        """A worker says hello, hears what it lacks, and takes part."""
        position = life.participant.position
        greeting = hello(position, life.name)
        greeting.sum_key = b"" if life.member is None else life.member.announcement
        number, outgoing = self.sequencer.admit(greeting)
        life.participant.worker = number
        self.deliver(outgoing)
        for body in self.sequencer.tail(life.participant.position.next_sequence):
            life.participant.on_entry(body)
        self.connected[number] = life
        self.deliver(self.sequencer.connect(number, self.now))

    def leave(self, name: str) -> None:
        """A worker's process is gone."""
        (number,) = [n for n, life in self.connected.items() if life.name == name]
        self.connected.pop(number).budget.close()
        self.deliver(self.sequencer.disconnect(number, self.now))

    def tick(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        self.deliver(self.sequencer.tick(self.now))

    def deliver(self, outgoing: list[Outgoing]) -> None:
        """Have workers handle messages, and the sequencer their answers, until nobody speaks."""
        queue = deque(outgoing)
        while queue:
            item = queue.popleft()
            life = self.connected.get(item.worker)
            if life is None:
                continue
            answer = self._handle(life, item.message)
            if answer is not None:
                self.log.append((life.name, answer))
                if not self.lost(life.name, answer):
                    queue.extend(self.sequencer.receive(item.worker, answer, self.now))

    def _handle(self, life: Life, message: Message) -> wire.ParticipateRequest | None:
        match message.WhichOneof("message"):
            case "entry":
                life.participant.on_entry(message.entry)
            case "sum_keys":
                assert life.member is not None
                life.member.agree(message.sum_keys.announcements)
            case "round_start":
                return life.participant.on_round_start(message.round_start)
            case "rejection":
                self.rejected.append(message.rejection.reason)
        return None

    def commits(self) -> list[tuple[pb.Entry, list[pb.StoredContribution]]]:
        """Commit entries, and what is stored beside them."""
        entries = [ledger.parse(body) for body in self.store.entries()]
        return [
            (e, [pb.StoredContribution.FromString(b) for b in self.store.contributions(e.sequence)])
            for e in entries
            if e.HasField("commit")
        ]

    def abandoned(self) -> list[str]:
        """Why rounds were given up."""
        entries = [ledger.parse(body) for body in self.store.entries()]
        return [entry.abandon.reason for entry in entries if entry.HasField("abandon")]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Party]]:
    """Parties whose workers 1 to 3 are connected, and through with the run unless `joined` is 0."""
    made: list[Party] = []

    def build(mode: str, joined: int = 3, **changes: Any) -> Party:
        party = Party(run(mode, **changes), tmp_path / str(len(made)))
        made.append(party)
        for number in range(1, joined + 1):
            party.connect(party.start(f"worker-{number}"))
        return party

    yield build
    for party in made:
        for life in party.lives:
            life.budget.close()


MODES: Final = ["central", "secure-sum"]


@pytest.mark.parametrize("mode", MODES)
def test_the_ledger_holds_the_noisy_mean_and_nobodys_own(
    mode: str, make: Callable[..., Party]
) -> None:
    party = make(mode)
    commits = party.commits()
    assert len(commits) == 6
    assert party.sequencer.engine.phase == "finished"
    benches = [life.bench for life in party.lives]
    for number, (entry, stored) in enumerate(commits):
        assert list(entry.commit.workers) == [1, 2, 3]
        (kept,) = stored
        assert kept.worker == EVERYONE
        assert {f.name for f, _ in kept.contribution.ListFields()} <= {"round_index", "codes"}
        codes = codec.unpack("int32", kept.contribution.codes, 3)
        mean = codec.decode("int32", codes, entry.commit.scale_exponent)
        total = np.sum([bench.released[number] for bench in benches], axis=0)
        away = mean - total * 0.5 / GRID / BATCH / 3
        noise = MULTIPLIER * 0.5 / BATCH / 3
        if mode == "secure-sum":
            assert np.abs(away).max() < 2.0**-20, "its noise is in what was released"
        else:
            assert 0 < np.abs(away).max() < 8 * noise
    charged = [budgets.read(life.budget.path).charged for life in party.lives]
    assert charged == [6, 6, 6]
    sizes = {len(request.SerializeToString()) for _, request in party.log}
    assert max(sizes) <= 16 + (8 * 3 if mode == "central" else masked_bytes(3))
    heads = {life.participant.position.head for life in party.lives}
    assert heads == {party.sequencer.store.head()}


@pytest.mark.parametrize("mode", MODES)
def test_a_coordinator_that_was_started_again_has_the_same_state(
    mode: str, make: Callable[..., Party]
) -> None:
    party = make(mode)
    again = party.coordinator()
    assert again.position is not None
    assert party.sequencer.position is not None
    assert again.position.head == party.sequencer.position.head
    ours, theirs = again._optimizer, party.sequencer._optimizer
    assert ours.scale_exponent == theirs.scale_exponent
    assert ours.feedback.tolist() == theirs.feedback.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_a_commit_that_is_tried_again_is_the_same_release(
    mode: str, make: Callable[..., Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails must not get the same sum with other noise."""
    party = make(mode, joined=2)
    tried: list[tuple[bytes, ...]] = []
    append = party.store.append

    def failing(entry: pb.Entry, contributions: Any = ()) -> tuple[bytes, bytes]:
        if entry.HasField("commit"):
            tried.append((entry.commit.codes, *contributions))
            if len(tried) < 3:
                raise StoreUnavailable("the disk is full")
        return append(entry, contributions)

    monkeypatch.setattr(party.store, "append", failing)
    party.connect(party.start("worker-3"))
    for _ in range(3):
        party.tick(1.1)
    assert len(tried) >= 3
    assert tried[0] == tried[1] == tried[2]


def test_central_noise_covers_whoever_is_there(make: Callable[..., Party]) -> None:
    """A worker that is late costs nothing: the sum is that of the others, with noise as ever."""
    party = make("central", joined=0, quorum=2, start_with=3)
    party.lost = lambda name, request: name == "worker-2"
    for number in (1, 2, 3):
        party.connect(party.start(f"worker-{number}"))
    party.tick(10.1)
    entry, stored = party.commits()[0]
    assert len(entry.commit.workers) == 2
    assert len(stored) == 1


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        (np.zeros(2, np.int64), "3 numbers of a sum take 24 bytes, not 16"),
        (np.array([0, 4 * BATCH * GRID + 1, 0]), "beyond"),
        (np.array([0, -(2**63), 0]), "beyond"),
    ],
)
def test_central_sums_are_checked(numbers: Integers, why: str, make: Callable[..., Party]) -> None:
    party = make("central", joined=2)
    party.lost = lambda name, request: True
    party.connect(party.start("worker-3"))
    sent = pb.Contribution(round_index=1, sum=numbers.astype("<i8").tobytes())
    request = wire.ParticipateRequest(contribution=sent)
    (answer,) = party.sequencer.receive(1, request, party.now)
    assert why in answer.message.rejection.reason
    assert party.sequencer.engine.contributions == {}


# ------------------------------------------------------------- secure sums


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
    broken.contribution.sum = broken.contribution.sum[:-1] + b"\0"
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


# ------------------------------------------------------------- who adds which noise


def test_a_workers_share_of_the_noise() -> None:
    central = plan.mechanism(run("central"), 3.0)
    assert not central.adds_noise
    shared = plan.mechanism(run("secure-sum"), 3.0)
    assert shared.adds_noise
    assert shared.noise_steps == pytest.approx(3.0 / np.sqrt(2) * GRID)
    whole = plan.whole(run("secure-sum"), 3.0)
    assert whole.noise_steps == 3 * GRID
    alone = plan.mechanism(run("worker"), 3.0)
    assert (alone.noise_steps, alone.largest) == (3 * GRID, 0)


def test_numbers_are_kept_within_their_bound_before_the_noise() -> None:
    """Distances between sums only become shorter, so that the noise is still enough."""
    mechanism = plan.mechanism(run("central"), 3.0)
    most = 4 * BATCH * GRID
    assert mechanism.largest == most == plan.largest_number(run("central"), 3.0)
    vectors = np.zeros((5 * BATCH, 3))
    vectors[:, 0] = 0.5
    assert mechanism.steps(vectors).tolist() == [most, 0, 0]
    assert mechanism.steps(-vectors).tolist() == [-most, 0, 0]


def test_shares_fit_the_bound_of_a_number() -> None:
    config = run("secure-sum")
    shared = plan.mechanism(config, MULTIPLIER)
    bound = plan.largest_number(config, MULTIPLIER)
    assert bound >= shared.largest + 16 * shared.noise_steps
    near = plan.largest_number(config, MULTIPLIER * (1 + 1e-12))
    assert near in (bound, 2 * bound - shared.largest, bound)
    between = {plan.largest_number(config, m) for m in np.linspace(2.1, 3.9, 7)}
    assert len(between) == 1, "whoever calculated the multiplier to another last digit"


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


def test_a_coordinator_needs_no_extra_for_runs_without_sums() -> None:
    """It is installed without the library that counts epsilon."""
    program = "import sys, lorand_coordinator.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "lorand_coordinator.sequencer" in loaded
    assert not {"dp_accounting", "scipy", "torch"} & set(loaded)
