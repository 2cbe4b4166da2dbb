"""A sum that nobody can open: pairwise masks that cancel when all members are there, and only then.

Member i of n holds x_i, shape (m,), integers with |x_i| ≤ bound, and sends

    y_i = x_i + Σ_{j>i} r_ij − Σ_{j<i} r_ij   mod 2^64,   r_ij = ChaCha20(HKDF(X25519(i, j), info))

with the whole attempt and both members in `info`; Σ y_i = Σ x_i. It is the first, all-or-nothing
protocol of Bonawitz et al. (CCS 2017), without secret shares for members who leave: an attempt that
misses one is given up, and the next begins anew. Experimental until it is reviewed outside; what it
hides, and from whom, is in docs/secure-sum.md.

No network, no clock: messages are bytes in and bytes out. No randomness beyond the ephemeral key.
"""

import threading
from collections.abc import Iterable, Mapping
from typing import NoReturn

from lorand.errors import ConfigError, ContributionError, HandshakeError
from lorand.privacy.attempts import MAX_BOUND, Attempt, Keys, announce
from lorand.privacy.primitives import EphemeralKey, IdentityKey
from lorand.privacy.roster import MIN_MEMBERS, Roster
from lorand.privacy.vectors import MaskedSum, OneVector, masked_bytes

__all__ = [
    "Attempt",
    "IdentityKey",
    "Keys",
    "MaskedSum",
    "OneVector",
    "Roster",
    "SumMember",
    "masked_bytes",
]


class SumMember:
    """A worker's part in the sums of one run: its keys, and the last attempt it was in.

    A member that restarts makes a new ephemeral key, which all others `agree` on anew: with keys
    that are never stored, no restart can lead to a mask that was used before.
    """

    def __init__(
        self,
        identity: IdentityKey,
        roster: Roster,
        run_digest: bytes,
        *,
        bound: int,
        n_min: int = MIN_MEMBERS,
    ) -> None:
        """Take the pinned roster, and the worker's own limits. Raises ConfigError.

        `bound` is that of the run, `n_min` the fewest members this worker lets itself be summed
        with: the honest, whose noise has to suffice, and all who may not be (`local_noise`).
        """
        if not MIN_MEMBERS <= n_min <= len(roster.members) or not 0 < bound <= MAX_BOUND:
            raise ConfigError(
                f"a sum of at least {n_min} of {len(roster.members)} members within {bound} is not "
                f"possible: set {MIN_MEMBERS} members or more, and a bound of 1 to {MAX_BOUND}"
            )
        self._identity, self._roster, self._run_digest = identity, roster, run_digest
        self._bound, self._n_min = bound, n_min
        self._ephemeral = EphemeralKey()
        self.number = roster.number_of(identity.public)
        self.announcement = announce(identity, roster, run_digest, self._ephemeral)
        self._keys = Keys(run_digest, roster, {})
        self._secrets: Mapping[int, bytes] = {}
        self._last = (-1, -1)
        self._open: OneVector | None = None
        self._lock = threading.Lock()

    def agree(self, announcements: Iterable[bytes]) -> None:
        """Take the members' announcements in place of those before. Raises HandshakeError.

        All signatures are verified against the pinned roster, not taken on the coordinator's word.
        """
        keys = Keys.verified(self._run_digest, self._roster, announcements)
        if keys.public.get(self.number) != self._ephemeral.public:
            raise HandshakeError(
                "the coordinator holds no key, or an old one, of this worker: announce again"
            )
        secrets = {
            member: self._ephemeral.shared_secret(key)
            for member, key in keys.public.items()
            if member != self.number
        }
        with self._lock:
            self._keys, self._secrets = keys, secrets

    def open(
        self, request: bytes, *, round_index: int, length: int, state_digest: bytes
    ) -> OneVector:
        """Enter an attempt, once. Raises HandshakeError, ContributionError.

        `round_index`, `length` and `state_digest` are what this worker knows from its own replay.
        Attempts only ever rise, and opening one closes the one before: what was not sent under it
        never will be.
        """
        attempt = Attempt.from_bytes(request)
        if (attempt.round_index, attempt.length) != (round_index, length):
            raise ContributionError(
                f"a sum of {attempt.length} numbers in round {attempt.round_index} is not what "
                f"round {round_index} asks for, {length} numbers: catch up with the ledger"
            )
        if attempt.state_digest != state_digest:
            raise HandshakeError(
                "the sum is to be on another state than this worker's: catch up with the ledger"
            )
        with self._lock:
            self._check(attempt)
            if (attempt.round_index, attempt.number) <= self._last:
                raise ContributionError(
                    f"attempt {attempt.number} of round {attempt.round_index} is over for this "
                    "worker: begin another, with a fresh batch and fresh noise"
                )
            self._last = (attempt.round_index, attempt.number)
            if self._open is not None:
                self._open.close()
            others = [member for member in attempt.present if member != self.number]
            secrets = {member: self._secrets[member] for member in others}
            self._open = OneVector(self._identity, self.number, attempt, secrets)
            return self._open

    def _check(self, attempt: Attempt) -> None:
        """Raise HandshakeError unless the attempt is of this run, roster, keys and limits."""
        if attempt.run_digest != self._run_digest:
            raise HandshakeError("the sum is of another run: join this one again")
        if attempt.roster_digest != self._roster.digest():
            raise HandshakeError(
                "the sum is of another roster than this worker's: compare rosters with the other "
                "members, not with the coordinator"
            )
        if self.number not in attempt.present or len(attempt.present) < self._n_min:
            raise HandshakeError(
                f"the sum is among {len(attempt.present)} members; this worker wants to be one of "
                f"at least {self._n_min}: wait for the others"
            )
        if attempt.bound != self._bound:
            raise HandshakeError(
                f"the sum has the bound {attempt.bound}, the run {self._bound}: use the same run "
                "file everywhere"
            )
        unknown = any(member not in self._keys.public for member in attempt.present)
        if unknown or attempt.keys_digest != self._keys.digest(attempt.present):
            raise HandshakeError(
                "the sum is over other keys than those this worker verified: ask for the "
                "announcements and agree again"
            )

    def __reduce__(self) -> NoReturn:
        """Refuse copies and pickles: two holders of one key could mask twice."""
        raise TypeError("a member of a secure sum cannot be copied or stored")
