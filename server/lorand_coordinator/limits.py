"""How much one peer may ask of a coordinator: rates as token buckets, and bounds (pure)."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

from lorand.errors import LorandError

CALLS_BURST_S: Final = 5.0
"""Calls are saved up for so long by who makes none: to come back takes six at once."""
CALLS_AT_ONCE: Final = 8
"""Calls of one peer that are open at the same time."""
PEERS_KNOWN: Final = 10_000
"""Peers whose calls are counted; who made none for longest is forgotten first."""
REQUEST_S: Final = 20.0
"""A call waits for its request for so long."""
PATIENCE_S: Final = 10.0
"""A worker that sends too much is held back for so long before its stream ends."""
OUTBOX_BYTES: Final = 16 << 20
"""Bytes that wait for one slow worker, beside `service.outbox_messages`, and of entries that come
with a join. An entry that waits for many workers is there once."""
ENROLMENT_CALLS_PER_S: Final = 5.0
ENROLMENT_BURST: Final = 60.0
"""Calls for enrolment from one address; an enrolment takes three."""
ROUNDING: Final = 1e-9
"""Of a token: who waited for as long as it was told does not wait again for a rounded last bit."""


class TooMany(LorandError):
    """A peer asks for more than its share."""


class Bucket:
    """Tokens that come at a rate and are saved up to a number; it begins full."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        """`rate` is tokens a second; `now` is of the clock that every call is given."""
        self.rate, self.burst = rate, max(1.0, burst)
        self.level, self._at = self.burst, now

    def take(self, now: float) -> float:
        """Take a token and return 0; where there is none, return the seconds until one comes."""
        gone = max(0.0, now - self._at)
        self._at += gone
        self.level = min(self.burst, self.level + gone * self.rate)
        if self.level < 1.0 - ROUNDING:
            return (1.0 - self.level) / self.rate
        self.level -= 1.0
        return 0.0


class Buckets:
    """A bucket for each of many peers, as many as are remembered."""

    def __init__(self, rate: float, burst: float, most: int = PEERS_KNOWN) -> None:
        """All of them have this rate and burst."""
        self._rate, self._burst, self._most = rate, burst, most
        self._buckets: OrderedDict[Hashable, Bucket] = OrderedDict()

    def __len__(self) -> int:
        """Number of peers remembered."""
        return len(self._buckets)

    def take(self, peer: Hashable, now: float) -> float:
        """Take a token of a peer's bucket; see `Bucket.take`."""
        bucket = self._buckets.get(peer)
        if bucket is None:
            bucket = self._buckets[peer] = Bucket(self._rate, self._burst, now)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(peer)
        return bucket.take(now)


class Flow:
    """The messages of one stream: held back when there are too many, for a while."""

    def __init__(self, rate: float, now: float) -> None:
        """A second's worth is saved up."""
        self._bucket = Bucket(rate, rate, now)
        self._calm = now

    def take(self, now: float) -> float:
        """Take a message and return 0, or return the seconds for which none may be read.

        Raises TooMany when the sender did not let up for PATIENCE_S.
        """
        wait = self._bucket.take(now)
        if self._bucket.level >= self._bucket.burst / 2:
            self._calm = now
        elif wait and now - self._calm > PATIENCE_S:
            raise TooMany(
                f"more than {self._bucket.rate:g} messages a second came for {PATIENCE_S:.0f} s "
                "(service.messages_per_s)"
            )
        return wait
