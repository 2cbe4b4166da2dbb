"""The runs of `heterogeneity`: its rows, and what a run of each came to, kept in one file."""

import json
import random
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from experiments.cells import RESULTS, best
from experiments.head_workers import WORKERS, Lab, Seat, lab, scalars, settings
from experiments.provenance import provenance
from experiments.virtual import Absence, Member, World
from lorand import ledger
from lorand.config import EstimatorKind, RunConfig
from lorand_coordinator.tally import Outcome
from lorand_worker.chance import Chance
from lorand_worker.participant import Participant
from lorand_worker.precision import Precision

ABOUT: Final = (
    "Question: what do workers cost a run that come and go, are slow, or measure in their own way?"
)
PATH: Final = RESULTS / "heterogeneity.json"
SEEDS: Final = range(5)
TUNING_SEED: Final = 100
MARKS: Final = (2, 4, 8, 15, 30, 45, 60)
RATES: Final = (3e-4, 1e-3, 3e-3, 1e-2)
PROBLEMS: Final = ("banking77", "uci")
SLOW: Final = 10.0
FIRST_AWAY: Final = 4


@dataclass(frozen=True)
class Row:
    """What differs from ten workers that are alike and always there.

    `away` workers are away in a round, drawn anew for each, and go with an answer unfinished where
    they are `cut_off`; `slow` ones take ten times as long, and are waited for where it `waits`;
    `bfloat16` ones pass in that, and `backprop` ones measure by a backward pass, every other
    worker first.
    """

    part: str
    name: str
    problem: str
    away: int = 0
    cut_off: bool = False
    slow: int = 0
    waits: bool = False
    bfloat16: int = 0
    backprop: int = 0


def alike(problem: str) -> Row:
    """Return the row that the others of a problem are compared with."""
    return Row("alike", "ten alike", problem)


def rows() -> list[Row]:
    """Return all rows; the first of a problem is what the others are compared with."""
    found = []
    for problem in PROBLEMS:
        found.append(alike(problem))
        for away in (1, 3, 5):
            found.append(Row("churn", f"{away} of 10 away", problem, away=away))
        found.append(Row("churn", "3 of 10 away, cut off", problem, away=3, cut_off=True))
    for slow in (1, 3):
        for waits in (True, False):
            how = "waited for" if waits else "deadline"
            found.append(
                Row("slow", f"{slow} of 10 slow, {how}", "banking77", 0, False, slow, waits)
            )
    for problem in PROBLEMS:
        for count in (5, 10):
            found.append(Row("dtype", f"{count} of 10 in bfloat16", problem, bfloat16=count))
    for count in (5, 10):
        found.append(Row("estimator", f"{count} of 10 by backprop", "uci", backprop=count))
    return found


def absence(row: Row, seed: int) -> Absence:
    """Return who is away in which round, drawn anew for each.

    Nobody before the coordinator has seen enough answers for a deadline that follows them.
    """

    def away(round_index: int) -> frozenset[int]:
        if round_index < FIRST_AWAY:
            return frozenset()
        drawn = np.random.default_rng([seed, round_index]).choice(WORKERS, row.away, replace=False)
        return frozenset(drawn.tolist())

    return Absence(away, row.cut_off)


def chosen(count: int) -> frozenset[int]:
    """Return so many of the workers, every other one first."""
    return frozenset([*range(0, WORKERS, 2), *range(1, WORKERS, 2)][:count])


def seats(row: Row, here: Lab, config: RunConfig, seed: int) -> list[Seat]:
    """Return the workers' benches."""
    found = []
    for place, shard in enumerate(here.shards(seed)):
        rounded = place in chosen(row.bfloat16)
        precision = Precision.BFLOAT16 if rounded else Precision.FLOAT32
        kind: EstimatorKind | None = "backprop" if place in chosen(row.backprop) else None
        source = Chance.of(seed, f"worker-{place}").batches
        part = here.features(shard, precision)
        found.append(Seat(config, here.identity, part, source, precision, kind))
    return found


def run(row: Row, rate: float, seed: int, *, held_out: bool = False) -> dict[str, Any]:
    """Return the figures of a run."""
    here = lab(row.problem, held_out)
    config = settings(row.problem, here.config.task.labels, rate, waits=row.waits, seed=seed)
    here_seats = seats(row, here, config, seed)
    origin, times = ledger.origin(config, here.identity), random.Random(seed)
    members = []
    for place, seat in enumerate(here_seats):
        factor = SLOW if place < row.slow else 1.0
        participant = Participant(origin, seat, Chance.of(seed, f"worker-{place}").uniform)
        takes = partial(times.uniform, 0.8 * factor, 1.2 * factor)
        members.append(Member(f"worker-{place}", participant, takes))
    scorer = Seat(config, here.identity, here.features(here.scored, Precision.FLOAT32))
    counted: list[int] = []
    curve: list[list[float]] = []

    def observe(now: float, outcome: Outcome) -> None:
        counted.append(outcome.workers)
        position = world.sequencer.position
        if outcome.committed in MARKS and position is not None:
            scorer.adopt(position)
            score = scorer.score()
            curve.append([outcome.committed, now, score.accuracy, score.loss])

    began = time.monotonic()
    world = World(config, here.identity, members, absence(row, seed), observe)
    world.run()
    digests = {seat.replica.digest() for seat in here_seats}
    heads = {member.participant.position.head for member in members}
    assert len(digests) == len(heads) == 1, "replicas differ"
    return {
        "accuracy": curve[-1][2],
        "loss": curve[-1][3],
        "seconds": curve[-1][1],
        "answers": sum(counted) / len(counted),
        "abandoned": world.sequencer.engine.abandoned,
        "late": world.sequencer.tally.rejected["untimely"],
        "sent": sum(member.sent for member in members) / WORKERS,
        "received": sum(member.received for member in members) / WORKERS,
        "caught_up": sum(member.caught_up for member in members) / WORKERS,
        "returns": sum(member.returns for member in members) / WORKERS,
        "weights": digests.pop().hex(),
        "curve": curve,
        "wall_s": time.monotonic() - began,
        "scalars": scalars(here, config, seed, members[0].participant.position)
        if row == alike("uci")
        else {},
    }


def read() -> list[dict[str, Any]]:
    """Return the cells of the results file: one run each."""
    if not PATH.exists():
        return []
    cells: list[dict[str, Any]] = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
    return cells


def reported(row: Row) -> list[dict[str, Any]]:
    """Return a row's cells on test data, by seed."""
    found = [c for c in read() if c["row"] == asdict(row) and c["purpose"] == "report"]
    return sorted(found, key=lambda cell: int(cell["seed"]))


def fill(row: Row, rate: float, seed: int, *, held_out: bool = False) -> dict[str, Any]:
    """Return a cell, from the file or by running it now."""
    asked = {
        "row": asdict(row),
        "rate": rate,
        "seed": seed,
        "purpose": "tune" if held_out else "report",
    }
    cells = read()
    for cell in cells:
        if asked.items() <= cell.items():
            return cell
    made = {**asked, **run(row, rate, seed, held_out=held_out), "provenance": provenance()}
    print(row.problem, row.name, rate, seed, f"{made['accuracy']:.4f}", flush=True)
    lines = ",\n".join(json.dumps(cell) for cell in [*cells, made])
    text = f'{{"about": {json.dumps(ABOUT)}, "cells": [\n{lines}\n]}}\n'
    partly = PATH.with_suffix(".part")
    partly.write_text(text, encoding="utf-8")
    partly.replace(PATH)
    return made


def rate_of(problem: str) -> float:
    """Return the learning rate with the lowest loss on a tenth of the training data."""
    return best({r: fill(alike(problem), r, TUNING_SEED, held_out=True)["loss"] for r in RATES})
