"""Runs of which only the noisy sum is kept: what the ledger holds, and who adds which noise."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
from tests.unit.summing.party import BATCH, MULTIPLIER, Party, run

from lorand import codec
from lorand.privacy import plan
from lorand.privacy.mechanism import GRID, Integers
from lorand.privacy.secure_sum import masked_bytes
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.store import StoreUnavailable
from lorand_coordinator.summing import EVERYONE
from lorand_worker import budget as budgets

MODES: Final = ["central", "secure-sum"]


@pytest.mark.parametrize("mode", MODES)
def test_the_ledger_holds_the_noisy_mean_and_nobodys_own(
    mode: str, make: Callable[..., Party]
) -> None:
    party = make(mode)
    commits = party.commits()
    assert len(commits) == 6
    assert party.sequencer.engine.phase == "finished"
    benches = [life.bench for life in party.lives]
    for number, (entry, stored) in enumerate(commits):
        assert list(entry.commit.workers) == [1, 2, 3]
        (kept,) = stored
        assert kept.worker == EVERYONE
        assert {f.name for f, _ in kept.contribution.ListFields()} <= {"round_index", "codes"}
        codes = codec.unpack("int32", kept.contribution.codes, 3)
        mean = codec.decode("int32", codes, entry.commit.scale_exponent)
        total = np.sum([bench.released[number] for bench in benches], axis=0)
        away = mean - total * 0.5 / GRID / BATCH / 3
        noise = MULTIPLIER * 0.5 / BATCH / 3
        if mode == "secure-sum":
            assert np.abs(away).max() < 2.0**-20, "its noise is in what was released"
        else:
            assert 0 < np.abs(away).max() < 8 * noise
    charged = [budgets.read(life.budget.path).charged for life in party.lives]
    assert charged == [6, 6, 6]
    sizes = {len(request.SerializeToString()) for _, request in party.log}
    assert max(sizes) <= 16 + (8 * 3 if mode == "central" else masked_bytes(3))
    heads = {life.participant.position.head for life in party.lives}
    assert heads == {party.sequencer.store.head()}


@pytest.mark.parametrize("mode", MODES)
def test_a_coordinator_that_was_started_again_has_the_same_state(
    mode: str, make: Callable[..., Party]
) -> None:
    party = make(mode)
    again = party.coordinator()
    assert again.position is not None
    assert party.sequencer.position is not None
    assert again.position.head == party.sequencer.position.head
    ours, theirs = again._optimizer, party.sequencer._optimizer
    assert ours.scale_exponent == theirs.scale_exponent
    assert ours.feedback.tolist() == theirs.feedback.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_a_commit_that_is_tried_again_is_the_same_release(
    mode: str, make: Callable[..., Party], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails must not get the same sum with other noise."""
    party = make(mode, joined=2)
    tried: list[tuple[bytes, ...]] = []
    append = party.store.append

    def failing(entry: pb.Entry, contributions: Any = ()) -> tuple[bytes, bytes]:
        if entry.HasField("commit"):
            tried.append((entry.commit.codes, *contributions))
            if len(tried) < 3:
                raise StoreUnavailable("the disk is full")
        return append(entry, contributions)

    monkeypatch.setattr(party.store, "append", failing)
    party.connect(party.start("worker-3"))
    for _ in range(3):
        party.tick(1.1)
    assert len(tried) >= 3
    assert tried[0] == tried[1] == tried[2]


def test_central_noise_covers_whoever_is_there(make: Callable[..., Party]) -> None:
    """A worker that is late costs nothing: the sum is that of the others, with noise as ever."""
    party = make("central", joined=0, quorum=2, start_with=3)
    party.lost = lambda name, request: name == "worker-2"
    for number in (1, 2, 3):
        party.connect(party.start(f"worker-{number}"))
    party.tick(10.1)
    entry, stored = party.commits()[0]
    assert len(entry.commit.workers) == 2
    assert len(stored) == 1


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        (np.zeros(2, np.int64), "3 numbers of a sum take 24 bytes, not 16"),
        (np.array([0, 4 * BATCH * GRID + 1, 0]), "beyond"),
        (np.array([0, -(2**63), 0]), "beyond"),
    ],
)
def test_central_sums_are_checked(numbers: Integers, why: str, make: Callable[..., Party]) -> None:
    party = make("central", joined=2)
    party.lost = lambda name, request: True
    party.connect(party.start("worker-3"))
    sent = pb.Contribution(round_index=1, sum=numbers.astype("<i8").tobytes())
    request = wire.ParticipateRequest(contribution=sent)
    (answer,) = party.sequencer.receive(1, request, party.now)
    assert why in answer.message.rejection.reason
    assert party.sequencer.engine.contributions == {}


# ------------------------------------------------------------- who adds which noise


def test_a_workers_share_of_the_noise() -> None:
    central = plan.mechanism(run("central"), 3.0)
    assert not central.adds_noise
    shared = plan.mechanism(run("secure-sum"), 3.0)
    assert shared.adds_noise
    assert shared.noise_steps == pytest.approx(3.0 / np.sqrt(2) * GRID)
    whole = plan.whole(run("secure-sum"), 3.0)
    assert whole.noise_steps == 3 * GRID
    alone = plan.mechanism(run("worker"), 3.0)
    assert (alone.noise_steps, alone.largest) == (3 * GRID, 0)


def test_numbers_are_kept_within_their_bound_before_the_noise() -> None:
    """Distances between sums only become shorter, so that the noise is still enough."""
    mechanism = plan.mechanism(run("central"), 3.0)
    most = 4 * BATCH * GRID
    assert mechanism.largest == most == plan.largest_number(run("central"), 3.0)
    vectors = np.zeros((5 * BATCH, 3))
    vectors[:, 0] = 0.5
    assert mechanism.steps(vectors).tolist() == [most, 0, 0]
    assert mechanism.steps(-vectors).tolist() == [-most, 0, 0]


def test_shares_fit_the_bound_of_a_number() -> None:
    config = run("secure-sum")
    shared = plan.mechanism(config, MULTIPLIER)
    bound = plan.largest_number(config, MULTIPLIER)
    assert bound >= shared.largest + 16 * shared.noise_steps
    near = plan.largest_number(config, MULTIPLIER * (1 + 1e-12))
    assert near in (bound, 2 * bound - shared.largest, bound)
    between = {plan.largest_number(config, m) for m in np.linspace(2.1, 3.9, 7)}
    assert len(between) == 1, "whoever calculated the multiplier to another last digit"


def test_a_coordinator_needs_no_extra_for_runs_without_sums() -> None:
    """It is installed without the library that counts epsilon."""
    program = "import sys, lorand_coordinator.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "lorand_coordinator.sequencer" in loaded
    assert not {"dp_accounting", "scipy", "torch"} & set(loaded)
