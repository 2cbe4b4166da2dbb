"""Experiments on a head alone: the library's own losses, and the same workers asked by all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from experiments import averaging, federation, grid, head_inputs
from experiments.grid import Method, Task
from experiments.settings import Overrides
from tests import tiny

from lorand import wire_size
from lorand.config import ModelSection, RunConfig
from lorand_coordinator import optimizer, rounds
from lorand_coordinator.aggregation import Report
from lorand_worker.data import Examples

pytestmark = pytest.mark.usefixtures("one_thread")

WORKERS: Final = 3
SECTION: Final[dict[str, Any]] = {"name": "tiny", "trainable": head_inputs.ALONE}


@pytest.fixture(autouse=True)
def _on_a_tiny_model(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "minilm", lambda: tiny_model)
    monkeypatch.setattr(head_inputs, "_known", {})


def examples(seed: int, count: int = 16) -> Examples:
    """Examples of several lengths."""
    content = tiny.rows("hotels", count, seed=seed)
    return Examples(
        tuple(text for text, _ in content), tuple(tiny.LABELS.index(label) for _, label in content)
    )


SHARDS: Final = [examples(seed, 16 + 8 * seed) for seed in range(WORKERS)]
SCORED: Final = examples(9, 40)


def config_for(**changes: dict[str, Any]) -> RunConfig:
    """A first-order run of few rounds on the head."""
    content: Overrides = {
        "model": SECTION,
        "run": {"rounds": 4},
        "optimizer": {"learning_rate": 0.002},
    }
    return tiny.config("backprop", **content | changes)


STEPS: Final = {
    "local": {"epochs": 1, "space": "weights", "optimizer": "AdamW"},
    "optimizer": {"kind": "sgd", "learning_rate": 1.0, "normalise": False},
    "directions": {"head_scale": 1.0},
}


@pytest.mark.parametrize("changes", [{}, STEPS], ids=["gradients", "steps"])
def test_a_run_by_the_short_cut_is_the_run(changes: Overrides) -> None:
    config = config_for(**changes)
    own, short = (
        federation.run(config, SHARDS, SCORED, seed=1, evaluate_at=[0, 4], quick=quick)
        for quick in (False, True)
    )
    assert own[-1].score.loss < own[0].score.loss - 0.01
    for one, other in zip(own, short, strict=True):
        assert other.score.loss == pytest.approx(one.score.loss, abs=1e-3)


def test_a_round_asks_whom_the_engine_would(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, advance = [], optimizer.advance

    def spy(*given: Any) -> Any:
        reports: Mapping[int, Report] = given[4]
        asked.append(list(reports))
        return advance(*given)

    monkeypatch.setattr(optimizer, "advance", spy)
    config = config_for(rounds={"quorum": 2, "start_with": 0, "participants": 2})
    points = federation.run(config, SHARDS, SCORED, seed=5, evaluate_at=[4], quick=True)
    key = federation.sampling_key(5)
    assert asked == [sorted(rounds.sample(key, 2, r, range(WORKERS))) for r in range(4)]
    assert len({tuple(each) for each in asked}) > 1
    size = federation.payload(config, 2)
    assert points[-1].bytes_up == round(4 * 2 / 3 * size["bytes_up_a_worker_round"])
    assert points[-1].bytes_down == 4 * size["bytes_down_a_worker_round"]


def test_fedavg_of_one_worker_is_that_workers_training() -> None:
    """Whole shards a batch, so that batches are the same whoever draws them."""
    section = ModelSection.model_validate(SECTION)

    def train(shards: list[Examples], participants: int) -> list[federation.Point]:
        return averaging.fedavg(
            section,
            shards,
            SCORED,
            labels=2,
            learning_rate=0.01,
            rounds=1,
            seed=5,
            batch_size=64,
            participants=participants,
        )

    (worker,) = rounds.sample(federation.sampling_key(5), 1, 0, range(WORKERS))
    sampled, alone = train(SHARDS, 1), train([SHARDS[worker]], 0)
    others = train([SHARDS[(worker + 1) % WORKERS]], 0)
    assert sampled[-1].score.loss == pytest.approx(alone[-1].score.loss, abs=1e-5)
    assert sampled[-1].score.loss != pytest.approx(others[-1].score.loss, abs=1e-5)
    assert sampled[-1].bytes_up == round(alone[-1].bytes_up / WORKERS)


def test_a_grid_counts_messages_of_who_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Task, "split", lambda *_, **__: (SHARDS, SCORED))
    changes: Overrides = {"model": SECTION, "rounds": {"quorum": 1, "participants": 1}}
    task = Task("subj", WORKERS)
    peer = Method((0.01,), 3, peer="fedavg", changes=changes)
    weights = 2 * 32 + 2
    one = wire_size.on_socket(4 * weights)
    assert grid.run(task, peer, 0.01, 0, "report")[-1].bytes_up == one
    ours = Method((0.01,), 3, preset="lorand-fo", changes=changes)
    size = wire_size.of_round(grid.config_of(task, ours, 0.01), 1)
    last = grid.run(task, ours, 0.01, 0, "report")[-1]
    assert (last.bytes_up, last.bytes_down) == (size.up.socket, 3 * size.down.socket)
