"""Zeroth- and first-order workers in one run, over real gRPC."""

from pathlib import Path
from typing import Any

import pytest
from tests import tiny

import lorand
from lorand.errors import ConfigError
from lorand_worker.own_estimator import OwnEstimator

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDS = 4


class Heard:
    """Keeps what a worker tells its owner."""

    def __init__(self) -> None:
        self.notes = ""

    def note(self, text: str) -> None:
        """Take a sentence."""
        self.notes += text + "\n"

    def progress(self, committed: int, total: int, text: str) -> None:
        """Take progress."""


def test_forward_and_backward_passes_answer_the_same_rounds(
    tiny_model: Path, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    config = tiny.config(
        "spsa",
        run={"rounds": ROUNDS},
        estimator={"mixed": True},
        rounds={"quorum": 2, "start_with": 2, "deadline_s": 60.0},
    )
    first, zeroth = Heard(), Heard()
    shared: dict[str, Any] = {"model": tiny_model, "state": tmp_path, "insecure": True}
    with lorand.Coordinator(config, identity=lorand.prepare(config, tiny_model)) as coordinator:
        address, own = coordinator.address, OwnEstimator.BACKPROP
        with (
            lorand.Worker(
                *(address, tiny_data["hotels"]), name="a", estimator=own, report=first, **shared
            ) as one,
            lorand.Worker(address, tiny_data["gadgets"], name="b", report=zeroth, **shared) as two,
        ):
            results = [worker.wait(timeout_s=60) for worker in (one, two)]
    assert [result.contributions for result in results] == [ROUNDS, ROUNDS]
    assert results[0].weights_digest == results[1].weights_digest
    assert "measured with backprop here" in first.notes
    assert "backprop" not in zeroth.notes


def test_where_the_run_is_not_mixed_a_worker_says_so(
    tiny_model: Path, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    config = tiny.config("spsa")
    with lorand.Coordinator(config, identity=lorand.prepare(config, tiny_model)) as coordinator:
        worker = lorand.Worker(
            *(coordinator.address, tiny_data["hotels"]),
            model=tiny_model,
            insecure=True,
            state=tmp_path,
            estimator=OwnEstimator.BACKPROP,
        )
        with worker, pytest.raises(ConfigError, match="join without --estimator"):
            worker.wait(timeout_s=60)
