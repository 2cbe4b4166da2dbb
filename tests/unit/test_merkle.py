"""Merkle trees against the recursive definitions of RFC 9162, and proofs that must not pass."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorand import merkle
from lorand.errors import LedgerError
from lorand.merkle import EMPTY, Frontier, Tree, leaf_hash

ENTRIES: Final = [bytes([n]) * n for n in range(70)]
SIZES: Final = st.integers(0, len(ENTRIES))

# Certificate Transparency's test vectors: these eight entries, and the root after each.
KNOWN_ENTRIES: Final = [
    "",
    "00",
    "10",
    "2021",
    "3031",
    "40414243",
    "5051525354555657",
    "606162636465666768696a6b6c6d6e6f",
]
KNOWN_ROOTS: Final = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def tree_of(entries: Sequence[bytes]) -> Tree:
    tree = Tree()
    for entry in entries:
        tree.add(leaf_hash(entry))
    return tree


FULL: Final = tree_of(ENTRIES)


def largest_power_below(n: int) -> int:
    k = 1
    while 2 * k < n:
        k *= 2
    return k


def naive_root(entries: Sequence[bytes]) -> bytes:
    """MTH of section 2.1.1, as it stands there."""
    n = len(entries)
    if n == 0:
        return hashlib.sha256().digest()
    if n == 1:
        return hashlib.sha256(b"\0" + entries[0]).digest()
    k = largest_power_below(n)
    parts = naive_root(entries[:k]), naive_root(entries[k:])
    return hashlib.sha256(b"\1" + parts[0] + parts[1]).digest()


def naive_inclusion(index: int, entries: Sequence[bytes]) -> list[bytes]:
    """PATH of section 2.1.3.1."""
    if len(entries) == 1:
        return []
    k = largest_power_below(len(entries))
    if index < k:
        return [*naive_inclusion(index, entries[:k]), naive_root(entries[k:])]
    return [*naive_inclusion(index - k, entries[k:]), naive_root(entries[:k])]


def naive_consistency(old: int, entries: Sequence[bytes], *, whole: bool = True) -> list[bytes]:
    """SUBPROOF of section 2.1.4.1."""
    if old == len(entries):
        return [] if whole else [naive_root(entries)]
    k = largest_power_below(len(entries))
    if old <= k:
        return [*naive_consistency(old, entries[:k], whole=whole), naive_root(entries[k:])]
    return [*naive_consistency(old - k, entries[k:], whole=False), naive_root(entries[:k])]


def test_roots_of_certificate_transparency() -> None:
    entries = [bytes.fromhex(text) for text in KNOWN_ENTRIES]
    tree = tree_of(entries)
    assert [tree.root(n).hex() for n in range(9)] == KNOWN_ROOTS
    assert bytes.fromhex(KNOWN_ROOTS[0]) == EMPTY == Tree().root()


def test_proofs_of_the_rfcs_example() -> None:
    """Section 2.1.5: seven leaves d0 … d6, hashes a … l."""
    entries = [b"d%d" % n for n in range(7)]
    tree = tree_of(entries)
    a, b, c, d, e, f, j = map(leaf_hash, entries)
    g, h, i = (merkle.node_hash(*pair) for pair in ((a, b), (c, d), (e, f)))
    k, last = merkle.node_hash(g, h), merkle.node_hash(i, j)
    assert tree.root() == merkle.node_hash(k, last)
    assert tree.inclusion(0, 7) == [b, h, last]
    assert tree.inclusion(3, 7) == [c, g, last]
    assert tree.inclusion(4, 7) == [f, j, k]
    assert tree.inclusion(6, 7) == [i, k]
    assert tree.consistency(3, 7) == [c, d, g, last]
    assert tree.consistency(4, 7) == [last]
    assert tree.consistency(6, 7) == [i, j, k]


@pytest.mark.parametrize("size", range(len(ENTRIES) + 1))
def test_a_reader_and_the_tree_have_the_root_of_the_definition(size: int) -> None:
    frontier = Frontier()
    for entry in ENTRIES[:size]:
        frontier = frontier.add(leaf_hash(entry))
    assert frontier == FULL.frontier(size) == Frontier.of(size, frontier.peaks)
    assert frontier.root() == FULL.root(size) == naive_root(ENTRIES[:size])


@given(st.data())
def test_proofs_are_those_of_the_definition_and_pass(data: st.DataObject) -> None:
    new = data.draw(st.integers(1, len(ENTRIES)))
    old, index = data.draw(st.integers(1, new)), data.draw(st.integers(0, new - 1))
    path = FULL.inclusion(index, new)
    assert path == naive_inclusion(index, ENTRIES[:new])
    assert merkle.includes(leaf_hash(ENTRIES[index]), index, new, path, FULL.root(new))
    proof = FULL.consistency(old, new)
    assert proof == naive_consistency(old, ENTRIES[:new])
    assert merkle.extends(old, FULL.root(old), new, FULL.root(new), proof)
    assert max(len(path), len(proof) - 1) <= (new - 1).bit_length()


@given(SIZES)
def test_every_history_begins_with_nothing(size: int) -> None:
    assert merkle.extends(0, EMPTY, size, FULL.root(size), FULL.consistency(0, size))
    assert not merkle.extends(0, FULL.root(3), size, FULL.root(size), [])


@given(st.data())
def test_a_proof_of_something_else_does_not_pass(data: st.DataObject) -> None:
    """Another hash, one more, one less, another order, another place or size."""
    new = data.draw(st.integers(2, len(ENTRIES)))
    old, index = data.draw(st.integers(1, new)), data.draw(st.integers(0, new - 1))
    proofs = FULL.consistency(old, new), FULL.inclusion(index, new)
    leaf, roots = leaf_hash(ENTRIES[index]), (FULL.root(old), FULL.root(new))
    tries: list[tuple[list[bytes], Callable[[list[bytes]], bool]]] = [
        (proofs[0], lambda p: merkle.extends(old, roots[0], new, roots[1], p)),
        (proofs[1], lambda p: merkle.includes(leaf, index, new, p, roots[1])),
    ]
    for proof, passes in tries:
        assert passes(proof)
        place = data.draw(st.integers(0, len(proof)))
        changed = [bytes([h[0] ^ (n == place)]) + h[1:] for n, h in enumerate(proof)]
        for wrong in (changed, [*proof, EMPTY], proof[:-1], [EMPTY, *proof], proof[::-1]):
            assert wrong == proof or not passes(wrong)
    other = data.draw(SIZES)
    if other != old:
        assert not merkle.extends(other, roots[0], new, roots[1], proofs[0])
        assert not merkle.extends(old, FULL.root(other), new, roots[1], proofs[0])
    if other != index:
        assert not merkle.includes(leaf, other, new, proofs[1], roots[1])


@given(st.integers(1, 69), st.integers(0, 68), st.integers(0, 5))
def test_a_forked_history_has_no_proof(old: int, where: int, more: int) -> None:
    """One entry of the past is another: no matter what is appended, the old root is not in it."""
    where %= old
    forked = list(ENTRIES)
    forked[where] = b"another"
    tree, new = tree_of(forked), min(len(forked), old + more)
    proof = tree.consistency(old, new)
    assert not merkle.extends(old, FULL.root(old), new, tree.root(new), proof)
    assert merkle.extends(old, tree.root(old), new, tree.root(new), proof)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: FULL.root(71),
        lambda: FULL.root(-1),
        lambda: FULL.inclusion(5, 5),
        lambda: FULL.consistency(6, 5),
        lambda: FULL.consistency(5, 71),
        lambda: Frontier.of(3, [EMPTY]),
        lambda: Frontier.of(2, [b"short"]),
    ],
)
def test_what_is_not_there_is_our_error(ask: object) -> None:
    assert callable(ask)
    with pytest.raises(LedgerError):
        ask()
