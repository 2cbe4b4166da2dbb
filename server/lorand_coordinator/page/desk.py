"""Behind the page's server: which run is shown, its curve, and when to look again."""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Final

from lorand.config import RunConfig
from lorand_coordinator.hub import Hub
from lorand_coordinator.page import view
from lorand_coordinator.page.curve import Curve
from lorand_coordinator.page.feed import Feed
from lorand_coordinator.page.metrics import Metrics
from lorand_coordinator.page.view import Spent
from lorand_coordinator.tally import Outcome

REFRESH_S: Final = 0.5
TABLE_S: Final = 1.0
"""Pages of the table of workers are as old as this at most."""

log = logging.getLogger("lorand.coordinator")


class PageDesk:
    """What the server shows. It looks at the run twice a second while anybody watches."""

    def __init__(
        self,
        config: RunConfig,
        read_curve: Callable[[], list[Outcome]],
        spent: Callable[[], Spent | None] = lambda: None,
    ) -> None:
        """Show nothing yet; `read_curve` reads the rounds of the ledger, in a thread."""
        self.feed = Feed()
        self._config, self._read_curve, self._spent = config, read_curve, spent
        self._hub: Hub | None = None
        self._reason = "starting"
        self._curve, self._waiting = Curve(), list[Outcome]()
        self._reading: asyncio.Task[None] | None = None
        self._tables: dict[tuple[int, str, bool], tuple[float, bytes]] = {}
        self._metrics = Metrics(config.run.name, lambda: (self._hub, spent()))

    # -- what is shown ---------------------------------------------------------------------------

    def lead(self, hub: Hub) -> None:
        """Show this hub's run; rounds before now are read from the ledger."""
        self._hub, self._curve, self._waiting = hub, Curve(), []
        self._tables.clear()
        if self._reading is not None:
            self._reading.cancel()
        hub.sequencer.observers.append(self._committed)
        self._reading = asyncio.create_task(self._read())

    def rest(self, reason: str) -> None:
        """Show that this coordinator leads nothing, and why."""
        self._hub, self._reason = None, reason

    def _committed(self, outcome: Outcome) -> None:
        assert self._hub is not None
        now = self._hub.clock()
        self._metrics.committed(now - self._hub.stepped, now - self._hub.sequencer.engine.began)
        (self._waiting.append if self._reading is not None else self._curve.add)(outcome)

    async def _read(self) -> None:
        """Fill the curve with the rounds of the ledger, then with those that came meanwhile."""
        if self._hub is not None and self._hub.sequencer.engine.committed:
            for outcome in await asyncio.to_thread(self._read_curve):
                self._curve.add(outcome)
        for outcome in self._waiting:
            self._curve.add(outcome)
        self._waiting, self._reading = [], None

    # -- what the server asks --------------------------------------------------------------------

    def refresh(self) -> None:
        """Put the newest into the feed; what did not change is not sent again."""
        hub = self._hub
        if hub is None:
            self.feed.put("status", view.standing_by(self._config, self._reason))
            return
        self.feed.put("status", view.status(hub, self._spent()))
        curves = {"rounds": self._curve.columns(), "evaluations": view.evaluations(hub)}
        self.feed.put("curves", curves)

    def workers(self, page: int, order: str, descending: bool) -> bytes:
        """See Desk."""
        if self._hub is None:
            return b'{"rows":[],"page":0,"pages":1,"known":0}'
        asked, now = (page, order, descending), time.monotonic()
        made, body = self._tables.get(asked, (-TABLE_S, b""))
        if now - made >= TABLE_S:
            if len(self._tables) > 100:
                self._tables.clear()
            table = view.workers(self._hub, page, order, descending=descending)
            body = json.dumps(table, separators=(",", ":")).encode()
            self._tables[asked] = now, body
        return body

    def metrics(self) -> tuple[bytes, str]:
        """See Desk."""
        return self._metrics.text()

    # -- in the background -----------------------------------------------------------------------

    async def keep_fresh(self) -> None:
        """Look at the run while anybody watches, until cancelled."""
        while True:
            await asyncio.sleep(REFRESH_S)
            if self.feed.viewers:
                self._try_refresh()

    def _try_refresh(self) -> None:
        try:
            self.refresh()
        except Exception:  # a fault of ours: it must be seen, and not end the page
            log.exception("the page could not be brought up to date")
