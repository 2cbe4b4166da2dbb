"""Scalars to bytes and back: what is sent is what everyone applies (DESIGN §3)."""

from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorand.codec import (
    LARGEST,
    LOG8_LEVELS,
    LOG8_TARGET_RMS,
    SCALE_EXPONENTS,
    TARGET_RMS,
    Codec,
    Codes,
    DeltaCodec,
    Floats,
    check_move,
    decode,
    delta,
    encode,
    first_scale_exponent,
    next_scale_exponent,
    num_bytes,
    pack,
    quantise_delta,
    system_uniform,
    unpack,
)
from lorand.errors import ContributionError

CODECS: Final[list[Codec]] = ["int8", "log8", "sign", "int32"]
DOWN: Final[list[DeltaCodec]] = ["int8", "sign", "int32"]
NUMERIC: Final[list[Codec]] = ["int8", "int32"]
FINITE: Final = st.floats(allow_nan=False, allow_infinity=False)


def codes_of(codec: Codec, seed: int, count: int) -> Codes:
    """Any codes of a codec, both extremes among them."""
    rng, limit = np.random.default_rng(seed), LARGEST[codec]
    if codec == "sign":
        return 2 * rng.integers(0, 2, count, dtype=np.int64) - 1
    codes = rng.integers(-limit, limit, count, dtype=np.int64, endpoint=True)
    codes[:2] = [limit, -limit][:count]
    return codes


# ------------------------------------------------------------- bytes


@settings(deadline=None)
@given(st.sampled_from(CODECS), st.integers(0, 2**32), st.integers(0, 70))
def test_packing_is_undone(codec: Codec, seed: int, count: int) -> None:
    """Every count, not only multiples of eight."""
    codes = codes_of(codec, seed, count)
    data = pack(codec, codes)
    assert len(data) == num_bytes(codec, count)
    back = unpack(codec, data, count)
    assert back.dtype == np.int64
    assert back.tolist() == codes.tolist()


def test_bytes_are_little_endian_and_least_significant_bit_first() -> None:
    assert pack("int8", np.array([1, -1, 127, -127])) == b"\x01\xff\x7f\x81"
    assert pack("int32", np.array([1, -2])) == b"\x01\0\0\0\xfe\xff\xff\xff"
    assert pack("sign", np.array([-1, 1, 1, 1, 1, 1, 1, 1, -1])) == b"\x01\x01"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("wrong", [-1, 1])
def test_wrong_lengths_are_refused(codec: Codec, wrong: int) -> None:
    """A contribution has exactly the bytes of its round."""
    data = bytes(num_bytes(codec, 9) + wrong)
    with pytest.raises(ContributionError, match=f"9 {codec} codes take"):
        unpack(codec, data, 9)


@pytest.mark.parametrize(
    ("codec", "unused"), [("int8", b"\x80"), ("log8", b"\x80"), ("int32", b"\0\0\0\x80")]
)
def test_the_code_without_a_negative_is_refused(codec: Codec, unused: bytes) -> None:
    """−128 and −2^31 are no codes: the range is symmetric."""
    with pytest.raises(ContributionError, match=f"is not an {codec} code"):
        unpack(codec, bytes(len(unused)) + unused, 2)


@settings(deadline=None)
@given(st.sampled_from(CODECS), st.binary(max_size=40), st.integers(0, 40))
def test_any_bytes_are_codes_in_range_or_refused(codec: Codec, data: bytes, count: int) -> None:
    try:
        codes = unpack(codec, data, count)
    except ContributionError:
        return
    assert np.abs(codes).max(initial=0) <= LARGEST[codec]
    assert len(codes) == count


# ------------------------------------------------------------- scalars


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_has_no_code(codec: Codec, bad: float) -> None:
    with pytest.raises(ContributionError, match="not finite"):
        encode(codec, np.array([1.0, bad]), 0)


@settings(deadline=None)
@given(
    st.sampled_from(NUMERIC),
    st.integers(SCALE_EXPONENTS[0], SCALE_EXPONENTS[-1]),
    st.lists(st.floats(-1, 1), min_size=1, max_size=20),
)
def test_decoding_is_within_half_a_step(codec: Codec, scale: int, shares: list[float]) -> None:
    """For values in range, and every code stands for itself."""
    step = 2.0**scale
    values = np.array(shares) * LARGEST[codec] * step
    codes = encode(codec, values, scale)
    decoded = decode(codec, codes, scale)
    assert np.abs(decoded - values).max() <= step / 2
    assert encode(codec, decoded, scale).tolist() == codes.tolist()


@settings(deadline=None)
@given(st.sampled_from(CODECS), st.lists(FINITE, max_size=20), st.sampled_from([-60, 0, 60]))
def test_any_finite_value_has_a_code(codec: Codec, values: list[float], scale: int) -> None:
    """However large: it is clipped, and keeps its sign."""
    wanted = np.array(values, np.float64)
    codes = encode(codec, wanted, scale)
    assert np.abs(codes).max(initial=0) <= LARGEST[codec]
    assert (codes * np.sign(wanted) >= 0).all()
    assert unpack(codec, pack(codec, codes), len(codes)).tolist() == codes.tolist()


def test_log8_levels_are_eighths_of_octaves() -> None:
    """Each but the eighth below it exactly half; the largest is 1; 0 has a code of its own."""
    assert LOG8_LEVELS[0] == 0
    assert LOG8_LEVELS[127] == 1
    assert (LOG8_LEVELS[9:] == 2 * LOG8_LEVELS[1:-8]).all()
    np.testing.assert_allclose(LOG8_LEVELS[1:], 2.0 ** ((np.arange(1, 128) - 127) / 8), rtol=1e-11)


@settings(deadline=None)
@given(st.integers(-40, 40), st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_log8_keeps_magnitudes_to_four_and_a_half_percent(scale: int, shares: list[float]) -> None:
    """Over sixteen octaves; below the smallest level the error is at most half of it."""
    values = np.array(shares) * 2.0**scale
    codes = encode("log8", values, scale)
    decoded = decode("log8", codes, scale)
    room = np.maximum(0.0434 * np.abs(values), LOG8_LEVELS[1] / 2 * 2.0**scale)
    assert (np.abs(decoded - values) <= room).all()
    assert encode("log8", decoded, scale).tolist() == codes.tolist()


@pytest.mark.parametrize("codec", ["int8", "log8", "int32"])
def test_unbiased_rounding_is_right_on_average(codec: Codec) -> None:
    """Between two levels the mean is the value; on a level there is no chance."""
    values = np.linspace(-0.9, 0.9, 37) * LARGEST["int8" if codec != "log8" else "sign"]
    rng, rounds = np.random.default_rng(0), 4000
    drawn = [decode(codec, encode(codec, values, 0, rng.random(37)), 0) for _ in range(rounds)]
    spread = np.std(drawn, axis=0) / np.sqrt(rounds)
    assert (np.abs(np.mean(drawn, axis=0) - values) <= 4.5 * spread + 1e-12).all()
    for uniform in (np.zeros(37), np.full(37, 1 - 2.0**-53)):
        exact = decode(codec, encode(codec, values, 0), 0)
        assert decode(codec, encode(codec, exact, 0, uniform), 0).tolist() == exact.tolist()


def test_the_systems_uniform_numbers() -> None:
    numbers = system_uniform(4096)
    assert numbers.shape == (4096,)
    assert 0 <= numbers.min() < 0.01 < 0.99 < numbers.max() < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.03
    assert system_uniform(8).tolist() != system_uniform(8).tolist()


def test_sign_keeps_only_the_sign() -> None:
    """Zero, of either sign, counts as positive; the scale plays no part."""
    values = np.array([3.0, -1e-300, 0.0, -0.0, -7.0])
    codes = encode("sign", values, 13)
    assert codes.tolist() == [1, -1, 1, 1, -1]
    assert decode("sign", codes, 13).tolist() == codes.tolist()


# ------------------------------------------------------------- the public scale


def scales_of_rounds(
    deviation: float, first: int, rounds: int = 40, codec: Codec = "int8"
) -> list[int]:
    """The scale exponents of rounds whose scalars are normal with this deviation."""
    rng, scales = np.random.default_rng(0), [first]
    for _ in range(rounds):
        codes = encode(codec, rng.normal(0, deviation, 256), scales[-1])
        scales.append(next_scale_exponent(codec, scales[-1], codes))
    return scales


@pytest.mark.parametrize("first", [SCALE_EXPONENTS[0], -20, 0, 20, SCALE_EXPONENTS[-1]])
@pytest.mark.parametrize("deviation", [2.0**-20, 0.1, 1.0, 700.0])
def test_the_scale_of_log8_finds_its_target_and_stays(deviation: float, first: int) -> None:
    settled = scales_of_rounds(deviation, first, 60, "log8")[40:]
    levels = [deviation / 2.0**scale for scale in settled]
    assert all(LOG8_TARGET_RMS / 2 <= rms <= LOG8_TARGET_RMS * 2 for rms in levels)
    assert max(settled) - min(settled) <= 1


@pytest.mark.parametrize("first", [SCALE_EXPONENTS[0], -20, 0, 20, SCALE_EXPONENTS[-1]])
@pytest.mark.parametrize("deviation", [2.0**-20, 0.1, 1.0, 700.0])
def test_the_scale_finds_the_target_and_stays(deviation: float, first: int) -> None:
    """From either end of the range the codes reach TARGET_RMS, within a factor of two."""
    scales = scales_of_rounds(deviation, first)
    distance = abs(float(np.log2(deviation / TARGET_RMS)) - first)
    needed = int(distance / 3) + 4
    settled = scales[needed:]
    codes = [deviation / 2.0**scale for scale in settled]
    assert all(TARGET_RMS / 2 <= rms <= TARGET_RMS * 2 for rms in codes)
    assert max(settled) - min(settled) <= 1


@pytest.mark.parametrize("first", [-30, 20])
def test_a_far_scale_is_corrected_within_twenty_rounds(first: int) -> None:
    scales = scales_of_rounds(1.0, first)
    assert set(scales[10:]) <= {-6, -5, -4}
    assert scales_of_rounds(1.0, SCALE_EXPONENTS[0])[21] in (-6, -5, -4)


def test_the_scale_stays_in_its_range() -> None:
    low, high = SCALE_EXPONENTS[0], SCALE_EXPONENTS[-1]
    assert next_scale_exponent("int8", low, np.zeros(8, np.int64)) == low
    assert next_scale_exponent("int8", high, np.full(8, 127)) == high


def test_signs_and_wide_codes_do_not_adapt() -> None:
    for codec in ("sign", "int32"):
        first = first_scale_exponent(codec)
        assert next_scale_exponent(codec, first, np.ones(8, np.int64)) == first
    assert next_scale_exponent("int8", -6, np.zeros(0, np.int64)) == -6


# ------------------------------------------------------------- ΔA down, with error feedback


@settings(deadline=None)
@given(st.sampled_from(DOWN), st.integers(0, 2**32), st.integers(1, 100), st.integers(0, 36))
def test_delta_is_what_was_wanted_but_for_the_feedback(
    codec: DeltaCodec, seed: int, count: int, log2_magnitude: int
) -> None:
    """ΔA = scale · codes in integers; off by half a step (int8, int32), the caller's to keep."""
    rng = np.random.default_rng(seed)
    wanted = rng.normal(0, 2.0**log2_magnitude, count)
    scale, codes = quantise_delta(codec, wanted)
    change = delta(scale, codes)
    assert change.dtype == np.int64
    assert change.tolist() == [scale * code for code in codes.tolist()]
    assert unpack(codec, pack(codec, codes), count).tolist() == codes.tolist()
    feedback = wanted - change
    if codec == "sign":
        assert scale == round(float(np.abs(wanted).mean()))
        assert ((codes < 0) == (wanted < 0)).all()
    else:
        assert np.abs(feedback).max() <= scale / 2
    np.testing.assert_allclose(change + feedback, wanted, rtol=1e-12)


def test_int32_loses_less_than_a_quantum() -> None:
    wanted = np.array([2.0**31 - 1, -1234567.4, 0.4])
    scale, codes = quantise_delta("int32", wanted)
    assert (scale, codes.tolist()) == (1, [2**31 - 1, -1234567, 0])


@pytest.mark.parametrize("codec", DOWN)
def test_an_update_of_nothing_moves_nothing(codec: DeltaCodec) -> None:
    for wanted in (np.zeros(5), np.zeros(0), np.full(5, -0.3)):
        assert not delta(*quantise_delta(codec, wanted)).any()


@pytest.mark.parametrize("codec", DOWN)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_refused(codec: DeltaCodec, bad: float) -> None:
    with pytest.raises(ContributionError, match="not finite"):
        quantise_delta(codec, np.array([1.0, bad]))


@pytest.mark.parametrize(
    ("scale", "code"),
    [(2**62, 0), (-1, 1), (2**33, 2**31 - 1), (2**39, 1 - 2**31)],
)
def test_a_delta_that_could_overflow_is_refused(scale: int, code: int) -> None:
    """An int32 code times a large scale would wrap to another, plausible number."""
    with pytest.raises(ContributionError):
        delta(scale, np.array([1, code], np.int64))


@pytest.mark.parametrize("codec", ["int8", "int32"])
@pytest.mark.parametrize("magnitude", [0.3, 50.0, 1e12])
def test_rounded_at_random_an_update_is_right_on_average(
    codec: DeltaCodec, magnitude: float
) -> None:
    """Each of the two multiples around a value as often as it is near; never beyond the codes."""
    rng = np.random.default_rng(1)
    wanted = np.append(rng.uniform(-1, 1, 7), [1.0, -1.0, 0.0]) * magnitude
    total, rounds = np.zeros(10), 4000
    for _ in range(rounds):
        scale, codes = quantise_delta(codec, wanted, rng.random(10))
        change = delta(scale, codes)
        total += change
        assert np.abs(change - wanted).max() < scale
    spread = scale / 2 / np.sqrt(rounds)
    assert np.abs(total / rounds - wanted).max() < 4 * spread
    assert change[9] == 0


def test_rounding_at_random_takes_the_chance_it_is_given() -> None:
    wanted = np.array([127.0, 0.25, -0.25, -127.0])
    for uniform, expected in [(0.0, [127, 0, -1, -127]), (0.75, [127, 1, 0, -127])]:
        scale, codes = quantise_delta("int8", wanted, np.full(4, uniform))
        assert (scale, codes.tolist()) == (1, expected)
    scale, codes = quantise_delta("int8", np.array([127.0, -127.0]), np.full(2, 0.999))
    assert codes.tolist() == [127, -127]


@pytest.mark.parametrize("exponent", [8, 32, 48])
def test_a_move_is_bounded_over_all_directions(exponent: int) -> None:
    """All may meet at one weight."""
    quarter = 256 << exponent
    check_move(np.array([quarter, -quarter, quarter, -quarter]), exponent)
    with pytest.raises(ContributionError, match=r"by up to 1\.02e\+03, the limit is 1024; lower"):
        check_move(np.array([quarter, -quarter, quarter, -quarter - 1]), exponent)
    with pytest.raises(ContributionError, match=r"the limit is 1024"):
        check_move(np.full(1 << 10, -(2**61)), exponent)


def feedback_norms(codec: DeltaCodec, updates: list[Floats]) -> tuple[list[float], Floats]:
    """Norms of the error feedback over many rounds, and Σ wanted − Σ ΔA at the end."""
    feedback, missing, norms = np.zeros_like(updates[0]), np.zeros_like(updates[0]), []
    for update in updates:
        wanted = update + feedback
        change = delta(*quantise_delta(codec, wanted))
        feedback = wanted - change
        missing += update - change
        norms.append(float(np.linalg.norm(feedback)))
    return norms, missing - feedback


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 16), st.integers(0, 24), st.booleans())
def test_error_feedback_stays_bounded(
    seed: int, size: int, log2_magnitude: int, sparse: bool
) -> None:
    """Nothing is lost for good: Σ ΔA follows Σ wanted at a bounded distance, for ever.

    Karimireddy et al. (ICML 2019), lemma 3: a δ-compressor leaves ‖e‖ ≤ G/(1 − √(1 − δ)). The sign
    with the mean magnitude has δ ≥ 1/d; rounding its scale adds at most √d/2 quanta a round.
    """
    rng = np.random.default_rng(seed)
    updates = [rng.normal(0, 2.0**log2_magnitude, size) for _ in range(200)]
    if sparse:  # one coordinate a round: the worst case of the sign codec
        updates = [update * (np.arange(size) == n % size) for n, update in enumerate(updates)]
    largest = max(float(np.linalg.norm(update)) for update in updates)
    norms, lost = feedback_norms("sign", updates)
    bound = (largest + np.sqrt(size) / 2) / (1 - np.sqrt(1 - 1 / size))
    assert max(norms) <= bound
    np.testing.assert_allclose(lost, 0, atol=1e-6 * (1 + largest))
    norms, lost = feedback_norms("int8", updates)
    assert max(norms) <= np.sqrt(size) * (1 + largest / 100)
    np.testing.assert_allclose(lost, 0, atol=1e-6 * (1 + largest))


def test_error_feedback_of_the_sign_is_small_for_dense_updates() -> None:
    """K = 4,096 and one bit each: what is owed stays at a few updates and does not grow."""
    rng = np.random.default_rng(1)
    updates = [rng.normal(100, 1000, 4096) for _ in range(300)]
    norms, _ = feedback_norms("sign", updates)
    typical = float(np.linalg.norm(updates[0]))
    assert max(norms) < 4 * typical
    assert np.mean(norms[200:]) < 1.1 * np.mean(norms[100:200])
