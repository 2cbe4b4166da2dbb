"""What the round engine never does, whatever happens in whatever order (DESIGN §3).

How it goes when it goes well is told in tests/transcripts.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from lorand_coordinator import rounds
from lorand_coordinator.rounds import (
    Abandon,
    Append,
    Appended,
    AppendFailed,
    Commit,
    Effect,
    Event,
    Finish,
    Joined,
    Left,
    Phase,
    Reject,
    Reported,
    Settings,
    Skipped,
    StartRound,
    State,
    Tick,
)

DEADLINE_S: Final = 10.0
RETRY_S: Final = 5.0
SMALL: Final = Settings(2, 2, 0, DEADLINE_S, RETRY_S)
LEGAL: Final[dict[type[Effect], Phase]] = {
    StartRound: "reporting",
    Commit: "committing",
    Abandon: "committing",
    Finish: "committing",
}
"""The phase after a step that has such an effect; a rejection may come in any."""


@dataclass
class Caller:
    """Carries out what the engine asks for, as the sequencer does, and watches it."""

    settings: Settings
    state: State = field(default_factory=State)
    now: float = 0.0
    connected: set[int] = field(default_factory=set)
    under_way: Append | None = None
    retry_at: float = 0.0
    started: dict[int, set[int]] = field(default_factory=dict)
    outcomes: list[Append] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def take(self, event: Event) -> tuple[Effect, ...]:
        before = self.state
        frozen = copy.deepcopy(before)
        state, effects, reason = rounds.step(self.settings, before, event, self.now)
        self.told.append(f"{self.now:5.1f} {event} -> {effects}: {reason}")
        assert before == frozen, "step changed its argument"
        assert rounds.step(self.settings, before, event, self.now) == (state, effects, reason)
        assert reason[:1].isalpha()
        assert len(reason) > 10
        assert " -" not in reason, "a wait is not negative"
        self.check_effects(state, effects)
        self.check_outcome(before, state, event)
        self.state = state
        for effect in effects:
            self.carry_out(effect)
        self.check_state()
        return effects

    def check_effects(self, state: State, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            assert isinstance(effect, Reject) or state.phase == LEGAL[type(effect)]
        asked = [effect for effect in effects if not isinstance(effect, Reject)]
        assert len(asked) <= 1, "one thing at a time"

    def check_outcome(self, before: State, state: State, event: Event) -> None:
        """Rounds end only by an entry that became durable, one round at a time."""
        ended = isinstance(event, Appended) and not isinstance(before.pending, Finish)
        assert state.round_index == before.round_index + ended
        assert state.committed + state.abandoned == state.round_index - 1
        assert (state.phase == "finished") >= (before.phase == "finished"), "an end is an end"
        if isinstance(event, Appended):
            assert before.pending is not None
            self.outcomes.append(before.pending)
        assert state.committed == sum(isinstance(done, Commit) for done in self.outcomes)

    def carry_out(self, effect: Effect) -> None:
        match effect:
            case StartRound(round_index, workers):
                assert round_index == self.state.round_index
                assert set(workers) <= self.connected, "asked somebody who is not there"
                assert list(workers) == sorted(set(workers))
                assert self.under_way is None
                self.started.setdefault(round_index, set()).update(workers)
            case Commit() | Abandon() | Finish():
                assert self.under_way is None, "two appends at once"
                self.under_way = effect
                self.check_append(effect)

    def check_append(self, effect: Append) -> None:
        match effect:
            case Commit(round_index, contributions):
                assert round_index == self.state.round_index
                assert len(contributions) >= self.settings.quorum
                assert set(contributions) <= self.started[round_index]
            case Abandon(round_index, why):
                assert round_index == self.state.round_index
                assert len(self.state.contributions) < self.settings.quorum
                assert f"the quorum is {self.settings.quorum}" in why
            case Finish(committed):
                assert committed == self.settings.rounds == self.state.committed

    def check_state(self) -> None:
        state = self.state
        assert state.members == self.connected
        assert (state.pending is not None) == (state.phase == "committing")
        assert self.under_way is None or self.under_way == state.pending
        assert state.contributions.keys() | state.skipped <= state.participants
        assert state.participants == self.started.get(state.round_index, set())
        assert state.committed <= self.settings.rounds
        if state.phase == "reporting":
            assert self.now < state.deadline, "nobody waits past the deadline"
            assert state.deadline <= state.began + DEADLINE_S
            most = self.settings.participants or len(state.participants)
            assert len(state.participants) <= most
            assert len(state.participants) >= self.settings.quorum
        if state.phase == "selection":
            start_with = 0 if state.committed else self.settings.start_with
            needed = max(self.settings.quorum, start_with)
            resting = self.now < state.rest_until
            assert len(self.connected) < needed or resting, "nobody waits for nothing"

    # -- what can happen ---------------------------------------------------------------------

    def join(self, worker: int) -> None:
        """Connect, or connect again: the hub drops the old connection first."""
        self.leave(worker)
        self.connected.add(worker)
        self.take(Joined(worker))

    def leave(self, worker: int) -> None:
        if worker in self.connected:
            self.connected.remove(worker)
            self.take(Left(worker))

    def report(self, worker: int, lag: int, payload: bytes) -> None:
        """Report, perhaps after leaving, or for a round before or after."""
        before = self.state
        event = Reported(worker, before.round_index - lag, payload)
        effects = self.take(event)
        rejected = [effect for effect in effects if isinstance(effect, Reject)]
        taken = (
            (before.phase, lag) == ("reporting", 0)
            and worker in before.participants
            and before.contributions.get(worker, payload) == payload
        )
        duplicate = lag == 0 and before.contributions.get(worker) == payload
        assert (rejected == []) == (taken or duplicate)
        assert all((r.worker, r.round_index) == (worker, event.round_index) for r in rejected)

    def skip(self, worker: int, lag: int) -> None:
        self.take(Skipped(worker, self.state.round_index - lag, "nan"))

    def wait(self, seconds: float) -> None:
        """Let time pass; a failed append is asked for again in time, and not before."""
        self.now += seconds
        failed = self.state.pending is not None and self.under_way is None
        self.take(Tick())
        if failed:
            assert (self.under_way is not None) == (self.now >= self.retry_at)

    def answer(self, done: bool) -> None:
        """Answer the append that is under way, as the store does."""
        if self.under_way is not None:
            self.under_way, self.retry_at = None, self.now + RETRY_S
            self.take(Appended() if done else AppendFailed("disk full"))


Action = Callable[[Caller], None]
WORKERS: Final = st.integers(1, 5)
LAGS: Final = st.sampled_from([0, 0, 0, 0, 1, -1])
ACTIONS: Final[st.SearchStrategy[Action]] = st.one_of(
    st.builds(lambda w: lambda c: c.join(w), WORKERS),
    st.builds(lambda w: lambda c: c.leave(w), WORKERS),
    st.builds(
        lambda w, lag, p: lambda c: c.report(w, lag, p),
        WORKERS,
        LAGS,
        st.sampled_from([b"a", b"b"]),
    ),
    st.builds(lambda w, lag: lambda c: c.skip(w, lag), WORKERS, LAGS),
    st.builds(lambda s: lambda c: c.wait(s), st.sampled_from([0.0, 0.1, RETRY_S, DEADLINE_S])),
    st.builds(lambda done: lambda c: c.answer(done), st.sampled_from([True, True, True, False])),
)


@st.composite
def runs(draw: st.DrawFn) -> Settings:
    quorum = draw(st.integers(1, 3))
    start_with = draw(st.sampled_from([0, quorum, quorum + 2]))
    return Settings(
        draw(st.integers(1, 4)),
        quorum,
        start_with,
        DEADLINE_S,
        RETRY_S,
        deadline_k=draw(st.sampled_from([0.0, 3.0])),
        participants=draw(st.sampled_from([0, quorum, quorum + 1])),
    )


def perform(caller: Caller, actions: list[Action]) -> None:
    """Let it happen; where an invariant breaks, hypothesis shows what came before."""
    try:
        for action in actions:
            action(caller)
    except AssertionError:
        note("\n".join(caller.told))
        raise


@settings(deadline=None, max_examples=300)
@given(runs(), st.lists(ACTIONS, max_size=60))
def test_any_sequence_of_events(run: Settings, actions: list[Action]) -> None:
    perform(Caller(run), actions)


@settings(deadline=None, max_examples=100)
@given(runs(), st.lists(ACTIONS, max_size=40))
def test_from_anywhere_a_run_can_be_finished(run: Settings, actions: list[Action]) -> None:
    """Nothing that happened leaves the engine where it cannot go on."""
    caller = Caller(run)
    perform(caller, actions)
    for worker in range(1, 6):
        caller.join(worker)
    for _ in range(run.rounds + 3):  # one may be abandoned, and rests
        caller.answer(done=True)
        caller.wait(RETRY_S)
        caller.answer(done=True)
        for worker in sorted(caller.state.participants):
            caller.report(worker, 0, b"a")
    assert caller.state.phase == "finished"
    assert sum(isinstance(done, Commit) for done in caller.outcomes) == run.rounds
    assert caller.outcomes[-1] == Finish(run.rounds)


# ------------------------------------------------------------- whom, and how long


def test_a_sample_is_fair_and_follows_from_the_run_and_the_round() -> None:
    """Four of ten: everyone 400 times in 1000 rounds, within five standard deviations of 15.5."""
    room = range(1, 11)
    drawn = [rounds.sample(b"a run", 4, round_index, room) for round_index in range(1000)]
    assert all(len(set(one)) == 4 for one in drawn)
    for worker in room:
        assert abs(sum(worker in one for one in drawn) - 400) < 78
    assert [rounds.sample(b"another", 4, r, room) for r in range(1000)] != drawn


@settings(deadline=None, max_examples=60)
@given(st.sets(st.integers(1, 99), min_size=5), st.integers(1, 9))
def test_who_leaves_changes_a_sample_by_one(room: set[int], count: int) -> None:
    before = rounds.sample(b"", count, 1, room)
    gone = before[0]
    after = rounds.sample(b"", count, 1, room - {gone})
    assert set(before) - {gone} <= set(after)


SECONDS: Final = st.floats(0.0, DEADLINE_S)


@settings(deadline=None, max_examples=100)
@given(st.lists(SECONDS, min_size=8, max_size=64), st.floats(0.5, 10), st.data())
def test_a_minority_does_not_choose_the_deadline(
    took: list[float], k: float, data: st.DataObject
) -> None:
    """However fast or slow it answers, it stays between what honest answers alone could give."""
    patient = replace(SMALL, deadline_k=k)
    honest = took[len(took) // 3 :]
    liars = data.draw(st.lists(SECONDS, min_size=len(took) // 3, max_size=len(took) // 3))
    found = rounds._patience(patient, State(answers=(*liars, *honest)))
    shortest = max(2 * min(honest), rounds.SHORTEST_DEADLINE_S)
    longest = max(honest) + k * (max(honest) - min(honest))
    longest = max(longest, 2 * max(honest), rounds.SHORTEST_DEADLINE_S)
    assert min(shortest, DEADLINE_S) <= found + 1e-9
    assert found <= min(longest, DEADLINE_S) + 1e-9


def test_a_deadline_of_seven_answers_or_of_no_k_is_the_runs() -> None:
    assert rounds._patience(replace(SMALL, deadline_k=3.0), State(answers=(0.1,) * 7)) == DEADLINE_S
    assert rounds._patience(SMALL, State(answers=(0.1,) * 64)) == DEADLINE_S


# ------------------------------------------------------------- what callers rely on


def committing() -> State:
    caller = Caller(SMALL)
    for worker in (1, 2):
        caller.join(worker)
    for worker in (1, 2):
        caller.report(worker, 0, b"a")
    assert caller.state.phase == "committing"
    return caller.state


def test_an_append_is_repeated_unchanged() -> None:
    """To the contributions: what was said to have failed may have been done."""
    state = committing()
    state, _, reason = rounds.step(SMALL, state, AppendFailed("disk full"), 1.0)
    assert reason == "the ledger cannot be written (disk full); trying again in 5 s"
    state, effects, _ = rounds.step(SMALL, state, Reported(1, 1, b"b"), 5.9)
    assert [type(effect) for effect in effects] == [Reject]
    state, effects, _ = rounds.step(SMALL, state, Tick(), 6.0)
    assert effects == (state.pending,) == (Commit(1, {1: b"a", 2: b"a"}),)
    assert rounds.step(SMALL, state, Tick(), 99.0)[1] == (), "once a failure, not once a tick"


@pytest.mark.parametrize("event", [Appended(), AppendFailed("disk full")])
def test_an_answer_nobody_asked_for_is_the_callers_mistake(event: Event) -> None:
    with pytest.raises(AssertionError, match="nobody asked for"):
        rounds.step(SMALL, State(), event, 0.0)


def test_a_restarted_engine_ends_a_run_that_lacks_only_its_end() -> None:
    """A crash came between the last commit and the finish entry."""
    state = State(round_index=3, committed=2)
    _, effects, _ = rounds.step(SMALL, state, Tick(), 0.0)
    assert effects == (Finish(2),)


def test_states_compare_by_value() -> None:
    """So that one can tell whether two engines are at the same point."""
    assert committing() == committing()
    assert replace(committing(), round_index=9) != committing()
