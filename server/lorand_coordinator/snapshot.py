"""The optimizer's state as bytes, for checkpoints: arrays behind a JSON header (no pickle)."""

import json

import numpy as np

from lorand.coefficients import Coefficients
from lorand.errors import LedgerError
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
    return json.dumps(header).encode() + b"\n" + arrays


def unpack_state(data: bytes, coefficients: Coefficients, committed: int) -> State:
    """Return the state. Raises LedgerError when the bytes are damaged."""
    text, _, body = data.partition(b"\n")
    try:
        header = json.loads(text)
        flat = np.frombuffer(body, "<f8").reshape(len(_ARRAYS), header["size"])
        return State(
            coefficients=coefficients,
            spread=float.fromhex(header["spread"]),
            spread_weight=float.fromhex(header["spread_weight"]),
            scale_exponent=int(header["scale_exponent"]),
            committed=committed,
            **{name: row.copy() for name, row in zip(_ARRAYS, flat, strict=True)},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"a checkpoint is damaged: {error}") from error
