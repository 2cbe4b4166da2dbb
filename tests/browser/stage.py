"""A page that a browser opens: a run in memory, served from a thread's event loop."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from tests.runs import IDENTITY, config_of
from tests.unit.page.staging import Stage

from lorand.config import RunConfig
from lorand_coordinator.page import server
from lorand_coordinator.page.access import Gate
from lorand_coordinator.page.desk import PageDesk

LIMIT_S: Final = 20.0
RUN: Final[dict[str, dict[str, Any]]] = {
    "run": {"name": "sentiment", "rounds": 600},
    "rounds": {"quorum": 3},
}
_Result = TypeVar("_Result")


class Theatre:
    """A stage, its desk and its server; `do` runs something in their loop, as a network would."""

    def __init__(self, config: RunConfig | None = None) -> None:
        self._config = config or config_of(**RUN)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.stage = self.do(lambda: Stage(IDENTITY, self._config))
        self.desk = self.do(lambda: PageDesk(self._config, list))
        self.port = 0
        self.open()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def do(self, what: Callable[[], _Result]) -> _Result:
        """Return what something returns, called in the loop."""

        async def call() -> _Result:
            return what()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(LIMIT_S)

    def lead(self) -> None:
        """Show the stage's run."""
        self.do(lambda: self.desk.lead(self.stage.hub))

    def open(self) -> None:
        """Serve, at the same port as before."""
        listening = server.listen(f"127.0.0.1:{self.port}")
        self.port = listening.getsockname()[1]
        self._over, ready = asyncio.Event(), threading.Event()

        async def run() -> None:
            fresh = asyncio.create_task(self.desk.keep_fresh())
            async with server.served(self.desk, Gate(), listening):
                ready.set()
                await self._over.wait()
            fresh.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await fresh

        self._served = asyncio.run_coroutine_threadsafe(run(), self._loop)
        assert ready.wait(LIMIT_S)

    def shut(self) -> None:
        """Serve no more, as when the coordinator is stopped."""
        self._loop.call_soon_threadsafe(self._over.set)
        self._served.result(LIMIT_S)

    def again(self) -> None:
        """Serve again, as a coordinator that was started again."""

        def renew() -> None:
            self.desk = PageDesk(self._config, list)
            self.desk.lead(self.stage.hub)

        self.do(renew)
        self.open()

    def close(self) -> None:
        if not self._served.done():
            self.shut()
        self.do(self.stage.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LIMIT_S)
        self._loop.close()
