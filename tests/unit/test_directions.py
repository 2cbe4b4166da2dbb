"""Directions nobody picks and nobody sends: everyone recomputes them (DESIGN §2 steps 2 and 8).

The constants are normative: a machine that draws others cannot take part in a run.
"""

import hashlib
from collections.abc import Iterator
from itertools import count as count_from
from itertools import islice
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorand.directions import SHARED, Draws, Pool, draw, pool_key, seed_keys
from lorand.philox import philox4x32

RUN: Final = bytes(range(32))
BASE, MANIFEST = RUN, RUN[::-1]
DIGEST: Final = st.binary(min_size=32, max_size=32)
LOG2_SIZE: Final = st.integers(6, 20)


def worker(number: int) -> bytes:
    return number.to_bytes(4, "little")


# ------------------------------------------------------------- the pool


@pytest.mark.parametrize(
    ("pool_index", "expected"),
    [(0, (2296858816, 3549987853)), (7, (1222700256, 968306639))],
)
def test_pool_key_is_the_formula(pool_index: int, expected: tuple[int, int]) -> None:
    """Step 2: the first 8 bytes of SHA-256(`lorand/pool/v1` ‖ base ‖ manifest ‖ index as u32)."""
    text = b"lorand/pool/v1" + BASE + MANIFEST + bytes([pool_index, 0, 0, 0])
    words = np.frombuffer(hashlib.sha256(text).digest()[:8], "<u4").tolist()
    assert pool_key(BASE, MANIFEST, pool_index) == tuple(words) == expected


def test_pool_key_depends_on_all_it_is_made_of() -> None:
    keys = {
        pool_key(BASE, MANIFEST, 0),
        pool_key(MANIFEST, BASE, 0),
        pool_key(BASE, BASE, 0),
        pool_key(BASE, MANIFEST, 1),
        pool_key(BASE, MANIFEST, 1 << 24),
    }
    assert len(keys) == 5


@pytest.mark.parametrize(("base", "manifest"), [(BASE[:31], MANIFEST), (BASE, MANIFEST + b"\0")])
def test_pool_key_takes_whole_digests(base: bytes, manifest: bytes) -> None:
    """Else two pairs of different lengths could share a pool."""
    with pytest.raises(ValueError, match="32 bytes each"):
        pool_key(base, manifest, 0)


@pytest.mark.parametrize("size", [0, 63, 4095, 2**21])
def test_a_pool_has_a_power_of_two_of_directions(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Pool((1, 2), size, 32)


def test_seeds_of_an_independent_pool() -> None:
    """Step 8: one 64-bit seed a direction, distinct, and not the words of signs or shifts."""
    keys = seed_keys(Pool((1, 2), 4096, 32, "independent"))
    assert keys[:3] == [
        (3004724266, 1570448368),
        (3860536221, 250968210),
        (3356560808, 339698639),
    ]
    assert keys[63] == (1579351645, 279633790)
    assert len(set(keys)) == 4096
    assert seed_keys(Pool((1, 2), 64, 32, "independent")) == keys[:64]
    signs_and_shifts = [
        philox4x32((1, 2), np.arange(2048, dtype=np.uint32), c1).reshape(-1, 2).tolist()
        for c1 in (0, 1)
    ]
    assert not set(keys) & {(a, b) for words in signs_and_shifts for a, b in words}


# ------------------------------------------------------------- what a round measures


@pytest.mark.parametrize(
    ("round_index", "who", "size", "expected"),
    [
        (0, SHARED, 4096, [1430, 3433, 1685, 1653, 362, 3722, 12, 2493]),
        (5, worker(3), 65536, [28580, 53412, 63978, 24343, 23764, 33106, 38062, 61109]),
        (1, SHARED, 64, [22, 49, 59, 45, 57, 34, 0, 7, 46, 63, 18, 16]),
    ],
    ids=["shared", "own", "small pool"],
)
def test_draws_are_normative(round_index: int, who: bytes, size: int, expected: list[int]) -> None:
    """Every machine must recompute these: indices are never sent."""
    assert draw(RUN, round_index, who, size, len(expected)).tolist() == expected


def stream(run: bytes, round_index: int, who: bytes, size: int) -> Iterator[int]:
    """The generator of the round as DESIGN §2 has it, one counter at a time."""
    digest = hashlib.sha256(run + round_index.to_bytes(4, "little") + who).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    seen = set()
    for counter in count_from():
        for word in philox4x32(key, np.array([counter], np.uint32))[0].tolist():
            if word % size not in seen:
                seen.add(word % size)
                yield word % size


@settings(deadline=None, max_examples=40)
@given(DIGEST, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), LOG2_SIZE, st.data())
def test_a_draw_is_distinct_in_range_and_recomputable(
    run: bytes, round_index: int, number: int, log2_size: int, data: st.DataObject
) -> None:
    """Distinct indices below K, equal to the stream of masked words with repeats skipped."""
    size = 1 << log2_size
    count = data.draw(st.integers(1, min(size - 1, 100)))
    drawn = draw(run, round_index, worker(number), size, count)
    assert drawn.dtype == np.int64
    assert len(set(drawn.tolist())) == count
    assert 0 <= drawn.min() <= drawn.max() < size
    assert drawn.tolist() == list(islice(stream(run, round_index, worker(number), size), count))


def test_all_but_one_of_a_pool_can_be_drawn() -> None:
    assert len(set(range(64)) - set(draw(RUN, 0, SHARED, 64, 63).tolist())) == 1


@pytest.mark.parametrize("size", [64, 65536])
def test_the_whole_pool_comes_in_order(size: int) -> None:
    """A first-order participant reports every scalar."""
    assert draw(RUN, 9, SHARED, size, size).tolist() == list(range(size))


@pytest.mark.parametrize("count", [0, -1, 65])
def test_counts_outside_the_pool_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 64 directions"):
        draw(RUN, 0, SHARED, 64, count)


def test_runs_rounds_and_workers_draw_differently() -> None:
    """Worker 0 is not `shared`, and round 256 is not round 1 shifted by a byte."""
    rounds = [draw(RUN, n, SHARED, 65536, 8).tolist() for n in (0, 1, 2, 256, 65536)]
    workers = [draw(RUN, 0, worker(n), 65536, 8).tolist() for n in (0, 1, 2, 256)]
    runs = [draw(RUN[::-1], 0, SHARED, 65536, 8).tolist()]
    everything = rounds + workers + runs
    assert len({tuple(drawn) for drawn in everything}) == len(everything)


def test_directions_are_drawn_uniformly() -> None:
    """χ² over 64 bins of 500 rounds of 32 draws: 63 degrees of freedom, so 63 ± 11."""
    drawn = np.concatenate([draw(RUN, n, SHARED, 4096, 32) for n in range(500)])
    for bins in (drawn // 64, drawn % 64):
        observed = np.bincount(bins, minlength=64)
        chi_square = float(((observed - 250) ** 2 / 250).sum())
        assert 63 - 4 * 11 < chi_square < 63 + 4 * 11


def test_the_place_in_a_draw_says_nothing_about_the_index() -> None:
    """DESIGN §2: draw k at random, for runs of neighbouring k are correlated."""
    drawn = np.stack([draw(RUN, n, SHARED, 4096, 32) for n in range(500)])
    means = drawn.mean(axis=0)
    assert np.abs(means - 2047.5).max() < 4 * 4096 / np.sqrt(12 * 500)
    neighbours = np.abs(np.diff(drawn, axis=1)) == 1
    assert neighbours.mean() == pytest.approx(2 / 4096, abs=0.0008)


# ------------------------------------------------------------- what a commit moves


def test_shared_draws_are_everybodys() -> None:
    draws = Draws(RUN, "shared", 4096, 8)
    expected = draw(RUN, 4, SHARED, 4096, 8).tolist()
    assert draws.of(4, 0).tolist() == draws.of(4, 17).tolist() == expected
    assert draws.committed(4, (17, 2)).tolist() == expected


@settings(deadline=None, max_examples=40)
@given(st.sets(st.integers(0, 1000), min_size=1, max_size=8), st.integers(0, 9), st.data())
def test_own_draws_commit_once_each_in_any_order_of_arrival(
    workers: set[int], round_index: int, data: st.DataObject
) -> None:
    """A small pool, so that workers do draw the same direction."""
    draws = Draws(RUN, "own", 64, 12)
    arrived = tuple(data.draw(st.permutations(sorted(workers))))
    committed = draws.committed(round_index, arrived).tolist()
    assert committed == draws.committed(round_index, tuple(sorted(workers))).tolist()
    assert len(set(committed)) == len(committed)
    assert set(committed) == {k for n in workers for k in draws.of(round_index, n).tolist()}
    assert committed[:12] == draws.of(round_index, min(workers)).tolist()
