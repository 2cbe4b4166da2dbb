"""Question: how well do scalars tune a causal model on instructions, beside FedAvg of LoRA?

Self-instruct's tasks of at most 300 characters to read and 300 to write (241 of 427), among ten
workers: those of one application are at one worker, the seed tasks are dealt out at random. Five
workers, drawn at random, are asked each round. The model is `experiments.small_model`, a million
weights trained on Conan Doyle's stories: small, so that losses tell methods apart and answers are
no use. All its weights are trained, or LoRA's of rank 8 beside every linear layer. FedAvg of LoRA
averages A and B one by one, as FedIT does (Zhang et al., arXiv 2305.05644).

Each method's learning rate is one of three, a factor of three apart, tried with one seed on a tenth
of the training data; of four where the best was at an end, but for the zeroth order, which is slow.
A byte a scalar takes the rate that was best for a bit, untried. Then three seeds are scored on the
tenth of all tasks that is held out, by the mean over answers of the loss a token, in nats;
perplexity is its exponential. Bytes are those of a worker on the socket over mutual TLS
(`lorand.wire_size`), on average over those asked and those not: weights travel only to and from who
is asked, commits to everybody. The base model, which everybody fetches once, is not in them.

    python -m experiments.instructions               # what is not in the results yet
    python -m experiments.instructions --write       # from the results alone
"""

import argparse
import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any, Final

from experiments import averaging, federation, plots, self_instruct, small_model
from experiments.cells import RESULTS, Cell, Purpose, Store, best, mean_and_error
from experiments.federation import Point
from experiments.grid import COLUMNS, TUNING_SEED, Method
from lorand import wire_size
from lorand.config import ModelSection, RunConfig
from lorand.sections import TaskSection
from lorand_coordinator import presets

ABOUT: Final = __doc__.split("\n\n")
STORE: Final = Store("instructions", ABOUT[0])
TASK: Final = TaskSection(kind="causal-lm", template="Question: {text}\nAnswer: ")
MODEL: Final = {"name": "sherlock", "trainable": "all", "max_length": 384}
WORKERS: Final = 10
ASKED: Final = 5
SEEDS: Final = range(3)
MARKS: Final = 10
NOTES: Final = """
*FedIT's to that loss* are the bytes of its first round after which its mean loss is no higher; what
is worse than after its first round has that round's. *Passes* are of batches, and a backward pass
counts as two. Seconds are of a machine with other work on it, and compare nothing. The horizontal
line of the plot is the loss before.
"""
PLOT: Final = "![loss against rounds and bytes](instructions.png)"
BASE: Final = "[small_model](small_model.json)"
ACROSS: Final = {"rounds": "rounds", "bytes": "bytes of a worker, up and down"}


def sketch(codec: str) -> dict[str, dict[str, Any]]:
    """Return what differs from `lorand-fo`: 4,096 directions, and the codec."""
    return {"directions": {"pool_size": 4096}, "codec": {"up": codec, "down": codec}}


STEPS_ON_WEIGHTS: Final[dict[str, dict[str, Any]]] = {
    "directions": {"pool_size": 4096, "head_scale": 1.0},
    "local": {
        "optimizer": "AdamW",
        "options": {"weight_decay": 0.0},
        "epochs": 1,
        "space": "weights",
    },
    "optimizer": {"kind": "sgd", "learning_rate": 1.0, "normalise": False},
    "rounds": {"weighting": "examples"},
}
FEDIT: Final = "FedAvg, LoRA r = 8 (FedIT)"
METHODS: Final = {
    "FedAvg, AdamW, all weights": Method((3e-4, 1e-3, 3e-3), 12, peer="fedavg", batch=8),
    FEDIT: Method(
        (3e-3, 1e-2, 3e-2),
        12,
        peer="fedavg",
        batch=8,
        changes={"model": {"adapter": "lora", "adapter_rank": 8}},
    ),
    "LoRand, steps on weights, 1 bit": Method(
        (1e-4, 3e-4, 1e-3, 3e-3), 12, preset="lorand-fo", batch=8, changes=STEPS_ON_WEIGHTS
    ),
    "LoRand, first order, int8": Method(
        (3e-3,), 30, preset="lorand-fo", batch=8, changes=sketch("int8")
    ),
    "LoRand, first order, 1 bit": Method(
        (3e-4, 1e-3, 3e-3, 1e-2), 30, preset="lorand-fo", batch=8, changes=sketch("sign")
    ),
    "LoRand, zeroth order": Method((3e-4, 1e-3, 3e-3), 60, preset="lorand-zo", batch=4),
}


# -- runs ------------------------------------------------------------------------------------------


def config_of(method: Method, rate: float) -> RunConfig:
    """Return the run of a method that is a preset."""
    content = RunConfig.parse(presets.render(method.preset)).model_dump(mode="json")
    content["task"] = TASK.model_dump(mode="json")
    content["run"] |= {"name": "instructions", "rounds": method.rounds}
    content["model"] |= MODEL
    content["estimator"] |= {"batch_size": method.batch}
    content["rounds"] |= {"quorum": ASKED, "participants": ASKED, "start_with": 0}
    content["optimizer"] |= {"warmup_rounds": 0}
    for section, values in method.changes.items():
        content[section] |= values
    content["local" if content["local"]["epochs"] else "optimizer"]["learning_rate"] = rate
    return RunConfig.model_validate(content)


def run(method: Method, rate: float, seed: int, purpose: Purpose) -> list[Point]:
    """Return the curve of a cell, by running it now."""
    held_out = purpose == "tune"
    shards, scored = self_instruct.shards_and_scored(WORKERS, seed % TUNING_SEED, held_out=held_out)
    source = small_model.made()
    if method.peer:
        points = averaging.fedavg(
            ModelSection.model_validate({**MODEL, **method.changes.get("model", {})}),
            shards,
            scored,
            learning_rate=rate,
            rounds=method.rounds,
            seed=seed % TUNING_SEED,
            batch_size=method.batch,
            task=TASK,
            source=source,
            participants=ASKED,
        )
        return [on_average(point, message_bytes(point)) for point in points]
    config = config_of(method, rate)
    size = wire_size.of_round(config, ASKED)
    marks = {math.ceil(method.rounds * at / MARKS) for at in range(MARKS + 1)}
    points = federation.run(
        config, shards, scored, seed=seed % TUNING_SEED, evaluate_at=sorted(marks), source=source
    )
    return [on_average(p, size.up.socket, size.down.socket, everybody=True) for p in points]


def message_bytes(point: Point) -> int:
    """Return the bytes on the socket of one round's weights, one way; `point` has a mean's."""
    return wire_size.on_socket(round(point.bytes_up / (max(1, point.committed) * ASKED / WORKERS)))


def on_average(point: Point, up: int, down: int = 0, *, everybody: bool = False) -> Point:
    """Return the point with a worker's bytes, asked in `ASKED` of `WORKERS` rounds.

    Passes, which are a mean's, too, become those of who is asked each round. `everybody`: who was
    not asked receives as much; `down` is as `up` where none is given.
    """
    asked = point.committed * ASKED / WORKERS
    received = (point.committed if everybody else asked) * (down or up)
    return replace(
        point,
        forwards=round(point.forwards * WORKERS / ASKED),
        bytes_up=round(asked * up),
        bytes_down=round(received),
    )


def settings_of(method: Method) -> dict[str, Any]:
    """Return what a cell is run with, but for the rate."""
    made = {field: getattr(method, field) for field in ("rounds", "preset", "peer", "batch")}
    data = {"longest": self_instruct.LONGEST, "workers": WORKERS, "asked": ASKED}
    model = asdict(small_model.Settings())
    return {**made, "changes": method.changes, "data": data, "model": model}


def tried(name: str) -> dict[float, float]:
    """Return the held-out loss by rate, of what the results hold; a single rate is not tried."""
    method, settings = METHODS[name], settings_of(METHODS[name])
    if len(method.rates) == 1:
        return {method.rates[0]: 0.0}
    found = {}
    for rate in method.rates:
        if points := STORE.points(
            Cell(name, self_instruct.NAME, rate, TUNING_SEED, "tune"), settings
        ):
            found[rate] = points[-1].score.loss
    return found


@cache
def reported(name: str) -> list[list[Point]]:
    """Return the curves of the seeds that the results hold, at the rate that tuning chose."""
    losses, settings = tried(name), settings_of(METHODS[name])
    if len(losses) < len(METHODS[name].rates):
        return []
    cells = (Cell(name, self_instruct.NAME, best(losses), seed, "report") for seed in SEEDS)
    return [points for cell in cells if (points := STORE.points(cell, settings))]


def fill(name: str) -> None:
    """Run the cells of a method that are not there."""
    method, settings = METHODS[name], settings_of(METHODS[name])
    for rate in method.rates if len(method.rates) > 1 else ():
        cell = Cell(name, self_instruct.NAME, rate, TUNING_SEED, "tune")
        STORE.fill(cell, settings, partial(run, method, rate, TUNING_SEED, "tune"), exact=True)
    rate = best(tried(name))
    for seed in SEEDS:
        cell = Cell(name, self_instruct.NAME, rate, seed, "report")
        STORE.fill(cell, settings, partial(run, method, rate, seed, "report"), exact=True)


# -- pages -----------------------------------------------------------------------------------------


def loss(curves: Sequence[Sequence[Point]], at: int = -1) -> tuple[float, float]:
    """Return mean loss and standard error at a place of the curves."""
    return mean_and_error(curve[at].score.loss for curve in curves)


def spent(point: Point) -> int:
    """Return bytes of both ways."""
    return point.bytes_up + point.bytes_down


def first_at(curves: Sequence[Sequence[Point]], level: float) -> Point | None:
    """Return the first point after a round at which the mean loss is at most this."""
    places = range(1, len(curves[0])) if curves else ()
    return next((curves[0][at] for at in places if loss(curves, at)[0] <= level), None)


def table() -> Iterator[str]:
    """Yield the results as Markdown, a line a method."""
    yield (
        "| method | rate | seeds | rounds | loss, last round | perplexity | tokens first | "
        "bytes of a worker | FedIT's to that loss | passes of who is asked | s |"
    )
    yield "|---" * 11 + "|"
    for name, method in METHODS.items():
        curves = reported(name)
        if not curves:
            yield f"| {name} | not run |" + " |" * 9
            continue
        (mean, error), last = loss(curves), curves[0][-1]
        hit, _ = mean_and_error(curve[-1].score.accuracy for curve in curves)
        seconds, _ = mean_and_error(curve[-1].wall_s for curve in curves)
        rate, rates = best(tried(name)), sorted(method.rates)
        where = {rates[0]: "lowest ", rates[-1]: "highest "}.get(rate, "")
        chosen = f"{where}of {len(rates)}" if len(rates) > 1 else "not tuned"
        theirs = first_at(reported(FEDIT), mean)
        yield (
            f"| {name} | {rate:g}, {chosen} | {len(curves)} | "
            f"{last.committed} | {mean:.3f} ± {error:.3f} | {math.exp(mean):.1f} | {hit:.1%} | "
            f"{spent(last):,} | {f'{spent(theirs):,}' if theirs else 'never'} | "
            f"{last.forwards:,} | {seconds:.0f} |"
        )


def said() -> Iterator[str]:
    """Yield what the curves start from, and of how many tasks and seeds they are."""
    started = [curve[0].score for name in METHODS for curve in reported(name)[:1]]
    if not started:
        return
    before = started[0]
    about = json.loads((RESULTS / "small_model.json").read_text(encoding="utf-8"))
    yield f"Before: loss {before.loss:.3f}, perplexity {math.exp(before.loss):.1f}, on"
    yield f"{before.examples} held-out tasks; {len(SEEDS)} seeds, which move neither model nor"
    yield f"held-out tasks. The model has {about['weights']:,} weights, and a loss of"
    yield f"{about['loss_held_out']:.3f} a token on stories that it was not trained on"


def reached() -> Iterator[str]:
    """Yield which of our methods comes as far as FedAvg of LoRA in the end."""
    theirs = reported(FEDIT)
    ours = [name for name in METHODS if name.startswith("LoRand") and reported(name)]
    if theirs and ours:
        level, _ = loss(theirs)
        found = [name for name in ours if first_at(reported(name), level)]
        yield (
            f"FedIT's last loss, {level:.3f}, is reached by {'; '.join(found)}."
            if found
            else f"**None of LoRand's rows reaches FedIT's last loss**, {level:.3f}, in its rounds."
        )


def panel(across: str) -> plots.Panel:
    """Return the loss of all methods against rounds or bytes."""
    curves = []
    for name in METHODS:
        if not (runs := reported(name)):
            continue
        both = [loss(runs, at) for at in range(1, len(runs[0]))]
        x = [p.committed if across == "rounds" else spent(p) for p in runs[0][1:]]
        curves.append(plots.Curve(name, x, [m for m, _ in both], [e for _, e in both]))
    before = next((runs[0][0].score.loss for runs in map(reported, METHODS) if runs), None)
    return plots.Panel("", ACROSS[across], "loss a token, held-out answers", curves, before)


def write() -> None:
    """Write instructions.md, .csv and .png from the results."""
    reported.cache_clear()
    panels = [panel(across) for across in ACROSS]
    plots.draw(RESULTS / "instructions.png", [panels], height=3.6, legend_columns=3)
    with (RESULTS / "instructions.csv").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["method", "rate", "seed", *COLUMNS])
        for name in METHODS:
            for seed, curve in enumerate(reported(name)):
                for p in curve:
                    spent_on = [p.committed, p.forwards, p.bytes_up, p.bytes_down]
                    scored = [p.score.accuracy, p.score.loss, p.wall_s]
                    out.writerow([name, best(tried(name)), seed, *spent_on, *scored])
    lines = ["# instructions", "", *"\n\n".join(ABOUT[:3]).splitlines(), "", *said(), f"({BASE})."]
    lines += ["", *table(), *NOTES.splitlines(), *reached(), "", PLOT, "", STORE.origin()]
    STORE.write_text("\n".join(lines))


def main() -> None:
    """Fill the cells and write the pages."""
    parser = argparse.ArgumentParser(description=ABOUT[0])
    parser.add_argument("--only", default="", help="methods whose names hold this")
    parser.add_argument("--write", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.write:
        small_model.record()
        for name in METHODS:
            if options.only in name:
                fill(name)
                write()
    write()


if __name__ == "__main__":
    main()
