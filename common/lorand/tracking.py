"""Figures of a run to the experiment trackers that people use, through one small writer.

A tracker is somebody else's library and may be somebody else's service: it is chosen by the user,
imported when chosen, written to from a thread of its own, and its failure ends nothing but itself.
"""

import logging
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Protocol

import typer

from lorand import trackers
from lorand.config import RunConfig
from lorand.errors import ConfigError

WAITING: Final = 10_000
"""Rounds that may wait for a slow tracker; later ones are then left out."""
CLOSING_S: Final = 20.0

ReportTo = Annotated[
    str,
    typer.Option(
        help=f"Write figures to trackers, with commas: {', '.join(trackers.MAKERS)}.",
    ),
]
TrackingFolder = Annotated[
    Path | None,
    typer.Option(help="Where trackers that keep files keep them; default: tracking/."),
]

log = logging.getLogger("lorand.tracking")


class LogWriter(Protocol):
    """Where figures go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the figures of a step; steps do not fall."""

    def close(self) -> None:
        """Write what is left, and end."""


def names_in(report_to: str) -> list[str]:
    """Return the trackers in a list with commas. Raises ConfigError.

    >>> names_in("trackio, tensorboard")
    ['trackio', 'tensorboard']
    """
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    for name in names:
        if name not in trackers.MAKERS:
            known = ", ".join(trackers.MAKERS)
            raise ConfigError(f"--report-to {name!r} is not known; choose of {known}")
    return list(dict.fromkeys(names))


def open_all(report_to: str, config: RunConfig, name: str, folder: Path) -> "Background":
    """Open the writers of --report-to for a run: `name` is who reports.

    Trackers that keep files keep them in `folder`. Raises ConfigError for one that is unknown, not
    installed, or does not start.
    """
    settings: dict[str, object] = {
        "model": config.model.name,
        "estimator": config.estimator.kind,
        "rounds": config.run.rounds,
        "run_digest": config.digest().hex(),
    }
    writers: dict[str, LogWriter] = {}
    for tracker in names_in(report_to):
        try:
            writers[tracker] = trackers.MAKERS[tracker](config.run.name, name, settings, folder)
        except Exception as error:  # a stranger's library: whatever it raises
            Background(writers).close()
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"--report-to {tracker}: it does not start ({error}); see its own documentation, "
                "or leave it away"
            ) from error
    return Background(writers)


class Background:
    """Writes to several trackers from a thread, so that none of them holds up a round."""

    def __init__(self, writers: Mapping[str, LogWriter]) -> None:
        """Start the thread, if there is anything to write to."""
        self._writers = dict(writers)
        self._queue: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(WAITING)
        self._left_out = 0
        self._thread: threading.Thread | None = None
        if self._writers:
            self._thread = threading.Thread(target=self._write, name="tracking", daemon=True)
            self._thread.start()

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Have the figures that are known written; never waits."""
        known = {name: value for name, value in values.items() if value is not None}
        if self._thread is None or not known:
            return
        try:
            self._queue.put_nowait((step, known))
        except queue.Full:
            self._left_out += 1
            if self._left_out == 1:
                log.warning("a tracker is slow: some rounds are left out of it")

    def close(self) -> None:
        """Wait a while for what is left to be written; safe to call twice."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        try:
            self._queue.put(None, timeout=CLOSING_S)
        except queue.Full:
            log.warning("a tracker does not read: the last rounds are not in it")
            return
        thread.join(CLOSING_S)
        if thread.is_alive():
            log.warning("a tracker did not end within %.0f s: it is left behind", CLOSING_S)

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            for name in list(self._writers):
                self._try(name, item)
        for name in list(self._writers):
            self._try(name, None)

    def _try(self, name: str, item: tuple[int, Mapping[str, float]] | None) -> None:
        try:
            if item is None:
                self._writers[name].close()
            else:
                self._writers[name].log(*item)
        except Exception as error:  # a stranger's library: whatever it raises, the run goes on
            log.warning("%s failed and is written to no more: %s", name, error)
            del self._writers[name]
