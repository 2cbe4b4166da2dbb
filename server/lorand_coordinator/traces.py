"""Rounds as OpenTelemetry spans, and the coordinator's meters; only where --otel is given.

A round's span is made when the round ends, from what the hub knows then: a round under way knows of
no span, and nothing is done while it lasts.
"""

import asyncio
import logging
from typing import Final

from lorand.config import RunConfig
from lorand.otel import Attributes, RoundId
from lorand.otlp import Sender
from lorand_coordinator import meters
from lorand_coordinator.hub import Hub
from lorand_coordinator.rounds import State
from lorand_coordinator.spending import Spending
from lorand_coordinator.tally import Outcome

REFRESH_S: Final = 5.0
"""Meters are as old as this at most when they are sent."""

log = logging.getLogger("lorand.coordinator")


def of_round(config: RunConfig, engine: State, rejected: int) -> dict[str, str | int | float]:
    """Return what is told of a round that ends; `rejected` are messages since the one before."""
    return {
        "lorand.run": config.run.name,
        "lorand.round": engine.round_index,
        "lorand.participants": len(engine.participants),
        "lorand.accepted": len(engine.contributions),
        "lorand.skipped": len(engine.skipped),
        "lorand.rejected": rejected,
    }


def of_outcome(outcome: Outcome) -> Attributes:
    """Return what is told of a committed round besides, as far as it is known."""
    values = {
        "lorand.committed": outcome.committed,
        "lorand.loss": outcome.loss,
        "lorand.signal_to_noise": outcome.signal_to_noise,
    }
    return {name: value for name, value in values.items() if value is not None}


class Traces:
    """Sends the rounds of whichever hub leads the run in this process, and what it counts."""

    def __init__(self, config: RunConfig, sender: Sender, spending: Spending) -> None:
        """Send nothing yet."""
        self._config, self._sender, self._spending = config, sender, spending
        self._commits = sender.histogram(meters.COMMITS)
        self._rounds = sender.histogram(meters.ROUNDS)
        self._hub: Hub | None = None
        self._rejected = 0

    def lead(self, hub: Hub) -> None:
        """Follow this hub from now on."""
        self._hub, self._rejected = hub, hub.sequencer.tally.rejected.total()
        hub.sequencer.observers.append(self._committed)
        hub.sequencer.on_abandon.append(self._abandoned)
        self.refresh()

    def rest(self) -> None:
        """Follow no hub."""
        self._hub = None
        self.refresh()

    def refresh(self) -> None:
        """Have the meters sent as they are now."""
        try:
            self._sender.show(meters.of(self._config.run.name, self._hub, self._spending.spent))
        except Exception:  # a fault of ours, or a ledger that is gone: the run goes on
            log.exception("the meters of --otel could not be brought up to date")

    async def keep_fresh(self) -> None:
        """Look at the meters now and then, until cancelled."""
        while True:
            self.refresh()
            await asyncio.sleep(REFRESH_S)

    def _committed(self, outcome: Outcome) -> None:
        hub = self._hub
        assert hub is not None
        now = hub.clock()
        self._commits(now - hub.stepped)
        self._rounds(now - hub.sequencer.engine.began)
        self._ended(hub, of_outcome(outcome))

    def _abandoned(self, why: str) -> None:
        if self._hub is not None:
            self._ended(self._hub, {}, why)

    def _ended(self, hub: Hub, more: Attributes, wrong: str = "") -> None:
        sequencer, position = hub.sequencer, hub.sequencer.position
        assert position is not None
        engine, rejected = sequencer.engine, sequencer.tally.rejected.total()
        self._sender.ended(
            RoundId.of(position.run_digest, engine.round_index),
            "round",
            hub.clock() - engine.began,
            of_round(self._config, engine, rejected - self._rejected) | dict(more),
            wrong,
        )
        self._rejected = rejected
