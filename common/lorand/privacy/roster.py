"""The roster: members and their keys, pinned out of band: for secure sums, and for statements."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from lorand import strict_json
from lorand.errors import ConfigError

MIN_MEMBERS: Final = 3
"""With two, each reads the other's vector: the sum less its own."""
MAX_MEMBERS: Final = 32
"""Masks cost every member n - 1 streams a round, and all members must be there."""
MAX_NAME: Final = 64
FORMAT: Final = "lorand/roster/v1"
PUBLIC_BYTES: Final = 32
HINT: Final = "; compare the roster with the other members, not with the coordinator"


@dataclass(frozen=True)
class Members:
    """Names, sorted, and Ed25519 public keys, 32 bytes each; a member's number is its place.

    Members compare `digest()` by telephone or in a signed mail, once: whoever picks the roster
    decides whose signatures count.
    """

    members: tuple[tuple[str, bytes], ...]

    def __post_init__(self) -> None:
        """Raise ConfigError unless names and keys are sound, distinct and sorted."""
        names, keys = self.names, [key for _, key in self.members]
        if list(names) != sorted(set(names)):
            raise ConfigError(f"a roster lists each member once, sorted by name{HINT}")
        for name in names:
            if not (0 < len(name) <= MAX_NAME and name.isprintable()):
                raise ConfigError(
                    f"{name!r} is no name of 1 to {MAX_NAME} printable characters; choose another"
                )
        if any(len(key) != PUBLIC_BYTES for key in keys) or len(set(keys)) != len(keys):
            raise ConfigError(f"every member of a roster has its own key of 32 bytes{HINT}")

    @classmethod
    def of(cls, keys: Mapping[str, bytes]) -> Self:
        """Return the roster of these names and public keys. Raises ConfigError."""
        return cls(tuple(sorted(keys.items())))

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names by their numbers."""
        return tuple(name for name, _ in self.members)

    def numbers(self, names: Iterable[str]) -> tuple[int, ...]:
        """Return the numbers of these members, ascending. Raises ConfigError."""
        wanted = set(names)
        unknown = sorted(wanted.difference(self.names))
        if unknown:
            raise ConfigError(f"{', '.join(unknown)} not in the roster{HINT}")
        return tuple(number for number, name in enumerate(self.names) if name in wanted)

    def number_of(self, public: bytes) -> int:
        """Return the number of the owner of a public key. Raises ConfigError."""
        for number, (_, key) in enumerate(self.members):
            if key == public:
                return number
        raise ConfigError(f"this worker's identity key is not in the roster{HINT}")

    def to_json(self) -> str:
        """Return the canonical text: what members pin, and what the digest is taken of."""
        rows = [[name, key.hex()] for name, key in self.members]
        content = {"format": FORMAT, "members": rows}
        return json.dumps(content, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the roster of a text. Raises ConfigError when it is none."""
        try:
            content = strict_json.loads(text)
            if content["format"] != FORMAT:
                raise ConfigError(f"a roster of format {content['format']!r}, not {FORMAT!r}{HINT}")
            return cls(tuple((str(n), bytes.fromhex(key)) for n, key in content["members"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"the roster cannot be read: {error}{HINT}") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the roster of a file. Raises ConfigError when there is none."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the roster {path}: {error}; write it with `lr-worker sum roster "
                "FILE NAME=KEY ...`"
            ) from error

    def digest(self) -> bytes:
        """Return SHA-256 of the canonical text, 32 bytes."""
        return hashlib.sha256(self.to_json().encode()).digest()


@dataclass(frozen=True)
class Roster(Members):
    """Who may take part in a secure sum.

    A coordinator that fills it with its own keys sums one worker.
    """

    def __post_init__(self) -> None:
        """See Members; raise ConfigError also for too few or too many."""
        if not MIN_MEMBERS <= len(self.members) <= MAX_MEMBERS:
            raise ConfigError(
                f"a secure sum has {MIN_MEMBERS} to {MAX_MEMBERS} members, not "
                f"{len(self.members)}{HINT}"
            )
        super().__post_init__()
