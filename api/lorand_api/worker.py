"""A worker in a thread of this process, for scripts, notebooks and tests."""

import logging
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, Self

from lorand_worker import joining
from lorand_worker.joining import Joined, Joining
from lorand_worker.link import Link, Stopped
from lorand_worker.session import Reporter

log = logging.getLogger("lorand.worker")
STOP_S: Final = 60.0
"""How long a worker may take to notice that it was stopped: it ends a measurement first."""


class LogReporter:
    """Says what a worker tells its owner in the log `lorand.worker`."""

    def __init__(self, name: str) -> None:
        """Begin each line with the worker's name."""
        self._name = name

    def note(self, text: str) -> None:
        """Say a sentence."""
        log.info("%s: %s", self._name, text)

    def progress(self, committed: int, total: int, text: str) -> None:
        """Say how far the run is."""
        log.info("%s: round %d of %d  %s", self._name, committed, total, text)


class Worker:
    """What `lr-worker join` does: from the coordinator's address to the end of the run.

    It is a context manager that starts, and stops what still runs; `wait` returns what came of it.
    What leaves this machine is told to `report` at the join, by default to the log.
    """

    def __init__(
        self,
        address: str,
        data: Path | str,
        *,
        name: str = "",
        model: Path | str | None = None,
        device: str = "auto",
        insecure: bool = False,
        seed: int | None = None,
        report: Reporter | None = None,
        **settings: Any,
    ) -> None:
        """Take what the flags of `lr-worker join` say; nothing is opened yet.

        `insecure` goes with a coordinator on this machine that was started so, as
        `lorand.Coordinator` is. `seed` fixes batches and rounding, for experiments. `settings` are
        other fields of `lorand_worker.joining.Joining`, by name.
        """
        self.asked = Joining(
            address,
            Path(data),
            name=name,
            model=None if model is None else Path(model),
            device=device,
            insecure=insecure,
            seed=seed,
            **settings,
        )
        self._report = report or LogReporter(name or Path(data).stem)
        self._link: Link | None = None
        self._stopping = threading.Event()
        self._result: Future[Joined] = Future()
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Join the run in a thread."""
        assert self._thread is None, "a worker is started once"
        self._thread = threading.Thread(target=self._run, name="lorand-worker", daemon=True)
        self._thread.start()
        return self

    def wait(self, timeout_s: float) -> Joined:
        """Return what the worker did, when the run is finished.

        Raises TimeoutError, and LorandError as the command would end with.
        """
        return self._result.result(timeout_s)

    def stop(self) -> None:
        """Leave the run: another worker of the name goes on. Safe to call twice."""
        self._stopping.set()
        if self._link is not None:
            self._link.stop()
        if self._thread is not None:
            self._thread.join(STOP_S)

    def __enter__(self) -> Self:
        """Start it."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.stop()

    def _run(self) -> None:
        try:
            self._result.set_result(joining.join(self.asked, self._report, opened=self._opened))
        except BaseException as error:  # told to whoever waits
            if not isinstance(error, Stopped):
                log.error("%s: %s", self.asked.name or self.asked.data, error)
            self._result.set_exception(error)

    def _opened(self, link: Link) -> None:
        self._link = link
        if self._stopping.is_set():
            link.stop()
