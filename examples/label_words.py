"""Label words: a masked language model says "great" or "terrible", by forward passes alone.

A coordinator and its workers as threads of this process, which talk over real gRPC as machines do.
There is no new head: the model's own vocabulary answers, at one place of a prompt.

    python -m examples.label_words
    python -m examples.label_words --model FOLDER --rounds 4 --words terrible great
"""

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from transformers import AutoModelForMaskedLM

import lorand
from lorand import adapter
from lorand.ledger import Position

DATA = Path(__file__).resolve().parent.parent / "deploy" / "demo" / "data"
SITES = ("hotels", "gadgets", "restaurants")
MODEL = "distilbert/distilroberta-base"
RUN = """
[run]
name = "words"
rounds = {rounds}
[model]
name = "{model}"
trainable = "last:2"
max_length = 64
[task]
kind = "label-words"
labels = ["negative", "positive"]
template = "{{text}} It was {{mask}}."
label_words = ["{negative}", "{positive}"]
[estimator]
kind = "spsa"              # two losses a direction, no backward pass
batch_size = 16
directions_per_round = 8
[optimizer]
learning_rate = 0.001
[rounds]
quorum = 2
start_with = 3
"""
TIMEOUT_S = 3600.0


def main(arguments: Sequence[str] | None = None) -> Position:
    """Serve, join three times, wait, and put the adapter on the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL, help="a name on the hub, or a folder")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--words", nargs=2, default=["terrible", "great"])
    options = parser.parse_args(arguments)
    negative, positive = options.words
    run = RUN.format(
        rounds=options.rounds, model=options.model, negative=negative, positive=positive
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        # 1. The coordinator has no model: what identifies it is prepared where there is one.
        coordinator = stack.enter_context(lorand.Coordinator(run, identity=lorand.prepare(run)))

        # 2. A worker a site; on other machines this is `lr-worker join`.
        workers = [
            stack.enter_context(
                lorand.Worker(
                    coordinator.address,
                    DATA / f"{site}-train.csv",
                    name=site,
                    insecure=True,  # all on this machine
                    state=Path(folder),
                )
            )
            for site in SITES
        ]
        for worker in workers:
            print(worker.wait(TIMEOUT_S).text())
        position = coordinator.position

    # 3. The model of the run, as transformers knows it.
    model = AutoModelForMaskedLM.from_pretrained(options.model)
    model = lorand.load_adapter(model, adapter.of(position))
    model = lorand.merge_and_unload(model)
    print(f"{type(model).__name__} after {position.committed} rounds, ledger {position.head.hex()}")
    return position


if __name__ == "__main__":
    main()
