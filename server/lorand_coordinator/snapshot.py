"""The optimizer's state as bytes, for checkpoints: arrays behind a JSON header (no pickle).

A digest over these, A and the number of rounds comes first: a damaged checkpoint must not become
the weights of those who join late.
"""

import hashlib
import json
from typing import Any

import numpy as np

from lorand import ledger, strict_json
from lorand.coefficients import Coefficients
from lorand.errors import LedgerError
from lorand.ledger import Position, pack_coefficients
from lorand_coordinator.optimizer import State
from lorand_coordinator.pace import Pace
from lorand_coordinator.store import Checkpoint, Store

_ARRAYS = ("first", "second", "visits", "feedback")


def pack_state(state: State) -> bytes:
    """Return everything of a state but A and the number of rounds, which checkpoints hold apart."""
    header = {
        "format": 1,
        "size": len(state.first),
        "spread": state.spread.hex(),
        "spread_weight": state.spread_weight.hex(),
        "scale_exponent": state.scale_exponent,
        "batch_size": state.pace.batch_size,
        "directions": state.pace.directions,
        "needed": state.pace.needed.hex(),
        "signal": state.pace.signal.hex(),
        "noise": state.pace.noise.hex(),
        "rounds": state.pace.rounds,
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
        header = strict_json.loads(text)
        flat = np.frombuffer(arrays, "<f8").reshape(len(_ARRAYS), header["size"])
        return State(
            coefficients=coefficients,
            spread=float.fromhex(header["spread"]),
            spread_weight=float.fromhex(header["spread_weight"]),
            scale_exponent=int(header["scale_exponent"]),
            committed=committed,
            pace=_unpack_pace(header),
            **{name: row.copy() for name, row in zip(_ARRAYS, flat, strict=True)},
        )
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise LedgerError(f"a checkpoint is of another version of LoRand: {error}") from error


def _unpack_pace(header: dict[str, Any]) -> Pace:
    """Return the pace; the first versions had none, and need none."""
    if "batch_size" not in header:
        return Pace()
    sums = (float.fromhex(header[name]) for name in ("signal", "noise", "needed"))
    counts = (int(header[name]) for name in ("batch_size", "directions", "rounds"))
    return Pace(*counts, *sums)


def _digest(body: bytes, coefficients: Coefficients, committed: int) -> bytes:
    packed = pack_coefficients(coefficients)
    return hashlib.sha256(b"lorand/snapshot/v1%d\n" % committed + packed + body).digest()


def resumed(start: Position, checkpoint: Checkpoint, store: Store) -> tuple[Position, State]:
    """Return where a checkpoint of the run stands. Raises LedgerError for another ledger's."""
    size = start.config.directions.pool_size
    coefficients = ledger.unpack_coefficients(checkpoint.coefficients, size)
    if store.digest(checkpoint.sequence) != checkpoint.head:
        raise LedgerError("a checkpoint does not belong to the ledger it is stored with")
    position = Position(
        start.config,
        start.identity,
        start.draws,
        coefficients,
        checkpoint.sequence + 1,
        checkpoint.head,
        checkpoint.committed,
        tree=store.tree.frontier(checkpoint.sequence + 1),
    )
    return position, unpack_state(checkpoint.state, coefficients, checkpoint.committed)
