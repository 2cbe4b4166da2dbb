"""A classifier: three sites, each with reviews of its own kind, and a new head on an encoder.

The whole federation runs in this process, which is how to try out data and settings before there
are machines. What comes out is a file of some kilobytes, put on a fresh copy of the model here.

    python -m examples.classification
    python -m examples.classification --model FOLDER --rounds 4
"""

import argparse
import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import lorand

DATA = Path(__file__).resolve().parent.parent / "deploy" / "demo" / "data"
SITES = ("hotels", "gadgets", "restaurants")
LABELS = ("negative", "positive")
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
RUN = """
[run]
name = "reviews"
rounds = {rounds}
[model]
name = "{model}"
trainable = "last:2"       # the last two layers, and the new head
max_length = 48
[task]
labels = ["negative", "positive"]
[estimator]
kind = "backprop"          # one backward pass a round
batch_size = 16
[codec]
up = "sign"                # one bit a scalar, each way
down = "sign"
[optimizer]
kind = "adam"
learning_rate = 0.001
[rounds]
quorum = 2                 # a round may go on without one of the three
start_with = 3
"""


def main(arguments: Sequence[str] | None = None) -> lorand.Simulation:
    """Train, save, load again, and ask."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL, help="a name on the hub, or a folder")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)

    # 1. Each site has a file with the columns text and label.
    shards = [DATA / f"{site}-train.csv" for site in SITES]

    # 2. Train: virtual workers measure, the coordinator commits, everyone follows.
    trained = lorand.simulate(
        RUN.format(rounds=options.rounds, model=options.model),
        shards,
        test=DATA / "hotels-test.csv",
        evaluate_every=5,
        report=lambda made: print(
            f"round {made.committed}: loss {made.loss:.4f}", made.score or ""
        ),
    )

    # 3. Keep what was learned, and put it on the model as transformers loads it.
    with tempfile.TemporaryDirectory() as folder:
        size = trained.save(folder)
        print(f"the adapter has {size:,} bytes")
        model = lorand.load_adapter(AutoModel.from_pretrained(options.model), folder)

    # 4. Ask it.
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with (DATA / "hotels-test.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:4]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        answers = model(batch["input_ids"], batch["attention_mask"]).argmax(dim=-1)
    for text, answer in zip(texts, answers.tolist(), strict=True):
        print(f"{LABELS[answer]}: {text}")
    return trained


if __name__ == "__main__":
    main()
