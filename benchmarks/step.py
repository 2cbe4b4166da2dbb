"""A whole zeroth-order step on MiniLM against two bare forward passes."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from experiments.federation import minilm

from lorand import config as run_config
from lorand_worker import estimators
from lorand_worker.bench import load_base, task_for
from lorand_worker.data import Examples

BATCH = 16
LENGTHS = (128, 32)
"""Tokens a text: the most that a run takes by default, and a short review."""
RUN = """
[run]
name = "step"
rounds = 1
[model]
name = "all-MiniLM-L6-v2"
trainable = "all"
[task]
labels = ["a", "b"]
[estimator]
kind = "spsa"
batch_size = 16
directions_per_round = 1
[optimizer]
learning_rate = 0.001
[rounds]
quorum = 1
"""


def overhead(turns: int) -> dict[str, float]:
    """Return by how much a step is longer than two forward passes of its batch, for each length.

    A step: adopt the round's coefficients, measure one direction (all 22.7 million weights moved
    up, a forward pass, moved down, a forward pass). Both are run in turns on the same batch.
    """
    result = {}
    for length in LENGTHS:
        bare, step = _calls(length)
        shares, times = [], []
        for turn in range(turns + 1):
            seconds = [_seconds(call) for call in (bare, step)]
            if turn:
                shares.append(seconds[1] / seconds[0] - 1)
                times.append(seconds[0] * 1e3)
        place = "" if length == LENGTHS[0] else f"_length{length}"
        result[f"zo_step_overhead{place}"] = statistics.median(shares)
        result[f"two_forwards_ms{place}"] = statistics.median(times)
    return result


def _calls(length: int) -> tuple[Callable[[], None], Callable[[], None]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        path.write_text(RUN)
        config = run_config.load(path)
    base = load_base(config, minilm(), "cpu")
    texts = tuple("good " * (length - 2) for _ in range(BATCH))
    task = task_for(base, config, Examples(texts, (0, 1) * (BATCH // 2)))
    estimator = estimators.build(config, base.replica, base.loaded.module)
    batch, coefficients = list(range(BATCH)), np.zeros(config.directions.pool_size, np.int64)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(2):
            float(task.loss(batch))

    def step() -> None:
        nonlocal coefficients
        coefficients = coefficients.copy()
        coefficients[7] += 1
        base.replica.set(coefficients)
        estimator.measure(task.loss, batch, np.array([5]))

    return bare, step


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
