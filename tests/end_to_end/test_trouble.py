"""Trouble in the middle of a run, which goes on."""

import resource
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny
from tests.commands import MakeRoom, Room, committed, status, wait_for
from tests.end_to_end.peers import LIMIT_S, peers, served, two
from tests.runs import IDENTITY

from lorand import ledger
from lorand.directions import Indices
from lorand.ledger import Position
from lorand.privacy.mechanism import Integers
from lorand_worker.estimators import Measurement, NonFiniteLoss, Order
from lorand_worker.link import Link
from lorand_worker.session import Session


class Stand:
    """A bench without a model; some of its rounds have no finite loss."""

    examples = 1

    def __init__(self, bad: set[int]) -> None:
        """`bad` counts measurements from 1."""
        self._bad, self.measured = bad, 0

    def adopt(self, position: Position) -> None:
        """See Bench."""

    def measure(self, order: Order) -> Measurement:
        """See Bench."""
        self.measured += 1
        if self.measured in self._bad:
            raise NonFiniteLoss("the loss of this batch is nan")
        return Measurement(np.full(len(order.indices), 0.1), 0.5)

    def release(self, indices: Indices) -> Integers:
        """No test of these is of a private run."""
        raise NotImplementedError


class Quiet:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """See Reporter."""
        self.notes.append(text)

    def progress(self, committed: int, total: int, text: str) -> None:
        """See Reporter."""


def test_a_loss_that_is_not_finite_costs_one_worker_one_round(make_room: MakeRoom) -> None:
    """It sits the round out and says why; where the quorum is lost, the round is abandoned."""
    room = make_room(tiny.settings("spsa", run={"rounds": 4}))
    benches = [Stand({2, 3}), Stand({3}), Stand(set())]
    reports = [Quiet() for _ in benches]
    with served(room) as (_, address):
        links = [Link(address, give_up_s=10.0) for _ in benches]
        sessions = [
            Session(link, room.config, IDENTITY, bench, f"worker-{i}", report)
            for i, (link, bench, report) in enumerate(zip(links, benches, reports, strict=True))
        ]
        threads = [threading.Thread(target=session.run, daemon=True) for session in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        for link in links:
            link.close()
    entries = [ledger.parse(body) for body in ledger.read_file(room.export())]
    outcomes = [e for e in entries if e.WhichOneof("kind") in ("commit", "abandon")]
    numbers = {s.name: s.participant.worker for s in sessions}
    everyone = sorted(n for n in numbers.values() if n is not None)
    assert [list(e.commit.workers) for e in outcomes] == [
        everyone,
        [n for n in everyone if n != numbers["worker-0"]],
        [],
        everyone,
        everyone,
    ]
    # The third may report before or after the round is given up.
    assert outcomes[2].abandon.reason in {
        f"{reported} of 3 participants reported, the quorum is 2; 2 sat the round out"
        for reported in (0, 1)
    }
    assert "sitting out round 2: the loss of this batch is nan" in reports[0].notes
    assert [s.participant.counts.skipped for s in sessions] == [2, 1, 0]
    heads = {s.participant.position.head for s in sessions}
    assert len(heads) == 1


def commit_while_full(room: Room, address: str, fill: Any, free: Any) -> None:
    """Fill the disk, report a round, see that it waits; free it, see that it commits."""
    with peers(address, room.config) as (one, other):
        for peer in (one, other):
            peer.report(1, seed=peer.worker)
        for peer in (one, other):
            peer.until("round_start")
        fill()
        for peer in (one, other):
            peer.report(2, seed=peer.worker)

        def stuck() -> bool:
            answer = status(address)
            return answer is not None and "the ledger cannot be written" in answer.reason

        wait_for(stuck, "the coordinator says that it cannot write")
        assert committed(address) == 1
        free()
        for peer in (one, other):
            peer.until_committed(2)
        assert one.position.head == other.position.head


def test_a_ledger_that_cannot_grow_waits_and_goes_on(make_room: MakeRoom) -> None:
    """A limit on the size of files stands in for a full disk."""
    room = make_room(two())
    unlimited = resource.RLIM_INFINITY
    with served(room) as (coordinator, address):

        def limit(size: int) -> None:
            resource.prlimit(coordinator.pid, resource.RLIMIT_FSIZE, (size, unlimited))

        journal = room.ledger.with_name(room.ledger.name + "-wal")
        commit_while_full(
            room, address, lambda: limit(journal.stat().st_size), lambda: limit(unlimited)
        )
        assert "Traceback" not in coordinator.errors()
    room.export()


def test_a_full_disk_waits_and_goes_on(make_room: MakeRoom, tmp_path: Path) -> None:
    """The same on a small file system of its own, where this process may mount one."""
    room = make_room(two())
    small = tmp_path / "small"
    small.mkdir()
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("there is no mount")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(command, capture_output=True, timeout=10, check=False).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        room.ledger = small / "run.ledger"
        with served(room, "--ledger", room.ledger) as (_, address):
            filler = small / "filler"
            commit_while_full(room, address, lambda: fill_up(filler), filler.unlink)
        room.export()
    finally:
        subprocess.run(["umount", str(small)], timeout=10, check=True)


def fill_up(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return
