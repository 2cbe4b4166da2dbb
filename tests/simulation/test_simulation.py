"""Hundreds of short runs full of faults, each a seed (notes/platforms.md §3, I1–I7; I8: feedback).

LORAND_SIM_SEEDS sets how many; a failure prints how to see it again and what happened last.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pytest
from tests.simulation.checks import check
from tests.simulation.disk import FAULTS, Disk
from tests.simulation.world import MISFORTUNES, World

from lorand.coefficients import Coefficients
from lorand.ledger import Position, entry_digest
from lorand.statements import after
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import sequencer, snapshot
from lorand_coordinator.hub import Connection, Hub
from lorand_coordinator.optimizer import State
from lorand_coordinator.store import SqliteStore, StoreUnavailable
from lorand_worker.feedback import Memory
from lorand_worker.participant import Participant
from lorand_worker.stating import Statements

SEEDS: Final = int(os.environ.get("LORAND_SIM_SEEDS", "200"))
HERE: Final = "tests/simulation/test_simulation.py::test_a_run_survives_its_faults"


OF_THE_NETWORK: Final = ["batches", "late on another connection", "stale answer", "loss is nan"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty ledger."""
    path = tmp_path_factory.mktemp("template") / "empty.ledger"
    SqliteStore(path).close()
    return path


@pytest.fixture(scope="module")
def faults() -> Counter[str]:
    """How often each thing went wrong, over all seeds of this module."""
    return Counter()


def live(seed: int, template: Path, *, faulty: bool = True) -> tuple[World, Position]:
    """Live a run and check it. Raises AssertionError with all one needs to see it again."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(seed, Path(folder), template, faults=faulty)
        try:
            world.run()
            return world, check(world)
        except Exception as error:
            last = "\n".join(world.told)
            again = f"LORAND_SIM_SEEDS={seed + 1} pytest '{HERE}[{seed}]'"
            raise AssertionError(f"seed {seed}: {error!r}\nagain: {again}\n{last}") from error
        finally:
            if world.coordinator.store is not None:
                world.coordinator.store.close()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_run_survives_its_faults(seed: int, template: Path, faults: Counter[str]) -> None:
    world, _ = live(seed, template)
    faults.update(world.faults + world.disk.faults)
    faults["runs"] += 1


def test_everything_that_can_go_wrong_did(faults: Counter[str]) -> None:
    """A fault that no seed meets is not tested."""
    if faults["runs"] < 100:
        pytest.skip("too few seeds ran before")
    assert set(faults) == {"runs", *MISFORTUNES, *FAULTS, *OF_THE_NETWORK}
    assert min(faults.values()) >= faults["runs"] / 10


def test_a_seed_is_a_history(template: Path) -> None:
    """Else a failure could not be seen again."""
    first, second = (live(7, template) for _ in range(2))
    assert first[1].head == second[1].head
    assert (first[0].now, first[0].faults) == (second[0].now, second[0].faults)


def test_without_faults_a_run_commits_every_round_and_learns(template: Path) -> None:
    for seed in range(5):
        world, end = live(seed, template, faulty=False)
        rounds = world.config.run.rounds
        assert end.next_sequence == 1 + len(world.workers) + rounds + 1
        assert world.now < 3 + 2 * rounds


# ------------------------------------------------------------- would it notice?


def forgetful_disk(patch: pytest.MonkeyPatch) -> None:
    """The last write before a crash was never on the disk (synchronous = OFF, and a power cut)."""
    patch.setattr(Disk, "forgets", True)


def hasty_store(patch: pytest.MonkeyPatch) -> None:
    """An entry counts as appended although the disk was full."""
    append = SqliteStore.append

    def hasty(
        self: SqliteStore, entry: pb.Entry, parts: Sequence[bytes] = ()
    ) -> tuple[bytes, bytes]:
        try:
            return append(self, entry, parts)
        except StoreUnavailable:
            entry.sequence = self._count
            body = entry.SerializeToString(deterministic=True)
            self._head, self._count = entry_digest(self._head, body), self._count + 1
            return body, self._head

    patch.setattr(SqliteStore, "append", hasty)


def twice_if_told_it_failed(patch: pytest.MonkeyPatch) -> None:
    """What was done but reported as failed is not looked up."""
    patch.setattr(SqliteStore, "_has", lambda self, digest: False)


def hole_in_an_outbox(patch: pytest.MonkeyPatch) -> None:
    """A slow reader's oldest message makes room for the end of its stream."""
    drop = Hub.drop

    def drop_one(self: Hub, connection: Connection, why: str) -> None:
        kept = list(cast(Any, connection.outbox)._queue)
        full = connection.outbox.full() and not connection.closing
        drop(self, connection, why)
        if full:
            connection.outbox.get_nowait()
            for message in [*kept[1:], None]:
                connection.outbox.put_nowait(message)

    patch.setattr(Hub, "drop", drop_one)


def forgotten_feedback(patch: pytest.MonkeyPatch) -> None:
    """A checkpoint without the optimizer's error feedback."""
    unpack = snapshot.unpack_state

    def forget(data: bytes, coefficients: Coefficients, committed: int) -> State:
        return replace(unpack(data, coefficients, committed), feedback=np.zeros(64))

    patch.setattr(snapshot, "unpack_state", forget)


def round_again(patch: pytest.MonkeyPatch) -> None:
    """A restarted coordinator gives an abandoned round's number again."""
    count = sequencer.Sequencer._count

    def forget_abandoned(self: sequencer.Sequencer, entry: pb.Entry) -> None:
        if not entry.HasField("abandon"):
            count(self, entry)

    patch.setattr(sequencer.Sequencer, "_count", forget_abandoned)


def leap_over_a_commit(patch: pytest.MonkeyPatch) -> None:
    """A worker that jumps to a checkpoint does not ask what became of its last contribution."""
    patch.setattr(Participant, "look_up", lambda self, bodies: None)


def feedback_ends_with_an_old_pool(patch: pytest.MonkeyPatch) -> None:
    """A worker that comes back forgets what it owes as it reads of pools that it had left."""
    move_to = Memory.move_to

    def forget(self: Memory, pool: int) -> None:
        if pool and pool != getattr(self, "before", 0):
            self.pool = 0
        move_to(self, pool)
        self.before = pool  # type: ignore[attr-defined]

    patch.setattr(Memory, "move_to", forget)


def answer_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A worker that comes back measures anew what it may have reported."""
    begin = Participant.__init__

    def forget(self: Participant, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self._answer = None

    patch.setattr(Participant, "__init__", forget)


def account_in_memory(patch: pytest.MonkeyPatch) -> None:
    """A worker that comes back does not know what it sent."""
    patch.setattr(Statements, "_keep", lambda self: None)


def leap_over_what_was_sent(patch: pytest.MonkeyPatch) -> None:
    """A worker that jumps does not state the contribution that it waits for."""
    patch.setattr(Statements, "look_up", lambda self, bodies: None)


def hasty_account(patch: pytest.MonkeyPatch) -> None:
    """What was sent counts as committed, whatever the ledger says."""
    sent = Statements.sent

    def hasty(self: Statements, worker: int, said: pb.Contribution, position: Position) -> None:
        sent(self, worker, said, position)
        assert self._account is not None
        assert self._account.awaited is not None
        digest = after(self._account.digest, position.next_sequence, self._account.awaited[1])
        self._account = replace(self._account, digest=digest, count=self._account.count + 1)

    patch.setattr(Statements, "sent", hasty)


def live_all(seeds: Iterable[int], template: Path) -> None:
    for seed in seeds:
        live(seed, template)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (forgetful_disk, "I1|rolled back"),
        (hasty_store, "I1|I4|rolled back|lost entry"),
        (twice_if_told_it_failed, "I7"),
        (hole_in_an_outbox, "came where entry|I5"),
        (forgotten_feedback, "does not repeat|I6"),
        (round_again, "I3|I5|I8"),
        (leap_over_a_commit, "I8"),
        (feedback_ends_with_an_old_pool, "I8"),
        (answer_forgotten, "I8"),
        (account_in_memory, "I9"),
        (leap_over_what_was_sent, "I9"),
        (hasty_account, "not what its workers signed"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_of_ours_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    found: str,
    template: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The simulator is worth what it notices."""
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=found):
        live_all(range(300), template)
