"""Runs of sums in one process: a sequencer, its workers, and messages that a test may keep."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from tests.runs import IDENTITY, config_of, hello

from lorand import ledger
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.ledger import Position
from lorand.privacy import plan
from lorand.privacy.mechanism import Integers
from lorand.privacy.secure_sum import IdentityKey, Roster, SumMember
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.masked import SecureSum
from lorand_coordinator.sequencer import Message, Outgoing, Sequencer
from lorand_coordinator.store import SqliteStore
from lorand_coordinator.summing import CentralSum, Summing
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
