"""Members of a secure sum, the same every time, and a coordinator's bookkeeping."""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any, Final

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from lorand.privacy import primitives
from lorand.privacy.attempts import MAX_BOUND
from lorand.privacy.secure_sum import (
    Attempt,
    IdentityKey,
    Keys,
    MaskedSum,
    OneVector,
    Roster,
    SumMember,
    masked_bytes,
)
from lorand.privacy.vectors import IntVector

RUN, OTHER_RUN, STATE = bytes(range(32)), bytes(32), bytes(range(32, 64))


def secret(number: int, purpose: str) -> bytes:
    """Private bytes that are the same every time."""
    return hashlib.sha256(f"{purpose} {number}".encode()).digest()


class SameKeys:
    """In place of X25519PrivateKey: the same keys every time."""

    def __init__(self, first: int = 0) -> None:
        self.numbers = count(first)

    def generate(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(secret(next(self.numbers), "ephemeral"))


def name_of(number: int) -> str:
    return f"worker-{number:02}"


class Cohort:
    """Members that agreed, with the same keys every time, and a coordinator's bookkeeping."""

    def __init__(self, size: int, *, bound: int = MAX_BOUND, n_min: int = 3) -> None:
        identities = [IdentityKey(secret(number, "identity")) for number in range(size)]
        names = [name_of(number) for number in range(size)]
        self.identities = identities
        self.roster = Roster.of(
            {name: key.public for name, key in zip(names, identities, strict=True)}
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(primitives, "X25519PrivateKey", SameKeys())
            self.members = [
                SumMember(identity, self.roster, RUN, bound=bound, n_min=n_min)
                for identity in identities
            ]
        self.bound = bound
        self.announcements = [member.announcement for member in self.members]
        self.keys = Keys.verified(RUN, self.roster, self.announcements)
        for member in self.members:
            member.agree(self.announcements)
        self.rounds = count()

    def attempt(self, length: int, present: Iterable[str] | None = None) -> Attempt:
        """Attempt 0 of the next round."""
        return self.keys.attempt(
            next(self.rounds),
            0,
            self.roster.names if present is None else present,
            length=length,
            bound=self.bound,
            state_digest=STATE,
        )

    def retry(self, after: Attempt, present: Iterable[str]) -> Attempt:
        """The attempt after one that was given up, among those who are there."""
        return self.keys.attempt(
            after.round_index,
            after.number + 1,
            present,
            length=after.length,
            bound=after.bound,
            state_digest=after.state_digest,
        )

    def open(self, attempt: Attempt, number: int = 0) -> OneVector:
        return self.members[number].open(
            attempt.to_bytes(),
            round_index=attempt.round_index,
            length=attempt.length,
            state_digest=STATE,
        )

    def masked(self, attempt: Attempt, vectors: dict[int, IntVector]) -> list[bytes]:
        return [self.open(attempt, number).mask(vector) for number, vector in vectors.items()]

    def total(self, attempt: Attempt, messages: Sequence[bytes]) -> IntVector:
        masked_sum = MaskedSum(self.roster, attempt)
        for message in messages:
            masked_sum.add(message)
        return masked_sum.total()


COHORTS: Final = {size: Cohort(size) for size in (3, 8, 32)}
"""For what holds in every round. Statistics make their own, so that they are the same each time."""


def payload(message: bytes) -> Any:
    """The y of a masked vector."""
    length = (len(message) - masked_bytes(0)) // 8
    return np.frombuffer(message, "<u8", count=length, offset=masked_bytes(0) - 64)


def integers(*values: int) -> IntVector:
    return np.array(values, np.int64)


def chi_square(data: bytes) -> float:
    """Pearson's statistic of bytes against the uniform distribution: 255 degrees of freedom."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())


LIMITS: Final = (160.0, 370.0)
"""Outside with probability below 1e-5; and keys, hence masks, are the same every time."""
