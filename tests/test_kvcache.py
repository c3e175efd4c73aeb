"""attn_with_kvcache: appending, then one range over old and new keys (N1), in dense, indexed and paged caches.

Bits are compared on out, lse and the caches. Each test also shows that its inputs can tell.
"""

import gc
import math
import re

import pytest
import torch
from cases import normal
from paging import Pages, gathered, shuffled

import flash_attn_det as fad
from flash_attn_det import ops
from flash_attn_det.testing import assert_bits_equal, bits_differ

FAMILIES = {
    "fp32": (torch.float32, "auto"),
    "fp16": (torch.float16, "auto"),
    "bf16": (torch.bfloat16, "auto"),
    "fp64": (torch.float64, "auto"),
    "bf16 mma_sm90": (torch.bfloat16, "mma_sm90"),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
B, Sk, Hq, Hk, D, Dv = 3, 300, 4, 2, 16, 24


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def tensors(Sq=Sk, dtype=torch.float32, seed=1):
    """q, k, v of whole sequences."""
    shapes = ((B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv))
    return tuple(normal(shape, 10 * seed + i, dtype) for i, shape in enumerate(shapes))


def tables(dtype, positions=400, dim=8):
    return tuple(normal((positions, dim // 2), 90 + i, dtype) for i in range(2))


def attention(*qkv, **keywords):
    return fad.attn(*qkv, **{"split_size": 128, **keywords}, return_lse=True)


def cached(*arguments, **keywords):
    return fad.attn_with_kvcache(*arguments, **{"split_size": 128, **keywords}, return_lse=True)


def assert_same(actual, expected, name=""):
    for got, want, part in zip(actual, expected, ("out", "lse"), strict=True):
        assert_bits_equal(got, want, f"{part} {name}")


def differing(actual, expected):
    return sum(bits_differ(a, b) for a, b in zip(actual, expected, strict=True))


def rows(result, first, end):
    out, lse = result
    return out[:, first:end], lse[:, :, first:end]


def empty_cache(kind, dtype, capacity=320, page_size=16):
    """k_cache, v_cache full of NaN, and the keywords that say where sequences lie in them."""
    if kind == "dense":
        return *(torch.full((B, capacity, Hk, d), math.nan, dtype=dtype) for d in (D, Dv)), {}
    if kind == "indexed":
        caches = (torch.full((7, capacity, Hk, d), math.nan, dtype=dtype) for d in (D, Dv))
        return *caches, {"cache_batch_idx": shuffled(7, 2)[:B].int()}
    columns = -(-capacity // page_size)
    pools = (torch.full((B * columns + 2, page_size, Hk, d), math.nan, dtype=dtype) for d in (D, Dv))
    return *pools, {"block_table": shuffled(B * columns + 2, 4)[: B * columns].int().view(B, columns)}


def contents(k_cache, v_cache, where, b, n):
    """Rows 0 .. n - 1 of sequence b, as a batch of one."""
    if "block_table" in where:
        return gathered(Pages(k_cache, v_cache, where["block_table"]), b, n)
    entry = int(where["cache_batch_idx"][b]) if where else b
    return k_cache[entry : entry + 1, :n], v_cache[entry : entry + 1, :n]


every_cache = pytest.mark.parametrize("kind", ["dense", "indexed", "paged"])


# ---- appending -------------------------------------------------------------------------------------------------------


@every_cache
@every_family
def test_n1_step_by_step_is_prefill_at_once(kind, family):
    dtype, arithmetic = FAMILIES[family]
    q, k, v = tensors(dtype=dtype)
    keywords = {"causal": True, "arithmetic": arithmetic}
    whole = attention(q, k, v, **keywords)
    once_k, once_v, where = empty_cache(kind, dtype)
    assert_same(cached(q, once_k, once_v, k, v, cache_seqlens=0, **where, **keywords), whole, "at once")
    k_cache, v_cache, where = empty_cache(kind, dtype)
    for first, end in ((0, 1), (1, 2), (2, 131), (131, 132), (132, 290), (290, 299), (299, 300)):
        new = (x[:, first:end] for x in (q, k, v))
        q_new, k_new, v_new = new
        got = cached(q_new, k_cache, v_cache, k_new, v_new, cache_seqlens=first, **where, **keywords)
        assert_same(got, rows(whole, first, end), f"rows {first} to {end}")
    assert_bits_equal(k_cache, once_k, "k_cache")
    assert_bits_equal(v_cache, once_v, "v_cache")
    for b in range(B):
        for got, want in zip(contents(k_cache, v_cache, where, b, Sk), (k, v)):
            assert_bits_equal(got, want[b : b + 1])
    assert differing(attention(q, k, v, **keywords, split_size=256), whole) > 0


@every_cache
def test_n1_lengths_of_their_own(kind):
    q, k, v = tensors(Sq=2)
    used = (0, 129, 250)
    k_cache, v_cache, where = empty_cache(kind, torch.float32)
    for b, n in enumerate(used):
        cache = contents(k_cache, v_cache, where, b, n)
        one = {name: x[b : b + 1] for name, x in where.items()}
        target = (k_cache, v_cache) if where else (k_cache[b : b + 1], v_cache[b : b + 1])
        fad.append_kvcache(*target, k[b : b + 1, :n], v[b : b + 1, :n], cache_seqlens=0, **one)
        assert cache[0].shape[1] == n
    new = (x[:, 250:253] for x in (k, v))
    k_new, v_new = new
    got = cached(q, k_cache, v_cache, k_new, v_new, cache_seqlens=int32(*used), causal=True, **where)
    for b, n in enumerate(used):
        keys = [torch.cat([x[b : b + 1, :n], x[b : b + 1, 250:253]], 1) for x in (k, v)]
        assert_same([x[b : b + 1] for x in got], attention(q[b : b + 1], *keys, causal=True), f"sequence {b}")
    other = cached(q, k_cache, v_cache, cache_seqlens=int32(*used) + 2, causal=True, **where)
    assert differing(other, got) > 0


@every_cache
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_append_writes_its_rows_and_no_others(kind, dtype):
    _, k, v = tensors(dtype=dtype)
    k_cache, v_cache, where = empty_cache(kind, dtype, capacity=64)
    fad.append_kvcache(k_cache, v_cache, k[:, :5], v[:, :5], cache_seqlens=int32(0, 30, 59), **where)
    written = [(x == x).flatten(2).all(-1).sum() for x in (k_cache, v_cache)]
    assert written == [15, 15]
    for b, first in enumerate((0, 30, 59)):
        for cache, x in zip(contents(k_cache, v_cache, where, b, 64), (k, v)):
            assert_bits_equal(cache[:, first : first + 5], x[b : b + 1, :5])


def test_append_keeps_every_bit():
    """Without rotation a row is copied: NaN payloads too."""
    count = B * 4 * Hk * D
    bits = torch.arange(-(2**31), 2**31, 2**32 // count, dtype=torch.int64).int()[:count].view(B, 4, Hk, D)
    k = v = bits.view(torch.float32)
    caches = [torch.zeros(B, 8, Hk, D) for _ in range(2)]
    fad.append_kvcache(*caches, k, v, cache_seqlens=2)
    for cache in caches:
        assert torch.equal(cache[:, 2:6].view(torch.int32), bits)
    assert bits.view(torch.float32).isnan().any()


@every_cache
def test_strides_do_not_matter(kind):
    q, k, v = tensors(Sq=3)
    expected = attention(q, k[:, :40], v[:, :40], causal=True)
    k_cache, v_cache, where = empty_cache(kind, torch.float32)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_cache, v_cache)]
    got = cached(q, *heads_first, k[:, :40], v[:, :40], cache_seqlens=0, causal=True, **where)
    assert_same(got, expected)
    transposed = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (k[:, :40], v[:, :40])]
    assert transposed[0].stride(-1) != 1
    assert_same(cached(q, k_cache, v_cache, *transposed, cache_seqlens=0, causal=True, **where), expected)
    assert_bits_equal(heads_first[0], k_cache)
    assert differing(cached(q, k_cache, v_cache, cache_seqlens=39, causal=True, **where), expected) > 0


# ---- rotary ----------------------------------------------------------------------------------------------------------


@every_cache
@every_family
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_n12_rotary_inside_is_rotary_before(kind, family, interleaved):
    dtype, arithmetic = FAMILIES[family]
    q, k, v = tensors(Sq=4, dtype=dtype)
    cos, sin = tables(dtype)
    used = int32(0, 100, 200)
    rotary = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    for mask in ({"causal": True}, {"window": (50, 0)}, {"window": (50, -1)}, {}):
        keywords = {"cache_seqlens": used, "arithmetic": arithmetic, **mask}
        results = []
        for inside in (True, False):
            k_cache, v_cache, where = empty_cache(kind, dtype)
            fad.append_kvcache(k_cache, v_cache, k[:, :200], v[:, :200], cache_seqlens=0, **where)
            q_new, k_new, v_new = q, k[:, 200:204], v[:, 200:204]
            if not inside:
                how = {"offsets": used, "interleaved": interleaved}
                q_new = fad.apply_rotary(q, cos, sin, **how, advance=bool(mask))
                k_new = fad.apply_rotary(k_new, cos, sin, **how)
            keywords |= rotary if inside else dict.fromkeys(rotary, None) | {"rotary_interleaved": True}
            results.append((*cached(q_new, k_cache, v_cache, k_new, v_new, **keywords, **where), k_cache, v_cache))
        for got, want in zip(*results, strict=True):
            assert_bits_equal(got, want)
    assert differing(cached(q, k_cache, v_cache, **keywords, **where), results[0][:2]) > 0


def test_n12_rotated_step_by_step_is_rotated_at_once():
    q, k, v = tensors()
    cos, sin = tables(torch.float32)
    rotary = {"rotary_cos": cos, "rotary_sin": sin, "causal": True}
    k_once, v_once, _ = empty_cache("dense", torch.float32)
    whole = cached(q, k_once, v_once, k, v, cache_seqlens=0, **rotary)
    turned = [fad.apply_rotary(x, cos, sin, interleaved=True) for x in (q, k)]
    assert_same(whole, attention(*turned, v, causal=True))
    k_cache, v_cache, where = empty_cache("paged", torch.float32)
    for first, end in ((0, 150), (150, 151), (151, 300)):
        q_new, k_new, v_new = (x[:, first:end] for x in (q, k, v))
        got = cached(q_new, k_cache, v_cache, k_new, v_new, cache_seqlens=first, **rotary, **where)
        assert_same(got, rows(whole, first, end))
    assert differing(whole, attention(q, k, v, causal=True)) > 0


# ---- padding, position, options --------------------------------------------------------------------------------------


@every_cache
def test_n2_left_padding_counts_in_cache_seqlens(kind):
    """As in FlashAttention: rows in use are counted from the buffer's first, and keys from leftpad_k."""
    q, k, v = tensors(Sq=4)
    pad, used = int32(0, 17, 65), int32(96, 113, 161)
    k_cache, v_cache, where = empty_cache(kind, torch.float32)
    fad.append_kvcache(k_cache, v_cache, k[:, :96], v[:, :96], cache_seqlens=pad, **where)
    got = cached(
        q, k_cache, v_cache, k[:, 96:100], v[:, 96:100], cache_seqlens=used, leftpad_k=pad, causal=True, **where
    )
    assert_same(got, attention(q, k[:, :100], v[:, :100], causal=True))
    assert differing(cached(q, k_cache, v_cache, cache_seqlens=used + 4, leftpad_k=pad, **where), got) > 0


def test_n2_rolling_cache():
    q, k, v = tensors()
    keywords = {"causal": True, "window": (100, -1)}
    whole = attention(q, k, v, **keywords)
    kept = [x[:, 160:299].clone() for x in (k, v)]
    caches = [torch.cat([x, torch.full_like(x[:, :1], math.nan)], 1) for x in kept]
    step = {"cache_seqlens": 139, "k_pos": int32(160, 160, 160), **keywords}
    got = cached(q[:, 299:], *caches, k[:, 299:], v[:, 299:], **step)
    assert_same(got, rows(whole, 299, 300))
    assert differing(cached(q[:, 299:], *caches, **{**step, "cache_seqlens": 140, "k_pos": None}), got) > 0


def test_every_option_reaches_the_call():
    q, k, v = tensors(Sq=5)
    extra = {
        "causal": True, "window": (70, -1), "softcap": 3.0, "scale": 0.2, "sinks": normal((Hq,), 7),
        "alibi_slopes": normal((B, Hq), 8) / 16,
    }  # fmt: skip
    k_cache, v_cache, where = empty_cache("paged", torch.float32)
    got = cached(q, k_cache, v_cache, k, v, cache_seqlens=0, **where, **extra)
    assert_same(got, attention(q, k, v, **extra))
    for name in extra:
        fewer = {key: value for key, value in extra.items() if key != name}
        assert differing(cached(q, k_cache, v_cache, cache_seqlens=Sk, **where, **fewer), got) > (name == "causal") - 1
    assert fad.attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=Sk, **where).shape == (B, 5, Hq, Dv)


# ---- torch -----------------------------------------------------------------------------------------------------------


def append_arguments(kind, rotary):
    _, k, v = tensors()
    k_cache, v_cache, where = empty_cache(kind, torch.float32)
    absent = torch.empty(0, dtype=torch.int32)
    cos, sin = tables(torch.float32) if rotary else (torch.empty(0),) * 2
    for cache in (k_cache, v_cache):
        cache.zero_()
    places = (where.get("cache_batch_idx", absent), where.get("block_table", absent))
    return k[:, :9], v[:, :9], k_cache, v_cache, int32(0, 50, 300), *places, cos, sin, True


@every_cache
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_opcheck(kind, rotary):
    torch.library.opcheck(ops.append, append_arguments(kind, rotary))


@every_cache
def test_compile_gives_the_same_bits(kind):
    q, k, v = tensors(Sq=3)
    cos, sin = tables(torch.float32)

    def step(q, k_cache, v_cache, k, v, used, where):
        keywords = {"rotary_cos": cos, "rotary_sin": sin, "causal": True}
        return cached(q, k_cache, v_cache, k, v, cache_seqlens=used, **keywords, **where)

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        k_cache, v_cache, where = empty_cache(kind, torch.float32)
        for first, end in ((0, 100), (100, 103)):
            result = function(q, k_cache, v_cache, k[:, first:end], v[:, first:end], int32(*(first,) * B), where)
        results.append((*result, k_cache, v_cache))
    for got, want in zip(*results, strict=True):
        assert_bits_equal(got, want)


def test_inference_mode_and_counters():
    q, k, v = tensors(Sq=3)
    k_cache, v_cache, _ = empty_cache("dense", torch.float32)
    with torch.inference_mode():
        got = cached(q, k_cache, v_cache, k, v, cache_seqlens=0, causal=True)
    assert_same(got, attention(q, k, v, causal=True))


def storage_references(tensors):
    gc.collect()
    return [torch._C._storage_Use_Count(t.untyped_storage()._cdata) for t in tensors]


def test_no_tensor_leaks_on_any_path():
    """On success, on a refusal by the shim, and on one by the C library."""
    arguments = append_arguments("paged", True)
    tensors = [x for x in arguments if isinstance(x, torch.Tensor) and x.numel()]
    before = storage_references(tensors)
    by_shim, by_core = list(arguments), list(arguments)
    by_shim[0] = arguments[0][..., :8]
    by_core[4] = arguments[4] + 300
    for _ in range(10):
        ops.append(*arguments)
        ops.rotate(arguments[0], *arguments[7:9], arguments[4], True, True)
        for bad, message in ((by_shim, "k_cache has head dim 16, k has 8"), (by_core, "9 rows are appended")):
            with pytest.raises(RuntimeError, match=message):
                ops.append(*bad)
    del by_shim, by_core
    assert storage_references(tensors) == before


def test_fake_tensors():
    q, k, v = tensors(Sq=3)
    with torch.device("meta"):
        fake = [torch.empty(x.shape) for x in (q, torch.empty(20, 16, Hk, D), torch.empty(20, 16, Hk, Dv), k, v)]
        table, used = torch.empty(B, 19, dtype=torch.int32), torch.empty(B, dtype=torch.int32)
        out, lse = cached(*fake, cache_seqlens=used, block_table=table, causal=True)
    assert (out.shape, lse.shape) == ((B, 3, Hq, Dv), (B, Hq, 3))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_appends_without_room_write_nothing():
    q, k, v = tensors(Sq=3)
    refusals = {
        "dense": (int32(0, 318, 0), "cache_seqlens[1] is 318 and 3 rows are appended, expected 0 to the cache's 320"),
        "indexed": (int32(0, 0, -1), "cache_seqlens[2] is -1 and 3 rows are appended"),
        "paged": (int32(0, 2**31 - 1, 0), "cache_seqlens[1] is 2147483647 and 3 rows are appended"),
    }
    for kind, (used, message) in refusals.items():
        k_cache, v_cache, where = empty_cache(kind, torch.float32)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            fad.append_kvcache(k_cache, v_cache, k[:, :3], v[:, :3], cache_seqlens=used, **where)
        with pytest.raises(ValueError, match=r"^(cache_seqlens|seqused_k)\["):
            cached(q, k_cache, v_cache, k[:, :3], v[:, :3], cache_seqlens=used, **where)
        for cache in (k_cache, v_cache):
            assert cache.isnan().all()


def test_appends_to_pages_that_do_not_exist_write_nothing():
    _, k, v = tensors()
    k_cache, v_cache, where = empty_cache("paged", torch.float32)
    where["block_table"][1, 2] = len(k_cache)
    message = f"block_table[1][2] is {len(k_cache)}, expected 0 to {len(k_cache) - 1}: k and v have"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        fad.append_kvcache(k_cache, v_cache, k[:, :3], v[:, :3], cache_seqlens=30, **where)
    assert k_cache.isnan().all()
    fad.append_kvcache(k_cache, v_cache, k[:, :2], v[:, :2], cache_seqlens=30, **where)
    assert not k_cache.isnan().all()


def tables_of_ones(positions, half):
    return dict.fromkeys(("rotary_cos", "rotary_sin"), torch.ones(positions, half))


def new(batch=B, k_rows=3, v_rows=3, heads=Hk, k_dim=D, v_dim=Dv):
    return dict(k=torch.zeros(batch, k_rows, heads, k_dim), v=torch.zeros(batch, v_rows, heads, v_dim))


BAD = [
    (ValueError, "only one of k and v is given, expected both or none", dict(v=None)),
    (ValueError, "k and v are given without cache_seqlens", dict(cache_seqlens=None)),
    (ValueError, "rotary_cos is given without k and v", dict(k=None, v=None, rotary_cos=1, rotary_sin=1)),
    (NotImplementedError, "rotary_cos is given with k_pos", dict(rotary_cos=1, rotary_sin=1, k_pos=int32(0, 0, 0))),
    (ValueError, "only one of rotary_cos and rotary_sin is given", dict(rotary_cos=torch.ones(9, 2))),
    (ValueError, "only one of rotary_cos and rotary_sin is given", dict(rotary_sin=torch.ones(9, 2))),
    (TypeError, "cache_seqlens must be an int or an int32 torch.Tensor, got float", dict(cache_seqlens=1.0)),
    (TypeError, "cache_seqlens has dtype torch.int64, expected int32", dict(cache_seqlens=torch.zeros(3).long())),
    (ValueError, "seqused_k has 2 elements, expected 3", dict(cache_seqlens=int32(1, 1))),
    (ValueError, "cache_seqlens is -1, expected 0 to 2^31 - 1", dict(cache_seqlens=-1)),
    (ValueError, "left window is -2", dict(window=(-2, 0))),
    (ValueError, "k has head dim 8, q has 16", dict(q=torch.zeros(B, 2, Hq, 16), k_cache=torch.zeros(B, 9, Hk, 8))),
    (TypeError, "k has dtype torch.float16, q has torch.float32", dict(k=torch.zeros(B, 3, Hk, D).half())),
    (ValueError, "k is [3, 3, 2, ...], v is [3, 4, 2, ...]: expected one shape", new(v_rows=4)),
    (ValueError, "k_cache has batch 3, expected that of k, 2", new(batch=2)),
    (ValueError, "k_cache has head dim 16, k has 8", new(k_dim=8)),
    (ValueError, "v_cache has head dim 24, v has 8", new(v_dim=8)),
    (ValueError, "k_cache has stride 2 in its last dimension", dict(k_cache=torch.zeros(B, 9, Hk, 2 * D)[..., ::2])),
    (ValueError, "cache_seqlens[0] is 0 and 3 positions follow: cos and sin have 2", tables_of_ones(2, 4)),
    (ValueError, "cos and sin are for 18 dims of a row", tables_of_ones(9, 9)),
    (ValueError, "seqused_k[1] is -1, expected 0 to the sequence's", dict(leftpad_k=int32(0, 1, 0))),
    (ValueError, "cache_batch_idx[1] is 3, expected 0 to 2: k and v have", dict(cache_batch_idx=int32(0, 3, 1))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), BAD, ids=[case[1][:50] for case in BAD])
def test_bad_input_writes_nothing(error, message, changed):
    caches = [torch.full((B, 9, Hk, d), math.nan) for d in (D, Dv)]
    good = dict(
        q=torch.zeros(B, 2, Hq, D), k_cache=caches[0], v_cache=caches[1], k=torch.zeros(B, 3, Hk, D),
        v=torch.zeros(B, 3, Hk, Dv), cache_seqlens=0,
    )  # fmt: skip
    with pytest.raises(error, match=f"^{re.escape(message)}") as caught:
        fad.attn_with_kvcache(**{**good, **changed})
    assert caught.type is error
    assert all(cache.isnan().all() for cache in caches)
    fad.attn_with_kvcache(**good)
    assert not caches[0][:, :3].isnan().any()


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v"])
def test_grad_is_refused(name):
    shapes = dict(q=(B, 2, Hq, D), k_cache=(B, 9, Hk, D), v_cache=(B, 9, Hk, Dv), k=(B, 3, Hk, D), v=(B, 3, Hk, Dv))
    tensors = {key: torch.zeros(shape, requires_grad=key == name) for key, shape in shapes.items()}
    names = {"k_cache": "k", "v_cache": "v"}  # as attn calls them
    message = f"flash_attn_det has no backward yet, but {names.get(name, name)} requires grad"
    with pytest.raises(NotImplementedError, match=message):
        fad.attn_with_kvcache(**tensors, cache_seqlens=0)
