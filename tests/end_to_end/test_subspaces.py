"""Whole runs in subspaces, with real processes: a late worker and a restart end with all others.

One of them finds out that its subspace does not pay, and gives it up.
"""

import random
import signal
from pathlib import Path
from typing import Any, Final

import pytest
from tests import tiny
from tests.commands import MakeRoom, Room, committed, wait_for
from tests.end_to_end.test_run import assert_same_bits, connected

from lorand import adapter, ledger
from lorand.subspaces import periods
from lorand_coordinator.payoff import SIDE

COMMON: Final[dict[str, dict[str, Any]]] = {
    "run": {"rounds": 16},
    "rounds": {"quorum": 2, "start_with": 2, "deadline_s": 60.0},
}
FIRST_ORDER: Final[dict[str, Any]] = {
    "estimator": {"batch_size": 16},
    "local": {"steps": 2, "space": "weights", "optimizer": "AdamW", "learning_rate": 0.01},
    "optimizer": {"kind": "sgd", "learning_rate": 1.0, "normalise": False},
    "codec": {"up": "int8", "down": "int8"},
}


def drawn(kind: str, rotate: int = 4, **more: Any) -> tiny.Settings:
    """A zeroth-order run whose columns everybody draws."""
    subspace = {"kind": kind, "rank": 4, "refresh_every": 4, **more}
    return tiny.settings("spsa", **COMMON, directions={"rotate_every": rotate}, subspace=subspace)


def voted(kind: str, **more: Any) -> tiny.Settings:
    """A first-order run with local steps in a subspace that its participants elect."""
    subspace = {"kind": kind, "rank": 4, "selection": "voted", "refresh_every": 3, **more}
    directions = {"rotate_every": 3, "pool_size": 1024}
    return tiny.settings(
        "backprop", **COMMON, **FIRST_ORDER, directions=directions, subspace=subspace
    )


RUNS: Final = {
    "coordinate": drawn("coordinate"),
    "dct": drawn("dct"),
    "adam": drawn("dct", rotate=1, state="adam"),
    "frugal": drawn("coordinate", rotate=1, state="frugal"),
    "fira": drawn("coordinate", rotate=1, state="fira"),
    "int8": drawn("dct", weights="int8-stochastic"),
    "welore": drawn("coordinate", rank_rule="welore"),
    "voted": voted("coordinate"),
    "voted-dct-lazy": voted("dct", lazy=True),
}


QUICKEST: Final = ("voted",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICKEST else pytest.mark.slow) for n in RUNS]
)
def test_late_and_restarted_in_a_subspace(make_room: MakeRoom, name: str) -> None:
    """One worker comes late, one is killed and comes back: all weights have the same bits."""
    room = make_room(RUNS[name]).lock()
    with room.coordinator() as (_, address):
        first, second, third = tiny.DOMAINS
        workers = [room.join(address, domain) for domain in (first, second)]
        wait_for(lambda: committed(address) >= 5, "the run moves past a refresh")
        workers[0].signal(signal.SIGKILL)
        late = room.join(address, "late", data=third)
        wait_for(lambda: connected(address, "late"), "the late worker joins")
        back = room.join(address, first)
        results = [worker.result() for worker in (workers[1], back, late)]
    assert results[-1]["contributions"] >= 1
    assert_same_bits(room, results)
    assert_exported(room, results[0]["weights_digest"])


def assert_exported(room: Room, digest: str) -> None:
    """The adapter holds all that rebuilds the weights."""
    folder = room.folder / "adapter"
    wrote = room.once(
        "lr-worker", "export", room.export(), folder, "--merged", "--model", room.model
    )
    assert wrote["weights_digest"] == digest
    kept = adapter.load(folder)
    assert (len(kept.elections.bases) > 0) == (kept.config.subspace.selection == "voted")


PERIOD: Final = 8
"""Rounds of a subspace that does not pay."""
DECIDED: Final = periods.PROBE_EVERY + SIDE + 1
"""The first period that may be given up: a second probe was compared before it."""
DOES_NOT_PAY: Final = tiny.settings(
    "spsa",
    run={"name": "tiny-bad-subspace", "rounds": PERIOD * DECIDED + 6},
    model={"trainable": "name:(word|position)_embeddings"},
    task={"kind": "label-words", "template": "{text} {mask}", "label_words": ["noisy", "superb"]},
    directions={"rotate_every": PERIOD},
    estimator={"batch_size": 32, "directions_per_round": 8},
    optimizer={"learning_rate": 1e-5, "schedule": "constant"},
    rounds={"quorum": 2, "start_with": 2, "deadline_s": 60.0},
    subspace={
        "kind": "coordinate",
        "rank": 1,
        "targets": "word_embeddings",
        "probe": True,
        "switch_off": True,
    },
)
"""The model prefers the word that is seldom right, and texts say nothing: nearly all of the
gradient is that of the mask's own row of words, which the subspace has one of 32 columns of.
Positions, which it keeps whole, differ from text to text: they carry little of it, but much of the
curvature.
At this rate the run stays where it is: alpha is .08, h .35 and kappa .2.
"""


def wordless(folder: Path, name: str) -> Path:
    """Texts of 1 to 18 words that say nothing of their labels, of which one is the rarer."""
    source = random.Random(name)
    rows = [
        (" ".join(source.choices(tiny.FILLER, k=1 + i % 18)), tiny.LABELS[i // 18 % 3 == 2])
        for i in range(180)
    ]
    return tiny.write_csv(folder / f"{name}.csv", rows)


@pytest.mark.slow
def test_a_subspace_that_does_not_pay_is_given_up(
    make_room: MakeRoom, masked_model: Path, tmp_path: Path
) -> None:
    """Probes tell; all go on in full space, a worker among them that joins after that."""
    room = make_room(DOES_NOT_PAY, model=masked_model).lock()
    room.data = {name: wordless(tmp_path, name) for name in tiny.DOMAINS}
    first, second, third = tiny.DOMAINS
    with room.coordinator() as (_, address):
        workers = [room.join(address, name) for name in (first, second)]
        over = PERIOD * DECIDED
        wait_for(lambda: committed(address) >= over, "two probes are compared", 240.0)
        late = room.join(address, third)
        results = [worker.result() for worker in (*workers, late)]
    assert_same_bits(room, results)
    position = ledger.replay(ledger.read_file(room.export()))
    assert position.elections.given_up == DECIDED
    assert position.pool(len(position.closed)).basis is None
    told = room.once("lr-coordinator", "diagnose", room.ledger)
    assert told["subspace"]["given_up"] is True
    assert "the run has given it up and goes on in full space" in " ".join(told["findings"])
    assert_exported(room, results[0]["weights_digest"])
