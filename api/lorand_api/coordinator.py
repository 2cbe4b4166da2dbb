"""A coordinator in a thread of this process, for scripts, notebooks and tests."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, Self

from lorand.config import RunConfig
from lorand.errors import ConfigError, LorandError
from lorand.ledger import Position
from lorand.manifest import Identity
from lorand.privacy.primitives import IdentityKey
from lorand_api.runs import Run, config_of, identity_beside
from lorand_coordinator import identity_cli, service, signing
from lorand_coordinator.hub import Hub
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import SqliteStore

START_S: Final = 30.0
"""How long a coordinator may take to listen, or to end beside its drain."""
POLL_S: Final = 0.02
"""How often those who wait look again."""


class Coordinator:
    """What `lr-coordinator serve` does, for workers on this machine; also a context manager.

    Connections are neither encrypted nor authenticated, so that no other machine is let in: a run
    of several is served by the command.
    """

    def __init__(
        self,
        run: Run,
        *,
        identity: Identity | None = None,
        ledger_at: Path | str | None = None,
        address: str = "127.0.0.1:0",
    ) -> None:
        """Take a run file, its text or a RunConfig; nothing is opened yet.

        `identity` is what `lorand.prepare` returns: default is the run.lock beside a run file, or
        else the first worker's. `ledger_at` keeps the ledger, and beside it the key that signs it,
        in a file, from which another coordinator goes on; without, both end with this one.
        """
        config = config_of(run)
        self._identity = identity or identity_beside(run)
        if self._identity is None and not config.run.adopt_first_worker:
            raise ConfigError(
                "there is no run.lock: give identity = lorand.prepare(run), or set "
                "run.adopt_first_worker = true"
            )
        service_section = config.service.model_copy(update={"address": address})
        self.config: RunConfig = config.model_copy(update={"service": service_section})
        identity_cli.check_addresses(self.config, insecure=True)
        self._place = None if ledger_at is None else Path(ledger_at)
        self._hub: Hub | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._listens: Future[str] = Future()

    @property
    def address(self) -> str:
        """HOST:PORT of a coordinator that was started."""
        return self._listens.result(timeout=START_S)

    @property
    def position(self) -> Position:
        """Where the ledger ends. Raises LorandError before the run has begun."""
        position = None if self._hub is None else self._hub.sequencer.position
        if position is None:
            raise LorandError("the run has not begun: no worker has joined yet")
        return position

    @property
    def reason(self) -> str:
        """Why the run is where it is, as a sentence."""
        return "not started" if self._hub is None else self._hub.sequencer.reason

    def start(self) -> Self:
        """Open the ledger and listen. Raises LorandError."""
        assert self._thread is None, "a coordinator is started once"
        self._thread = threading.Thread(target=self._run, name="lorand-coordinator", daemon=True)
        self._thread.start()
        self._listens.result(timeout=START_S)
        return self

    def wait_for_workers(self, count: int, timeout_s: float = 600.0) -> None:
        """Return when so many are connected. Raises TimeoutError, with the reason of the run."""

        def are_there(hub: Hub) -> bool:
            return len(hub.connections) >= count

        self._within(self._until(are_there), timeout_s)

    def wait(self, timeout_s: float) -> Position:
        """Return where the ledger ends, when the run is finished. Raises TimeoutError."""

        def is_over(hub: Hub) -> bool:
            return hub.sequencer.engine.phase == "finished"

        self._within(self._until(is_over), timeout_s)
        return self.position

    def stop(self) -> None:
        """End the service as an operator would: nothing is lost. Safe to call twice."""
        if self._thread is None or self._loop is None or self._stop is None:
            return
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(self.config.service.drain_s + START_S)

    def __enter__(self) -> Self:
        """Start it."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # told to whoever waits in start()
            if self._listens.done():
                raise
            self._listens.set_exception(error)

    async def _serve(self) -> None:
        place = self._place
        store = SqliteStore(":memory:" if place is None else place)
        try:
            key = IdentityKey() if place is None else signing.key_at(signing.key_beside(place))
            self._hub = Hub(Sequencer(self.config, store, self._identity, key=key))
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            await service.serve(
                self._hub,
                on_ready=lambda address, _: self._listens.set_result(address),
                until=self._stop,
            )
        finally:
            store.close()

    async def _until(self, what: Callable[[Hub], bool]) -> None:
        assert self._hub is not None
        while not what(self._hub):
            await asyncio.sleep(POLL_S)

    def _within(self, work: Coroutine[Any, Any, None], timeout_s: float) -> None:
        assert self._loop is not None, "it was not started"
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise TimeoutError(f"not within {timeout_s:g} s: {self.reason}") from None
