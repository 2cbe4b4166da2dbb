"""Journals against a ledger: what the proof by kills would notice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from tests.journal import Compared, Journal, compare, digest_of
from tests.runs import config_of, contribution, history

from lorand import ledger
from lorand.v1 import ledger_pb2 as pb

CONFIG: Final = config_of()
BODIES: Final = history(CONFIG, 4)
Rows = list[tuple[bytes, list[pb.StoredContribution]]]
Lines = list[list[Any]]


def sent(index: int, seed: int = 0) -> pb.Contribution:
    return contribution(CONFIG, index, 100 * index + seed).contribution


def rows() -> Rows:
    """The ledger with both workers' contributions at each commit."""
    made = []
    for body in BODIES:
        entry = ledger.parse(body)
        workers = (1, 2) if entry.HasField("commit") else ()
        index = entry.round_index
        parts = [pb.StoredContribution(worker=w, contribution=sent(index, w)) for w in workers]
        made.append((body, parts))
    return made


def lines() -> Lines:
    """What worker 1 writes down, killed and started again in the middle."""
    made: Lines = [["began"]]
    head = ledger.GENESIS
    for count, body in enumerate(BODIES, 1):
        head, entry = ledger.entry_digest(head, body), ledger.parse(body)
        if entry.HasField("commit"):
            index = entry.round_index
            made.append(["sent", index, 1, digest_of(sent(index, 1))])
            made += [["began"], made[-1]] if index == 2 else []
            made.append(["commit", index, list(entry.commit.workers)])
        made.append(["at", count, head.hex()])
    return made


def compared(written: Lines, stored: Rows, folder: Path) -> Compared:
    path = folder / "a.journal"
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in written))
    journal = Journal(path)
    journal.follow()
    return compare([journal], stored, repeats=True)


def test_nothing_is_wrong_with_a_run_that_went_well(tmp_path: Path) -> None:
    assert compared(lines(), rows(), tmp_path) == Compared(3, 0, 0, 0)


def test_a_journal_is_followed_line_by_line(tmp_path: Path) -> None:
    """Also when a line is only half there."""
    journal = Journal(tmp_path / "a.journal")
    assert journal.follow() == 0
    with journal.path.open("wb", buffering=0) as file:
        for part, seen in ((b'["began"]\n["at", 3, "ab', 0), (b'cd"]\n', 3), (b"[", 3)):
            file.write(part)
            assert journal.follow() == seen
    assert (journal.lives, journal.heads) == (1, {3: {"abcd"}})


def last_entry_lost(written: Lines, stored: Rows) -> None:
    stored.pop()


def contribution_lost(written: Lines, stored: Rows) -> None:
    stored[3][1].pop(0)


def contribution_changed(written: Lines, stored: Rows) -> None:
    stored[3][1][0].contribution.CopyFrom(sent(1, 77))


def contribution_twice(written: Lines, stored: Rows) -> None:
    stored[3][1].append(stored[3][1][1])


def round_twice(written: Lines, stored: Rows) -> None:
    stored.append(stored[-1])


def contribution_of_another_round(written: Lines, stored: Rows) -> None:
    stored[4][1][1].contribution.round_index = 1


def round_missing(written: Lines, stored: Rows) -> None:
    del written[1:]
    stored[5] = (stored[2][0], [])


def fork(written: Lines, stored: Rows) -> None:
    written.append(["at", 2, "ab" * 32])


def member_twice(written: Lines, stored: Rows) -> None:
    written.append(["sent", 1, 2, digest_of(sent(1, 1))])


def answer_changed(written: Lines, stored: Rows) -> None:
    written.append(["sent", 4, 1, digest_of(sent(4, 77))])


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (last_entry_lost, Compared(3, 1, 0, 1)),
        (contribution_lost, Compared(3, 1, 0, 0)),
        (contribution_changed, Compared(3, 1, 0, 0)),
        (contribution_twice, Compared(3, 0, 1, 0)),
        (round_twice, Compared(3, 0, 3, 0)),
        (contribution_of_another_round, Compared(3, 0, 1, 0)),
        (round_missing, Compared(0, 1, 0, 0)),
        (fork, Compared(3, 0, 0, 1)),
        (member_twice, Compared(3, 0, 1, 0)),
        (answer_changed, Compared(3, 0, 1, 0)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_is_counted(
    harm: Callable[[Lines, Rows], None], expected: Compared, tmp_path: Path
) -> None:
    written, stored = lines(), rows()
    harm(written, stored)
    assert compared(written, stored, tmp_path) == expected
