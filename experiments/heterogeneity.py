"""Question: what do workers cost a run that come and go, are slow, or measure in their own way?

Ten workers train a linear head on frozen all-MiniLM-L6-v2 features over the engine itself: the
coordinator's sequencer and ledger, and ten participants with a replica each (`virtual.py`: time is
virtual; a measurement takes 0.8 to 1.2 s, ten times that at slow workers). Five seeds, scored on
test data. The weights of all ten replicas are compared bit for bit at the end of every run.

- `banking77`: 77 classes, Dirichlet 0.5; first order, K = 4,096 scalars a round of 16 examples.
- `uci`: three domains, one or two a worker; zeroth order, 16 of K = 4,096 directions a round.

60 rounds, int8 codes both ways. A round commits with 4 workers at its deadline, which follows the
answers (`deadline_k = 3`), unless it waits for all.

    python -m experiments.heterogeneity            # whatever is not in the results yet
    python -m experiments.heterogeneity --write    # tables and plot from the results
"""

import argparse
import csv
from collections.abc import Iterator, Sequence
from typing import Final

import numba
import torch

from experiments import plots
from experiments.cells import mean_and_error
from experiments.head_workers import MU, ROUNDS, WAYS
from experiments.heterogeneous_runs import (
    FIRST_AWAY,
    PATH,
    PROBLEMS,
    SEEDS,
    Row,
    alike,
    fill,
    rate_of,
    read,
    reported,
    rows,
)

COLUMNS: Final = (
    *("accuracy", "above ten alike", "loss", "answers a round", "s a round"),
    *("sent + received bytes a worker", "read on coming back", "answers too late"),
)
FIGURES: Final = (
    *("accuracy", "loss", "seconds", "answers", "abandoned", "late"),
    *("sent", "received", "caught_up", "returns", "wall_s"),
)


def show(values: Sequence[float], digits: int = 3) -> str:
    """Return mean ± standard error."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}".replace("0.", ".")


def above(row: Row) -> list[float]:
    """Return how much more accurate a row is than ten alike, seed by seed."""
    pairs = zip(reported(row), reported(alike(row.problem)), strict=True)
    return [cell["accuracy"] - other["accuracy"] for cell, other in pairs]


def gain(row: Row) -> str:
    """Return the mean of `above` with its standard error."""
    gained, error = mean_and_error(above(row))
    return f"{gained:+.3f} ± {error:.3f}"


def means(row: Row) -> dict[str, float]:
    """Return the means of all figures over seeds."""
    cells = reported(row)
    return {name: mean_and_error(cell[name] for cell in cells)[0] for name in FIGURES}


def line(row: Row) -> str:
    """Return a row of the table."""
    cells = reported(row)
    mean = means(row)
    against = "" if row.part == "alike" else gain(row)
    back = f"{mean['caught_up']:,.0f} in {mean['returns']:.0f}" if mean["returns"] else ""
    return (
        f"| {row.name} | {show([c['accuracy'] for c in cells])} | {against} | "
        f"{show([c['loss'] for c in cells])} | {mean['answers']:.1f} | "
        f"{mean['seconds'] / ROUNDS:.2f} | "
        f"{mean['sent']:,.0f} + {mean['received']:,.0f} | {back} | "
        f"{mean['late']:.0f} |"
    )


def page() -> str:
    """Return heterogeneity.md."""
    told = __doc__.split("\n\n    python")[0]
    lines = ["# heterogeneity", "", told, ""]
    lines += [
        "Above: accuracy less that of ten alike, on the same seeds. Seconds are virtual: the time",
        "until the last commit, over the rounds. Bytes are of the mean worker's messages in the",
        "whole run; *read on coming back* are the entries that it missed, and how often it came",
        "back (entry by entry: over the network a checkpoint is taken where that is less). Answers",
        f"too late are of all workers. Nobody is away before round {FIRST_AWAY}.",
        "",
    ]
    for problem in PROBLEMS:
        rate = reported(alike(problem))[0]["rate"]
        lines += [f"## {problem}, learning rate {rate:g}", ""]
        lines += ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        lines += [line(row) for row in rows() if row.problem == problem]
        lines.append("")
    lines += [*scalars(), "", *plot_lines(), "", origin()]
    return "\n".join(lines) + "\n"


def scalars() -> Iterator[str]:
    """Yield how scalars of other ways compare with those of a backward pass in float32."""
    cells = reported(alike("uci"))
    yield from ["## The same scalars in other ways, uci", ""]
    yield "Against a backward pass in float32 on the same batch, at a run's start and end: the root"
    yield "mean square of the difference and of the scalars themselves, as a share of that of the"
    yield "backward pass (all workers, 64 directions). Where nothing else is said the perturbation"
    yield f"scale is the run's, μ = {MU}, which is 16 times that in a new head."
    yield ""
    yield "| | difference, start | size, start | difference, end | size, end |"
    yield "|---|---|---|---|---|"
    for way in WAYS:
        shown = [
            show([cell["scalars"][way][place][which] for cell in cells])
            for place in (0, 1)
            for which in (0, 1)
        ]
        yield f"| {way} | " + " | ".join(shown) + " |"


def plot_lines() -> Iterator[str]:
    """Yield the plot's place in a page."""
    yield "![accuracy by rounds and by seconds](heterogeneity.png)"


def curve(row: Row, across: int) -> plots.Curve:
    """Return a row's accuracy over rounds (0) or virtual seconds (1)."""
    marks = list(zip(*(cell["curve"] for cell in reported(row)), strict=True))
    means = [mean_and_error(point[2] for point in mark) for mark in marks]
    x = [mean_and_error(point[across] for point in mark)[0] for mark in marks]
    return plots.Curve(row.name, x, [m for m, _ in means], [e for _, e in means])


def draw() -> None:
    """Write the plot."""
    panels = []
    for problem in PROBLEMS:
        some = [r for r in rows() if r.problem == problem and r.part in ("alike", "churn")]
        curves = [curve(row, 0) for row in some]
        panels.append(
            plots.Panel(f"{problem}: coming and going", "round", "accuracy, test", curves)
        )
    some = [r for r in rows() if r.problem == "banking77" and r.part in ("alike", "slow")]
    panels.append(
        plots.Panel(
            "banking77: slow workers",
            "virtual seconds",
            "accuracy, test",
            [curve(row, 1) for row in some],
        )
    )
    plots.draw(PATH.with_suffix(".png"), [panels])


def origin() -> str:
    """Return hardware, versions, commits and dates of all cells as a sentence."""
    made = [cell["provenance"] for cell in read()]
    return "; ".join(f"{n} {', '.join(sorted({m[n] for m in made}))}" for n in made[0]) + "."


SHORT: Final = (
    *("", "banking77: accuracy", "above ten alike", "uci: accuracy", "above ten alike"),
    *("answers a round", "virtual s a round", "KB a worker"),
)


def summary(link: str) -> Iterator[str]:
    """Yield the part of docs/results.md, given the link to the page."""
    yield "### Workers that come and go, are slow, or measure in their own way"
    yield ""
    yield f"Ten workers train a linear head in {ROUNDS} rounds, over the engine itself in virtual"
    yield f"time ({link}): first order on banking77, zeroth order on uci. Rounds commit with 4"
    yield "workers at a deadline that follows the answers, but where the slow are waited for. The"
    yield "last three columns are of banking77 where it was run; bytes are of both ways and of"
    yield "catching up."
    yield ""
    yield "| " + " | ".join(SHORT) + " |"
    yield "|---" * len(SHORT) + "|"
    of_name: dict[str, dict[str, Row]] = {}
    for row in rows():
        of_name.setdefault(row.name, {})[row.problem] = row
    for name, found in of_name.items():
        parts = [_accuracy(found[p]) if p in found else " | " for p in PROBLEMS]
        yield f"| {name} | " + " | ".join([*parts, _pace(next(iter(found.values())))]) + " |"
    yield ""
    runs = sum(len(reported(row)) for row in rows())
    yield f"At the end of each of the {runs} runs the replicas of all ten workers had the same"
    yield "bits. Who is slower than the deadline adds nothing and costs the others the wait for it:"
    yield "its answers come too late, and it goes on with the newest round. Who"
    yield "is cut off loses the answer it was at and is waited for until the deadline: fewer answer"
    yield "than are there."
    yield ""
    far, near, noise = (
        _scalars_at_end(way)
        for way in ("two losses", "two losses, μ = 0.001", "backward pass, another batch")
    )
    yield "Two losses and a backward pass tell the same slope at the start of a uci run. At its end"
    yield f"they differ by {far[0]} of a slope (root mean squares), and those of two losses have"
    yield f"{far[1]} times the size: the perturbation is wide, μ = {MU} and 16 times that in"
    yield f"a new head. With μ = 0.001 they differ by {near[0]}; another batch changes a slope by"
    yield f"{noise[0]}."
    yield ""
    yield "![accuracy by rounds and by seconds](../experiments/results/heterogeneity.png)"


def _scalars_at_end(way: str) -> tuple[str, str]:
    """Return difference and size of a way's scalars at the end of a run."""
    cells = reported(alike("uci"))
    difference, size = (show([cell["scalars"][way][1][n] for cell in cells]) for n in (0, 1))
    return difference, size


def _accuracy(row: Row) -> str:
    accuracy = show([cell["accuracy"] for cell in reported(row)])
    return f"{accuracy} | {'' if row.part == 'alike' else gain(row)}"


def _pace(row: Row) -> str:
    mean = means(row)
    size = (mean["sent"] + mean["received"] + mean["caught_up"]) / 1000
    return f"{mean['answers']:.1f} | {mean['seconds'] / ROUNDS:.2f} | {size:,.0f}"


def write() -> None:
    """Write the page, the plot and one line a run as CSV."""
    draw()
    PATH.with_suffix(".md").write_text(page(), encoding="utf-8")
    names = ["problem", "part", "name"]
    with PATH.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow([*names, "purpose", "rate", "seed", *FIGURES])
        for cell in read():
            known = [cell["row"][name] for name in names]
            figures = [round(cell[name], 5) for name in FIGURES]
            out.writerow([*known, cell["purpose"], cell["rate"], cell["seed"], *figures])


def main() -> None:
    """Fill the cells and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="run nothing")
    if not parser.parse_args().write:
        torch.set_num_threads(1)
        numba.set_num_threads(1)
        rates = {problem: rate_of(problem) for problem in PROBLEMS}
        for seed in SEEDS:
            for row in rows():
                fill(row, rates[row.problem], seed)
    write()


if __name__ == "__main__":
    main()
