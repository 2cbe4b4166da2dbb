"""Which directions exist in a run and which a round measures (numpy).

Nobody picks a direction: the pool's key is a digest of the base model and the trainable set, and
the indices of a round come from a generator keyed with the run, the round and the worker. Indices
are recomputed everywhere and never sent.
"""

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from lorand.coefficients import check_size
from lorand.philox import Key, philox4x32

Family = Literal["hadamard", "independent"]
Indices = NDArray[np.int64]

SHARED: Final = b"shared"


@dataclass(frozen=True)
class Pool:
    """K directions: family, key and size, and the quantum 2^-q of their coefficients.

    Raises ValueError when size is not a power of two in 2^6 … 2^20.
    """

    key: Key
    size: int
    quantum_exponent: int
    family: Family = "hadamard"

    def __post_init__(self) -> None:
        """Check the size."""
        check_size(self.size)


def pool_key(base_digest: bytes, manifest_digest: bytes, pool_index: int) -> Key:
    """Return the Philox key of a pool (DESIGN §2 step 2).

    Both digests are 32 bytes. Runs on one base and one trainable set share their pools.
    """
    if len(base_digest) != 32 or len(manifest_digest) != 32:
        raise ValueError("the base-model digest and the manifest digest are 32 bytes each")
    digest = hashlib.sha256(
        b"lorand/pool/v1" + base_digest + manifest_digest + pool_index.to_bytes(4, "little")
    ).digest()
    return _key_of(digest)


def seed_keys(pool: Pool) -> list[Key]:
    """Return the K Philox keys of an `independent` pool: one 64-bit seed a direction."""
    counters = np.arange((pool.size + 1) // 2, dtype=np.uint32)
    words = philox4x32(pool.key, counters, 2).reshape(-1, 2)[: pool.size]
    return [(int(a), int(b)) for a, b in words]


def draw(run_digest: bytes, round_index: int, who: bytes, size: int, count: int) -> Indices:
    """Return `count` distinct direction indices in [0, size), uniformly without replacement.

    `who` is SHARED when all participants measure the same directions, else the worker's number
    as four little-endian bytes. When count equals size the whole pool is returned in order: a
    first-order participant reports every scalar.

    The generator is Philox keyed with SHA-256(run digest ‖ round ‖ who); size is a power of two,
    so masking a word is unbiased, and repeats are skipped.
    """
    if not 0 < count <= size:
        raise ValueError(f"a round measures 1 to {size} directions, not {count}")
    if count == size:
        return np.arange(size, dtype=np.int64)
    digest = hashlib.sha256(run_digest + round_index.to_bytes(4, "little") + who).digest()
    key = _key_of(digest)
    seen: dict[int, None] = {}
    block = 0
    while len(seen) < count:
        counters = np.arange(block, block + count, dtype=np.uint32)
        for word in philox4x32(key, counters).ravel() & np.uint32(size - 1):
            seen.setdefault(int(word))
            if len(seen) == count:
                break
        block += count
    return np.fromiter(seen, dtype=np.int64, count=count)


@dataclass(frozen=True)
class Draws:
    """The directions of a run's rounds, recomputed by everyone and never sent.

    `mode` says whether all participants measure the same `count` of `size` directions or each
    its own.
    """

    run_digest: bytes
    mode: Literal["shared", "own"]
    size: int
    count: int

    def of(self, round_index: int, worker: int) -> Indices:
        """Return the directions that a worker measures in a round, shape (count,)."""
        who = SHARED if self.mode == "shared" else worker.to_bytes(4, "little")
        return draw(self.run_digest, round_index, who, self.size, self.count)

    def committed(self, round_index: int, workers: tuple[int, ...]) -> Indices:
        """Return the distinct directions that a commit moves, in the order of its codes.

        Shared: the round's one draw. Own: the draws of the workers, in ascending order of their
        numbers, repeats left out.
        """
        if self.mode == "shared":
            return self.of(round_index, 0)
        drawn = np.concatenate([self.of(round_index, worker) for worker in sorted(workers)])
        return np.fromiter(dict.fromkeys(drawn.tolist()), dtype=np.int64)


def _key_of(digest: bytes) -> Key:
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
