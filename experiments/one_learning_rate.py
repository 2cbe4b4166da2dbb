"""Question: does one learning rate serve several models with a normalised step, and without?

The preset lorand-zo (forward passes only, 8 scalars a worker and round, one byte each) on Subj over
two workers, with one learning rate and a quarter and four times of it, on models and trainable sets
that differ in depth, in the number of trained weights and in the head. With normalise = true the
rate is the preset's; with normalise = false the rate that makes the first steps on the first model
as long. The summary says what it costs to give all models the one rate that suits them best.

    python -m experiments.one_learning_rate                        # everything, 3 seeds
    python -m experiments.one_learning_rate --models last-2 --seeds 0 --rounds 40    # a short cell

About two hours on one core with passes in bfloat16, as workers choose themselves.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from experiments import federation, record, tasks
from lorand.config import RunConfig
from lorand_coordinator.presets import render
from lorand_worker.data import Examples
from lorand_worker.precision import Precision
from lorand_worker.tasks import Forward

WORKERS = 2
FACTORS = (0.25, 1.0, 4.0)
PLAIN_RATE = 2e-4
"""Without normalise: 0.001 · √8 / rms of the first scalars on last-2, which is about 15."""
LAYERS = 3
MODELS: dict[str, dict[str, str]] = {
    "last-2": {"trainable": "last:2"},
    "all": {"trainable": "all"},
    "head": {"trainable": "name:^head"},
    "three-layers": {"trainable": "all", "name": "the first three layers of all-MiniLM-L6-v2"},
    "own-head": {"trainable": "all", "head": "own"},
}
"""MiniLM's last two layers, all, its head alone; half as deep; a pooler on the first token."""


def summary(content: dict[str, Any]) -> list[str]:
    """Return tables of models against rates, and what one rate for all of them costs."""
    blocks: dict[str, dict[str, dict[float, float]]] = {}
    for row in content["rows"]:
        if row["seeds"]:
            model, factor, rest = row["row"].split(", ", 2)
            last = list(row["mean_accuracy"])[-1]
            cells = blocks.setdefault(rest, {}).setdefault(model, {})
            cells[float(factor.removeprefix("rate x"))] = row["mean_accuracy"][last]
    return [line for rest, cells in blocks.items() for line in _block(rest, cells)]


def _block(which: str, cells: dict[str, dict[float, float]]) -> list[str]:
    rates = sorted({rate for found in cells.values() for rate in found})
    head = "".join(f" x{rate:g} |" for rate in rates)
    lines = [f"Accuracy by learning rate, {which}:", ""]
    lines += [f"| model |{head} best |", "|---|" + "---|" * (len(rates) + 1)]
    for model, found in cells.items():
        values = "".join(f" {found[r]:.3f} |" if r in found else " |" for r in rates)
        lines.append(f"| {model} |{values} x{max(found, key=lambda r: found[r]):g} |")
    whole = [rate for rate in rates if all(rate in found for found in cells.values())]
    if whole:
        cost = {r: max(max(f.values()) - f[r] for f in cells.values()) for r in whole}
        best = min(cost, key=lambda r: cost[r])
        lines += ["", f"One rate for all, x{best:g}, costs at most {cost[best]:.3f} of accuracy."]
    return [*lines, ""]


EXPERIMENT = record.Experiment(
    name="one_learning_rate",
    claim=__doc__.split("\n\n")[0],
    tuning="Nothing was tuned here: the rate is the preset's. A seed moves the split, the batches "
    "and the directions.",
    summary=summary,
)


def settings(model: str, normalise: bool, factor: float, options: Any) -> RunConfig:
    """Return the preset's run on a model at a multiple of the learning rate."""
    preset = RunConfig.parse(render("lorand-zo")).model_dump()
    rate = preset["optimizer"]["learning_rate"] if normalise else PLAIN_RATE
    changes: dict[str, dict[str, Any]] = {
        "run": {"name": "one-learning-rate", "rounds": options.rounds},
        "model": {"max_length": 64, **MODELS[model]},
        "task": {"labels": tasks.LABELS["subj"]},
        "estimator": {"directions_per_round": options.directions},
        "optimizer": {"learning_rate": rate * factor, "normalise": normalise},
        "rounds": {"quorum": WORKERS},
    }
    return RunConfig.model_validate(
        {section: {**values, **changes.get(section, {})} for section, values in preset.items()}
    )


def three_layers(folder: Path) -> Path:
    """Write the model of MiniLM's first layers: half as deep, its last hidden states another's."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = federation.minilm()
    encoder = transformers.AutoModel.from_pretrained(source, add_pooling_layer=False)
    encoder.encoder.layer = encoder.encoder.layer[:LAYERS]
    encoder.config.num_hidden_layers = LAYERS
    encoder.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line, or these arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--factors", type=float, nargs="+", default=list(FACTORS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--rounds", type=int, default=100)
    add("--directions", type=int, default=8, help="scalars a worker a round")
    add("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure every model at every rate; what is there already is not run again."""
    options = parse()

    def data(seed: int) -> tuple[Sequence[Examples], Examples]:
        task = tasks.load("subj", workers=WORKERS, seed=seed, held_out=False)
        return task.shards, task.scored

    with TemporaryDirectory() as folder:
        for model in options.models:
            source = three_layers(Path(folder)) if model == "three-layers" else None
            for normalise in (True, False):
                for factor in options.factors:
                    EXPERIMENT.measure(
                        f"{model}, rate x{factor:g}, normalise {str(normalise).lower()}, "
                        f"{options.rounds} rounds, {options.precision}",
                        settings(model, normalise, factor, options),
                        data,
                        scored_on=record.TEST,
                        seeds=options.seeds,
                        evaluate_at=sorted({0, options.rounds // 2, options.rounds}),
                        source=source,
                        forward=Forward(Precision(options.precision)),
                    )


if __name__ == "__main__":
    main()
