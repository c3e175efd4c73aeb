"""The packed FlashAttention 2.8 names: the bits of the unpacked ones, and the answers that FlashAttention documents."""

import inspect

import pytest
import torch

import flash_attn_det as fad
from flash_attn_det.reference import attn_oracle, attn_varlen_oracle
from flash_attn_det.testing import assert_bits_equal, bits_differ

REQUIRED = inspect.Parameter.empty
OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
# As published in flash_attn 2.8: argument names in order, with their defaults.
PUBLISHED = {
    "flash_attn_qkvpacked_func": ("qkv",),
    "flash_attn_kvpacked_func": ("q", "kv"),
    "flash_attn_varlen_qkvpacked_func": ("qkv", "cu_seqlens", "max_seqlen"),
    "flash_attn_varlen_kvpacked_func": ("q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
}
# Options under FlashAttention's names, and under those of attn.
CALLS = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "scale": ({"softmax_scale": 0.3}, {"scale": 0.3}),
    "window": ({"window_size": (20, 5)}, {"window": (20, 5)}),
    "causal window softcap": (
        {"causal": True, "window_size": (70, 0), "softcap": 4.0},
        {"causal": True, "window": (70, 0), "softcap": 4.0},
    ),
    "alibi": ({"alibi_slopes": torch.linspace(0.1, 0.4, 4)}, {"alibi_slopes": torch.linspace(0.1, 0.4, 4)}),
}
LENGTHS_Q, LENGTHS_K = (3, 0, 130), (50, 40, 200)  # more than one block of keys; bottom-right alignment; no rows


@pytest.mark.parametrize("name", PUBLISHED)
def test_signature(name):
    parameters = inspect.signature(getattr(fad, name)).parameters
    published = {**dict.fromkeys(PUBLISHED[name], REQUIRED), **OPTIONS}
    assert {name: p.default for name, p in parameters.items()} == published
    assert list(parameters) == list(published)
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters.values())


def cumulative(lengths):
    return torch.tensor((0, *lengths)).cumsum(0).int()


def call(name, options):
    """(results of a packed form, q, k, v as it must read them, lengths that attn_varlen needs besides)."""
    g = torch.Generator().manual_seed(7)
    if name == "flash_attn_qkvpacked_func":
        qkv = torch.randn(2, 150, 3, 4, 16, generator=g)
        return fad.flash_attn_qkvpacked_func(qkv, **options), [qkv[:, :, i] for i in range(3)], ()
    if name == "flash_attn_kvpacked_func":
        q, kv = torch.randn(2, 7, 4, 16, generator=g), torch.randn(2, 150, 2, 2, 16, generator=g)
        return fad.flash_attn_kvpacked_func(q, kv, **options), [q, kv[:, :, 0], kv[:, :, 1]], ()
    cu_q, cu_k = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    if name == "flash_attn_varlen_qkvpacked_func":
        qkv = torch.randn(sum(LENGTHS_K), 3, 4, 16, generator=g)
        out = fad.flash_attn_varlen_qkvpacked_func(qkv, cu_k, max(LENGTHS_K), **options)
        return out, [qkv[:, i] for i in range(3)], (cu_k, cu_k)
    q, kv = torch.randn(sum(LENGTHS_Q), 4, 16, generator=g), torch.randn(sum(LENGTHS_K), 2, 2, 16, generator=g)
    out = fad.flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, max(LENGTHS_Q), max(LENGTHS_K), **options)
    return out, [q, kv[:, 0], kv[:, 1]], (cu_q, cu_k)


@pytest.mark.parametrize("options", CALLS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_bits_of_the_unpacked_form_and_the_answer_of_the_oracle(name, options):
    theirs, ours = CALLS[options]
    (out, lse, dropped), qkv, lengths = call(name, {**theirs, "return_attn_probs": True})
    function, oracle = (fad.attn_varlen, attn_varlen_oracle) if lengths else (fad.attn, attn_oracle)
    want, want_lse = function(*qkv, *lengths, **ours, return_lse=True)
    assert_bits_equal(out, want)
    assert_bits_equal(lse, want_lse)
    assert dropped.shape == (0,)
    exact, exact_lse = oracle(*qkv, *lengths, **ours, return_lse=True)
    assert (out - exact).abs().max() < 2e-6
    assert (lse - exact_lse).abs().max() < 2e-6
    q, k, v = qkv
    assert bits_differ(function(q, v, k, *lengths, **ours), out) > 0, "these inputs would not notice k and v exchanged"


@pytest.mark.parametrize("name", PUBLISHED)
def test_out_alone_by_default(name):
    out, qkv, lengths = call(name, {})
    assert_bits_equal(out, (fad.attn_varlen if lengths else fad.attn)(*qkv, *lengths))


@pytest.mark.parametrize("name", PUBLISHED)
def test_dropout_is_refused(name):
    with pytest.raises(NotImplementedError, match=r"dropout_p is 0\.25: .*expected 0.*what was drawn before"):
        call(name, {"dropout_p": 0.25})


def test_nothing_is_copied():
    qkv = torch.randn(2, 40, 3, 4, 16)
    seen = []
    with fad.ops.observed_by(lambda arguments, results: seen.extend(arguments[:3])):
        fad.flash_attn_qkvpacked_func(qkv)
    assert [t.data_ptr() for t in seen] == [qkv[:, :, i].data_ptr() for i in range(3)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fad.flash_attn_qkvpacked_func(torch.zeros(2, 9, 2, 4, 16)), ValueError, "qkv has shape .*3, H, D"),
        (lambda: fad.flash_attn_qkvpacked_func(torch.zeros(9, 3, 4, 16)), ValueError, r"expected \[B, S, 3, H, D\]"),
        (lambda: fad.flash_attn_qkvpacked_func([1]), TypeError, "qkv must be a torch.Tensor, got list"),
        (
            lambda: fad.flash_attn_kvpacked_func(torch.zeros(2, 9, 4, 16), torch.zeros(2, 9, 3, 4, 16)),
            ValueError,
            r"kv has shape \[2, 9, 3, 4, 16\], expected \[B, Sk, 2, Hk, D\]",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
