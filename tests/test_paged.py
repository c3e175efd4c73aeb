"""N1: keys in pages give the bits of the same keys in one buffer. Every page size, order, capacity and stale slot.

Each test also shows that its inputs can tell: other splits of the same keys, or keys in another order, change bits.
"""

import itertools
import math
import re

import pytest
import torch
from cases import normal
from paging import gathered, in_pages, shuffled

import flash_attn_det as fad
from flash_attn_det import _schedule, ops
from flash_attn_det.attention import _arguments
from flash_attn_det.reference import attn_reference
from flash_attn_det.testing import assert_bits_equal, bits_differ

PAGE_SIZES = (1, 3, 8, 16, 64)
FAMILIES = {
    "fp32": (torch.float32, "auto"),
    "bf16": (torch.bfloat16, "auto"),
    "fp64": (torch.float64, "auto"),
    "bf16 mma_sm90": (torch.bfloat16, "mma_sm90"),
    "fp16 mma_sm90": (torch.float16, "mma_sm90"),
}
LENGTHS = (300, 129, 0, 7)
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": (150, -1)},
    "window both": {"window": (150, 3)},
    "softcap": {"causal": True, "softcap": 2.0},
    "alibi": {"causal": True, "alibi_slopes": normal((4,), 77) / 16},
    "sinks": {"sinks": normal((4,), 78)},
}
every_page_size = pytest.mark.parametrize("page_size", PAGE_SIZES)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def tensors(B=4, Sq=5, Sk=300, Hq=4, Hk=2, D=16, Dv=24, dtype=torch.float32, seed=1):
    shapes = ((B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv))
    return tuple(normal(shape, 10 * seed + i, dtype) for i, shape in enumerate(shapes))


def attention(*qkv, **keywords):
    return fad.attn(*qkv, **{"split_size": 128, **keywords}, return_lse=True)


def cached(q, pages, lengths, **keywords):
    """out and lse of q over pages; lengths: of the keys."""
    k, v, block_table = pages
    keywords = {"split_size": 128, "block_table": block_table, "cache_seqlens": int32(*lengths), **keywords}
    return fad.attn_with_kvcache(q, k, v, **keywords, return_lse=True)


def varlen(q, pages, lengths, **keywords):
    """The same with packed queries, in the shape of dense ones."""
    k, v, block_table = pages
    batch, rows = q.shape[:2]
    starts = torch.arange(0, (batch + 1) * rows, rows, dtype=torch.int32)
    keywords = {"split_size": 128, "block_table": block_table, "seqused_k": int32(*lengths), **keywords}
    out, lse = fad.attn_varlen(q.flatten(0, 1), k, v, starts, **keywords, return_lse=True)
    return out.unflatten(0, (batch, rows)), lse.unflatten(1, (batch, rows)).transpose(0, 1)


def packed(q, k, v, lengths, **keywords):
    """Keys end to end, without pages."""
    batch, rows = q.shape[:2]
    flat = [torch.cat([x[b, :n] for b, n in enumerate(lengths)]) for x in (k, v)]
    starts = [int32(*itertools.accumulate(n, initial=0)) for n in ([rows] * batch, lengths)]
    out, lse = fad.attn_varlen(q.flatten(0, 1), *flat, *starts, split_size=128, **keywords, return_lse=True)
    return out.unflatten(0, (batch, rows)), lse.unflatten(1, (batch, rows)).transpose(0, 1)


def assert_same(actual, expected, name=""):
    for got, want, part in zip(actual, expected, ("out", "lse"), strict=True):
        assert_bits_equal(got, want, f"{part} {name}")


def control(arithmetic):
    """Keywords that change bits on the same keys: other splits; of the emulated family, which few elements show it, the
    other family."""
    return {"split_size": 256} if arithmetic == "auto" else {"arithmetic": "fma"}


def differing(actual, expected):
    return sum(bits_differ(a, b) for a, b in zip(actual, expected, strict=True))


# ---- paged == contiguous == packed == padded -------------------------------------------------------------------------


@every_family
@every_page_size
def test_n1_pages_are_the_same_keys_in_one_buffer(page_size, family):
    dtype, arithmetic = FAMILIES[family]
    q, k, v = tensors(dtype=dtype)
    keywords = {"causal": True, "arithmetic": arithmetic}
    expected = attention(q, k, v, seqused_k=int32(*LENGTHS), **keywords)
    pages = in_pages(k, v, page_size, LENGTHS)
    assert_same(cached(q, pages, LENGTHS, **keywords), expected, "dense q")
    assert_same(varlen(q, pages, LENGTHS, **keywords), expected, "packed q")
    assert_same(packed(q, k, v, LENGTHS, **keywords), expected, "packed k")
    for b, n in enumerate(LENGTHS):
        alone = attention(q[b : b + 1], *gathered(pages, b, n), **keywords)
        assert_same(alone, [x[b : b + 1] for x in expected], f"gathered {b}")
    assert differing(cached(q, pages, LENGTHS, **{**keywords, **control(arithmetic)}), expected) > 0


@every_option
@pytest.mark.parametrize("Sq", [1, 9])
@pytest.mark.parametrize("page_size", [3, 16])
def test_n1_pages_under_every_option(page_size, Sq, options):
    q, k, v = tensors(Sq=Sq)
    expected = attention(q, k, v, seqused_k=int32(*LENGTHS), **options)
    pages = in_pages(k, v, page_size, LENGTHS)
    assert_same(cached(q, pages, LENGTHS, **options), expected, "dense q")
    assert_same(varlen(q, pages, LENGTHS, **options), expected, "packed q")
    assert differing(cached(q, pages, LENGTHS, **options, split_size=256), expected) > 0


@every_page_size
def test_n1_pages_against_the_readable_definition(page_size):
    q, k, v = tensors(B=2, Sq=3, Sk=150, Hq=2, Hk=1, D=8, Dv=8)
    lengths = (150, 65)
    pages = in_pages(k, v, page_size, lengths)
    want = attn_reference(q, k, v, causal=True, split_size=128, seqused_k=int32(*lengths), return_lse=True)
    assert_same(cached(q, pages, lengths, causal=True), want)
    swapped = pages._replace(block_table=pages.block_table.flip(0))
    assert differing(cached(q, swapped, (65, 65), causal=True), want) > 0


@every_family
def test_n1_order_of_pages_does_not_matter_and_order_of_keys_does(family):
    dtype, arithmetic = FAMILIES[family]
    q, k, v = tensors(dtype=dtype)
    pages = in_pages(k, v, 16)
    lengths, slopes = (300,) * 4, normal((4,), 77, torch.float64) / 16
    keywords = {"causal": True, "arithmetic": arithmetic, "alibi_slopes": slopes}
    expected = cached(q, pages, lengths, **keywords)
    for seed in (6, 7):
        moved = in_pages(k, v, 16, seed=seed)
        assert bits_differ(moved.block_table, pages.block_table) > 0
        assert_same(cached(q, moved, lengths, **keywords), expected)
    exchanged = pages.block_table.clone()
    exchanged[:, [0, 9]] = pages.block_table[:, [9, 0]]
    other = cached(q, pages._replace(block_table=exchanged), lengths, **keywords)
    assert differing(other, expected) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_n1_pages_under_forced_schedules(dtype):
    q, k, v = tensors(B=1, Sq=25, Sk=650, Hq=6, Hk=2, D=20, Dv=28, dtype=dtype)
    pages, keywords = in_pages(k, v, 24), {"causal": True, "window": (500, -1), "softcap": 6.0}
    expected = attention(q, k, v, **keywords)
    for isa in _schedule.isas() if dtype != torch.float64 else [None]:
        for layout, tile_rows, parallel in itertools.product(("rows", "keys"), (7, 64), (False, True)):
            with _schedule.forced(isa=isa, layout=layout, tile_rows=tile_rows, split_parallel=parallel):
                assert_same(cached(q, pages, (650,), **keywords), expected, f"{isa} {layout} {tile_rows} {parallel}")
    assert differing(cached(q, pages, (650,), **keywords, split_size=256), expected) > 0


@pytest.mark.parametrize("isa", _schedule.isas())
def test_n1_pages_in_both_emulators(isa):
    q, k, v = tensors(B=2, Sq=3, Sk=200, dtype=torch.bfloat16)
    pages = in_pages(k, v, 5)
    with _schedule.forced(isa=isa):
        got = cached(q, pages, (200, 200), arithmetic="mma_sm90", causal=True)
        assert_same(got, attention(q, k, v, arithmetic="mma_sm90", causal=True))
    assert differing(got, cached(q, pages, (200, 199), arithmetic="mma_sm90", causal=True)) > 0


# ---- what lies elsewhere in the pool and the table -------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("stale", [math.nan, math.inf, 1e4])
def test_n11_stale_slots_and_unused_pages_are_never_seen(stale, family):
    dtype, arithmetic = FAMILIES[family]
    q, k, v = tensors(dtype=dtype)
    keywords = {"causal": True, "arithmetic": arithmetic}
    clean = attention(q, k, v, seqused_k=int32(*LENGTHS), **keywords)
    pages = in_pages(k, v, 16, LENGTHS, unused=stale)
    assert_same(cached(q, pages, LENGTHS, **keywords), clean)
    longer = (300, 130, 0, 7)  # one stale row counts now
    assert differing(cached(q, pages, longer, **keywords), clean) > 0


def test_n1_capacity_does_not_matter():
    q, k, v = tensors()
    expected = attention(q, k, v, seqused_k=int32(*LENGTHS), causal=True)
    for spare in (0, 1, 40, 1000):
        pages = in_pages(k, v, 8, LENGTHS, spare_columns=spare, spare_pages=spare)
        assert_same(cached(q, pages, LENGTHS, causal=True), expected, f"{spare} spare columns")
        assert_same(varlen(q, pages, LENGTHS, causal=True), expected, f"{spare} spare columns, packed q")
    assert differing(cached(q, pages, LENGTHS, causal=True, split_size=256), expected) > 0


def test_n1_a_page_as_long_as_the_cache():
    q, k, v = tensors()
    whole = cached(q, (k, v, int32(0, 1, 2, 3)[:, None]), (300,) * 4, causal=True)
    assert_same(whole, attention(q, k, v, causal=True))
    turned = cached(q, (k, v, int32(1, 2, 3, 0)[:, None]), (300,) * 4, causal=True)
    assert_same(turned, attention(q, k.roll(-1, 0), v.roll(-1, 0), causal=True))
    assert differing(whole, turned) > 0


def test_n1_sequences_may_share_pages():
    """A common prefix of three pages, then keys of their own."""
    q, k, v = tensors(B=3, Sk=100)
    for x in (k, v):
        x[1:, :48] = x[0, :48]
    pages = in_pages(k, v, 16)
    shared = pages.block_table.clone()
    shared[1:, :3] = shared[0, :3]
    for unused in pages.block_table[1:, :3].flatten().tolist():
        pages.k[unused] = pages.v[unused] = math.nan
    expected = attention(q, k, v, causal=True)
    assert_same(cached(q, pages._replace(block_table=shared), (100,) * 3, causal=True), expected)
    assert cached(q, pages, (100,) * 3, causal=True)[0].isnan().any()


def test_n2_left_padding_in_pages():
    q, k, v = tensors(B=3, Sk=333)
    expected = attention(q, k, v, causal=True)
    pads = (0, 65, 200)
    wide = [torch.full((3, 533, *x.shape[2:]), math.nan) for x in (k, v)]
    for b, pad in enumerate(pads):
        for to, x in zip(wide, (k, v)):
            to[b, pad : pad + 333] = x[b]
    rows, keywords = [pad + 333 for pad in pads], {"causal": True, "leftpad_k": int32(*pads)}
    for page_size in PAGE_SIZES:
        pages = in_pages(*wide, page_size, rows)
        for b, pad in enumerate(pads):
            pages.block_table[b, : pad // page_size] = -5  # pages of padding alone are not read
        assert_same(cached(q, pages, rows, **keywords), expected, f"dense q, {page_size}")
        assert_same(varlen(q, pages, (333,) * 3, **keywords), expected, f"packed q, {page_size}")
    moved = {"causal": True, "leftpad_k": int32(0, 66, 200)}
    assert differing(cached(q, pages, rows, **moved), expected) > 0


@pytest.mark.parametrize("dropped", [1, 64, 100, 256])
def test_n2_rolling_cache_in_pages(dropped):
    q, k, v = tensors(B=2, Sq=20, Sk=500)
    keywords = {"causal": True, "window": (190, -1)}
    whole = attention(q, k, v, **keywords)
    pages, kept, first = in_pages(k[:, dropped:], v[:, dropped:], 16), (500 - dropped,) * 2, int32(dropped, dropped)
    assert_same(cached(q, pages, kept, k_pos=first, **keywords), whole, "dense q")
    assert_same(varlen(q, pages, kept, k_pos=first, **keywords), whole, "packed q")
    assert (differing(cached(q, pages, kept, **keywords), whole) > 0) == (dropped % 128 != 0)


def test_strides_of_pools_and_tables_do_not_matter():
    q, k, v = tensors(B=3, Sk=100)
    pages = in_pages(k, v, 8)
    expected = attention(q, k, v, causal=True)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in pages[:2]]
    wide = torch.full((3, 2 * pages.block_table.shape[1] + 5), -1, dtype=torch.int32)
    wide[:, ::2][:, : pages.block_table.shape[1]] = pages.block_table
    every_second = wide[:, ::2]
    assert every_second.stride() == (wide.shape[1], 2)
    rows_apart = wide.clone()[:, : pages.block_table.shape[1]].copy_(pages.block_table)
    for name, got in {
        "heads before rows": cached(q, (*heads_first, pages.block_table), (100,) * 3, causal=True),
        "every second column": cached(q, pages._replace(block_table=every_second), (100,) * 3, causal=True),
        "rows apart": cached(q, pages._replace(block_table=rows_apart), (100,) * 3, causal=True),
    }.items():
        assert_same(got, expected, name)
    one = pages.block_table[:1].expand(3, -1)
    assert one.stride(0) == 0
    assert_same(
        cached(q, pages._replace(block_table=one), (100,) * 3, causal=True),
        attention(q, k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1), causal=True),
    )


def test_n10_empty_caches():
    q, k, v = tensors(B=2, Sq=3)
    none = torch.empty(2, 0, dtype=torch.int32)
    for out, lse in (
        cached(q, in_pages(k, v, 16, (0, 0)), (0, 0)),
        cached(q, (k[:0], v[:0], none), (0, 0)),
        cached(q, (k, v, none), (0, 0)),
        varlen(q, (k, v, none), (0, 0)),
    ):
        assert_bits_equal(out, torch.zeros(2, 3, 4, 24))
        assert_bits_equal(lse, torch.full((2, 4, 3), -math.inf))
    assert cached(q[:0], (k, v, none[:0]), ())[0].shape == (0, 3, 4, 24)


# ---- entries that an index names -------------------------------------------------------------------------------------


def test_no_sequence_reads_no_entry():
    """An empty cache_batch_idx is not one that was not given."""
    nobody = torch.zeros(0, dtype=torch.int32)
    q, new, cache = torch.randn(0, 1, 2, 8), torch.randn(0, 1, 2, 8), torch.randn(3, 8, 2, 8)
    before = cache.clone()
    out = fad.attn_with_kvcache(
        q, cache, cache.clone(), new, new, cache_seqlens=nobody, cache_batch_idx=nobody, return_lse=True
    )
    assert [x.shape for x in out] == [(0, 1, 2, 8), (0, 2, 1)]
    assert torch.equal(cache, before)
    with pytest.raises(ValueError, match="cache_batch_idx has 0 elements, expected 1"):
        fad.attn_with_kvcache(torch.randn(1, 1, 2, 8), cache, cache, cache_seqlens=torch.ones(1, dtype=torch.int32),
                              cache_batch_idx=nobody)  # fmt: skip


@every_family
def test_n1_cache_batch_idx_is_a_gather(family):
    dtype, arithmetic = FAMILIES[family]
    q, k, v = tensors(B=4, dtype=dtype)
    caches = [torch.full((9, *x.shape[1:]), math.nan, dtype=dtype) for x in (k, v)]
    entries = shuffled(9, 3)[:4]
    for cache, x in zip(caches, (k, v)):
        cache[entries] = x
    keywords = {"causal": True, "arithmetic": arithmetic, "split_size": 128, "return_lse": True}
    expected = fad.attn(q, k, v, seqused_k=int32(*LENGTHS), **keywords)
    named = {"cache_seqlens": int32(*LENGTHS), "cache_batch_idx": entries.int()}
    assert_same(fad.attn_with_kvcache(q, *caches, **named, **keywords), expected)
    twice = fad.attn_with_kvcache(q[:2], *caches, cache_batch_idx=entries[[1, 1]].int(), **keywords)
    assert_same(twice, fad.attn(q[:2], k[[1, 1]], v[[1, 1]], **keywords), "one entry twice")
    swapped = {**named, "cache_batch_idx": entries[[1, 0, 2, 3]].int()}
    swapped = fad.attn_with_kvcache(
        q, k.roll(1, 0).repeat(3, 1, 1, 1)[:9], v.repeat(3, 1, 1, 1)[:9], **swapped, **keywords
    )
    assert differing(swapped, expected) > 0


# ---- splits, graphs, audits ------------------------------------------------------------------------------------------


def op_arguments(q, pages, lengths, **changed):
    k, v, block_table = pages
    keywords = dict(causal=True, scale=None, window=(-1, -1), softcap=0.0, alibi_slopes=None, sinks=None)
    return _arguments(
        q, k, v, **{**keywords, **changed}, split_size=128, arithmetic="auto", seqused_k=int32(*lengths),
        block_table=block_table,
    )  # fmt: skip


def test_n8_partial_states_of_pages_are_those_of_one_buffer():
    q, k, v = tensors()
    pages = in_pages(k, v, 20, LENGTHS)
    got = ops.fwd_partials(*op_arguments(q, pages, LENGTHS))
    want = fad.attn_partials(q, k, v, causal=True, seqused_k=int32(*LENGTHS), split_size=128)
    for name, a, b in zip("oml", got, want):
        assert_bits_equal(a, b, name)
    merged = fad.merge_partials(fad.Partials(*got, q.dtype), return_lse=True)
    assert_same(merged, cached(q, pages, LENGTHS, causal=True))


def test_opcheck():
    q, k, v = tensors()
    pages = in_pages(k, v, 16, LENGTHS)
    torch.library.opcheck(ops.fwd, op_arguments(q, pages, LENGTHS))
    torch.library.opcheck(ops.fwd_partials, op_arguments(q, pages, LENGTHS))
    torch.library.opcheck(ops.check, op_arguments(q, pages, LENGTHS))


def test_compile_gives_the_same_bits():
    q, k, v = tensors()
    pages, starts, used = in_pages(k, v, 16, LENGTHS), torch.arange(0, 21, 5, dtype=torch.int32), int32(*LENGTHS)

    def call(q, k, v, table):
        return fad.attn_varlen(q, k, v, starts, block_table=table, seqused_k=used, causal=True, return_lse=True)

    compiled = torch.compile(call, fullgraph=True)
    assert_same(compiled(q.flatten(0, 1), *pages), call(q.flatten(0, 1), *pages))


def test_audit_reads_pages_and_entries():
    q, k, v = tensors(dtype=torch.bfloat16)
    pages, used = in_pages(k, v, 16, LENGTHS), int32(*LENGTHS)
    out, lse = cached(q, pages, LENGTHS, causal=True)
    keywords = {"causal": True, "split_size": 128}
    paged = {"seqused_k": used, "block_table": pages.block_table, **keywords}
    report = fad.audit(q, *pages[:2], out, lse, **paged)
    assert report.ok
    assert report.rows == report.rows_of_call == 4 * 5 * 4
    assert not fad.audit(q, *pages[:2], out, lse, **{**paged, "seqused_k": int32(299, 129, 0, 7)}).ok
    with fad.audited(share=1.0) as summary:
        varlen(q, pages, LENGTHS, causal=True)
        fad.attn_with_kvcache(q, k, v, cache_batch_idx=int32(3, 3, 0, 1), **keywords)
    assert summary.ok
    assert summary.audits == 2


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(error, message, function, *args, **keywords):
    with pytest.raises(error, match=f"^{re.escape(message)}") as caught:
        function(*args, **keywords)
    assert caught.type is error


def test_pages_that_do_not_exist_are_named():
    q, k, v = tensors(B=2, Sk=100)
    pages = in_pages(k, v, 16, spare_pages=0)
    for column, page in ((0, 14), (6, -1), (3, 2**31 - 1)):
        wrong = pages._replace(block_table=pages.block_table.clone())
        wrong.block_table[1, column] = page
        message = f"block_table[1][{column}] is {page}, expected 0 to 13: k and v have 14 pages"
        refused(ValueError, message, cached, q, wrong, (100, 100))
        refused(ValueError, message, varlen, q, wrong, (100, 100))
        cached(q, wrong, (100, column * 16))  # not needed: not read


def test_shapes_and_types():
    q, k, v = tensors(B=2, Sk=96)
    pages = in_pages(k, v, 16)
    table = pages.block_table

    def wrong(error, message, change=pages, lengths=(96, 96), **keywords):
        refused(error, message, cached, q, change, lengths, **keywords)

    wrong(TypeError, "block_table has dtype torch.int64, expected int32", (*pages[:2], table.long()))
    wrong(TypeError, "block_table must be a torch.Tensor, got list", (*pages[:2], table.tolist()))
    wrong(ValueError, "block_table has 1 dimensions, expected 2", (*pages[:2], table[0]))
    wrong(ValueError, "block_table is on meta, q is on cpu", (*pages[:2], table.to("meta")))
    wrong(ValueError, "block_table has 1 rows, expected one per sequence (2)", (*pages[:2], table[:1]))
    wrong(ValueError, "k has 15 pages, v has 14", (pages.k, pages.v[1:], table))
    wrong(ValueError, "k has 16 rows, v has 15", (pages.k, pages.v[:, 1:], table))
    wrong(ValueError, "k has 2 heads, v has 1", (pages.k, pages.v[:, :, :1], table))
    wrong(ValueError, "k has head dim 8, q has 16", (pages.k[..., :8], pages.v, table))
    wrong(ValueError, "k has 3 dimensions, expected 4", (pages.k[0], pages.v, table))
    wrong(ValueError, "k and v have 0 pages and block_table is given", (pages.k[:0], pages.v[:0], table))
    wrong(ValueError, "k and v have pages of 0 rows", (pages.k[:, :0], pages.v[:, :0], table), lengths=(0, 0))
    wrong(ValueError, "seqused_k[1] is 97, expected 0 to the sequence's 96 keys", lengths=(96, 97))
    message = "block_table and cache_batch_idx are given, expected one of them"
    wrong(ValueError, message, cache_batch_idx=int32(0, 1))


def test_packed_queries():
    q, k, v = tensors(B=2, Sk=96)
    pages, starts, flat = in_pages(k, v, 16), int32(0, 5, 10), q.flatten(0, 1)
    keywords = {"block_table": pages.block_table}
    message = "block_table and cu_seqlens_q are given without seqused_k, expected the number of keys"
    refused(ValueError, message, fad.attn_varlen, flat, *pages[:2], starts, **keywords)
    message = "block_table and cu_seqlens_k are given, expected one of them"
    refused(ValueError, message, fad.attn_varlen, flat, *pages[:2], starts, starts, **keywords, seqused_k=int32(1, 1))
    message = "leftpad_k is given for packed sequences, which have no padding"
    packed_keys = k.flatten(0, 1), v.flatten(0, 1), starts, int32(0, 96, 192)
    refused(ValueError, message, fad.attn_varlen, flat, *packed_keys, leftpad_k=int32(0, 0))


def test_no_packed_queries():
    none, starts = torch.randn(0, 4, 64), int32(0)
    k, v = torch.randn(2, 3, 16, 2, 64)
    table = torch.empty(0, 3, dtype=torch.int32)
    out = fad.attn_varlen(none, k, v, starts, block_table=table, seqused_k=int32())
    assert out.shape == none.shape


def test_an_op_refuses_a_table_of_another_rank():
    q, k, v = tensors()
    pages = in_pages(k, v, 16, LENGTHS)
    arguments = [pages.block_table[0] if x is pages.block_table else x for x in op_arguments(q, pages, LENGTHS)]
    refused(ValueError, "block_table has 1 dimensions, expected 2", ops.call, ops.fwd, *arguments)


def test_entries_that_do_not_exist_are_named():
    q, k, v = tensors(B=2)
    message = "cache_batch_idx[1] is 2, expected 0 to 1: k and v have 2 entries"
    refused(ValueError, message, fad.attn_with_kvcache, q, k, v, cache_batch_idx=int32(0, 2))
    message = "cache_batch_idx[0] is -1, expected 0 to 1"
    refused(ValueError, message, fad.attn_with_kvcache, q, k, v, cache_batch_idx=int32(-1, 0))
    message = "cache_batch_idx has 3 elements, expected 2"
    refused(ValueError, message, fad.attn_with_kvcache, q, k, v, cache_batch_idx=int32(0, 0, 0))
    message = "q has batch 2, k has 1, v has 1: expected one batch size"
    refused(ValueError, message, fad.attn_with_kvcache, q, k[:1], v[:1])
