"""The cosine transform in integers: one table a length, the same on every machine (numpy).

Row i of the orthonormal DCT-II of length n is C[i, j] = √(2/n) cos(π i (2j + 1) / 2n), row 0 times
√½. Its integers are round(2^20 cos …), of phases that are reduced in integers before a cosine is
taken; the factor √(2/n) is left out and its nearest power of two put in its place.
"""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from math import log2
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from lorand.manifest import Manifest
from lorand.subspaces.basis import Indices, length

if TYPE_CHECKING:
    from lorand.config import RunConfig

BITS: Final = 20
"""Of an entry of the integer table."""


def matrix(n: int) -> NDArray[np.float64]:
    """Return the orthonormal DCT-II of length n, shape (n, n), in floats."""
    waves = np.cos(np.pi / (2 * n) * np.arange(4 * n))
    cosines: NDArray[np.float64] = waves[_phases(n, np.arange(n))]
    cosines[0] *= np.sqrt(0.5)
    cosines *= np.sqrt(2 / n)
    return cosines


def rows(n: int, indices: Indices) -> NDArray[np.int32]:
    """Return rows i of round(2^20 cos(π i (2j + 1) / 2n)), shape (rank, n), row 0 times √½."""
    waves: NDArray[np.int32] = _wave(n)[_phases(n, indices)]
    waves[indices == 0] = round(2**BITS * 0.5**0.5)
    return waves


@lru_cache(maxsize=4)
def table(n: int) -> NDArray[np.int32]:
    """Return all rows, shape (n, n); a model has few lengths, and a vote asks for each in turn."""
    return rows(n, np.arange(n))


def _phases(n: int, indices: Indices) -> NDArray[np.int64]:
    """i (2j + 1) mod 4n, shape (rank, n): the cosine of π/2n times it is the transform's."""
    return indices[:, None] * (2 * np.arange(n, dtype=np.int64) + 1) % (4 * n)


def exponent(n: int) -> int:
    """Return e of the power of two nearest to √(2/n), the length of a row of cosines."""
    return round(log2(2 / n) / 2)


def _wave(n: int) -> NDArray[np.int32]:
    waves: NDArray[np.int32] = np.rint(2**BITS * np.cos(np.pi / (2 * n) * np.arange(4 * n))).astype(
        np.int32
    )
    return waves


def digest_of(config: "RunConfig", manifest: Manifest) -> bytes:
    """Return the digest of the cosines that a run uses; empty where it uses none."""
    if config.subspace.kind != "dct":
        return b""
    return digest(length(spec) for spec in manifest.tensors if spec.rank)


def digest(lengths: Iterable[int]) -> bytes:
    """Return SHA-256 over all cosines of these lengths: what a worker shows when it joins.

    A mathematical library that rounds one of them otherwise would lead to other weights.
    """
    total = hashlib.sha256(b"lorand/cosines/v1")
    for n in sorted(set(lengths)):
        total.update(n.to_bytes(4, "little") + _wave(n).astype("<i4").tobytes())
    return total.digest()
