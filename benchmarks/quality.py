"""What bfloat16 passes do to the scalars of a run, and to its accuracy (see benchmarks.forward)."""

import argparse
import random
from typing import Any, Final

import numpy as np
from experiments import federation, uci_sentiment
from numpy.typing import NDArray

from lorand import codec
from lorand.config import RunConfig
from lorand.manifest import run_digest
from lorand_coordinator import optimizer
from lorand_coordinator.aggregation import Report
from lorand_worker.bench import load_base, task_for
from lorand_worker.data import Sampler
from lorand_worker.estimators import Backprop, Spsa, build
from lorand_worker.precision import Precision
from lorand_worker.tasks import Forward

ROUNDS: Final = 20
DIRECTIONS: Final = 64
SCALES: Final = (0.01, 0.001, 0.0002)
"""Perturbation scales: the default, the smallest at which `auto` takes bfloat16, and one below."""
PRECISIONS: Final = (Precision.FLOAT32, Precision.BFLOAT16)
Row = dict[str, Any]


def config_of(kind: str, trainable: str, scale: float = SCALES[0]) -> RunConfig:
    """Return a run of uci_sentiment's kind."""
    return RunConfig.model_validate(
        {
            "run": {"name": "precision", "rounds": ROUNDS},
            "model": {"name": "all-MiniLM-L6-v2", "trainable": trainable},
            "task": {"labels": ("negative", "positive")},
            "directions": {"pool_size": 4096},
            "estimator": {"kind": kind, "batch_size": 16, "perturbation_scale": scale},
            "optimizer": {"kind": "adam", "learning_rate": 5e-4},
            "rounds": {"quorum": 1},
        }
    )


def scalars(trainable: str) -> list[Row]:
    """Compare scalars of a batch in both precisions, before the first round and after the last.

    First order: the cosine of the K scalars with float32's, beside that of another batch's.
    Zeroth order: over 64 directions, correlation with float32's and the spread of the difference
    as a share of the spread of the scalars; and how float32's differ on another batch.
    """
    config = config_of("backprop", trainable)
    base = load_base(config, federation.minilm(), "cpu")
    shards, _ = uci_sentiment.shards_and_test(False)
    plain, half = (task_for(base, config, shards[0], Forward(p)) for p in PRECISIONS)
    backprop = build(config, base.replica, base.loaded.module)
    assert isinstance(backprop, Backprop)
    sampler = Sampler(len(plain), 16, random.Random(0))
    draws = config.draws(run_digest(config.digest(), base.identity))
    state = optimizer.start(config)
    rows = []
    for committed in range(ROUNDS + 1):
        pool = draws.of(committed, 0)
        if committed in (0, ROUNDS):
            batches = [sampler.batch(), sampler.batch()]
            exact = [backprop.measure(plain.loss, batch, pool).values for batch in batches]
            rough = backprop.measure(half.loss, batches[0], pool).values
            row: Row = {"trainable": trainable, "committed": committed}
            row["backprop_cosine"] = round(_cosine(exact[0], rough), 6)
            row["backprop_cosine_other_batch"] = round(_cosine(*exact), 3)
            chosen = np.random.default_rng(committed).choice(4096, DIRECTIONS, replace=False)
            for scale in SCALES:
                spsa = Spsa(base.replica, config_of("spsa", trainable, scale))
                here = [spsa.measure(plain.loss, batch, chosen).values for batch in batches]
                there = spsa.measure(half.loss, batches[0], chosen).values
                row[f"spsa_{scale}"] = _compare(here[0], there, here[1])
            rows.append(row)
        measured = backprop.measure(plain.loss, sampler.batch(), pool).values
        codes = codec.encode(config.codec.up, measured, state.scale_exponent)
        if committed < ROUNDS:
            reports = {0: Report(codes, len(plain))}
            state, _ = optimizer.advance(config, draws, state, committed, reports)
            base.replica.set(state.coefficients)
    return rows


def accuracy(kind: str, seeds: int) -> Row:
    """Return the accuracies of uci_sentiment's run, a seed each, in both precisions."""
    options = uci_sentiment.parse([])
    config = uci_sentiment.settings(kind, options)
    shards, test = uci_sentiment.shards_and_test(False)
    rounds = config.run.rounds
    row: Row = {"kind": kind, "rounds": rounds}
    for precision in PRECISIONS:
        row[precision.value] = [
            round(
                federation.run(
                    config,
                    shards,
                    test,
                    seed=seed,
                    evaluate_at=[rounds],
                    forward=Forward(precision),
                )[-1].score.accuracy,
                4,
            )
            for seed in range(seeds)
        ]
    return row


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def _compare(
    exact: NDArray[np.float64], rough: NDArray[np.float64], other: NDArray[np.float64]
) -> Row:
    spread = float(np.std(exact))
    return {
        "correlation": round(float(np.corrcoef(exact, rough)[0, 1]), 6),
        "noise": round(float(np.std(rough - exact)) / spread, 5),
        "noise_of_another_batch": round(float(np.std(other - exact)) / spread, 2),
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options of benchmarks.forward."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--json", action="store_true", help="print one object")
    result.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    result.add_argument("--seeds", type=int, default=0, help="also train, so many seeds a run")
    return result
