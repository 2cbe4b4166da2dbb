"""The coordinator's key, and the heads that it signs."""

import logging
from pathlib import Path

from lorand import durable, heads
from lorand.errors import Behind, ConfigError, HandshakeError, LedgerError
from lorand.heads import KEY_BYTES, Head
from lorand.ledger import Position
from lorand.privacy.primitives import IdentityKey
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.store import Store

log = logging.getLogger("lorand.coordinator")


def key_beside(ledger: Path) -> Path:
    """Return where the key of a ledger is, unless told otherwise."""
    return ledger.with_name(ledger.name + ".key")


def key_at(path: Path) -> IdentityKey:
    """Return the Ed25519 key of a file; make it where there is none. Raises ConfigError."""
    try:
        if path.exists():
            return _read(path)
        key = IdentityKey()
        durable.create(path, key.private_bytes())
    except OSError as error:
        raise ConfigError(
            f"cannot use the key that signs the ledger, {path}: {error}; choose another place "
            "with --signing-key"
        ) from error
    log.info("made the key that signs the ledger: %s; keep a copy of it", path)
    return key


def shared_key(path: Path, store: Store) -> IdentityKey:
    """Return the key of a file that several coordinators have: the one that the ledger has.

    Whoever writes the first entry makes it where there is none. Raises LedgerError when the ledger
    is signed by another key: workers would refuse what this coordinator signs.
    """
    last = store.signature(len(store) - 1)
    if last is None:
        return key_at(path)
    theirs = f"the run's ledger is signed by {last.key.hex()}"
    if not path.exists():
        raise LedgerError(
            f"{theirs}, and there is no key at {path}; copy there the file that the other "
            "coordinators have, or say where it is with --signing-key"
        )
    key = key_at(path)
    if key.public != last.key:
        raise LedgerError(
            f"{theirs}, and {path} is the key {key.public.hex()}; copy there the file that the "
            "other coordinators have, or say where it is with --signing-key"
        )
    return key


def _read(path: Path) -> IdentityKey:
    if path.stat().st_mode & 0o077:
        raise ConfigError(
            f"others than its owner may read the key {path}: whoever has it can sign another "
            f"history; chmod 600 {path}, and if somebody may have a copy, begin a new run"
        )
    content = path.read_bytes()
    if len(content) != KEY_BYTES:
        raise ConfigError(
            f"{path} is no key: it has {len(content)} bytes instead of {KEY_BYTES}; restore it "
            "from a copy, or move it away: a new key is made, and workers who know this one must "
            "be told (--coordinator-key)"
        )
    return IdentityKey(content)


def head_for(
    request: pb.GetHeadRequest, store: Store, position: Position | None, key: IdentityKey | None
) -> pb.GetHeadResponse:
    """Return the signed head of a size, with the proof that it extends a known one.

    Signatures are made when asked for (Ed25519 is deterministic), so that also histories from
    before there was a key are signed. Raises HandshakeError when there is no such history, Behind
    when there is none so long.
    """
    if key is None:
        raise HandshakeError("this coordinator does not sign its ledger")
    size = request.size or len(store)
    if position is None or size > len(store):
        raise Behind(
            f"the coordinator's ledger holds {len(store)} entries, not {size}: it was rolled back; "
            "its owner should restore it"
        )
    if request.known_size > size:
        raise HandshakeError(f"{size} entries cannot begin with {request.known_size}")
    head = Head(size, store.tree.root(size), store.digest(size - 1))
    signature = heads.sign(key, position.run_digest, head)
    signed = pb.SignedHead(
        size=size,
        root=head.root,
        digest=head.digest,
        key=signature.key,
        signature=signature.value,
    )
    return pb.GetHeadResponse(
        head=signed, consistency=store.tree.consistency(request.known_size, size)
    )
