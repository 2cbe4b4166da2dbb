"""A federation of 1,000 virtual workers in one process: 50 rounds of a head on MiniLM.

Banking77 on all-MiniLM-L6-v2 with frozen layers, a linear head of 77 classes trained by one
backward pass a round and worker: 4,096 scalars of one bit up and down. Every worker has ten of the
training sentences, dealt out at random; the test sentences are scored at the end. Seconds are those
of `lorand.simulate`, from loading the model to the last score; memory is the largest resident set
of the process. With other work on the machine one thread is faster than two: OMP_NUM_THREADS=1.
Command: python -m benchmarks.simulate --json
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments import banking77, federation
from experiments.provenance import provenance

import lorand
from lorand.config import RunConfig

RESULTS = Path(__file__).parent / "results" / "simulate.json"
EXAMPLES = 10


def config_of(workers: int, rounds: int, labels: tuple[str, ...]) -> RunConfig:
    """Return the run's settings."""
    return RunConfig.model_validate(
        {
            "run": {"name": "simulate", "rounds": rounds},
            "model": {
                "name": "all-MiniLM-L6-v2",
                "trainable": "name:^head",
                "max_length": 48,
            },
            "task": {"labels": labels, "label_column": "category"},
            "estimator": {"kind": "backprop", "batch_size": 5},
            "codec": {"up": "sign", "down": "sign"},
            "optimizer": {"kind": "adam", "learning_rate": 0.001},
            "rounds": {"quorum": workers, "start_with": workers},
        }
    )


def measure(workers: int, rounds: int) -> dict[str, Any]:
    """Run the federation once; return what it took and where it led."""
    train, labels = banking77.read("train.csv")
    test, _ = banking77.read("test.csv", labels)
    order = np.random.default_rng(0).permutation(len(train))[: EXAMPLES * workers]
    shards = [federation.subset(train, part.tolist()) for part in np.split(order, workers)]
    marks = [time.perf_counter()]
    made = lorand.simulate(
        config_of(workers, rounds, labels),
        shards,
        model=federation.minilm(),
        test=test,
        seed=0,
        device="cpu",
        report=lambda _: marks.append(time.perf_counter()),
    )
    seconds = time.perf_counter() - marks[0]
    score = made.score
    assert score is not None
    return {
        "workers": workers,
        "examples_a_worker": EXAMPLES,
        "rounds": rounds,
        "scalars": made.position.config.num_directions,
        "seconds": round(seconds, 1),
        "seconds_to_the_first_commit": round(marks[1] - marks[0], 1),
        "rounds_a_second_after_it": round((rounds - 1) / (marks[-1] - marks[1]), 2),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "accuracy": round(score.accuracy, 4),
        "loss_of_round_1": made.rounds[0].loss,
        "loss_of_the_last_round": made.rounds[-1].loss,
        "ledger_head": made.position.head.hex(),
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", action="store_true", help="also print the results")
    arguments = parser.parse_args()
    found = measure(arguments.workers, arguments.rounds)
    content = {
        "provenance": {
            **provenance(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg(),
        },
        **found,
    }
    if (arguments.workers, arguments.rounds) == (1000, 50):
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(content))


if __name__ == "__main__":
    main()
