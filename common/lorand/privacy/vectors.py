"""Masked vectors: how a member makes one, and what a coordinator makes of all of them.

    masked vector = MASKED_TAG ‖ SHA-256(attempt) ‖ member (u16) ‖ y (8·m) ‖ signature (64)
    info          = MASK_TAG ‖ attempt ‖ lower member (u16) ‖ higher member (u16)

Integers are little-endian. For the protocol see `secure_sum`.
"""

import hashlib
import struct
import threading
from collections.abc import Mapping
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from lorand.errors import ContributionError, HandshakeError
from lorand.privacy.attempts import Attempt
from lorand.privacy.primitives import SIGNATURE_BYTES, IdentityKey, mask, signed_by
from lorand.privacy.roster import Roster

MASK_TAG: Final = b"lorand/sum/mask/v1"
MASKED_TAG: Final = b"lorand/sum/masked/v1"
_HEAD: Final = struct.Struct(f"<{len(MASKED_TAG)}s32sH")

IntVector = NDArray[np.int64]


def masked_bytes(length: int) -> int:
    """Return the bytes of a masked vector of so many numbers."""
    return _HEAD.size + 8 * length + SIGNATURE_BYTES


class OneVector:
    """An attempt that one vector can be masked for, made by `SumMember.open`.

    Why one: an attempt that misses a member may be completed by its late y_i. The coordinator then
    has the sums of two attempts over different members; had the others sent the same vectors in
    both, the difference would be x_i alone. So a vector is of a batch drawn, noise added and budget
    charged **after** this was opened, for each attempt anew, also where the one before came to
    nothing. And two vectors under one mask would show their difference to everyone.
    """

    def __init__(
        self, identity: IdentityKey, number: int, attempt: Attempt, secrets: Mapping[int, bytes]
    ) -> None:
        """Take a member's identity and number, and its secrets by member."""
        self.attempt = attempt
        self._identity, self._number = identity, number
        self._secrets: Mapping[int, bytes] | None = secrets
        self._lock = threading.Lock()

    def close(self) -> None:
        """Forget the secrets: nothing is masked here any more."""
        with self._lock:
            self._secrets = None

    def mask(self, values: IntVector) -> bytes:
        """Return y_i of x_i, shape (m,), as a signed message. Raises ContributionError.

        The attempt is over whether or not the vector was sound: asking again until a vector fits
        would tell of the ones that did not.
        """
        with self._lock:
            secrets, self._secrets = self._secrets, None
        if secrets is None:
            raise ContributionError(
                f"attempt {self.attempt.number} of round {self.attempt.round_index} is over for "
                "this worker: begin another, with a fresh batch and fresh noise"
            )
        total = self._checked(values).astype(np.uint64)
        for member, secret in secrets.items():
            low, high = sorted((member, self._number))
            pair = struct.pack("<HH", low, high)
            stream = mask(secret, MASK_TAG + self.attempt.to_bytes() + pair, len(total))
            if self._number == low:
                total += stream
            else:
                total -= stream
        head = _HEAD.pack(MASKED_TAG, self.attempt.digest(), self._number)
        body = head + total.astype("<u8").tobytes()
        return body + self._identity.sign(body)

    def _checked(self, values: IntVector) -> IntVector:
        attempt = self.attempt
        if values.dtype != np.int64 or values.shape != (attempt.length,):
            raise ContributionError(
                f"a vector of {attempt.length} int64 is summed, not {values.dtype} of shape "
                f"{values.shape}: bring another to the next attempt"
            )
        # Not |values|: the least int64 has no absolute value.
        if int(values.max()) > attempt.bound or int(values.min()) < -attempt.bound:
            raise ContributionError(
                f"a number is beyond the bound {attempt.bound}: clip before noise, and give the "
                "bound room for noise (LocalNoise.bound)"
            )
        return values

    def __reduce__(self) -> NoReturn:
        """Refuse copies and pickles: each would mask a vector."""
        raise TypeError("an attempt at a secure sum cannot be copied or stored")


class MaskedSum:
    """What a coordinator makes of masked vectors; any reader of them can repeat it.

    The order of arrival does not matter, and only the running sum is kept.
    """

    def __init__(self, roster: Roster, attempt: Attempt) -> None:
        """Begin an attempt. Raises HandshakeError when it is of another roster."""
        if attempt.roster_digest != roster.digest() or attempt.present[-1] >= len(roster.members):
            raise HandshakeError("the sum is of another roster: begin it with the run's own")
        self.attempt = attempt
        self._roster, self._digest = roster, attempt.digest()
        self._sum = np.zeros(attempt.length, np.uint64)
        self._seen: dict[int, bytes] = {}

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the members whose vectors have not come, sorted."""
        names, present = self._roster.names, self.attempt.present
        return tuple(names[member] for member in present if member not in self._seen)

    def add(self, message: bytes) -> str:
        """Add a masked vector and return its sender. Raises ContributionError.

        The same bytes again change nothing; other bytes of the same member are refused.
        """
        if len(message) != masked_bytes(self.attempt.length):
            raise ContributionError(
                f"a masked vector has {masked_bytes(self.attempt.length)} bytes, not "
                f"{len(message)}: answer this attempt's request"
            )
        body, signature = message[:-SIGNATURE_BYTES], message[-SIGNATURE_BYTES:]
        tag, digest, member = _HEAD.unpack(body[: _HEAD.size])
        ours = (tag, digest) == (MASKED_TAG, self._digest)
        if not ours or member not in self.attempt.present:
            raise ContributionError(
                "a masked vector is of another attempt: answer this one, with a fresh batch and "
                "fresh noise"
            )
        name: str
        name, public = self._roster.members[member]
        if not signed_by(public, signature, body):
            raise ContributionError(f"a masked vector is not signed by {name!r}: send it again")
        received = hashlib.sha256(body).digest()
        if member not in self._seen:
            self._sum += np.frombuffer(body, "<u8", offset=_HEAD.size)
        if self._seen.setdefault(member, received) != received:
            raise ContributionError(f"{name!r} sent two vectors: give the attempt up")
        return name

    def total(self) -> IntVector:
        """Return Σ x_i, shape (m,). Raises ContributionError unless all are there and it is sound.

        The bound is all that holds a dishonest member: it shifts the sum by as much as the others
        leave room for, and nobody can tell which member did.
        """
        if self.missing:
            raise ContributionError(
                f"masks hide the sum without {', '.join(self.missing)}: begin another attempt "
                "among those who are there"
            )
        total = self._sum.view(np.int64).copy()
        limit = len(self.attempt.present) * self.attempt.bound
        if int(total.max()) > limit or int(total.min()) < -limit:
            raise ContributionError(
                f"the sum is beyond {limit}: a member broke the protocol; look at who was there, "
                "and begin another attempt"
            )
        return total
