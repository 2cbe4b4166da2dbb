"""What a worker shows its owner: notes, and a progress bar where there is a terminal."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from lorand import logs, tracking
from lorand.config import RunConfig
from lorand.logs import LogFormat

LINE_EVERY_S = 5.0

log = logging.getLogger("lorand")


class ConsoleReporter:
    """Writes to standard error; `quiet` says nothing (standard output is for results).

    In JSON there is an object a line, also with `quiet`: who asks for a log wants it.
    """

    def __init__(self, *, quiet: bool, log_format: LogFormat = LogFormat.TEXT) -> None:
        """Draw nothing yet."""
        self._json = log_format is LogFormat.JSON
        self._trackers = tracking.Background({})
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_note = ""
        self._last_line = 0.0

    def note(self, text: str, **figures: int) -> None:
        """Say a sentence, once in a row; in JSON with figures beside it."""
        if text == self._last_note:
            return
        self._last_note = text
        if self._json:
            line = {"time": logs.stamp(time.time()), "message": text, **figures}
            typer.echo(json.dumps(line), err=True)
        else:
            self._console.print(text, markup=False)

    def progress(self, committed: int, total: int, text: str) -> None:
        """Show how far the run is: a bar on a terminal, else a line now and then."""
        if self._json or not self._console.is_terminal:
            now = time.monotonic()
            if now - self._last_line >= LINE_EVERY_S or committed == total:
                self._last_line = now
                line = f"round {committed} of {total}  {text}".rstrip()
                self.note(line, round=committed, rounds=total)
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("round"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(text, total=total)
        assert self._task is not None
        self._bar.update(self._task, completed=committed, description=text)

    def follow_log(self) -> None:
        """Say what the library logs from now on, such as that it compiles its kernels."""
        log.handlers = [handler for handler in log.handlers if not isinstance(handler, _Notes)]
        log.addHandler(_Notes(self))
        log.setLevel(logging.INFO)
        log.propagate = False

    def report_to(self, trackers: str, config: RunConfig, name: str, folder: Path | None) -> None:
        """Write figures to trackers from now on, as this name. Raises ConfigError."""
        self._trackers = tracking.open_all(trackers, config, name, folder or Path("tracking"))

    def figures(self, step: int, values: dict[str, float | None]) -> None:
        """Have the figures of a step written to the trackers that were asked for."""
        self._trackers.log(step, values)

    def close(self) -> None:
        """Leave the last state of the bar on the screen; safe to call twice."""
        self._trackers.close()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def say(result: dict[str, Any], text: str, json_output: bool) -> None:
    """Write a command's result to standard output, for scripts or for people."""
    typer.echo(json.dumps(result) if json_output else text)


class _Notes(logging.Handler):
    def __init__(self, report: ConsoleReporter) -> None:
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.note(record.getMessage())
