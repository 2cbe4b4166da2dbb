"""Rounds of which only the noisy sum of all participants is kept: central noise, secure sums.

Either way the ledger holds what left the sum, as the contribution of worker 0 in the run's upward
codec: single contributions are in memory until their round ends, and nowhere else.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import numpy as np

from lorand import codec
from lorand.config import RunConfig
from lorand.errors import ContributionError
from lorand.ledger import Position
from lorand.privacy import plan
from lorand.privacy.mechanism import Integers, Mechanism
from lorand.privacy.sampler import Below
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb

EVERYONE: Final = 0
"""The worker number that the noisy mean is stored under; members are numbered from 1."""


class Summing(Protocol):
    """How the contributions to a round become the noisy sum."""

    mechanism: Mechanism
    all_or_nothing: bool

    def greet(self, worker: int, hello: wire.Hello) -> None:
        """Take what a worker brings for the sums. Raises HandshakeError."""

    def keys_for(self, worker: int) -> wire.SumKeys | None:
        """Return what a worker must hear before its next round, None where it has."""

    def begin(self, round_index: int, names: Sequence[str], position: Position) -> bytes:
        """Begin a round among these; return what goes with its start. Raises HandshakeError."""

    def check(self, name: str, contribution: pb.Contribution) -> None:
        """Raise ContributionError for a contribution that cannot be in the sum."""

    def total(self, contributions: Mapping[str, pb.Contribution]) -> Integers:
        """Return the noisy sum in grid steps, shape (K,). Raises UnsoundRound."""


def stored(
    config: RunConfig,
    summing: Summing,
    contributions: Mapping[str, pb.Contribution],
    round_index: int,
    scale_exponent: int,
) -> pb.StoredContribution:
    """Return the noisy mean of these contributions, as the ledger keeps it. Raises UnsoundRound.

    Rounding to codes comes after the noise: it tells no more.
    """
    mean = summing.mechanism.mean(summing.total(contributions), len(contributions))
    codes = codec.encode(config.codec.up, mean, scale_exponent)
    packed = codec.pack(config.codec.up, codes)
    contribution = pb.Contribution(round_index=round_index, codes=packed)
    return pb.StoredContribution(worker=EVERYONE, contribution=contribution)


class CentralSum:
    """Noise that the coordinator adds once to the sum of all; everyone trusts it to."""

    all_or_nothing = False

    def __init__(
        self, config: RunConfig, multiplier: float, below: Below = secrets.randbelow
    ) -> None:
        """Take the noise multiplier of `plan.planned`; `below` is for tests."""
        self.mechanism = plan.whole(config, multiplier)
        self._length = config.num_directions
        self._largest = plan.largest_number(config, multiplier)
        self._below = below

    def greet(self, worker: int, hello: wire.Hello) -> None:
        """See Summing. A worker brings nothing."""

    def keys_for(self, worker: int) -> wire.SumKeys | None:
        """See Summing. There are no keys."""
        return None

    def begin(self, round_index: int, names: Sequence[str], position: Position) -> bytes:
        """See Summing. Nothing goes with the start."""
        return b""

    def check(self, name: str, contribution: pb.Contribution) -> None:
        """See Summing."""
        self._read(contribution)

    def total(self, contributions: Mapping[str, pb.Contribution]) -> Integers:
        """See Summing."""
        parts = [self._read(contribution) for contribution in contributions.values()]
        return self.mechanism.noisy(np.sum(parts, axis=0, dtype=np.int64), self._below)

    def _read(self, contribution: pb.Contribution) -> Integers:
        if len(contribution.sum) != 8 * self._length:
            raise ContributionError(
                f"{self._length} numbers of a sum take {8 * self._length} bytes, not "
                f"{len(contribution.sum)}"
            )
        numbers = np.frombuffer(contribution.sum, "<i8").astype(np.int64)
        if int(numbers.max()) > self._largest or int(numbers.min()) < -self._largest:
            raise ContributionError(f"a number of the sum is beyond {self._largest}")
        return numbers
