"""The round engine: `step(settings, state, event, now) -> (state, effects, reason)`, and no more.

A round passes selection → configuration → reporting, and is committed or abandoned (Bonawitz et
al., "Towards federated learning at scale", MLSys 2019). The engine does no I/O and reads no clock:
it is told what happened and when, and answers with what is to be done, as data, and with a
sentence that says why it is where it is.

A deadline may follow how long answers took, and a round may ask only some of those who are there.

Obligations of the caller: carry out effects in order; answer `Commit`, `Abandon` and `Finish` with
`Appended` once the entry is durable (or `AppendFailed`), before any worker sees the outcome; send
`Tick` a few times a second.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from statistics import median
from typing import Final, Literal

from lorand.config import RunConfig

Phase = Literal["selection", "reporting", "committing", "finished"]

ANSWERS_KEPT: Final = 64
FEWEST_ANSWERS: Final = 8
"""An adaptive deadline follows the last answers, and none below so many."""
SHORTEST_DEADLINE_S: Final = 1.0


@dataclass(frozen=True)
class Settings:
    """What the engine knows of a run."""

    rounds: int
    quorum: int
    start_with: int
    deadline_s: float
    commit_retry_s: float
    all_or_nothing: bool = False
    """Whether a round commits with all participants or not at all (secure sums)."""
    deadline_k: float = 0.0
    """Median deviations above the median answer at which the deadline is; 0: at deadline_s."""
    participants: int = 0
    """How many of the members a round asks; 0: all."""
    sampling_key: bytes = b""

    @staticmethod
    def of(config: RunConfig, *, all_or_nothing: bool = False) -> "Settings":
        """Return those of a run file."""
        section = config.rounds
        return Settings(
            rounds=config.run.rounds,
            quorum=section.quorum,
            start_with=section.start_with,
            deadline_s=section.deadline_s,
            commit_retry_s=config.service.commit_retry_s,
            all_or_nothing=all_or_nothing,
            deadline_k=section.deadline_k,
            participants=section.participants,
            sampling_key=config.digest(),
        )


@dataclass(frozen=True)
class Joined:
    """A worker is connected and has every entry so far."""

    worker: int


@dataclass(frozen=True)
class Left:
    """A worker's connection ended."""

    worker: int


@dataclass(frozen=True)
class Reported:
    """A worker's contribution of the right length; `payload` is only compared here."""

    worker: int
    round_index: int
    payload: bytes


@dataclass(frozen=True)
class Skipped:
    """A worker sits a round out."""

    worker: int
    round_index: int
    why: str


@dataclass(frozen=True)
class Quarantined:
    """Rounds from the next one on are made without these workers, connected or not."""

    workers: frozenset[int]


@dataclass(frozen=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True)
class Appended:
    """The entry that the last Commit, Abandon or Finish asked for is durable."""


@dataclass(frozen=True)
class AppendFailed:
    """It is not; nothing was shown to anyone."""

    why: str


@dataclass(frozen=True)
class Unsound:
    """What the last Commit asked for cannot be made of these contributions, now or later."""

    why: str


Event = Joined | Left | Reported | Skipped | Quarantined | Tick | Appended | AppendFailed | Unsound


@dataclass(frozen=True)
class StartRound:
    """Ask these workers to measure."""

    round_index: int
    workers: tuple[int, ...]


@dataclass(frozen=True)
class Commit:
    """Aggregate these contributions and append the commit entry."""

    round_index: int
    contributions: Mapping[int, bytes]


@dataclass(frozen=True)
class Abandon:
    """Append the entry that gives this round up."""

    round_index: int
    why: str


@dataclass(frozen=True)
class Reject:
    """Tell a worker that its message was not taken."""

    worker: int
    round_index: int
    why: str


@dataclass(frozen=True)
class Finish:
    """Append the entry that ends the run."""

    committed: int


Effect = StartRound | Commit | Abandon | Reject | Finish
Append = Commit | Abandon | Finish


@dataclass(frozen=True)
class State:
    """Everything the engine knows. `pending` is the append that is under way or failed.

    Of `late`, who cost an all-or-nothing round and was not heard of since, no round is made again.
    `answers` are the seconds that the last ones took, for an adaptive deadline; of who had not
    answered when its round ended it is how long it was waited for.
    """

    phase: Phase = "selection"
    round_index: int = 1
    committed: int = 0
    abandoned: int = 0
    members: frozenset[int] = frozenset()
    participants: frozenset[int] = frozenset()
    contributions: Mapping[int, bytes] = field(default_factory=dict)
    skipped: frozenset[int] = frozenset()
    late: frozenset[int] = frozenset()
    quarantined: frozenset[int] = frozenset()
    began: float = 0.0
    deadline: float = 0.0
    answers: tuple[float, ...] = ()
    pending: Append | None = None
    retry_at: float | None = None
    rest_until: float = 0.0
    trouble: str = ""

    @property
    def ready(self) -> frozenset[int]:
        """Whom the next round may ask."""
        return self.members - self.late - self.quarantined

    @property
    def awaited(self) -> int:
        """Number of participants of whom nothing was heard; counted, since each report asks."""
        return len(self.participants) - len(self.skipped) - len(self.contributions)

    def awaits(self, worker: int) -> bool:
        """Return whether nothing was heard of a participant."""
        answered = worker in self.contributions or worker in self.skipped
        return worker in self.participants and not answered


Outcome = tuple[State, tuple[Effect, ...], str]


def step(settings: Settings, state: State, event: Event, now: float) -> Outcome:
    """Return the next state, what to do, and why the round is where it is."""
    state, effects = _take(settings, state, event, now)
    state, more = _advance(settings, state, now)
    return state, effects + more, reason(settings, state, now)


def _take(
    settings: Settings, state: State, event: Event, now: float
) -> tuple[State, tuple[Effect, ...]]:
    """Note what happened, without deciding about the round."""
    match event:
        case Joined(worker):
            state = replace(state, members=state.members | {worker}, late=state.late - {worker})
            if state.phase == "reporting" and state.awaits(worker):
                return state, (StartRound(state.round_index, (worker,)),)
        case Left(worker):
            state = replace(state, members=state.members - {worker})
        case Reported(worker):
            return _report(replace(state, late=state.late - {worker}), event, now)
        case Skipped(worker, round_index):
            state = replace(state, late=state.late - {worker})
            now_asked = (state.phase, state.round_index) == ("reporting", round_index)
            if now_asked and state.awaits(worker):
                state = replace(state, skipped=state.skipped | {worker})
        case Quarantined(workers):
            state = replace(state, quarantined=state.quarantined | workers)
        case Appended():
            return _appended(settings, state, now), ()
        case AppendFailed(why):
            assert state.pending is not None, "an append failed that nobody asked for"
            state = replace(state, retry_at=now + settings.commit_retry_s, trouble=why)
        case Unsound(why):
            return _append(state, Abandon(state.round_index, why))
        case Tick():
            pass
    return state, ()


def _report(state: State, event: Reported, now: float) -> tuple[State, tuple[Effect, ...]]:
    worker, round_index = event.worker, event.round_index
    why = ""
    if round_index != state.round_index or state.phase != "reporting":
        if state.contributions.get(worker) == event.payload and round_index == state.round_index:
            return state, ()  # a duplicate of what is being committed
        why = f"round {round_index} takes no contributions: {_present(state)}"
    elif worker not in state.participants:
        why = f"worker {worker} is not a participant of round {round_index}"
    elif worker in state.contributions:
        if state.contributions[worker] == event.payload:
            return state, ()  # delivered twice
        why = f"worker {worker} already reported other scalars for round {round_index}"
    if why:
        return state, (Reject(worker, round_index, why),)
    state = _after_answers(state, [now - state.began])
    contributions = {**state.contributions, worker: event.payload}
    return replace(state, contributions=contributions, skipped=state.skipped - {worker}), ()


def _after_answers(state: State, took: list[float]) -> State:
    return replace(state, answers=(*state.answers, *took)[-ANSWERS_KEPT:])


def _present(state: State) -> str:
    if state.phase == "finished":
        return "the run is finished"
    progress = {"selection": "has not begun", "reporting": "is under way", "committing": "is over"}
    return f"round {state.round_index} {progress[state.phase]}"


def _appended(settings: Settings, state: State, now: float) -> State:
    done = state.pending
    assert done is not None, "an append succeeded that nobody asked for"
    state = replace(state, pending=None, retry_at=None, trouble="")
    if isinstance(done, Finish):
        return replace(state, phase="finished")
    # Workers that all sit out at once would else fill the ledger with abandoned rounds.
    rest_until = now + settings.commit_retry_s if isinstance(done, Abandon) else 0.0
    return replace(
        state,
        phase="selection",
        rest_until=rest_until,
        round_index=state.round_index + 1,
        committed=state.committed + isinstance(done, Commit),
        abandoned=state.abandoned + isinstance(done, Abandon),
        participants=frozenset(),
        contributions={},
        skipped=frozenset(),
    )


def _advance(settings: Settings, state: State, now: float) -> tuple[State, tuple[Effect, ...]]:
    """Decide whether the phase ends now."""
    if state.phase == "committing":
        if state.retry_at is not None and now >= state.retry_at:
            assert state.pending is not None
            return replace(state, retry_at=None), (state.pending,)
        return state, ()
    if state.phase == "selection":
        if state.committed >= settings.rounds:
            return _append(state, Finish(state.committed))
        if _missing(settings, state) <= 0 and now >= state.rest_until:
            chosen = sample(
                settings.sampling_key, settings.participants, state.round_index, state.ready
            )
            state = replace(
                state,
                phase="reporting",
                participants=frozenset(chosen),
                began=now,
                deadline=now + _patience(settings, state),
            )
            return state, (StartRound(state.round_index, tuple(sorted(chosen))),)
    if state.phase == "reporting":
        return _judge(settings, state, now)
    return state, ()


def sample(key: bytes, count: int, round_index: int, present: Iterable[int]) -> list[int]:
    """Return a round's participants: those of the smallest digests, so that anyone can draw them.

    All with a count of 0. Rendezvous hashing (Thaler and Ravishankar, 1998): a sample without
    replacement that stays what it was, but for one, when one worker comes or goes.
    """

    def lot(worker: int) -> bytes:
        place = round_index.to_bytes(4, "little") + worker.to_bytes(4, "little")
        return sha256(b"lorand/sample/v1" + key + place).digest()

    return sorted(present, key=lot)[: count or None]


def _patience(settings: Settings, state: State) -> float:
    """Return how long a round is waited for, in seconds: median + k · MAD of the last answers.

    Never below twice the median: where answers take equally long the deviation is none, and most
    would come too late. Waits that ended without an answer are among the answers, so that the
    deadline does not follow those alone who meet it; a round without a quorum forgets them all.
    """
    if settings.deadline_k == 0 or len(state.answers) < FEWEST_ANSWERS:
        return settings.deadline_s
    typical = median(state.answers)
    deviation = median(abs(took - typical) for took in state.answers)
    wanted = max(typical + settings.deadline_k * deviation, 2 * typical, SHORTEST_DEADLINE_S)
    return min(settings.deadline_s, wanted)


def _judge(settings: Settings, state: State, now: float) -> tuple[State, tuple[Effect, ...]]:
    """Commit when everyone answered or the deadline passed with a quorum; else wait or abandon."""
    reported = len(state.contributions)
    late = now >= state.deadline
    if late:
        state = _after_deadline(settings, state)
    if settings.all_or_nothing:
        return _judge_whole(state, late)
    if reported >= settings.quorum and (late or not state.awaited):
        return _append(state, Commit(state.round_index, state.contributions))
    if late or reported + state.awaited < settings.quorum:
        why = (
            f"{reported} of {len(state.participants)} participants reported, "
            f"the quorum is {settings.quorum}"
        )
        if state.skipped:
            why += f"; {len(state.skipped)} sat the round out"
        return _append(state, Abandon(state.round_index, why))
    return state, ()


def _after_deadline(settings: Settings, state: State) -> State:
    if len(state.contributions) < settings.quorum:
        return replace(state, answers=())
    unanswered = sum(state.awaits(worker) for worker in state.members)
    return _after_answers(state, [state.deadline - state.began] * unanswered)


def _judge_whole(state: State, late: bool) -> tuple[State, tuple[Effect, ...]]:
    """Commit when everyone answered; give up when somebody will not, or did not in time."""
    if len(state.contributions) == len(state.participants):
        return _append(state, Commit(state.round_index, state.contributions))
    missing = state.participants - state.contributions.keys()
    gone = missing & state.skipped | missing - state.members
    if late or gone:
        who = ", ".join(map(str, sorted(gone or missing)))
        why = f"the sum of {len(state.participants)} participants is nothing without worker {who}"
        if late:
            state = replace(state, late=state.late | missing - state.skipped)
        return _append(state, Abandon(state.round_index, why))
    return state, ()


def _append(state: State, entry: Append) -> tuple[State, tuple[Effect, ...]]:
    return replace(state, phase="committing", pending=entry), (entry,)


def _missing(settings: Settings, state: State) -> int:
    """Return how many workers more a round may begin with; who is late counts for start_with."""
    first = settings.start_with if state.committed == 0 else 0
    return max(first - len(state.members), settings.quorum - len(state.ready))


def reason(settings: Settings, state: State, now: float) -> str:
    """Return a sentence that says why the engine is where it is."""
    if state.phase == "finished":
        are = "rounds are" if state.committed != 1 else "round is"
        return f"finished: {state.committed} {are} committed"
    if state.phase == "committing":
        if state.trouble:
            wait = max(0.0, (now if state.retry_at is None else state.retry_at) - now)
            again = f"in {wait:.0f} s" if wait else "now"
            return f"the ledger cannot be written ({state.trouble}); trying again {again}"
        if isinstance(state.pending, Finish):
            return "ending the run"
        doing = "abandoning" if isinstance(state.pending, Abandon) else "committing"
        return f"{doing} round {state.round_index}"
    if state.phase == "selection":
        missing = _missing(settings, state)
        if missing <= 0:
            wait = max(0.0, state.rest_until - now)
            return f"resting after an abandoned round, for {wait:.0f} s"
        apart = len(state.members & state.quarantined)
        beside = f", beside {apart} in quarantine" if apart else ""
        return f"waiting for {missing} more worker{'s' * (missing != 1)} to join{beside}"
    return (
        f"waiting for {state.awaited} of {len(state.participants)} participants, "
        f"deadline in {max(0.0, state.deadline - now):.0f} s"
    )
