"""What a private run spent so far, for people: counted now and then, in a thread."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

from lorand.config import RunConfig
from lorand.errors import LorandError
from lorand.privacy import accountant, plan
from lorand.privacy.accountant import Release
from lorand_coordinator.hub import Hub
from lorand_coordinator.page import view
from lorand_coordinator.page.view import Spent

SPENT_S: Final = 30.0
"""Seconds between two looks: accounting takes seconds."""

log = logging.getLogger("lorand.coordinator")


@dataclass
class Spending:
    """Follows the hub it is given; `spent` is None until it was counted, and where nothing is."""

    config: RunConfig
    hub: Hub | None = None
    spent: Spent | None = None

    def __post_init__(self) -> None:
        """Know nothing yet."""
        self._release: Release | None = None
        self._unaccounted = self.config.privacy.differences

    async def keep_fresh(self) -> None:
        """Count what a private run spent, until cancelled; of another run there is nothing."""
        while self.config.privacy.noised:
            if self.hub is not None:
                rounds = view.rounds_released(self.hub)
                if self.spent is None or self.spent.rounds != rounds:
                    epsilon = await asyncio.to_thread(self._epsilon, rounds)
                    self.spent = Spent(rounds, epsilon)
            await asyncio.sleep(SPENT_S)

    def _epsilon(self, rounds: int) -> float | None:
        """Return what so many rounds spend; None where that is not known here."""
        if self._unaccounted:
            return None
        try:
            self._release = self._release or plan.planned(self.config)
            return accountant.epsilon(self._release, rounds, self.config.privacy.delta)
        except LorandError as error:
            log.info("what is spent is not shown: %s", error)
            self._unaccounted = True
            return None
