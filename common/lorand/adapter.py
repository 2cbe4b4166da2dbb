"""The kilobyte adapter: coefficients and what they refer to; enough to rebuild all weights.

`adapter.safetensors` holds A as integers, or, where that is smaller, as zlib of their byte planes
(all lowest bytes, then all second bytes, …), which are bytes that any reader of safetensors shows:
half the size or less where few rounds or few directions moved it. `adapter_config.json` says what A
refers to.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lorand import strict_json
from lorand.closed import Closed, Sparse, narrow
from lorand.coefficients import Coefficients, check_magnitude
from lorand.config import RunConfig
from lorand.errors import LedgerError, ModelError
from lorand.ledger import Position, coefficients_digest, origin
from lorand.manifest import Identity
from lorand.subspaces import periods
from lorand.subspaces.elections import Elections

WEIGHTS_FILE: Final = "adapter.safetensors"
CONFIG_FILE: Final = "adapter_config.json"
FORMAT: Final = "lorand/adapter/v1"
UNREADABLE: Final = (OSError, ValueError, TypeError, KeyError, zlib.error)


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

    Coefficients are 32-bit where they fit (at most 16 KB at K = 4096), else 64-bit.
    """
    directions = adapter.config.directions
    content: dict[str, Any] = {
        "format": FORMAT,
        "base_model": adapter.config.model.name,
        "revision": adapter.config.model.revision,
        "base_digest": adapter.identity.base_digest.hex(),
        "pool_size": directions.pool_size,
        "pool_family": directions.family,
        "quantum_exponent": directions.quantum_exponent,
        "coefficients_digest": coefficients_digest(adapter.coefficients).hex(),
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
            **_packed(narrow(adapter.coefficients)),
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
        config = RunConfig.from_json(json.dumps(content["run"]))
        identity = Identity.from_lock(json.dumps(content["identity"]))
        coefficients = _unpacked(tensors, config.directions.pool_size)
        if coefficients is None:
            raise ModelError(f"the coefficients in {folder} do not fit their pool")
        digest = content.get("coefficients_digest")
        if digest is not None and digest != coefficients_digest(coefficients).hex():
            raise ModelError(
                f"{folder}: {CONFIG_FILE} is of other coefficients than {WEIGHTS_FILE} holds; take "
                "both files of one export"
            )
        committed, closed = int(content["committed"]), _unpack_closed(tensors)
        if len(closed) != config.pool_after(committed):
            raise ValueError(f"{committed} rounds do not leave {len(closed)} pools")
        for pool in closed:
            pool.dense(config.directions.pool_size)
        return Adapter(
            config,
            identity,
            coefficients,
            committed,
            bytes.fromhex(content["ledger_head"]),
            closed,
            _elections(config, identity, tensors, content, committed),
        )
    except (*UNREADABLE, SafetensorError, LedgerError) as error:
        raise ModelError(
            f"{folder} holds no readable adapter ({error!r}); write one with `lr-worker export`"
        ) from error


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Return the adapter of Σ_i weight_i · A_i: exact where weights are integers, else rounded.

    All are of one pool: the same base, trainable tensors and directions. Pools that their runs left
    behind are added one by one. What is returned says for its head of which adapters it is a sum;
    the run, its labels and its length are the longest one's. Raises ModelError.
    """
    if not adapters or len(adapters) != len(weights):
        raise ModelError(f"{len(weights)} weights for {len(adapters)} adapters: give one each")
    first = max(adapters, key=lambda one: len(one.closed))
    for other in adapters:
        if other is not first:
            _check_same_pool(first, other)
    size, count = first.config.directions.pool_size, len(first.closed)

    def added(number: int) -> Coefficients:
        total = np.zeros(size, np.int64)
        for one, weight in zip(adapters, weights, strict=True):
            if number <= len(one.closed):
                here = number == len(one.closed)
                part = one.coefficients if here else one.closed[number].dense(size)
                exact = float(weight).is_integer()
                total += part * int(weight) if exact else np.rint(part * weight).astype(np.int64)
                check_magnitude(total)
        return total

    head = sha256(b"lorand/sum/v1")
    for one, weight in zip(adapters, weights, strict=True):
        head.update(one.head + f"{float(weight)!r}\0".encode())
    closed = Closed(Sparse.of(added(number)) for number in range(count))
    return replace(first, coefficients=added(count), closed=closed, head=head.digest())


def _check_same_pool(ours: Adapter, theirs: Adapter) -> None:
    """Raise ModelError unless coefficients of both mean the same."""
    differ = [
        what
        for what, one, other in (
            ("base model", ours.identity.base_digest, theirs.identity.base_digest),
            ("tokenizer", ours.identity.tokenizer_digest, theirs.identity.tokenizer_digest),
            ("trainable tensors", ours.identity.manifest, theirs.identity.manifest),
            ("directions", ours.config.directions, theirs.config.directions),
            ("subspaces", ours.config.subspace, theirs.config.subspace),
            ("elected subspaces", (), (*ours.elections.bases, *theirs.elections.bases)),
            ("labels", ours.config.task.labels, theirs.config.task.labels),
        )
        if one != other
    ]
    if differ:
        raise ModelError(
            f"the adapters of {ours.config.run.name!r} and {theirs.config.run.name!r} are of other "
            f"{' and '.join(differ)}, so that their numbers cannot be added: train both on one"
        )


def _packed(values: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """A as a tensor of a file: integers, or zlib of their byte planes where that is smaller."""
    planes = values.view(np.uint8).reshape(len(values), -1).T
    small = zlib.compress(planes.tobytes(), 9)
    if len(small) >= values.nbytes:
        return {"coefficients": values}
    return {f"coefficients_zlib_{values.dtype.name}": np.frombuffer(small, np.uint8)}


def _unpacked(tensors: dict[str, NDArray[Any]], size: int) -> Coefficients | None:
    """A, shape (size,), of a file's tensors; None where they hold another number of integers."""
    for dtype in (np.dtype("<i4"), np.dtype("<i8")):
        packed = tensors.get(f"coefficients_zlib_{dtype.name}")
        if packed is not None:
            inflate, wanted = zlib.decompressobj(), size * dtype.itemsize
            planes = inflate.decompress(packed.tobytes(), wanted + 1)  # never more than it may be
            if len(planes) != wanted:
                return None
            parts = np.frombuffer(planes, np.uint8).reshape(dtype.itemsize, size)
            return np.ascontiguousarray(parts.T).view(dtype).reshape(size).astype(np.int64)
    plain = tensors["coefficients"]
    fits = plain.shape == (size,) and plain.dtype.kind == "i"
    return plain.astype(np.int64) if fits else None


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
