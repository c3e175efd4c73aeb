"""The mma family on a GPU: one set of bits for every kernel and schedule, those of the contract, and any numbers.

What the rest of a call may not change is in test_cuda_invariance.py, errors are in test_cuda_accuracy.py, and what can
be checked of the oracle without a GPU in test_mma_oracle.py.
"""

import itertools
import math
import warnings
from pathlib import Path

import mma_oracle
import numpy as np
import pytest
import torch
from cases import CASES, LARGE_CASES, normal
from cuda_tools import (
    SPLIT,
    assert_noticed,
    assert_same,
    attention,
    busy,
    differing,
    every_16_bit_dtype,
    int32,
    moved,
    needs_gpu,
    needs_hopper,
    packed,
    poisoned,
    rows,
    tensors,
)

import flash_attn_det as fad
from flash_attn_det import _schedule, ops
from flash_attn_det.attention import _arguments
from flash_attn_det.reference import attn_oracle
from flash_attn_det.testing import assert_bits_equal, bits_differ

pytestmark = needs_gpu

HALF_CASES = [case for case in CASES if case.dtype in ("fp16", "bf16")]
ALL_CASES = [*HALF_CASES, *LARGE_CASES]
# Tiles of 16 rows are the decode kernel's; 64 and 128 are those of prompts; None is the kernel's own choice.
KERNELS = {
    **{f"generic {rows or 'auto'}": {"kernel": "generic", "tile_rows": rows} for rows in (None, 16, 64, 128)},
    **{f"hopper {rows or 'auto'}": {"kernel": "hopper", "tile_rows": rows} for rows in (None, 16, 128)},
}
SCHEDULES = {
    f"{name} {'spilled' if split_parallel else 'folded'}": {**kernel, "split_parallel": split_parallel}
    for name, kernel in KERNELS.items()
    for split_parallel in (False, True)
}
every_case = pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
HOPPER_SOURCES = list((Path(__file__).parent.parent / "csrc" / "cuda").glob("hopper_*.cu"))


def every_schedule(*qkv, **keywords):
    """(name, out and lse) under each schedule, with memory that starts as NaN."""
    for name, schedule in SCHEDULES.items():
        with _schedule.forced(**schedule), poisoned():
            result = attention(*qkv, **keywords)
        yield name, result


def assert_same_in_every_schedule(*qkv, **keywords):
    """Returns out and lse of the automatic choice."""
    with poisoned():
        want = attention(*qkv, **keywords)
    for name, got in every_schedule(*qkv, **keywords):
        assert_same(got, want, name)
    return want


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


def kernels_of(*qkv, **schedule):
    """Names of the kernels that a call runs under a schedule."""
    with _schedule.forced(**schedule):
        attention(*qkv, causal=True)
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the profiler warns of what it lacks on a machine
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                attention(*qkv, causal=True)
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
    expected = attention(q, k, v, split_size=1024)
    for name, schedule in SCHEDULES.items():
        with _schedule.forced(**schedule):
            for size in (2**30, 2**36, 2**40):
                assert_same(attention(q, k, v, split_size=size), expected, f"{name} {size}")
    assert differing(attention(q, k, v, split_size=128), expected) > 0


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


# ---- what is not finite (N11) ----------------------------------------------------------------------------------------

POISON = {"nan": math.nan, "inf": math.inf, "minus inf": -math.inf, "huge": None}
every_poison = pytest.mark.parametrize("poison", POISON.values(), ids=POISON)


def poison_of(dtype, poison):
    """Huge: so that a product with q is still finite in fp32."""
    return {torch.float16: 2.0**15, torch.bfloat16: 1e37}[dtype] if poison is None else poison


def assert_same_kind(actual, expected, name=""):
    """NaN and infinities in the same places, whatever the other numbers."""
    for got, want in zip(actual, expected):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got), kind(want)), f"{kind.__name__} {name}"


@every_poison
@every_16_bit_dtype
def test_n11_keys_reach_only_the_rows_that_see_them(dtype, poison):
    """Rows of one tile, some of which see the key. Those that do become what IEEE says, as in the fma family."""
    q, k, v = moved(tensors(B=1, Sq=200, Sk=500, dtype=dtype))
    clean = attention(q, k, v, causal=True)
    for which, key in itertools.product("kv", (310, 383, 384, 450, 499)):
        wrong_k, wrong_v = k.clone(), v.clone()
        (wrong_k if which == "k" else wrong_v)[:, key, :, 3] = poison_of(dtype, poison)
        expected = attention(q, wrong_k, wrong_v, causal=True, arithmetic="fma")
        before = key - 300  # row i stands at 300 + i
        for schedule, result in every_schedule(q, wrong_k, wrong_v, causal=True):
            name = f"{which} of key {key}, {schedule}"
            assert_same(rows(result, 0, before), rows(clean, 0, before), name)
            assert_same_kind(result, expected, name)
            assert bits_differ(rows(result, before, 200)[0], rows(clean, before, 200)[0]) > 0
            if which == "v":
                others = torch.arange(64) != 3
                assert_bits_equal(result[0][..., others], clean[0][..., others], name)
                assert_bits_equal(result[1], clean[1], f"lse {name}")


@every_poison
@every_16_bit_dtype
def test_n4_keys_that_no_row_sees_do_not_matter(dtype, poison):
    """Left padding, a window's past, a causal mask's future and what a cache held before."""
    q, k, v = moved(tensors(B=2, Sq=40, Sk=600, dtype=dtype))
    keywords = moved(dict(causal=True, window=(150, -1), leftpad_k=int32(37, 100), seqused_k=int32(430, 290)))
    for x in (k, v):
        x[:, 580:] = 0
    clean = attention(q, k, v, **keywords)
    for x in (k, v):
        for b, (pad, used) in enumerate(((37, 430), (100, 290))):
            x[b, : pad + used - 40 - 150] = poison_of(dtype, poison)  # row 0 stands at used - 40
            x[b, pad + used :] = poison_of(dtype, poison)
    for name, result in every_schedule(q, k, v, **keywords):
        assert_same(result, clean, name)
    assert clean[0].isfinite().all()
    assert differing(attention(q, k, v, **{**keywords, "window": (160, -1)}), clean) > 0


@every_16_bit_dtype
def test_n4_masked_values_do_not_set_the_scale(dtype):
    """Beside tiny values in the same matrix step: a product with 0 may not take part in the step's alignment."""
    tiny, huge = {torch.float16: (2.0**-12, 2.0**15), torch.bfloat16: (1e-30, 1e38)}[dtype]
    q, k, v = moved(tensors(B=1, Sq=200, Sk=500))
    q, k, v = (x.to(dtype) for x in (q, k, tiny * v))
    keywords = {"causal": True, "window": (250, -1)}
    clean = attention(q, k, v, **keywords)
    v[:, :100] = v[:, 420:] = huge  # row i sees 50 + i .. 300 + i
    for name, result in every_schedule(q, k, v, **keywords):
        assert_same(rows(result, 50, 120), rows(clean, 50, 120), name)
        for first, end in ((0, 50), (120, 200)):
            assert bits_differ(rows(result, first, end)[0], rows(clean, first, end)[0]) > 0


@every_16_bit_dtype
def test_n9_nan_results_have_one_bit_pattern(dtype):
    q, k, v = moved(tensors(Sq=9, dtype=dtype))
    q[0, 1], k[0, 3], v[1, 7] = -math.nan, -math.nan, -math.nan
    for _, (out, lse) in every_schedule(q, k, v):
        assert out.isnan().all()
        assert lse[0].isnan().all()
        assert not lse[1].isnan().any()
        assert (out.view(torch.int16) == {torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}[dtype]).all()
        assert (lse[0].view(torch.int32) == 0x7FC00000).all()


@every_16_bit_dtype
def test_n9_no_negative_zero(dtype):
    q, k, v = moved(tensors(Sq=40, dtype=dtype))
    v[..., :8] = -0.0
    for name, (out, _) in every_schedule(q, k, v, causal=True):
        assert_bits_equal(out[..., :8], torch.zeros_like(out[..., :8]), name)
        assert out[..., 8:].all()


@every_16_bit_dtype
def test_n10_scores_of_minus_infinity(dtype):
    """q.k = -inf is a visible key of probability 0; a row of nothing else is empty."""
    q, k, v = moved(tensors(Sq=40, dtype=dtype))
    q[..., 0] = 1
    few = attention(q, k[:, :100], v[:, :100])
    assert_noticed(*moved(tensors(Sq=100, dtype=dtype)))
    k[:, 100:, :, 0] = -math.inf
    for name, result in every_schedule(q, k, v):
        assert_same(result, few, name)
    k[..., 0] = -math.inf
    for name, (out, lse) in every_schedule(q, k, v):
        assert_bits_equal(out, torch.zeros_like(out), name)
        assert (lse == -math.inf).all()


# ---- the ends of the number range ------------------------------------------------------------------------------------


@every_16_bit_dtype
@pytest.mark.parametrize("gain", [30, 3000])
def test_n6_large_logits(dtype, gain):
    """At the larger gain |t| exceeds 2^22, and the reference is a rounded product. One key wins; nothing overflows."""
    q, k, v = (x.to(dtype) for x in tensors(B=1, Sq=300, Sk=700))
    q, k, v = moved((gain * q, gain * k, v))
    result = assert_same_in_every_schedule(q, k, v, causal=True)
    exact, exact_lse = attn_oracle(q, k, v, causal=True, return_lse=True)
    beyond = exact_lse.abs() * math.log2(math.e) > 2**22
    assert beyond.double().mean() > 0.9 if gain == 3000 else not beyond.any()
    assert result[0].isfinite().all()
    torch.testing.assert_close(result[1].double(), exact_lse, rtol=1e-5, atol=1e-5)
    for row in (0, 17, 150, 299):
        end = 400 + row + 1
        alone = attention(q[:, row : row + 1], k[:, :end], v[:, :end], causal=True)
        assert_same(alone, rows(result, row, row + 1), f"row {row}")
    # Where the best key wins by far more than the rounding of the scores, the result is its value.
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.repeat_interleave(2, 2).double()) / 8
    scores.masked_fill_(~torch.ones(300, 700, dtype=torch.bool, device="cuda").tril(400), -math.inf)
    best = scores.topk(2).values
    clear = (best[..., 0] - best[..., 1] > 40 + 1e-4 * best[..., 0].abs()).transpose(1, 2)
    assert clear.double().mean() > 0.5
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(result[0].double()[clear], exact[clear], rtol=epsilon, atol=epsilon)
    assert_noticed(q / gain, k / gain, v, causal=True)


@every_16_bit_dtype
@pytest.mark.parametrize("size", [50.0, 1e4, 6e4])
def test_n6_all_scores_hugely_negative(dtype, size):
    q = torch.full((1, 2, 2, 16), size, dtype=dtype, device="cuda")
    k = torch.full((1, 400, 1, 16), -size, dtype=dtype, device="cuda")
    v = normal((1, 400, 1, 32), 4, dtype).cuda()
    out, lse = assert_same_in_every_schedule(q, k, v, split_size=128)
    exact, exact_lse = attn_oracle(q, k, v, return_lse=True)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=0)


def test_n6_scores_below_the_sentinel_count_as_minus_infinity():
    q = torch.full((1, 1, 1, 1), 3e38, dtype=torch.bfloat16, device="cuda")
    k = torch.full((1, 70, 1, 1), -1.0, dtype=torch.bfloat16, device="cuda")
    for name, (out, lse) in every_schedule(q, k, torch.ones_like(k), scale=0.5):
        assert_bits_equal(out, torch.zeros_like(out), name)
        assert (lse == -math.inf).all()
    assert attention(q * 0.1, k, torch.ones_like(k), scale=0.5)[1].isfinite().all()


@every_16_bit_dtype
def test_subnormal_numbers(dtype):
    smallest = torch.finfo(dtype).tiny  # the smallest normal number
    for tiny in itertools.product((1, smallest / 8), repeat=3):
        qkv = [(x * size).to(dtype).cuda() for x, size in zip(tensors(Sq=40), tiny)]
        out, lse = assert_same_in_every_schedule(*qkv, causal=True)
        exact, exact_lse = attn_oracle(*qkv, causal=True, return_lse=True)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5 + torch.finfo(dtype).eps / 2)
        assert (out.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * max(tiny[2], smallest)
        if tiny[2] < 1 and dtype == torch.float16:
            assert (out != 0).double().mean() > 0.1


@every_16_bit_dtype
def test_n10_rows_that_see_no_key(dtype):
    q, k, v = moved(tensors(B=3, Sq=40, Sk=170, dtype=dtype))
    lengths = moved(dict(seqused_k=int32(170, 10, 0), seqused_q=int32(20, 40, 40)))
    empty = torch.zeros(3, 40, dtype=torch.bool, device="cuda")
    empty[0, 20:] = empty[1, :30] = empty[2] = True  # unused, before every key, no keys
    for name, (out, lse) in every_schedule(q, k, v, causal=True, **lengths):
        assert torch.equal((lse == -math.inf).transpose(1, 2), empty[..., None].expand(3, 40, 4)), name
        assert_bits_equal(out[empty], torch.zeros_like(out[empty]), name)
        assert not out.isnan().any()
        assert not lse.isnan().any()
        assert out[~empty].all()


@pytest.mark.parametrize(("B", "Sq", "Sk"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_n10_empty_calls(B, Sq, Sk):
    q, k, v = (torch.ones(B, n, h, 16, dtype=torch.float16, device="cuda") for n, h in ((Sq, 4), (Sk, 2), (Sk, 2)))
    for name, (out, lse) in every_schedule(q, k, v):
        assert_bits_equal(out, torch.zeros_like(q), name)
        assert_bits_equal(lse, torch.full((B, 4, Sq), -math.inf), name)
    starts = torch.zeros(B + 1, dtype=torch.int32, device="cuda")
    q, k, v = (torch.ones(n, h, 16, dtype=torch.float16, device="cuda") for n, h in ((Sq, 4), (Sk, 2), (Sk, 2)))
    with poisoned():
        out, lse = packed(q, k, v, starts, starts)
    assert_bits_equal(out, torch.zeros_like(q))
    assert_bits_equal(lse, torch.full((4, Sq), -math.inf))


@every_16_bit_dtype
@pytest.mark.parametrize("Sq", [1, 40])
def test_n8_sinks_of_every_size(dtype, Sq):
    q, k, v = moved(tensors(Sq=Sq, Hq=8, dtype=dtype))
    without = attention(q, k, v, causal=True)
    sinks = torch.tensor([-math.inf, -1e4, 0.0, 3.0, 90.0, 1e4, 1e30, -1e30], device="cuda")
    out, lse = assert_same_in_every_schedule(q, k, v, causal=True, sinks=sinks)
    nothing = [0, 1, 7]  # heads whose sink weighs nothing
    assert_same((out[:, :, nothing], lse[:, nothing]), (without[0][:, :, nothing], without[1][:, nothing]))
    exact, exact_lse = attn_oracle(q, k, v, causal=True, sinks=sinks, return_lse=True)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5 + torch.finfo(dtype).eps / 2)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=2 * epsilon, atol=epsilon)
    assert (out[:, :, 4:7].abs() < 1e-6).all()
    assert out[:, :, 2:4].ne(without[0][:, :, 2:4]).any()


# ---- streams, graphs, torch ------------------------------------------------------------------------------------------

FEW = {name: SCHEDULES[name] for name in ("generic 16 spilled", "generic 64 folded", "hopper auto folded")}
few_schedules = pytest.mark.parametrize("schedule", FEW.values(), ids=FEW)


@few_schedules
def test_kernels_run_on_the_current_stream(schedule):
    """q is there only behind a delay on a stream of ours. The control uses another stream, and overtakes it."""
    q, k, v = moved(tensors(dtype=torch.bfloat16))
    want = attention(q, k, v)
    late_q = torch.full_like(q, math.nan)
    with _schedule.forced(**schedule):
        attention(q, k, v)  # the first launch of a kernel may load it, which waits for the device
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            busy()
            late_q.copy_(q)
            ours = attention(late_q, k, v)
        with torch.cuda.stream(torch.cuda.Stream()):
            control = attention(late_q, k, v)
    torch.cuda.synchronize()
    assert_same(ours, want)
    assert control[0].isnan().all()


@few_schedules
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_call_waits_for_nothing(schedule):
    q, k, v = moved(tensors(dtype=torch.float16))
    used = int32(300, 20).cuda()
    finished = torch.cuda.Event()
    with _schedule.forced(**schedule):
        attention(q, k, v, seqused_k=used)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            busy()
            attention(q, k, v, seqused_k=used)
            finished.record()
            assert not finished.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@every_16_bit_dtype
@pytest.mark.parametrize("Sq", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("schedule", [{}, *FEW.values()], ids=["auto", *FEW])
def test_graph_replays_with_growing_lengths(dtype, Sq, schedule):
    """A graph that lengthens its own sequences by one key, as generation does."""
    q, k, v = moved(tensors(B=3, Sq=Sq, Sk=700, Hq=8, dtype=dtype))
    used = int32(0, 0, 0).cuda()

    def call():
        used.add_(1)
        with _schedule.forced(**schedule):
            return attention(q, k, v, causal=True, seqused_k=used)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    previous = None
    for first in (int32(0, 62, 697), int32(511, 127, 300)):
        used.copy_(first)
        for step in range(1, 4):
            out.fill_(math.nan)
            lse.fill_(math.nan)
            graph.replay()
            expected = attention(q, k, v, causal=True, seqused_k=(first + step).cuda())
            assert_same((out, lse), expected, f"lengths {(first + step).tolist()}")
            assert previous is None or differing((out, lse), previous) > 0
            previous = out.clone(), lse.clone()


def test_graph_of_packed_sequences_replays_with_other_lengths():
    q, k, v = (x[0] for x in moved(tensors(B=1, Sq=80, Sk=700, dtype=torch.bfloat16)))
    starts = moved([int32(0, 80, 80), int32(0, 700, 700)])
    packed(q, k, v, *starts, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = packed(q, k, v, *starts, causal=True)
    for lengths in ((int32(0, 1, 70), int32(0, 10, 690)), (int32(0, 0, 80), int32(0, 0, 700))):
        for start, length in zip(starts, lengths):
            start.copy_(length)
        graph.replay()
        assert_same((out, lse), packed(q, k, v, *moved(lengths), causal=True))


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@every_16_bit_dtype
def test_compile_gives_the_same_bits(dtype):
    qkv = moved(tensors(Sq=9, Hq=8, dtype=dtype))
    keywords = moved(dict(causal=True, window=(70, 5), softcap=9.0, sinks=torch.ones(8), seqused_k=int32(300, 17)))
    compiled = torch.compile(lambda *qkv: attention(*qkv, **keywords), fullgraph=True)
    assert_same(compiled(*qkv), attention(*qkv, **keywords))


@every_16_bit_dtype
@pytest.mark.parametrize("op", [ops.fwd, ops.fwd_partials], ids=["fwd", "fwd_partials"])
def test_opcheck(op, dtype):
    options = dict(causal=True, scale=None, window=(40, 3), softcap=5.0, split_size=128, arithmetic="mma")
    arrays = dict(alibi_slopes=torch.linspace(0.1, 0.4, 4), sinks=torch.ones(4), seqused_k=int32(0, 100))
    torch.library.opcheck(op, _arguments(*moved(tensors(dtype=dtype)), **options, **moved(arrays)))


def test_memory_is_torchs_and_goes_back():
    q, k, v = moved(tensors(Sq=1, Sk=4096, D=128, dtype=torch.bfloat16))
    attention(q, k, v)
    before = torch.cuda.memory_allocated()
    for schedule in SCHEDULES.values():
        with _schedule.forced(**schedule):
            result = attention(q, k, v)
        del result
        assert torch.cuda.memory_allocated() == before


def test_float32_has_no_matrix_step():
    qkv = moved(tensors())
    message = "^arithmetic 'mma' is for float16 and bfloat16"
    for function in (fad.attn, fad.attn_partials):
        with pytest.raises(NotImplementedError, match=message):
            function(*qkv, arithmetic="mma")
    assert_same(attention(*qkv), attention(*qkv, arithmetic="fma"))
