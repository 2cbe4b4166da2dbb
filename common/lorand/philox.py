"""Philox4x32-10, the counter-based generator behind every direction (numpy).

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), as
published in Random123. It is a pure function of (key, counter), so any element of any direction
can be computed anywhere, in any order, without state.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

MULTIPLIER_0: Final = 0xD2511F53
MULTIPLIER_1: Final = 0xCD9E8D57
WEYL_0: Final = 0x9E3779B9
WEYL_1: Final = 0xBB67AE85
ROUNDS: Final = 10

Key = tuple[int, int]
Words = NDArray[np.uint32]

_LOW: Final = np.uint64(0xFFFFFFFF)
_SHIFT: Final = np.uint64(32)


def philox4x32(key: Key, c0: Words, c1: int = 0, c2: int = 0, c3: int = 0) -> Words:
    """Return the four output words of each counter (c0[i], c1, c2, c3), shape (n, 4).

    >>> [f"{w:08x}" for w in philox4x32((1, 2), np.array([0], np.uint32), 0, 3)[0]]
    ['4236452e', 'd5af937b', 'e196fd49', '1dd16593']
    """
    x0 = np.asarray(c0).astype(np.uint64)
    x1, x2, x3 = (np.full_like(x0, c) for c in (c1, c2, c3))
    k0, k1 = key
    for _ in range(ROUNDS):
        low = np.uint64(k0), np.uint64(k1)
        product_0 = x0 * np.uint64(MULTIPLIER_0)
        product_1 = x2 * np.uint64(MULTIPLIER_1)
        x0, x1, x2, x3 = (
            (product_1 >> _SHIFT) ^ x1 ^ low[0],
            product_1 & _LOW,
            (product_0 >> _SHIFT) ^ x3 ^ low[1],
            product_0 & _LOW,
        )
        k0 = (k0 + WEYL_0) & 0xFFFFFFFF
        k1 = (k1 + WEYL_1) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)
