"""A budget never counts less than what was shown, whatever happens in between."""

import itertools
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from tests.runs import IDENTITY, config_of, history

from lorand import codec, ledger
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.errors import BudgetSpent, LorandError
from lorand.ledger import Position
from lorand.privacy import plan
from lorand.privacy.accountant import Release
from lorand.privacy.mechanism import Integers
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_worker import budget as budgets
from lorand_worker.budget import Budget
from lorand_worker.estimators import Measurement, NonFiniteLoss, Order
from lorand_worker.feedback import Place
from lorand_worker.participant import Participant


def private(**changes: dict[str, Any]) -> RunConfig:
    """A small run of pure epsilon, which needs no library to count."""
    laplace = {"mechanism": "laplace", "delta": 0.0, "target_epsilon": 4.0, "sample_rate": 0.5}
    rounds = {"telemetry": "none", **changes.pop("rounds", {})}
    privacy = {"mode": "worker", **laplace, **changes.pop("privacy", {})}
    return config_of(rounds=rounds, privacy=privacy, **changes)


CONFIG: Final = private()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    origin = ledger.origin(CONFIG, IDENTITY)
    return Place(tmp_path / "state", origin.run_digest, "worker/1")


def opened(place: Place, config: RunConfig = CONFIG) -> Budget:
    return Budget(place, config, place.folder / "data.csv")


class Noise:
    """A bench whose every measurement is another, in whichever process."""

    numbers = itertools.count(1)

    examples = 11

    def __init__(self) -> None:
        """None so far."""
        self.measured = 0
        self.fails = False

    def adopt(self, position: Position) -> None:
        """See Bench."""

    def measure(self, order: Order) -> Measurement:
        """See Bench."""
        self.measured += 1
        if self.fails:
            raise NonFiniteLoss("the loss of this batch is nan")
        return Measurement(np.array([1.0, -1.0, 0.0]) * next(self.numbers) / 64, None)

    def release(self, indices: Indices) -> Integers:
        """No test of these is of sums."""
        raise NotImplementedError


class Life:
    """One process of worker 1."""

    def __init__(self, place: Place, config: RunConfig = CONFIG) -> None:
        """Start it on the budget that is there."""
        self.budget, self.bench = opened(place, config), Noise()
        self.participant = Participant(
            ledger.origin(config, IDENTITY), self.bench, budget=self.budget
        )
        self.participant.worker = 1
        for body in history(config, 0):
            self.participant.on_entry(body)

    def answer(self, round_index: int) -> bytes:
        """What leaves for a round."""
        start = wire.RoundStart(round_index=round_index, scale_exponent=-6)
        return self.participant.on_round_start(start).SerializeToString(deterministic=True)

    def end(self) -> None:
        """The process is gone, and its lock with it."""
        self.budget.close()


# ------------------------------------------------------------- charging


def test_the_noise_follows_from_the_runs_own_settings(place: Place) -> None:
    account = opened(place).account
    assert account.release == plan.planned(CONFIG)
    assert (account.limit, account.charged, account.left) == (4, 0, 4)
    assert account.spent() == 0.0
    spare = private(privacy={"spare_rounds": 6})
    assert spare.releases == 10
    assert plan.planned(spare).multiplier > plan.planned(CONFIG).multiplier


def test_each_new_answer_is_charged_once(place: Place) -> None:
    life = Life(place)
    first = life.answer(1)
    assert budgets.read(life.budget.path).charged == 1
    assert life.answer(1) == first
    assert life.bench.measured == 1
    assert life.answer(2) != first
    account = budgets.read(life.budget.path)
    assert (account.charged, account.left, life.bench.measured) == (2, 2, 2)
    assert account == life.budget.account
    assert account.spent() == pytest.approx(CONFIG.privacy.target_epsilon / 2)


def test_a_process_that_comes_back_repeats_what_it_said(place: Place) -> None:
    life = Life(place)
    said = life.answer(1)
    life.end()
    again = Life(place)
    assert again.answer(1) == said
    assert (again.bench.measured, again.budget.account.charged) == (0, 1)
    again.answer(2)
    again.end()
    third = Life(place)
    assert third.answer(1) != said, "which is no longer known, and paid for anew"
    assert third.budget.account.charged == 3


def test_it_stops_by_itself(place: Place) -> None:
    life = Life(place)
    for round_index in range(1, 5):
        life.answer(round_index)
    assert life.budget.account.spent() == pytest.approx(4.0)
    for process in range(2):
        with pytest.raises(BudgetSpent, match=r"4 of 4 releases.*sends nothing more"):
            life.answer(5 + process)
        assert life.bench.measured == 4 * (process == 0), "nothing is even measured"
        life.end()
        life = Life(place)
    assert BudgetSpent.exit_code == 9


def test_without_a_budget_a_private_run_is_not_answered() -> None:
    with pytest.raises(LorandError, match="needs a budget"):
        Participant(ledger.origin(CONFIG, IDENTITY), Noise())


# ------------------------------------------------------------- every moment to be killed in


class Killed(BaseException):
    """The process ends here."""


STEPS: Final = ["measure", "write", "fsync", "replace", "fsync folder", "answer"]


def dying(monkeypatch: pytest.MonkeyPatch, step: str, *, after: bool) -> None:
    """Have the process end right before a step, or right after it."""

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def dead(*arguments: Any, **named: Any) -> Any:
            if not after:
                raise Killed
            real(*arguments, **named)
            raise Killed

        return dead

    match step:
        case "replace":
            monkeypatch.setattr(os, "replace", wrap(os.replace))
        case "fsync" | "fsync folder":
            real, calls = os.fsync, [0]

            def fsync(descriptor: int) -> None:
                calls[0] += 1
                if calls[0] == (1 if step == "fsync" else 2):
                    wrap(real)(descriptor)
                real(descriptor)

            monkeypatch.setattr(os, "fsync", fsync)
        case "write":
            monkeypatch.setattr(budgets, "_written", wrap(budgets._written))
        case "answer":
            monkeypatch.setattr(Budget, "charge", wrap(Budget.charge))
        case "measure":
            monkeypatch.setattr(Noise, "measure", wrap(Noise.measure))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_anywhere_it_never_counts_less_than_it_showed(
    place: Place, monkeypatch: pytest.MonkeyPatch, step: str, *, after: bool
) -> None:
    """What was returned is what may have left; the file is whole in any case."""
    shown: set[bytes] = set()
    life = Life(place)
    shown.add(life.answer(1))
    with monkeypatch.context() as patch:
        dying(patch, step, after=after)
        with pytest.raises(Killed):
            shown.add(life.answer(2))
    life.end()
    if step == "write":
        life.budget.path.with_suffix(".partial").write_text('{"format": "lora')
    account = budgets.read(life.budget.path)
    assert account.charged in (1, 2)
    back = Life(place)
    shown.add(back.answer(2))
    shown.add(back.answer(2))
    charged = budgets.read(back.budget.path).charged
    assert len(shown) <= charged <= 2, "and nothing is paid twice"


def test_a_release_that_cannot_be_kept_is_not_shown(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(place)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LorandError, match=r"No space left.*without it nothing is sent"):
        life.answer(1)
    monkeypatch.undo()
    assert life.budget.account.charged == budgets.read(life.budget.path).charged == 0


# ------------------------------------------------------------- nothing else leaves


def test_nothing_but_codes_leaves(place: Place) -> None:
    """T7: no loss, no number of examples, no votes, no scale of its own."""
    request = wire.ParticipateRequest.FromString(Life(place).answer(1))
    assert request.WhichOneof("message") == "contribution"
    fields = {field.name for field, _ in request.contribution.ListFields()}
    assert fields == {"round_index", "codes"}
    first, second, third = codec.unpack("int8", request.contribution.codes, 3).tolist()
    assert (first > 0, second, third) == (True, -first, 0)


def test_there_is_no_skip_with_a_reason(place: Place) -> None:
    """T7: that a loss is no number is about the data; the worker ends before it says so."""
    life = Life(place)
    life.bench.fails = True
    with pytest.raises(NonFiniteLoss):
        life.answer(1)
    assert life.participant.counts.skipped == 0


@pytest.mark.parametrize("drawing", ["uniform", "weighted", "weighted-unbiased"])
def test_directions_follow_from_the_ledger_alone(place: Place, drawing: str) -> None:
    """T8: what is drawn next is a function of what was committed, not of this worker's scalars."""
    config = private(directions={"drawing": drawing}, rounds={"quorum": 2})
    origin = ledger.origin(config, IDENTITY)
    drawn = []
    for number in (1, 2):
        name = f"worker {number}"
        life = Life(Place(place.folder, origin.run_digest, name), config)
        seen: list[list[int]] = []
        for body in history(config, 2)[3:]:
            life.participant.on_entry(body)
            start = wire.RoundStart(round_index=9 + len(seen), scale_exponent=-6)
            if len(seen) < 3:
                life.participant.on_round_start(start)
            seen.append(life.participant.position.draws.of(50, 1).tolist())
        drawn.append(seen)
    assert drawn[0] == drawn[1]


# ------------------------------------------------------------- the file


def test_the_file_is_its_owners(place: Place) -> None:
    life = Life(place)
    assert stat.S_IMODE(life.budget.path.stat().st_mode) == 0o600
    assert life.budget.path.name.endswith(".budget.json")


def test_the_file_outlives_the_run(place: Place) -> None:
    life = Life(place)
    life.answer(1)
    entry = pb.Entry(sequence=3, finish=pb.Finish(committed=0))
    life.participant.on_entry(entry.SerializeToString(deterministic=True))
    assert budgets.read(life.budget.path).charged == 1


OTHER: Final = """
import sys
from pathlib import Path
from tests.unit.test_budget import CONFIG, opened
from lorand.errors import LorandError
from lorand_worker.feedback import Place
try:
    opened(Place(Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), "worker/1"))
except LorandError as error:
    print(error)
"""


def test_one_process_at_a_time_spends(place: Place) -> None:
    """Each would charge what the other does not see."""
    held = opened(place)
    arguments = [str(place.folder), place.run_digest.hex()]
    command = [sys.executable, "-W", "ignore", "-c", OTHER, *arguments]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "another process spends from" in said.stdout
    with pytest.raises(LorandError, match="another process"):
        opened(place)
    held.close()
    opened(place).close()


def broken(path: Path, how: str) -> None:
    content = json.loads(path.read_text())
    match how:
        case "empty":
            path.write_text("")
            return
        case "cut off":
            path.write_text(path.read_text()[:-9])
            return
        case "no object":
            path.write_text("[]")
            return
        case "another run":
            content["run_digest"] = "00" * 32
        case "another worker":
            content["worker"] = "worker/2"
        case "another format":
            content["format"] = "lorand/budget/v2"
        case "less than nothing":
            content["charged"] = -1
        case "more than there is":
            content["charged"] = 99
        case "a higher limit":
            content["limit"] = 9999
        case "less noise":
            content["release"]["multiplier"] /= 2
        case "another sample rate":
            content["release"]["rate"] = 0.001
        case "another target":
            content["target_epsilon"] = 1e9
        case "an answer that is none":
            content["answer"] = {"asked": [1, 0, 1], "contribution": "//8="}
        case "forgotten":
            content["charged"] = 0
        case "a part is missing":
            del content["limit"]
    path.write_text(json.dumps(content))


DAMAGE: Final = [
    *("empty", "cut off", "no object", "another run", "another worker", "another format"),
    *("less than nothing", "more than there is", "a higher limit", "less noise", "forgotten"),
    *("another sample rate", "another target", "an answer that is none", "a part is missing"),
]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_file_that_cannot_be_relied_upon_ends_it(place: Place, how: str) -> None:
    """It is not replaced by an empty one: what was shown cannot be taken back."""
    life = Life(place)
    life.answer(1)
    life.end()
    broken(life.budget.path, how)
    content = life.budget.path.read_bytes()
    for _ in range(2):
        with pytest.raises(LorandError, match=r"cannot be relied upon: .*sends nothing"):
            opened(place)
        assert life.budget.path.read_bytes() == content


def test_a_file_that_broken_would_leave_is_read(place: Place) -> None:
    life = Life(place)
    life.answer(1)
    life.end()
    broken(life.budget.path, "not at all")
    assert opened(place).account.charged == 1


def test_a_folder_that_cannot_be_written_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LorandError, match=r"cannot keep the privacy budget in .*--state"):
        opened(Place(tmp_path / "file", bytes(32), "one"))


def test_accounts_of_a_folder(tmp_path: Path) -> None:
    names = [("b", b"\2" * 32), ("a", b"\2" * 32), ("c", b"\1" * 32)]
    for name, digest in names:
        data = tmp_path / ("one.csv" if name == "c" else "two.csv")
        Budget(Place(tmp_path, digest, name), CONFIG, data).close()
    assert [account.worker for account in budgets.accounts(tmp_path)] == ["a", "b", "c"]
    same = budgets.of_same_data(tmp_path, tmp_path / "two.csv")
    assert [account.worker for account in same] == ["a", "b"]
    assert budgets.accounts(tmp_path / "nowhere") == []


def test_another_accountants_opinion_is_taken_to_a_thousandth(place: Place) -> None:
    def generous(config: RunConfig) -> Release:
        return plan.release_of(config, plan.planned(config).multiplier * 0.99)

    with pytest.raises(LorandError, match=r"4 rounds at its noise are epsilon 4\.0"):
        Budget(place, CONFIG, place.folder, generous)
