"""Write docs/results.md from the results files: targets, papers' claims, scale, and the rest.

    python -m experiments.report         # or `make docs`; a test compares what is committed

Nothing is run here. What a results file does not hold is said to be not run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from experiments import (
    banking77,
    byzantine,
    first_order,
    grid,
    heterogeneity,
    instructions,
    late_join,
    papers,
    presets,
    scaling,
    skewed,
    tasks,
    wire_bytes,
)
from experiments.cells import RESULTS, first_at, link, load, mean_and_error, show
from experiments.federation import Point

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "results.md"

WORKERS: Final = {"uci": presets.WORKERS, "banking77": banking77.WORKERS}
GRIDS: Final = ("full", "quick", "zeroth")
GENERATED: Final = (
    "<!-- Written by experiments/report.py: change results or script, then run `make docs`. -->"
)
HEADS: Final = "bytes with framing; FedAvg of the head alone is [below](#accuracy-against-bytes)"
Curves = Sequence[Sequence[Point]]


def page() -> str:
    """Return docs/results.md."""
    lines = ["# Results", "", GENERATED, "", *ABOUT.strip().splitlines(), ""]
    for section in (targets, communication, claims, scaling.lines, tuning, liars, files):
        lines += [*section(), ""]
    return "\n".join(lines).rstrip() + "\n"


ABOUT: Final = """
Means over seeds ± their standard error; five seeds where nothing else is said, on test data, with
learning rates chosen on a tenth of the training data (each page says how). The model is
all-MiniLM-L6-v2 (22 million weights), of which the last two layers and a new head are trained, or
the head alone where it is said: what holds there need not hold for a large language model. Bytes
are those of codes or weights of one worker, up and down, in the whole run;
[framing](#bytes-on-the-socket) comes on top for all but the grids', which have it, and the base
model, which everybody fetches once, is not in them. Each section names the script's page of
results, which says with which commit and machine.
"""


def accuracy(curves: Curves, at: int = -1) -> tuple[float, float]:
    """Return the accuracy at a place of the curves."""
    return mean_and_error(curve[at].score.accuracy for curve in curves)


def loss(curves: Curves) -> tuple[float, float]:
    """Return the loss at the end of the curves."""
    return mean_and_error(curve[-1].score.loss for curve in curves)


def spent(point: Point) -> int:
    """Return bytes of both ways."""
    return point.bytes_up + point.bytes_down


# -- targets ---------------------------------------------------------------------------------------


def targets() -> Iterator[str]:
    """Yield the table of what was set out for, and what was reached."""
    yield from ["## What was set out for", "", "| | target | measured | |", "|---|---|---|---|"]
    for task, name in (("uci", "UCI sentiment"), ("banking77", "Banking77")):
        what = f"first-order sketch against FedAvg of all weights with AdamW, {name}"
        target = "≥ .98 of its accuracy, ≥ 1,000 times fewer bytes"
        yield f"| {what} | {target} | {against_fedavg(task)} |"
    yield (
        "| against FedAvg of LoRA (r = 8) at equal accuracy | ≥ 20 times fewer bytes | "
        f"{against_lora()} |"
    )
    yield (
        "| zeroth-order against FedKSeed at equal accuracy | ≥ 4 times fewer bytes, "
        f"≤ 1/2 the forward passes | {against_fedkseed()} | {link('grid_zeroth')}, rate by loss: "
        f"{link('presets')} |"
    )
    late = load(RESULTS / "late_join.json")
    most = max(row["history"] for row in late["rows"])
    rounds = max(row["committed"] for row in late["rows"])
    yield (
        f"| a late joiner's bytes | ≤ 4K + 1 KB after any number of rounds: {late['target']:,} at "
        f"K = {late_join.SIZE:,} | {verdict(late['met'])}: at most {most:,}, after up to "
        f"{rounds:,} rounds | {link('late_join')} |"
    )
    wire = load(RESULTS / "wire_bytes.json")
    error = max(abs(row[f"error_{way}"]) for row in wire["rows"] for way in ("up", "down"))
    yield (
        f"| wire bytes against formula | within {wire_bytes.WITHIN:.0%} | {verdict(wire['met'])}: "
        f"within {error:.1%} in {len(wire['rows'])} kinds of run of up to "
        f"{max(row['workers'] for row in wire['rows'])} workers; [more](#scale) are further apart "
        f"| {link('wire_bytes')} |"
    )


def verdict(met: bool) -> str:
    """Return it in a word or two."""
    return "met" if met else "**not reached**"


def against_fedavg(task: str) -> str:
    """Return accuracy and bytes of the leanest row as accurate as asked, over FedAvg's best.

    Where none is, of the most accurate one. A grid's rows have their bytes with framing.
    """
    peer = first_order.reported(task, "fedavg")
    rows = [
        (f"{row}; last two layers trained", curves, link("first_order"))
        for row in first_order.METHODS[task]
        if row not in first_order.PEERS and (curves := first_order.reported(task, row))
    ]
    joined = f"with joining: {link('whole_run')}"
    heads = [row for row in rows_of(skewed.GRID) if task == "banking77"]
    rows += [
        (f"{row.method}; {HEADS}", row.curves, f"{skewed.LINK}, {joined}")
        for row in heads
        if row.task == skewed.TARGET and row.method.startswith("LoRand")
    ]
    if not peer or not rows:
        return f"not run | {link('first_order')}"
    their = first_order.peak(peer)
    level = accuracy(peer, their)[0]

    def merit(row: tuple[str, Curves, str]) -> tuple[bool, float]:
        at = first_order.peak(row[1])
        reached = accuracy(row[1], at)[0]
        holds = reached >= 0.98 * level
        return holds, -spent(row[1][0][at]) if holds else reached

    best, curves, page = max(rows, key=merit)
    at = first_order.peak(curves)
    share = accuracy(curves, at)[0] / level
    fewer = spent(peer[0][their]) / spent(curves[0][at])
    return (
        f"{verdict(share >= 0.98 and fewer >= 1000)}: {share:.3f} of it "
        f"({show(accuracy(curves, at))} and {show(accuracy(peer, their))}) with {fewer:,.0f} "
        f"times fewer ({spent(curves[0][at]):,} and {spent(peer[0][their]):,}); {best} | {page}"
    )


def against_lora() -> str:
    """Return how many times fewer bytes a grid's best row takes to the accuracy of FedAvg-LoRA."""
    for name in GRIDS:
        found = rows_of(name)
        for peer in (row for row in found if "LoRA" in row.method):
            ours = [
                (spent(point), row.method)
                for row in found
                if row.task == peer.task and row.method.startswith("LoRand")
                if (point := first_at(row.curves, peer.at(peer.peak)[0]))
            ]
            theirs = spent(peer.curves[0][peer.peak])
            where = f"{peer.task}, {len(peer.curves)} seeds"
            if not ours:
                return f"**not reached**: none is as accurate ({where}) | {link(f'grid_{name}')}"
            least, method = min(ours)
            return (
                f"{verdict(theirs / least >= 20)}: {theirs / least:,.0f} times fewer ({least:,} "
                f"and {theirs:,}; {method}; {where}) | {link(f'grid_{name}')}"
            )
    return "**not run** yet | [grid](../experiments/grid.py)"


def rows_of(name: str) -> list[grid.Reported]:
    """Return what a grid's results hold."""
    path = ROOT / "experiments" / "grids" / f"{name}.toml"
    if not path.exists() or not (RESULTS / f"grid_{name}.json").exists():
        return []
    read = grid.Grid.read(path)
    rows = (grid.reported(read, task, method, grid.looking(read)) for task, method in read.pairs)
    return [row for row in rows if row is not None]


def against_fedkseed() -> str:
    """Return bytes and passes of our best row to the accuracy of FedKSeed's, by task."""
    found = rows_of("zeroth")
    parts, met = [], bool(found)
    for task in tasks.LABELS:
        rows = [row for row in found if row.task == task]
        ours = [row for row in rows if row.method.startswith("LoRand")]
        peers = [row for row in rows if row.method.startswith("FedKSeed")]
        peers += [rate_by_loss(peer) for peer in peers if peer.method == "FedKSeed, 15 steps"]
        if not ours or not peers:
            met = False
            parts.append(f"{task} not run")
        for peer in peers if ours else ():
            reached, said = to_accuracy(ours, peer)
            met = met and reached
            parts.append(f"{task}, {peer.method}: {said}")
    return f"{verdict(met)}: {'; '.join(parts)}" if found else "**not run** yet"


def rate_by_loss(peer: grid.Reported) -> grid.Reported:
    """Return the preset's run with the rate that the loss chose; a round's bytes are the peer's."""
    end = peer.curves[0][-1]

    def framed(point: Point) -> Point:
        up, down = (
            each * point.committed // end.committed for each in (end.bytes_up, end.bytes_down)
        )
        return replace(point, bytes_up=up, bytes_down=down)

    curves = [
        [framed(point) for point in curve] for curve in presets.reported("fedkseed", peer.task)
    ]
    rate = presets.chosen("fedkseed", peer.task) or 0.0
    return grid.Reported(peer.task, "the same, rate by loss", rate, curves)


def to_accuracy(ours: Sequence[grid.Reported], peer: grid.Reported) -> tuple[bool, str]:
    """Return whether a quarter of the bytes and half the passes of the peer's run are enough.

    The accuracy to reach is that of the peer's best round.
    """
    level, top, end = peer.at(peer.peak), peer.curves[0][peer.peak], peer.curves[0][-1]
    points = [
        (point.forwards / end.forwards, spent(end) / spent(point))
        for row in ours
        if (point := first_at(row.curves, level[0]))
    ]
    if not points:
        nearest = max(row.at(row.peak) for row in ours)
        return False, f"never, {show(nearest)} and {show(level)}"
    passes, fewer = min(points, key=lambda point: (point[0] > 0.5 or point[1] < 4, point))
    said = f"{fewer:.1f} times fewer bytes, {passes:.2f} of the passes"
    if top.forwards < end.forwards:
        said += f" (its best round is after {top.forwards} of {end.forwards})"
    return fewer >= 4 and passes <= 0.5, said


# -- communication ---------------------------------------------------------------------------------


def communication() -> Iterator[str]:
    """Yield accuracy against bytes."""
    yield from ["## Accuracy against bytes", ""]
    yield "![accuracy against bytes](../experiments/results/first_order.png)"
    yield ""
    for task in first_order.METHODS:
        rows = first_order.METHODS[task]
        found = {row: curves for row in rows if (curves := first_order.reported(task, row))}
        yield f"**{task}**, {WORKERS[task]} workers ({link('first_order')}):"
        yield ""
        yield from [
            "| method | accuracy, best round | round | bytes by then |",
            "|---|---|---|---|",
        ]
        for row, curves in found.items():
            at = first_order.peak(curves)
            best = curves[0][at]
            yield f"| {row} | {show(accuracy(curves, at))} | {best.committed} | {spent(best):,} |"
        yield from [f"| {row} | not run | | |" for row in rows if row not in found]
        yield ""
    for name in GRIDS:
        if rows_of(name):
            yield f"The grid `{name}`, bytes with framing: {link(f'grid_{name}')}."
            yield ""
    yield from steps_of_zeroth_order()
    yield from skewed.lines(rows_of(skewed.GRID))
    yield "Not run: with layers trained, Dirichlet 0.1 and 5.0, 3 and 50 workers on Banking77 and"
    yield "rounds that ask a sample, but for what a grid above has of them."
    yield ""
    yield from ["### Bytes on the socket", ""]
    yield f"Payload, message, TLS and TCP of a round, and the formula: {link('wire_bytes')}."


def steps_of_zeroth_order() -> Iterator[str]:
    """Yield how local steps along own directions compare with the preset lorand-zo."""
    rows = [row for row in rows_of("zeroth") if row.method == "LoRand, zeroth order"]
    if len(rows) < len(tasks.LABELS):
        return
    yield "Local steps along own directions of a pool of 1,024, as the grid `zeroth` has them, and"
    yield f"the preset `lorand-zo` ({link('presets')}), whose rates were chosen by the loss:"
    yield ""
    yield "| task | passes | accuracy | loss | preset: passes | accuracy | loss |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        cells = [
            f"{curves[0][-1].forwards} | {show(accuracy(curves))} | {show(loss(curves))}"
            for curves in (row.curves, presets.reported("lorand-zo", row.task))
        ]
        yield f"| {row.task} | {' | '.join(cells)} |"
    yield ""


def claims() -> Iterator[str]:
    """Yield what papers say beside what was measured."""
    yield from ["## What papers claim, here", ""]
    yield "Published figures are of other models and data: who is better can be compared, not"
    yield "by how much. *Read* says where a figure was read; some papers could not be had in full."
    yield f"A difference counts beyond {papers.COUNTS} of its standard errors. Presets: 3 workers,"
    yield f"{presets.FORWARDS} forward passes each; what they change from a paper stands in"
    yield "the head of their run file."
    yield from ["", "| paper | claims | read | here | holds | |", "|---|---|---|---|---|---|"]
    yield from (claim.line() for claim in papers.claims())
    yield ""
    yield "Not run: the papers' own models and data (OPT, LLaMA; SST-2, Natural Instructions,"
    yield "Dolly), 200 local steps a round, Ferret's block-wise K, times of rounds, DP-FeedSign."


# -- the rest --------------------------------------------------------------------------------------


def tuning() -> Iterator[str]:
    """Yield the loss of a causal model tuned on instructions."""
    yield from ["## Instruction tuning", ""]
    if not (RESULTS / "small_model.json").exists():
        yield "Not run: no results file has a causal language model that was tuned federatedly."
        return
    yield "![loss against rounds and bytes](../experiments/results/instructions.png)"
    yield ""
    yield f"{instructions.WORKERS} workers, {instructions.ASKED} of them asked a round. The model"
    yield "is small: losses tell methods apart, its answers are no use. FedAvg of LoRA is as FedIT"
    yield f"has it, A and B averaged one by one, with a sample of workers ({link('instructions')})."
    yield from [*instructions.said(), f"({link('small_model')}).", "", *instructions.table()]
    yield from [*instructions.NOTES.splitlines(), *instructions.reached()]


def liars() -> Iterator[str]:
    """Yield the loss with attackers, by rule, and what unlike workers cost."""
    yield from ["## Liars, and workers that are not alike", ""]
    seeds = len(byzantine.SEEDS)
    yield f"Loss above that of a mean without attackers, ten workers with data alike, {seeds} seeds"
    yield f"({link('byzantine')}, which has skewed data, too; [robustness.md](robustness.md)):"
    rules = [rule for rule in byzantine.RULES if rule != byzantine.ALONE]
    yield from ["", "| attack | " + " | ".join(rules) + " |", "|---" * (len(rules) + 1) + "|"]
    for attack, count in byzantine.cases("alike"):
        above = (papers.losses_above(rule, "alike", attack, count) for rule in rules)
        who = f"{attack}, {count} of {byzantine.WORKERS}" if count else "none"
        yield f"| {who} | " + " | ".join(f"{each:+.1%}" for each in above) + " |"
    yield ""
    yield f"Bytes of who joins late: {link('late_join')}."
    yield ""
    yield from heterogeneity.summary(link("heterogeneity"))


def files() -> Iterator[str]:
    """Yield every other page of results by what it claims."""
    yield from ["## All results", ""]
    for path in sorted(RESULTS.glob("*.md")):
        said = path.read_text(encoding="utf-8").splitlines()[2]
        yield f"- {link(path.stem)}: {said.split(': ', 1)[-1]}"
    yield ""
    yield "[measured.md](measured.md) has the figures of these and of the benchmarks in short. Of"
    yield "speed and memory, each with its script in [benchmarks](../benchmarks):"
    yield ""
    names = sorted(path.stem for path in scaling.BENCHMARKS.glob("*.json"))
    yield ", ".join(f"[{name}](../benchmarks/results/{name}.json)" for name in names) + "."


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
