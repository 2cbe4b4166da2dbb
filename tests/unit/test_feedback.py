"""What codes lose comes back with the next contribution, once, also after a restart (EF)."""

import json
import os
import stat
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tests.runs import IDENTITY, config_of

from lorand import codec, ledger
from lorand.codec import Codec, Floats
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.errors import ContributionError, LorandError
from lorand.ledger import Position
from lorand.privacy.mechanism import Integers
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.aggregation import report
from lorand_worker.estimators import Measurement, Order
from lorand_worker.feedback import Awaited, FileMemory, Memory, Place
from lorand_worker.participant import Participant, encode

QUANTUM: Final = 2.0**-32
STEPPING: Final[dict[str, Any]] = {"local": {"steps": 2}, "codec": {"up": "sign"}}
CONFIG: Final = config_of(**STEPPING)
ROTATING: Final = config_of(**STEPPING, directions={"rotate_every": 2}, run={"rounds": 9})
NOTHING: Final = np.zeros(64)


# ------------------------------------------------------------- codes of where steps led

UP: Final[list[Codec]] = ["int8", "sign", "int32"]


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(UP), st.integers(-40, 5), st.integers(-20, 36), st.integers(0, 2**32))
def test_what_was_coded_and_what_was_lost_is_what_was_wanted(
    up: Codec, log2_way: int, log2_owed: int, seed: int
) -> None:
    """In quanta; and the coordinator reads from the codes what the worker took them for."""
    config = config_of(local={"steps": 2}, codec={"up": up})
    rng = np.random.default_rng(seed)
    values, owed = rng.normal(0, 2.0**log2_way, 6), rng.normal(0, 2.0**log2_owed, 6)
    coded = encode(config, values, 0, owed)
    moved = codec.delta(coded.scale, coded.codes)
    wanted = owed - values * 2.0**32
    assert coded.lost + moved == pytest.approx(wanted, rel=1e-12)
    if up != "sign":
        assert np.abs(coded.lost).max() <= max(1, coded.scale) / 2
    message = pb.Contribution(codes=codec.pack(up, coded.codes), scale=coded.scale)
    read = report(config, message)
    assert (read.scale, read.codes.tolist()) == (coded.scale, coded.codes.tolist())


def test_scalars_are_coded_in_the_rounds_scale() -> None:
    coded = encode(config_of(), np.array([0.4, -0.2, 0.0]), -6, np.full(3, 9e9))
    assert (coded.codes.tolist(), coded.scale, coded.lost.tolist()) == ([26, -13, 0], 0, [])


@pytest.mark.parametrize("values", [[1025.0] + [0.0] * 5, [200.0] * 6, [1e300] * 6])
@pytest.mark.parametrize("up", UP)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_way_too_far_has_no_code(values: list[float], up: Codec) -> None:
    """The limit is on all directions together, for all may meet at one weight."""
    config = config_of(local={"steps": 2}, codec={"up": up})
    with pytest.raises(ContributionError, match=r"learning.rate|not finite"):
        encode(config, np.array(values), 0, np.zeros(6))
    fine = encode(config, np.array([100.0] * 6), 0, np.zeros(6))
    assert codec.delta(fine.scale, fine.codes).sum() * QUANTUM == pytest.approx(-600, rel=0.01)


# ------------------------------------------------------------- a participant and a ledger


class Walk:
    """A bench whose steps always lead the same way."""

    examples = 11

    def __init__(self) -> None:
        """Count measurements."""
        self.measured = 0
        self.values = np.array([0.5, -0.01, 0.02, 0.3, -0.2, 0.001])

    def adopt(self, position: Position) -> None:
        """See Bench."""

    def measure(self, order: Order) -> Measurement:
        """See Bench."""
        self.measured += 1
        return Measurement(self.values * (1 + 0.1 * self.measured), 0.5)

    def release(self, indices: Indices) -> Integers:
        """No test of these is of a private run."""
        raise NotImplementedError


class Life:
    """Worker 1 in a run whose ledger this test writes."""

    def __init__(self, config: RunConfig = CONFIG, memory: Memory | None = None) -> None:
        """Follow the start entry."""
        self.config, self.bench = config, Walk()
        origin = ledger.origin(config, IDENTITY)
        self.participant = Participant(origin, self.bench, memory=memory)
        self.participant.worker = 1
        self.bodies: list[bytes] = []
        self.append(ledger.start_entry(config, IDENTITY))

    def append(self, entry: pb.Entry) -> None:
        """Have the ledger hold an entry."""
        entry.sequence = len(self.bodies)
        self.bodies.append(entry.SerializeToString(deterministic=True))
        self.participant.on_entry(self.bodies[-1])

    def contribute(self, round_index: int) -> pb.Contribution:
        """Take part in a round."""
        request = self.participant.on_round_start(wire.RoundStart(round_index=round_index))
        return request.contribution

    def commit(self, round_index: int, workers: list[int] | None = None) -> None:
        """Commit a round of these workers, worker 1 if nothing is said."""
        codes = np.ones(self.config.num_directions, np.int64)
        commit = pb.Commit(scale=3, codes=codec.pack("int8", codes), workers=workers or [1])
        self.append(pb.Entry(round_index=round_index, commit=commit))

    def abandon(self, round_index: int) -> None:
        """Give a round up."""
        self.append(pb.Entry(round_index=round_index, abandon=pb.Abandon(reason="nobody came")))

    @property
    def owed(self) -> Floats:
        """The feedback now."""
        return self.participant._memory.feedback


def moved(contribution: pb.Contribution, config: RunConfig = CONFIG) -> Floats:
    """What a contribution moves, in quanta."""
    read = report(config, contribution)
    return codec.delta(read.scale, read.codes).astype(np.float64)


def test_what_a_commit_lost_goes_into_the_next_contribution() -> None:
    """Σ wanted = Σ coded + owed, a direction."""
    life, wanted, coded = Life(), np.zeros(64), np.zeros(64)
    for round_index in range(1, 30):
        at = life.participant.position.draws.of(round_index, 1)
        contribution = life.contribute(round_index)
        wanted[at] -= life.bench.values * (1 + 0.1 * round_index) / QUANTUM
        coded[at] += moved(contribution)
        life.commit(round_index)
        np.testing.assert_allclose(coded + life.owed, wanted, rtol=1e-9, atol=1e-3)
    assert np.count_nonzero(life.owed) > 30


@pytest.mark.parametrize("ending", ["abandoned", "left out", "under way"])
def test_only_a_commit_with_this_worker_counts(ending: str) -> None:
    life = Life()
    life.contribute(1)
    assert not life.owed.any(), "not before the ledger holds it"
    if ending == "abandoned":
        life.abandon(1)
    if ending == "left out":
        life.commit(1, [2, 3])
    assert not life.owed.any()
    life.contribute(2)
    life.commit(2)
    assert life.owed.any()


def test_a_commit_of_another_round_does_not_count() -> None:
    life = Life()
    life.contribute(3)
    life.commit(2)
    assert not life.owed.any()
    life.commit(3)
    assert life.owed.any()


@pytest.mark.parametrize(
    "changes",
    [
        {"local": {"steps": 2, "error_feedback": False}},
        {"local": {"steps": 2}, "codec": {"up": "int8", "rounding": "unbiased"}},
        {},
    ],
    ids=["switched off", "unbiased", "scalars"],
)
def test_runs_without_feedback_owe_nothing(changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    assert not config.keeps_feedback
    life = Life(config)
    life.bench.values = life.bench.values[: config.num_directions]
    life.contribute(1)
    life.commit(1)
    assert life.participant._memory.awaited is None
    assert not life.owed.any()


def test_another_pool_owes_nothing() -> None:
    """What was lost along directions that are gone means nothing to those that follow."""
    life = Life(ROTATING)
    for round_index, owes in [(1, True), (2, False), (3, True), (4, False)]:
        life.contribute(round_index)
        life.commit(round_index)
        assert life.owed.any() == owes
    life.contribute(5)
    life.abandon(5)
    life.commit(6, [2])
    life.commit(7, [2])
    assert life.participant._memory.awaited is None


def test_steps_that_led_too_far_are_a_skip() -> None:
    life = Life()
    life.bench.values = np.full(6, 1e6)
    request = life.participant.on_round_start(wire.RoundStart(round_index=1))
    assert "lower local.learning_rate" in request.skip.reason
    assert life.participant.counts.skipped == 1
    assert life.participant._memory.awaited is None


# ------------------------------------------------------------- across a restart


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "state", ledger.origin(CONFIG, IDENTITY).run_digest, "worker/1 ü")


def memory_at(place: Place, notes: list[str] | None = None) -> FileMemory:
    said: list[str] = []
    memory = FileMemory(64, place, said.append)
    assert notes is not None or not said
    if notes is not None:
        notes += said
    return memory


def restarted(life: Life, place: Place) -> Life:
    """The same worker in a new process that read the ledger from its beginning."""
    again = Life.__new__(Life)
    again.config, again.bench, again.bodies = life.config, Walk(), list(life.bodies)
    origin = ledger.origin(life.config, IDENTITY)
    again.participant = Participant(origin, again.bench, memory=memory_at(place))
    again.participant.worker = 1
    for body in again.bodies:
        again.participant.on_entry(body)
    return again


@pytest.mark.parametrize("kill_after", ["contribution", "commit", "abandon"])
def test_feedback_survives_a_restart(place: Place, kill_after: str) -> None:
    """Killed at any moment, a worker owes what one owes that was not."""
    killed, steady = Life(memory=memory_at(place)), Life()
    for life in (killed, steady):
        life.contribute(1)
        life.commit(1)
        life.contribute(2)
        if kill_after == "commit":
            life.commit(2)
        if kill_after == "abandon":
            life.abandon(2)
    again = restarted(killed, place)
    if kill_after == "contribution":
        for life in (again, steady):
            life.commit(2)
    assert again.owed.tolist() == steady.owed.tolist()
    assert again.owed.any()


def test_what_was_reported_is_not_measured_anew(place: Place) -> None:
    """The coordinator may have the first contribution: another one would owe something else."""
    life = Life(memory=memory_at(place))
    life.contribute(1)
    life.commit(1)
    said = life.contribute(2)
    again = restarted(life, place)
    assert again.contribute(2) == said
    assert again.bench.measured == 0
    again.commit(2)
    assert again.contribute(3) != said
    assert again.bench.measured == 1


def test_it_is_not_repeated_elsewhere(place: Place) -> None:
    """Not as another worker, nor after another history."""
    life = Life(memory=memory_at(place))
    life.contribute(2)
    other = restarted(life, place)
    other.participant.worker = 7
    other.contribute(2)
    assert other.bench.measured == 1
    life = Life(memory=memory_at(place))
    life.commit(1, [2])
    life.contribute(2)
    assert life.bench.measured == 1


def test_a_restart_in_a_later_pool_keeps_what_is_owed(place: Place) -> None:
    """Reading the history again passes pools that were left before the feedback was made."""
    life = Life(ROTATING, memory_at(place))
    for round_index in range(1, 6):
        life.contribute(round_index)
        life.commit(round_index)
    assert life.owed.any()
    again = restarted(life, place)
    assert again.owed.tolist() == life.owed.tolist()


def test_a_run_that_moved_on_meanwhile_owes_nothing(place: Place) -> None:
    life = Life(ROTATING, memory_at(place))
    life.contribute(1)
    life.commit(1)
    assert life.owed.any()
    elsewhere = Life(ROTATING)
    elsewhere.bodies = life.bodies
    elsewhere.participant = Participant(ledger.replay(life.bodies), Walk())
    elsewhere.commit(2, [2])
    assert not restarted(elsewhere, place).owed.any()


@pytest.mark.parametrize("ending", ["commit", "abandon", "left out"])
def test_a_checkpoint_beyond_a_commit_does_not_hide_it(place: Place, ending: str) -> None:
    """Who jumps looks up what became of the last contribution, in the entries left out."""
    life = Life(memory=memory_at(place))
    life.contribute(1)
    from_there = len(life.bodies)
    assert life.participant.awaited_from == from_there
    steady = Life()
    steady.contribute(1)
    if ending == "abandon":
        steady.abandon(1)
    else:
        steady.commit(1, [1] if ending == "commit" else [2])
    for round_index in (2, 3):
        steady.commit(round_index, [2])
    jumping = Participant(ledger.origin(CONFIG, IDENTITY), Walk(), memory=memory_at(place))
    assert jumping.awaited_from == from_there
    left_out = iter(steady.bodies[from_there:])
    jumping.look_up(left_out)
    jumping.catch_up(ledger.replay(steady.bodies))
    assert jumping._memory.feedback.tolist() == steady.owed.tolist()
    assert steady.owed.any() == (ending == "commit")
    assert len(list(left_out)) == 2, "it read no more than it needs"


def test_who_awaits_nothing_looks_nothing_up() -> None:
    life = Life()
    assert life.participant.awaited_from is None
    life.participant.look_up(iter(lambda: pytest.fail("it read"), None))


# ------------------------------------------------------------- the file


def test_the_file_is_its_owners_and_gone_at_the_end(place: Place) -> None:
    """It tells of private data."""
    life = Life(memory=memory_at(place))
    life.contribute(1)
    files = list(place.folder.iterdir())
    assert files == [place.path]
    assert stat.S_IMODE(place.path.stat().st_mode) == 0o600
    life.commit(1)
    assert list(place.folder.iterdir()) == files
    life.append(pb.Entry(finish=pb.Finish(committed=1)))
    assert not list(place.folder.iterdir())


def test_runs_and_workers_have_files_of_their_own(tmp_path: Path) -> None:
    places = [Place(tmp_path, run, name) for run in (b"\1" * 32, b"\2" * 32) for name in "ab"]
    assert len({place.path for place in places}) == 4


def broken(place: Place, how: str) -> None:
    """Damage a file that holds feedback."""
    Life(memory=memory_at(place)).contribute(1)
    path, arrays = place.path, load_file(place.path)
    header = {"format": "lorand/feedback/v1", "run": place.run_digest.hex(), "worker": place.name}
    header |= {"pool": 0, "awaited": [1, 0, 1]}  # type: ignore[dict-item]
    match how:
        case "empty":
            path.write_bytes(b"")
            return
        case "cut off":
            path.write_bytes(path.read_bytes()[:-100])
            return
        case "another run":
            header["run"] = "00" * 32
        case "another worker":
            header["worker"] = "worker/2"
        case "another format":
            header["format"] = "lorand/feedback/v2"
        case "no pool":
            del header["pool"]
        case "another size":
            arrays["feedback"] = np.zeros(128)
        case "other numbers":
            arrays["feedback"] = np.zeros(64, np.float32)
        case "no numbers":
            arrays["awaited"] = np.full(64, np.nan)
        case "half an answer":
            header["awaited"] = [1, 0]  # type: ignore[assignment]
        case "no contribution":
            arrays["contribution"] = np.frombuffer(b"\xff", np.uint8)
        case "a part is missing":
            del arrays["awaited"]
    text = "?" if how == "no header" else json.dumps(header)
    save_file(arrays, path, None if how == "no metadata" else {"lorand": text})


DAMAGE: Final = [
    *("empty", "cut off", "another run", "another worker", "another format", "another size"),
    *("other numbers", "no numbers", "half an answer", "no contribution", "a part is missing"),
    *("no pool", "no header", "no metadata"),
]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_file_that_cannot_be_used_is_said_and_replaced(place: Place, how: str) -> None:
    broken(place, how)
    notes: list[str] = []
    memory = memory_at(place, notes)
    assert not memory.feedback.any()
    assert (memory.awaited, memory.pool) == (None, 0)
    assert len(notes) == 1
    assert f"the error feedback in {place.path} is not used" in notes[0]
    memory_at(place)  # it is whole again


def test_a_file_that_broken_would_read_is_read(place: Place) -> None:
    """The test above is about the damage, and nothing else."""
    broken(place, "not at all")
    assert memory_at(place).awaited is not None


def test_a_folder_that_cannot_be_written_is_our_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    place = Place(tmp_path / "file", bytes(32), "one")
    with pytest.raises(LorandError, match=r"cannot keep error feedback in .*--state"):
        memory_at(place)
    place = Place(tmp_path, bytes(32), "one")
    place.path.with_suffix(".partial").mkdir()
    with pytest.raises(LorandError, match=r"cannot keep error feedback in .*--state"):
        memory_at(place)


def test_what_is_owed_is_on_disk_before_codes_leave(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    memory = memory_at(place)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LorandError, match=r"cannot keep error feedback in .*No space left"):
        memory.await_commit(Awaited(pb.Contribution(round_index=1), 1, 0, 1, NOTHING))
