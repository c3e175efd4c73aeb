"""Errors against the float64 oracle: beside torch's own attention, and at the ends of the number range."""

import math

import pytest
import torch
from cases import DTYPES, normal

import flash_attn_det as fad
from flash_attn_det import _schedule
from flash_attn_det.reference import attn_oracle, attn_reference
from flash_attn_det.testing import assert_bits_equal

EPSILON = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()}


def tensors(Sq=8, Sk=600, D=64, dtype=torch.float32, gain=1.0):
    q = (gain * normal((2, Sq, 4, D), 1, torch.float64)).to(dtype)
    return q, normal((2, Sk, 2, D), 2, dtype), normal((2, Sk, 2, D), 3, dtype)


def sdpa(q, k, v):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)


def errors(out, exact):
    difference = (out.double() - exact).abs()
    return float(difference.max()), float(difference.square().mean().sqrt())


def with_both_layouts(*qkv, **keywords):
    """out and lse, the same from both layouts."""
    results = []
    for layout in ("rows", "keys"):
        with _schedule.forced(layout=layout):
            results.append(fad.attn(*qkv, **keywords, return_lse=True))
    assert_bits_equal(results[1][0], results[0][0], "out")
    assert_bits_equal(results[1][1], results[0][1], "lse")
    return results[0]


@pytest.mark.parametrize("Sk", [100, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_no_larger_than_twice_that_of_torch(dtype, Sk):
    qkv = tensors(Sk=Sk, dtype=DTYPES[dtype])
    exact = attn_oracle(*qkv)
    largest, rms = errors(fad.attn(*qkv), exact)
    torch_largest, torch_rms = errors(sdpa(*qkv), exact)
    assert rms <= 2 * torch_rms
    assert largest <= 3 * torch_largest


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_n9_16_bit_results_are_rounded_once(dtype):
    """Almost every result is the oracle's, rounded: everything in between is fp32."""
    qkv = tensors(Sq=64, dtype=DTYPES[dtype])
    out, exact = fad.attn(*qkv), attn_oracle(*qkv)
    share = (out != exact.to(DTYPES[dtype])).double().mean()
    assert share < {"fp16": 0.01, "bf16": 0.002}[dtype]
    assert ((out.double() - exact).abs() <= 0.51 * EPSILON[dtype] * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("gain", [1e3, 1e6, 1e8, 1e15, 1e30])
def test_n6_large_logits(dtype, gain):
    """Beyond |t| = 2^22 (2^51) the reference is a rounded product. One key wins; nothing overflows."""
    qkv = tensors(dtype=DTYPES[dtype], gain=gain)
    out, lse = with_both_layouts(*qkv)
    exact, exact_lse = attn_oracle(*qkv, return_lse=True)
    assert out.isfinite().all()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=100 * EPSILON[dtype], atol=0)
    # Where the best key wins by far more than the rounding of the scores, the result is its value.
    scores = torch.einsum("bihd,bjhd->bhij", qkv[0].double(), qkv[1].repeat_interleave(2, 2).double()) / 8
    best = scores.topk(2).values
    clear = (best[..., 0] - best[..., 1] > 40 + 1000 * EPSILON[dtype] * best[..., 0].abs()).transpose(1, 2)
    assert clear.double().mean() > 0.5
    torch.testing.assert_close(out.double()[clear], exact[clear], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("size", [50.0, 1e4, 1e7, 1e12, 1e30])
def test_n6_all_scores_hugely_negative(dtype, size):
    q = torch.full((1, 2, 2, 1), size, dtype=DTYPES[dtype])
    k = torch.full((1, 400, 1, 1), -1.0, dtype=DTYPES[dtype])
    v = normal((1, 400, 1, 32), 4, DTYPES[dtype])
    out, lse = with_both_layouts(q, k, v, split_size=128)
    exact, exact_lse = attn_oracle(q, k, v, return_lse=True)
    tolerance = 4 * EPSILON[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=4 * EPSILON["fp64" if dtype == "fp64" else "fp32"], atol=0)


def test_n6_scores_below_the_sentinel_count_as_minus_infinity():
    """Below -2^126 in base 2 there is no room under the empty state's reference: such a row is empty (N10)."""
    k = torch.full((1, 70, 1, 1), -1.0)
    out, lse = with_both_layouts(torch.full((1, 1, 1, 1), 3e38), k, torch.ones(1, 70, 1, 3), scale=0.5)
    assert_bits_equal(out, torch.zeros(1, 1, 1, 3))
    assert_bits_equal(lse, torch.full((1, 1, 1), -math.inf))


@pytest.mark.parametrize("dtype", DTYPES)
def test_n10_scores_of_minus_infinity(dtype):
    """q.k = -inf is a visible key of probability 0; a row of nothing else is empty."""
    q, k, v = tensors(Sq=2, Sk=90, D=4, dtype=DTYPES[dtype])
    q[..., 0] = 1
    k[:, 10:, :, 0] = -math.inf
    out, lse = with_both_layouts(q, k, v)
    few, few_lse = with_both_layouts(q, k[:, :10], v[:, :10])
    assert_bits_equal(out, few)
    assert_bits_equal(lse, few_lse)
    k[..., 0] = -math.inf
    out, lse = with_both_layouts(q, k, v)
    assert_bits_equal(out, torch.zeros_like(out))
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_n11_score_of_plus_infinity_is_nan(dtype):
    q, k, v = tensors(Sq=3, Sk=90, D=4, dtype=DTYPES[dtype])
    q[..., 0] = 1
    k[:, 50, :, 0] = math.inf
    out, lse = with_both_layouts(q, k, v)
    assert out.isnan().all()
    assert lse.isnan().all()


def test_subnormal_values_are_kept():
    q, k, v = tensors(Sq=3, Sk=300, D=16)
    v = v * 2.0**-130
    out, _ = with_both_layouts(q, k, v)
    exact = attn_oracle(q, k, v)
    assert (out != 0).double().mean() > 0.9
    assert (out.double() - exact).abs().max() <= 2.0**-149 * 20  # of the terms' own rounding
    assert_bits_equal(out, attn_reference(q, k, v))


def test_n9_no_negative_zero():
    """A third of the smallest negative number rounds to -0, which is stored as 0."""
    v = torch.zeros(1, 3, 1, 20)
    v[:, 0] = -(2.0**-149)
    out, _ = with_both_layouts(torch.zeros(1, 1, 1, 4), torch.zeros(1, 3, 1, 4), v)
    assert_bits_equal(out, torch.zeros(1, 1, 1, 20))


def test_n8_error_does_not_grow_with_the_number_of_splits():
    qkv = tensors(Sq=2, Sk=8192, D=32)
    exact = attn_oracle(*qkv)
    many, one = (errors(fad.attn(*qkv, split_size=size), exact)[1] for size in (128, 8192))
    assert many <= 1.5 * one
