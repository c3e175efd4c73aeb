"""The mma family on a GPU: one set of bits for every kernel and schedule, and those of the contract.

Numbers that are not ordinary are in test_cuda_mma_numbers.py, streams and graphs in test_cuda_mma_calls.py; what the
rest of a call may not change is in test_cuda_invariance.py, errors are in test_cuda_accuracy.py, and what can be
checked of the oracle without a GPU in test_mma_oracle.py.
"""

import itertools
import math
import warnings
from functools import partial
from pathlib import Path

import mma_oracle
import numpy as np
import pytest
import torch
from cases import CASES, LARGE_CASES, normal
from cuda_schedules import KERNELS, SCHEDULES, assert_same_in_every_schedule
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
    needs_hopper,
    packed,
    poisoned,
    tensors,
)
from paging import in_pages

import flash_attn_det as fad
from flash_attn_det import _schedule
from flash_attn_det.testing import assert_bits_equal, bits_differ

pytestmark = needs_gpu

HALF_CASES = [case for case in CASES if case.dtype in ("fp16", "bf16")]
ALL_CASES = [*HALF_CASES, *LARGE_CASES]
every_case = pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
HOPPER_SOURCES = list((Path(__file__).parent.parent / "csrc" / "cuda").glob("hopper_*.cu"))


def on_the_gpu(case):
    qkv, keywords = case.inputs()
    return moved(qkv), {"split_size": None, **moved(keywords)}


# ---- the catalogue ---------------------------------------------------------------------------------------------------


@every_case
def test_n1_every_schedule_gives_the_same_bits(case):
    """Also: every element of out and lse is written, and nothing is read from the workspace before it is."""
    qkv, keywords = on_the_gpu(case)
    out, lse = assert_same_in_every_schedule(*qkv, **keywords)
    assert not out.isnan().any()
    assert not lse.isnan().any()


def test_catalogue_can_tell():
    """Its control: on these inputs the fma family gives other bits, and so do other splits of a long call."""
    told = []
    for case in ALL_CASES:
        qkv, keywords = on_the_gpu(case)
        told.append(differing(attention(*qkv, **keywords), attention(*qkv, **keywords, arithmetic="fma")) > 0)
        if case in LARGE_CASES and case.B * case.Sq * case.Hq > 1000:
            assert_noticed(*qkv, **keywords)
    assert sum(told) > 0.8 * len(told)


def test_16_bit_tensors_default_to_this_family():
    for dtype in (torch.float16, torch.bfloat16):
        qkv = moved(tensors(dtype=dtype))
        assert_same(attention(*qkv), attention(*qkv, arithmetic="mma"))
        assert differing(attention(*qkv), attention(*qkv, arithmetic="fma")) > 0


@pytest.mark.parametrize("case", [c for c in ALL_CASES if "pos" not in c.lengths.split()], ids=lambda case: case.name)
def test_n8_partials_are_the_same_for_every_kernel_and_merge_to_the_fused_result(case):
    qkv, keywords = on_the_gpu(case)
    want = fad.attn_partials(*qkv, **keywords)
    for kernel, schedule in KERNELS.items():
        with _schedule.forced(**schedule), poisoned():
            partials = fad.attn_partials(*qkv, **keywords)
        for name, got, expected in zip("oml", partials, want):
            assert_bits_equal(got, expected, f"{name} {kernel}")
    assert not any(part.isnan().any() for part in want[:3])
    assert_same(fad.merge_partials(want, return_lse=True), attention(*qkv, **keywords))
    if ((want.l > 0).sum(0) > 2).sum() > 500:  # of two states the order does not matter
        backwards = fad.Partials(*(part.flip(0) for part in want[:3]), want.dtype)
        assert differing(fad.merge_partials(backwards, return_lse=True), attention(*qkv, **keywords)) > 0


def kernels_of(*qkv, split_size=SPLIT, **schedule):
    """Names of the kernels that a call of attn runs under a schedule."""
    return kernels_of_call(lambda: attention(*qkv, causal=True, split_size=split_size), **schedule)


def kernels_of_call(call, **schedule):
    """The same of any call."""
    with _schedule.forced(**schedule):
        call()
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the profiler warns of what it lacks on a machine
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                call()
                torch.cuda.synchronize()
            events = profile.events()
    names = {event.name for event in events if str(event.device_type).endswith("CUDA")}
    kernels = frozenset(name for name in names if not name.startswith("Mem"))
    if not kernels:
        pytest.skip("needs a profiler that sees kernels (CUPTI)")
    return kernels


def test_forced_schedules_are_obeyed():
    """Else the catalogue would compare one kernel with itself."""
    qkv = moved(tensors(B=1, Sq=300, Sk=700, D=128, dtype=torch.bfloat16))
    generic = [kernels_of(*qkv, kernel="generic", tile_rows=n, split_parallel=False) for n in (16, 64, 128)]
    for a, b in itertools.combinations(generic, 2):
        assert a != b
    for tile_rows, folded in zip((16, 64, 128), generic):
        assert kernels_of(*qkv, kernel="generic", tile_rows=tile_rows, split_parallel=True) != folded


@needs_hopper
@pytest.mark.skipif(not HOPPER_SOURCES, reason="needs csrc/cuda/hopper_*.cu")
@pytest.mark.parametrize("D", [64, 128])
def test_forced_hopper_kernels_are_not_the_generic_ones(D):
    qkv = moved(tensors(B=1, Sq=300, Sk=700, D=D, dtype=torch.bfloat16))
    generic = [kernels_of(*qkv, kernel="generic", tile_rows=n, split_parallel=False) for n in (16, 64, 128)]
    hopper = [kernels_of(*qkv, kernel="hopper", tile_rows=n, split_parallel=False) for n in (16, 128)]
    for a, b in itertools.combinations([*generic, *hopper], 2):
        assert not a & b


@needs_hopper
@pytest.mark.parametrize("D", [64, 128, 256])
def test_the_copy_engine_reads_pages_of_16_rows_by_a_kernel_of_their_own(D):
    """And leaves those of 8 to the generic one."""
    q, k, v = tensors(B=1, Sq=1, Sk=700, D=D, dtype=torch.bfloat16)
    used = torch.tensor([700], dtype=torch.int32, device="cuda")

    def kernels(page_size, kernel):
        pool_k, pool_v, table = moved(in_pages(k, v, page_size))
        call = partial(fad.attn_with_kvcache, q.cuda(), pool_k, pool_v, cache_seqlens=used, block_table=table)
        return kernels_of_call(call, kernel=kernel, tile_rows=16)

    assert not kernels(16, "hopper") & kernels(16, "generic")
    assert not kernels(16, "hopper") & kernels_of(*moved((q, k, v)), kernel="hopper", tile_rows=16, split_size=1024)
    assert kernels(8, "hopper") == kernels(8, "generic") == kernels(16, "generic")


@needs_hopper
@pytest.mark.parametrize("D", [64, 128, 256])
def test_forced_clusters_are_not_the_other_decode_kernel(D):
    """Also: the scheduler takes them for one long split, and leaves a short one to the other."""
    kernels = {}
    for Sk in (256, 1024):
        qkv = moved(tensors(B=1, Sq=1, Sk=Sk, D=D, dtype=torch.bfloat16))
        for kernel in (None, "cluster", "hopper"):
            kernels[Sk, kernel] = kernels_of(*qkv, kernel=kernel, split_size=1024)
        assert not kernels[Sk, "cluster"] & kernels[Sk, "hopper"]
    assert kernels[256, None] == kernels[256, "hopper"]
    assert kernels[1024, None] == kernels[1024, "cluster"]


@needs_hopper
@pytest.mark.parametrize("D", [64, 128, 256])
def test_clusters_are_of_fewer_thread_blocks_where_there_are_more_splits(D):
    """And where there are more still, the scheduler takes the other decode kernel."""
    qkv = moved(tensors(B=1, Sq=1, Sk=1024, Hk=2, D=D, dtype=torch.bfloat16))
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    ranks = max(D // 32, 4)  # of a cluster, or half as many

    def kernels(splits, kernel):
        return kernels_of(*(x.repeat(splits // 2, 1, 1, 1) for x in qkv), kernel=kernel, split_size=1024)

    few, more, many = 2, multiprocessors // ranks, multiprocessors // (ranks // 2) + 2
    assert kernels(few, None) == kernels(few, "cluster")
    assert kernels(more, None) == kernels(many, "cluster")
    assert kernels(many, None) == kernels(many, "hopper")
    for a, b in itertools.combinations([kernels(n, None) for n in (few, more, many)], 2):
        assert not a & b


@needs_hopper
@every_16_bit_dtype
@pytest.mark.parametrize("D", [40, 64, 128, 256])
@pytest.mark.parametrize("Sk", [1, 127, 700, 1024, 1025, 2500])
def test_n3_clusters_give_the_bits_of_other_kernels_for_splits_of_every_length(dtype, D, Sk):
    """Splits up to the longest that a cluster can share, the last of them cut anywhere; NaN where nobody may look."""
    q, k, v = moved(tensors(B=3, Sq=2, Sk=Sk + 9, Hq=6, Hk=2, D=D, dtype=dtype))
    used = torch.tensor([Sk, Sk // 2, 0], dtype=torch.int32, device="cuda")
    for x in (k, v):
        x[0, Sk:], x[1, Sk // 2 :], x[2] = torch.nan, torch.inf, torch.nan
    calls = {size: dict(seqused_k=used, causal=True, split_size=size) for size in (384, 1024)}
    for size, keywords in calls.items():
        want = None
        for kernel, spilled in (("generic", True), ("hopper", True), ("cluster", True), ("cluster", None)):
            with _schedule.forced(kernel=kernel, tile_rows=16, split_parallel=spilled), poisoned():
                got = attention(q, k, v, **keywords)
            want = want or got
            assert_same(got, want, f"{kernel} {size}, spilled: {spilled}")
        assert not want[0].isnan().any()


@needs_hopper
@pytest.mark.parametrize("B", [2, 12])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize(("Sq", "group"), [(1, 1), (1, 4), (1, 8), (3, 3), (2, 8), (16, 1)])
def test_n1_clusters_send_each_other_any_number_of_rows(Sq, group, D, B):
    """Few splits have clusters of many thread blocks, many splits of few."""
    qkv = moved(tensors(B=B, Sq=Sq, Sk=2500, Hq=2 * group, Hk=2, D=D, dtype=torch.float16))
    got = {}
    for kernel in ("generic", "cluster"):
        with _schedule.forced(kernel=kernel, tile_rows=16, split_parallel=True), poisoned():
            got[kernel] = attention(*qkv, causal=True, split_size=1024)
    assert_same(got["cluster"], got["generic"], f"{Sq * group} rows")
    assert differing(got["cluster"], attention(*qkv, causal=True, split_size=2048)) > 0


@needs_hopper
@pytest.mark.parametrize("B", [2, 40])
@pytest.mark.parametrize(("D", "Dv"), [(96, 72), (128, 104), (72, 200), (256, 136)])
@pytest.mark.parametrize(("Sq", "group"), [(3, 2), (2, 8)])
def test_n1_clusters_finish_one_split_with_any_value_dims(Sq, group, D, Dv, B):
    """Value dims that end within a warp's tiles, sinks, and every other sequence empty."""
    shape = {"B": 2, "Sq": Sq, "Sk": 1000, "Hq": 2 * group, "Hk": 2, "D": D, "Dv": Dv, "dtype": torch.float16}
    qkv = [x.repeat(B // 2, 1, 1, 1) for x in moved(tensors(**shape))]
    used = torch.tensor([1000, 0], dtype=torch.int32, device="cuda").repeat(B // 2)
    keywords = {"causal": True, "sinks": normal((2 * group,), 78).cuda(), "seqused_k": used}
    got = {}
    for kernel in ("generic", "cluster"):
        with _schedule.forced(kernel=kernel, tile_rows=16), poisoned():
            got[kernel] = attention(*qkv, split_size=1024, **keywords)
    assert_same(got["cluster"], got["generic"], f"{D} {Dv}")
    assert differing(got["cluster"], attention(*qkv, split_size=512, **keywords)) > 0


FOLDS = [(64, 2), (64, 4), (128, 2), (128, 3), (128, 4), (256, 2)]  # head dim, splits: with clusters of 8 or fewer


@needs_hopper
@pytest.mark.parametrize(("D", "splits"), FOLDS)
def test_clusters_that_fold_run_without_a_second_kernel(D, splits):
    """Until their number, or that of all thread blocks, is too large."""

    def kernels(splits, B=1, **schedule):
        qkv = moved(tensors(B=B, Sq=1, Sk=1024 * splits, Hk=2, D=D, dtype=torch.bfloat16))
        return kernels_of(*qkv, split_size=1024, **schedule)

    (alone,) = kernels(splits)
    assert "fold" in alone
    assert kernels(splits, kernel="cluster") == {alone}
    spilled = kernels(splits, kernel="cluster", split_parallel=True)
    assert len(spilled) == 2
    assert alone not in spilled
    many = torch.cuda.get_device_properties(0).multi_processor_count // 2
    assert not any("cluster_fold" in name for name in kernels(9) | kernels(splits, B=many))


@needs_hopper
@pytest.mark.parametrize("page_size", [None, 16, 12])
@pytest.mark.parametrize(("D", "splits"), FOLDS)
def test_n8_clusters_fold_splits_of_every_length(D, splits, page_size):
    """Some sequences end in the first split, or have no key; a window leaves the first splits empty; values are Inf
    and -0; sinks."""
    Sk = 384 * splits
    lengths = (Sk, Sk - 383, 200, 0, 1)
    q, k, v = tensors(B=len(lengths), Sq=3, Sk=Sk, Hq=8, Hk=2, D=D, dtype=torch.float16)
    v[0, 5, 0, 1], v[1, 100, 1, D - 1], v[2] = math.inf, -math.inf, -0.0
    used = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    keywords = {"causal": True, "sinks": normal((8,), 78).cuda(), "split_size": 384}
    if page_size:
        pool_k, pool_v, table = moved(in_pages(k, v, page_size, lengths))
        call = partial(fad.attn_with_kvcache, q.cuda(), pool_k, pool_v, cache_seqlens=used, block_table=table)
        call = partial(call, return_lse=True)
    else:
        call = partial(attention, *moved((q, k, v)), seqused_k=used)
    (alone,) = kernels_of_call(partial(call, **keywords), kernel="cluster", tile_rows=16)
    assert "fold" in alone
    for window in ((-1, -1), (300, -1)):
        got = {}
        for kernel, spilled in (("generic", True), ("cluster", None), ("cluster", True)):
            with _schedule.forced(kernel=kernel, tile_rows=16, split_parallel=spilled), poisoned():
                got[kernel, spilled] = call(window=window, **keywords)
        want = got.pop(("generic", True))
        for (_, spilled), result in got.items():
            assert_same(result, want, f"window {window}, spilled: {spilled}")
        assert differing(want, call(window=window, **keywords | {"split_size": 128})) > 0


# ---- the bits of the contract ----------------------------------------------------------------------------------------


@needs_hopper
@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_n7_bits_of_the_contract(case):
    """Every mask, option and length, with several splits: what the oracle computes from the contract's text."""
    qkv, keywords = case.inputs()
    want = mma_oracle.attn(*qkv, **keywords)
    assert_same(fad.attn(*moved(qkv), **moved(keywords), return_lse=True), want)


def scaled_keys(x, factors):
    """Multiplies key j of x [B, Sk, H, D] by factors(j)."""
    return x * factors(torch.arange(x.shape[1]))[:, None, None]


def octaves(j):
    return 2.0 ** (7 * j % 17 - 8)


def opposite(q, k, v):
    """Keys against which rows 0, 2, .. have scores of about -2^22 / log2(e) and less, the others of any size."""
    one = torch.zeros_like(q[..., :1, :])
    one[..., 0] = 2990.0
    rows = torch.arange(q.shape[1]) % 2 == 0
    q = torch.where(rows[:, None, None], -one.expand_as(q), q)
    k = k.clone()
    k[..., 0] = 7770.0 + 8 * torch.arange(k.shape[1])[:, None]
    return q, k, v


def every_other_block(j):
    return torch.where(j // 128 % 2 == 0, 20.0, 1.0)


UNUSUAL = {
    "long decode": dict(Sq=1, Sk=3000, Hq=8),
    "large logits": dict(change=lambda q, k, v: (30 * q, k, v)),
    "huge logits": dict(change=lambda q, k, v: (3000 * q, 3000 * k, v)),
    "scores beyond the smallest near reference": dict(change=opposite),
    "values of many sizes": dict(change=lambda q, k, v: (q, k, scaled_keys(v, octaves))),
    "keys of many sizes": dict(change=lambda q, k, v: (q, scaled_keys(k, octaves), v)),
    "references far apart": dict(change=lambda q, k, v: (q, scaled_keys(k, every_other_block), v)),
    "negative zeros": dict(change=lambda q, k, v: (q, k, torch.where(v < 0, -0.0, v))),
    "subnormal values in fp16": dict(change=lambda q, k, v: (q, k, v * 2.0**-17)),
}


@needs_hopper
@every_16_bit_dtype
@pytest.mark.parametrize("unusual", UNUSUAL.values(), ids=UNUSUAL)
def test_n7_bits_of_the_contract_for_unusual_numbers(dtype, unusual):
    shape = {"B": 1, "Sq": 40, "Sk": 800, **unusual}
    change = shape.pop("change", lambda *qkv: qkv)
    qkv = [x.to(dtype) for x in change(*tensors(**shape))]
    assert_same(attention(*moved(qkv), causal=True), mma_oracle.attn(*qkv, causal=True, split_size=SPLIT))
    assert_noticed(*moved(tensors(**{**shape, "Sq": 300}, dtype=dtype)), causal=True)


def test_n3_split_sizes_up_to_the_largest_are_one_split():
    q, k, v = moved(tensors(B=2, Sq=20, Sk=700, dtype=torch.bfloat16))
    flat, starts = [x.flatten(0, 1) for x in (q, k, v)], moved((int32(0, 20, 40), int32(0, 700, 1400)))
    expected = attention(q, k, v, split_size=1024)
    for name, schedule in SCHEDULES.items():
        with _schedule.forced(**schedule):
            for size in (2**30, 2**36, 2**40):
                assert_same(attention(q, k, v, split_size=size), expected, f"{name} {size}")
                out, lse = packed(*flat, *starts, split_size=size)
                padded = out.unflatten(0, (2, 20)), lse.unflatten(1, (2, 20)).transpose(0, 1)
                assert_same(padded, expected, f"{name} {size}, packed")
    assert differing(attention(q, k, v, split_size=128), expected) > 0


def test_n1_packed_sequences_with_more_heads_than_take_turns():
    """Two tiles a head: 128 heads take turns, and then the other 32."""
    q, k, v = moved(tensors(B=2, Sq=200, Sk=200, Hq=160, Hk=160, dtype=torch.bfloat16))
    starts = int32(0, 200, 400).cuda()
    out, lse = packed(*(x.flatten(0, 1) for x in (q, k, v)), starts, starts, causal=True)
    for b in range(2):
        rows = slice(200 * b, 200 * b + 200)
        alone = attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True)
        assert_same((out[rows][None], lse[None, :, rows]), alone)
    assert_noticed(q, k, v, causal=True)


@needs_hopper
@every_16_bit_dtype
def test_n7_bits_of_the_contract_for_subnormal_keys(dtype):
    """The oracle aligns them with their format's smallest exponent, as others have published of this GPU. Queries that
    are large, of many sizes, make scores of ordinary size of them, whose last bits tell that from normalising first."""
    up, down, scale = {torch.float16: (2.0**13, 2.0**-21, 16.0), torch.bfloat16: (2.0**125, 2.0**-131, 8.0)}[dtype]
    q, k, v = tensors(B=1, Sq=40, Sk=800)
    qkv = [x.to(dtype) for x in (q * 2.0 ** -(torch.arange(64) % 16) * up, k * down, v)]
    want = mma_oracle.attn(*qkv, causal=True, split_size=SPLIT, scale=scale)
    assert_same(attention(*moved(qkv), causal=True, scale=scale), want)


@needs_hopper
def test_n7_torch_exp2_is_the_instruction_that_was_measured():
    """What the oracle asks a GPU for: one table of 2^23 values, looked up with |x| cut to 23 fraction bits."""
    table = torch.exp2(torch.arange(2**23, device="cuda") * 2.0**-23)
    low, high = (int(np.float32(x).view(np.int32)) for x in (2.0**-40, 125.99))
    size = torch.arange(low, high, 101, dtype=torch.int32).view(torch.float32)
    for x in (-size, size[size <= 1]):
        fixed = (x.abs().double() * 2.0**23).long()
        fixed = torch.where(x > 0, fixed, torch.where(fixed % 2**23 == 0, -fixed, -fixed - 1))  # ones' complement
        power = ((fixed >> 23) + 127 << 23).int().view(torch.float32)
        want = table[(fixed & (2**23 - 1)).cuda()].cpu() * power
        assert_bits_equal(mma_oracle.gpu_exp2(x), want)
        assert bits_differ(mma_oracle.gpu_exp2(x), torch.exp2(x.double()).float()) > 0
