"""Question: which rule for the direction scales learns fastest by forward passes alone?

Subj (subjective or objective sentence) on all-MiniLM-L6-v2, last two layers and a zero head,
one worker, zeroth order, K = 4,096. The rules: `none` (every tensor alike), `head` (a new head 16
times), `size` (a tensor's root mean square) and `calibrated` (32 training sentences, 8
directions a tensor, once for all seeds). Scored on 1,000 held-out sentences, standard error .012.

    python -m experiments.direction_scales                               # all, 5 seeds
    python -m experiments.direction_scales --rules head size --seeds 0 1 --rounds 50

With several learning rates each is a row: compare the rules at their own best, found with
--held-out on a tenth of the training sentences.
"""

import argparse
import random
from collections.abc import Sequence
from typing import Final

from experiments import federation, record
from lorand.config import RunConfig
from lorand.manifest import Identity
from lorand_worker import sensitivity
from lorand_worker.bench import load_base, task_for
from lorand_worker.data import Examples

RULES: Final = ("none", "head", "size", "calibrated")
EXPERIMENT: Final = record.Experiment(
    name="direction_scales",
    claim=__doc__.split("\n\n")[0],
    tuning="Every setting tried is a row; none was chosen by the test sentences.",
)


def train_and_test(held_out: bool) -> tuple[Examples, Examples]:
    """Return 9,000 sentences and 1,000 others; with `held_out` both out of the 9,000."""
    path = federation.DATA / "subj" / "subj.all"
    # Some sentences hold characters that splitlines() would take for the end of a line.
    lines = path.read_text(encoding="latin-1").strip().split("\n")
    everything = Examples(
        tuple(line[2:].strip() for line in lines), tuple(int(line[0]) for line in lines)
    )
    train, test = federation.shuffled_split(everything)
    return federation.shuffled_split(train) if held_out else (train, test)


def settings(rule: str, options: argparse.Namespace, learning_rate: float) -> RunConfig:
    """Return the run of a rule."""
    return RunConfig.model_validate(
        {
            "run": {"name": f"scales-{rule}", "rounds": options.rounds},
            "model": {"name": "all-MiniLM-L6-v2", "trainable": "last:2"},
            "task": {"labels": ("objective", "subjective")},
            "directions": {
                "scale_rule": "head" if rule == "none" else rule,
                "head_scale": 1.0 if rule == "none" else 16.0,
            },
            "estimator": {
                "kind": "spsa",
                "batch_size": options.batch_size,
                "directions_per_round": options.directions,
            },
            "optimizer": {"learning_rate": learning_rate},
            "rounds": {"quorum": 1},
        }
    )


def calibrated(config: RunConfig, train: Examples) -> Identity:
    """Return the identity with scales measured on training sentences; show them."""
    plain = sensitivity.uncalibrated(config)
    base = load_base(plain, federation.minilm(), "cpu")
    few = federation.subset(train, range(1000))
    found = sensitivity.measure(base, plain, task_for(base, plain, few), random.Random(0))
    identity = sensitivity.identity(base, found)
    for row, tensor in zip(found, identity.manifest.tensors, strict=True):
        print(f"  {row.name}: G {row.gradient:.3g}, h {row.curvature:.3g}, {tensor.scale_exponent}")
    return identity


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line, or these arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--rules", nargs="+", choices=RULES, default=list(RULES))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--rounds", type=int, default=100)
    add("--batch-size", type=int, default=16)
    add("--directions", type=int, default=4, help="a round: two forward passes each")
    add("--learning-rate", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    add("--held-out", action="store_true", help="tune: score a tenth of the training sentences")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure one row a rule and learning rate."""
    options = parse()
    train, scored = train_and_test(options.held_out)
    theirs: Identity | None = None
    for rule in options.rules:
        for learning_rate in options.learning_rate:
            config = settings(rule, options, learning_rate)
            if rule == "calibrated" and theirs is None:
                theirs = calibrated(config, train)
            EXPERIMENT.measure(
                f"{rule}, rate {learning_rate:g}, {options.rounds} rounds, "
                f"{options.directions} x {options.batch_size}",
                config,
                lambda seed: ([train], scored),
                scored_on=record.HELD_OUT if options.held_out else record.TEST,
                seeds=options.seeds,
                evaluate_at=sorted({0, options.rounds // 4, options.rounds // 2, options.rounds}),
                theirs=theirs if rule == "calibrated" else None,
                quick=True,
            )


if __name__ == "__main__":
    main()
