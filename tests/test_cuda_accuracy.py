"""Errors of the mma family against float64: beside torch's flash attention, and against what 16 bits allow.

Both round P and the result to 16 bits. A number is in error by up to u of its size then, u being half the dtype's
epsilon, and by 0.425 u in the root mean square over significands of every size (uniform in the logarithm). So where
torch has no such call, the expected error is known: that of the result, and that of every weight times its value.

Flash attention's largest p of a row is 1, which 16 bits hold; here references are integers (N6), it lies between 2^-1/2
and 2^1/2, and is rounded like any other. But l sums p as rounded (N7), so that where one key outweighs the rest the
quotient does not see it. lse does, and is in error by up to u.
"""

import math

import pytest
import torch
from cases import normal
from cuda_tools import every_16_bit_dtype, int32, moved, needs_gpu
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn_det as fad
from flash_attn_det.reference import attn_oracle

pytestmark = needs_gpu

ROUNDING = 0.425  # root mean square of a rounding error, in u of the number


def octaves(j):
    """Sizes of keys, 2^-8 .. 2^8, in no order."""
    return (2.0 ** (7 * j % 17 - 8))[:, None, None]


def tensors(dtype, B=2, Sq=1024, Sk=1024, Hq=4, Hk=4, D=64, Dv=None, gain=1.0, spread=False):
    shapes = ((B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv or D))
    q, k, v = (normal(shape, seed, torch.float64) for seed, shape in enumerate(shapes, 1))
    v = v * octaves(torch.arange(Sk)) if spread else v
    return moved([x.to(dtype) for x in (gain * q, k, v)])


def rms(x):
    return float(x.double().square().mean().sqrt())


def weights_of(q, k, **options):
    """The float64 oracle's weights [B, Sq, Hq, Sk]: what it makes of values that tell keys apart."""
    B, Sk, Hk, _ = k.shape
    names = torch.eye(Sk, dtype=torch.float64, device=k.device)[None, :, None].expand(B, Sk, Hk, Sk)
    return attn_oracle(q.double(), k.double(), names, **options)


def per_query_head(v, q):
    return v.double().repeat_interleave(q.shape[2] // v.shape[2], 2)


def flash(q, k, v, causal=False):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2)


COMPARED = {
    **{f"D {D}": dict(D=D) for D in (32, 64, 96, 128, 192, 256)},
    "groups": dict(Hq=8, Hk=2),
    "decode": dict(B=4, Sq=1, Sk=3000, Hq=8, Hk=2, D=128),
    "short": dict(B=8, Sq=64, Sk=64),
    "large logits": dict(gain=8.0),
    "values of many sizes": dict(spread=True),
}
COMPARED |= {f"{name}, causal": {**shape, "causal": True} for name, shape in COMPARED.items() if shape.get("Sq") != 1}


@every_16_bit_dtype
@pytest.mark.parametrize("shape", COMPARED.values(), ids=COMPARED)
def test_error_is_that_of_flash_attention(dtype, shape):
    """The root mean square is within a tenth. The maximum is within 2.5 times: flash attention's largest p of a row is
    exact, ours is rounded, so that a row with one or two heavy keys meets up to twice flash's error (that of p and that
    of the result); and a maximum over many elements depends on chance. Measured: up to 2.0 times."""
    shape = dict(shape)
    causal = shape.pop("causal", False)
    q, k, v = tensors(dtype, **shape)
    exact = attn_oracle(q, k, v, causal=causal)
    ours = fad.attn(q, k, v, causal=causal).double() - exact
    theirs = flash(q, k, v, causal).double() - exact
    assert rms(ours) <= 1.1 * rms(theirs)
    assert ours.abs().max() <= 2.5 * theirs.abs().max()


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (100, 20)},
    "causal window": {"causal": True, "window": (70, -1)},
    "softcap": {"softcap": 3.0, "gain": 4.0},
    "alibi": {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0])},
    "sinks": {"sinks": torch.tensor([-3.0, 0.0, 3.0, 8.0])},
    "negative scale": {"scale": -0.2},
    "lengths": {"seqused_k": int32(511, 65), "seqused_q": int32(512, 60), "causal": True},
    "large logits": {"gain": 8.0},
    "small splits": {"split_size": 128},
}


@every_16_bit_dtype
@pytest.mark.parametrize(("D", "Dv"), [(64, 64), (128, 40), (40, 200)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_error_is_that_of_one_rounding_of_p_and_one_of_the_result(dtype, options, D, Dv):
    options = moved(dict(options))
    gain = options.pop("gain", 1.0)
    q, k, v = tensors(dtype, Sq=512, Sk=512, Hk=2, D=D, Dv=Dv, gain=gain)
    exact, exact_lse = attn_oracle(q, k, v, **options, return_lse=True)
    out, lse = fad.attn(q, k, v, **options, return_lse=True)
    weights, values = weights_of(q, k, **{"scale": 1 / math.sqrt(D), **options}), per_query_head(v, q)
    u = torch.finfo(dtype).eps / 2
    error = out.double() - exact
    spread = torch.einsum("bihj,bjhd->bihd", weights.square(), values.square()).sqrt()
    assert rms(error) <= 1.1 * ROUNDING * u * math.hypot(rms(exact), rms(spread))
    # And each by itself: u of the result, u of each weight; a p below the normal numbers of fp16 is off by 2^-25 of p's
    # largest; and scores are sums of D products in fp32.
    share = torch.einsum("bihj,bjhd->bihd", weights, values.abs())
    lost = 2.0**-24 * 512 * float(values.abs().max()) if dtype == torch.float16 else 0.0
    assert (error.abs() <= 1.01 * (u * exact.abs() + (u + 1e-4 * gain) * share) + lost).all()
    seen = exact_lse.isfinite()
    assert torch.equal(seen, lse.isfinite())
    assert (lse.double() - exact_lse)[seen].abs().max() <= 1e-5 * gain + u


@every_16_bit_dtype
def test_error_does_not_grow_with_the_number_of_splits(dtype):
    """Split states are fp32: 32 of them are folded with hardly more error than one."""
    q, k, v = tensors(dtype, Sq=64, Sk=4096)
    exact = attn_oracle(q, k, v)
    many, one = (rms(fad.attn(q, k, v, split_size=size).double() - exact) for size in (128, 4096))
    assert many <= 1.02 * one


@every_16_bit_dtype
def test_bound_notices_one_more_rounding(dtype):
    """The control: the same attention whose splits are rounded to 16 bits before they are folded. Of ordinary logits:
    where one key outweighs the rest, the last rounding undoes that one."""
    q, k, v = tensors(dtype, Sq=512, Sk=512)
    exact = attn_oracle(q, k, v)
    o, m, l, _ = fad.attn_partials(q, k, v, split_size=128)
    coarse = fad.merge_partials(fad.Partials(o.to(dtype).float(), m, l, dtype))
    spread = torch.einsum("bihj,bjhd->bihd", weights_of(q, k).square(), per_query_head(v, q).square()).sqrt()
    bound = 1.1 * ROUNDING * torch.finfo(dtype).eps / 2 * math.hypot(rms(exact), rms(spread))
    assert rms(fad.attn(q, k, v, split_size=128).double() - exact) <= bound < rms(coarse.double() - exact)
