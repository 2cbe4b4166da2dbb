"""A worker killed between its contribution and the commit owes what it would have owed (EF)."""

import signal
from typing import Final

from tests import tiny
from tests.commands import MakeRoom, Room, committed, status, wait_for

from lorand import ledger
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.store import SqliteStore
from lorand_worker.feedback import Awaited, FileMemory, Place

SETTINGS: Final = tiny.settings(
    "spsa",
    run={"rounds": 6},
    estimator={"directions_per_round": 2, "batch_size": 4},
    local={"steps": 3, "learning_rate": 0.001},
    codec={"up": "sign"},
    optimizer={"learning_rate": 1.0, "normalise": False},
    rounds={"quorum": 2, "start_with": 2, "deadline_s": 60.0},
    service={"heartbeat_timeout_s": 60.0, "checkpoint_every": 1},
)
LOOKS: Final = 4
"""How often in a row a round must be seen waiting, for what is on its way to have arrived."""


class Reader(FileMemory):
    """Reads a file that another process keeps, and leaves it as it is."""

    def _keep(self) -> None:
        """Write nothing."""


class Hotels:
    """The worker of this name, seen from outside: its file, and the round that awaits others."""

    def __init__(self, room: Room, address: str) -> None:
        """Nothing has been seen yet."""
        self._room, self._address = room, address
        self._looks: list[int] = []

    def memory(self) -> FileMemory:
        """What it keeps now. AssertionError when that cannot be read."""
        start = next(iter(ledger.read_file(self._room.export())))
        place = Place(self._room.state, ledger.origin_of(start).run_digest, "hotels")

        def fail(text: str) -> None:
            raise AssertionError(text)

        return Reader(self._room.config.directions.pool_size, place, fail)

    def is_waiting(self) -> bool:
        """Whether its contribution to this round is at the coordinator, and no other's."""
        answer = status(self._address)
        assert answer is not None
        awaited = self.memory().awaited
        alone = "waiting for 1 of 2 participants" in answer.reason
        if awaited is None or not alone or awaited.contribution.round_index != answer.round_index:
            self._looks = []
            return False
        self._looks.append(answer.round_index)
        return self._looks[-LOOKS:] == [answer.round_index] * LOOKS

    def held(self) -> tuple[FileMemory, Awaited]:
        """Wait until it is waiting; return what it keeps then."""
        self._looks = []
        wait_for(self.is_waiting, "hotels waits for the other worker")
        memory = self.memory()
        assert memory.awaited is not None
        return memory, memory.awaited


def test_a_worker_killed_before_the_commit_owes_what_it_owed(make_room: MakeRoom) -> None:
    """The other one stands still meanwhile, so that nothing is committed but when it may go on."""
    room = make_room(SETTINGS).lock()
    with room.coordinator() as (_, address):
        hotels = Hotels(room, address)
        with room.join(address, "gadgets") as other:
            with room.join(address, "hotels") as killed:
                wait_for(lambda: committed(address) >= 1, "a round is committed")
                other.signal(signal.SIGSTOP)
                before, awaited = hotels.held()
                assert killed.running()
                killed.kill()
            round_index = awaited.contribution.round_index
            other.signal(signal.SIGCONT)
            wait_for(lambda: committed(address) >= round_index, f"round {round_index} is committed")
            other.signal(signal.SIGSTOP)
            with room.join(address, "hotels") as again:
                after, following = hotels.held()
                other.signal(signal.SIGCONT)
                results = [again.result(), other.result()]
    assert following.contribution.round_index == round_index + 1
    assert after.feedback.tolist() == awaited.feedback.tolist() != before.feedback.tolist()
    said = [part for part in stored(room, round_index) if part.contribution == awaited.contribution]
    assert len(said) == 1, "what it reported before it was killed is what was committed"
    assert list(room.state.glob("*.safetensors")) == [], "gone with the run"
    replayed = room.once("lr-worker", "replay", room.export(), "--model", room.model)
    assert {result["weights_digest"] for result in results} == {replayed["weights_digest"]}
    assert [result["rounds"] for result in results] == [6, 6]


def stored(room: Room, round_index: int) -> list[pb.StoredContribution]:
    """The contributions that a committed round was made of."""
    store = SqliteStore(room.ledger, read_only=True)
    try:
        for entry in map(ledger.parse, store.entries()):
            if entry.HasField("commit") and entry.round_index == round_index:
                bodies = store.contributions(entry.sequence)
                return [pb.StoredContribution.FromString(body) for body in bodies]
    finally:
        store.close()
    return []
