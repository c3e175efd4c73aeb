"""Caches on a GPU: paged and indexed keys, appends and rotary embedding, in both families.

The fma family has the CPU's bits, so the CPU is its oracle; the mma family has those of its dense calls, which
test_cuda_mma.py compares with the contract. What can be tested without a GPU is in test_paged.py and test_kvcache.py.
"""

import itertools
import math

import pytest
import torch
from cases import normal
from cuda_tools import (
    assert_noticed,
    assert_same,
    attention,
    busy,
    differing,
    int32,
    moved,
    needs_gpu,
    needs_hopper,
    poisoned,
    tensors,
)
from paging import Pages, in_pages, shuffled

import flash_attn_det as fad
from flash_attn_det import _schedule, ops
from flash_attn_det.testing import assert_bits_equal, bits_differ

pytestmark = needs_gpu

SPLIT = 2 * fad.contract()["MMA_BLOCK_KV"]
PAGE_SIZES = (1, 3, 8, 16, 64, 256)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# Hopper's decode kernel reads pages of 16 rows and more; for others a schedule that asks for it gets the generic one.
SCHEDULES = {
    f"{kernel} {rows or 'auto'} {'spilled' if split_parallel else 'folded'}": {
        "kernel": kernel,
        "tile_rows": rows,
        "split_parallel": split_parallel,
    }
    for kernel, rows, split_parallel in [
        *itertools.product(("generic", "hopper"), (None, 16, 64, 128), (False, True)),
        *itertools.product(("cluster",), (16,), (False, True)),
    ]
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": (150, -1)},
    "softcap": {"causal": True, "softcap": 2.0},
    "alibi": {"causal": True, "alibi_slopes": normal((8,), 77) / 16},
    "sinks": {"sinks": normal((8,), 78)},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def cached(q, pages, lengths, **keywords):
    """out and lse of q over pages; lengths: of the keys, on the CPU."""
    k, v, block_table = moved(pages, q.device)
    keywords = {"split_size": SPLIT, "return_lse": True, **moved(keywords, q.device)}
    return fad.attn_with_kvcache(
        q, k, v, cache_seqlens=int32(*lengths).to(q.device), block_table=block_table, **keywords
    )


def varlen(q, pages, lengths, **keywords):
    """The same with packed queries, in the shape of dense ones."""
    k, v, block_table = moved(pages)
    batch, rows = q.shape[:2]
    starts = torch.arange(0, (batch + 1) * rows, rows, dtype=torch.int32, device="cuda")
    keywords = {"split_size": SPLIT, "return_lse": True, "seqused_k": int32(*lengths).cuda(), **moved(keywords)}
    out, lse = fad.attn_varlen(q.flatten(0, 1), k, v, starts, block_table=block_table, **keywords)
    return out.unflatten(0, (batch, rows)), lse.unflatten(1, (batch, rows)).transpose(0, 1)


# ---- reading ---------------------------------------------------------------------------------------------------------

LENGTHS = (700, 129, 0, 300)


@every_dtype
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_n1_pages_are_the_same_keys_in_one_buffer(page_size, D, dtype):
    q, k, v = tensors(B=4, Sq=3, Sk=700, Hq=8, D=D, dtype=dtype)
    expected = attention(*moved((q, k, v)), causal=True, seqused_k=int32(*LENGTHS).cuda())
    pages, q = in_pages(k, v, page_size, LENGTHS), q.cuda()
    for name, schedule in SCHEDULES.items():
        with _schedule.forced(**schedule), poisoned():
            assert_same(cached(q, pages, LENGTHS, causal=True), expected, f"dense q, {name}")
            assert_same(varlen(q, pages, LENGTHS, causal=True), expected, f"packed q, {name}")


@pytest.mark.parametrize("D", [64, 256])
@pytest.mark.parametrize("page_size", [8, 48, 64])
def test_n1_pages_of_long_sequences(page_size, D):
    """Warps look for the places of 32 boxes of the copy engine at a time: here several times in a sequence."""
    lengths = (4500, 2049)
    q, k, v = tensors(B=2, Sq=3, Sk=4500, Hq=8, D=D, dtype=torch.bfloat16)
    expected = attention(*moved((q, k, v)), causal=True, seqused_k=int32(*lengths).cuda())
    pages, on_gpu = in_pages(k, v, page_size, lengths), q.cuda()
    for name, schedule in SCHEDULES.items():
        with _schedule.forced(**schedule), poisoned():
            assert_same(cached(on_gpu, pages, lengths, causal=True), expected, name)
    assert_noticed(*moved((q, k, v)), causal=True)


@needs_hopper
@pytest.mark.parametrize("repeats", [1, 5])
@pytest.mark.parametrize("D", [40, 64, 128, 256])
@pytest.mark.parametrize("page_size", [1, 8, 16, 48])
def test_n1_clusters_read_pages_of_long_splits(page_size, D, repeats):
    """repeats: of the batch. Few splits have clusters of many thread blocks, many splits of few."""
    lengths = (2016, 1024 + 513, 0)
    q, k, v = tensors(B=3, Sq=3, Sk=2016, Hq=8, D=D, dtype=torch.bfloat16)
    pages, keywords = in_pages(k, v, page_size, lengths), {"causal": True, "split_size": 1024}
    expected = attention(*moved((q, k, v)), seqused_k=int32(*lengths).cuda(), **keywords)
    pages = pages._replace(block_table=pages.block_table.repeat(repeats, 1))
    q, lengths = q.cuda().repeat(repeats, 1, 1, 1), lengths * repeats
    for spilled in (True, None):
        with _schedule.forced(kernel="cluster", tile_rows=16, split_parallel=spilled), poisoned():
            got = cached(q, pages, lengths, **keywords)
        for out, lse in zip(*(x.split(3) for x in got), strict=True):
            assert_same((out, lse), expected, f"spilled: {spilled}")
    assert differing(got, cached(q, pages, lengths, causal=True, split_size=2048)) > 0


@every_option
@every_dtype
@pytest.mark.parametrize("Sq", [1, 9, 200])
def test_n1_pages_under_every_option(Sq, dtype, options):
    q, k, v = tensors(B=4, Sq=Sq, Sk=700, Hq=8, dtype=dtype)
    expected = attention(*moved((q, k, v)), seqused_k=int32(*LENGTHS).cuda(), **moved(options))
    pages, on_gpu = in_pages(k, v, 16, LENGTHS), q.cuda()
    assert_same(cached(on_gpu, pages, LENGTHS, **options), expected, "dense q")
    assert_same(varlen(on_gpu, pages, LENGTHS, **options), expected, "packed q")
    if dtype == torch.float32:
        assert_same(expected, cached(q, pages, LENGTHS, **options), "the CPU")
    if Sq == 200:
        assert_noticed(*moved((q, k, v)), **moved(options))


@every_dtype
def test_n1_capacity_and_order_of_pages_do_not_matter(dtype):
    q, k, v = tensors(B=4, Sq=2, Sk=700, Hq=8, dtype=dtype)
    q, slopes = q.cuda(), {"alibi_slopes": normal((8,), 77) / 16}
    expected = cached(q, in_pages(k, v, 16, LENGTHS), LENGTHS, causal=True, **slopes)
    for seed, spare in ((6, 0), (7, 1), (8, 300)):
        pages = in_pages(k, v, 16, LENGTHS, spare_columns=spare, spare_pages=spare, seed=seed)
        assert_same(cached(q, pages, LENGTHS, causal=True, **slopes), expected, f"{spare} spare columns")
    exchanged = pages.block_table.clone()
    exchanged[0, [0, 9]] = pages.block_table[0, [9, 0]]
    other = cached(q, pages._replace(block_table=exchanged), LENGTHS, causal=True, **slopes)
    assert differing(other, expected) > 0


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("page_size", [1, 20, 24])
def test_n1_more_tiles_than_thread_blocks(page_size, D):
    """A thread block of the Hopper tile kernel takes several: keys of the next come while those of the last are met."""
    q, k, v = tensors(B=3, Sq=700, Sk=900, Hq=32, Hk=16, D=D, dtype=torch.bfloat16)
    rows, on_gpu = (900, 513, 777), q.cuda()
    pages = in_pages(k, v, page_size, rows)
    for pads, keywords in (
        ((0, 0, 0), {}),
        ((3, 130, 77), {}),
        ((0, 0, 0), {"window": (300, -1), "k_pos": int32(5, 0, 1000)}),
    ):
        keywords = {"causal": True, **keywords, **({"leftpad_k": int32(*pads)} if any(pads) else {})}
        keys = int32(*(n - pad for n, pad in zip(rows, pads)))
        expected = attention(*moved((q, k, v)), seqused_k=keys.cuda(), **moved(keywords))
        with poisoned():
            assert_same(cached(on_gpu, pages, rows, **keywords), expected, f"{pads}, {list(keywords)}")
    assert_noticed(*moved((q, k, v)), causal=True)


@every_dtype
def test_n2_left_padding_and_first_positions(dtype):
    q, k, v = tensors(B=3, Sq=5, Sk=333, Hq=8, dtype=dtype)
    pads, rows = (0, 65, 200), (333, 398, 533)
    wide = [torch.full((3, 533, *x.shape[2:]), math.nan, dtype=dtype) for x in (k, v)]
    for b, pad in enumerate(pads):
        for to, x in zip(wide, (k, v)):
            to[b, pad : pad + 333] = x[b]
    pages, on_gpu, pos = in_pages(*wide, 16, rows), q.cuda(), int32(0, 70, 5)
    for keywords in ({}, {"k_pos": pos}):
        expected = attention(*moved((q, k, v)), causal=True, **moved(keywords))
        keywords = {"causal": True, "leftpad_k": int32(*pads), **keywords}
        assert_same(cached(on_gpu, pages, rows, **keywords), expected, "dense q")
        assert_same(varlen(on_gpu, pages, (333,) * 3, **keywords), expected, "packed q")
    assert differing(cached(on_gpu, pages, rows, causal=True, leftpad_k=int32(1, 66, 201)), expected) > 0


@every_dtype
def test_n1_cache_batch_idx_is_a_gather(dtype):
    q, k, v = moved(tensors(B=4, Sq=3, Sk=700, Hq=8, dtype=dtype))
    entries = shuffled(9, 3)[:4].cuda()
    caches = [torch.full((9, *x.shape[1:]), math.nan, dtype=dtype, device="cuda") for x in (k, v)]
    for cache, x in zip(caches, (k, v)):
        cache[entries] = x
    used = int32(*LENGTHS).cuda()
    expected = attention(q, k, v, causal=True, seqused_k=used)
    keywords = {"split_size": SPLIT, "return_lse": True, "causal": True, "cache_seqlens": used}
    for name, schedule in SCHEDULES.items():
        with _schedule.forced(**schedule):
            got = fad.attn_with_kvcache(q, *caches, cache_batch_idx=entries.int(), **keywords)
        assert_same(got, expected, name)
    turned = fad.attn_with_kvcache(q, *caches, cache_batch_idx=entries.roll(1).int(), **keywords)
    assert differing(turned, expected) > 0


@every_dtype
@pytest.mark.parametrize("D", [20, 72])
def test_head_dims_that_are_padded(D, dtype):
    q, k, v = tensors(B=2, Sq=3, Sk=300, Hq=8, D=D, dtype=dtype)
    expected = attention(*moved((q, k, v)), causal=True)
    assert_same(cached(q.cuda(), in_pages(k, v, 16), (300, 300), causal=True), expected)
    assert differing(cached(q.cuda(), in_pages(k, v, 16), (300, 299), causal=True), expected) > 0


@every_dtype
def test_wrong_pages_and_lengths_reach_nobody_else(dtype):
    """They cannot be checked. Nothing outside the pool is read, and the other sequences keep their bits."""
    q, k, v = tensors(B=3, Sq=2, Sk=300, Hq=8, dtype=dtype)
    pages, q = in_pages(k, v, 16), q.cuda()
    expected = cached(q, pages, (300,) * 3, causal=True)
    wrong = pages.block_table.clone()
    wrong[1] = int32(-1, 2**31 - 1, -(2**31)).repeat(7)[: wrong.shape[1]]
    for lengths in ((300, 300, 300), (300, 2**31 - 1, 300), (300, -5, 300)):
        out, lse = cached(q, pages._replace(block_table=wrong), lengths, causal=True)
        for b in (0, 2):
            assert_same((out[b], lse[b]), [x[b] for x in expected], f"sequence {b}")
        assert bits_differ(out[1], expected[0][1]) > 0


# ---- appending -------------------------------------------------------------------------------------------------------


def empty_cache(kind, dtype, B=3, Hk=2, D=64, capacity=736, page_size=16):
    """k_cache, v_cache full of NaN, and the keywords that say where sequences lie in them. On the CPU."""
    entries = {"dense": B, "indexed": 7, "paged": B * (capacity // page_size) + 2}[kind]
    rows = page_size if kind == "paged" else capacity
    caches = [torch.full((entries, rows, Hk, D), math.nan, dtype=dtype) for _ in range(2)]
    if kind == "indexed":
        return *caches, {"cache_batch_idx": shuffled(7, 2)[:B].int()}
    if kind == "paged":
        return *caches, {"block_table": shuffled(entries, 4)[: entries - 2].int().view(B, -1)}
    return *caches, {}


every_cache = pytest.mark.parametrize("kind", ["dense", "indexed", "paged"])


@every_cache
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=str)
def test_n12_appends_and_rotations_are_the_cpus(kind, dtype):
    x, (cos, sin) = normal((3, 9, 2, 64), 3, dtype), (normal((800, 16), 90 + i, dtype) for i in range(2))
    used = int32(0, 50, 727)
    for interleaved, tables in itertools.product((True, False), ({}, {"rotary_cos": cos, "rotary_sin": sin})):
        results = []
        for device in ("cpu", "cuda"):
            k_cache, v_cache, where = moved(empty_cache(kind, dtype), device)
            arguments = moved((x, x.flip(0), used, where, tables), device)
            k, v, lengths, where, rotary = arguments
            keywords = {**where, **rotary, "rotary_interleaved": interleaved}
            fad.append_kvcache(k_cache, v_cache, k, v, cache_seqlens=lengths, **keywords)
            turned = fad.apply_rotary(k, *moved((cos, sin), device), offsets=lengths, interleaved=interleaved)
            results.append([y.cpu() for y in (k_cache, v_cache, turned)])
        for got, want, name in zip(*results, ("k_cache", "v_cache", "rotated"), strict=True):
            assert_bits_equal(got, want, name)
    assert bits_differ(results[0][2], x) > 0


@every_cache
@every_dtype
def test_n1_step_by_step_is_prefill_at_once(kind, dtype):
    q, k, v = moved(tensors(B=3, Sq=700, Sk=700, Hq=8, dtype=dtype))
    whole = attention(q, k, v, causal=True)
    k_cache, v_cache, where = moved(empty_cache(kind, dtype))
    keywords = {"split_size": SPLIT, "return_lse": True, "causal": True, **where}
    for first, end in ((0, 1), (1, 300), (300, 301), (301, 511), (511, 512), (512, 700)):
        q_new, k_new, v_new = (x[:, first:end] for x in (q, k, v))
        used = torch.full((3,), first, dtype=torch.int32, device="cuda")
        out, lse = fad.attn_with_kvcache(q_new, k_cache, v_cache, k_new, v_new, cache_seqlens=used, **keywords)
        assert_same((out, lse), (whole[0][:, first:end], whole[1][:, :, first:end]), f"rows {first} to {end}")
    assert_noticed(q, k, v, causal=True)


@every_cache
def test_appends_without_room_are_left_out(kind):
    x = normal((3, 9, 2, 64), 3)
    k_cache, v_cache, where = empty_cache(kind, torch.float32)
    if kind == "paged":
        where["block_table"][1, 3] = len(k_cache)
    if kind == "indexed":
        where["cache_batch_idx"][1] = -1
    on_gpu = moved((k_cache, v_cache, x, where))
    fad.append_kvcache(*on_gpu[:2], on_gpu[2], on_gpu[2], cache_seqlens=int32(730, 45, -4).cuda(), **on_gpu[3])
    rows = [(y == y).flatten(2).all(-1).sum().item() for y in on_gpu[:2]]
    room = 6 + {"dense": 9, "indexed": 0, "paged": 3}[kind] + 5
    assert rows == [room, room]


# ---- graphs, streams, torch ------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("schedule", [{}, *list(SCHEDULES.values())[:4]], ids=["auto", *list(SCHEDULES)[:4]])
def test_graph_of_paged_decode_with_growing_lengths(schedule, dtype):
    """A graph that appends a key and a value to each sequence and attends to all, as generation does."""
    q, k, v = moved(tensors(B=3, Sq=1, Sk=700, Hq=8, dtype=dtype))
    pages = Pages(*moved(in_pages(k.cpu(), v.cpu(), 16, spare_columns=2)))
    used, k_new, v_new = int32(0, 0, 0).cuda(), k[:, :1].clone(), v[:, :1].clone()

    def step():
        with _schedule.forced(**schedule):
            result = fad.attn_with_kvcache(
                q, pages.k, pages.v, k_new, v_new, cache_seqlens=used, block_table=pages.block_table, causal=True,
                split_size=SPLIT, return_lse=True,
            )  # fmt: skip
        used.add_(1)
        return result

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    previous = None
    for first in (int32(0, 62, 690), int32(511, 127, 300)):
        used.copy_(first)
        for lengths in (first, first + 1, first + 2):
            for new, x in ((k_new, k), (v_new, v)):
                new.copy_(torch.stack([x[b, n : n + 1] for b, n in enumerate(lengths.tolist())]))
            out.fill_(math.nan)
            lse.fill_(math.nan)
            graph.replay()
            expected = attention(q, k, v, causal=True, seqused_k=(lengths + 1).cuda())
            assert_same((out, lse), expected, f"lengths {lengths.tolist()}")
            assert previous is None or differing((out, lse), previous) > 0
            previous = out.clone(), lse.clone()


@every_dtype
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_call_waits_for_nothing(dtype):
    q, k, v = moved(tensors(B=3, Sq=1, Sk=300, dtype=dtype))
    k_cache, v_cache, where = moved(empty_cache("paged", dtype))
    cos, sin = (normal((800, 16), 90 + i, dtype).cuda() for i in range(2))
    used, finished = int32(3, 100, 5).cuda(), torch.cuda.Event()
    keywords = {"cache_seqlens": used, "causal": True, "rotary_cos": cos, "rotary_sin": sin, **where}
    fad.attn_with_kvcache(q, k_cache, v_cache, k[:, :1], v[:, :1], **keywords)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        busy()
        fad.attn_with_kvcache(q, k_cache, v_cache, k[:, :1], v[:, :1], **keywords)
        finished.record()
        assert not finished.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@every_cache
def test_opcheck(kind):
    k_cache, v_cache, where = empty_cache(kind, torch.bfloat16)
    x, absent = normal((3, 9, 2, 64), 3, torch.bfloat16), torch.empty(0, dtype=torch.int32)
    places = where.get("cache_batch_idx", absent), where.get("block_table", absent)
    tables = [normal((800, 16), 90 + i) for i in range(2)]
    arguments = (x, x, k_cache.zero_(), v_cache.zero_(), int32(0, 50, 700), *places, *tables)
    torch.library.opcheck(ops.append, (*moved(arguments), False))
    torch.library.opcheck(ops.rotate, (*moved((x, *tables, int32(0, 50, 700))), True, False))


@every_dtype
def test_audit_by_the_cpu(dtype):
    q, k, v = tensors(B=4, Sq=3, Sk=700, Hq=8, dtype=dtype)
    pages = in_pages(k, v, 16, LENGTHS)
    out, lse = cached(q.cuda(), pages, LENGTHS, causal=True)
    keywords = moved({"causal": True, "split_size": SPLIT, "block_table": pages.block_table})
    used = int32(*LENGTHS).cuda()
    report = fad.audit(q.cuda(), *moved(pages[:2]), out, lse, rows=60, seqused_k=used, **keywords)
    assert report.ok
    assert not fad.audit(q.cuda(), *moved(pages[:2]), out, lse, rows=60, seqused_k=used - 1, **keywords).ok
