"""What one GPU program computes, in Triton. `gpu` launches these; tensors are its business.

One lane owns four neighbouring columns of a 4,096-tile: a single Philox block gives it four words,
and bit j of each is its sign in row j (DESIGN §2 step 4). So weights, table and sums move as
vectors of four, side by side in a warp, and a sign costs a shift and an exclusive or.

A **chunk** is 4,096 consecutive buckets of the table, a **span** max(K, 4,096) elements: one block
of step 5, or the several blocks of one tile. Within a span, each tile meets one chunk, and a
program takes the same chunk in all its spans: it reads 16 KB of table, whatever K is.

Arguments common to all: `seed` the key as k1·2^32 + k0, `tiles` whole tiles, `rest` elements after
them. Shapes: [L] lanes, [L, R] rows a lane, [L, R, 4] its columns. Element offsets are 64 bits.
"""

import triton
import triton.language as tl

TILE = tl.constexpr(4096)
SCALARS = ("tid", "seed", "tiles", "spans", "splits", "count")
"""Arguments that must not cost a compilation for each kind of value."""


@triton.jit
def _sign_words(tile, quad, tid, seed):
    """Words 4·quad … 4·quad + 3 of a tile, shape of the arguments and [4]; uint32."""
    w0, w1, w2, w3 = tl.philox(seed, tile * 32 + quad, 0, tid, 0)
    return _interleave(w0, w1, w2, w3)


@triton.jit
def _interleave(x0, x1, x2, x3):
    pairs = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.reshape(pairs, x0.shape + [4])  # noqa: RUF005


@triton.jit
def _shifts(block, tid, seed, SIZE: tl.constexpr):
    """r_b of step 5: word b mod 4 of counter b div 4, masked with K − 1."""
    w0, w1, w2, w3 = tl.philox(seed, block >> 2, 1, tid, 0)
    odd = (block & 1) != 0
    word = tl.where((block & 2) != 0, tl.where(odd, w3, w2), tl.where(odd, w1, w0))
    return (word & (SIZE - 1)).to(tl.int32)


@triton.jit
def _exchanged(x, by):
    """x[…, c xor by] for c in 0..3: the part of r_b that moves elements within a vector."""
    even, odd = tl.split(tl.reshape(x, x.shape[:-1] + [2, 2]))  # noqa: RUF005
    one = tl.expand_dims((by & 1) != 0, -1)
    even, odd = tl.where(one, odd, even), tl.where(one, even, odd)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    two = (by & 2) != 0
    low, high = tl.where(two, x2, x0), tl.where(two, x3, x1)
    return _interleave(low, high, tl.where(two, x0, x2), tl.where(two, x1, x3))


@triton.jit
def _signed(x, words, row):
    """D·x of step 4: bit `row` of the word lands in the sign of the float32."""
    flip = (words << (31 - row)[:, :, None]) & 0x80000000
    return (x.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)


@triton.jit
def _length(tile, tiles, rest):
    """How many elements a tile has: all, the rest, or none."""
    return tl.where(tile < tiles, TILE, tl.where(tile == tiles, rest, 0))


@triton.jit(do_not_specialize=SCALARS)
def materialise(
    base, out, table, tid, seed, tiles, rest,
    SIZE: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Step 7 for one tensor; a program takes one chunk in LANES/32 spans."""
    _pass(base, out, table, tid, seed, tiles, rest, tl.program_id(0), SIZE, LANES, ROWS)


@triton.jit(do_not_specialize=SCALARS)
def materialise_many(
    owners, rows, seed,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    SIZE: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The same for many tensors: owners[program] is the tensor's row in rows, int64.

    A row: the addresses of base, out and table, tid, tiles, rest, the tensor's first program.
    ALIGNED promises addresses and lengths in multiples of 16.
    """
    program = tl.program_id(0)
    row = rows + tl.load(owners + program) * 7
    base = tl.load(row).to(tl.pointer_type(DTYPE))
    out = tl.load(row + 1).to(tl.pointer_type(DTYPE))
    table = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), 16)
    rest = tl.load(row + 5).to(tl.int32)
    if ALIGNED:
        base, out = tl.multiple_of(base, 16), tl.multiple_of(out, 16)
        rest = tl.multiple_of(rest, 16)
    tid, tiles = tl.load(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32)
    program -= tl.load(row + 6).to(tl.int32)
    _pass(base, out, table, tid, seed, tiles, rest, program, SIZE, LANES, ROWS)


@triton.jit
def _pass(
    base, out, table, tid, seed, tiles, rest, program,
    SIZE: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One warp a tile, ROWS rows in flight; programs number chunks first, then spans."""
    CHUNKS: tl.constexpr = max(SIZE // TILE, 1)
    chunk = program % CHUNKS
    lane = tl.arange(0, LANES)
    quad = lane % 32
    four = tl.arange(0, 4)[None, None, :]
    span = program // CHUNKS * (LANES // 32) + lane // 32
    tile = span
    if SIZE >= TILE:
        shift = _shifts(span, tid, seed, SIZE)
        tile = span * CHUNKS + (chunk ^ shift // TILE)
        shift = (shift % TILE)[:, None]
    words = _sign_words(tile, quad, tid, seed)[:, None, :]
    length = _length(tile, tiles, rest)[:, None, None]
    start = tile.to(tl.int64)[:, None, None] * TILE
    for step in tl.range(0, 32, ROWS):
        row = step + tl.arange(0, ROWS)[None, :]
        place = row * 128 + quad[:, None] * 4
        slot = place
        if SIZE < TILE:
            shift = _shifts((span[:, None] * TILE + place) // SIZE, tid, seed, SIZE)
            slot = place % SIZE
        slot = chunk * TILE + (slot ^ shift) // 4 * 4
        move = tl.load(table + (slot[:, :, None] + four))
        move = _signed(_exchanged(move, shift % 4), words, row)
        element = place[:, :, None] + four
        weights = tl.load(base + start + element, mask=element < length)
        weights = (weights.to(tl.float32) + move).to(base.dtype.element_ty)
        tl.store(out + start + element, weights, mask=element < length)


@triton.jit(do_not_specialize=SCALARS)
def project(
    gradient, sums, tid, seed, tiles, rest, spans, splits,
    SIZE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Bucket sums of one chunk over every splits-th span; writes sums[program, 4096], float64.

    A bucket stays in its lane's registers; r_b says which elements to fetch for it.
    """
    CHUNKS: tl.constexpr = max(SIZE // TILE, 1)
    ROWS: tl.constexpr = 1024 // LANES
    chunk = tl.program_id(0) % CHUNKS
    lane = tl.arange(0, LANES)
    four = tl.arange(0, 4)[None, None, :]
    slot = (lane // 32 * ROWS)[:, None] * 128 + tl.arange(0, ROWS)[None, :] * 128
    slot += (lane % 32)[:, None] * 4
    total = tl.zeros([LANES, ROWS, 4], tl.float64)
    for span in tl.range(tl.program_id(0) // CHUNKS, spans, splits):
        tile = tl.cast(span, tl.int32)
        if SIZE >= TILE:
            shift = _shifts(span, tid, seed, SIZE)
            tile = span * CHUNKS + (chunk ^ shift // TILE)
            shift = shift % TILE
            words = _sign_words(tile, (lane % 32) ^ shift // 4 % 32, tid, seed)[:, None, :]
        else:
            shift = _shifts((span * TILE + slot) // SIZE, tid, seed, SIZE)
            words = _sign_words(tile, (slot ^ shift) // 4 % 32, tid, seed)
        place = (slot ^ shift) // 4 * 4
        element = place[:, :, None] + four
        inside = element < _length(tile, tiles, rest)
        part = tl.load(gradient + tile.to(tl.int64) * TILE + element, mask=inside, other=0)
        part = _signed(part.to(tl.float32), words, place // 128)
        total += _exchanged(part, shift % 4 + tl.zeros_like(slot)).to(tl.float64)
    first = tl.program_id(0).to(tl.int64) * TILE
    tl.store(sums + first + slot[:, :, None] + four, total)


@triton.jit(do_not_specialize=SCALARS)
def materialise_independent(
    base, out, seeds, amounts, count, factor, tid, tiles,
    rest, LANES: tl.constexpr,
):  # fmt: skip
    """Step 8 for one tile: int64 sums over `count` directions, rounded once."""
    ROWS: tl.constexpr = 1024 // LANES
    tile = tl.program_id(0)
    lane = tl.arange(0, LANES)
    row = (lane // 32 * ROWS)[:, None] + tl.arange(0, ROWS)[None, :]
    total = tl.zeros([LANES, ROWS, 4], tl.int64)
    for s in tl.range(0, count):
        words = _sign_words(tile, lane % 32, tid, tl.load(seeds + s))[:, None, :]
        amount = tl.load(amounts + s)
        total += tl.where((words >> row[:, :, None]) % 2 != 0, -amount, amount)
    element = (row * 128 + (lane % 32)[:, None] * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    inside = element < _length(tile, tiles, rest)
    start = tile.to(tl.int64) * TILE
    weights = tl.load(base + start + element, mask=inside).to(tl.float32)
    weights += total.to(tl.float32) * factor
    tl.store(out + start + element, weights.to(base.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SCALARS)
def project_independent(
    gradient, sums, seeds, count, tid, tiles, rest, splits,
    LANES: tl.constexpr,
):  # fmt: skip
    """D_s·gradient for one direction over every splits-th tile; writes sums[program], float64.

    Programs that differ in their direction run side by side, so all but one read from the cache.
    """
    ROWS: tl.constexpr = 1024 // LANES
    lane = tl.arange(0, LANES)
    seed = tl.load(seeds + tl.program_id(0) % count)
    row = (lane // 32 * ROWS)[:, None] + tl.arange(0, ROWS)[None, :]
    element = (row * 128 + (lane % 32)[:, None] * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    total = tl.zeros([LANES, ROWS, 4], tl.float64)
    last = tl.where(rest > 0, tiles, tiles - 1)
    for number in tl.range(tl.program_id(0) // count, last + 1, splits):
        tile = tl.cast(number, tl.int32)
        words = _sign_words(tile, lane % 32, tid, seed)[:, None, :]
        inside = element < _length(tile, tiles, rest)
        part = tl.load(gradient + tile.to(tl.int64) * TILE + element, mask=inside, other=0)
        total += _signed(part.to(tl.float32), words, row).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(tl.sum(total, 2), 1), 0))
