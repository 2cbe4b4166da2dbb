"""Inputs that are nearly right: seeded changes of valid ones, in bytes and in text."""

import random
import re
from collections.abc import Iterator, Sequence
from typing import Final

NUMBERS: Final = (
    *(b"0", b"-1", b"1", b"4294967296", b"-9223372036854775808", b"18446744073709551616"),
    *(b"1e999", b"-1e999", b"1e-999", b"NaN", b"Infinity", b"0.5", b"9" * 400, b"9" * 5000),
)
TOKENS: Final = (
    *NUMBERS,
    *(b"null", b"true", b"[]", b"{}", b'""', b'"x"', b'"\\ud800"', b'"\\u0000"', b"[[]]"),
    *(b"[" * 3000, b'{"a":' * 3000, b"nan", b"inf", b"0x1", b"1_0", b'"' + b"y" * 3000 + b'"'),
)
TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9.]+|true|false|null|[\[\]{}:,=]')
INTERESTING: Final = (0, 1, 0x7F, 0x80, 0xFF)


def changed(seed: bytes, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return one change of a valid input, or several."""
    data = seed
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = _once(data, seeds, rng)
    return data


def _once(data: bytes, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    if not data:
        return rng.randbytes(rng.randrange(40))
    at = rng.randrange(len(data))
    end = min(len(data), at + rng.choice((1, 2, 8, 40)))
    match rng.randrange(9):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + bytes([rng.choice(INTERESTING)]) + data[at + 1 :]
        case 2:
            return data[:at] + data[end:]
        case 3:
            return data[:end] + data[at:]
        case 4:
            return data[:at] + rng.randbytes(rng.choice((1, 4, 9))) + data[at:]
        case 5:
            return data[:at]
        case 6:
            other = rng.choice(seeds)
            return data[:at] + other[rng.randrange(len(other) + 1) :]
        case _:
            return _token(data, at, rng)


def _token(data: bytes, at: int, rng: random.Random) -> bytes:
    """Exchange a whole token of JSON or TOML, so that the text still has its form."""
    found = TOKEN.search(data, at)
    if found is None:
        return data[:at] + rng.choice(NUMBERS) + data[at:]
    return data[: found.start()] + rng.choice(TOKENS) + data[found.end() :]


def inputs(seeds: Sequence[bytes], count: int, rng: random.Random) -> Iterator[bytes]:
    """Yield so many inputs: the valid ones first, then changes of them, and some mere noise."""
    yield from seeds[:count]
    for _ in range(count - len(seeds)):
        if rng.random() < 0.02:
            yield rng.randbytes(rng.randrange(200))
        else:
            yield changed(rng.choice(seeds), seeds, rng)
