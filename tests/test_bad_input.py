"""Wrong calls: the type and the message of what is raised. Nothing crashes, nothing is silently wrong.

Every refusal must leave the library usable, which a good call after it checks.
"""

import math
import re

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import flash_attn_det as fad
from flash_attn_det import ops
from flash_attn_det.attention import _arguments
from flash_attn_det.testing import assert_bits_equal


def q(batch=2, rows=5, heads=4, dim=16, **keywords):
    return torch.ones(batch, rows, heads, dim, **keywords)


def kv(batch=2, rows=70, heads=2, dim=16, **keywords):
    return torch.ones(batch, rows, heads, dim, **keywords)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.fixture(autouse=True)
def _a_good_call_still_works():
    yield
    assert_bits_equal(fad.attn(q(), kv(), kv()), q())


def refused(error, message, function, *args, **keywords):
    with pytest.raises(error, match=f"^{re.escape(message)}") as caught:
        function(*args, **keywords)
    assert caught.type is error


DENSE = [
    # ranks
    (ValueError, "q has 3 dimensions, expected 4: [batch, rows, heads, head_dim]", (q()[0], kv(), kv()), {}),
    (ValueError, "k has 3 dimensions, expected 4", (q(), kv()[0], kv()), {}),
    (ValueError, "v has 5 dimensions, expected 4", (q(), kv(), kv()[None]), {}),
    (ValueError, "q has 0 dimensions, expected 4", (torch.ones(()), kv(), kv()), {}),
    # shapes that do not agree
    (ValueError, "q has batch 2, k has 3, v has 2: expected one batch size", (q(), kv(batch=3), kv()), {}),
    (ValueError, "q has batch 2, k has 2, v has 1: expected one batch size", (q(), kv(), kv(batch=1)), {}),
    (ValueError, "k has 70 rows, v has 71", (q(), kv(), kv(rows=71)), {}),
    (ValueError, "k has 2 heads, v has 1", (q(), kv(), kv(heads=1)), {}),
    (ValueError, "k has head dim 24, q has 16", (q(), kv(dim=24), kv()), {}),
    # heads
    (ValueError, "q has 4 heads, k and v have 3: expected a positive", (q(), kv(heads=3), kv(heads=3)), {}),
    (ValueError, "q has 2 heads, k and v have 4: expected a positive", (q(heads=2), kv(heads=4), kv(heads=4)), {}),
    (ValueError, "q has 0 heads, k and v have 2: expected a positive", (q(heads=0), kv(), kv()), {}),
    (ValueError, "q has 4 heads, k and v have 0: expected a positive", (q(), kv(heads=0), kv(heads=0)), {}),
    # head dims
    (ValueError, "head dim of q and k is 0, expected 1 to 256", (q(dim=0), kv(dim=0), kv()), {}),
    (ValueError, "head dim of q and k is 257, expected 1 to 256", (q(dim=257), kv(dim=257), kv()), {}),
    (ValueError, "head dim of v is 0, expected 1 to 256", (q(), kv(), kv(dim=0)), {}),
    (ValueError, "head dim of v is 257, expected 1 to 256", (q(), kv(), kv(dim=257)), {}),
    # dtypes
    (TypeError, "q has dtype torch.int64, expected float32, float16, bfloat16", (q().long(), kv(), kv()), {}),
    (TypeError, "k has dtype torch.int32, expected float32", (q(), kv().int(), kv()), {}),
    (TypeError, "v has dtype torch.bool, expected float32", (q(), kv(), kv().bool()), {}),
    (TypeError, "q has dtype torch.complex64, expected float32", (q(dtype=torch.complex64), kv(), kv()), {}),
    (TypeError, "q has dtype torch.float8_e4m3fn, expected float32", (q().to(torch.float8_e4m3fn), kv(), kv()), {}),
    (TypeError, "k has dtype torch.float16, q has torch.float32: expected one dtype", (q(), kv().half(), kv()), {}),
    (TypeError, "v has dtype torch.float64, q has torch.bfl", (q().bfloat16(), kv().bfloat16(), kv().double()), {}),
    # what is no dense tensor
    (TypeError, "q must be a torch.Tensor, got ndarray", (np.ones((2, 5, 4, 16), np.float32), kv(), kv()), {}),
    (TypeError, "k must be a torch.Tensor, got NoneType", (q(), None, kv()), {}),
    (TypeError, "v must be a torch.Tensor, got list", (q(), kv(), [1.0]), {}),
    (TypeError, "q has layout torch.sparse_coo, expected torch.strided", (q().to_sparse(), kv(), kv()), {}),
    # devices
    (ValueError, "k is on meta, q is on cpu: expected one device", (q(), kv(device="meta"), kv()), {}),
    (ValueError, "k is on cpu, q is on meta: expected one device", (q(device="meta"), kv(), kv()), {}),
    (ValueError, "sinks is on meta, q is on cpu", (q(), kv(), kv()), dict(sinks=torch.ones(4, device="meta"))),
    (ValueError, "seqused_k is on meta, q is on cpu", (q(), kv(), kv()), dict(seqused_k=ints(1, 1).to("meta"))),
]  # fmt: skip

OPTIONS = [
    # split size
    (ValueError, "split_size is 0, expected a positive multiple of 128", dict(split_size=0)),
    (ValueError, "split_size is -128, expected a positive multiple of 128", dict(split_size=-128)),
    (ValueError, "split_size is 64, expected a positive multiple of 128", dict(split_size=64)),
    (ValueError, f"split_size is {1 << 50}, expected", dict(split_size=1 << 50)),
    (TypeError, "split_size must be an int, got float", dict(split_size=128.0)),
    # window
    (ValueError, "left window is -2, expected -1 (unbounded) or 0", dict(window=(-2, 0))),
    (ValueError, "right window is -7, expected -1 (unbounded) or 0", dict(window=(0, -7))),
    (ValueError, f"left window is {1 << 62}, expected", dict(window=(1 << 62, 0))),
    (TypeError, "window must be a pair of ints (left, right), got 5", dict(window=5)),
    (TypeError, "window must be a pair of ints (left, right), got (1, 2, 3)", dict(window=(1, 2, 3))),
    (TypeError, "window must be a pair of ints (left, right), got (1.5, 0)", dict(window=(1.5, 0))),
    (TypeError, "window must be a pair of ints (left, right), got (None, 0)", dict(window=(None, 0))),
    # scale, softcap
    (ValueError, "scale is nan, expected a finite number", dict(scale=math.nan)),
    (ValueError, "scale is inf, expected a finite number", dict(scale=math.inf)),
    (TypeError, "scale must be a number, got str", dict(scale="1")),
    (TypeError, "scale must be a number, got Tensor", dict(scale=torch.ones(()))),
    (ValueError, "softcap is -1, expected 0 (off) or a positive number", dict(softcap=-1.0)),
    (ValueError, "softcap is 1e-46, expected 0 (off) or a positive number", dict(softcap=1e-46, scale=1e-9)),
    (ValueError, "softcap is nan, expected 0 (off) or a positive number", dict(softcap=math.nan)),
    (ValueError, "softcap is inf, expected 0 (off) or a positive number", dict(softcap=math.inf)),
    (TypeError, "softcap must be a number, got NoneType", dict(softcap=None)),
    # arithmetic
    (ValueError, "arithmetic is 'fast', expected one of 'auto', 'fma', 'mma', 'mma_s", dict(arithmetic="fast")),
    (NotImplementedError, "arithmetic 'mma' needs tensor cores; on the CPU use 'fma'", dict(arithmetic="mma")),
    # lengths
    (TypeError, "seqused_k has dtype torch.int64, expected int32", dict(seqused_k=ints(1, 1, dtype=torch.int64))),
    (TypeError, "seqused_q has dtype torch.float32, expected int32", dict(seqused_q=torch.ones(2))),
    (TypeError, "leftpad_k must be a torch.Tensor, got list", dict(leftpad_k=[0, 0])),
    (ValueError, "seqused_k has 2 dimensions, expected 1", dict(seqused_k=ints(1, 1)[None])),
    (ValueError, "seqused_k has 0 elements, expected 2", dict(seqused_k=ints())),
    (ValueError, "seqused_k has 3 elements, expected 2", dict(seqused_k=ints(1, 1, 1))),
    (ValueError, "seqused_q has 1 elements, expected 2", dict(seqused_q=ints(1))),
    (ValueError, "leftpad_k has 3 elements, expected 2", dict(leftpad_k=ints(1, 1, 1))),
    (ValueError, "seqused_q[1] is 6, expected 0 to the sequence's 5 query rows", dict(seqused_q=ints(5, 6))),
    (ValueError, "seqused_q[0] is -1, expected 0 to the sequence's 5 query rows", dict(seqused_q=ints(-1, 5))),
    (ValueError, "seqused_k[0] is 71, expected 0 to the sequence's 70 keys", dict(seqused_k=ints(71, 70))),
    (ValueError, "seqused_k[1] is -2147483648, expected 0 to", dict(seqused_k=ints(0, -(1 << 31)))),
    (ValueError, "leftpad_k[1] is 71, expected 0 to the 70 key rows", dict(leftpad_k=ints(0, 71))),
    (ValueError, "leftpad_k[0] is -1, expected 0 to the 70 key rows", dict(leftpad_k=ints(-1, 0))),
    (ValueError, "seqused_k[0] is 61, expected 0 to the", dict(leftpad_k=ints(10, 0), seqused_k=ints(61, 70))),
    # per-head arrays
    (TypeError, "alibi_slopes has dtype torch.int64, expected a floating", dict(alibi_slopes=torch.arange(4))),
    (TypeError, "sinks must be a torch.Tensor, got float", dict(sinks=1.0)),
    (ValueError, "alibi_slopes has 3 dimensions, expected 1 or 2", dict(alibi_slopes=torch.ones(1, 2, 4))),
    (ValueError, "alibi_slopes has 0 elements, expected one per query head (4)", dict(alibi_slopes=torch.ones(0))),
    (ValueError, "alibi_slopes has 2 elements, expected one per query head (4)", dict(alibi_slopes=torch.ones(2))),
    (ValueError, "alibi_slopes has 3 rows, expected one per sequence (2)", dict(alibi_slopes=torch.ones(3, 4))),
    (ValueError, "alibi_slopes has 2 elements, expected one per query head (4)", dict(alibi_slopes=torch.ones(4, 2))),
    (ValueError, "sinks has 2 dimensions, expected 1", dict(sinks=torch.ones(2, 4))),
    (ValueError, "sinks has 2 elements, expected one per query head (4)", dict(sinks=torch.ones(2))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "args", "keywords"), DENSE, ids=[case[1][:50] for case in DENSE])
@pytest.mark.parametrize("function", [fad.attn, fad.attn_partials], ids=["attn", "attn_partials"])
def test_tensors(function, error, message, args, keywords):
    refused(error, message, function, *args, **keywords)


@pytest.mark.parametrize(("error", "message", "keywords"), OPTIONS, ids=[case[1][:50] for case in OPTIONS])
@pytest.mark.parametrize("function", [fad.attn, fad.attn_partials], ids=["attn", "attn_partials"])
def test_options(function, error, message, keywords):
    refused(error, message, function, q(), kv(), kv(), **keywords)


def test_k_pos():
    qkv = q(), kv(), kv()
    refused(ValueError, "k_pos[1] is -3, expected 0 or more", fad.attn, *qkv, k_pos=ints(0, -3))
    refused(ValueError, "k_pos has 3 elements, expected 2", fad.attn, *qkv, k_pos=ints(0, 0, 0))
    refused(TypeError, "k_pos has dtype torch.int64, expected int32", fad.attn, *qkv, k_pos=ints(0, 0).long())


def test_alibi_positions_that_fp32_cannot_hold():
    far = dict(k_pos=ints(0, (1 << 24) - 70), alibi_slopes=torch.ones(4))
    refused(ValueError, "k_pos[1] is 16777146: ALiBi reaches position", fad.attn, q(), kv(), kv(), **far)


PACKED = [
    (ValueError, "cu_seqlens_q[0] is 1, expected 0", ints(1, 3, 5), ints(0, 40, 70)),
    (ValueError, "cu_seqlens_k[0] is -1, expected 0", ints(0, 3, 5), ints(-1, 40, 70)),
    (ValueError, "cu_seqlens_q falls from 4 to 3 at index 2, expected an ascending", ints(0, 4, 3), ints(0, 40, 70)),
    (ValueError, "cu_seqlens_k falls from 0 to -5 at index 1, expected an ascending", ints(0, 4, 5), ints(0, -5, 70)),
    (ValueError, "cu_seqlens_q ends at 6, past the 5 rows of the tensor", ints(0, 4, 6), ints(0, 40, 70)),
    (ValueError, "cu_seqlens_k ends at 2147483647, past the 70 rows", ints(0, 4, 5), ints(0, 40, (1 << 31) - 1)),
    (ValueError, "cu_seqlens_k has 2 elements, expected 3", ints(0, 4, 5), ints(0, 70)),
    (ValueError, "cu_seqlens_q has 0 elements, expected 1", ints(), ints()),
    (ValueError, "cu_seqlens_k has 2 dimensions, expected 1", ints(0, 5), ints(0, 70)[None]),
    (TypeError, "cu_seqlens_q has dtype torch.int64, expected int32", ints(0, 5, dtype=torch.int64), ints(0, 70)),
    (TypeError, "cu_seqlens_k must be a torch.Tensor, got list", ints(0, 5), [0, 70]),
    (TypeError, "cu_seqlens_k must be a torch.Tensor, got NoneType", ints(0, 5), None),
    (TypeError, "cu_seqlens_q must be a torch.Tensor, got NoneType", None, ints(0, 70)),
    (ValueError, "cu_seqlens_k is on meta, q is on cpu: expected one device", ints(0, 5), ints(0, 70).to("meta")),
]


@pytest.mark.parametrize(("error", "message", "cu_q", "cu_k"), PACKED, ids=[case[1][:50] for case in PACKED])
def test_cu_seqlens(error, message, cu_q, cu_k):
    refused(error, message, fad.attn_varlen, q()[0], kv()[0], kv()[0], cu_q, cu_k)


def test_packed_shapes():
    def refused_packed(message, query, key, value, **keywords):
        refused(ValueError, message, fad.attn_varlen, query, key, value, ints(0, 5), ints(0, 70), **keywords)

    refused_packed("q has 4 dimensions, expected 3: [rows, heads, head_dim]", q(), kv()[0], kv()[0])
    refused_packed("k has head dim 8, q has 16", q()[0], kv(dim=8)[0], kv()[0])
    refused_packed("k has 70 rows, v has 60", q()[0], kv()[0], kv(rows=60)[0])
    message = "seqused_q[0] is 6, expected 0 to the sequence's 5 query rows"
    refused_packed(message, q()[0], kv()[0], kv()[0], seqused_q=ints(6))


@pytest.mark.parametrize("name", ["q", "k", "v", "alibi_slopes", "sinks"])
def test_an_input_of_partials_that_requires_grad(name):
    tensors = dict(q=q(), k=kv(), v=kv(), alibi_slopes=torch.ones(4), sinks=torch.ones(4))
    tensors[name].requires_grad_()
    message = f"flash_attn_det has no backward yet, but {name} requires grad: call it under torch.no_grad()"
    refused(NotImplementedError, message, fad.attn_partials, **tensors)


@pytest.mark.parametrize("function", [fad.attn, fad.attn_partials], ids=["attn", "attn_partials"])
def test_a_device_without_kernels(function):
    """Fake tensors stand for those of a device that is not there."""
    device = torch.device("xpu", 0)
    with FakeTensorMode() as mode:
        tensors = [FakeTensor(mode, x, device) for x in (q(device="meta"), kv(device="meta"), kv(device="meta"))]
        message = "q is on xpu:0: flash_attn_det has kernels for cpu and cuda"
        refused(NotImplementedError, message, function, *tensors)


def test_non_contiguous_last_dimension_is_copied():
    """Documented: accepted by copy."""
    torch.manual_seed(0)
    wide = [torch.randn(2, n, h, 32)[..., ::2] for n, h in ((5, 4), (70, 2), (70, 2))]
    assert all(x.stride(-1) == 2 for x in wide)
    assert_bits_equal(fad.attn(*wide), fad.attn(*(x.contiguous() for x in wide)))


def random_case():
    torch.manual_seed(0)
    return torch.randn(2, 5, 4, 16), torch.randn(2, 200, 2, 16), torch.randn(2, 200, 2, 16)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_poison_in_keys_that_nobody_sees_cannot_be_seen(where, poison):
    """Behind the causal row or seqused_k, before leftpad_k, outside the window, in a neighbour, behind cu_seqlens."""
    query, key, value = random_case()

    def poisoned(index):
        tensors = dict(k=key.clone(), v=value.clone())
        tensors[where][index] = poison
        return tensors["k"], tensors["v"]

    clean = fad.attn(query, key, value, causal=True)
    assert_bits_equal(fad.attn(query, *poisoned((slice(None), slice(199, None))), causal=True)[:, :-1], clean[:, :-1])
    assert_bits_equal(fad.attn(query, *poisoned(1), causal=True)[0], clean[0])
    used = dict(seqused_k=ints(70, 130))
    tail = torch.arange(200) >= ints(70, 130)[:, None]
    assert_bits_equal(fad.attn(query, *poisoned(tail), **used), fad.attn(query, key, value, **used))
    padded = dict(leftpad_k=ints(70, 130))
    assert_bits_equal(fad.attn(query, *poisoned(~tail), **padded), fad.attn(query, key, value, **padded))
    window = dict(window=(10, 0))
    before = poisoned((slice(None), slice(0, 185)))
    assert_bits_equal(fad.attn(query, *before, **window), fad.attn(query, key, value, **window))
    cu = ints(0, 2, 5), ints(0, 150, 180)
    packed_clean = fad.attn_varlen(query[0], key[0], value[0], *cu)
    bad_k, bad_v = poisoned((0, slice(180, 200)))
    assert_bits_equal(fad.attn_varlen(query[0], bad_k[0], bad_v[0], *cu), packed_clean)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_in_keys_that_a_row_sees_is_seen_by_that_row_only(poison):
    query, key, value = random_case()
    clean = fad.attn(query, key, value, causal=True)
    value[0, 198, 1, 3] = poison
    out = fad.attn(query, key, value, causal=True)
    reached = out.view(torch.int32) != clean.view(torch.int32)
    want = torch.zeros_like(reached)
    want[0, 3:, 2:, 3] = True  # the last two of five rows see key 198; heads 2 and 3 read kv head 1
    assert torch.equal(reached, want)
    assert not out[reached].isfinite().any()


def test_nan_score_makes_the_row_nan():
    query, key, value = random_case()
    key[1, 50, 0, 0] = math.nan
    out, lse = fad.attn(query, key, value, return_lse=True)
    nan_rows = torch.zeros(2, 4, 5, dtype=torch.bool)
    nan_rows[1, :2] = True
    assert torch.equal(lse.isnan(), nan_rows)
    assert torch.equal(out.isnan().all(-1), nan_rows.transpose(1, 2))
    assert torch.equal(out.isnan().any(-1), nan_rows.transpose(1, 2))


# The ops are reached by graphs and not by attention.py: what they are given must not crash either.
BAD_OPS = {
    "k has another dtype than q": dict(k=kv().double()),
    "q has an unknown dtype": dict(q=q().int(), k=kv().int(), v=kv().int()),
    "q has 3 dimensions, expected 4": dict(q=q()[0]),
    "k has stride 2 in its last dimension, expected 1": dict(k=torch.ones(2, 70, 2, 32)[..., ::2]),
    "seqused_k has the wrong dtype, expected int32": dict(seqused_k=torch.ones(2, dtype=torch.int64)),
    "seqused_k has stride 2, expected 1": dict(seqused_k=torch.ones(4, dtype=torch.int32)[::2]),
    "sinks has the wrong dtype": dict(sinks=torch.ones(4, dtype=torch.float64)),
    "alibi_slopes has stride 2 in its last dimension": dict(alibi_slopes=torch.ones(8)[::2]),
    "arithmetic is 7, expected 0 (auto), 1 (fma), 2 (mma), 3 (mma_sm90) or 4 (mma_sm80)": dict(arithmetic=7),
}


@pytest.mark.parametrize("message", BAD_OPS)
@pytest.mark.parametrize("op", [ops.fwd, ops.fwd_partials], ids=["fwd", "fwd_partials"])
def test_ops_called_directly(op, message):
    names = [argument.name for argument in op._schema.arguments]
    good = _arguments(
        q(), kv(), kv(), causal=False, scale=None, window=(-1, -1), softcap=0.0, alibi_slopes=None, sinks=None,
        split_size=None, arithmetic="auto",
    )  # fmt: skip
    arguments = {**dict(zip(names, good, strict=True)), **BAD_OPS[message]}
    with pytest.raises(RuntimeError, match=rf"flash_attn_det\[1\]: {re.escape(message)}"):
        op(**arguments)


@pytest.mark.parametrize("absent", ["cu_seqlens_q", "cu_seqlens_k"])
def test_only_one_cu_seqlens_in_the_op(absent):
    good = _arguments(
        q()[0], kv()[0], kv()[0], cu_seqlens=(ints(0, 5), ints(0, 70)), causal=False, scale=None, window=(-1, -1),
        softcap=0.0, alibi_slopes=None, sinks=None, split_size=None, arithmetic="auto",
    )  # fmt: skip
    names = [argument.name for argument in ops.fwd._schema.arguments]
    arguments = {**dict(zip(names, good, strict=True)), absent: ints()}
    with pytest.raises(RuntimeError, match=r"flash_attn_det\[1\]: only one of cu_seqlens_q and cu_seqlens_k is given"):
        ops.fwd(**arguments)


def test_partials_of_packed_sequences():
    good = _arguments(
        q()[0], kv()[0], kv()[0], cu_seqlens=(ints(0, 5), ints(0, 70)), causal=False, scale=None, window=(-1, -1),
        softcap=0.0, alibi_slopes=None, sinks=None, split_size=None, arithmetic="auto",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"flash_attn_det\[1\]: partial states of packed sequences are not defined"):
        ops.fwd_partials(*good)
