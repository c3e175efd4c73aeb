"""attn == merge_partials(attn_partials), bit for bit: the fold inside the kernels is the one written in merge.py."""

import math

import pytest
import torch

import flash_attn_det as fad
from flash_attn_det.merge import _log2, _pow2
from flash_attn_det.testing import assert_bits_equal, bits_differ

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(dtype, *, batch=2, rows=6, keys=700, heads=4, kv_heads=2, dim=16, value_dim=24, seed=3):
    torch.manual_seed(seed)
    q = torch.randn(batch, rows, heads, dim, dtype=torch.float64).to(dtype)
    k = torch.randn(batch, keys, kv_heads, dim, dtype=torch.float64).to(dtype)
    v = torch.randn(batch, keys, kv_heads, value_dim, dtype=torch.float64).to(dtype)
    return q, k, v


def assert_fused_is_merged(q, k, v, **keywords):
    out, lse = fad.attn(q, k, v, return_lse=True, **keywords)
    merged, merged_lse = fad.merge_partials(fad.attn_partials(q, k, v, **keywords), return_lse=True)
    assert_bits_equal(merged, out, "out")
    assert_bits_equal(merged_lse, lse, "lse")
    return out, lse


FEATURES = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window=(100, 2)),
    "causal window": dict(causal=True, window=(70, -1)),
    "softcap": dict(softcap=3.0),
    "negative scale": dict(scale=-0.7),
    "slopes": dict(alibi_slopes=torch.linspace(0.01, 0.3, 4), causal=True),
    "sinks": dict(sinks=torch.tensor([-3.0, 0.0, 4.0, 90.0])),
    "lengths": dict(
        seqused_q=torch.tensor([6, 2], dtype=torch.int32),
        seqused_k=torch.tensor([0, 350], dtype=torch.int32),
        leftpad_k=torch.tensor([0, 70], dtype=torch.int32),
        causal=True,
        sinks=torch.tensor([-math.inf, 0.0, 4.0, 90.0]),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("split_size", [128, 256, 1024])
def test_N8_fused_is_merged(dtype, feature, split_size):
    assert_fused_is_merged(*inputs(dtype), split_size=split_size, **FEATURES[feature])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 40, 130])
def test_N8_fused_is_merged_for_any_number_of_rows(dtype, rows):
    assert_fused_is_merged(*inputs(dtype, rows=rows, keys=400), split_size=128, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [30.0, 1e4, 1e-6])
def test_N8_fused_is_merged_for_extreme_scores(dtype, scale):
    """Splits whose references lie so far apart that one is scaled to nothing, or that all carry the same weight."""
    assert_fused_is_merged(*inputs(dtype), split_size=128, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_N9_N11_fused_is_merged_for_nonfinite_inputs(dtype, poison, where):
    q, k, v = inputs(dtype)
    dict(q=q, k=k, v=v)[where][0, -1, 1, 3] = poison
    out, lse = assert_fused_is_merged(q, k, v, split_size=128, causal=True)
    bits = out.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[out.element_size()])
    canonical = torch.full((1,), math.nan, dtype=dtype).view(bits.dtype)
    assert (bits[out.isnan()] == canonical).all()
    assert not out[1].isnan().any(), "the other sequence"
    assert not lse[1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_N9_minus_zero_becomes_zero(dtype):
    q, k, v = inputs(dtype)
    out, _ = assert_fused_is_merged(q, k, torch.full_like(v, -0.0), split_size=128)
    assert_bits_equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 6, 100), (2, 0, 100), (2, 6, 0), (0, 0, 0)])
@pytest.mark.parametrize("sinks", [None, torch.ones(4)], ids=["plain", "sinks"])
def test_N10_empty(dtype, batch, rows, keys, sinks):
    out, lse = assert_fused_is_merged(*inputs(dtype, batch=batch, rows=rows, keys=keys), split_size=128, sinks=sinks)
    assert not out.isnan().any()
    assert_bits_equal(out, torch.zeros_like(out))
    if keys == 0 and sinks is None:
        assert_bits_equal(lse, torch.full_like(lse, -math.inf))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("keys", "count"), [(0, 0), (1, 1), (128, 1), (129, 2), (256, 2), (700, 6)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_shape_and_dtype_of_partials(dtype, keys, count, with_sinks):
    q, k, v = inputs(dtype, keys=keys)
    sinks = torch.ones(4) if with_sinks else None
    o, m, l, out_dtype = fad.attn_partials(q, k, v, split_size=128, sinks=sinks)
    count += with_sinks
    assert o.shape == (count, 2, 6, 4, 24)
    assert m.shape == l.shape == (count, 2, 4, 6)
    assert o.dtype == m.dtype == l.dtype == compute_dtype(dtype)
    assert out_dtype == dtype
    if with_sinks:
        assert_bits_equal(o[-1], torch.zeros_like(o[-1]))
        assert (l[-1] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_N3_states_of_unseen_splits_are_the_empty_state(dtype):
    """Splits behind a causal row, rows past seqused_q, and a sequence without keys."""
    q, k, v = inputs(dtype, rows=6, keys=400)
    sentinel = -(2.0**1022) if dtype == torch.float64 else -(2.0**126)
    used_q, used_k = (torch.tensor(x, dtype=torch.int32) for x in ([6, 2], [3, 400]))
    p = fad.attn_partials(q, k, v, causal=True, split_size=128, seqused_q=used_q, seqused_k=used_k)
    unseen = torch.zeros(4, 2, 4, 6, dtype=torch.bool)  # [C, B, Hq, Sq]
    unseen[1:, 0] = True
    unseen[:, 0, :, :3] = True  # 6 rows, 3 keys: the first three rows stand before every key
    unseen[:, 1, :, 2:] = True
    assert_bits_equal(p.m[unseen], torch.full_like(p.m[unseen], sentinel))
    assert_bits_equal(p.l[unseen], torch.zeros_like(p.l[unseen]))
    o = p.o.transpose(2, 3)[unseen]
    assert_bits_equal(o, torch.zeros_like(o))
    assert (p.l[~unseen] > 0).all()


def test_N6_references_are_integers():
    q, k, v = inputs(torch.float32)
    p = fad.attn_partials(q, k, v, split_size=128)
    assert_bits_equal(p.m, p.m.round())


def test_partials_of_pieces_are_the_partials_of_the_whole():
    """A state depends on its own keys only, so that splits computed apart can be joined, in order."""
    q, k, v = inputs(torch.float32, keys=512)
    whole = fad.attn_partials(q, k, v, split_size=128)
    first, second = (fad.attn_partials(q, k[:, s], v[:, s], split_size=128) for s in (slice(0, 256), slice(256, 512)))
    joined = fad.Partials(*(torch.cat([a, b]) for a, b in zip(first[:3], second[:3], strict=True)), torch.float32)
    for got, want in zip(joined[:3], whole[:3], strict=True):
        assert_bits_equal(got, want)
    out = fad.merge_partials(joined)
    assert_bits_equal(out, fad.attn(q, k, v, split_size=128))
    descending = fad.Partials(*(x.flip(0) for x in whole[:3]), torch.float32)
    assert bits_differ(fad.merge_partials(descending), out) > 0


def test_merge_refuses_what_does_not_belong_together():
    p = fad.attn_partials(*inputs(torch.float32), split_size=128)
    with pytest.raises(ValueError, match=r"partials have o \(6, 2, 6, 4, 24\), m \(5, 2, 4, 6\)"):
        fad.merge_partials(p._replace(m=p.m[:5]))
    with pytest.raises(TypeError, match=r"partials have dtypes torch\.float32, torch\.float64, torch\.float32"):
        fad.merge_partials(p._replace(m=p.m.double()))
    with pytest.raises(TypeError, match="expected float32 or float64 for all"):
        fad.merge_partials(fad.Partials(*(x.half() for x in p[:3]), torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_N8_pow2_is_exact(dtype):
    lowest = -1022 if dtype == torch.float64 else -126
    d = torch.arange(lowest - 3, 1, dtype=dtype)
    want = torch.tensor([2.0**n if n >= lowest else 0.0 for n in d.tolist()], dtype=dtype)
    assert_bits_equal(_pow2(d), want)
    far = torch.tensor([-1e6, torch.finfo(dtype).min, -math.inf], dtype=dtype)
    assert_bits_equal(_pow2(far), torch.zeros_like(far))
    assert_bits_equal(_pow2(torch.full((1,), math.nan, dtype=dtype)), torch.ones(1, dtype=dtype))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2.0**-24), (torch.float64, 2.0**-53)])
def test_N9_log2_is_accurate(dtype, bound):
    torch.manual_seed(0)
    near_one = torch.rand(100_000, dtype=torch.float64) + 0.5
    x = torch.cat([near_one, torch.logspace(-30, 30, 10_001, dtype=torch.float64)]).to(dtype)
    want = torch.tensor([math.log2(v) for v in x.tolist()], dtype=torch.float64)
    error = (_log2(x).double() - want).abs()
    assert (error <= bound + 3 * torch.finfo(dtype).eps * want.abs()).all()
    powers = torch.tensor([0.25, 1.0, 1024.0], dtype=dtype)
    assert_bits_equal(_log2(powers), torch.tensor([-2.0, 0.0, 10.0], dtype=dtype))
