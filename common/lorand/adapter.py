"""The kilobyte adapter: coefficients and what they refer to; enough to rebuild all weights."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lorand import strict_json
from lorand.closed import Closed, Sparse, narrow
from lorand.coefficients import Coefficients
from lorand.config import RunConfig
from lorand.errors import LedgerError, ModelError
from lorand.ledger import Position, origin
from lorand.manifest import Identity
from lorand.subspaces import periods
from lorand.subspaces.elections import Elections

WEIGHTS_FILE: Final = "adapter.safetensors"
CONFIG_FILE: Final = "adapter_config.json"
FORMAT: Final = "lorand/adapter/v1"


@dataclass(frozen=True)
class Adapter:
    """A fine-tuned model as K integers on a pool of a base model."""

    config: RunConfig
    identity: Identity
    coefficients: Coefficients
    committed: int
    head: bytes
    closed: Closed = field(default_factory=Closed)
    """What the run did on the pools before (`directions.rotate_every`)."""
    elections: Elections = field(default_factory=Elections)
    """The subspaces that its participants voted for."""


def of(position: Position) -> Adapter:
    """Return the adapter of a place in a run."""
    return Adapter(
        position.config,
        position.identity,
        position.coefficients,
        position.committed,
        position.head,
        position.closed,
        position.elections,
    )


def position(adapter: Adapter) -> Position:
    """Return the place in its run: all that weights follow from, but none to read on from."""
    return replace(
        origin(adapter.config, adapter.identity),
        coefficients=adapter.coefficients,
        committed=adapter.committed,
        head=adapter.head,
        closed=adapter.closed,
        elections=adapter.elections,
    )


def save(adapter: Adapter, folder: Path) -> int:
    """Write adapter.safetensors and adapter_config.json; return the bytes of the first.

    Coefficients are 32-bit where they fit (16 KB at K = 4096), else 64-bit.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "base_model": adapter.config.model.name,
        "revision": adapter.config.model.revision,
        "pool_size": adapter.config.directions.pool_size,
        "labels": list(adapter.config.task.labels),
        "committed": adapter.committed,
        "ledger_head": adapter.head.hex(),
        "run": json.loads(adapter.config.canonical()),
        "identity": json.loads(adapter.identity.to_lock()),
    }
    if adapter.elections.given_up is not None:
        content["subspace_given_up"] = adapter.elections.given_up
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "coefficients": narrow(adapter.coefficients),
            **_pack_closed(adapter.closed),
            **adapter.elections.to_arrays(),
        }
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": FORMAT})
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write the adapter to {folder}: {error}") from error
    return (folder / WEIGHTS_FILE).stat().st_size


def load(folder: Path) -> Adapter:
    """Read an adapter. Raises ModelError when it is missing or damaged."""
    try:
        content = strict_json.loads((folder / CONFIG_FILE).read_bytes())
        if content["format"] != FORMAT:
            raise ModelError(f"{folder} has format {content['format']!r}, not {FORMAT!r}")
        tensors = load_file(folder / WEIGHTS_FILE)
        packed = tensors["coefficients"]
        config = RunConfig.from_json(json.dumps(content["run"]))
        identity = Identity.from_lock(json.dumps(content["identity"]))
        if packed.shape != (config.directions.pool_size,) or packed.dtype.kind != "i":
            raise ModelError(f"the coefficients in {folder} do not fit their pool")
        committed, closed = int(content["committed"]), _unpack_closed(tensors)
        if len(closed) != config.pool_after(committed):
            raise ValueError(f"{committed} rounds do not leave {len(closed)} pools")
        for pool in closed:
            pool.dense(config.directions.pool_size)
        return Adapter(
            config,
            identity,
            packed.astype(np.int64),
            committed,
            bytes.fromhex(content["ledger_head"]),
            closed,
            _elections(config, identity, tensors, content, committed),
        )
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, LedgerError) as error:
        raise ModelError(
            f"{folder} holds no readable adapter ({error!r}); write one with `lr-worker export`"
        ) from error


def _elections(
    config: RunConfig,
    identity: Identity,
    tensors: dict[str, NDArray[Any]],
    content: dict[str, Any],
    committed: int,
) -> Elections:
    """The subspaces of the periods that so many rounds reach."""
    given_up = content.get("subspace_given_up")
    given_up = None if given_up is None else int(given_up)
    if not periods.voted(config):
        return Elections(given_up=given_up)
    found = Elections.from_arrays(config, identity.manifest, tensors, given_up)
    if len(found.bases) < periods.period(config, config.pool_after(committed)) and given_up is None:
        raise ValueError(f"{committed} rounds elect more than {len(found.bases)} subspaces")
    return found


def _pack_closed(closed: Closed) -> dict[str, NDArray[Any]]:
    """Coefficients of all closed pools after one another, and how many each has."""
    if not len(closed):
        return {}
    return {
        "closed_counts": np.array([len(pool.values) for pool in closed], np.int32),
        "closed_indices": np.concatenate([pool.indices for pool in closed]),
        "closed_values": np.concatenate([pool.values for pool in closed]),
    }


def _unpack_closed(tensors: dict[str, NDArray[Any]]) -> Closed:
    if "closed_counts" not in tensors:
        return Closed()
    counts, indices, values = (
        tensors[f"closed_{name}"] for name in ("counts", "indices", "values")
    )
    if not counts.dtype.kind == indices.dtype.kind == values.dtype.kind == "i":
        raise ValueError("closed pools are integers")
    if not len(indices) == len(values) == counts.sum() or counts.min(initial=0) < 0:
        raise ValueError("closed pools do not add up")
    ends = np.cumsum(counts)[:-1]
    parts = np.split(indices.astype(np.int32), ends), np.split(values.astype(np.int64), ends)
    return Closed(Sparse(i, narrow(v)) for i, v in zip(*parts, strict=True))
