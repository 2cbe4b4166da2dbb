"""Philox4x32-10 is Random123's, in numpy, torch and numba, and the signs are DESIGN §2's.

Known answers: `kat_vectors` of Random123 (Salmon, Moraes, Dror and Shaw, SC 2011).
"""

import hashlib
from typing import Final

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorand.kernels import reference, tiles
from lorand.philox import Key, Words, philox4x32

WORD: Final = st.integers(0, 2**32 - 1)

KNOWN_ANSWERS: Final = {
    "zeros": ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_known_answers(name: str) -> None:
    """DESIGN §2 step 3. Ours is philox4x32(key, c0, c1, c2, c3), Random123's counter then key."""
    counter, key, answer = map(words_of, KNOWN_ANSWERS[name])
    c0 = np.array(counter[:1], np.uint32)
    words = philox4x32((key[0], key[1]), c0, *counter[1:])
    assert words.dtype == np.uint32
    assert words.tolist() == [answer]


def test_known_answer_of_torch_and_numba() -> None:
    """Their last counter word is always zero, so only Random123's first vector applies."""
    answer = words_of(KNOWN_ANSWERS["zeros"][2])
    assert torch_words((0, 0), [0], 0, 0).tolist() == [answer]
    zero = np.uint32(0)
    assert list(tiles._philox(zero, zero, zero, zero, zero)) == answer


def torch_words(key: Key, c0: list[int], c1: int, c2: int) -> Words:
    words = reference.philox(key, torch.tensor(c0), c1, c2)
    return torch.stack(words, dim=-1).numpy().astype(np.uint32)


@settings(deadline=None, max_examples=50)
@given(st.tuples(WORD, WORD), st.lists(WORD, min_size=1, max_size=5), WORD, WORD)
def test_torch_and_numba_agree_with_numpy(key: Key, c0: list[int], c1: int, c2: int) -> None:
    """The known answers of numpy hold for the other two by this."""
    expected = philox4x32(key, np.array(c0, np.uint32), c1, c2)
    assert torch_words(key, c0, c1, c2).tolist() == expected.tolist()
    rest = [np.uint32(word) for word in (c1, c2, *key)]
    assert [list(tiles._philox(np.uint32(c), *rest)) for c in c0] == expected.tolist()


@settings(deadline=None, max_examples=30)
@given(st.tuples(WORD, WORD), st.integers(0, 2**27 - 1), st.integers(0, 2**17))
def test_numba_fills_a_tile_in_block_order(key: Key, tile: int, tid: int) -> None:
    """Word m of a tile is word m & 3 of counter (32·tile + (m >> 2), 0, tid, 0)."""
    words = np.empty(128, np.uint32)
    tiles.tile_words(
        words, 0, np.int64(tile), np.uint32(tid), np.uint32(key[0]), np.uint32(key[1]), False
    )
    blocks = np.arange(32 * tile, 32 * tile + 32).astype(np.uint32)
    assert words.tolist() == philox4x32(key, blocks, 0, tid).ravel().tolist()


def test_the_generator_is_a_pure_function_of_its_counter() -> None:
    """Any element can be computed anywhere, in any order, without state."""
    counters = np.arange(100, dtype=np.uint32)
    together = philox4x32((1, 2), counters, 0, 3)
    apart = [philox4x32((1, 2), counters[i : i + 1], 0, 3)[0].tolist() for i in range(100)]
    assert together.tolist() == apart
    assert philox4x32((1, 2), counters[::-1], 0, 3).tolist() == apart[::-1]


class TestDesignVector:
    """The test vector at the end of DESIGN §2: key (1, 2), tensor number 3."""

    KEY: Final = (1, 2)
    TID: Final = 3

    def bits_by_numpy(self) -> Words:
        """Step 4 over the first 8,192 elements, from the words of numpy's generator."""
        words = philox4x32(self.KEY, np.arange(64, dtype=np.uint32), 0, self.TID).reshape(2, 1, 128)
        bits = (words >> np.arange(32, dtype=np.uint32).reshape(1, 32, 1)) & np.uint32(1)
        return bits.reshape(-1)

    def bits_by_torch(self) -> Words:
        device = torch.device("cpu")
        signs = reference.signs(0, 8192, key=self.KEY, tid=self.TID, device=device)
        return ((1 - signs.numpy()) / 2).astype(np.uint32)

    def test_block_0(self) -> None:
        words = philox4x32(self.KEY, np.array([0], np.uint32), 0, self.TID)
        assert words.tolist() == [words_of("4236452e d5af937b e196fd49 1dd16593")]

    @pytest.mark.parametrize("source", ["numpy", "torch"])
    def test_bits(self, source: str) -> None:
        """Bit 1 is the sign −1; element 128 takes the second bit of the first word."""
        bits = self.bits_by_numpy() if source == "numpy" else self.bits_by_torch()
        text = "".join(map(str, bits.tolist()))
        assert text[:16] == "0111011101111001"
        assert text[128:144] == "1101110101100111"
        assert text.count("1") == 4029
        digest = hashlib.sha256(bits.astype(np.uint8).tobytes()).hexdigest()
        assert digest == "3cb2c22d109872e844677f70dc6c2a3352bdf0f065b571f2a9dd9522a96d9dc7"

    def test_shifts(self) -> None:
        """r_0 … r_3 at K = 4096, by all three (step 5)."""
        expected = [3780, 2727, 3481, 2611]
        words = philox4x32(self.KEY, np.array([0], np.uint32), 1, self.TID)
        assert (words[0] & np.uint32(4095)).tolist() == expected
        places = reference.buckets(
            0, 4 * 4096, key=self.KEY, tid=self.TID, size=4096, device=torch.device("cpu")
        )
        assert places[::4096].tolist() == expected
        by_numba = [
            tiles.shift_of(np.int64(b), np.int64(4095), np.uint32(3), np.uint32(1), np.uint32(2))
            for b in range(4)
        ]
        assert by_numba == expected
