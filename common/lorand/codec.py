"""Scalars to bytes and back, up (contributions) and down (ΔA), by integer codes.

A codec maps values to codes: `int8` in −127…127, `log8` in −127…127 with the logarithm of the
magnitude (Just One Byte, Zelikman et al., 2023, in a true byte), `sign` one bit packed eight to a
byte, `int32`. A code stands for a level times the scale: code itself, or ±2^((|code| − 127)/8) in
`log8`. Not-a-number and infinity have no code. What the ledger commits is computed from the codes,
so the sender applies what it sent, not what it measured.
"""

import os
from math import isqrt
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from lorand.coefficients import MAGNITUDE_LIMIT, MOVE_LIMIT, Coefficients, total_magnitude
from lorand.errors import ContributionError

Codec = Literal["int8", "log8", "sign", "int32"]
DeltaCodec = Literal["int8", "sign", "int32"]
"""Of ΔA, whose levels are multiples of an integer."""
Rounding = Literal["nearest", "unbiased"]
Codes = NDArray[np.int64]
Floats = NDArray[np.float64]

LARGEST: Final[dict[Codec, int]] = {"int8": 127, "log8": 127, "sign": 1, "int32": 2**31 - 1}
TARGET_RMS: Final = 32.0
"""Where the coordinator holds the root mean square of int8 codes: ±4 standard deviations fit."""
LOG8_TARGET_RMS: Final = 2.0**-4
"""The same for log8's levels, of which the largest is 1: they reach 11 octaves further down."""
INT32_SCALE_EXPONENT: Final = -20
SCALE_EXPONENTS: Final = range(-60, 61)
_STORED: Final = {"int8": "<i1", "log8": "<i1", "int32": "<i4"}


def _log8_levels() -> Floats:
    """What |code| stands for: 0, then eight levels an octave up to 1; exact on every machine.

    Eighth roots are taken of integers: a power function may differ in its last bit elsewhere.
    """
    octave = [isqrt(isqrt(isqrt(2 ** (j + 8 * 40)))) * 2.0**-40 for j in range(8)]
    levels = [octave[(code - 127) % 8] * 2.0 ** ((code - 127) // 8) for code in range(1, 128)]
    return np.array([0.0, *levels])


LOG8_LEVELS: Final = _log8_levels()


def num_bytes(codec: Codec, count: int) -> int:
    """Return the packed size of `count` codes."""
    each = {"int8": count, "log8": count, "sign": (count + 7) // 8, "int32": 4 * count}
    return each[codec]


def pack(codec: Codec, codes: Codes) -> bytes:
    """Return the codes as bytes; int32 little-endian, sign one bit each (1 = negative)."""
    if codec == "sign":
        return np.packbits(codes < 0, bitorder="little").tobytes()
    return codes.astype(_STORED[codec]).tobytes()


def unpack(codec: Codec, data: bytes, count: int) -> Codes:
    """Return `count` codes. Raises ContributionError for a wrong length or an unused code."""
    if len(data) != num_bytes(codec, count):
        raise ContributionError(
            f"{count} {codec} codes take {num_bytes(codec, count)} bytes, not {len(data)}"
        )
    if codec == "sign":
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        if bits[count:].any():
            raise ContributionError("the unused bits of the last byte must be zero")
        return 1 - 2 * bits[:count].astype(np.int64)
    codes = np.frombuffer(data, _STORED[codec]).astype(np.int64)
    if codes.size and int(codes.min()) < -LARGEST[codec]:
        raise ContributionError(f"{int(codes.min())} is not an {codec} code")
    return codes


def encode(
    codec: Codec, values: Floats, scale_exponent: int, uniform: Floats | None = None
) -> Codes:
    """Return codes of finite values in units of 2^scale_exponent, clipped to the range.

    The nearest level; or, with `uniform` numbers in [0, 1) of the shape of values, one of the two
    levels around a value at random so that its mean is the value. `sign` keeps only the sign (zero
    counts as positive). Raises ContributionError for a non-finite value: a worker skips such a
    round.
    """
    if not np.isfinite(values).all():
        raise ContributionError("a scalar is not finite and has no code")
    if codec == "sign":
        return np.where(values < 0, -1, 1).astype(np.int64)
    largest = 1 if codec == "log8" else LARGEST[codec]
    limit = largest * 2.0**scale_exponent  # exact; clipped first, so nothing overflows
    units = np.clip(values, -limit, limit) * 2.0**-scale_exponent
    if codec == "log8":
        return _log8_codes(units, uniform)
    if uniform is None:
        return np.rint(units).astype(np.int64)
    below = np.floor(units)
    return (below + (units - below > uniform)).astype(np.int64)


def _log8_codes(units: Floats, uniform: Floats | None) -> Codes:
    magnitude = np.minimum(np.abs(units), LOG8_LEVELS[-1])
    below = np.minimum(np.searchsorted(LOG8_LEVELS, magnitude, side="right") - 1, 126)
    low, high = LOG8_LEVELS[below], LOG8_LEVELS[below + 1]
    threshold = 0.5 if uniform is None else uniform
    codes: Codes = below + ((magnitude - low) / (high - low) > threshold)
    return np.where(units < 0, -codes, codes).astype(np.int64)


def system_uniform(count: int) -> Floats:
    """Return numbers in [0, 1), shape (count,), from the operating system's randomness."""
    words = np.frombuffer(os.urandom(8 * count), np.uint64)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def decode(codec: Codec, codes: Codes, scale_exponent: int) -> Floats:
    """Return the values the codes stand for (float64, exact)."""
    levels = codes.astype(np.float64)
    if codec == "log8":
        levels = np.sign(codes) * LOG8_LEVELS[np.abs(codes)]
    return levels * 2.0 ** (0 if codec == "sign" else scale_exponent)


def next_scale_exponent(codec: Codec, scale_exponent: int, codes: Codes) -> int:
    """Return the public scale of the next round, from this round's committed codes alone.

    int8 moves the codes' root mean square towards TARGET_RMS: up by one and down by up to three
    powers of two a round, by four down while nearly all are zero, by three up while most are
    clipped. log8 does the same with its levels. Other codecs do not adapt.
    """
    if codec == "log8":
        return _next_log8_scale(scale_exponent, codes)
    if codec != "int8" or codes.size == 0:
        return scale_exponent
    rms = float(np.sqrt(np.mean(codes.astype(np.float64) ** 2)))
    if rms < 1:
        step = -4
    elif rms > 100:
        step = 3
    else:
        step = int(np.clip(np.rint(np.log2(rms / TARGET_RMS)), -3, 1))
    return _in_range(scale_exponent + step)


def _next_log8_scale(scale_exponent: int, codes: Codes) -> int:
    rms = float(np.sqrt(np.mean(decode("log8", codes, 0) ** 2))) if codes.size else LOG8_TARGET_RMS
    if rms < LOG8_LEVELS[1]:
        return _in_range(scale_exponent - 8)
    step = int(np.clip(np.rint(np.log2(rms / LOG8_TARGET_RMS)), -3, 1))
    return _in_range(scale_exponent + (3 if rms > 0.75 else step))


def _in_range(scale_exponent: int) -> int:
    return int(np.clip(scale_exponent, SCALE_EXPONENTS[0], SCALE_EXPONENTS[-1]))


def first_scale_exponent(codec: Codec) -> int:
    """Return the scale of a run's first round."""
    return {"int8": -6, "log8": 4, "sign": 0, "int32": INT32_SCALE_EXPONENT}[codec]


def quantise_delta(
    codec: DeltaCodec, wanted: Floats, uniform: Floats | None = None
) -> tuple[int, Codes]:
    """Return (scale, codes) with scale · codes ≈ wanted, all integers, wanted in quanta.

    The ledger's ΔA is exactly scale · codes; the caller keeps wanted − scale · codes as error
    feedback, or gives `uniform` numbers in [0, 1) for codes whose mean is what is wanted (not with
    `sign`). `sign` takes the mean magnitude for its scale (Bernstein et al., signSGD with error
    feedback: Karimireddy et al., ICML 2019), int8 the largest magnitude / 127, int32 is wide
    enough to be exact to half a quantum unless a value exceeds it.
    """
    magnitude = np.abs(wanted)
    largest = float(magnitude.max(initial=0.0))
    if not np.isfinite(largest):
        raise ContributionError("an update is not finite")
    if codec == "sign":
        scale = round(float(magnitude.mean())) if wanted.size else 0
        return scale, np.where(wanted < 0, -1, 1).astype(np.int64)
    limit = LARGEST[codec]
    scale = max(1, int(np.ceil(largest / limit)))
    units = wanted / scale
    rounded = np.rint(units) if uniform is None else np.floor(units + uniform)
    return scale, np.clip(rounded, -limit, limit).astype(np.int64)


def delta(scale: int, codes: Codes) -> Coefficients:
    """Return ΔA = scale · codes in int64. Raises ContributionError when it could overflow."""
    largest = int(np.abs(codes).max(initial=0))
    if not 0 <= scale < MAGNITUDE_LIMIT or scale * largest >= MAGNITUDE_LIMIT:
        raise ContributionError(
            f"an update of scale {scale} times codes up to {largest} is above the limit 2^62; "
            "lower the learning rate or quantum_exponent"
        )
    return codes * np.int64(scale)


def check_move(change: Coefficients, quantum_exponent: int) -> None:
    """Raise ContributionError when local steps of `change` quanta led further than MOVE_LIMIT."""
    moved = total_magnitude(change)
    if moved > MOVE_LIMIT << quantum_exponent:
        raise ContributionError(
            f"local steps moved weights by up to {moved * 2.0**-quantum_exponent:.3g}, the limit "
            f"is {MOVE_LIMIT}; lower local.learning_rate"
        )
