"""Signed heads: what a coordinator says its history is, so that it cannot say otherwise later.

A head is the number of entries, the Merkle root over them and the digest that their hash chain
ends with; the signature (Ed25519, RFC 8032) is over "lorand/head/v1" ‖ run digest ‖ size as u64 ‖
root ‖ digest. Two heads of one run and size that differ, both signed by one key, prove to anyone
that its owner showed two histories.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from lorand import strict_json
from lorand.errors import ConfigError, LedgerError
from lorand.merkle import HASH_BYTES
from lorand.privacy.primitives import KEY_BYTES, SIGNATURE_BYTES, IdentityKey, signed_by

DOMAIN: Final = b"lorand/head/v1"
FORMAT: Final = "lorand/head/v1"

__all__ = [
    "KEY_BYTES",
    "SIGNATURE_BYTES",
    "Head",
    "KeptHead",
    "Signature",
    "public_key",
    "sign",
    "signed_bytes",
    "signer",
]


@dataclass(frozen=True)
class Head:
    """A history: how many entries, the root of their Merkle tree, the last one's digest."""

    size: int
    root: bytes
    digest: bytes


@dataclass(frozen=True)
class Signature:
    """Whose public key (32 bytes), and the signature (64 bytes)."""

    key: bytes
    value: bytes

    def is_of(self, run_digest: bytes, head: Head) -> bool:
        """Return whether the key's owner signed this history of this run."""
        return signed_by(self.key, self.value, signed_bytes(run_digest, head))


def signed_bytes(run_digest: bytes, head: Head) -> bytes:
    """Return what is signed, 118 bytes."""
    assert len(run_digest) == len(head.root) == len(head.digest) == HASH_BYTES
    return DOMAIN + run_digest + head.size.to_bytes(8, "little") + head.root + head.digest


def sign(key: IdentityKey, run_digest: bytes, head: Head) -> Signature:
    """Return a coordinator's signature of a history."""
    return Signature(key.public, key.sign(signed_bytes(run_digest, head)))


def signer(key: IdentityKey | None, run_digest: bytes) -> Callable[[Head], Signature] | None:
    """Return what signs the histories of a run; None without a key."""
    return None if key is None else partial(sign, key, run_digest)


def public_key(text: str) -> bytes:
    """Return a public key from its hexadecimal digits. Raises ConfigError."""
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"{text!r} is no key of {2 * KEY_BYTES} hexadecimal digits: take the one that "
            "`lr-coordinator serve` prints"
        )
    return key


@dataclass(frozen=True)
class KeptHead:
    """The last signed head that a worker saw of a run; in a file, evidence for anyone."""

    run_digest: bytes
    head: Head
    signature: Signature

    def to_json(self) -> str:
        """Return it as text for a file."""
        content = {
            "format": FORMAT,
            "run": self.run_digest.hex(),
            "size": self.head.size,
            "root": self.head.root.hex(),
            "digest": self.head.digest.hex(),
            "key": self.signature.key.hex(),
            "signature": self.signature.value.hex(),
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "KeptHead":
        """Return it, its signature checked. Raises LedgerError when it is damaged."""
        try:
            content: dict[str, Any] = strict_json.loads(text)
            if content["format"] != FORMAT:
                raise ValueError("it is of another format")
            size = content["size"]
            if not isinstance(size, int) or not 0 < size < 1 << 63:
                raise ValueError("its size is no number of entries")
            names = ("run", "root", "digest", "key", "signature")
            run, root, digest, key, value = (bytes.fromhex(content[name]) for name in names)
            if {len(run), len(root), len(digest)} != {HASH_BYTES}:
                raise ValueError("its digests are not of 32 bytes")
            kept = cls(run, Head(size, root, digest), Signature(key, value))
            if not kept.signature.is_of(run, kept.head):
                raise ValueError("its signature is not of what it says")
            return kept
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerError(f"this is no head of a ledger: {error}") from error
