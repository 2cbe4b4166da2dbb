"""Who this worker is in statements and secure sums: identity key, roster, its part in a run."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorand import durable, ledger
from lorand.config import RunConfig
from lorand.errors import ConfigError, HandshakeError
from lorand.manifest import Identity
from lorand.privacy import plan
from lorand.privacy.roster import MIN_MEMBERS, PUBLIC_BYTES, Members, Roster
from lorand.privacy.secure_sum import IdentityKey, SumMember


def new_key(path: Path) -> IdentityKey:
    """Make an identity key and keep it for its owner alone. Raises ConfigError if there is one."""
    key = IdentityKey()
    try:
        durable.create(path, key.private_bytes())
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists, and its public key may be in rosters: use it, or choose another name"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; choose another place") from error
    return key


def read_key(path: Path) -> IdentityKey:
    """Return the identity key of a file. Raises ConfigError when there is none."""
    try:
        return IdentityKey(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"cannot read the identity key {path}: {error}; make one with `lr-worker sum key`"
        ) from error


def write_roster(path: Path, members: Iterable[str]) -> Members:
    """Write the roster of these `NAME=KEY`, the keys in hexadecimal. Raises ConfigError."""
    keys: dict[str, bytes] = {}
    for member in members:
        name, _, key = member.partition("=")
        try:
            keys[name] = bytes.fromhex(key)
        except ValueError as error:
            raise ConfigError(
                f"{member!r} is no NAME=KEY with a key of {2 * PUBLIC_BYTES} hexadecimal digits: "
                "take the line that `lr-worker sum key` prints"
            ) from error
    roster = Members.of(keys)
    try:
        path.write_text(roster.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; choose another place") from error
    return roster


@dataclass(frozen=True)
class Pinned:
    """What the owner of a worker gives it for statements (the key) and secure sums."""

    key: Path | None = None
    roster: Path | None = None
    min_members: int = 0


def member_of(
    pinned: Pinned, config: RunConfig, identity: Identity, name: str, multiplier: float
) -> SumMember:
    """Return this worker's part in a run of secure sums with noise of this multiplier.

    Raises ConfigError, and HandshakeError when the run's sums may be smaller than wanted here.
    """
    if pinned.key is None or pinned.roster is None:
        raise ConfigError(
            f"the run {config.run.name!r} is of secure sums: give this worker's --identity and the "
            "--roster that its members agreed on; docs/secure-sum.md says how"
        )
    quorum = config.rounds.quorum
    if pinned.min_members > quorum:
        raise HandshakeError(
            f"the run sums {quorum} members or more, this worker wants at least "
            f"{pinned.min_members}; join with a smaller --min-members if that is right"
        )
    roster, key = Roster.read(pinned.roster), read_key(pinned.key)
    member = SumMember(
        key,
        roster,
        ledger.origin(config, identity).run_digest,
        bound=plan.largest_number(config, multiplier),
        n_min=max(MIN_MEMBERS, quorum),
    )
    if roster.names[member.number] != name:
        raise ConfigError(
            f"the roster has this identity key as {roster.names[member.number]!r}, not {name!r}: "
            f"join with --name {roster.names[member.number]}"
        )
    return member
