"""A whole federation in one process: the sequencer, participants and benches of a real one.

All replicas of a run hold the same bits, so that one model stands for those of all workers, who are
measured in turn; hidden states below the trained layers are computed once an example. Everything
else is as in a run over the network, whose ledger comes out bit for bit where batches are drawn
alike (`tests/end_to_end/test_api.py`).
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import nn

from lorand import adapter, card, ledger
from lorand.adapter import Adapter
from lorand.card import Facts
from lorand.config import RunConfig
from lorand.errors import ConfigError, LorandError
from lorand.ledger import Position
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_api.groups import Crew, Group, Machines, Setup, Spread, name_of
from lorand_api.runs import Run, config_of, identity_beside
from lorand_api.shards import Shard, examples_of
from lorand_coordinator.sequencer import Outgoing, Sequencer
from lorand_coordinator.store import SqliteStore, Store
from lorand_worker import guard, merge
from lorand_worker.bench import Base, bring, load_base, task_for
from lorand_worker.participant import hello
from lorand_worker.precision import Precision, choose
from lorand_worker.tasks import Forward, Score, Task

MOST_ABANDONED: Final = 20
"""Rounds in a row that may come to nothing before a simulation gives up."""


@dataclass(frozen=True)
class Round:
    """A committed round: how many there are by now, mean loss of its batches, score where asked."""

    committed: int
    loss: float | None
    score: Score | None = None


@dataclass(frozen=True)
class Simulation:
    """A finished run: where its ledger ends, the model at these weights, and its rounds."""

    position: Position
    base: Base
    rounds: Sequence[Round]
    facts: Facts
    """What its ledger tells, for a card."""

    @property
    def adapter(self) -> Adapter:
        """What the run learned, as K integers."""
        return adapter.of(self.position)

    @property
    def model(self) -> nn.Module:
        """The fine-tuned model: called with input_ids and attention_mask it returns logits."""
        return self.base.loaded.module

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.base.loaded.tokenizer

    @property
    def score(self) -> Score | None:
        """The last score on held-out examples."""
        return next((r.score for r in reversed(self.rounds) if r.score is not None), None)

    def save(self, folder: Path | str, *, merged: bool = False, about_data: str = "") -> int:
        """Write the adapter with a card; return its bytes. `merged` also writes the whole model.

        LoRA layers are then added to the model's weights, which is the end of them here.
        """
        self.facts.data, place = about_data, Path(folder)
        size = adapter.save(self.adapter, place)
        card.write(self.adapter, self.facts, place, merged=False)
        if merged:
            merge.save(self.base.loaded, self.position, place / "merged", self.facts)
        return size


def simulate(
    run: Run,
    shards: Sequence[Shard],
    *,
    model: Path | str | None = None,
    test: Shard | None = None,
    evaluate_every: int = 0,
    seed: int | None = None,
    ledger_at: Path | str | None = None,
    device: str = "auto",
    forward: Forward | None = None,
    report: Callable[[Round], None] | None = None,
    machines: Machines | None = None,
) -> Simulation:
    """Run a whole federation in this process, one virtual worker a shard, and return its end.

    `run` is a run file, its text or a RunConfig; a run.lock beside a file is used. `model` is a
    folder in place of the run's model name. Scores on `test` are taken every so many rounds and at
    the end. `seed` fixes batches and rounding, for experiments: without it they come from the
    operating system, as a worker's do. `forward` is how passes run, by default as a worker's;
    `ledger_at` keeps the ledger in a file, in which a run that was broken off goes on. `machines`
    are where workers measure, such as `lorand.Ray()`; the coordinator's part and scores stay here.

    As in every run, round 1 waits for `rounds.start_with` workers. Raises LorandError.
    """
    config = _checked(config_of(run), len(shards))
    parts = [examples_of(s, config.task, f"shard {i + 1}") for i, s in enumerate(shards)]
    for number, part in enumerate(parts, start=1):
        guard.check_examples(config, len(part), f"shard {number}")
    theirs = identity_beside(run)
    folder = None if model is None else Path(model)
    base = load_base(config, folder, device, theirs=theirs, prepares=theirs is None)
    if theirs is not None:
        guard.check_identity(base.identity, theirs)
    forward = forward or Forward(choose(Precision.AUTO, config, base.device)[0])
    scored = None
    if test is not None:
        held_out = examples_of(test, config.task, "the test data")
        scored = task_for(base, config, held_out, forward)
    with ExitStack() as stack:
        store = SqliteStore(":memory:" if ledger_at is None else ledger_at)
        stack.callback(store.close)
        crew: Crew
        if machines is None:
            crew = Group(config, base, parts, forward, seed)
        else:
            there = folder and folder.resolve()
            setup = Setup(config, base.identity, there, device, forward, parts, 1, seed, 1)
            crew = Spread(stack.enter_context(machines.places(len(parts))), setup)
        federation = _Federation(config, base, store, crew, len(parts))
        rounds = federation.run(_evaluating(config, base, scored, evaluate_every, report))
        facts = Facts()
        deque(facts.reading(store.entries()), maxlen=0)
        bring(base.replica, federation.position)
        base.replica.settle()
        crew.check(base.replica.digest())
    return Simulation(federation.position, base, rounds, facts)


def _checked(config: RunConfig, workers: int) -> RunConfig:
    """Return the config with room for so many workers. Raises ConfigError."""
    needed = max(config.rounds.quorum, config.rounds.start_with, config.rounds.participants)
    if workers < needed:
        raise ConfigError(
            f"the run waits for {needed} workers ([rounds] quorum, start_with, participants), and "
            f"there are {workers} shards: give more, or lower them"
        )
    if config.privacy.noised:
        raise ConfigError(
            "a private run is charged to budgets that outlive it, which virtual workers have none "
            "of: join it with `lr-worker join`, or simulate it without [privacy]"
        )
    room = max(workers, config.service.max_workers)
    service = config.service.model_copy(update={"max_workers": room})
    return config.model_copy(update={"service": service})


_Noted = Callable[[Position, float | None], Round]


def _evaluating(
    config: RunConfig,
    base: Base,
    scored: Task | None,
    every: int,
    report: Callable[[Round], None] | None,
) -> _Noted:
    """Return what notes a committed round, and scores the weights where that is due."""

    def note(position: Position, loss: float | None) -> Round:
        committed, score = position.committed, None
        due = committed == config.run.rounds or (every and committed % every == 0)
        if scored is not None and due:
            bring(base.replica, position)
            score = scored.score()
        made = Round(committed, loss, score)
        if report is not None:
            report(made)
        return made

    return note


@dataclass
class _Federation:
    """The coordinator's sequencer, its workers by number from 1, and what is on its way."""

    config: RunConfig
    base: Base
    store: Store
    crew: Crew
    workers: int
    on_its_way: deque[Outgoing] = field(default_factory=deque)
    now: float = 0.0
    abandoned: int = 0

    def __post_init__(self) -> None:
        """Open or begin the run, and have everyone join it."""
        identity = self.base.identity
        self.sequencer = Sequencer(self.config, self.store, identity)
        origin = ledger.origin(self.config, identity)
        for number in range(1, self.workers + 1):
            given, _ = self.sequencer.admit(hello(name_of(number), origin, identity))
            if given != number:
                raise ConfigError(
                    "the ledger is of a run over the network, with other workers: simulate with "
                    "another file"
                )
        bodies = list(self.store.entries())
        self.position = ledger.replay(bodies)
        self.crew.begin(bodies, self.position)

    def run(self, note: _Noted) -> list[Round]:
        """Carry messages until the run is finished."""
        rounds: list[Round] = []
        for number in range(1, self.workers + 1):
            self.on_its_way += self.sequencer.connect(number, self.now)
        while not self.position.finished:
            if not self.on_its_way:  # the engine waits for time to pass
                self.now += self.config.service.commit_retry_s
                self.on_its_way += self.sequencer.tick(self.now)
                self._give_up_where_nothing_comes()
                continue
            entry = self._deliver()
            if entry is not None and entry.HasField("commit"):
                self.abandoned = 0
                rounds.append(note(self.position, self.sequencer.tally.loss))
        return rounds

    def _deliver(self) -> pb.Entry | None:
        """Hand what is next over; return the entry that it is, the first time it comes."""
        starts = self._starts()
        for worker, answer in zip(starts, self.crew.answers(list(starts.items())), strict=True):
            self.on_its_way += self.sequencer.receive(worker, answer, self.now)
        if starts:
            return None
        message = self.on_its_way.popleft().message
        return self._follow(message.entry) if message.HasField("entry") else None

    def _starts(self) -> dict[int, wire.RoundStart]:
        """Take the starts of a round that are next: they come in a row."""
        starts = {}
        while self.on_its_way and self.on_its_way[0].message.HasField("round_start"):
            item = self.on_its_way.popleft()
            starts[item.worker] = item.message.round_start
        return starts

    def _follow(self, body: bytes) -> pb.Entry | None:
        """Have everyone follow an entry at once: the message for each comes right behind."""
        entry = ledger.parse(body)
        if entry.sequence < self.position.next_sequence:
            return None
        self.position = ledger.apply(self.position, body)
        self.abandoned += entry.HasField("abandon")
        self.crew.follow(body, entry, self.position)
        return entry

    def _give_up_where_nothing_comes(self) -> None:
        if self.abandoned > MOST_ABANDONED:
            raise LorandError(
                f"{self.abandoned} rounds in a row came to nothing: {self.sequencer.reason}; lower "
                "the learning rate, or look at the data"
            )
