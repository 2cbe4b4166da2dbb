"""What docs/results.md says of the grid `heterogeneous`: skewed shards, many workers, samples."""

from collections.abc import Iterator, Sequence
from typing import Final

from experiments.cells import first_at, show
from experiments.federation import Point
from experiments.grid import Reported

GRID: Final = "heterogeneous"
LINK: Final = f"[grid_{GRID}](../experiments/results/grid_{GRID}.md)"
TARGET: Final = "10 workers, Dirichlet 0.5"
"""The task that experiments/first_order.py has, too, with the last two layers trained."""
SAMPLED: Final = "10 a round"


def lines(rows: Sequence[Reported]) -> Iterator[str]:
    """Yield LoRand beside FedAvg, a line a task and way of asking; nothing without rows."""
    if not rows:
        return
    yield "**banking77, the head alone trained**, by how alike the workers' labels are (the lower"
    yield "Dirichlet's number, the less); `10 a round`: each round asks ten, drawn anew. Bytes have"
    yield "framing and are a worker's in the mean: who is not asked is sent nothing by FedAvg, and"
    yield "by LoRand what the others committed, which all follow"
    yield f"({LINK};"
    yield "what else was tried, on tuning data alone:"
    yield "[grid_head_shapes](../experiments/results/grid_head_shapes.md))."
    yield "FedAvg takes an epoch of AdamW a round: ahead where labels are alike, and drifting apart"
    yield "where they are not. LoRand's rounds are here the gradient of one large batch, which does"
    yield "neither. The largest of three rates was often the best, for both. The last column is how"
    yield "many times the bytes FedAvg takes to LoRand's accuracy:"
    yield ""
    yield "| task | FedAvg | round | bytes | LoRand, 1 bit | round | bytes | times |"
    yield "|---|---|---|---|---|---|---|---|"
    for task in dict.fromkeys(row.task for row in rows):
        for sampled in (False, True):
            alike = [
                row for row in rows if row.task == task and row.method.endswith(SAMPLED) == sampled
            ]
            theirs = next((row for row in alike if row.method.startswith("FedAvg")), None)
            own = next((row for row in alike if row.method.startswith("LoRand")), None)
            if not alike:
                continue
            times = _times(theirs, own) if theirs and own else ""
            name = f"{task}, {SAMPLED}" if sampled else task
            yield f"| {name} | {_cells(theirs)} | {_cells(own)} | {times} |"
    yield ""


def _cells(row: Reported | None) -> str:
    if row is None:
        return "not run | | "
    return f"{show(row.at(row.peak))} | {row.curves[0][row.peak].committed} | {_bytes(row):,}"


def _times(theirs: Reported, own: Reported) -> str:
    point = first_at(theirs.curves, own.at(own.peak)[0])
    return f"{_both(point) / _bytes(own):,.1f}" if point else "never"


def _bytes(row: Reported) -> int:
    return _both(row.curves[0][row.peak])


def _both(point: Point) -> int:
    return point.bytes_up + point.bytes_down
