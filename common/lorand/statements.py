"""Statements: what a worker says it contributed, so that nobody can say otherwise later.

A statement is about the entries `first` to `last` of a ledger. Of each commit among them that lists
the worker it covers the contribution, exactly as it is stored, by a chain

    d = SHA-256("lorand/stated/v1" ‖ d before ‖ sequence as u64 ‖ SHA-256(stored contribution))

that begins with 32 zeros. The worker's signature (Ed25519, RFC 8032) is over "lorand/statement/v1"
‖ run digest ‖ worker as u32 ‖ first as u64 ‖ last as u64 ‖ digest of entry `last` ‖ d, numbers
little-endian. So it is also of the whole history up to `last`, as the hash chain has it.
"""

import hashlib
from typing import Final

from lorand.errors import HandshakeError
from lorand.merkle import HASH_BYTES
from lorand.privacy.primitives import KEY_BYTES, SIGNATURE_BYTES, IdentityKey, signed_by
from lorand.v1 import ledger_pb2 as pb

DOMAIN: Final = b"lorand/statement/v1"
NOTHING: Final = bytes(HASH_BYTES)
"""The digest over no contribution."""


def stored(worker: int, contribution: pb.Contribution) -> bytes:
    """Return a contribution as the ledger stores it."""
    part = pb.StoredContribution(worker=worker, contribution=contribution)
    return part.SerializeToString(deterministic=True)


def after(digest: bytes, sequence: int, contribution: bytes) -> bytes:
    """Return the digest over one contribution more, given the SHA-256 of its stored bytes."""
    place = sequence.to_bytes(8, "little")
    return hashlib.sha256(b"lorand/stated/v1" + digest + place + contribution).digest()


def signed_bytes(run_digest: bytes, statement: pb.Statement) -> bytes:
    """Return what is signed, 135 bytes."""
    assert len(run_digest) == len(statement.head) == len(statement.contributions) == HASH_BYTES
    place = statement.worker.to_bytes(4, "little") + statement.first.to_bytes(8, "little")
    place += statement.last.to_bytes(8, "little")
    return DOMAIN + run_digest + place + statement.head + statement.contributions


def sign(key: IdentityKey, run_digest: bytes, statement: pb.Statement) -> pb.Statement:
    """Return a statement with its owner's key and signature."""
    made = pb.Statement()
    made.CopyFrom(statement)
    made.key, made.signature = key.public, key.sign(signed_bytes(run_digest, statement))
    return made


def check(run_digest: bytes, statement: pb.Statement) -> None:
    """Raise HandshakeError unless a statement has its form, and the signature of its own key."""
    lengths = [
        len(field)
        for field in (statement.head, statement.contributions, statement.key, statement.signature)
    ]
    if lengths != [HASH_BYTES, HASH_BYTES, KEY_BYTES, SIGNATURE_BYTES]:
        raise HandshakeError(
            f"a statement's digests, key and signature have {lengths} bytes; install the same "
            "release of lorand on both sides"
        )
    if statement.first > statement.last:
        raise HandshakeError(
            f"a statement of entries {statement.first} to {statement.last} is of none"
        )
    if not signed_by(statement.key, statement.signature, signed_bytes(run_digest, statement)):
        raise HandshakeError("the statement is not signed by the key that it names, for this run")
