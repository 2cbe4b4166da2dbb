"""A seeded world around the real parts: sessions, participants, links, hub, sequencer, store.

One virtual clock and one agenda; everything random comes from the seed, so a seed is a history.
Simulated are the network (network.py), the processes (crashes that lose all memory, pauses), the
disk (disk.py) and what a worker measures (workers.py). Faults end at `calm_at`; from then on the
run has to finish.
"""

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.runs import IDENTITY, config_of
from tests.simulation.disk import CRASHES, Crash, Disk, SimulatedStore
from tests.simulation.network import Stream, refusal
from tests.simulation.workers import Worker

from lorand.config import RunConfig
from lorand.errors import LorandError
from lorand.privacy.primitives import IdentityKey
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.hub import CatchUpFirst, Hub, NameInUse
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import StoreUnavailable

KEY: Final = IdentityKey(bytes(range(32)))
TICK_S: Final = 0.25
FINISH_WITHIN_S: Final = 60.0
"""Of calm, virtual: ten deadlines, the longest pause, reconnecting, a heartbeat's timeout."""

MISFORTUNES: Final = (
    "coordinator crashes",
    "coordinator crashes as it writes",
    "coordinator pauses",
    "worker crashes",
    "worker pauses",
    "worker computes long",
    "connection breaks",
    "disk is full",
    "disk lies",
    "evaluations",
)


def robustness_for(rng: random.Random, quorum: int, weighting: str) -> dict[str, Any]:
    """Settings of [rounds] against stragglers and liars; most runs have none, as most have."""
    if rng.random() < 0.7:
        return {}
    robust = quorum > 2 and weighting == "equal"
    return {
        "deadline_k": rng.choice([0.0, 3.0]),
        "participants": rng.choice([0, quorum, quorum + 1]),
        "aggregation": rng.choice(["mean", "clipped-mean"]) if robust else "mean",
    }


def config_for(rng: random.Random, seed: int) -> RunConfig:
    """A small run, different from seed to seed."""
    quorum = rng.choice([1, 2, 2, 3])
    each = rng.choice([3, 8, 40])
    rotate_every = rng.choice([0, 0, 1, 3])
    return config_of(
        run={"rounds": rng.randint(6, 10), "adopt_first_worker": True},
        directions={
            "mode": rng.choice(["shared", "own"]),
            "rotate_every": rotate_every,
            "drawing": "uniform" if rotate_every else rng.choice(["uniform", "weighted"]),
        },
        estimator={"directions_per_round": each},
        local={"steps": rng.choice([0, 1, 1 if each == 40 else 5])},
        codec={"up": rng.choice(["int8", "sign"]), "down": rng.choice(["int8", "sign"])},
        optimizer={"kind": rng.choice(["sgd", "adam"]), "momentum": 0.5},
        rounds={
            "quorum": quorum,
            "start_with": rng.choice([0, 3]),
            "deadline_s": 3.0,
            "weighting": (weighting := rng.choice(["equal", "examples"])),
            "telemetry": rng.choice(["loss", "none"]),
            **robustness_for(random.Random(seed), quorum, weighting),
        },
        service={
            "checkpoint_every": rng.choice([1, 2, 3]),
            "tail_entries": rng.choice([1, 4, 512]),
            "outbox_messages": 8,
            "commit_retry_s": 0.5,
            "heartbeat_s": 0.5,
            "heartbeat_timeout_s": 2.0,
            "statements_every": random.Random(seed).choice([0, 1, 2, 5]),
        },
    )


class World:
    """One run. `run` lives it to its end; what it saw is checked by tests/simulation/checks.py."""

    def __init__(self, seed: int, folder: Path, template: Path, *, faults: bool = True) -> None:
        """Make everything, and put the first events on the agenda."""
        self.rng = random.Random(seed)
        self.seed = seed
        self.now = 0.0
        self.told: deque[str] = deque(maxlen=80)
        self.faults: Counter[str] = Counter()
        self.config = config_for(self.rng, seed)
        self.calm_at = self.rng.uniform(8, 30) if faults else 0.0
        self._misfortunes_per_s = self.rng.choice([0.3, 0.7, 1.5])
        self.disk = Disk(folder, template, self.rng)
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._ties = 0
        # What must never change: digests by sequence, weights by round, scalars by worker.
        self.heads: dict[int, bytes] = {}
        self.measured_at: dict[int, bytes] = {}
        self.reported: set[tuple[int, int, bytes, int]] = set()
        # By round and worker, what it owed before, and owes after a commit.
        self.owed: dict[tuple[int, int], tuple[bytes, bytes]] = {}
        self.state = folder / "state"
        self.coordinator = Coordinator(self)
        self.workers = [Worker(self, number) for number in range(self.rng.choice([3, 4]))]
        self.after(0.0, self.coordinator.start)
        for worker in self.workers:
            self.after(self.rng.uniform(0, 3), worker.start)
        if faults:
            self.after(self.rng.expovariate(self._misfortunes_per_s), self._misfortune)
            self.at(self.calm_at, self.disk.heal)

    def at(self, moment: float, action: Callable[[], None]) -> None:
        """Put something on the agenda; what is due at the same time happens in this order."""
        self._ties += 1
        heapq.heappush(self._agenda, (moment, self._ties, action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Put something on the agenda, so many seconds from now."""
        self.at(self.now + seconds, action)

    def run(self) -> None:
        """Live until every worker has the whole run."""
        while not all(worker.done for worker in self.workers):
            self.now, _, action = heapq.heappop(self._agenda)
            action()
            assert self.now < self.calm_at + FINISH_WITHIN_S, (
                f"I7: not finished {FINISH_WITHIN_S:.0f} s after the last fault; the coordinator "
                f"says: {self.coordinator.reason}"
            )

    def tell(self, text: str) -> None:
        """Note what happened, for those who look into a failure."""
        self.told.append(f"{self.now:7.3f} {text}")

    def delay(self) -> float:
        """How long a message travels."""
        spike = self.calm_at > self.now and self.rng.random() < 0.03
        return self.rng.uniform(0.5, 4) if spike else self.rng.uniform(0.005, 0.1)

    @property
    def calm(self) -> bool:
        """Whether the time of faults is over."""
        return self.now >= self.calm_at

    def _misfortune(self) -> None:
        """Let one of the things happen that do happen, and plan the next."""
        if self.calm:
            return
        kind = self.rng.choice(MISFORTUNES)
        self.faults[kind] += 1
        self.tell(f"-- {kind}")
        worker = self.rng.choice(self.workers)
        match kind:
            case "coordinator crashes":
                self.coordinator.crash()
            case "coordinator crashes as it writes":
                self.disk.next_crash = self.rng.choice(CRASHES)
            case "coordinator pauses":
                self.coordinator.pause(self.rng.uniform(0.5, 6))
            case "worker crashes":
                worker.crash()
            case "worker pauses":
                worker.pause(self.rng.uniform(0.5, 8))
            case "worker computes long":
                worker.busy_until = self.now + self.rng.uniform(3, 15)
            case "connection breaks":
                if worker.stream is not None:
                    worker.stream.break_()
            case "disk is full":
                self.disk.full = True
                self.after(self.rng.uniform(0.2, 3), lambda: setattr(self.disk, "full", False))
            case "disk lies":
                self.disk.lying = True
                self.after(self.rng.uniform(0.2, 3), lambda: setattr(self.disk, "lying", False))
            case "evaluations":
                for _ in range(self.rng.randint(1, 8)):
                    self.after(self.rng.uniform(0, 1), self.coordinator.evaluate)
        self.after(self.rng.expovariate(self._misfortunes_per_s), self._misfortune)

    def see(self, sequence: int, head: bytes) -> None:
        """Somebody has a history that ends so: it is everybody's for ever."""
        if sequence >= 0:
            assert self.heads.setdefault(sequence, head) == head, (
                f"I4: entry {sequence} is not what another saw, or the same one before"
            )


class Coordinator:
    """The process of `lr-coordinator serve`, started again whenever it ends."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.hub: Hub | None = None
        self.store: SimulatedStore | None = None
        self.streams: list[Stream] = []
        self.restarts = 0
        self._inbox: deque[Callable[[Hub], None]] = deque()
        self._paused_until = 0.0

    @property
    def reason(self) -> str:
        """What the status page says."""
        return self.hub.sequencer.reason if self.hub else "(it is down)"

    def start(self) -> None:
        """Open the ledger and listen; tried again when the disk does not let it."""
        world = self._world
        self.restarts += 1
        adopts = world.seed % 4 == 0
        self.store = world.disk.open()
        try:
            identity = None if adopts else IDENTITY
            sequencer = Sequencer(world.config, self.store, identity, key=KEY)
        except (StoreUnavailable, Crash) as error:
            self.end(str(error))
            return
        for sequence, head in world.heads.items():
            assert sequence < len(self.store), f"I1: entry {sequence} was seen and lost"
            assert self.store.digest(sequence) == head, f"I4: entry {sequence} is another"
        self.hub = Hub(sequencer, clock=lambda: world.now)
        world.tell(f"coordinator starts with {len(self.store)} entries")
        world.after(TICK_S, partial(self._next_tick, self.hub))

    def crash(self) -> None:
        """End the process where it is."""
        if self.hub is not None:
            self.end("")

    def end(self, why: str) -> None:
        """End the process, for a reason; it is started again."""
        world, store = self._world, self.store
        assert store is not None
        world.tell(f"coordinator ends {why}")
        world.disk.crash(store, "crash during" if why == "crash during" else None)
        self.hub = self.store = None
        self._paused_until = 0.0
        self._inbox.clear()
        for stream in self.streams:
            stream.coordinator_is_gone()
        self.streams = []
        world.after(world.rng.uniform(0.1, 3), self.start)

    def pause(self, seconds: float) -> None:
        """Do nothing for a while, as when stopped or swapped out; messages wait."""
        self._paused_until = self._world.now + seconds
        self._world.at(self._paused_until, self._work)

    def do(self, action: Callable[[Hub], None]) -> None:
        """Let the process do something, in the order of arrival."""
        if self.hub is not None:
            self._inbox.append(action)
            self._work()

    def _work(self) -> None:
        while self.hub is not None and self._inbox and self._world.now >= self._paused_until:
            try:
                self._inbox.popleft()(self.hub)
                for stream in list(self.streams):
                    stream.pump()
            except Crash as error:
                self.end(str(error))

    def _next_tick(self, hub: Hub) -> None:
        if self.hub is hub:
            self.do(self._tick)

    def _tick(self, hub: Hub) -> None:
        """One turn of Hub.tick, which sleeps on a real clock."""
        now, timeout = self._world.now, hub.config.service.heartbeat_timeout_s
        self._world.after(TICK_S, partial(self._next_tick, hub))
        for connection in list(hub.connections.values()):
            if now - connection.last_seen > timeout:
                hub.drop(connection, "no heartbeat")
        hub.deliver(hub.sequencer.tick(now))

    def accept(self, stream: Stream, hello: wire.Hello) -> None:
        """Answer a Hello, as service.Coordination does."""
        assert self.hub is not None
        try:
            stream.connection = self.hub.join(hello)
        except LorandError as error:
            retry = isinstance(error, StoreUnavailable | CatchUpFirst | NameInUse)
            stream.send_down(refusal(str(error), retry))

    def evaluate(self) -> None:
        """Let an evaluator post a result."""
        self.do(self._take_evaluation)

    def _take_evaluation(self, hub: Hub) -> None:
        """Answer a PostEvaluation, as service.Ledger does."""
        position = hub.sequencer.position
        if position is not None:
            posted = pb.Evaluation(sequence=position.next_sequence - 1, accuracy=0.5, loss=1.0)
            try:
                hub.deliver(hub.sequencer.post_evaluation(posted, position.run_digest))
            except StoreUnavailable:
                return  # the evaluator hears of it
