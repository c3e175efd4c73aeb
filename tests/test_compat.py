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


@pytest.mark.parametrize(
    ("function", "published"),
    [(fad.flash_attn_func, DENSE), (fad.flash_attn_varlen_func, VARLEN)],
    ids=["dense", "varlen"],
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


def test_block_table_is_refused():
    with pytest.raises(NotImplementedError, match="block_table is given: flash_attn_det has no paged keys"):
        fad.flash_attn_varlen_func(*packed(), 4, 50, block_table=torch.zeros(2, 1, dtype=torch.int32))


def test_grad_is_refused():
    q, k, v = dense()
    with pytest.raises(NotImplementedError, match="flash_attn_det has no backward yet, but q requires grad"):
        fad.flash_attn_func(q.requires_grad_(), k, v)
