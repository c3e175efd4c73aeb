"""Properties that hold for any call: shapes, masks, options, strides, schedules and poisons drawn by hypothesis."""

import math

import torch
from cases import DTYPES, normal
from hypothesis import given
from hypothesis import strategies as st

import flash_attn_det as fad
from flash_attn_det import _schedule
from flash_attn_det.reference import attn_reference
from flash_attn_det.testing import assert_bits_equal


@st.composite
def calls(draw, *, lengths=True, special=True):
    """((q, k, v), keywords of attn)"""
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    B, Hk, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    Sq, Sk = draw(st.integers(1, 40)), draw(st.integers(0, 500))
    D, Dv, Hq = draw(st.integers(1, 20)), draw(st.integers(1, 36)), Hk * group
    seed = draw(st.integers(0, 1 << 20))
    gain = draw(st.sampled_from([1.0, 1.0, 1e-3, 30.0] if dtype == torch.float16 else [1.0, 1.0, 1e3, 1e8, 1e-30]))
    q = (gain * normal((B, Sq, Hq, D), seed, torch.float64)).to(dtype)
    k, v = normal((B, Sk, Hk, D), seed + 1, dtype), normal((B, Sk, Hk, Dv), seed + 2, dtype)
    side = st.one_of(st.just(-1), st.integers(0, 200))
    keywords = {
        "causal": draw(st.booleans()),
        "window": draw(st.tuples(side, side)),
        "split_size": draw(st.sampled_from([128, 256, 384, 640])),
    }
    if draw(st.booleans()):
        keywords["scale"] = draw(st.sampled_from([1.0, 0.3, -0.7, 0.0, 1e-4]))
    if draw(st.integers(0, 3)) == 0:
        keywords["softcap"] = draw(st.sampled_from([0.5, 5.0, 50.0]))
    if draw(st.integers(0, 3)) == 0:
        keywords["alibi_slopes"] = normal(draw(st.sampled_from([(Hq,), (B, Hq)])), seed + 3, compute)
    if draw(st.integers(0, 3)) == 0:
        keywords["sinks"] = normal((Hq,), seed + 4, compute) * 3
    if lengths:
        per_batch = {"k_pos": st.integers(0, 300), "seqused_q": st.integers(0, Sq), "leftpad_k": st.integers(0, Sk)}
        for name, value in per_batch.items():
            if draw(st.integers(0, 2)) == 0:
                keywords[name] = torch.tensor([draw(value) for _ in range(B)], dtype=torch.int32)
        if draw(st.integers(0, 2)) == 0:
            pads = keywords.get("leftpad_k", torch.zeros(B, dtype=torch.int32)).tolist()
            used = [draw(st.integers(0, Sk - pad)) for pad in pads]
            keywords["seqused_k"] = torch.tensor(used, dtype=torch.int32)
    if special:
        for x in (q, k, v):
            for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
                if x.numel():
                    value = draw(st.sampled_from([math.nan, math.inf, -math.inf, torch.finfo(dtype).max, -0.0]))
                    x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    return (q, k, v), keywords


@st.composite
def schedules(draw):
    return {
        "isa": draw(st.sampled_from([None, *_schedule.isas()])),
        "layout": draw(st.sampled_from([None, "rows", "keys"])),
        "tile_rows": draw(st.one_of(st.none(), st.integers(1, 256))),
        "split_parallel": draw(st.sampled_from([None, False, True])),
    }


def attention(qkv, keywords):
    return fad.attn(*qkv, **keywords, return_lse=True)


def assert_same(actual, expected):
    for got, want, name in zip(actual, expected, ("out", "lse")):
        assert_bits_equal(got, want, name)


@given(calls(), schedules())
def test_n7_any_call_equals_the_reference_under_any_schedule(call, schedule):
    qkv, keywords = call
    expected = attn_reference(*qkv, **keywords, return_lse=True)
    with _schedule.forced(**schedule):
        assert_same(attention(qkv, keywords), expected)


@given(calls(), st.integers(0, 2))
def test_n1_any_sequence_is_the_same_alone(call, b):
    (q, k, v), keywords = call
    b %= q.shape[0]
    out, lse = attention((q, k, v), keywords)
    one = {}
    for name, value in keywords.items():
        batched = isinstance(value, torch.Tensor) and (value.ndim == 2 or name not in ("alibi_slopes", "sinks"))
        one[name] = value[b : b + 1] if batched else value
    assert_same(attention([x[b : b + 1] for x in (q, k, v)], one), (out[b : b + 1], lse[b : b + 1]))


@given(calls(), st.integers(0, 40))
def test_n1_any_cut_of_the_query_rows(call, cut):
    """Rows of a call, some of them in one call and the rest in another that has no key beyond its own last position."""
    (q, k, v), keywords = call
    keywords = {**keywords, "causal": True}
    keywords.pop("seqused_q", None)
    keywords.pop("leftpad_k", None)
    keywords.pop("seqused_k", None)
    Sq, Sk = q.shape[1], k.shape[1]
    cut = min(cut, Sq)
    kept = Sk - (Sq - cut)
    if kept < 0:
        return  # the first rows would stand before every key, which a shorter call cannot say
    out, lse = attention((q, k, v), keywords)
    assert_same(attention((q[:, :cut], k[:, :kept], v[:, :kept]), keywords), (out[:, :cut], lse[:, :, :cut]))
    assert_same(attention((q[:, cut:], k, v), keywords), (out[:, cut:], lse[:, :, cut:]))


@given(calls(), st.permutations(range(4)), st.integers(1, 3), st.integers(0, 9))
def test_n1_any_strides(call, order, step, extra):
    qkv, keywords = call

    def scattered(x):
        """The same numbers in a buffer whose dimensions lie in another order, with gaps full of NaN."""
        order_of_rest = [d for d in order if d != 3]
        shape = [x.shape[d] * step for d in order_of_rest] + [x.shape[3] + extra]
        buffer = torch.full(shape, math.nan, dtype=x.dtype)[::step, ::step, ::step, : x.shape[3]]
        back = [order_of_rest.index(d) for d in range(3)]
        return buffer.permute(*back, 3).copy_(x)

    assert_same(attention([scattered(x) for x in qkv], keywords), attention(qkv, keywords))


@given(calls(), st.integers(0, 130), st.sampled_from([math.nan, math.inf, 3.0]))
def test_n4_any_tail_behind_the_keys(call, tail, value):
    (q, k, v), keywords = call
    if "seqused_k" not in keywords:
        pads = keywords.get("leftpad_k", torch.zeros(q.shape[0], dtype=torch.int32))
        keywords = {**keywords, "seqused_k": (k.shape[1] - pads).int()}
    longer = [torch.cat([x, x.new_full((x.shape[0], tail, *x.shape[2:]), value)], 1) for x in (k, v)]
    assert_same(attention((q, *longer), keywords), attention((q, k, v), keywords))


@given(calls(lengths=False))
def test_n8_any_fold_in_torch(call):
    qkv, keywords = call
    merged = fad.merge_partials(fad.attn_partials(*qkv, **keywords), return_lse=True)
    assert_same(merged, attention(qkv, keywords))


@given(calls(lengths=False, special=False))
def test_n9_weights_of_any_row_sum_to_one(call):
    """With values of 1 every row that sees a key gives 1, and without one 0."""
    (q, k, v), keywords = call
    keywords.pop("sinks", None)
    out, lse = attention((q, k, torch.ones_like(v)), keywords)
    seen = (lse > -math.inf).transpose(1, 2)[..., None].expand_as(out)
    assert torch.equal(out[~seen], torch.zeros_like(out[~seen]))
    torch.testing.assert_close(out[seen], torch.ones_like(out[seen]), atol=1e-5, rtol=1e-5)
