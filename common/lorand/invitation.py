"""Invitations: one line that makes a machine a member, and lets it know the run's authority."""

import re
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import quote, unquote

from lorand import transport
from lorand.errors import ConfigError

_PREFIX: Final = "lorand:"
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{43}")
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Invitation:
    """What an operator hands to a new member, over a channel that both trust."""

    address: str
    """HOST:PORT of the coordinator's port for enrolment."""
    name: str
    token: str
    """32 random bytes as base64url, good once."""
    fingerprint: str
    """SHA-256 of the authority's certificate, hexadecimal."""

    def line(self) -> str:
        """Return it as text without blanks, or characters that shells read otherwise.

        >>> Invitation("localhost:7701", "ward 3", "t" * 43, "0" * 64).line()[:30]
        'lorand:localhost:7701/ward%203'
        """
        parts = (self.address, quote(self.name, safe=""), self.token, self.fingerprint)
        return _PREFIX + "/".join(parts)

    @classmethod
    def parse(cls, line: str) -> Self:
        """Return the invitation of a line. Raises ConfigError."""
        parts = line.strip().removeprefix(_PREFIX).split("/")
        if line.strip().startswith(_PREFIX) and len(parts) == 4:
            address, name, token, fingerprint = parts
            if _TOKEN.fullmatch(token) and _FINGERPRINT.fullmatch(fingerprint) and name:
                transport.split(address)
                return cls(address, unquote(name), token, fingerprint)
        raise ConfigError(
            "this is no invitation, or a part of one: give the whole line that "
            "`lr-coordinator invite` prints, from lorand: to the last of its 64 hexadecimal digits"
        )
