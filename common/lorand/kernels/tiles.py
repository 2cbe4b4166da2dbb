"""The compiled loops of the CPU backend: tile by tile, 32 weights a step (DESIGN §2).

A tile is 4,096 weights and has 128 words of sign bits: element 128·j + m takes bit j of word m.
Each loop walks its tiles once, asks for the memory of the next row early (a core that computes
leaves its memory idle otherwise: 1.2 to 1.8 times slower), and keeps everything else in the
nearest cache. Weights are arrays as in `simd`; tables are uint32 (the bits of float32).
"""

from typing import Any, Final

import numpy as np
from numba import carray, njit, uint32, uint64

from lorand.kernels.simd import (
    STREAM_ALIGN,
    accumulate,
    add_floats,
    fence,
    interleave,
    load,
    load_moves,
    load_two,
    look_up,
    permute_xor,
    philox_blocks,
    pointer_to,
    prefetch_two,
    scale,
    splat,
    store,
    store_two,
    stream_two,
)
from lorand.philox import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1

TILE: Final = 4096
ROW: Final = 128
ROWS: Final = TILE // ROW
STEP: Final = 32
"""Weights a step; tails shorter than that are computed in a buffer of this length."""
AHEAD: Final = 2048
"""Bytes between a load and the prefetch: half a page, the best of 1, 2, 4 and 8 KiB."""
GROUP: Final = 8
"""Seeds added in one go, four by four: a table of 16 entries is one register."""

_M0, _M1 = np.uint64(MULTIPLIER_0), np.uint64(MULTIPLIER_1)
_W0, _W1 = np.uint32(WEYL_0), np.uint32(WEYL_1)
_LOW = np.uint64(0xFFFFFFFF)
_TOP = np.uint32(0x80000000)


@njit(inline="always")
def _philox(c0: Any, c1: Any, c2: Any, k0: Any, k1: Any) -> Any:
    x0, x1, x2, x3 = uint32(c0), uint32(c1), uint32(c2), uint32(0)
    for _ in range(ROUNDS):
        p0 = uint64(x0) * _M0
        p1 = uint64(x2) * _M1
        y0 = uint32(uint32(p1 >> uint64(32)) ^ x1 ^ k0)
        y2 = uint32(uint32(p0 >> uint64(32)) ^ x3 ^ k1)
        x0, x1, x2, x3 = y0, uint32(p1 & _LOW), y2, uint32(p0 & _LOW)
        k0, k1 = uint32(k0 + _W0), uint32(k1 + _W1)
    return x0, x1, x2, x3


@njit
def shift_of(block: Any, mask: Any, tid: Any, k0: Any, k1: Any) -> Any:
    """r_b: word b mod 4 of counter (b div 4, 1, tid, 0), masked with K − 1."""
    w0, w1, w2, w3 = _philox(block >> 2, 1, tid, k0, k1)
    lane = block & 3
    word = w0 if lane == 0 else (w1 if lane == 1 else (w2 if lane == 2 else w3))
    return np.int64(word) & mask


@njit
def tile_words(words: Any, at: Any, tile: Any, tid: Any, k0: Any, k1: Any, paired: Any) -> None:
    """Write the 128 words of a tile from words[at] on.

    paired: in every 32 the even words come first, the order of bfloat16 in `simd.load_two`.
    """
    for half in range(2):
        first = uint32(32 * tile + 16 * half)
        x0, x1, x2, x3 = philox_blocks(first, uint32(0), tid, k0, k1)
        even = interleave(x0, x2)
        odd = interleave(x1, x3)
        for part in range(2):
            a, b = even[part], odd[part]
            if not paired:
                a, b = interleave(a, b)
            store(words, at + 64 * half + 32 * part, a)
            store(words, at + 64 * half + 32 * part + 16, b)


@njit
def walk(count: Any, size: Any, chunk: Any) -> Any:
    """run, blocks and steps of a walk (`_tile_of`) through count weights, K = size."""
    steps = (count + TILE - 1) // TILE
    if chunk == 0 or count <= size:
        return 0, 1, steps
    blocks = (steps * TILE + size - 1) // size
    return chunk // TILE, blocks, blocks * (size // TILE)


@njit
def _tile_of(step: Any, run: Any, blocks: Any, size: Any, tid: Any, k0: Any, k1: Any) -> Any:
    """The tile of a step of a walk. run = 0: in order. Else tiles that share places come together.

    A table of 2^20 floats is larger than a core's cache, run tiles of it are not: such a chunk is
    used by run tiles of every block before the next one (chunk c, block b, tile t of run), so
    each is fetched once. Some steps of the last block lie beyond the last tile.
    """
    if run == 0:
        return step
    chunk, rest = divmod(step, blocks * run)
    block, tile = divmod(rest, run)
    shift = shift_of(block, size - 1, tid, k0, k1)
    return block * (size // TILE) + (chunk ^ (shift // (TILE * run))) * run + tile


@njit
def _add_segment(
    base: Any, out: Any, origin: Any, table: Any, words: Any, at: Any, stop: Any, shift: Any,
    tile_end: Any, jump: Any, stream: Any,
) -> None:  # fmt: skip
    """base + D·T into out for weights at … stop of one block; arrays begin at weight origin."""
    mask = np.int64(table.shape[0]) - 1
    high, low = shift & ~np.int64(STEP - 1), uint32(shift & (STEP - 1))
    ahead = np.int64(AHEAD // base.itemsize)
    top = splat(_TOP)
    row = at
    while row < stop:
        end = min(stop, (row | (ROW - 1)) + 1)
        lift = splat(uint32(31 - ((row & (TILE - 1)) // ROW)))
        early = ahead - origin if row + ahead < tile_end else ahead + jump - origin
        for i in range(row, end, STEP):
            prefetch_two(base, i + early)
            first, second = load_moves(base, table, (i & mask) ^ high, low)
            one, two = load_two(base, i - origin)
            m = i & (ROW - 1)
            one = add_floats(one, first ^ ((load(words, m) << lift) & top))
            two = add_floats(two, second ^ ((load(words, m + 16) << lift) & top))
            if stream:
                stream_two(out, i - origin, one, two)
            else:
                store_two(out, i - origin, one, two)
        row = end


@njit
def _add_tile(
    base: Any, out: Any, origin: Any, table: Any, words: Any, tile: Any, stop: Any, jump: Any,
    stream: Any, tid: Any, k0: Any, k1: Any,
) -> None:  # fmt: skip
    size = np.int64(table.shape[0])
    width: Any = min(size, TILE)
    start = tile * TILE
    for at in range(start, stop, width):
        shift = shift_of(at // size, size - 1, tid, k0, k1)
        _add_segment(
            base, out, origin, table, words, at, min(at + width, stop), shift, start + TILE,
            jump, stream,
        )  # fmt: skip


@njit
def _materialise_steps(
    base: Any, out: Any, table: Any, tid: Any, k0: Any, k1: Any, paired: Any, stream: Any,
    run: Any, blocks: Any, first: Any, last: Any,
) -> None:  # fmt: skip
    words = np.empty(ROW, np.uint32)
    count = base.shape[0]
    size = np.int64(table.shape[0])
    tile = _tile_of(first, run, blocks, size, tid, k0, k1)
    for step in range(first, last):
        following = _tile_of(step + 1, run, blocks, size, tid, k0, k1)
        start = tile * TILE
        left = min(TILE, count - start)
        if left > 0:
            tile_words(words, 0, tile, tid, k0, k1, paired)
            if left % STEP == 0:
                jump = (following - tile - 1) * TILE
                _add_tile(base, out, 0, table, words, tile, start + left, jump, stream, tid, k0, k1)
            else:  # the last tile, in a buffer that whole steps may overrun
                spare = np.zeros(TILE, base.dtype)
                spare[:left] = base[start : start + left]
                stop = start + (left + STEP - 1) // STEP * STEP
                _add_tile(spare, spare, start, table, words, tile, stop, 0, False, tid, k0, k1)
                out[start : start + left] = spare[:left]
        tile = following
    if stream:
        fence()


@njit
def materialise(
    like: Any, bases: Any, outs: Any, counts: Any, tids: Any, tables: Any, size: Any, k0: Any,
    k1: Any, paired: Any, chunk: Any, stream: Any, first: Any, last: Any,
) -> None:  # fmt: skip
    """DESIGN §2 step 7 for the steps first … last of a walk through several tensors.

    bases and outs are addresses of `counts` weights of the dtype of `like`, tables those of the
    table, shape (size,), that each takes. chunk: places of a table that stay in cache, 0 to walk in
    order (`_tile_of`). Results of stream bytes and more are written past the cache.
    """
    before = np.int64(0)
    for n in range(counts.shape[0]):
        count = counts[n]
        run, blocks, steps = walk(count, size, chunk)
        start, stop = max(first - before, 0), min(last - before, steps)
        before += steps
        if start < stop:
            base = carray(pointer_to(bases[n]), (count,), like.dtype)
            out = carray(pointer_to(outs[n]), (count,), like.dtype)
            table = carray(pointer_to(tables[n]), (size,), np.uint32)
            past = bases[n] != outs[n] and outs[n] % STREAM_ALIGN == 0
            past = past and count * like.itemsize >= stream
            _materialise_steps(
                base, out, table, tids[n], k0, k1, paired, past, run, blocks, start, stop
            )  # fmt: skip


@njit
def _sum_tile(
    gradient: Any, origin: Any, sums: Any, factor: Any, words: Any, tile: Any, stop: Any,
    jump: Any, tid: Any, k0: Any, k1: Any,
) -> None:  # fmt: skip
    """Add D·g to the buckets of one tile; the array begins at weight origin."""
    size = np.int64(sums.shape[0])
    width: Any = min(size, TILE)
    height: Any = min(width, ROW)
    tile_end = tile * TILE + TILE
    ahead = np.int64(AHEAD // gradient.itemsize)
    top = splat(_TOP)
    for at in range(tile * TILE, stop, width):
        shift = shift_of(at // size, size - 1, tid, k0, k1)
        high, low = shift & ~np.int64(15), uint32(shift & 15)
        for row in range(at, min(at + width, stop), height):
            lift = splat(uint32(31 - ((row & (TILE - 1)) // ROW)))
            early = ahead - origin if row + ahead < tile_end else ahead + jump - origin
            for i in range(row, min(stop, row + height), STEP):
                prefetch_two(gradient, i + early)
                m, place = i & (ROW - 1), (i & (size - 1)) ^ high
                part = load(gradient, i - origin) ^ ((load(words, m) << lift) & top)
                accumulate(sums, place, permute_xor(part, low), factor)
                part = load(gradient, i + 16 - origin) ^ ((load(words, m + 16) << lift) & top)
                accumulate(sums, place ^ 16, permute_xor(part, low), factor)


@njit
def project(
    gradient: Any,
    sums: Any,
    factor: Any,
    tid: Any,
    k0: Any,
    k1: Any,
    run: Any,
    blocks: Any,
    first: Any,
    last: Any,
) -> None:
    """Add factor · bucket sums, shape (K,), for the steps first … last of a walk (`_tile_of`).

    With run > 0 every blocks · run steps have buckets of their own.
    """
    words = np.empty(ROW, np.uint32)
    count = gradient.shape[0]
    size = np.int64(sums.shape[0])
    tile = _tile_of(first, run, blocks, size, tid, k0, k1)
    for step in range(first, last):
        following = _tile_of(step + 1, run, blocks, size, tid, k0, k1)
        start = tile * TILE
        left = min(TILE, count - start)
        if left > 0:
            tile_words(words, 0, tile, tid, k0, k1, False)
            if left % STEP == 0:
                jump = (following - tile - 1) * TILE
                _sum_tile(gradient, 0, sums, factor, words, tile, start + left, jump, tid, k0, k1)
            else:
                spare = np.zeros(TILE, gradient.dtype)
                spare[:left] = gradient[start : start + left]
                stop = start + (left + STEP - 1) // STEP * STEP
                _sum_tile(spare, start, sums, factor, words, tile, stop, 0, tid, k0, k1)
        tile = following


@njit(inline="always")
def _choose(mask: Any, where_set: Any, elsewhere: Any) -> Any:
    return elsewhere ^ ((where_set ^ elsewhere) & mask)


@njit(inline="always")
def _nibbles(words: Any, m: Any) -> Any:
    """Turn four seeds' sign words of 16 columns into nibbles: a 4 x 4 bit transpose.

    Nibble j of the n-th result says the signs of the four seeds in row 4·j + n.
    """
    pairs, quads = splat(uint32(0x55555555)), splat(uint32(0x33333333))
    one, two = splat(uint32(1)), splat(uint32(2))
    a, b = load(words, m), load(words, m + ROW)
    c, d = load(words, m + 2 * ROW), load(words, m + 3 * ROW)
    ab0, ab1 = _choose(pairs, a, b << one), _choose(pairs, a >> one, b)
    cd0, cd1 = _choose(pairs, c, d << one), _choose(pairs, c >> one, d)
    n0, n1 = _choose(quads, ab0, cd0 << two), _choose(quads, ab1, cd1 << two)
    n2, n3 = _choose(quads, ab0 >> two, cd0), _choose(quads, ab1 >> two, cd1)
    return n0, n1, n2, n3


@njit
def _add_group(total: Any, words: Any, tables: Any, at: Any) -> None:
    """Add Σ ±A_s of eight seeds to the int32 total of a tile.

    tables[at + n] is the sum of the first four for signs n, tables[at + 16 + n] that of the others.
    A nibble is the place in such a table of one weight: a look-up in a register serves four seeds.
    Totals lie column by column (a column is 16 elements of each row): rows 512 bytes apart would
    wait for one another's stores.
    """
    four = splat(uint32(4))
    low, high = load(tables, at), load(tables, at + 16)
    for m in range(0, ROW, 16):
        a, b, c, d = _nibbles(words, m)
        e, f, g, h = _nibbles(words, m + 4 * ROW)
        for i in range(m * ROWS, (m + 16) * ROWS, 4 * 16):
            store(total, i, load(total, i) + look_up(low, a) + look_up(high, e))
            store(total, i + 16, load(total, i + 16) + look_up(low, b) + look_up(high, f))
            store(total, i + 32, load(total, i + 32) + look_up(low, c) + look_up(high, g))
            store(total, i + 48, load(total, i + 48) + look_up(low, d) + look_up(high, h))
            a, b, c, d = a >> four, b >> four, c >> four, d >> four
            e, f, g, h = e >> four, f >> four, g >> four, h >> four


@njit
def _add_moves(base: Any, out: Any, tile: Any, moves: Any) -> None:
    """base + moves into out; moves lie column by column (`_add_group`)."""
    start = tile * TILE
    count = min(TILE, base.shape[0] - start)
    whole = count & ~np.int64(15)
    for row in range(0, whole, ROW):
        for e in range(row, min(row + ROW, whole), 16):
            move = load(moves, (e - row) * ROWS + row // ROW * 16)
            store(out, start + e, add_floats(load(base, start + e), move))
    if whole < count:
        spare = np.zeros(16, base.dtype)
        spare[: count - whole] = base[start + whole : start + count]
        move = load(moves, (whole & (ROW - 1)) * ROWS + whole // ROW * 16)
        store(spare, 0, add_floats(load(spare, 0), move))
        out[start + whole : start + count] = spare[: count - whole]


@njit
def independent(
    base: Any, out: Any, keys: Any, tables: Any, moved: Any, tid: Any, factor: Any, first: Any,
    last: Any,
) -> None:  # fmt: skip
    """DESIGN §2 step 8 for the tiles first … last, seeds in groups of eight.

    tables: twice the 16 sums of four signs, for each group. moved[g] ≥ 0: after group g the int32
    totals are added to int64 ones, shifted left so far.
    """
    words = np.empty(GROUP * ROW, np.uint32)
    total = np.empty(TILE, np.int32)
    wide = np.empty(TILE, np.int64)
    moves = np.empty(TILE, np.float32)
    groups = moved.shape[0]
    widened = (moved >= 0).any()
    share = (TILE // STEP + groups) // (groups + 1) * STEP
    for tile in range(first, last):
        total[:] = 0
        if widened:
            wide[:] = 0
        for group in range(groups):
            for early in range(group * share, (group + 1) * share, STEP):
                prefetch_two(base, tile * TILE + early)
            for s in range(GROUP):
                k0, k1 = keys[GROUP * group + s, 0], keys[GROUP * group + s, 1]
                tile_words(words, ROW * s, tile, tid, k0, k1, False)
            _add_group(total, words, tables, 32 * group)
            if moved[group] >= 0:
                for e in range(TILE):
                    wide[e] += np.int64(total[e]) << moved[group]
                total[:] = 0
        if widened:
            for e in range(TILE):
                moves[e] = np.float32(wide[e]) * factor
        else:
            for e in range(0, TILE, 16):
                store(moves, e, scale(load(total, e), factor))
        _add_moves(base, out, tile, moves)


@njit
def project_independent(gradient: Any, key: Any, tid: Any) -> Any:
    """Return Σ_i D_s[i]·gradient[i] in float64 for one seed."""
    words = np.empty(ROW, np.uint32)
    spare = np.zeros(TILE, gradient.dtype)
    sums = np.zeros(ROW, np.float64)
    top = splat(_TOP)
    for tile in range((gradient.shape[0] + TILE - 1) // TILE):
        tile_words(words, 0, tile, tid, key[0], key[1], False)
        part = gradient[tile * TILE : (tile + 1) * TILE]
        if part.shape[0] < TILE:
            spare[: part.shape[0]] = part
            part = spare
        for row in range(TILE // ROW):
            lift = splat(uint32(31 - row))
            for m in range(0, ROW, 16):
                sign = (load(words, m) << lift) & top
                accumulate(sums, m, load(part, row * ROW + m) ^ sign, 1.0)
    return sums.sum()
