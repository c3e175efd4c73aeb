"""Tensor cores emulated on the CPU: ``arithmetic="mma_sm90"`` and ``"mma_sm80"``.

The two instructions against exact rational arithmetic, the measured table and a GPU; the attention over them against
itself (one row at a time, vectors, partial states, threads), against an oracle written from the contract's text, and
within error bounds of the fma family.
"""

import hashlib
import itertools
import math
import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import mma_oracle
import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, normal, uniform_bits
from cuda_tools import ON_HOPPER

import flash_attn_det as fad
from flash_attn_det._schedule import forced, isas
from flash_attn_det.reference import attn_oracle
from flash_attn_det.testing import assert_bits_equal, bits_differ

EMULATED = ("mma_sm90", "mma_sm80")
FORMAT_EXPONENT = {"fp16": -14, "bf16": -126}  # of the smallest normal number
HALF_CASES = [case for case in CASES if case.dtype in FORMAT_EXPONENT]

# SHA-256 of the 2^23 results of ex2.approx.ftz.f32 at i * 2^-23 on an H100, as little-endian fp32.
EX2_TABLE = "b2a42c4a626469c986e33e43f16f41bde9d84de94347cd9ceaa1bd68d36bcdf0"

both = pytest.mark.parametrize("name", FORMAT_EXPONENT)
generations = pytest.mark.parametrize("sm", [90, 80])
emulated = pytest.mark.parametrize("arithmetic", EMULATED)


# ---- ex2.approx.ftz.f32 ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ex2_table(native):
    return native.ex2_significand(np.arange(1 << 23, dtype=np.uint32)).astype(np.uint32)


def test_n7_ex2_is_the_measured_table(ex2_table):
    bits = (ex2_table - (1 << 23) + 0x3F800000).astype("<u4")  # in [1, 2)
    assert hashlib.sha256(bits.tobytes()).hexdigest() == EX2_TABLE
    assert (np.diff(ex2_table.astype(np.int64)) >= 0).all()
    exact = np.exp2(np.arange(1 << 23) / 2.0**23) * 2.0**23
    assert np.abs(ex2_table - exact).max() < 1.4  # ulp
    rounded = np.rint(exact)
    assert (ex2_table != rounded).mean() > 0.1, "a correctly rounded exp2 must not pass for it"


@pytest.mark.parametrize("low", [0, -1, -30, -125])
def test_n7_ex2_looks_its_argument_up(native, ex2_table, low):
    """|x| cut to 23 fraction bits; a negative number is its ones' complement."""
    x = (low + uniform_bits((100000,), 1 - low).astype(np.float64) * 2.0**-64).astype(np.float32)
    a = np.floor(np.abs(x.astype(np.float64)) * 2.0**23).astype(np.int64)
    a = np.where(x > 0, a, np.where(a % 2**23 != 0, -a - 1, -a))
    expected = np.ldexp(ex2_table[a % 2**23].astype(np.float64), a // 2**23 - 23).astype(np.float32)
    assert_bits_equal(torch.from_numpy(native.ex2(x)), torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0.0, 1.0), (-0.0, 1.0), (1e-40, 1.0), (-1e-40, 1.0), (2.0**-24, 1.0), (-(2.0**-24), 1.0),
        (1.0, 2.0), (-1.0, 0.5), (-126.0, 2.0**-126), (np.nextafter(np.float32(-126), np.float32(-127)), 0.0),
        (-127.0, 0.0), (-1e30, 0.0), (-math.inf, 0.0), (127.0, 2.0**127), (128.0, math.inf), (math.inf, math.inf),
        (math.nan, math.nan),
    ],
)  # fmt: skip
def test_n7_ex2_at_the_ends(native, x, expected):
    np.testing.assert_equal(native.ex2(np.float32(x)), expected)


# ---- the step of a tensor core ---------------------------------------------------------------------------------------


def exponent(x: Fraction) -> int:
    """e of 2^e <= |x| < 2^(e + 1)."""
    e = abs(x).numerator.bit_length() - x.denominator.bit_length()
    return e if abs(x) >= Fraction(2) ** e else e - 1


def cut(x: Fraction, unit: Fraction) -> Fraction:
    return math.trunc(x / unit) * unit


def exact_step(rule, a, b, c) -> Fraction:
    """The step in rational numbers, term by term; math.inf where fp32 ends."""
    products, fraction_bits, least = rule
    c = Fraction(float(c))
    for first in range(0, len(a), products):
        pairs = [(Fraction(float(x)), Fraction(float(y))) for x, y in zip(a, b)][first : first + products]
        terms = [(x * y, max(exponent(x), least) + max(exponent(y), least)) for x, y in pairs if x * y != 0]
        terms.append((c, max(exponent(c), -126) if c else -133))
        unit = Fraction(2) ** (max(e for _, e in terms) - fraction_bits)
        total = sum(cut(x, unit) for x, _ in terms)
        c = total if total == 0 else cut(total, Fraction(2) ** max(exponent(total) - 23, -149))
        if abs(c) >= 2**128:
            return math.copysign(math.inf, c)
    return c


def finite(bits, dtype):
    x = torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(dtype)
    return x.where(x.isfinite(), 1.0)


def operands(kind, name, count, seed):
    """a, b [count, 16] of the 16-bit type and c [count], as float32."""
    dtype, noise = DTYPES[name], uniform_bits((3, count, 16), seed)
    shape = (count, 16)
    if kind == "any bits":
        a, b = (finite(n & np.uint64(0xFFFF), dtype) for n in noise[:2])
    elif kind == "subnormal":
        mask = np.uint64(0x83FF if name == "fp16" else 0x807F)
        a, b = finite(noise[0] & mask, dtype), normal(shape, seed, dtype)
    elif kind == "wide":
        a, b = (
            (normal(shape, seed + i, torch.float64) * torch.from_numpy(2.0 ** ((n % np.uint64(20)).astype(float) - 10)))
            for i, n in enumerate(noise[:2])
        )
    elif kind == "tiny":  # products around fp32's smallest number; fp16 has none
        size = 2.0 ** -(74 if name == "bf16" else 14)
        a, b = (normal(shape, seed + i, torch.float64) * size for i in range(2))
        a = torch.where(torch.from_numpy(noise[0] % np.uint64(4) == 0), a * 2.0**-6, a)
    elif kind == "one size":
        a = b = torch.full(shape, 1.99)
    else:
        a, b = normal(shape, seed, torch.float64), normal(shape, seed + 1, torch.float64)
    if kind == "cancelling":
        a[:, 8:], b[:, 8:] = -a[:, :8], b[:, :8]
        a[:, 15] *= 1 + 2.0**-7
    a, b = (x.to(dtype).float() for x in (a, b))
    c = np.ldexp(normal((count,), seed + 2).numpy(), (noise[2, :, 0] % np.uint64(40)).astype(int) - 20)
    if kind == "any bits":
        c = (noise[2, :, 0] & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32)
        c = np.where(np.isfinite(c), c, 1)
    elif kind == "cancelling":
        c = -(a * b).sum(-1).numpy()
    elif kind == "tiny":
        c = np.ldexp(c, -150) * (noise[2, :, 1] % np.uint64(2))
    elif kind == "no sum before":
        c = np.zeros(count)
    return a.numpy(), b.numpy(), c.astype(np.float32)


KINDS = ("plain", "any bits", "subnormal", "wide", "one size", "cancelling", "tiny", "no sum before")


@generations
@both
@pytest.mark.parametrize("kind", KINDS)
def test_n7_step_is_exact_rational_arithmetic_cut_twice(native, kind, name, sm):
    rule = native.tensor_core(sm, FORMAT_EXPONENT[name])
    a, b, c = operands(kind, name, 200, 7)
    actual = native.tensor_core_step(rule, a, b, c)
    expected = np.array([float(exact_step(rule, *row)) for row in zip(a, b, c)], np.float32)
    assert_bits_equal(torch.from_numpy(actual), torch.from_numpy(expected + np.float32(0)), "step")


@both
def test_n7_how_generations_sum(native, name):
    least = FORMAT_EXPONENT[name]
    assert native.tensor_core(90, least) == (16, 25, least)
    assert native.tensor_core(80, least) == (8, 24, least)


@both
def test_n7_subnormal_operands_have_the_smallest_exponent(native, name):
    """As measured: the smallest number times 1024 is aligned like 2^least times 1024, and cuts what lies below that."""
    least = FORMAT_EXPONENT[name]
    product, unit = 1024 * 2.0 ** (least - (10 if name == "fp16" else 7)), 1024 * 2.0 ** (least - 25)
    rule = native.tensor_core(90, least)
    for c, kept in ((1.5 * unit, unit), (0.5 * unit, 0.0)):
        assert native.tensor_core_step(rule, [[product / 1024]], [[1024]], [c])[0] == np.float32(product + kept)


@pytest.mark.parametrize(
    ("a", "b", "c", "units"),
    [
        ([1.7672495411513722e-17, 1.7194768829262297e-19], [-7.928052097471169e-29, -1.4100888680825586e-29], 0, 0),
        ([0.000171661376953125, 3.7107383832335472e-09], [3 * 2.0**-131, -(2.0**-131)], 0, 135),
        ([2.0**-74, 2.0**-80], [2.0**-75, -(2.0**-78)], 0, 0),  # unit 2^-158: 2^-149 - 2^-158
        ([2.0**-74, 2.0**-80], [2.0**-75, -(2.0**-79)], 0, 1),  # 2^-159 is cut away
        ([2.0**-74, 2.0**-75], [2.0**-75, -(2.0**-77)], 2.0**-148, 3),  # unit 2^-151: 2^-152 is cut away
    ],
    ids=["of out", "of dq", "kept", "cut away", "subnormal accumulator"],
)
def test_n7_zero_has_an_exponent_as_an_accumulator(native, a, b, c, units):
    """As measured on an H100, where fuzzing met the first two: exactly they are -1.0016 and 134.999 times 2^-149."""
    assert all(torch.tensor(x).bfloat16().double().tolist() == x for x in (a, b))
    rule = native.tensor_core(90, FORMAT_EXPONENT["bf16"])
    assert native.tensor_core_step(rule, [a], [b], [c])[0] == np.float32(units * 2.0**-149)
    exact = sum(Fraction(x) * Fraction(y) for x, y in zip(a, b)) + Fraction(c)
    assert abs(exact * 2**149 - units) < 1.01


@both
def test_n7_generations_differ(native, name):
    a, b, c = operands("plain", name, 1000, 3)
    sm90, sm80 = (native.tensor_core_step(native.tensor_core(sm, FORMAT_EXPONENT[name]), a, b, c) for sm in (90, 80))
    plain = (c + (a.astype(np.float64) * b).sum(-1)).astype(np.float32)
    assert (sm90 != sm80).mean() > 0.1
    assert (sm90 != plain).mean() > 0.1
    np.testing.assert_allclose(sm90, plain, rtol=1e-6, atol=2e-5)


@both
def test_n7_order_within_a_sum_does_not_matter(native, name):
    rule = native.tensor_core(90, FORMAT_EXPONENT[name])
    a, b, c = operands("wide", name, 1000, 5)
    step = native.tensor_core_step(rule, a, b, c)
    assert_bits_equal(
        torch.from_numpy(native.tensor_core_step(rule, a[:, ::-1], b[:, ::-1], c)), torch.from_numpy(step)
    )
    halves = native.tensor_core_step(rule, a[:, 8:], b[:, 8:], native.tensor_core_step(rule, a[:, :8], b[:, :8], c))
    assert (halves != step).any(), "two steps of 8 are not one of 16"


@both
@generations
def test_n7_zeros_take_no_part(native, name, sm):
    rule = native.tensor_core(sm, FORMAT_EXPONENT[name])
    a, b, c = operands("wide", name, 304, 9)
    c[300:] = 1e-45, 2.0**-126, -0.0, 3e38
    largest = np.full(a.shape, torch.finfo(DTYPES[name]).max)
    nothing = native.tensor_core_step(rule, np.zeros(a.shape), largest, c)
    assert_bits_equal(torch.from_numpy(nothing), torch.from_numpy(c + np.float32(0)))
    a[:, 5:] = 0
    five, all_16 = (native.tensor_core_step(rule, a[:, :n], b[:, :n], c) for n in (5, 16))
    assert_bits_equal(torch.from_numpy(five), torch.from_numpy(all_16))


PROBE = Path(__file__).parent / "cuda" / "tensor_core.cu"


@pytest.mark.skipif(shutil.which("nvcc") is None or not ON_HOPPER, reason="needs nvcc and a Hopper GPU")
def test_n7_step_and_ex2_are_those_of_the_gpu(tmp_path):
    """The model of this file's first two parts, on this machine's GPU."""
    program = tmp_path / "tensor_core"
    flags = ["-std=c++17", "-O2", "-fmad=false", "-Xcompiler", "-ffp-contract=off", "-arch=sm_90"]
    for command in (["nvcc", *flags, "-o", program, PROBE], [program]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    results = re.findall(r": (\d+) of (\d+) differ$", done.stdout, re.MULTILINE)
    assert len(results) == 16
    assert all(int(differing) == 0 for differing, _ in results)
    assert sum(int(compared) for _, compared in results) > 10_000_000


INF, NAN = math.inf, math.nan


@generations
@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        ([INF, 1], [2, 3], 0, INF), ([INF, 1], [-2, 3], 5, -INF), ([INF], [0], 0, NAN), ([0], [NAN], 0, NAN),
        ([INF, INF], [1, -1], 0, NAN), ([INF], [1], -INF, NAN), ([1], [1], INF, INF), ([1], [1], NAN, NAN),
        ([1], [1], -INF, -INF),
    ],
)  # fmt: skip
def test_n11_step_of_what_is_not_finite(native, sm, a, b, c, expected):
    rule = native.tensor_core(sm, -14)
    np.testing.assert_equal(native.tensor_core_step(rule, [a], [b], [c])[0], np.float32(expected))


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(case, arithmetic, **keywords):
    qkv, options = case.inputs()
    return fad.attn(*qkv, **options, arithmetic=arithmetic, return_lse=True, **keywords)


def assert_same(actual, expected):
    for name, x, y in zip(("out", "lse"), actual, expected):
        assert_bits_equal(x, y, name)


@emulated
@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_n7_vectors_equal_one_row_at_a_time(case, arithmetic):
    with forced(isa="scalar"):
        expected = attention(case, arithmetic)
    for isa in isas():
        for tile_rows in (None, 5):
            with forced(isa=isa, tile_rows=tile_rows):
                assert_same(attention(case, arithmetic), expected)


def strange(shape, kind, dtype, seed):
    """Numbers that leave what vectors hold exactly, in one way each."""
    x, bits = normal(shape, seed, torch.float64), uniform_bits(shape, seed + 1)
    if kind == "any bits":
        return torch.from_numpy((bits & np.uint64(0xFFFF)).astype(np.uint16).view(np.int16)).view(dtype)
    if kind == "not finite":
        for i, value in enumerate((INF, -INF, NAN)):
            x = torch.where(torch.from_numpy(bits % np.uint64(200) == i), value, x)
    elif kind == "large":
        x = torch.full(shape, 1.99)  # sums that int32 cannot hold
    else:
        x = x * {"tiny": 2.0**-130, "small": 2.0**-66, "huge": 2.0**70}[kind] ** (
            1 if dtype == torch.bfloat16 else 0.17
        )
    return x.to(dtype)


@emulated
@both
@pytest.mark.parametrize("kind", ["any bits", "not finite", "large", "tiny", "small", "huge"])
@pytest.mark.parametrize("where", ["q", "k", "v", "qkv"])
def test_n7_n11_vectors_equal_one_row_at_a_time_for_strange_numbers(where, kind, name, arithmetic):
    shapes = dict(q=(1, 17, 4, 40), k=(1, 300, 2, 40), v=(1, 300, 2, 24))
    qkv = [
        strange(shape, kind, DTYPES[name], 100 * i) if key in where else normal(shape, i, DTYPES[name])
        for i, (key, shape) in enumerate(shapes.items())
    ]
    results = []
    for isa in isas():
        with forced(isa=isa):
            options = dict(causal=True, split_size=256, arithmetic=arithmetic)
            results.append(fad.attn(*qkv, return_lse=True, **options))
            merged = fad.merge_partials(fad.attn_partials(*qkv, **options), return_lse=True)
            assert_same(merged, results[-1])
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("case", HALF_CASES[::3], ids=lambda case: case.name)
def test_n7_equals_the_oracle(native, case):
    """Written by another hand, in NumPy, with everything but ex2 of its own."""

    def ex2(x):
        return torch.from_numpy(np.asarray(native.ex2(x.numpy()), np.float32).reshape(x.shape))

    qkv, options = case.inputs()
    assert_same(attention(case, "mma_sm90"), mma_oracle.attn(*qkv, exp2=ex2, **options))


@emulated
@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_n7_error_is_near_that_of_the_fma_family(case, arithmetic):
    """Against float64: P is rounded to 16 bits once more, also in lse, and sums are cut instead of rounded."""
    qkv, options = case.inputs()
    out, lse = attention(case, arithmetic)
    options.pop("split_size", None)
    exact, exact_lse = attn_oracle(*qkv, **options, return_lse=True)
    largest = max(1.0, *(float(x.abs().max()) for x in (qkv[2], exact) if x.numel()))
    eps = torch.finfo(DTYPES[case.dtype]).eps
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2 * eps * largest)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=eps / 2 + 1e-5)


@both
def test_n7_families_differ(name):
    """The control of everything above: another family, another generation, other bits."""
    q, k, v = (normal((1, rows, 2, 128), rows, DTYPES[name]) for rows in (40, 500, 501))
    states = [fad.attn_partials(q, k, v[:, 1:], arithmetic=arithmetic) for arithmetic in ("fma", *EMULATED)]
    for x, y in itertools.combinations(states, 2):
        assert bits_differ(x.o, y.o) > x.o.numel() // 20
    for emulation in states[1:]:  # two generations may well give one l: sums of a few hundred bf16 numbers are exact
        assert bits_differ(emulation.l, states[0].l) > emulation.l.numel() // 20


@emulated
@pytest.mark.parametrize("case", [c for c in HALF_CASES if "k_pos" not in c.inputs()[1]], ids=lambda case: case.name)
def test_n8_fused_is_merged(case, arithmetic):
    qkv, options = case.inputs()
    for isa in isas()[0], "scalar":
        with forced(isa=isa):
            partials = fad.attn_partials(*qkv, **options, arithmetic=arithmetic)
            assert_same(fad.merge_partials(partials, return_lse=True), attention(case, arithmetic))


@emulated
@pytest.mark.parametrize("isa", isas())
def test_n1_threads_and_splits_do_not_matter(isa, arithmetic):
    q, k, v = (normal((2, n, h, 32), i, torch.bfloat16) for i, (n, h) in enumerate([(33, 4), (700, 2), (700, 2)]))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            for split_parallel in (True, False):
                torch.set_num_threads(threads)
                with forced(isa=isa, split_parallel=split_parallel):
                    out = fad.attn(q, k, v, causal=True, split_size=256, arithmetic=arithmetic, return_lse=True)
                results.append(out)
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same(result, results[0])


@emulated
@pytest.mark.parametrize("isa", isas())
def test_n1_batch_padding_and_packing_do_not_matter(isa, arithmetic):
    lengths, options = [1, 140, 0, 257], dict(causal=True, split_size=128, arithmetic=arithmetic, return_lse=True)
    total = sum(lengths)
    q, k, v = (normal((total, heads, 24), i, torch.float16) for i, heads in enumerate((4, 2, 2)))
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    with forced(isa=isa):
        out, lse = fad.attn_varlen(q, k, v, offsets, offsets, **options)
        for first, end in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
            alone = fad.attn(*(x[None, first:end] for x in (q, k, v)), **options)
            assert_same((out[None, first:end], lse[None, :, first:end]), alone)
            last = fad.attn(q[None, end - 1 : end], *(x[None, first:end] for x in (k, v)), **options)
            if end > first:
                assert_same((out[None, end - 1 : end], lse[None, :, end - 1 : end]), last)


# ---- refusals --------------------------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_inputs_are_refused(dtype, arithmetic):
    x = torch.ones(1, 2, 1, 8, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    message = f"^arithmetic is '{arithmetic}' but the inputs are {name}, expected float16 or bfloat16$"
    for function in (fad.attn, fad.attn_partials):
        with pytest.raises(ValueError, match=message):
            function(x, x, x, arithmetic=arithmetic)


def test_tensor_cores_themselves_are_refused():
    x = torch.ones(1, 2, 1, 8, dtype=torch.bfloat16)
    with pytest.raises(
        NotImplementedError, match=r"^arithmetic 'mma' needs tensor cores; .*'mma_sm90', which emulates"
    ):
        fad.attn(x, x, x, arithmetic="mma")
