"""The oracle of the mma family, without a GPU: its matrix step, its order of sums, and that the whole is attention."""

import itertools
import math
from fractions import Fraction

import mma_oracle
import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, normal, uniform_bits

import flash_attn_det as fad
from flash_attn_det.reference import attn_oracle
from flash_attn_det.testing import bits_differ

HALF_CASES = [case for case in CASES if case.dtype in ("fp16", "bf16")]
SMALLEST = {"fp16": -14, "bf16": -126, "fp32": -126}
both = pytest.mark.parametrize("name", ["fp16", "bf16"])


def rounded_exp2(x):
    """2^x rounded to fp32, 0 where that is subnormal: near enough to a GPU's to test everything around it."""
    y = torch.from_numpy(np.exp2(np.minimum(x.double().numpy(), 2.0))).float()
    return torch.where(y < 2.0**-126, 0.0, y)


def spread(shape, seed, dtype, octaves):
    """Numbers of both signs whose sizes span 2^octaves, some of them zero."""
    bits = uniform_bits(shape, seed + 1)
    x = normal(shape, seed, torch.float64) * torch.from_numpy(2.0 ** ((bits >> np.uint64(32)) % np.uint64(octaves + 1)))
    return torch.where(torch.from_numpy(bits % np.uint64(11) == 0), 0.0, x * 2.0 ** -(octaves // 2)).to(dtype)


# ---- the matrix step -------------------------------------------------------------------------------------------------


def exponent(x: Fraction, smallest: int) -> int:
    """Of x as its format stores it: floor(log2(|x|)), but that of the smallest normal number for subnormal ones."""
    size, e = abs(x), 0
    while size >= 2:
        size, e = size / 2, e + 1
    while size < 1:
        size, e = size * 2, e - 1
    return max(e, smallest)


def cut(x: Fraction, unit: Fraction) -> Fraction:
    return math.trunc(x / unit) * unit


def exact_step(acc, a, b, name):
    """The step in rational numbers, term by term."""
    acc, a, b = Fraction(acc), [Fraction(x) for x in a], [Fraction(x) for x in b]
    terms = [(x * y, exponent(x, SMALLEST[name]) + exponent(y, SMALLEST[name])) for x, y in zip(a, b) if x * y != 0]
    terms.append((acc, exponent(acc, SMALLEST["fp32"]) if acc else -133))
    unit = Fraction(2) ** (max(e for _, e in terms) - 25)
    total = sum(cut(value, unit) for value, _ in terms)
    return float(cut(total, Fraction(2) ** (exponent(total, -126) - 23))) if total else 0.0


def step(acc, a, b, name):
    acc, a, b = (x.double().numpy() for x in (acc, a, b))
    return mma_oracle.matrix_step(acc, a, b, DTYPES[name])


@both
@pytest.mark.parametrize("octaves", [0, 6, 16, 28])
def test_n7_step_is_the_rational_one(name, octaves):
    n = 150
    a, b = (spread((n, 16), seed, DTYPES[name], octaves) for seed in (1, 3))
    acc = spread((n,), 5, torch.float32, 2 * octaves)
    got = step(acc, a, b, name)
    want = [exact_step(*row, name) for row in zip(acc.tolist(), a.tolist(), b.tolist())]
    assert got.tolist() == want
    assert (got == torch.from_numpy(got).float().double().numpy()).all()  # numbers of fp32
    terms = torch.cat([a.double() * b.double(), acc.double()[:, None]], 1)
    exact = terms.sum(1).numpy()
    assert (np.abs(got - exact) <= 2.0**-20 * terms.abs().amax(1).numpy()).all()
    assert (got != exact.astype(np.float32)).any()  # it is not merely the rounded sum


@both
@pytest.mark.parametrize("octaves_below", [0, 4], ids=["normal", "subnormal"])
def test_n7_step_of_subnormal_numbers(name, octaves_below):
    """They are aligned with their format's smallest exponent, and so can push out what 24 bits could hold."""
    a, b = torch.zeros(1, 16, dtype=DTYPES[name]), torch.zeros(1, 16, dtype=DTYPES[name])
    a[0, 0], b[0, 0] = 2.0 ** (SMALLEST[name] - octaves_below), 1024
    product = float(a[0, 0]) * 1024
    acc = torch.tensor([product * 2.0**-23])
    want = exact_step(acc.item(), a[0].tolist(), b[0].tolist(), name)
    assert step(acc, a, b, name).tolist() == [want]
    assert want == (product if octaves_below else product + acc.item())


@both
def test_n7_step_does_not_see_the_order_of_its_products(name):
    a, b = (spread((200, 16), seed, DTYPES[name], 8) for seed in (1, 3))
    acc = spread((200,), 5, torch.float32, 8)
    order = torch.from_numpy(np.argsort(uniform_bits((16,), 7)))
    assert (step(acc, a[:, order], b[:, order], name) == step(acc, a, b, name)).all()
    halves = step(torch.from_numpy(step(acc, a * (order < 8), b, name)), a * (order >= 8), b, name)
    assert (halves != step(acc, a, b, name)).any()


@both
def test_n7_zeros_are_exact(name):
    """N4, N7: a masked key, whatever its v, and padding of d change nothing; a sum of nothing is +0."""
    acc = spread((500,), 5, torch.float32, 40)
    huge = torch.full((500, 16), torch.finfo(DTYPES[name]).max, dtype=DTYPES[name])
    zeros = torch.zeros_like(huge)
    zeros[:, ::2] = -0.0
    assert (step(acc, zeros, huge, name) == acc.double().numpy()).all()
    nothing = step(torch.zeros(500) * -1, zeros, huge, name)
    assert (nothing == 0).all()
    assert not np.signbit(nothing).any()


@both
def test_n7_chain_pads_and_ascends(name):
    a, b = (normal((20, 40), seed, DTYPES[name]).double().numpy() for seed in (1, 2))
    acc = np.zeros(20)
    for first in (0, 16, 32):
        part = [np.pad(x[:, first : first + 16], [(0, 0), (0, max(0, first + 16 - 40))]) for x in (a, b)]
        acc = mma_oracle.matrix_step(acc, *part, DTYPES[name])
    assert (mma_oracle.chain(a, b, np.zeros(20), DTYPES[name]) == acc).all()
    assert (mma_oracle.chain(a[:, ::-1], b[:, ::-1], np.zeros(20), DTYPES[name]) != acc).any()


# ---- the row sum, and the whole --------------------------------------------------------------------------------------


def test_n7_lanes_of_the_row_sum():
    p = rounded_exp2(normal((300, 128), 1) - 2)
    got = mma_oracle.lane_sums(p)
    want = []
    for row in p.numpy():
        for t in range(4):
            b = np.float32(0)
            for i in range(16):
                b = b + (row[8 * i + 2 * t] + row[8 * i + 2 * t + 1])
            want.append(b)
    assert bits_differ(got.flatten(), torch.tensor(np.array(want))) == 0
    lanes = [p[:, t::4].double().sum(1).float() for t in range(4)]
    assert all(bits_differ(a, b) > 0 for a, b in itertools.product(lanes, got.unbind(1)))


@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_oracle_is_attention(case):
    """Every mask, length and option, to the accuracy that P has in 16 bits."""
    qkv, keywords = case.inputs()
    out, lse = mma_oracle.attn(*qkv, **keywords, exp2=rounded_exp2)
    exact_out, exact_lse = attn_oracle(*qkv, **keywords, return_lse=True)
    assert out.dtype == qkv[0].dtype
    assert out.shape == exact_out.shape
    assert torch.equal(lse.isinf(), exact_lse.isinf())
    epsilon = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), exact_out, atol=2 * epsilon, rtol=epsilon)
    torch.testing.assert_close(lse.double(), exact_lse, atol=8e-6 + epsilon / 2, rtol=4e-6)


def test_oracle_is_not_the_fma_family():
    """Else nothing would be gained by comparing kernels with it."""
    results = []
    for case in HALF_CASES:
        qkv, keywords = case.inputs()
        ours = mma_oracle.attn(*qkv, **keywords, exp2=rounded_exp2)
        results.append(any(bits_differ(a, b) for a, b in zip(ours, fad.attn(*qkv, **keywords, return_lse=True))))
    assert sum(results) > 0.8 * len(results)


@both
def test_n3_oracle_notices_the_splits(name):
    qkv = [normal((2, n, h, 32), seed, DTYPES[name]) for seed, (n, h) in enumerate([(60, 4), (700, 2), (700, 2)])]
    results = [mma_oracle.attn(*qkv, split_size=size, exp2=rounded_exp2) for size in (128, 256, 1024)]
    pairs = [pair for a, b in itertools.combinations(results, 2) for pair in zip(a, b)]
    assert sum(bits_differ(*pair) for pair in pairs) > 0  # lse need not: sums of rounded p are nearly exact
