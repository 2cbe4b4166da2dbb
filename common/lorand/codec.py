"""Scalars to bytes and back, up (contributions) and down (ΔA), by integer codes.

A codec maps values to codes: `int8` in −127…127, `sign` one bit packed eight to a byte, `int32`.
What a code stands for is code · scale. Not-a-number and infinity have no code. What the ledger
commits is computed from the codes, so the sender applies what it sent, not what it measured.
"""

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from lorand.coefficients import MAGNITUDE_LIMIT, Coefficients
from lorand.errors import ContributionError

Codec = Literal["int8", "sign", "int32"]
Codes = NDArray[np.int64]
Floats = NDArray[np.float64]

LARGEST: Final[dict[Codec, int]] = {"int8": 127, "sign": 1, "int32": 2**31 - 1}
TARGET_RMS: Final = 32.0
"""Where the coordinator holds the root mean square of int8 codes: ±4 standard deviations fit."""
INT32_SCALE_EXPONENT: Final = -20
SCALE_EXPONENTS: Final = range(-60, 61)


def num_bytes(codec: Codec, count: int) -> int:
    """Return the packed size of `count` codes."""
    return {"int8": count, "sign": (count + 7) // 8, "int32": 4 * count}[codec]


def pack(codec: Codec, codes: Codes) -> bytes:
    """Return the codes as bytes; int32 little-endian, sign one bit each (1 = negative)."""
    if codec == "sign":
        return np.packbits(codes < 0, bitorder="little").tobytes()
    return codes.astype("<i1" if codec == "int8" else "<i4").tobytes()


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
    codes = np.frombuffer(data, "<i1" if codec == "int8" else "<i4").astype(np.int64)
    if codes.size and int(codes.min()) < -LARGEST[codec]:
        raise ContributionError(f"{int(codes.min())} is not an {codec} code")
    return codes


def encode(codec: Codec, values: Floats, scale_exponent: int) -> Codes:
    """Return codes of finite values: nearest value / 2^scale_exponent, clipped to the range.

    `sign` keeps only the sign (zero counts as positive). Raises ContributionError for a
    non-finite value: a worker skips such a round.
    """
    if not np.isfinite(values).all():
        raise ContributionError("a scalar is not finite and has no code")
    if codec == "sign":
        return np.where(values < 0, -1, 1).astype(np.int64)
    limit = LARGEST[codec] * 2.0**scale_exponent  # exact; clipped first, so nothing overflows
    return np.rint(np.clip(values, -limit, limit) * 2.0**-scale_exponent).astype(np.int64)


def decode(codec: Codec, codes: Codes, scale_exponent: int) -> Floats:
    """Return the values the codes stand for (float64, exact)."""
    return codes.astype(np.float64) * 2.0 ** (0 if codec == "sign" else scale_exponent)


def next_scale_exponent(codec: Codec, scale_exponent: int, codes: Codes) -> int:
    """Return the public scale of the next round, from this round's committed codes alone.

    int8 moves the codes' root mean square towards TARGET_RMS: up by one and down by up to three
    powers of two a round, by four down while nearly all are zero, by three up while most are
    clipped. Other codecs do not adapt.
    """
    if codec != "int8" or codes.size == 0:
        return scale_exponent
    rms = float(np.sqrt(np.mean(codes.astype(np.float64) ** 2)))
    if rms < 1:
        step = -4
    elif rms > 100:
        step = 3
    else:
        step = int(np.clip(np.rint(np.log2(rms / TARGET_RMS)), -3, 1))
    return int(np.clip(scale_exponent + step, SCALE_EXPONENTS[0], SCALE_EXPONENTS[-1]))


def first_scale_exponent(codec: Codec) -> int:
    """Return the scale of a run's first round."""
    return {"int8": -6, "sign": 0, "int32": INT32_SCALE_EXPONENT}[codec]


def quantise_delta(codec: Codec, wanted: Floats) -> tuple[int, Codes]:
    """Return (scale, codes) with scale · codes ≈ wanted, all integers, wanted in quanta.

    The ledger's ΔA is exactly scale · codes; the caller keeps wanted − scale · codes as error
    feedback. `sign` takes the mean magnitude for its scale (Bernstein et al., signSGD with error
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
    return scale, np.clip(np.rint(wanted / scale), -limit, limit).astype(np.int64)


def delta(scale: int, codes: Codes) -> Coefficients:
    """Return ΔA = scale · codes in int64. Raises ContributionError when it could overflow."""
    largest = int(np.abs(codes).max(initial=0))
    if not 0 <= scale < MAGNITUDE_LIMIT or scale * largest >= MAGNITUDE_LIMIT:
        raise ContributionError(
            f"an update of scale {scale} times codes up to {largest} is above the limit 2^62; "
            "lower the learning rate or quantum_exponent"
        )
    return codes * np.int64(scale)
