"""Merkle trees over a list that only grows, with proofs that it did (RFC 9162, section 2.1).

A leaf's hash is SHA-256(0x00 ‖ entry), a node's SHA-256(0x01 ‖ left ‖ right), and a list of n
entries is split at the largest power of two below n. Who has kept one root checks with a proof of
about log2 n hashes that a later root has the same entries before its own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lorand.errors import LedgerError

HASH_BYTES: Final = 32
EMPTY: Final = hashlib.sha256(b"").digest()
"""The root of no entries."""


def leaf_hash(entry: bytes) -> bytes:
    """Return SHA-256(0x00 ‖ entry), 32 bytes."""
    return hashlib.sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return SHA-256(0x01 ‖ left ‖ right), 32 bytes."""
    return hashlib.sha256(b"\1" + left + right).digest()


@dataclass(frozen=True)
class Frontier:
    """What a reader keeps of a tree to go on with it: at most log2 n + 1 hashes.

    `peaks` are the roots of the complete subtrees, largest first: one for each bit of `size`.
    """

    size: int = 0
    peaks: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, size: int, peaks: Sequence[bytes]) -> "Frontier":
        """Return a frontier that somebody else sent. Raises LedgerError when it can be none."""
        if len(peaks) != size.bit_count() or any(len(peak) != HASH_BYTES for peak in peaks):
            raise LedgerError(f"these are no subtrees of a ledger of {size} entries")
        return cls(size, tuple(peaks))

    def add(self, leaf: bytes) -> "Frontier":
        """Return the frontier with one more leaf, given as its hash."""
        peaks, pairs = list(self.peaks), self.size
        while pairs & 1:
            leaf = node_hash(peaks.pop(), leaf)
            pairs >>= 1
        return Frontier(self.size + 1, (*peaks, leaf))

    def root(self) -> bytes:
        """Return the root of the tree, 32 bytes."""
        if not self.peaks:
            return EMPTY
        *larger, root = self.peaks
        for left in reversed(larger):
            root = node_hash(left, root)
        return root


class Tree:
    """All complete subtrees of a list, so that any proof takes about log2 n hashes to make.

    64 bytes an entry.
    """

    def __init__(self) -> None:
        """Begin without an entry."""
        self._levels: list[list[bytes]] = [[]]

    def __len__(self) -> int:
        """Return the number of leaves."""
        return len(self._levels[0])

    def add(self, leaf: bytes) -> None:
        """Append a leaf, given as its hash."""
        for level in self._levels:
            level.append(leaf)
            if len(level) % 2:
                return
            leaf = node_hash(level[-2], level[-1])
        self._levels.append([leaf])

    def frontier(self, size: int | None = None) -> Frontier:
        """Return the frontier of the first `size` leaves, by default of all."""
        size = self._within(len(self) if size is None else size)
        heights = [h for h in reversed(range(size.bit_length())) if size >> h & 1]
        # Left of a peak are only larger ones, so its place counts in its own size.
        peaks = [self._levels[h][(size >> h) - 1] for h in heights]
        return Frontier(size, tuple(peaks))

    def root(self, size: int | None = None) -> bytes:
        """Return the root of the first `size` leaves, by default of all."""
        return self.frontier(size).root()

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """Return the proof that a leaf is in the first `size` (section 2.1.3.1)."""
        if not 0 <= index < self._within(size):
            raise LedgerError(f"there is no entry {index} among {size}")
        start, stop, path = 0, size, []
        while stop - start > 1:
            middle = start + _split(stop - start)
            if index < middle:
                path.append(self._subtree(middle, stop))
                stop = middle
            else:
                path.append(self._subtree(start, middle))
                start = middle
        return path[::-1]

    def consistency(self, old: int, new: int) -> list[bytes]:
        """Return the proof that the first `new` leaves begin with the first `old` (2.1.4.1).

        Of nothing, and of all, it is empty. Raises LedgerError where there are not so many.
        """
        if not 0 <= old <= self._within(new):
            raise LedgerError(f"{new} entries cannot begin with {old}")
        if old == 0:
            return []
        start, stop, path, known = 0, new, [], True
        while old != stop:
            middle = start + _split(stop - start)
            if old <= middle:
                path.append(self._subtree(middle, stop))
                stop = middle
            else:
                path.append(self._subtree(start, middle))
                start, known = middle, False
        if not known:
            path.append(self._subtree(start, stop))
        return path[::-1]

    def _subtree(self, start: int, stop: int) -> bytes:
        """Root of the leaves from `start`, a multiple of the largest complete subtree in them."""
        size = stop - start
        if size.bit_count() == 1:
            height = size.bit_length() - 1
            return self._levels[height][start >> height]
        middle = start + _split(size)
        return node_hash(self._subtree(start, middle), self._subtree(middle, stop))

    def _within(self, size: int) -> int:
        if not 0 <= size <= len(self):
            raise LedgerError(f"the ledger holds {len(self)} entries, not {size}")
        return size


def _split(size: int) -> int:
    """Return the largest power of two below a size of 2 or more."""
    return 1 << ((size - 1).bit_length() - 1)


def includes(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> bool:
    """Return whether a proof shows that the leaf of this hash is in the tree (section 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    place, last, found = index, size - 1, leaf
    for other in path:
        if last == 0:
            return False
        if place & 1 or place == last:
            found = node_hash(other, found)
            while place and not place & 1:
                place, last = place >> 1, last >> 1
        else:
            found = node_hash(found, other)
        place, last = place >> 1, last >> 1
    return last == 0 and found == root


def extends(old: int, old_root: bytes, new: int, new_root: bytes, path: Sequence[bytes]) -> bool:
    """Return whether a proof shows that the new tree begins with the old one (section 2.1.4.2)."""
    if not 0 <= old <= new:
        return False
    if old in (0, new):
        return not path and old_root == (new_root if old else EMPTY)
    # A complete old tree is a subtree of the new one: its root is not repeated in the proof.
    hashes = [old_root, *path] if old.bit_count() == 1 else list(path)
    if not hashes:
        return False
    place, last = old - 1, new - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    found_old = found_new = hashes[0]
    for other in hashes[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            found_old, found_new = node_hash(other, found_old), node_hash(other, found_new)
            while place and not place & 1:
                place, last = place >> 1, last >> 1
        else:
            found_new = node_hash(found_new, other)
        place, last = place >> 1, last >> 1
    return last == 0 and found_old == old_root and found_new == new_root
