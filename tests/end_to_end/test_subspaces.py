"""Whole runs in subspaces, with real processes: a late worker and a restart end with all others."""

import signal
from typing import Any, Final

import pytest
from tests import tiny
from tests.commands import MakeRoom, Room, committed, wait_for
from tests.end_to_end.test_run import assert_same_bits, connected

from lorand import adapter

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
    "voted": voted("coordinate"),
    "voted-dct-lazy": voted("dct", lazy=True),
}


QUICKEST: Final = ("frugal", "voted")


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
