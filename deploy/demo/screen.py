"""What the demo shows: a live panel a run, and the table at the end."""

import io
import re
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lorand.v1 import status_pb2 as status

LINE_EVERY_S: Final = 10.0
PICTURE_WIDTH: Final = 100
NEXT: Final = """With your own data (a hub has the model as sentence-transformers/all-MiniLM-L6-v2):
  lr-coordinator init && lr-worker prepare run.toml && lr-coordinator serve run.toml --insecure
  lr-worker join 127.0.0.1:7700 --insecure --data reviews.csv --seed-pool"""
TITLES: Final = {
    "zeroth-order": "Zeroth-order: two forward passes a scalar, one byte a scalar",
    "first-order": "First-order: one backward pass, 32,768 one-byte scalars",
}


class Screen:
    """A panel that follows one run; without a terminal, a line now and then."""

    def __init__(self, console: Console, run: str) -> None:
        """Show nothing yet."""
        self._console = console
        self._title = TITLES[run]
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._last = 0.0
        self._shown = ""
        self.panel: Panel | None = None

    def __enter__(self) -> Self:
        """Begin to draw."""
        if self._live:
            self._live.start()
        else:
            self._console.print(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Leave the last picture on the screen."""
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Show a sentence before the run."""
        if not self._live:
            self._console.print(text)

    def update(self, answer: status.GetStatusResponse, moved: dict[str, tuple[int, int]]) -> None:
        """Show a status and the bytes on each worker's socket (sent, received)."""
        self.panel = self._panel(answer, moved)
        if self._live:
            self._live.update(self.panel)
            return
        line = f"  {_line(answer)}; {answer.reason}"
        due = time.monotonic() - self._last > LINE_EVERY_S or answer.phase == "finished"
        if due and line != self._shown:
            self._last, self._shown = time.monotonic(), line
            self._console.print(line, soft_wrap=True)

    def _panel(self, answer: status.GetStatusResponse, moved: dict[str, tuple[int, int]]) -> Panel:
        table = Table(box=None, pad_edge=False)
        for column in ("worker", "private reviews of", "rounds in", "sent", "received"):
            table.add_column(column, justify="right" if column != "private reviews of" else "left")
        for worker in answer.workers:
            sent, received = moved.get(worker.name, (0, 0))
            table.add_row(
                str(worker.worker),
                worker.name,
                str(worker.contributions),
                f"{sent:,} B",
                f"{received:,} B",
            )
        bar = Table.grid()  # a bar alone does not end its line
        bar.add_row(ProgressBar(total=answer.rounds, completed=answer.committed, width=60))
        points = [f"{e.committed}: {e.accuracy:.3f}" for e in answer.evaluations]
        curve = "  ".join(points if len(points) <= 6 else [points[0], "…", *points[-4:]])
        return Panel(
            Group(
                bar,
                Text(f"{_line(answer)}; {answer.reason}"),
                Text(f"held-out accuracy after rounds  {curve}" if curve else ""),
                table,
            ),
            title=self._title,
            title_align="left",
            width=100,
        )


def picture(path: Path, panels: list[Panel], result: dict[str, Any]) -> None:
    """Write the last panels and the table as an SVG picture that loads nothing from outside."""
    console = Console(record=True, file=io.StringIO(), force_terminal=True, width=PICTURE_WIDTH)
    for panel in panels:
        console.print(panel)
    table(console, result)
    svg = console.export_svg(title="make demo")
    path.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")


def _line(answer: status.GetStatusResponse) -> str:
    text = f"round {answer.committed} of {answer.rounds}"
    if answer.HasField("loss"):
        text += f", loss {answer.loss:.4f}"
    if answer.evaluations:
        text += f", accuracy {answer.evaluations[-1].accuracy:.3f}"
    return text


def table(console: Console, result: dict[str, Any]) -> None:
    """Print the closing table."""
    view = Table(title="The same 22.6-million-parameter model, three private data sets")
    view.add_column("")
    for name in ("zeroth-order", "first-order"):
        view.add_column(name, justify="right")
    runs = [result["zeroth_order"], result["first_order"]]

    def spread(values: dict[str, int]) -> str:
        low, high = min(values.values()), max(values.values())
        return f"{low:,} – {high:,}"

    rows: list[tuple[str, list[str]]] = [
        ("accuracy before", [f"{run['accuracy_before']:.3f}" for run in runs]),
        ("accuracy after", [f"{run['accuracy_after']:.3f}" for run in runs]),
        ("rounds", [str(run["rounds"]) for run in runs]),
        ("seconds", [f"{run['seconds']:.0f}" for run in runs]),
        ("bytes a worker sent", [spread(run["bytes_sent_per_worker"]) for run in runs]),
        ("bytes a worker received", [spread(run["bytes_received_per_worker"]) for run in runs]),
        ("adapter, bytes", [f"{run['adapter_bytes']:,}" for run in runs]),
        ("weights digest", [_digest(result, name) for name in ("zeroth_order", "first_order")]),
    ]
    for label, cells in rows:
        view.add_row(label, *cells)
    console.print(view)
    if result["digests_agree"]:
        console.print("Replay of the ledger and all three replicas agree on every bit.")
    else:
        console.print("THE REPLICAS DIFFER: this must never happen; please report it.")
    for run in runs:
        console.print(f"adapter: {run['adapter']}")
    console.print("wrote demo-summary.json\n")
    console.print(NEXT, markup=False, highlight=False, soft_wrap=True)


def _digest(result: dict[str, Any], name: str) -> str:
    digests = set(result["digests"][name].values())
    return digests.pop()[:16] if len(digests) == 1 else "differ"
