"""N1: scheduling is free, arithmetic is fixed. Every way a peer has let the rest of a call reach a row, as a test.

Each test also shows that its inputs can tell: the same keys cut into other splits must change bits.
"""

import ctypes
import math
import platform
import threading

import pytest
import torch
from cases import BATCHES, CHUNK_CUTS, GRAPH_BUCKET_BATCHES, NEIGHBOUR, normal

import flash_attn_det as fad
from flash_attn_det import _schedule
from flash_attn_det.testing import assert_bits_equal, bits_differ, check_batch_invariance

fp32_and_bf16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
NAN, INF = math.nan, math.inf


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def tensors(B=1, Sq=1, Sk=300, Hq=4, Hk=2, D=16, Dv=None, dtype=torch.float32, seed=1):
    shapes = ((B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv or D))
    return tuple(normal(shape, 10 * seed + i, dtype) for i, shape in enumerate(shapes))


def attention(*qkv, **keywords):
    """out [B, Sq, Hq, Dv] and lse [B, Hq, Sq]; splits short enough that small shapes have several."""
    return fad.attn(*qkv, **{"split_size": 128, **keywords}, return_lse=True)


def packed(*arguments, **keywords):
    return fad.attn_varlen(*arguments, **{"split_size": 128, **keywords}, return_lse=True)


def assert_same(actual, expected, name=""):
    for got, want, part in zip(actual, expected, ("out", "lse")):
        assert_bits_equal(got, want, f"{part} {name}")


def assert_noticed(qkv, **keywords):
    """The negative control: other splits of the same keys give other bits, so these inputs can tell."""
    control = attention(*qkv, **{**keywords, "split_size": 256})
    assert sum(bits_differ(a, b) for a, b in zip(attention(*qkv, **keywords), control)) > 0


def rows(result, first, end):
    """Rows first .. end - 1 of out and lse."""
    out, lse = result
    return out[:, first:end], lse[:, :, first:end]


def sdpa(q, k, v, **keywords):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, enable_gqa=True, **keywords).transpose(1, 2)


# ---- batch and neighbours --------------------------------------------------------------------------------------------


@fp32_and_bf16
@pytest.mark.parametrize("Sq", [1, 9, 70])
def test_n1_batch_splits_and_permutations(dtype, Sq):
    qkv = tensors(B=9, Sq=Sq, Sk=400, dtype=dtype)
    report = check_batch_invariance(attention, qkv, causal=True)
    assert len(report.checks) >= 8
    assert_noticed(qkv, causal=True)


def regrouped_by_batch(q, k, v):
    """What peers do: the number of splits follows from how many rows share the machine."""
    return attention(q, k, v, split_size=128 * max(1, 4 // q.shape[0]))


def test_n1_batch_control_is_caught():
    message = r"cut 'ones', rows \[0\] of 4 is not batch-invariant in row 0: out\[0\]: \d+ of"
    with pytest.raises(AssertionError, match=message):
        check_batch_invariance(regrouped_by_batch, tensors(B=4))
    report = check_batch_invariance(attention, tensors(B=4), control=regrouped_by_batch)
    assert report.control_differing > 0


def test_n1_every_batch_size():
    qkv = tensors(B=max(BATCHES), Sk=200)
    everything = attention(*qkv)
    for B in BATCHES:
        assert_same(attention(*(x[:B] for x in qkv)), [x[:B] for x in everything], f"batch {B}")
    assert_noticed(qkv)


def test_n1_batch_thresholds_of_graph_buckets():
    qkv = tensors(B=max(GRAPH_BUCKET_BATCHES), Sk=140, Hq=2, Hk=1, D=8)
    everything = attention(*qkv)
    for B in GRAPH_BUCKET_BATCHES:
        assert_same(attention(*(x[:B] for x in qkv)), [x[:B] for x in everything], f"batch {B}")
    for b in (0, 500, 992):
        assert_same(attention(*(x[b : b + 1] for x in qkv)), [x[b : b + 1] for x in everything], f"alone {b}")
    assert_noticed(qkv)


@fp32_and_bf16
def test_n1_neighbour_that_grows_from_9_to_10_rows(dtype):
    Hq, Hk, D, Sk = (NEIGHBOUR[name] for name in ("Hq", "Hk", "D", "Sk"))
    q, k, v = (x[0] for x in tensors(Sq=11, Sk=Sk + 40, Hq=Hq, Hk=Hk, D=D, dtype=dtype))
    decode = []
    for neighbour_rows in (9, 10):
        cu_q, cu_k = int32(0, 1, 1 + neighbour_rows), int32(0, Sk, Sk + 40)
        out, lse = packed(q[: 1 + neighbour_rows], k, v, cu_q, cu_k, causal=True, split_size=512)
        decode.append((out[:1], lse[:, :1]))
    assert_same(decode[1], decode[0])
    alone = attention(q[None, :1], k[None, :Sk], v[None, :Sk], causal=True, split_size=512)
    assert_same((alone[0][0], alone[1][0]), decode[0])
    assert_noticed((q[None, :1], k[None, :Sk], v[None, :Sk]))


def test_n1_longest_neighbour_does_not_set_the_splits():
    q, k, v = tensors(B=3, Sq=4, Sk=1500)
    alone = attention(q[:1], k[:1, :333], v[:1, :333], causal=True)
    for longest in (333, 334, 640, 1500):
        lengths = int32(333, longest, 1)
        batch = attention(q, k[:, :longest], v[:, :longest], causal=True, seqused_k=lengths)
        assert_same([x[:1] for x in batch], alone, f"longest {longest}")
    assert_noticed((q[:1], k[:1, :333], v[:1, :333]))


def test_n1_heads_of_the_call_do_not_matter():
    q, k, v = tensors(B=2, Sq=20, Sk=300, Hq=12, Hk=4)
    out, lse = attention(q, k, v, causal=True)
    for h in range(4):
        part = attention(q[:, :, 3 * h : 3 * h + 3], k[:, :, h : h + 1], v[:, :, h : h + 1], causal=True)
        assert_same(part, (out[:, :, 3 * h : 3 * h + 3], lse[:, 3 * h : 3 * h + 3]), f"kv head {h}")
        one = attention(q[:, :, 3 * h : 3 * h + 1], k[:, :, h : h + 1], v[:, :, h : h + 1], causal=True)
        assert_same(one, (out[:, :, 3 * h : 3 * h + 1], lse[:, 3 * h : 3 * h + 1]), f"query head {3 * h}")
    assert_noticed((q, k, v), causal=True)


# ---- positions, prefill and decode -----------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "window": {"window": (250, -1)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": normal((4,), 77) / 16},
    "sinks": {"sinks": normal((4,), 78)},
}
options = pytest.mark.parametrize("extra", OPTIONS.values(), ids=OPTIONS)


def test_n1_prefill_cut_into_chunks_anywhere():
    length = 4200
    q, k, v = tensors(Sq=length, Sk=length, Hq=2, Hk=1, D=8, dtype=torch.bfloat16)
    whole = attention(q, k, v, causal=True, split_size=512)
    for cut in CHUNK_CUTS:
        first = attention(q[:, :cut], k[:, :cut], v[:, :cut], causal=True, split_size=512)
        second = attention(q[:, cut:], k, v, causal=True, split_size=512)
        assert_same(first, rows(whole, 0, cut), f"before {cut}")
        assert_same(second, rows(whole, cut, length), f"after {cut}")
    assert_noticed((q[:, -200:], k, v), split_size=512)


@options
@fp32_and_bf16
def test_n1_prefill_row_is_the_decode_row(dtype, extra):
    length = 700
    q, k, v = tensors(Sq=length, Sk=length, dtype=dtype)
    prefill = attention(q, k, v, causal=True, **extra)
    for n in (1, 2, 63, 64, 65, 128, 129, 511, 512, 513, 700):
        decode = attention(q[:, n - 1 : n], k[:, :n], v[:, :n], causal=True, **extra)
        assert_same(decode, rows(prefill, n - 1, n), f"row {n - 1}")
        # One query row: causal hides nothing, but dropping it must not choose another arithmetic.
        if "window" not in extra:
            assert_same(attention(q[:, n - 1 : n], k[:, :n], v[:, :n], **extra), decode, f"row {n - 1} without causal")
    assert_noticed((q, k, v), causal=True, **extra)


def test_n1_torch_sdpa_fails_the_same_comparison():
    q, k, v = tensors(Sq=700, Sk=700, D=64)
    prefill = sdpa(q, k, v, is_causal=True)
    ours = attention(q, k, v, causal=True)
    differing = 0
    for n in (129, 513, 700):
        differing += bits_differ(sdpa(q[:, n - 1 : n], k[:, :n], v[:, :n]), prefill[:, n - 1 : n])
        assert_same(attention(q[:, n - 1 : n], k[:, :n], v[:, :n], causal=True), rows(ours, n - 1, n))
    assert differing > 0


@options
def test_n1_speculative_rows_are_single_rows(extra):
    q, k, v = tensors(Sq=12, Sk=600)
    together = attention(q, k, v, causal=True, **extra)
    for i in range(12):
        n = 600 - 12 + i + 1
        alone = attention(q[:, i : i + 1], k[:, :n], v[:, :n], causal=True, **extra)
        assert_same(alone, rows(together, i, i + 1), f"row {i}")
    assert_noticed((q, k, v), causal=True, **extra)


@options
def test_n1_packed_is_padded(extra):
    q, k, v = tensors(B=4, Sq=30, Sk=420)
    used_q, used_k = int32(30, 1, 0, 17), int32(420, 129, 7, 0)
    out, lse = attention(q, k, v, causal=True, seqused_q=used_q, seqused_k=used_k, **extra)
    flat = [torch.cat([x[b, : n[b]] for b in range(4)]) for x, n in ((q, used_q), (k, used_k), (v, used_k))]
    starts = [torch.cat([int32(0), n.cumsum(0).int()]) for n in (used_q, used_k)]
    packed_out, packed_lse = packed(*flat, *starts, causal=True, **extra)
    expected = (
        torch.cat([out[b, : used_q[b]] for b in range(4)]),
        torch.cat([lse[b, :, : used_q[b]] for b in range(4)], 1),
    )
    assert_same((packed_out, packed_lse), expected)
    assert_noticed((q, k, v), causal=True, **extra)


def test_n2_left_padding_moves_no_position():
    q, k, v = tensors(B=3, Sq=5, Sk=333, Dv=24)
    alone = attention(q, k, v, causal=True)
    for pad in ((0, 1, 63), (64, 65, 200)):
        wide_k, wide_v = (torch.full((3, 333 + 200, 2, d), NAN) for d in (16, 24))
        for b in range(3):
            wide_k[b, pad[b] : pad[b] + 333] = k[b]
            wide_v[b, pad[b] : pad[b] + 333] = v[b]
        padded = attention(q, wide_k, wide_v, causal=True, leftpad_k=int32(*pad), seqused_k=int32(333, 333, 333))
        assert_same(padded, alone, f"left padding {pad}")
    assert_noticed((q, k, v), causal=True)


def test_n1_cache_capacity_does_not_matter():
    q, k, v = tensors(B=2, Sq=2, Sk=500)
    alone = attention(q, k, v, causal=True)
    for capacity in (501, 512, 1000, 5000):
        caches = [torch.full((2, capacity, *x.shape[2:]), NAN) for x in (k, v)]
        for cache, x in zip(caches, (k, v)):
            cache[:, :500] = x
        assert_same(attention(q, *caches, causal=True, seqused_k=int32(500, 500)), alone, f"capacity {capacity}")
    assert_noticed((q, k, v), causal=True)


@pytest.mark.parametrize("dropped", [1, 63, 64, 100, 128, 256, 280])
@pytest.mark.parametrize("extra", [{}, OPTIONS["alibi"]], ids=["plain", "alibi"])
def test_n2_rolling_window_cache_is_the_whole_cache(dropped, extra):
    q, k, v = tensors(B=2, Sq=20, Sk=500)
    keywords = {"causal": True, "window": (190, -1), **extra}
    whole = attention(q, k, v, **keywords)
    first = int32(dropped, dropped)
    assert_same(attention(q, k[:, dropped:], v[:, dropped:], k_pos=first, **keywords), whole)
    # Without the position of the first key, blocks and splits move, and that can be seen.
    moved = attention(q, k[:, dropped:], v[:, dropped:], **keywords)
    assert (sum(bits_differ(a, b) for a, b in zip(moved, whole)) > 0) == (dropped % 128 != 0)


def test_n3_a_longer_sequence_does_not_move_earlier_splits():
    q, k, v = tensors(Sq=1, Sk=1000)
    states = [fad.attn_partials(q, k[:, :n], v[:, :n], split_size=256) for n in (600, 1000)]
    assert [len(state.m) for state in states] == [3, 4]
    for name in ("o", "m", "l"):
        short, long = (getattr(state, name) for state in states)
        assert_bits_equal(long[:2], short[:2], name)  # keys 0 .. 511
        assert bits_differ(long[2], short[2]) > 0  # keys 512 .. 599 against 512 .. 767


def test_n3_a_window_does_not_move_the_splits():
    q, k, v = tensors(Sq=1, Sk=500, Hq=16)
    kept = attention(q, k, v, window=(199, -1))  # keys 300 .. 499: splits begin at 384, not at 300
    assert_same(attention(q, k[:, 256:], v[:, 256:], window=(199, -1)), kept)
    shifted = attention(q, k[:, 300:], v[:, 300:])
    assert sum(bits_differ(a, b) for a, b in zip(shifted, kept)) > 0


# ---- buffers ---------------------------------------------------------------------------------------------------------


def test_n1_strides_do_not_matter():
    qkv = tensors(B=2, Sq=33, Sk=300, Hq=4, Hk=2, D=20, Dv=12)
    expected = attention(*qkv, causal=True)
    layouts = {
        "heads before rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "batch innermost": lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
        "every second row": lambda x: torch.full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), NAN)[:, ::2].copy_(x),
        "slice of a wider head": lambda x: torch.full((*x.shape[:3], x.shape[3] + 9), NAN)[..., 5:-4].copy_(x),
        "last dimension not contiguous": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, layout in layouts.items():
        views = [layout(x) for x in qkv]
        assert_same(attention(*views, causal=True), expected, name)
    assert_noticed(qkv, causal=True)


def test_n1_expanded_keys_are_repeated_keys():
    q, k, v = tensors(B=5, Sq=3, Sk=300)
    shared_k, shared_v = k[:1].expand(5, -1, -1, -1), v[:1].expand(5, -1, -1, -1)
    assert_same(attention(q, shared_k, shared_v), attention(q, shared_k.contiguous(), shared_v.contiguous()))
    one_head = k[:, :, :1].expand(-1, -1, 2, -1)
    assert_same(attention(q, one_head, v), attention(q, one_head.contiguous(), v))
    assert_noticed((q, k, v))


@pytest.mark.parametrize(
    "empty",
    [
        torch.empty_strided((2, 0, 2, 8), (0, 0, 0, 0)),
        torch.empty(2, 2, 8, 0).permute(0, 3, 1, 2),
        torch.empty(2, 0, 2, 8),
    ],
    ids=["zero strides", "permuted", "contiguous"],
)
def test_n10_strides_of_empty_keys_do_not_matter(empty):
    q = normal((2, 3, 2, 8), 1)
    out, lse = attention(q, empty, empty)
    assert_bits_equal(out, torch.zeros(2, 3, 2, 8))
    assert_bits_equal(lse, torch.full((2, 2, 3), -INF))


def test_n1_stride_of_a_single_element_does_not_matter():
    qkv = tensors(B=2, Sq=3, Sk=200, D=1)
    odd = [torch.empty_strided(x.shape, (*x.stride()[:3], 7)).copy_(x) for x in qkv]
    assert_same(attention(*odd), attention(*qkv))
    assert_noticed(qkv)


# ---- scheduling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_n1_forced_schedules(dtype):
    qkv = tensors(B=1, Sq=25, Sk=650, Hq=6, Hk=2, D=20, Dv=28, dtype=dtype)  # 75 rows share a kv head
    keywords = {"causal": True, "window": (500, -1), "sinks": normal((6,), 3), "softcap": 6.0}
    expected = attention(*qkv, **keywords)
    for isa in _schedule.isas() if dtype != torch.float64 else [None]:
        for layout in ("rows", "keys"):
            for tile_rows, split_parallel in ((7, False), (16, True), (64, False), (65, True), (256, True)):
                choice = {"isa": isa, "layout": layout, "tile_rows": tile_rows, "split_parallel": split_parallel}
                with _schedule.forced(**choice):
                    assert_same(attention(*qkv, **keywords), expected, str(choice))
    assert_noticed(qkv, **keywords)


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@fp32_and_bf16
def test_n1_thread_counts(dtype, restored_threads):
    decode = tensors(B=1, Sq=1, Sk=5000, Hq=16, Hk=4, D=64, dtype=dtype)
    prefill = tensors(B=3, Sq=90, Sk=300, dtype=dtype)
    results = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        results.append((attention(*decode), attention(*prefill, causal=True)))
    for result in results[1:]:
        assert_same(result[0], results[0][0], "decode")
        assert_same(result[1], results[0][1], "prefill")
    assert_noticed(decode)


def test_n1_run_to_run():
    qkv = tensors(B=2, Sq=40, Sk=2000)
    first = attention(*qkv, causal=True)
    for _ in range(10):
        assert_same(attention(*qkv, causal=True), first)
    assert_noticed(qkv, causal=True)


def test_n1_concurrent_python_threads():
    """Threads with split sizes, instruction sets and layouts of their own do not reach each other."""
    qkv = tensors(B=2, Sq=9, Sk=1500)
    settings = [(128, "rows", 1), (256, "keys", 7), (512, "rows", 64), (1024, "keys", 256)]
    expected = {size: fad.attn(*qkv, split_size=size, return_lse=True) for size, _, _ in settings}
    failures = []
    barrier = threading.Barrier(len(settings))

    def work(size, layout, tile_rows, isa):
        try:
            barrier.wait(timeout=60)
            for _ in range(20):
                with fad.split_size(size), _schedule.forced(isa=isa, layout=layout, tile_rows=tile_rows):
                    assert_same(fad.attn(*qkv, return_lse=True), expected[size], f"split {size}")
        except Exception as error:
            failures.append(error)

    isas = _schedule.isas()
    threads = [threading.Thread(target=work, args=(*s, isas[i % len(isas)])) for i, s in enumerate(settings)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert bits_differ(expected[128][1], expected[256][1]) > 0


def test_n7_flush_to_zero_of_the_caller_does_not_matter(restored_threads):
    q, k, v = tensors(B=1, Sq=20, Sk=300)
    small_q, small_v = q * 2.0**-126, v * 2.0**-126
    calls = [(q, k, small_v), (small_q, k, v), (small_q, k, small_v)]
    expected = [attention(*call, scale=0.25) for call in calls]
    tiny = 2.0**-126
    assert (expected[0][0].abs() < tiny).all()  # there is something to flush
    assert expected[0][0].any()
    if not torch.set_flush_denormal(True):
        pytest.skip("needs a CPU whose subnormals can be flushed")
    try:
        flushed = float(torch.full((1,), tiny) * 0.5) == 0
        actual = []
        for n in (1, 2):
            torch.set_num_threads(n)
            actual.append([attention(*call, scale=0.25) for call in calls])
    finally:
        torch.set_flush_denormal(False)
    assert flushed
    for results in actual:
        for result, want in zip(results, expected):
            assert_same(result, want)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs the number of x86's rounding mode")
def test_n7_rounding_mode_of_the_caller_does_not_matter(restored_threads):
    libm, upward = ctypes.CDLL("libm.so.6"), 0x800
    torch.set_num_threads(1)
    qkv = tensors(B=1, Sq=20, Sk=300)
    keywords = {"scale": 0.25, "sinks": normal((4,), 9)}
    expected = attention(*qkv, **keywords)
    one, small = torch.ones(1), torch.full((1,), 2.0**-40)
    libm.fesetround(upward)
    try:
        noticed = float((one + small) - one) > 0
        actual = attention(*qkv, **keywords)
    finally:
        libm.fesetround(0)
    assert noticed
    assert_same(actual, expected)


def test_n8_fused_fold_is_the_torch_fold():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        qkv = tensors(B=2, Sq=6, Sk=1000, dtype=dtype)
        keywords = {"causal": True, "sinks": normal((4,), 5), "split_size": 128}
        merged = fad.merge_partials(fad.attn_partials(*qkv, **keywords), return_lse=True)
        assert_same(merged, attention(*qkv, **keywords), str(dtype))
        assert_noticed(qkv, **keywords)


# ---- masked keys, empty rows, non-finite values ----------------------------------------------------------------------

POISON = [NAN, INF, -INF, 3e38]
poisons = pytest.mark.parametrize("poison", POISON, ids=["nan", "inf", "minus inf", "huge"])
layouts = pytest.mark.parametrize("layout", ["rows", "keys"])


@layouts
@poisons
@pytest.mark.parametrize("keywords", [{}, {"softcap": 2.0}, {"scale": -0.5}, {"scale": 1e-50}], ids=str)
def test_n4_keys_that_no_row_sees_do_not_matter(poison, layout, keywords):
    q, k, v = tensors(B=1, Sq=9, Sk=330)
    keywords = {"causal": True, "window": (70, -1), "seqused_k": int32(290), **keywords}
    expected = attention(q, k, v, **keywords)
    for x in (k, v):
        x[:, :200] = poison  # row 0 stands at 281 and sees 211 ..
        x[:, 290:] = poison
    with _schedule.forced(layout=layout):
        assert_same(attention(q, k, v, **keywords), expected)
    assert expected[0].isfinite().all()


@layouts
@poisons
@pytest.mark.parametrize("sinks", [None, normal((4,), 6)], ids=["no sinks", "sinks"])
def test_n11_keys_reach_only_the_rows_that_see_them(poison, layout, sinks):
    """Rows of one tile, some of which see the key: the others must not meet its V, not even as 0 * NaN."""
    q, k, v = tensors(B=1, Sq=80, Sk=200, Hq=4, Hk=2)
    keywords = {"causal": True, "sinks": sinks}
    clean = attention(q, k, v, **keywords)
    for which in "kv":
        for key in (125, 150, 199):
            wrong_k, wrong_v = k.clone(), v.clone()
            if which == "k":
                wrong_k[:, key, :, 3] = poison
            else:
                wrong_v[:, key, :, 3] = poison
            with _schedule.forced(layout=layout):
                result = attention(q, wrong_k, wrong_v, **keywords)
            before = max(0, key - 120)  # row i stands at 120 + i
            assert_same(rows(result, 0, before), rows(clean, 0, before), f"{which} of key {key}")
            after = rows(result, before, 80)[0]
            assert bits_differ(after, rows(clean, before, 80)[0]) > 0
            if which == "v" and math.isnan(poison):
                assert after[..., 3].isnan().all()
                other = torch.arange(16) != 3
                assert_bits_equal(after[..., other].contiguous(), clean[0][:, before:][..., other].contiguous())
                assert_bits_equal(result[1], clean[1], "lse")
            if which == "v" and math.isinf(poison):
                assert (after[..., 3] == poison).all()
            if which == "k" and math.isnan(poison):
                assert after.isnan().all()
                assert rows(result, before, 80)[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_n9_nan_results_have_one_bit_pattern(dtype):
    patterns = {torch.float32: 0x7FC00000, torch.float16: 0x7E00, torch.bfloat16: 0x7FC0, torch.float64: 0x7FF8 << 48}
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    q, k, v = tensors(B=1, Sq=5, Sk=100, dtype=dtype)
    k[:, 3], v[:, 7] = -NAN, -NAN
    for isa in _schedule.isas():
        for layout in ("rows", "keys"):
            with _schedule.forced(isa=isa, layout=layout):
                out, lse = attention(q, k, v)
            for x in (out, lse):
                assert x.isnan().all()
                bits = x.view(integers[x.element_size()])
                assert (bits == patterns[x.dtype]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_n10_rows_that_see_no_key(dtype):
    q, k, v = tensors(B=3, Sq=6, Sk=70, dtype=dtype)
    out, lse = attention(q, k, v, causal=True, seqused_k=int32(70, 2, 0), seqused_q=int32(4, 6, 6))
    nothing = torch.zeros_like(out)
    assert_bits_equal(out[0, 4:], nothing[0, 4:], "unused rows")
    assert_bits_equal(out[1, :4], nothing[1, :4], "rows before every key")
    assert_bits_equal(out[2], nothing[2], "no keys")
    expected = torch.zeros(3, 4, 6, dtype=torch.bool)
    expected[0, :, 4:] = expected[1, :, :4] = expected[2] = True
    assert torch.equal(lse == -INF, expected)
    assert not out.isnan().any()
    assert not lse.isnan().any()


def test_n10_empty_rows_with_sinks():
    sinks = normal((4,), 8)
    q, k, v = tensors(B=2, Sq=3, Sk=40)
    out, lse = attention(q, k, v, sinks=sinks, seqused_k=int32(0, 40), seqused_q=int32(3, 2))
    assert_bits_equal(out[0], torch.zeros(3, 4, 16))
    torch.testing.assert_close(lse[0], sinks[:, None].expand(4, 3))
    assert (lse[1, :, 2] == -INF).all()  # an unused row has no sink either
    assert_bits_equal(out[1, 2], torch.zeros(4, 16))


@pytest.mark.parametrize(("B", "Sq", "Sk"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_n10_empty_calls(B, Sq, Sk):
    out, lse = attention(torch.ones(B, Sq, 4, 16), torch.ones(B, Sk, 2, 16), torch.ones(B, Sk, 2, 24))
    assert_bits_equal(out, torch.zeros(B, Sq, 4, 24))
    assert_bits_equal(lse, torch.full((B, 4, Sq), -INF))
    cu = torch.zeros(B + 1, dtype=torch.int32)
    out, lse = packed(torch.ones(Sq, 4, 16), torch.ones(Sk, 2, 16), torch.ones(Sk, 2, 24), cu, cu)
    assert_bits_equal(out, torch.zeros(Sq, 4, 24))
    assert_bits_equal(lse, torch.full((4, Sq), -INF))


def test_n10_empty_trailing_splits_are_nothing():
    q, k, v = tensors(B=1, Sq=1, Sk=130)
    alone = attention(q, k, v)
    padded = [torch.cat([x, torch.full((1, 900, *x.shape[2:]), NAN)], 1) for x in (k, v)]
    for split_parallel in (False, True):
        with _schedule.forced(split_parallel=split_parallel):
            assert_same(attention(q, *padded, seqused_k=int32(130)), alone)
    merged = fad.merge_partials(fad.attn_partials(q, *padded, seqused_k=int32(130), split_size=128), return_lse=True)
    assert_same(merged, alone)
    assert_noticed((q, k, v))
