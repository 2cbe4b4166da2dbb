"""Whom the run's contributions give away, whom they do not, and that a restart finds the same."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import pytest
from tests.runs import IDENTITY, config_of
from tests.unit.sequencer.room import Room, assert_same, rejections

from lorand import codec, ledger
from lorand.codec import Codes, Floats
from lorand.config import RunConfig
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import conduct
from lorand_coordinator.aggregation import Report
from lorand_coordinator.conduct import Conduct

SCALE: Final = -5
SIGNAL: Final = 0.5
"""Of unit noise: the mean cosine of two participants' scalars is about 0.2."""

Liar = Callable[[Floats, Floats], Floats]
"""(own scalars, those of worker 2 in the round before) → what it says."""
LIARS: Final[dict[str, tuple[Liar, str]]] = {
    "flip": (lambda own, before: -own, "point away from the auditor's"),
    "loud": (lambda own, before: 100 * own, "over 3 times the typical size"),
    "copy": (lambda own, before: before, "were copies of others"),
}


def honestly(own: Floats, before: Floats) -> Floats:
    return own


def watched(**changes: Any) -> RunConfig:
    service = {"quarantine": True, **changes.pop("service", {})}
    estimator = {"directions_per_round": 16}
    return config_of(service=service, estimator=estimator, rounds={"quorum": 3}, **changes)


def lived(
    config: RunConfig,
    liars: Mapping[int, Liar],
    *,
    rounds: int = 40,
    workers: int = 10,
    auditor: int = 0,
    signal: float = SIGNAL,
) -> Conduct:
    """The conduct after some rounds."""
    rng, found = np.random.default_rng(0), Conduct()
    before = np.zeros(16)
    for _ in range(rounds):
        gradient = rng.normal(0, signal, 16)
        rows = gradient + rng.normal(0, 1, (workers, 16))
        told = {w: liars.get(w, honestly)(row, before) for w, row in enumerate(rows, 1)}
        before = told[2]
        reports = {w: Report(coded(config, values)) for w, values in told.items()}
        found = conduct.after(config, found, SCALE, reports, auditor)
    return found


def coded(config: RunConfig, values: Floats) -> Codes:
    return codec.encode(config.codec.up, values, SCALE)


@pytest.mark.parametrize("name", LIARS)
def test_a_liar_is_sent_away_with_its_reason(name: str) -> None:
    """Each kind by its own sign, and nobody else with it."""
    liar, why = LIARS[name]
    found = lived(watched(), {4: liar, 7: liar}, rounds=100, auditor=1)
    assert set(found.reasons) == {4, 7}
    assert all(why in reason for reason in found.reasons.values())


def test_nobody_is_judged_by_a_few_rounds() -> None:
    liar, _ = LIARS["loud"]
    assert not lived(watched(), {4: liar}, rounds=conduct.FEWEST_ROUNDS - 1).reasons
    assert lived(watched(), {4: liar}, rounds=conduct.FEWEST_ROUNDS).reasons


@pytest.mark.parametrize("up", ["int8", "sign"])
@pytest.mark.parametrize("signal", [0.0, SIGNAL, 3.0])
def test_the_honest_stay(up: str, signal: float) -> None:
    """Where there is nothing but noise, and where all measure nearly the same."""
    config = watched(codec={"up": up})
    assert lived(config, {}, rounds=100, signal=signal, auditor=1).reasons == {}


def test_of_two_that_say_the_same_one_stays() -> None:
    """One vote for one set of numbers: the first to enrol has it. Few bytes may be alike."""
    config = watched()
    rng = np.random.default_rng(0)
    found = few = Conduct()
    for _ in range(30):
        rows = [coded(config, rng.normal(0, 1, 16)) for _ in range(4)]
        reports = {w: Report(codes) for w, codes in enumerate([*rows, rows[1]], 1)}
        found = conduct.after(config, found, SCALE, reports)
        few = conduct.after(
            config, few, SCALE, {w: Report(r.codes[:7]) for w, r in reports.items()}
        )
    assert set(found.reasons) == {5}
    assert not few.reasons


def test_less_than_half_are_sent_away() -> None:
    """Where most stand out nobody can tell who lies: four of nine."""
    loud, _ = LIARS["loud"]
    copy, _ = LIARS["copy"]
    found = lived(watched(), {w: loud if w < 4 else copy for w in (1, 3, 4, 5, 6, 7, 8)}, workers=9)
    assert len(found.reasons) == 4


def test_an_auditor_is_believed_against_the_others() -> None:
    """Six of ten flip, and less than half are sent away; without an auditor nobody is."""
    flippers = dict.fromkeys(range(5, 11), LIARS["flip"][0])
    config = watched(service={"auditor": "us"})
    found = lived(config, flippers, rounds=200, auditor=1)
    assert set(found.reasons) < set(flippers)
    assert len(found.reasons) == 4
    assert not lived(config, flippers, rounds=200).reasons


def test_who_points_away_from_the_auditor_is_not_counted_from_the_start() -> None:
    """Long before it is sent away; without an auditor nobody is doubted."""
    flippers = dict.fromkeys((4, 7), LIARS["flip"][0])
    early = lived(watched(), flippers, rounds=conduct.FEWEST_ROUNDS - 1, auditor=1)
    assert not early.reasons
    assert early.doubted >= {4, 7}
    late = lived(watched(), flippers, rounds=100, auditor=1)
    assert late.doubted == {4, 7} == set(late.reasons)
    assert not lived(watched(), flippers).doubted


# ------------------------------------------------------------- in a run


def report(config: RunConfig, round_index: int, worker: int) -> wire.ParticipateRequest:
    """Worker 3 shouts."""
    rng = np.random.default_rng([round_index, worker])
    codes = np.rint(rng.normal(0, 10, 16)).astype(np.int64)
    if worker == 3:
        codes = np.where(codes < 0, -127, 127)
    packed = codec.pack(config.codec.up, codes)
    return wire.ParticipateRequest(
        contribution=pb.Contribution(round_index=round_index, codes=packed)
    )


ROUNDS: Final[dict[str, Any]] = {
    "run": {"rounds": 40},
    "estimator": {"directions_per_round": 16},
    "rounds": {"quorum": 3},
}


def audited() -> RunConfig:
    """A run of which worker 1 is the auditor; its rounds are restarted from a checkpoint."""
    return watched(run={"rounds": 40}, service={"auditor": "us", "checkpoint_every": 5})


def along(
    config: RunConfig, round_index: int, worker: int, liars: tuple[int, ...] = (3,)
) -> wire.ParticipateRequest:
    """All measure nearly the same, and liars say the contrary."""
    rng = np.random.default_rng([round_index, worker])
    values = np.random.default_rng(round_index).normal(0, 20, 16) + rng.normal(0, 2, 16)
    codes = np.rint(-values if worker in liars else values).astype(np.int64)
    packed = codec.pack(config.codec.up, np.clip(codes, -127, 127))
    return wire.ParticipateRequest(
        contribution=pb.Contribution(round_index=round_index, codes=packed)
    )


def live(room: Room, rounds: int) -> list[str]:
    """Let everyone who is asked report; return what worker 3 was told."""
    told = []
    for _ in range(rounds):
        engine = room.sequencer.engine
        for worker in sorted(engine.participants):
            sent = room.send(worker, report(room.config, engine.round_index, worker))
            told += rejections([item for item in sent if item.worker == 3])
    return told


def test_a_run_goes_on_without_a_worker_and_says_why() -> None:
    room = Room(watched(run={"rounds": 40}, service={"checkpoint_every": 5}))
    for name in ("a", "b", "c", "d"):
        room.join(name)
    told = live(room, 30)
    (finding,) = [f for f in room.sequencer.findings() if "quarantine" in f.kind]
    assert "worker 3 (c) in quarantine: its scalars were over 3 times" in finding.text
    assert finding.warning
    assert len(told) == 1
    assert told[0] in finding.text
    assert room.sequencer.tally.accounts[3].contributions == conduct.FEWEST_ROUNDS
    assert room.sequencer.engine.participants == {1, 2, 4}
    entries = len(room.store)
    assert sum(m.HasField("entry") for m in room.sent[3]) == entries - 4, "it follows the run"
    again = room.restart()
    assert again.engine.quarantined == {3}
    assert again.findings() == room.sequencer.findings()
    assert rejections(again.connect(3, 0.0)) == told


def test_a_commit_names_whom_it_does_not_count_and_repeats_without_a_watch() -> None:
    """Its codes are those of a run that never heard of worker 3; what that said is kept."""
    room = Room(audited(), IDENTITY)
    others = Room(config_of(**ROUNDS), IDENTITY)
    for name in ("us", "b", "c", "d"):
        room.join(name)
        others.join(name)
    for _ in range(12):
        engine = room.sequencer.engine
        for worker in sorted(engine.participants):
            request = along(room.config, engine.round_index, worker)
            room.send(worker, request)
            if worker == 3 and engine.committed:
                skip = wire.Skip(round_index=engine.round_index, reason="none")
                request = wire.ParticipateRequest(skip=skip)
            others.send(worker, request)
    commits = [ledger.parse(body).commit for body in room.store.entries()]
    first, *rest = [commit for commit in commits if commit.workers]
    assert (list(first.workers), list(first.uncounted)) == ([1, 2, 3], [])
    assert len(rest) == 11
    assert all((list(c.workers), list(c.uncounted)) == ([1, 2, 3, 4], [3]) for c in rest)
    assert (room.position.coefficients == others.position.coefficients).all()
    (finding,) = [f for f in room.sequencer.findings() if f.kind == "not counted 3"]
    assert "worker 3 (c) is not counted for now: its scalars point away" in finding.text
    again = room.restart()
    assert_same(again, room.sequencer)
    assert again.findings() == room.sequencer.findings()
    room.config = config_of(**ROUNDS)
    assert_same(room.restart(), room.sequencer)


def test_a_round_that_nobody_counts_in_is_given_up() -> None:
    """The auditor is away, and everybody pointed away from it before."""
    room = Room(audited(), IDENTITY)
    for name in ("us", "b", "c", "d"):
        room.join(name)
    for _ in range(3):
        round_index = room.sequencer.engine.round_index
        for worker in (1, 2, 3, 4):
            room.send(worker, along(room.config, round_index, worker, liars=(2, 3, 4)))
    room.leave(1)
    round_index = room.sequencer.engine.round_index
    for worker in (2, 3, 4):
        room.send(worker, along(room.config, round_index, worker, liars=(2, 3, 4)))
    room.wait(room.config.rounds.deadline_s)
    last = ledger.parse(list(room.store.entries())[-1])
    assert "point away from the auditor's, and it sent none" in last.abandon.reason
    assert room.sequencer.engine.committed == 3


def test_an_operator_lifts_quarantine_by_a_restart_without_it() -> None:
    """It is no part of the run's identity: the ledger is the same run's."""
    room = Room(watched(run={"rounds": 40}))
    for name in ("a", "b", "c", "d"):
        room.join(name)
    live(room, 25)
    assert room.sequencer.engine.quarantined == {3}
    room.config = config_of(
        run={"rounds": 40}, estimator={"directions_per_round": 16}, rounds={"quorum": 3}
    )
    again = room.restart()
    assert again.engine.quarantined == frozenset()
    assert again.position is not None
    assert again.position.head == room.position.head
