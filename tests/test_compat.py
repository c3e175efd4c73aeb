"""The FlashAttention 2.8 names: signatures, results, and what is refused."""

import inspect

import pytest
import torch

import flash_attn_det as fad
from flash_attn_det.testing import assert_bits_equal

# As published in flash_attn 2.8: argument names in order, with their defaults.
DENSE = {
    "q": inspect.Parameter.empty,
    "k": inspect.Parameter.empty,
    "v": inspect.Parameter.empty,
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
VARLEN = {
    **dict.fromkeys(("q", "k", "v", *LENGTHS), inspect.Parameter.empty),
    **{name: default for name, default in DENSE.items() if name not in ("q", "k", "v")},
    "block_table": None,
}


KVCACHE = {
    **dict.fromkeys(("q", "k_cache", "v_cache"), inspect.Parameter.empty),
    **dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad")),
    "block_table": None,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "rotary_interleaved": True,
    "alibi_slopes": None,
    "num_splits": 0,
    "return_softmax_lse": False,
}


@pytest.mark.parametrize(
    ("function", "published"),
    [(fad.flash_attn_func, DENSE), (fad.flash_attn_varlen_func, VARLEN), (fad.flash_attn_with_kvcache, KVCACHE)],
    ids=["dense", "varlen", "kvcache"],
)
def test_signature(function, published):
    parameters = inspect.signature(function).parameters
    assert {name: p.default for name, p in parameters.items()} == published
    assert list(parameters) == list(published)
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters.values())


def dense():
    torch.manual_seed(5)
    return torch.randn(2, 7, 4, 16), torch.randn(2, 90, 2, 16), torch.randn(2, 90, 2, 16)


def packed():
    q, k, v = (x[0] for x in dense())
    return q, k, v, torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([0, 50, 90], dtype=torch.int32)


def test_dense():
    slopes = torch.linspace(0.1, 0.4, 4)
    out, lse, dropped = fad.flash_attn_func(*dense(), 0.0, 0.3, True, (20, 0), 4.0, slopes, True, True)
    want, want_lse = fad.attn(
        *dense(), scale=0.3, causal=True, window=(20, 0), softcap=4.0, alibi_slopes=slopes, return_lse=True
    )
    assert_bits_equal(out, want)
    assert_bits_equal(lse, want_lse)
    assert dropped.shape == (0,)
    assert_bits_equal(fad.flash_attn_func(*dense()), fad.attn(*dense()))


def test_varlen():
    args = packed()
    keywords = dict(causal=True, window_size=(20, 0), return_attn_probs=True)
    out, lse, dropped = fad.flash_attn_varlen_func(*args, 4, 50, **keywords)
    want, want_lse = fad.attn_varlen(*args, causal=True, window=(20, 0), return_lse=True)
    assert_bits_equal(out, want)
    assert_bits_equal(lse, want_lse)
    assert lse.shape == (4, 7)
    assert dropped.shape == (0,)


def test_max_seqlen_does_not_reach_the_bits():
    args = packed()
    assert_bits_equal(fad.flash_attn_varlen_func(*args, 4, 50), fad.flash_attn_varlen_func(*args, 4096, 1 << 20))


def test_dropout_is_refused():
    with pytest.raises(NotImplementedError, match=r"dropout_p is 0\.1: flash_attn_det has no dropout"):
        fad.flash_attn_func(*dense(), dropout_p=0.1)
    with pytest.raises(NotImplementedError, match=r"dropout_p is 0\.1"):
        fad.flash_attn_varlen_func(*packed(), 4, 50, dropout_p=0.1)


def pages(k, v):
    """k and v [1, rows, ...] of two sequences, of 50 and 40 rows, in pages of 10, and their table."""
    order = torch.tensor([5, 2, 8, 0, 7, 1, 3, 6, 4])
    pools = [x.unflatten(0, (9, 10))[order.argsort()] for x in (k, v)]
    table = torch.full((2, 6), -1, dtype=torch.int32)
    table[0, :5], table[1, :4] = order[:5].int(), order[5:].int()
    return *pools, table


def test_varlen_with_block_table():
    q, k, v, cu_q, cu_k = packed()
    *pools, table = pages(k, v)
    keywords = dict(causal=True, window_size=(20, 0), return_attn_probs=True)
    got = fad.flash_attn_varlen_func(q, *pools, cu_q, cu_k, 4, 50, block_table=table, **keywords)
    want = fad.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 4, 50, **keywords)
    for a, b in zip(got, want):
        assert_bits_equal(a, b)


def test_kvcache():
    q, k, v = dense()
    k_cache, v_cache = (torch.full((3, 120, 2, 16), torch.nan) for _ in range(2))
    cos, sin = torch.randn(120, 4), torch.randn(120, 4)
    slopes, entries = torch.linspace(0.1, 0.4, 4), torch.tensor([2, 0], dtype=torch.int32)
    fad.append_kvcache(k_cache, v_cache, k[:, :83], v[:, :83], cache_seqlens=5, cache_batch_idx=entries)
    pad, mine = torch.tensor([5, 5], dtype=torch.int32), [k_cache.clone(), v_cache.clone()]
    out, lse = fad.flash_attn_with_kvcache(
        q, k_cache, v_cache, k[:, 83:], v[:, 83:], cos, sin, 88, entries, pad, None, 0.3, True, (20, 0), 4.0, False,
        slopes, 7, True,
    )  # fmt: skip
    want = fad.attn_with_kvcache(
        q, *mine, k[:, 83:], v[:, 83:], rotary_cos=cos, rotary_sin=sin, rotary_interleaved=False, cache_seqlens=88,
        cache_batch_idx=entries, leftpad_k=pad, scale=0.3, causal=True, window=(20, 0), softcap=4.0,
        alibi_slopes=slopes, return_lse=True,
    )  # fmt: skip
    for a, b in zip((out, lse, k_cache, v_cache), (*want, *mine)):
        assert_bits_equal(a, b)
    assert_bits_equal(fad.flash_attn_with_kvcache(q, k, v), fad.attn(q, k, v))


def test_num_splits_does_not_reach_the_bits():
    q, k, v = dense()
    for n in (0, 1, 5):
        assert_bits_equal(
            fad.flash_attn_with_kvcache(q, k, v, causal=True, num_splits=n), fad.attn(q, k, v, causal=True)
        )


def test_gradients_are_those_of_attn():
    q, k, v = (x.requires_grad_() for x in dense())
    want = torch.autograd.grad(fad.attn(q, k, v, causal=True).sum(), (q, k, v))
    got = torch.autograd.grad(fad.flash_attn_func(q, k, v, causal=True).sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        assert_bits_equal(a, b)
