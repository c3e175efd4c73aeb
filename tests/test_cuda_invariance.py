"""N1 for the mma family on a GPU: every way a peer has let the rest of a call reach a row, as a test.

Each test also shows that its inputs can tell: the same keys cut into other splits must change bits.
"""

import functools
import math

import pytest
import torch
from cases import BATCHES, CHUNK_CUTS, GRAPH_BUCKET_BATCHES, NEIGHBOUR, normal
from cuda_tools import (
    SPLIT,
    assert_noticed,
    assert_same,
    attention,
    differing,
    every_16_bit_dtype,
    int32,
    moved,
    needs_gpu,
    packed,
    rows,
    sequences,
    tensors,
)

import flash_attn_det as fad
from flash_attn_det import _schedule
from flash_attn_det.testing import assert_bits_equal, check_batch_invariance

pytestmark = needs_gpu

OPTIONS = {
    "plain": {},
    "window": {"window": (150, -1)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": normal((8,), 77) / 16},
    "sinks": {"sinks": normal((8,), 78)},
    "everything": {
        "window": (400, -1),
        "softcap": 5.0,
        "alibi_slopes": normal((8,), 77) / 16,
        "sinks": normal((8,), 78),
        "scale": 0.3,
    },
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
KERNELS = {
    "auto": {},
    "generic": {"kernel": "generic"},
    "generic 64": {"kernel": "generic", "tile_rows": 64, "split_parallel": False},
    "generic 128": {"kernel": "generic", "tile_rows": 128, "split_parallel": False},
    "hopper": {"kernel": "hopper", "split_parallel": False},
    "cluster": {"kernel": "cluster", "tile_rows": 16, "split_parallel": True},
    "cluster that folds": {"kernel": "cluster", "tile_rows": 16},
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


@functools.lru_cache(maxsize=32)
def inputs(**shape):
    """q, k, v on the GPU: 8 query heads on 2 key heads, bf16, unless told. Made once: do not write to them."""
    return moved(tensors(**{"B": 1, "Hq": 8, "dtype": torch.bfloat16, **shape}))


def starts(lengths):
    return torch.cat([int32(0), int32(*lengths).cumsum(0, dtype=torch.int32)]).cuda()


# ---- batch and neighbours --------------------------------------------------------------------------------------------


def regrouped_by_batch(q, k, v, **keywords):
    """What peers do: the number of splits follows from how many rows share the machine."""
    return attention(q, k, v, split_size=128 * max(1, 8 // q.shape[0]), **keywords)


@every_16_bit_dtype
@pytest.mark.parametrize("Sq", [1, 9, 70])
def test_n1_batch_splits_and_permutations(dtype, Sq):
    """Ones, (1, n - 1), halves, twos, and other orders."""
    qkv = inputs(B=9, Sq=Sq, Sk=700, Hq=14, dtype=dtype)
    report = check_batch_invariance(attention, qkv, control=regrouped_by_batch, causal=True)
    assert len(report.checks) >= 8
    assert report.control_differing > 0


@every_16_bit_dtype
def test_n1_every_batch_size(dtype):
    qkv = inputs(B=max(BATCHES), Sq=1, Sk=600, D=32, dtype=dtype)
    everything = attention(*qkv)
    for B in BATCHES:
        assert_same(attention(*sequences(qkv, slice(B))), sequences(everything, slice(B)), f"batch {B}")
    assert_noticed(*qkv)


def test_n1_batch_thresholds_of_graph_buckets():
    qkv = inputs(B=max(GRAPH_BUCKET_BATCHES), Sq=1, Sk=280, Hq=4, D=16)
    everything = attention(*qkv)
    for B in GRAPH_BUCKET_BATCHES:
        assert_same(attention(*sequences(qkv, slice(B))), sequences(everything, slice(B)), f"batch {B}")
    for b in (0, 500, 990, 992):
        here = slice(b, b + 1)
        assert_same(attention(*sequences(qkv, here)), sequences(everything, here), f"alone {b}")
    assert_noticed(*qkv)


@every_kernel
def test_n1_more_tiles_than_multiprocessors(kernel):
    """A grid that runs in waves, or whose thread blocks take several tiles, against one that fits at once."""
    shape = (12, 900, 16, 128)
    generator = torch.Generator("cuda").manual_seed(1)
    qkv = [torch.randn(shape, generator=generator, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    with _schedule.forced(**kernel):
        everything = attention(*qkv, causal=True)
        for b in (0, 5, 11):
            here = slice(b, b + 1)
            assert_same(attention(*sequences(qkv, here), causal=True), sequences(everything, here), f"alone {b}")
    assert_same(attention(*qkv, causal=True), everything)
    assert_noticed(*sequences(qkv, slice(1)), causal=True)


@every_16_bit_dtype
def test_n1_neighbour_that_grows_from_9_to_10_rows(dtype):
    Hq, Hk, D, Sk = (NEIGHBOUR[name] for name in ("Hq", "Hk", "D", "Sk"))
    q, k, v = inputs(Sq=30, Sk=Sk + 40, Hq=Hq, Hk=Hk, D=D, dtype=dtype)
    alone = attention(q[:, :1], k[:, :Sk], v[:, :Sk], causal=True, split_size=512)
    for neighbour in (9, 10):
        flat = q[0, : 1 + neighbour], k[0], v[0], starts([1, neighbour]), starts([Sk, 40])
        out, lse = packed(*flat, causal=True, split_size=512)
        assert_same((out[:1], lse[:, :1]), (alone[0][0], alone[1][0]), f"neighbour of {neighbour} rows")
    assert_noticed(q, k[:, :Sk], v[:, :Sk], causal=True, split_size=512)


def test_n1_longest_neighbour_does_not_set_the_splits():
    q, k, v = inputs(B=3, Sq=20, Sk=3000)
    alone = attention(q[:1], k[:1, :633], v[:1, :633], causal=True)
    for longest in (633, 634, 1280, 3000):
        padded = attention(q, k[:, :longest], v[:, :longest], causal=True, seqused_k=int32(633, longest, 1).cuda())
        assert_same(sequences(padded, slice(1)), alone, f"padded, longest {longest}")
        lengths = [633, longest, 1]
        flat = [torch.cat([x[b, :n] for b, n in enumerate(lengths)]) for x in (k, v)]
        for q_rows in ([20, 20, 20], [20, 1, 3]):
            flat_q = torch.cat([q[b, :n] for b, n in enumerate(q_rows)])
            out, lse = packed(flat_q, *flat, starts(q_rows), starts(lengths), causal=True)
            assert_same((out[None, :20], lse[None, :, :20]), alone, f"packed, longest {longest}, rows {q_rows}")
    assert_noticed(q[:1], k[:1, :633], v[:1, :633], causal=True)


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 16, 32])
@pytest.mark.parametrize("Sq", [1, 5, 40])
def test_n1_a_head_of_a_group_is_that_head_alone(group, Sq):
    q, k, v = inputs(Sq=Sq, Sk=700, Hq=2 * group, D=64, dtype=torch.float16)
    out, lse = attention(q, k, v, causal=True)
    for h in {0, group - 1, group, 2 * group - 1}:
        head, kv_head = slice(h, h + 1), slice(h // group, h // group + 1)
        alone = attention(q[:, :, head], k[:, :, kv_head], v[:, :, kv_head], causal=True)
        assert_same(alone, (out[:, :, head], lse[:, head]), f"head {h} of groups of {group}")
    assert_noticed(*inputs(Sq=300, Sk=700, Hq=2, dtype=torch.float16), causal=True)


# ---- positions, prefill and decode -----------------------------------------------------------------------------------


def decoded(q, k, v, first, end, **keywords):
    """Rows first .. end - 1 of one causal sequence, each as a sequence of one query that ends at its own position."""
    many = [x.expand(end - first, -1, -1, -1) for x in (k, v)]
    lengths = torch.arange(first + 1, end + 1, dtype=torch.int32, device="cuda")
    out, lse = attention(q[0, first:end, None], *many, causal=True, seqused_k=lengths, **keywords)
    return out.transpose(0, 1), lse.permute(2, 1, 0)


@pytest.mark.parametrize(("D", "dtype"), [(64, torch.float16), (128, torch.bfloat16)], ids=["64 fp16", "128 bf16"])
def test_n1_every_prefill_row_is_its_decode_row(D, dtype):
    q, k, v = inputs(Sq=5000, Sk=5000, D=D, dtype=dtype)
    prefill = attention(q, k, v, causal=True)
    for first in range(0, 5000, 500):
        end = first + 500
        assert_same(decoded(q, k, v, first, end), rows(prefill, first, end), f"rows {first} .. {end - 1}")
    for n in (1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 4096, 5000):
        decode = attention(q[:, n - 1 : n], k[:, :n], v[:, :n], causal=True)
        assert_same(decode, rows(prefill, n - 1, n), f"row {n - 1} from its own keys")
        # One query row: causal hides nothing, but dropping it must not choose another arithmetic.
        assert_same(attention(q[:, n - 1 : n], k[:, :n], v[:, :n]), decode, f"row {n - 1} without causal")
    assert_noticed(q, k, v, causal=True)


@every_option
@every_kernel
@pytest.mark.parametrize("D", [64, 128])
def test_n1_every_prefill_row_is_its_decode_row_with_options(options, kernel, D):
    options = moved(options)
    q, k, v = inputs(Sq=700, Sk=700, D=D)
    with _schedule.forced(**kernel):
        prefill = attention(q, k, v, causal=True, **options)
    assert_same(decoded(q, k, v, 0, 700, **options), prefill)
    assert_noticed(q, k, v, causal=True, **options)


def test_n1_torch_sdpa_fails_the_same_comparison():
    q, k, v = inputs(Sq=1000, Sk=1000, Hq=2)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    prefill = sdpa(*heads_first, is_causal=True)
    decode = [sdpa(*(x[:, :, :n] if i else x[:, :, n - 1 : n] for i, x in enumerate(heads_first))) for n in (129, 1000)]
    assert any((one != prefill[:, :, n - 1 : n]).any() for one, n in zip(decode, (129, 1000)))
    ours = attention(q, k, v, causal=True)
    for n in (129, 1000):
        assert_same(attention(q[:, n - 1 : n], k[:, :n], v[:, :n], causal=True), rows(ours, n - 1, n))


@every_kernel
@every_16_bit_dtype
def test_n1_prefill_cut_into_chunks_anywhere(dtype, kernel):
    length = 5000
    q, k, v = inputs(Sq=length, Sk=length, Hq=4, dtype=dtype)
    whole = attention(q, k, v, causal=True, split_size=512)
    edges = (0, *CHUNK_CUTS, length)
    chunks = [(0, cut) for cut in CHUNK_CUTS] + [(cut, length) for cut in CHUNK_CUTS] + list(zip(edges, edges[1:]))
    for first, end in chunks:
        with _schedule.forced(**kernel):
            chunk = attention(q[:, first:end], k[:, :end], v[:, :end], causal=True, split_size=512)
        assert_same(chunk, rows(whole, first, end), f"rows {first} .. {end - 1}")
    assert_noticed(q, k, v, causal=True, split_size=512)


@every_option
@every_16_bit_dtype
def test_n1_speculative_rows_are_single_rows(dtype, options):
    options = moved(options)
    q, k, v = inputs(Sq=16, Sk=3000, dtype=dtype)
    for count in (2, 5, 16):
        together = attention(q[:, -count:], k, v, causal=True, **options)
        for i in range(count):
            n = 3000 - count + i + 1
            alone = attention(q[:, 16 - count + i, None], k[:, :n], v[:, :n], causal=True, **options)
            assert_same(alone, rows(together, i, i + 1), f"row {i} of {count}")
    assert_noticed(*inputs(Sq=300, Sk=3000, dtype=dtype), causal=True, **options)


@every_option
@every_kernel
def test_n1_packed_is_padded(options, kernel):
    options = moved(options)
    q, k, v = inputs(B=5, Sq=200, Sk=700)
    used_q, used_k = [200, 1, 0, 17, 150], [700, 129, 7, 0, 300]
    lengths = dict(seqused_q=int32(*used_q).cuda(), seqused_k=int32(*used_k).cuda())
    out, lse = attention(q, k, v, causal=True, **lengths, **options)
    flat = [torch.cat([x[b, :n] for b, n in enumerate(used)]) for x, used in ((q, used_q), (k, used_k), (v, used_k))]
    with _schedule.forced(**kernel):
        result = packed(*flat, starts(used_q), starts(used_k), causal=True, **options)
    expected_out = torch.cat([out[b, :n] for b, n in enumerate(used_q)])
    expected_lse = torch.cat([lse[b, :, :n] for b, n in enumerate(used_q)], 1)
    assert_same(result, (expected_out, expected_lse))
    assert_noticed(q, k, v, causal=True, **options)


@every_kernel
@pytest.mark.parametrize("Sq", [1, 150])
def test_n2_left_padding_moves_no_position(kernel, Sq):
    q, k, v = inputs(B=3, Sq=Sq, Sk=733, Dv=96)
    alone = attention(q, k, v, causal=True)
    for pad in ((0, 1, 63), (64, 65, 200)):
        wide_k, wide_v = (x.new_full((3, 733 + 200, *x.shape[2:]), math.nan) for x in (k, v))
        for b, n in enumerate(pad):
            wide_k[b, n : n + 733], wide_v[b, n : n + 733] = k[b], v[b]
        lengths = moved(dict(leftpad_k=int32(*pad), seqused_k=int32(733, 733, 733)))
        with _schedule.forced(**kernel):
            padded = attention(q, wide_k, wide_v, causal=True, **lengths)
        assert_same(padded, alone, f"left padding {pad}")
    assert_noticed(*inputs(B=3, Sq=150, Sk=733, Dv=96), causal=True)


@every_kernel
@pytest.mark.parametrize("Sq", [1, 150])
def test_n1_cache_capacity_does_not_matter(kernel, Sq):
    q, k, v = inputs(B=2, Sq=Sq, Sk=700)
    alone = attention(q, k, v, causal=True)
    for capacity in (701, 768, 1000, 5000):
        caches = [x.new_full((2, capacity, *x.shape[2:]), math.nan) for x in (k, v)]
        for cache, x in zip(caches, (k, v)):
            cache[:, :700] = x
        with _schedule.forced(**kernel):
            cached = attention(q, *caches, causal=True, seqused_k=int32(700, 700).cuda())
        assert_same(cached, alone, f"capacity {capacity}")
    assert_noticed(*inputs(B=2, Sq=150, Sk=700), causal=True)


@every_kernel
@pytest.mark.parametrize("options", [{}, OPTIONS["alibi"]], ids=["plain", "alibi"])
def test_n2_rolling_window_cache_is_the_whole_cache(options, kernel):
    options, noticed = moved(options), 0
    for Sq in (1, 40):
        q, k, v = inputs(B=4, Sq=Sq, Sk=1200)
        keywords = {"causal": True, "window": (390, -1), **options}
        whole = attention(q, k, v, **keywords)
        for dropped in (1, 63, 64, 100, 128, 256, 768):
            first = torch.full((4,), dropped, dtype=torch.int32, device="cuda")
            with _schedule.forced(**kernel):
                rolled = attention(q, k[:, dropped:], v[:, dropped:], k_pos=first, **keywords)
            assert_same(rolled, whole, f"{dropped} dropped")
            # without the position of the first key, blocks and splits move unless whole splits were dropped
            moved_bits = differing(attention(q, k[:, dropped:], v[:, dropped:], **keywords), whole)
            assert dropped % SPLIT != 0 or moved_bits == 0
            noticed += moved_bits
    assert noticed > 0


def test_n3_a_longer_sequence_does_not_move_earlier_splits():
    q, k, v = inputs(Sq=40, Sk=1000)
    states = [fad.attn_partials(q, k[:, :n], v[:, :n], split_size=256) for n in (600, 1000)]
    assert [len(state.m) for state in states] == [3, 4]
    for name in ("o", "m", "l"):
        short, long = (getattr(state, name) for state in states)
        assert_bits_equal(long[:2], short[:2], name)  # keys 0 .. 511
    assert differing([states[1].o[2]], [states[0].o[2]]) > 0  # keys 512 .. 599 against 512 .. 767


@every_kernel
def test_n10_empty_trailing_splits_are_nothing(kernel):
    q, k, v = inputs(B=2, Sq=100, Sk=400)
    alone = attention(q, k, v)
    padded = [torch.cat([x, x.new_full((2, 900, *x.shape[2:]), math.nan)], 1) for x in (k, v)]
    used = int32(400, 400).cuda()
    with _schedule.forced(**kernel):
        assert_same(attention(q, *padded, seqused_k=used), alone)
    merged = fad.merge_partials(fad.attn_partials(q, *padded, seqused_k=used, split_size=SPLIT), return_lse=True)
    assert_same(merged, alone)
    assert_noticed(q, k, v)


# ---- buffers ---------------------------------------------------------------------------------------------------------


def in_wider_rows(x, before, after):
    """The same numbers, between NaN."""
    wide = x.new_full((*x.shape[:3], before + x.shape[3] + after), math.nan)
    return wide[..., before : before + x.shape[3]].copy_(x)


def behind(x, count):
    """The same numbers, `count` elements behind the start of a buffer."""
    return torch.cat([x.new_zeros(count), x.flatten()])[count:].view(x.shape)


LAYOUTS = {
    "heads before rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch innermost": lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "every second row": lambda x: x.new_full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), math.nan)[:, ::2].copy_(x),
    "slice of a wider head": lambda x: in_wider_rows(x, 5, 4),
    "aligned slice of a wider head": lambda x: in_wider_rows(x, 8, 8),
    "misaligned by one element": lambda x: behind(x, 1),
    "misaligned by four elements": lambda x: behind(x, 4),
    "last dimension not contiguous": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "heads of one fused projection": lambda x: torch.cat([torch.full_like(x, math.nan), x], 2)[:, :, x.shape[2] :],
}


@every_kernel
@pytest.mark.parametrize(("D", "Dv"), [(64, 64), (128, 128), (72, 40), (33, 65), (5, 3), (256, 100)], ids=str)
def test_n1_strides_do_not_matter(kernel, D, Dv):
    for Sq in (1, 150):
        qkv = inputs(B=2, Sq=Sq, Sk=600, D=D, Dv=Dv, dtype=torch.float16)
        expected = attention(*qkv, causal=True)
        for name, layout in LAYOUTS.items():
            with _schedule.forced(**kernel):
                assert_same(attention(*map(layout, qkv), causal=True), expected, name)
    assert_noticed(*qkv, causal=True)


@every_kernel
def test_n1_expanded_keys_are_repeated_keys(kernel):
    q, k, v = inputs(B=5, Sq=40, Sk=600)
    expanded = [x[:1].expand(5, -1, -1, -1) for x in (k, v)]
    one_head = k[:, :, :1].expand(-1, -1, 2, -1)
    one_key = [x[:, :1].expand_as(x) for x in (k, v)]
    with _schedule.forced(**kernel):
        assert_same(attention(q, *expanded), attention(q, *(x.contiguous() for x in expanded)), "one batch")
        assert_same(attention(q, one_head, v), attention(q, one_head.contiguous(), v), "one head")
        assert_same(attention(q, *one_key), attention(q, *(x.contiguous() for x in one_key)), "one key")
    assert_noticed(q, k, v)


# ---- run to run ------------------------------------------------------------------------------------------------------


def different(actual, expected):
    """The same count as differing, left on the GPU so that nobody waits for it."""
    return sum((x.view(torch.int16) != y.view(torch.int16)).sum() for x, y in zip(actual, expected))


def test_n1_thousand_repeats_beside_matrix_products():
    jobs = [inputs(B=4, Sq=1, Sk=3000), inputs(Sq=300, Sk=700)]
    expected = [attention(*job, causal=True) for job in jobs]
    a = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    product = a @ a
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        with torch.cuda.stream(other):
            torch.mm(a, a, out=product)
        for job, want in zip(jobs, expected):
            count += different(attention(*job, causal=True), want)
    torch.cuda.synchronize()
    assert count.item() == 0
    assert different(attention(*jobs[1], causal=True, split_size=SPLIT // 2), expected[1]).item() > 0


def test_n1_two_streams_at_once():
    jobs = [inputs(B=4, Sq=1, Sk=5000, Hq=32), inputs(B=2, Sq=600, Sk=900)]
    expected = [attention(*job, causal=True) for job in jobs]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for i in range(60):
        with torch.cuda.stream(streams[i % 3]):
            results.append(attention(*jobs[i % 2], causal=True))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert_same(result, expected[i % 2], f"call {i}")
    for job in jobs:
        assert_noticed(*job, causal=True)
