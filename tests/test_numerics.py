"""The contract's scalar functions, clause by clause, through the NumPy binding of the C headers."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import uniform_bits

import flash_attn_det as fad
from flash_attn_det import reference_steps
from flash_attn_det.testing import assert_bits_equal

NUMPY = {"f32": np.float32, "f64": np.float64}
COMPUTE = {"f32": reference_steps._FP32, "f64": reference_steps._FP64}
LOG2E = {"f32": np.float32(math.log2(math.e)), "f64": np.float64(float.fromhex("0x1.71547652b82fep+0"))}
LIMIT = {"f32": 2.0**22, "f64": 2.0**51}
SENTINEL = {"f32": -(2.0**126), "f64": -(2.0**1022)}
BITS = {"f32": np.int32, "f64": np.int64}

both = pytest.mark.parametrize("real", ["f32", "f64"])


def noise(count, low, high, real, seed):
    """Numbers in low .. high, of every size from the largest down to 2^-30 of it."""
    bits = uniform_bits((2, count), seed)
    unit = (
        (bits[0] >> np.uint64(11)).astype(np.float64) * 2.0**-53 / 2.0 ** (bits[1] % np.uint64(30)).astype(np.float64)
    )
    sign = bits[1] >> np.uint64(63) == 1
    return np.where(sign, unit * low, unit * high).astype(NUMPY[real])


def anything(count, real, seed):
    """Bit patterns, with NaN and infinity among them."""
    return uniform_bits((count,), seed).astype(f"uint{real[1:]}").view(NUMPY[real])


def same(actual, expected):
    if isinstance(actual, (int, float)):  # the binding's answer to scalars
        actual = expected.dtype.type(actual)
    assert_bits_equal(torch.from_numpy(np.atleast_1d(actual)), torch.from_numpy(np.atleast_1d(expected)))


def torch_of(x):
    return torch.from_numpy(np.ascontiguousarray(x))


# ---- N2, N3, N4: integers --------------------------------------------------------------------------------------------


def spans():
    for n_q in (1, 3, 6):
        for n_k in (0, 1, 4, 9):
            for k_pos in (0, 5):
                for left in (-1, 0, 2):
                    for right in (-1, 0, 3):
                        yield n_q, n_k, k_pos, left, right


def test_n2_rows_are_aligned_to_the_last_key(native):
    assert native.query_position(1, 100, 0, 0) == 99
    assert native.query_position(5, 100, 0, 4) == 99
    assert native.query_position(5, 100, 1000, 4) == 1099
    assert native.query_position(5, 2, 0, 0) == -3  # before every key


def sees(n_q, n_k, k_pos, left, right, i, pos):
    p = k_pos + n_k - n_q + i
    inside = k_pos <= pos < k_pos + n_k
    return inside and (left < 0 or pos >= p - left) and (right < 0 or pos <= p + right)


def test_n4_visible_interval_is_the_mask(native):
    for span in spans():
        for i in range(span[0]):
            lo, hi = native.visible(*span, i)
            for pos in range(-2, 20):
                assert (lo <= pos < hi) == sees(*span, i, pos), (span, i, pos)


def test_n4_tile_kind_is_what_the_mask_says(native):
    kinds = set()
    for span in spans():
        for first in range(span[0]):
            for last in range(first, span[0]):
                for lo in range(0, 16, 3):
                    hi = lo + 3
                    cells = [sees(*span, i, pos) for i in range(first, last + 1) for pos in range(lo, hi)]
                    kind = native.tile_kind(*span, first, last, lo, hi)
                    kinds.add(kind)
                    where = (span, first, last, lo, hi)
                    assert (kind == "full") == all(cells), where
                    # SKIP must not lose a key; a tile between the intervals of its rows may be executed in vain.
                    assert kind != "skip" or not any(cells), where
                    assert any(cells) or kind != "full", where
    assert kinds == {"skip", "partial", "full"}


@pytest.mark.parametrize(("size", "length"), [(256, 1000), (64, 64), (64, 65), (512, 1), (512, 0)])
def test_n3_splits_lie_at_absolute_multiples(native, size, length):
    for first in (0, 1, size - 1, size, 5 * size + 3):
        end = first + length
        numbers = range(native.partition_first(first, size), native.partition_end(end, size))
        pieces = [(max(n * size, first), min((n + 1) * size, end)) for n in numbers]
        pieces = [(a, z) for a, z in pieces if a < z]
        assert [pos for a, z in pieces for pos in range(a, z)] == list(range(first, end))
        assert all(z % size == 0 for _, z in pieces[:-1])


def test_n3_length_1000_split_256(native):
    assert native.partition_first(0, 256) == 0
    assert native.partition_end(1000, 256) == 4  # 256, 256, 256, 232


# ---- N5, N6: scores and the integer reference ------------------------------------------------------------------------


@both
def test_n5_factor_is_rounded_once_and_never_zero(native, real):
    log2e = float.fromhex("0x1.71547652b82fep+0")
    factor, dtype = getattr(native, f"score_factor_{real}"), NUMPY[real]
    for scale in (0.125, 1 / math.sqrt(80), 3.7e-5):
        assert factor(scale, False) == (dtype(scale * log2e), True)
        assert factor(scale, True) == (dtype(log2e), False)
    for scale in (0.0, -0.125, {"f32": 1e-50, "f64": 0.0}[real]):  # 1e-50 is nothing in fp32
        assert factor(scale, False) == (dtype(log2e), False)


@both
def test_n5_scaled_score_repeats_the_reference(native, real):
    s = noise(5000, -200, 200, real, 1)
    scaled_score, t = getattr(native, f"scaled_score_{real}"), COMPUTE[real]
    same(scaled_score(s, NUMPY[real](0.3), NUMPY[real](0)), s * NUMPY[real](0.3))
    same(
        scaled_score(s, NUMPY[real](0.01), NUMPY[real](30)),
        (30 * reference_steps._tanh(torch_of(s * NUMPY[real](0.01)), t)).numpy(),
    )


@both
def test_n6_reference_is_the_nearest_integer_of_the_exact_product(native, real):
    c = noise(4000, 0.05, 3, real, 2)
    x = (noise(4000, -1e6, 1e6, real, 3) / 4).astype(NUMPY[real])
    x[:2000] = (np.arange(2000) - 1000) / 2  # ties, with c = 1
    c[:2000] = 1
    m = getattr(native, f"reference_{real}")(NUMPY[real](SENTINEL[real]), x, c)
    exact = [Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x, c)]
    assert [int(value) for value in m] == [round(value) for value in exact]  # ties to even, as round() does


@both
def test_n6_reference_beyond_the_limit_is_rint_of_the_rounded_product(native, real):
    limit, dtype = LIMIT[real], NUMPY[real]
    x = np.array([limit, limit * 1.25 + 1, -limit * 1.5, limit * 2**40, -limit * 2**30, np.inf], dtype)
    m = getattr(native, f"reference_{real}")(dtype(SENTINEL[real]), x, LOG2E[real])
    same(m, np.rint(x * LOG2E[real]))


@both
def test_n6_reference_only_rises_and_ignores_nan(native, real):
    dtype = NUMPY[real]
    ref = getattr(native, f"reference_{real}")
    same(ref(dtype(7), np.array([1, 9, -np.inf, np.nan], dtype), dtype(1)), np.array([7, 9, 7, 7], dtype))
    same(getattr(native, f"max_{real}")(dtype(np.nan), dtype(3)), dtype(3))
    empty = dtype(SENTINEL[real])
    same(ref(empty, dtype(-np.inf), dtype(1)), empty)


@both
def test_n6_powers_of_two_are_exact_and_end_at_the_smallest_normal_number(native, real):
    lowest = {"f32": -126, "f64": -1022}[real]
    d = np.arange(lowest - 40, 1)
    expected = np.where(d < lowest, 0.0, np.ldexp(1.0, np.maximum(d, lowest))).astype(NUMPY[real])
    same(getattr(native, f"pow2_{real}")(d.astype(NUMPY[real])), expected)
    far = np.array([-(2.0**23) - 7, SENTINEL[real], -np.inf], NUMPY[real])
    same(getattr(native, f"pow2_{real}")(far), np.zeros(3, NUMPY[real]))


@both
def test_n6_probability_of_the_largest_score_is_near_one_whatever_its_size(native, real):
    dtype = NUMPY[real]
    sizes = np.concatenate([np.ldexp(1.7, np.arange(-20, 100)), -np.ldexp(1.3, np.arange(-20, 100))]).astype(dtype)
    m = getattr(native, f"reference_{real}")(dtype(SENTINEL[real]), sizes, LOG2E[real])
    p = getattr(native, f"probability_{real}")(sizes, LOG2E[real], m)
    assert p.min() >= 0.7
    assert p.max() <= 1.4143
    inside = np.abs(m) <= LIMIT[real]
    same(p[inside], getattr(native, f"probability_near_{real}")(sizes[inside], LOG2E[real], m[inside]))


@both
def test_n6_probability_repeats_the_reference(native, real):
    dtype, t = NUMPY[real], COMPUTE[real]
    m = np.rint(noise(20_000, -100, LIMIT[real] * 4, real, 5))
    x = (m - np.abs(noise(20_000, -60, 60, real, 4))) * dtype(math.log(2))  # below the reference, as scores are
    x[:100:2], x[1:100:2] = -np.inf, np.nan
    actual = getattr(native, f"probability_{real}")(x, LOG2E[real], m)
    expected = reference_steps._probability(torch_of(x), torch_of(LOG2E[real]), torch_of(m), t).numpy()
    assert np.count_nonzero(np.abs(m) > LIMIT[real]) > 100
    same(np.isnan(actual), np.isnan(x))
    same(actual[~np.isnan(x)], expected[~np.isnan(x)])


# ---- N7: elementary functions, widening and rounding -----------------------------------------------------------------

# Bit patterns of floats
ZERO, TINY, HALF, ONE, HUGEST, INFINITY = 0, 1 << 23, 0x3F000000, 0x3F800000, 0x7F7FFFFF, 0x7F800000
MINUS_ZERO, MINUS_126 = 1 << 31, 0xC2FC0000
JUST_OVER_HALF = 0x3F020000


def test_n7_exp2_error_is_below_1_02_ulp(native, scan_stride):
    tried = 0
    for first, last in ((ZERO, HALF), (HALF, JUST_OVER_HALF), (MINUS_ZERO, MINUS_126)):
        worst, at, count = native.scan_exp2(first, last, 1 if last == JUST_OVER_HALF else scan_stride)
        assert worst < 1.02, f"{worst} ulp at bits {at:#x}"
        tried += count
    assert tried > 2**31 / scan_stride


def test_n7_tanh_error_is_below_3_74_ulp(native, scan_stride):
    worst, at, count = native.scan_tanh(TINY, INFINITY, scan_stride)
    assert worst < 3.74, f"{worst} ulp at bits {at:#x}"
    assert count > 2.1e9 / scan_stride


def test_n7_log2_error_is_below_3_01_ulp(native, scan_stride):
    for first, last in ((TINY, ONE - 1), (ONE + 1, HUGEST)):
        worst, at, count = native.scan_log2(first, last, scan_stride)
        assert worst < 3.01, f"{worst} ulp at bits {at:#x}"
        assert count > 1e9 / scan_stride
    # Next to 1, where a cancellation would show, without a gap.
    for first, last in ((ONE - 200_000, ONE - 1), (ONE + 1, ONE + 200_000)):
        worst, at, _ = native.scan_log2(first, last, 1)
        assert worst < 3.01, f"{worst} ulp at bits {at:#x}"


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="needs a long double wider than double")
def test_n7_fp64_errors(native):
    below_one = noise(400_000, -1, 0.5, "f64", 6)
    assert native.error_exp2_f64(below_one).max() < 1.04
    assert native.error_exp2_f64(noise(400_000, -1000, 0.5, "f64", 7)).max() < 1.04
    assert native.error_tanh_f64(noise(400_000, -22, 22, "f64", 8)).max() < 3.8
    assert native.error_log2_f64(np.abs(noise(400_000, 0.5, 1e6, "f64", 9)) + 1e-12).max() < 3.1


@both
def test_n7_elementary_functions_at_special_points(native, real):
    dtype, lowest = NUMPY[real], {"f32": -126, "f64": -1022}[real]
    exp2, tanh, log2 = (getattr(native, f"{name}_{real}") for name in ("exp2", "tanh", "log2"))
    n = np.arange(lowest, 1)
    powers = np.ldexp(1.0, n).astype(dtype)
    same(exp2(n.astype(dtype)), powers)
    same(exp2(np.array([-np.inf, lowest - 1, np.nextafter(dtype(lowest), dtype(-np.inf))], dtype)), np.zeros(3, dtype))
    assert np.isnan(exp2(dtype(np.nan)))
    assert np.isnan(tanh(dtype(np.nan)))
    assert np.isnan(log2(dtype(np.nan)))
    same(log2(powers), n.astype(dtype))
    y = noise(20_000, -30, 30, real, 10)
    same(tanh(-y), -tanh(y))
    assert np.abs(tanh(y)).max() == 1
    same(tanh(np.array([0.0, -0.0, np.inf, -np.inf, 100], dtype)), np.array([0.0, -0.0, 1, -1, 1], dtype))


@both
def test_n7_elementary_functions_equal_the_reference(native, real):
    t = COMPUTE[real]
    x = noise(40_000, -150, 0.5, real, 11)
    same(getattr(native, f"exp2_{real}")(x), reference_steps._exp2(torch_of(x), t).numpy())
    same(getattr(native, f"tanh_{real}")(x), reference_steps._tanh(torch_of(x), t).numpy())
    positive = np.abs(anything(40_000, real, 12))
    positive = positive[np.isfinite(positive) & (positive >= np.finfo(NUMPY[real]).tiny)]
    same(getattr(native, f"log2_{real}")(positive), reference_steps._log2(torch_of(positive), t).numpy())


@both
def test_n7_reference_fma_is_fused(native, real):
    """The torch emulation of fma against the machine's, on ordinary, cancelling and arbitrary numbers."""
    fma = getattr(native, f"fma_{real}")
    a, b = noise(20_000, -4, 4, real, 13), noise(20_000, -4, 4, real, 14)
    cancelling = -(a * b) * (1 + (np.arange(20_000) % 5 - 2) * np.finfo(NUMPY[real]).eps).astype(NUMPY[real])
    for x, y, z in (
        (a, b, noise(20_000, -4, 4, real, 15)),
        (a, b, cancelling),
        (anything(3000, real, 16), anything(3000, real, 17), anything(3000, real, 18)),
    ):
        with np.errstate(all="ignore"):
            expected = fma(x, y, z)
        actual = reference_steps._fma(torch_of(x), torch_of(y), torch_of(z)).numpy()
        same(np.where(np.isnan(actual), -1, actual), np.where(np.isnan(expected), -1, expected))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_n7_widening_is_exact_for_every_16_bit_value(native, name, dtype):
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = getattr(native, f"{name}_widen")(every)
    expected = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy()
    nan = np.isnan(expected)
    same(np.isnan(wide), nan)
    same(wide[~nan], expected[~nan])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_n9_rounding_to_16_bits_is_to_nearest_even(native, name, dtype):
    """Every 16-bit value, every midpoint of two, the floats beside them, and a sweep over all floats."""
    every = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(dtype).float()
    every = np.sort(every[every.isfinite()].double().numpy())
    midpoints = ((every[1:] + every[:-1]) / 2).astype(np.float32)
    near = np.concatenate([every.astype(np.float32), midpoints])
    infinity = np.float32(np.inf)
    near = np.concatenate([near, np.nextafter(near, infinity), np.nextafter(near, -infinity)])
    sweep = np.arange(0, 1 << 32, 509, dtype=np.uint64).astype(np.uint32).view(np.float32)
    edges = np.array([65519.996, 65520, 3.4e38, -3.4e38, np.inf, -np.inf, 1e-45], np.float32)
    for x in (near, sweep[~np.isnan(sweep)], edges):
        rounded = getattr(native, f"{name}_round")(x).view(np.int16)
        same(rounded, torch_of(x).to(dtype).view(torch.int16).numpy())


# ---- N8, N9, N10, N11: fold and finish -------------------------------------------------------------------------------


@both
def test_n8_fold_loses_nothing_to_the_scaling(native, real):
    """A product with a power of two is exact, so a fused fold has the same bits: contraction cannot be seen."""
    fold, fma = getattr(native, f"fold_{real}"), getattr(native, f"fma_{real}")
    value, part = noise(20_000, -50, 50, real, 19), noise(20_000, -50, 50, real, 20)
    d = -(uniform_bits((20_000,), 21) % np.uint64(60)).astype(NUMPY[real])
    a = getattr(native, f"pow2_{real}")(d)
    one = NUMPY[real](1)
    same(fold(value, a, part, one), fma(value, a, part))
    same(fold(value, one, part, a), fma(part, a, value))


@both
def test_n8_sink_is_a_state_without_values(native, real):
    dtype = NUMPY[real]
    sink = getattr(native, f"sink_state_{real}")
    for z in (0.0, 1.0, -3.25, 80.0, 1e7, -1e7):
        m, l = sink(z)
        assert m == round(m)
        assert m + math.log2(l) == pytest.approx(z * math.log2(math.e), rel=1e-6, abs=1e-6)
    assert sink(-math.inf) == (SENTINEL[real], 0.0)
    m, l = sink(math.nan)
    assert (m, math.isnan(l)) == (SENTINEL[real], True)
    assert dtype(sink(math.inf)[0]) == np.inf


@both
def test_n9_lse_is_the_logarithm_of_the_sum(native, real):
    l = np.abs(noise(2000, 0.5, 1e6, real, 22)) + NUMPY[real](0.5)
    m = np.rint(noise(2000, -300, 300, real, 23))
    lse = getattr(native, f"finish_lse_{real}")(m, l)
    exact = (m.astype(np.float64) + np.log2(l.astype(np.float64))) * math.log(2)
    assert np.all(np.abs(lse - exact) <= 4 * np.finfo(NUMPY[real]).eps * (np.abs(m) + np.abs(np.log2(l)) + 1))


@both
def test_n9_one_division_and_no_negative_zero(native, real):
    dtype = NUMPY[real]
    finish = getattr(native, f"finish_out_{real}")
    o, l = noise(2000, -9, 9, real, 24), np.abs(noise(2000, 1, 40, real, 25)) + dtype(0.5)
    same(finish(o, l), o / l + 0)
    same(finish(dtype(-0.0), dtype(2)), dtype(0))
    same(finish(dtype(-np.finfo(dtype).smallest_subnormal), dtype(1000)), dtype(0))


@both
def test_n9_every_nan_is_stored_as_one(native, real):
    x = anything(5000, real, 26)
    x[:3] = (np.nan, -np.nan, np.inf)
    stored = getattr(native, f"canonical_{real}")(x)
    quiet = {"f32": 0x7FC00000, "f64": 0x7FF8000000000000}[real]
    assert np.count_nonzero(np.isnan(x)) >= 2
    same(stored.view(BITS[real])[np.isnan(x)], np.full(np.count_nonzero(np.isnan(x)), quiet, BITS[real]))
    same(stored[~np.isnan(x)], x[~np.isnan(x)])
    same(native.bf16_round(np.float32(np.nan)), np.uint16(0x7FC0))
    same(native.f16_round(np.float32(-np.nan)), np.uint16(0x7E00))


@both
def test_n10_empty_state_finishes_as_zero_and_minus_infinity(native, real):
    dtype = NUMPY[real]
    same(getattr(native, f"finish_out_{real}")(dtype(0), dtype(0)), dtype(0))
    same(getattr(native, f"finish_lse_{real}")(dtype(SENTINEL[real]), dtype(0)), dtype(-np.inf))


@both
def test_n11_nan_sum_makes_nan(native, real):
    dtype = NUMPY[real]
    assert np.isnan(getattr(native, f"finish_out_{real}")(dtype(1), dtype(np.nan)))
    assert np.isnan(getattr(native, f"finish_lse_{real}")(dtype(3), dtype(np.nan)))


def test_constants_are_what_python_says(native):
    constants = native.constants()
    assert constants == {name: value for name, value in fad.contract().items() if name in constants}
    assert constants["BLOCK_KV"] == 64
    assert constants["MMA_BLOCK_KV"] == 128
