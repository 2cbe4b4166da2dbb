"""What the members of a secure sum must agree on before they mask: keys, and an attempt.

    announcement = KEY_TAG ‖ run (32) ‖ roster (32) ‖ member (u16) ‖ key (32) ‖ signature (64)
    attempt      = ATTEMPT_TAG ‖ round (u64) ‖ number (u32) ‖ length (u32) ‖ present (u32)
                   ‖ bound (u64) ‖ run (32) ‖ roster (32) ‖ state (32) ‖ keys (32)

Integers are little-endian; bit i of `present` is member i, `keys` a digest of their X25519 keys.
An attempt's bytes go whole into every derived key, so that members who were told different things
make masks that do not cancel: a coordinator that lies gets noise.
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from lorand.errors import ContributionError, HandshakeError
from lorand.privacy.primitives import (
    SIGNATURE_BYTES,
    EphemeralKey,
    IdentityKey,
    signed_by,
)
from lorand.privacy.roster import MAX_MEMBERS, MIN_MEMBERS, Roster

KEY_TAG: Final = b"lorand/sum/key/v1"
ATTEMPT_TAG: Final = b"lorand/sum/attempt/v1"
KEYS_TAG: Final = b"lorand/sum/keys/v1"
DIGEST_BYTES: Final = 32
_KEY: Final = struct.Struct(f"<{len(KEY_TAG)}s32s32sH32s")
_ATTEMPT: Final = struct.Struct(f"<{len(ATTEMPT_TAG)}sQIIIQ32s32s32s32s")
ANNOUNCEMENT_BYTES: Final = _KEY.size + SIGNATURE_BYTES
ATTEMPT_BYTES: Final = _ATTEMPT.size

MAX_LENGTH: Final = 1 << 20
"""Largest pool of a run."""
MAX_ATTEMPTS: Final = 16
"""Attempts at one round; each is charged to the budgets of all who took part."""
MAX_BOUND: Final = 2**58 - 1
"""Largest |x_i|: the sum of 32 of them is below 2^63, so that no honest sum wraps around."""


def announce(
    identity: IdentityKey, roster: Roster, run_digest: bytes, ephemeral: EphemeralKey
) -> bytes:
    """Return a member's key of a run, signed. Raises ConfigError if it is not in the roster."""
    if len(run_digest) != DIGEST_BYTES:
        raise ValueError(f"a run digest has {DIGEST_BYTES} bytes, not {len(run_digest)}")
    member = roster.number_of(identity.public)
    body = _KEY.pack(KEY_TAG, run_digest, roster.digest(), member, ephemeral.public)
    return body + identity.sign(body)


@dataclass(frozen=True)
class Attempt:
    """One attempt at one sum: who is there, vectors of which length and bound, on which state."""

    round_index: int
    number: int
    length: int
    present: tuple[int, ...]
    bound: int
    run_digest: bytes
    roster_digest: bytes
    state_digest: bytes
    keys_digest: bytes

    def __post_init__(self) -> None:
        """Raise ContributionError unless every part is within its limits."""
        digests = (self.run_digest, self.roster_digest, self.state_digest, self.keys_digest)
        if any(len(digest) != DIGEST_BYTES for digest in digests):
            raise ContributionError(f"digests have {DIGEST_BYTES} bytes: use SHA-256")
        if not MIN_MEMBERS <= len(self.present) <= MAX_MEMBERS:
            raise ContributionError(
                f"{len(self.present)} members cannot be summed: wait for at least {MIN_MEMBERS}"
            )
        if not 0 <= self.number < MAX_ATTEMPTS:
            raise ContributionError(
                f"a round has {MAX_ATTEMPTS} attempts: abandon it and go on with the next"
            )
        if not (0 < self.length <= MAX_LENGTH and 0 < self.bound <= MAX_BOUND):
            raise ContributionError(
                f"vectors have 1 to {MAX_LENGTH} numbers of at most {MAX_BOUND}, not {self.length} "
                f"of at most {self.bound}"
            )
        if not 0 <= self.round_index < 2**64:
            raise ContributionError(f"{self.round_index} is no number of a round: count from 0")

    def to_bytes(self) -> bytes:
        """Return what the coordinator sends, and what masks are derived from."""
        present = sum(1 << member for member in self.present)
        head = (ATTEMPT_TAG, self.round_index, self.number, self.length, present, self.bound)
        digests = (self.run_digest, self.roster_digest, self.state_digest, self.keys_digest)
        return _ATTEMPT.pack(*head, *digests)

    @staticmethod
    def from_bytes(data: bytes) -> "Attempt":
        """Return the attempt of these bytes. Raises ContributionError when they are none."""
        if len(data) != ATTEMPT_BYTES or not data.startswith(ATTEMPT_TAG):
            raise ContributionError(
                "an attempt at a sum cannot be read: install the same version of lorand everywhere"
            )
        _, round_index, number, length, bits, bound, *digests = _ATTEMPT.unpack(data)
        present = tuple(member for member in range(MAX_MEMBERS) if bits >> member & 1)
        return Attempt(round_index, number, length, present, bound, *digests)

    def digest(self) -> bytes:
        """Return SHA-256 of the bytes, 32 bytes: what a masked vector names."""
        return hashlib.sha256(self.to_bytes()).digest()


@dataclass(frozen=True)
class Keys:
    """Keys of a run by member, each verified against the roster that the caller has pinned."""

    run_digest: bytes
    roster: Roster
    public: Mapping[int, bytes]

    @staticmethod
    def verified(run_digest: bytes, roster: Roster, announcements: Iterable[bytes]) -> "Keys":
        """Return the keys of these announcements. Raises HandshakeError unless all are sound.

        Nothing is taken on the coordinator's word: an announcement counts for the member whose
        long-term key signed it, for this run and this roster. A key that two members announce is
        refused, since one of the two cannot hold it.
        """
        public: dict[int, bytes] = {}
        for announcement in announcements:
            member, key = _read_key(run_digest, roster, announcement)
            if member in public:
                raise HandshakeError(
                    f"{roster.names[member]!r} was announced twice: announce every member once, "
                    "with its newest key"
                )
            if key in public.values():
                raise HandshakeError(
                    f"{roster.names[member]!r} announced the key of another member: one of them "
                    "must restart its worker"
                )
            public[member] = key
        return Keys(run_digest, roster, dict(sorted(public.items())))

    def digest(self, present: Iterable[int]) -> bytes:
        """Return SHA-256 over the keys of these members, 32 bytes."""
        total = hashlib.sha256(KEYS_TAG)
        for member in present:
            total.update(self.public[member])
        return total.digest()

    def attempt(
        self,
        round_index: int,
        number: int,
        present: Iterable[str],
        *,
        length: int,
        bound: int,
        state_digest: bytes,
    ) -> Attempt:
        """Return an attempt among these members. Raises HandshakeError, ConfigError."""
        members = self.roster.numbers(present)
        missing = [self.roster.names[member] for member in members if member not in self.public]
        if missing:
            raise HandshakeError(
                f"no key of {', '.join(missing)}: wait for their announcements, or begin without"
            )
        return Attempt(
            round_index,
            number,
            length,
            members,
            bound,
            self.run_digest,
            self.roster.digest(),
            state_digest,
            self.digest(members),
        )


def _read_key(run_digest: bytes, roster: Roster, announcement: bytes) -> tuple[int, bytes]:
    """Return the member and the key of an announcement. Raises HandshakeError."""
    if len(announcement) != ANNOUNCEMENT_BYTES:
        raise HandshakeError(
            f"an announcement has {ANNOUNCEMENT_BYTES} bytes, not {len(announcement)}: install the "
            "same version of lorand everywhere"
        )
    body, signature = announcement[: _KEY.size], announcement[_KEY.size :]
    tag, run, roster_digest, member, key = _KEY.unpack(body)
    if tag != KEY_TAG or run != run_digest:
        raise HandshakeError("an announcement is for another run: announce the keys of this one")
    if roster_digest != roster.digest():
        raise HandshakeError(
            "an announcement is for another roster: compare rosters with the other members, not "
            "with the coordinator"
        )
    if member >= len(roster.members) or not signed_by(roster.members[member][1], signature, body):
        raise HandshakeError(
            "an announcement is not signed by the member it names: do not take part before the "
            "members have compared their rosters"
        )
    return member, key
