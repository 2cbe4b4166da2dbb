"""The ledger's logic: what follows what, replay, and the portable file (DESIGN §4)."""

import hashlib
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runs import IDENTITY, OTHER_IDENTITY, config_of, history

from lorand import ledger
from lorand.codec import Codec
from lorand.errors import LedgerError, LorandError
from lorand.ledger import Position
from lorand.v1 import ledger_pb2 as pb

CONFIG: Final = config_of()
BODIES: Final = history(CONFIG, rounds=7)
ORIGIN: Final = ledger.origin(CONFIG, IDENTITY)
COMMIT: Final = 3
"""The sequence of the first commit: after the start and two members."""


def upto(sequence: int) -> Position:
    return ledger.replay(BODIES[:sequence])


def changed(change: Callable[[pb.Entry], None], sequence: int = COMMIT) -> bytes:
    entry = ledger.parse(BODIES[sequence])
    change(entry)
    return entry.SerializeToString(deterministic=True)


# ------------------------------------------------------------- the hash chain


def test_a_digest_is_the_formula() -> None:
    """SHA-256("lorand/entry/v1" ‖ digest of the entry before ‖ body), from 32 zero bytes."""
    first = hashlib.sha256(b"lorand/entry/v1" + bytes(32) + BODIES[0]).digest()
    second = hashlib.sha256(b"lorand/entry/v1" + first + BODIES[1]).digest()
    assert upto(1).head == first
    assert upto(2).head == second


def test_the_head_depends_on_the_whole_history() -> None:
    reason = ledger.parse(BODIES[5]).abandon.reason
    edited = changed(lambda entry: entry.abandon.CopyFrom(pb.Abandon(reason=reason + "!")), 5)
    other = ledger.replay([*BODIES[:5], edited, *BODIES[6:]])
    whole = ledger.replay(BODIES)
    assert other.coefficients.tolist() == whole.coefficients.tolist()
    assert other.head != whole.head


# ------------------------------------------------------------- replay


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["shared", "own"]),
    st.sampled_from(["int8", "sign", "int32"]),
    st.integers(0, 8),
    st.sets(st.integers(1, 9), min_size=2, max_size=3),
)
def test_replay_is_entry_after_entry(
    mode: str, down: Codec, rounds: int, workers: set[int]
) -> None:
    """Wherever a reader stops and goes on, it comes to the same place."""
    config = config_of(directions={"mode": mode}, codec={"down": down})
    bodies = history(config, rounds, sorted(workers))
    whole = ledger.replay(bodies)
    position = ledger.origin(config, IDENTITY)
    for body in bodies:
        position = ledger.apply(position, body)
    assert position.coefficients.tolist() == whole.coefficients.tolist()
    assert (position.next_sequence, position.head, position.committed) == (
        len(bodies),
        whole.head,
        rounds - rounds // 3,
    )


def test_a_commit_moves_what_it_lists_and_no_more() -> None:
    before, after = upto(COMMIT), upto(COMMIT + 1)
    commit = ledger.parse(BODIES[COMMIT]).commit
    moved = after.coefficients - before.coefficients
    expected = np.zeros(64, np.int64)
    codes = np.frombuffer(commit.codes, np.int8).astype(np.int64)
    expected[before.draws.of(1, 0)] = codes * np.int64(commit.scale)
    assert moved.tolist() == expected.tolist()
    assert moved.any()
    assert not before.coefficients.any()


def test_applying_does_not_change_the_position_before() -> None:
    """A position is a value: others may hold it."""
    before = upto(COMMIT)
    ledger.apply(before, BODIES[COMMIT])
    assert not before.coefficients.any()
    assert before.next_sequence == COMMIT


def test_only_finish_finishes() -> None:
    whole = ledger.replay(BODIES)
    finish = pb.Entry(sequence=len(BODIES), finish=pb.Finish(committed=whole.committed))
    finished = ledger.apply(whole, finish.SerializeToString())
    evaluation = pb.Entry(sequence=len(BODIES) + 1, evaluation=pb.Evaluation(accuracy=0.5))
    assert not whole.finished
    assert finished.finished
    assert ledger.apply(finished, evaluation.SerializeToString()).finished


def test_the_start_entry_tells_the_run() -> None:
    """All a reader needs to replay is in the ledger itself."""
    start = ledger.origin_of(BODIES[0])
    assert start.config.canonical() == CONFIG.canonical()
    assert start.identity == IDENTITY
    assert start.run_digest == ORIGIN.run_digest


# ------------------------------------------------------------- what does not follow


def test_entries_out_of_order_are_refused() -> None:
    for body in (BODIES[COMMIT - 1], BODIES[COMMIT + 1]):
        with pytest.raises(LedgerError, match=f"came where entry {COMMIT} was due"):
            ledger.apply(upto(COMMIT), body)


def test_another_run_is_refused() -> None:
    for origin in (
        ledger.origin(config_of(run={"name": "other"}), IDENTITY),
        ledger.origin(CONFIG, OTHER_IDENTITY),
    ):
        assert origin.run_digest != ORIGIN.run_digest
        with pytest.raises(LedgerError, match="the start entry is of another run"):
            ledger.apply(origin, BODIES[0])


def test_a_second_start_is_refused() -> None:
    again = changed(lambda entry: setattr(entry, "sequence", COMMIT), 0)
    with pytest.raises(LedgerError, match="one start entry, its first"):
        ledger.apply(upto(COMMIT), again)


def test_a_history_begins_with_start() -> None:
    headless = changed(lambda entry: setattr(entry, "sequence", 0), 1)
    with pytest.raises(LedgerError, match="one start entry, its first"):
        ledger.apply(ORIGIN, headless)
    for bodies in ([headless], BODIES[1:]):
        with pytest.raises(LedgerError, match="does not begin with a start entry"):
            ledger.replay(bodies)
    with pytest.raises(LedgerError, match="the ledger is empty"):
        ledger.replay([])


def test_a_config_of_another_version_is_refused() -> None:
    """Text that reads but is not canonical here would have another digest."""
    older = changed(
        lambda entry: setattr(entry.start, "config", entry.start.config.replace(":", ": ")), 0
    )
    with pytest.raises(LedgerError, match="another version of LoRand"):
        ledger.replay([older])


@pytest.mark.parametrize("workers", [[2, 1], [1, 1], []], ids=["unsorted", "twice", "nobody"])
def test_a_commit_lists_its_workers_in_order(workers: list[int]) -> None:
    def change(entry: pb.Entry) -> None:
        del entry.commit.workers[:]
        entry.commit.workers.extend(workers)

    with pytest.raises(LedgerError, match="does not list its workers in order"):
        ledger.apply(upto(COMMIT), changed(change))


@pytest.mark.parametrize("beyond", [(1, 2), (2, 1), (1, 1), (9,)])
def test_a_commit_counts_some_of_its_workers(beyond: tuple[int, ...]) -> None:
    """Not all, in order, each once, and only those that it lists."""

    def uncounting(*numbers: int) -> bytes:
        return changed(lambda entry: entry.commit.uncounted.extend(numbers))

    workers = ledger.parse(BODIES[COMMIT]).commit.workers
    assert list(workers) == [1, 2]
    assert ledger.apply(upto(COMMIT), uncounting(2)).committed == 1
    with pytest.raises(LedgerError, match="does not count workers that it does not list"):
        ledger.apply(upto(COMMIT), uncounting(*beyond))


@pytest.mark.parametrize("codes", [b"", b"\1\2", b"\1\2\3\4", b"\1\2\x80"])
def test_codes_that_do_not_fit_are_refused(codes: bytes) -> None:
    body = changed(lambda entry: setattr(entry.commit, "codes", codes))
    with pytest.raises(LedgerError, match="entry 3 of the ledger is damaged"):
        ledger.apply(upto(COMMIT), body)


@pytest.mark.parametrize("scale", [1 << 60, 1 << 62, (1 << 64) - 1])
def test_a_scale_that_could_overflow_is_refused(scale: int) -> None:
    body = changed(lambda entry: setattr(entry.commit, "scale", scale))
    with pytest.raises(LedgerError, match="scale"):
        ledger.apply(upto(COMMIT), body)


def test_what_is_no_entry_is_refused() -> None:
    for body in (b"\xff", b"", pb.Entry(sequence=9).SerializeToString()):
        with pytest.raises(LedgerError, match=r"cannot be read|of an unknown kind"):
            ledger.parse(body)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, COMMIT), st.data())
def test_a_flipped_bit_raises_or_changes_the_head(sequence: int, data: st.DataObject) -> None:
    """No damage goes unseen, and none ends in another exception than ours."""
    body = bytearray(BODIES[sequence])
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        position = ledger.replay([*BODIES[:sequence], bytes(body), *BODIES[sequence + 1 :]])
    except LorandError:
        return
    assert position.head != ledger.replay(BODIES).head


# ------------------------------------------------------------- contributions


def test_the_digest_of_contributions_depends_on_their_order() -> None:
    parts = [b"a", b"bc", b""]
    digests = {ledger.contributions_digest(order) for order in permutations(parts)}
    assert len(digests) == 6


def test_the_digest_of_contributions_sees_where_one_ends() -> None:
    splits = [[b"abc"], [b"ab", b"c"], [b"a", b"bc"], [b"abc", b""], []]
    assert len({ledger.contributions_digest(parts) for parts in splits}) == len(splits)


def test_contributions_are_checked_against_their_commit() -> None:
    entry = pb.Entry(commit=pb.Commit(contributions_digest=ledger.contributions_digest([b"a"])))
    ledger.check_contributions(entry, [b"a"])
    for others in ([b"b"], [], [b"a", b"a"]):
        with pytest.raises(LedgerError, match="are not those it was made of"):
            ledger.check_contributions(entry, others)


# ------------------------------------------------------------- coefficients as bytes


def test_coefficients_are_little_endian_64_bit() -> None:
    coefficients = np.array([1, -2, 2**62], np.int64)
    packed = ledger.pack_coefficients(coefficients)
    assert packed == b"".join(int(a).to_bytes(8, "little", signed=True) for a in coefficients)
    assert ledger.unpack_coefficients(packed, 3).tolist() == coefficients.tolist()
    assert ledger.coefficients_digest(coefficients) == hashlib.sha256(packed).digest()
    with pytest.raises(LedgerError, match="4 coefficients of 8 bytes are not 24 bytes"):
        ledger.unpack_coefficients(packed, 4)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8), st.integers(0, 63))
def test_coefficients_travel_in_as_few_bytes_as_hold_them(values: list[int], shift: int) -> None:
    coefficients = np.array(values, np.int64) >> shift
    width = ledger.width_of(coefficients)
    packed = ledger.pack_coefficients(coefficients, width)
    assert len(packed) == width * len(values)
    assert ledger.unpack_coefficients(packed, len(values), width).tolist() == coefficients.tolist()
    if width > 1:
        reach = 2 ** (8 * width - 9)
        assert coefficients.max() >= reach or coefficients.min() < -reach, "a byte fewer would do"


# ------------------------------------------------------------- the portable file


def test_the_portable_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "run.lorand"
    assert ledger.write_file(path, BODIES) == len(BODIES)
    assert list(ledger.read_file(path)) == BODIES
    assert path.read_bytes().startswith(b"lorand ledger v1\n")


def test_an_empty_portable_file_is_an_empty_history(tmp_path: Path) -> None:
    path = tmp_path / "run.lorand"
    assert ledger.write_file(path, []) == 0
    assert list(ledger.read_file(path)) == []


def test_a_cut_off_file_is_an_error_or_ends_at_an_entry(tmp_path: Path) -> None:
    """At every length: never half an entry, never another exception."""
    path = tmp_path / "run.lorand"
    ledger.write_file(path, BODIES[1:5])
    whole = path.read_bytes()
    ends = []
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            bodies = list(ledger.read_file(path))
        except LedgerError:
            continue
        ends.append(length)
        assert bodies == BODIES[1 : 1 + len(bodies)]
    assert len(ends) == 4


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.lorand"
    with pytest.raises(LedgerError, match="cannot read the ledger file"):
        list(ledger.read_file(path))
    with pytest.raises(LedgerError, match="cannot read the ledger file"):
        list(ledger.read_file(tmp_path))
    path.write_bytes(b"SQLite format 3\0")
    with pytest.raises(LedgerError, match="is not an exported ledger; write one with"):
        list(ledger.read_file(path))
    for rest in (b"\xff\xff\xff\xff" + b"x" * 100, b"\0", b"\0\0\0"):
        path.write_bytes(ledger.FILE_MAGIC + rest)
        with pytest.raises(LedgerError, match="is cut off"):
            list(ledger.read_file(path))
