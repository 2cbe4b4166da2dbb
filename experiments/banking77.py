"""Claim: one bit a scalar each way fine-tunes 77 classes over ten non-IID workers, .89 or better.

Banking77 on all-MiniLM-L6-v2, last two layers and a zero head trained; the training sentences are
split over ten workers by label-Dirichlet 0.5; K = 65,536 scalars a round as one bit up (8 KB) and
one bit down (8 KB), 120 rounds of at most 64 examples. The strict reading of "64 examples" is all
ten workers together (6 each), the loose one 64 each:

    python -m experiments.banking77                                # strict, 3 seeds
    python -m experiments.banking77 --batch-size 64 --seeds 0      # loose
    python -m experiments.banking77 --up int32 --down int32 --seeds 0 1    # exact codes

About 2 minutes a seed strict and 8 loose on one core. Settings were
tuned with --held-out, which trains on nine tenths of the training sentences and scores the rest.
"""

import argparse
import csv
from collections.abc import Sequence

import numpy as np

from experiments import federation, record
from lorand.config import RunConfig
from lorand_worker.data import Examples

WORKERS = 10
CONCENTRATION = 0.5
TARGET = 0.89
EXPERIMENT = record.Experiment(
    name="banking77",
    claim=__doc__.split("\n\n")[0],
    tuning="A row of 6 x 10 takes at most 64 examples a round in total, the strict reading; one of "
    "64 x 10 takes 64 for each worker, the loose one. A seed moves the split and the batches; the "
    "pool stays. Tuned on a tenth of the training data, one seed a setting: every full-length "
    "setting tried is a row of the second table.",
)


def read(name: str, labels: Sequence[str] = ()) -> tuple[Examples, tuple[str, ...]]:
    """Return the examples of a file and its labels, sorted (or those given)."""
    path = federation.DATA / "banking77" / name
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    known = tuple(labels) or tuple(sorted({label for _, label in rows}))
    place = {label: position for position, label in enumerate(known)}
    texts = tuple(text for text, _ in rows)
    return Examples(texts, tuple(place[label] for _, label in rows)), known


def dirichlet(examples: Examples, workers: int, concentration: float, seed: int) -> list[Examples]:
    """Split by label: each class is dealt out by its own Dirichlet draw, every example once.

    Drawn again, from the same generator, until every worker has an example (Hsu et al.,
    arXiv:1909.06335, section 3).
    """
    source = np.random.default_rng(seed)
    labels = np.asarray(examples.labels)
    while True:
        places: list[list[int]] = [[] for _ in range(workers)]
        for label in range(int(labels.max()) + 1):
            members = source.permutation(np.flatnonzero(labels == label))
            shares = source.dirichlet(np.full(workers, concentration))
            cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for place, part in zip(places, np.split(members, cuts), strict=True):
                place.extend(part.tolist())
        if all(places):
            return [federation.subset(examples, place) for place in places]


def settings(options: argparse.Namespace, labels: Sequence[str]) -> RunConfig:
    """Return the run of the command line."""
    return RunConfig.model_validate(
        {
            "run": {"name": "banking77", "rounds": options.rounds},
            "model": {
                "name": "all-MiniLM-L6-v2",
                "trainable": "last:2",
                "max_length": options.max_length,
            },
            "task": {"labels": labels, "label_column": "category"},
            "directions": {"pool_size": options.pool_size, "head_scale": options.head_scale},
            "estimator": {"kind": "backprop", "batch_size": options.batch_size},
            "codec": {"up": options.up, "down": options.down},
            "optimizer": {
                "kind": "adam",
                "learning_rate": options.learning_rate,
                "beta1": options.beta1,
                "beta2": options.beta2,
            },
            "rounds": {"quorum": WORKERS, "weighting": options.weighting},
        }
    )


def parse() -> argparse.Namespace:
    """Return the command line; the defaults are the final settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--rounds", type=int, default=120)
    add("--batch-size", type=int, default=6, help="examples a worker a round")
    add("--learning-rate", type=float, default=1e-3)
    add("--beta1", type=float, default=0.9)
    add("--beta2", type=float, default=0.999)
    add("--head-scale", type=float, default=16.0)
    add("--max-length", type=int, default=48)
    add("--pool-size", type=int, default=65_536)
    add("--up", default="sign")
    add("--down", default="sign")
    add("--weighting", default="equal")
    add("--held-out", action="store_true", help="tune: score a tenth of the training sentences")
    return parser.parse_args()


def main() -> None:
    """Measure one row."""
    options = parse()
    train, labels = read("train.csv")
    test, _ = read("test.csv", labels)
    if options.held_out:
        train, test = federation.shuffled_split(train)

    def data(seed: int) -> tuple[list[Examples], Examples]:
        return dirichlet(train, WORKERS, CONCENTRATION, seed), test

    marks = sorted({0, options.rounds // 6, options.rounds // 2, options.rounds})
    row = (
        f"{options.rounds} rounds, {options.batch_size} x {WORKERS} examples, "
        f"{options.up} up, {options.down} down, "
        f"K = {options.pool_size:,}, rate {options.learning_rate:g}, "
        f"beta {options.beta1:g}/{options.beta2:g}, head x{options.head_scale:g}, "
        f"{options.weighting} weights, {options.max_length} tokens"
    )
    EXPERIMENT.measure(
        row,
        settings(options, labels),
        data,
        scored_on=record.HELD_OUT if options.held_out else record.TEST,
        seeds=options.seeds,
        evaluate_at=marks,
        target=None if options.held_out else TARGET,
    )


if __name__ == "__main__":
    main()
