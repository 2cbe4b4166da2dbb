"""A worker's statements: whatever happens, what is stated is the truth."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.runs import config_of
from tests.unit.signed_histories import KEY, rewritten
from tests.unit.stated_runs import CONFIG, NAMES, ROSTER, Run, Worker, after_three_rounds

from lorand.errors import ConfigError, LedgerError, LorandError
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.stating import Unstated
from lorand_coordinator.verification import verify
from lorand_worker import joining, membership
from lorand_worker.joining import Joining
from lorand_worker.membership import Pinned
from lorand_worker.reporting import ConsoleReporter
from lorand_worker.stating import KEPT


@pytest.fixture(autouse=True, scope="module")
def no_power_cut() -> Iterator[None]:
    """Nobody pulls the plug here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run after three rounds of all, of which nothing is stated."""
    run = after_three_rounds(tmp_path)
    with closing(run.store):
        yield run


EVENTS: Final = st.sampled_from(["", "", "", "restart", "leap", "lose", "state", "away"])
PARTS: Final = st.sampled_from(["in", "in", "in", "late", "absent"])
ROUNDS: Final = st.lists(
    st.tuples(st.booleans(), st.tuples(*[st.tuples(PARTS, EVENTS, EVENTS)] * len(NAMES))),
    min_size=1,
    max_size=12,
)


def happen(worker: Worker, event: str, awaited: int | None) -> None:
    match event:
        case "restart" | "leap":
            worker.restart(leaps=event == "leap")
        case "lose":
            worker.lose(awaited)
        case "state":
            worker.state()
        case "away":
            worker.present = False


def play(run: Run, rounds: list[tuple[bool, tuple[tuple[str, str, str], ...]]]) -> None:
    """Have rounds happen, and at the end everybody state what it knows."""
    for index, (commits, parts) in enumerate(rounds, start=1):
        said: dict[int, pb.Contribution] = {}
        due = len(run.bodies)
        for worker, (part, before, after) in zip(run.workers, parts, strict=True):
            if not worker.present:
                worker.present = True
                worker.catch_up(leaps=before == "leap")
            happen(worker, before, None)
            if not worker.present or part == "absent":
                continue
            answered = worker.answer(index, 7 * index)
            counts = commits and part == "in"
            if counts:
                said[worker.number] = answered
            happen(worker, after, due if counts else None)
        run.end_round(index, said)
        for worker in run.workers:
            if worker.present:
                worker.catch_up(leaps=False)
    for worker in run.workers:
        worker.catch_up(leaps=True)
        worker.state()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rounds=ROUNDS, data=st.data())
def test_what_is_stated_is_what_workers_know(
    rounds: list[tuple[bool, tuple[tuple[str, str, str], ...]]], data: st.DataObject
) -> None:
    """Exactly that, after any interleaving; and whatever of it is changed is found."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        with closing(run.store):
            play(run, rounds)
            ranges = {
                (stated.worker, pb.Statement.FromString(stated.body).first, stated.sequence)
                for stated in run.store.statements()
            }
        everything = run.contributions()
        unknown = {(w.number, sequence) for w in run.workers for sequence in w.unknown}
        found = verify(run.path, KEY.public, roster=ROSTER).standing
        assert found is not None
        stated = {
            (worker, sequence)
            for worker, sequence in everything
            if any(w == worker and first <= sequence <= last for w, first, last in ranges)
        }
        assert stated == everything - unknown
        assert (found.stated, found.statements) == (len(stated), len(ranges))
        lacking = {w: sum(each.contributions for each in found.unstated if each.worker == w)
                   for w, _ in everything}  # fmt: skip
        assert lacking == {w: sum(v == w for v, _ in everything - stated) for w, _ in everything}
        assert not any("knows nothing of" in line for w in run.workers if not w.unknown
                       for line in w.told)  # fmt: skip
        forge_something(run, stated, ranges, data)


def forge_something(
    run: Run,
    stated: set[tuple[int, int]],
    ranges: set[tuple[int, int, int]],
    data: st.DataObject,
) -> None:
    """Alter, drop or invent a contribution where its worker stated what it sent."""
    everything = run.contributions()
    commits = {sequence for _, sequence in everything}
    free = {
        (worker, sequence)
        for worker, first, last in ranges
        for sequence in commits & set(range(first, last + 1))
        if (worker, sequence) not in everything
    }
    shared = {(w, s) for w, s in stated if sum(s == other for _, other in everything) > 1}
    kinds = {"alter": stated, "drop": shared, "invent": free}
    kind = data.draw(st.sampled_from([kind for kind, places in kinds.items() if places] or [""]))
    assume(kind)
    worker, at = data.draw(st.sampled_from(sorted(kinds[kind])))

    def change(entry: pb.Entry, parts: list[bytes]) -> list[bytes]:
        if entry.sequence != at:
            return parts
        others = [p for p in map(pb.StoredContribution.FromString, parts) if p.worker != worker]
        if kind != "drop":
            false = pb.Contribution(round_index=entry.round_index, codes=b"\0\0\0")
            others.append(pb.StoredContribution(worker=worker, contribution=false))
        others.sort(key=lambda part: part.worker)
        del entry.commit.workers[:]
        entry.commit.workers.extend(part.worker for part in others)
        return [part.SerializeToString(deterministic=True) for part in others]

    forged = rewritten(run.path, run.folder / "forged.ledger", KEY, change)
    verify(forged, KEY.public)
    name = NAMES[worker - 1]
    with pytest.raises(LedgerError, match=rf"worker {worker} \('{name}'\) signed other ") as caught:
        verify(forged, KEY.public, roster=ROSTER)
    places = re.findall(r"entries (\d+) to (\d+)", str(caught.value))
    assert [int(first) <= at <= int(last) for first, last in places] == [True], "one, and it"


# ------------------------------------------------------------- a worker's account


def test_an_account_that_cannot_be_read_is_a_gap(run: Run) -> None:
    one = run.workers[0]
    path = one.place.file("statements.json")
    whole = path.read_text(encoding="utf-8")
    damaged = [
        "",
        whole[:-9],
        whole.replace("statements/v1", "statements/v2"),
        whole.replace('"first": 4', '"first": 9'),
        whole.replace('"worker": 1', '"worker": 0'),
        whole.replace(one.place.run_digest.hex(), bytes(32).hex()),
    ]
    for content in damaged:
        assert content != whole
        path.write_text(content, encoding="utf-8")
        one.told.clear()
        one.open()
        assert "stay unstated" in one.told[0]
        assert one.statements.awaited_from is None
    path.unlink()
    path.mkdir()
    with pytest.raises(LorandError, match="choose another folder"):
        one.open()


def test_a_worker_signs_where_the_run_asks_and_it_has_a_key(tmp_path: Path) -> None:
    path, told = tmp_path / "a.key", ConsoleReporter(quiet=True)
    public = membership.new_key(path).public
    asks = config_of(service={"statements_every": 5})
    with_key = Joining("here:1", tmp_path, pinned=Pinned(path))
    signs = joining._signing_key(with_key, asks, told)
    assert signs is not None
    assert signs.public == public
    assert joining._signing_key(with_key, CONFIG, told) is None
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(told, "note", said.append)
        assert joining._signing_key(Joining("here:1", tmp_path), asks, told) is None
    assert "join with --identity" in said[0]
    path.unlink()
    with pytest.raises(ConfigError, match="cannot read the identity key"):
        joining._signing_key(with_key, asks, told)


def test_a_rejected_answer_is_not_stated(run: Run) -> None:
    """If one of the round is committed, it is another that the coordinator had before."""
    first, one = run.workers[0], run.workers[1]
    before = one.answer(4, 1)
    one.restart(leaps=False)
    one.answer(4, 2)
    one.statements.rejected(4)
    run.end_round(4, {1: first.answer(4, 1), 2: before})
    one.catch_up(leaps=False)
    assert "round 4 that it knows nothing of" in one.told[-1]
    one.state()
    found = verify(run.path, roster=ROSTER).standing
    assert found is not None
    assert Unstated(2, "b", 1, 4, 4) in found.unstated


def test_a_run_that_was_begun_anew_is_not_mixed_with_the_old(run: Run, tmp_path: Path) -> None:
    old = run.workers[0]
    (tmp_path / "again").mkdir()
    again = Run(tmp_path / "again")
    new = again.workers[0]
    new.place = old.place
    for index in (1, 2, 3, 4):
        said = {w.number: w.answer(index, 50 + index) for w in again.workers[1:]}
        again.end_round(index, said)
    new.restart(leaps=False)
    assert "begun anew" in new.told[-1]
    again.end_round(5, {1: new.answer(5, 1)})
    new.catch_up(leaps=False)
    new.state()
    found = verify(again.path, roster=ROSTER).standing
    again.store.close()
    assert found is not None
    assert (found.statements, found.stated) == (1, 1)


def test_workers_take_turns(run: Run) -> None:
    turns = [[w.number for w in run.workers if w.statements.due(n, 3)] for n in range(3, 9)]
    assert turns == [[3], [2], [1]] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.workers[0].statements, "_account", None)
        assert not run.workers[0].statements.due(2, 3)


def test_statements_that_nobody_takes_are_bounded(run: Run) -> None:
    """Each round the ledger has a contribution of this worker that it did not make."""
    one = run.workers[0]
    for index in range(4, 4 + 2 * KEPT + 6):
        said = one.answer(index, 1) if index % 2 else pb.Contribution(round_index=index)
        run.end_round(index, {1: said})
        one.catch_up(leaps=False)
    assert len(one.statements._unposted) == KEPT
    one.state()
    assert verify(run.path, roster=ROSTER).standing is not None
