"""Whatever happens in whatever order: the sequencer against a model of a few sets.

Hypothesis looks for the order, and shrinks what it finds to the shortest. Processes, sessions and
time are the business of the simulator beside this file; here nothing is real but engine,
sequencer and store, so that thousands of orders are cheap.
"""

import os
from contextlib import suppress
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.runs import IDENTITY, config_of, contribution, hello
from tests.unit.sequencer.room import FickleStore
from tests.unit.signed_histories import KEY

from lorand import ledger
from lorand.errors import LorandError
from lorand.ledger import Position
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.sequencer import Message, Outgoing, Sequencer
from lorand_coordinator.store import StoreUnavailable

SEQUENCES: Final = int(os.environ.get("LORAND_STATEFUL", "400"))
NAMES: Final = st.sampled_from(["a", "b", "c", "d"])
WORKERS: Final = st.integers(1, 4)
DEADLINE_S: Final = 10.0


class AnyOrder(RuleBasedStateMachine):
    """A coordinator's process, its disk and its workers.

    The model: who is connected, who joined as which number, what each said for which round, and
    which entries anybody was sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.store = FickleStore()
        self.now = 0.0
        self.connected: set[int] = set()
        self.numbers: dict[str, int] = {}
        self.said: dict[tuple[int, int], set[bytes]] = {}
        self.seen: dict[int, bytes] = {}
        self.durable: list[bytes] = []

    @initialize(quorum=st.integers(1, 3), rounds=st.integers(1, 3), each=st.integers(1, 2))
    def begin(self, quorum: int, rounds: int, each: int) -> None:
        self.config = config_of(
            run={"rounds": rounds},
            rounds={"quorum": quorum, "deadline_s": DEADLINE_S},
            service={"checkpoint_every": each, "commit_retry_s": 0.5},
            codec={"up": "sign", "down": "int8"},
        )
        self.sequencer = Sequencer(self.config, self.store, IDENTITY, key=KEY)
        self.origin = ledger.origin(self.config, IDENTITY)

    def hear(self, outgoing: list[Outgoing]) -> None:
        """Nobody is sent an entry that is not on the disk, or another than another was."""
        bodies = list(self.store.entries())
        for item in outgoing:
            if item.message.HasField("entry"):
                body = item.message.entry
                sequence = ledger.parse(body).sequence
                assert bodies[sequence : sequence + 1] == [body], "sent, and not on the disk"
                assert self.seen.setdefault(sequence, body) == body

    @property
    def position(self) -> Position:
        assert self.sequencer.position is not None
        return self.sequencer.position

    # -- workers ---------------------------------------------------------------------------------

    @rule(name=NAMES)
    def join(self, name: str) -> None:
        with suppress(StoreUnavailable):
            number, outgoing = self.sequencer.admit(hello(self.origin, name))
            assert self.numbers.setdefault(name, number) == number
            self.hear(outgoing)
            self.connected.add(number)
            self.hear(self.sequencer.connect(number, self.now))

    @precondition(lambda self: self.connected)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.connected)))
        self.connected.discard(worker)
        self.hear(self.sequencer.disconnect(worker, self.now))

    @precondition(lambda self: self.connected)
    @rule(data=st.data(), back=st.sampled_from([0, 0, 0, 0, 1, -1]), seed=st.integers(0, 3))
    def report(self, data: st.DataObject, back: int, seed: int) -> None:
        """For this round, again, for the last or the next; the same codes or others."""
        worker = data.draw(st.sampled_from(sorted(self.connected)))
        self.tell(worker, max(0, self.sequencer.engine.round_index - back), seed)

    @rule(seed=st.integers(0, 3))
    def everybody_reports(self, seed: int) -> None:
        for worker in sorted(self.connected):
            self.tell(worker, self.sequencer.engine.round_index, seed + worker)

    def tell(self, worker: int, round_index: int, seed: int) -> None:
        message = contribution(self.config, round_index, seed)
        self.said.setdefault((round_index, worker), set()).add(message.contribution.codes)
        self.hear(self.sequencer.receive(worker, message, self.now))

    @precondition(lambda self: self.connected)
    @rule(data=st.data())
    def sit_out(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.connected)))
        message = contribution(self.config, 0, 0)
        message.skip.round_index = self.sequencer.engine.round_index
        self.hear(self.sequencer.receive(worker, message, self.now))

    @rule(accuracy=st.sampled_from([0.5, 2.0]))
    def evaluate(self, accuracy: float) -> None:
        evaluation = pb.Evaluation(accuracy=accuracy, loss=1.0)
        with suppress(LorandError):
            digest = self.position.run_digest
            self.hear(self.sequencer.post_evaluation(evaluation, digest))

    # -- time, disk and process ------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.1, 1.0, DEADLINE_S + 1]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.hear(self.sequencer.tick(self.now))

    @rule(left=st.sampled_from([None, 0, 1]))
    def fill_the_disk(self, left: int | None) -> None:
        """From now on there is room for no entry, for one, or for all."""
        self.store.appends_left = left

    @rule()
    def restart(self) -> None:
        self.connected.clear()
        self.sequencer = Sequencer(self.config, self.store, None, key=KEY)

    # -- what must hold --------------------------------------------------------------------------

    @invariant()
    def all_holds(self) -> None:
        if hasattr(self, "sequencer"):
            self.history_only_grows()
            self.everybody_is_where_the_ledger_is()
            self.commits_are_what_was_said()

    def history_only_grows(self) -> None:
        bodies = list(self.store.entries())
        assert bodies[: len(self.durable)] == self.durable
        self.durable = bodies

    def everybody_is_where_the_ledger_is(self) -> None:
        end = ledger.replay(self.durable)
        assert end.history == self.position.history
        assert end.coefficients.tobytes() == self.position.coefficients.tobytes()
        signature = self.store.signature(len(self.durable) - 1)
        assert signature is not None
        assert signature.is_of(end.run_digest, end.history)

    def commits_are_what_was_said(self) -> None:
        entries = [ledger.parse(body) for body in self.durable]
        outcomes = [e for e in entries if e.WhichOneof("kind") in ("commit", "abandon")]
        assert [e.round_index for e in outcomes] == list(range(1, len(outcomes) + 1))
        for entry in outcomes:
            stored = [
                pb.StoredContribution.FromString(part)
                for part in self.store.contributions(entry.sequence)
            ]
            if entry.HasField("commit"):
                assert len(stored) >= self.config.rounds.quorum
            for part in stored:
                codes = self.said[entry.round_index, part.worker]
                assert part.contribution.codes in codes, "a commit of what nobody said"
        commits = sum(e.HasField("commit") for e in outcomes)
        assert self.position.finished == any(e.HasField("finish") for e in entries)
        assert commits <= self.config.run.rounds

    def teardown(self) -> None:
        """With room on the disk and everybody there, the run ends."""
        if not hasattr(self, "sequencer"):
            return
        self.store.appends_left = None
        for name in ("a", "b", "c"):
            self.join(name)
        for _ in range(6 * self.config.run.rounds):
            self.wait(1.0)
            self.everybody_reports(1)
            self.wait(DEADLINE_S + 1)
        assert self.position.finished, f"it waits for ever: {self.sequencer.reason}"
        self.all_holds()
        self.store.close()


def machine(count: int, steps: int) -> Any:
    """The machine as a test, so many sequences of at most so many steps."""
    case = AnyOrder.TestCase
    case.settings = settings(
        max_examples=count,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        report_multiple_bugs=False,
    )
    return case


def test_any_order_of_a_few_steps() -> None:
    machine(15, 12)().runTest()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_order_of_many_steps() -> None:
    machine(SEQUENCES, 40)().runTest()


def test_the_machine_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that is sent although the disk was full."""

    def hasty(self: Sequencer, entry: pb.Entry, parts: Any = None) -> list[Outgoing]:
        entry.sequence = len(self.store)
        body = entry.SerializeToString(deterministic=True)
        return [Outgoing(1, Message(entry=body))]

    monkeypatch.setattr(Sequencer, "_append", hasty)
    with pytest.raises(AssertionError, match="sent, and not on the disk"):
        machine(5, 12)().runTest()
