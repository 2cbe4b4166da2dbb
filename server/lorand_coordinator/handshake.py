"""What a worker must have in common with the run to join it (pure)."""

from typing import Final

from lorand.config import PROTOCOL_VERSION
from lorand.errors import HandshakeError
from lorand.ledger import Position
from lorand.subspaces import cosines
from lorand.v1 import coordination_pb2 as wire
from lorand_coordinator.store import Store

MAX_NAME: Final = 64


def check_greeting(hello: wire.Hello) -> None:
    """Raise HandshakeError unless the worker speaks this protocol and has a name."""
    if hello.protocol_version != PROTOCOL_VERSION:
        raise HandshakeError(
            f"the worker speaks protocol version {hello.protocol_version}, the coordinator "
            f"{PROTOCOL_VERSION}; install the same release of lorand on both"
        )
    if not 0 < len(hello.name) <= MAX_NAME:
        raise HandshakeError(
            f"a worker's name has 1 to {MAX_NAME} characters; choose one with --name"
        )


def check_identity(hello: wire.Hello, position: Position) -> None:
    """Raise HandshakeError unless the worker has the run's base model, tokenizer and manifest."""
    identity = position.identity
    pairs = [
        (
            "base weights",
            hello.base_digest,
            identity.base_digest,
            "use the same model and revision",
        ),
        (
            "tokenizer",
            hello.tokenizer_digest,
            identity.tokenizer_digest,
            "use the tokenizer that comes with the run's model",
        ),
        (
            "parameter manifest",
            hello.manifest_digest,
            identity.manifest.digest(),
            "use the same release of lorand and transformers",
        ),
        ("run", hello.run_digest, position.run_digest, "use the coordinator's run file"),
        (
            "table of cosines",
            hello.cosines_digest,
            cosines.digest_of(position.config, identity.manifest),
            "its numpy rounds a cosine otherwise: install the same version, or set subspace.kind = "
            '"coordinate"',
        ),
    ]
    for what, theirs, ours, advice in pairs:
        if theirs != ours:
            raise HandshakeError(
                f"the worker's {what} ({theirs.hex()[:16] or 'none'}) is not the coordinator's "
                f"({ours.hex()[:16]}); {advice}"
            )


def check_history(hello: wire.Hello, store: Store) -> None:
    """Raise HandshakeError unless what the worker has applied is the beginning of the ledger."""
    count = len(store)
    if hello.next_sequence > count:
        raise HandshakeError(
            f"the worker has applied {hello.next_sequence} entries, the coordinator's ledger "
            f"holds {count}: it was rolled back; restore the ledger, or restart the worker"
        )
    ours = store.digest(hello.next_sequence - 1)
    if hello.next_sequence and hello.head != ours:
        raise HandshakeError(
            f"the histories differ at entry {hello.next_sequence - 1}: the worker has "
            f"{hello.head.hex()[:16]}, the coordinator {ours.hex()[:16]}; one of them is of "
            "another run or was changed"
        )
