"""The optimizer's state as bytes, for checkpoints: arrays behind a JSON header (no pickle).

A digest over these, A and the number of rounds comes first: a damaged checkpoint must not become
the weights of those who join late.
"""

import hashlib
import json

import numpy as np

from lorand.coefficients import Coefficients
from lorand.errors import LedgerError
from lorand.ledger import pack_coefficients
from lorand_coordinator.optimizer import State

_ARRAYS = ("first", "second", "visits", "feedback")


def pack_state(state: State) -> bytes:
    """Return everything of a state but A and the number of rounds, which checkpoints hold apart."""
    header = {
        "format": 1,
        "size": len(state.first),
        "spread": state.spread.hex(),
        "spread_weight": state.spread_weight.hex(),
        "scale_exponent": state.scale_exponent,
    }
    arrays = b"".join(getattr(state, name).astype("<f8").tobytes() for name in _ARRAYS)
    body = json.dumps(header).encode() + b"\n" + arrays
    return _digest(body, state.coefficients, state.committed) + body


def unpack_state(data: bytes, coefficients: Coefficients, committed: int) -> State:
    """Return the state. Raises LedgerError when the bytes are damaged."""
    digest, body = data[:32], data[32:]
    if digest != _digest(body, coefficients, committed):
        raise LedgerError("a checkpoint is damaged; restore the ledger from a backup")
    text, _, arrays = body.partition(b"\n")
    try:
        header = json.loads(text)
        flat = np.frombuffer(arrays, "<f8").reshape(len(_ARRAYS), header["size"])
        return State(
            coefficients=coefficients,
            spread=float.fromhex(header["spread"]),
            spread_weight=float.fromhex(header["spread_weight"]),
            scale_exponent=int(header["scale_exponent"]),
            committed=committed,
            **{name: row.copy() for name, row in zip(_ARRAYS, flat, strict=True)},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"a checkpoint is of another version of LoRand: {error}") from error


def _digest(body: bytes, coefficients: Coefficients, committed: int) -> bytes:
    packed = pack_coefficients(coefficients)
    return hashlib.sha256(b"lorand/snapshot/v1%d\n" % committed + packed + body).digest()
