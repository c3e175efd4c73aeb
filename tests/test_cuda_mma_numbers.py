"""The mma family on a GPU for numbers that are not finite (N11), and at the ends of their range, on every schedule."""

import itertools
import math

import pytest
import torch
from cases import normal
from cuda_schedules import assert_same_in_every_schedule, every_schedule
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
    rows,
    tensors,
)

from flash_attn_det import _schedule
from flash_attn_det.reference import attn_oracle
from flash_attn_det.testing import assert_bits_equal, bits_differ

pytestmark = needs_gpu

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


@needs_hopper
@every_16_bit_dtype
@pytest.mark.parametrize("B", [1, 40])  # few splits have clusters of many thread blocks, many splits of few
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize(("Sk", "window", "key"), [(600, None, 598), (1000, None, 998), (1000, 600, 398)])
def test_n11_values_reach_only_the_rows_that_see_them_in_clusters(Sk, window, key, D, B, dtype):
    """Three rows, of which the first sees all keys but two, or with a window the last all but two of the first's."""
    q, k, v = (x.repeat(B, 1, 1, 1) for x in moved(tensors(B=1, Sq=3, Sk=Sk, D=D, dtype=dtype)))
    for dim in (3, 27, D - 1):  # of the first and last thread blocks, warps and tiles
        v[:, key, :, dim] = math.nan
    keywords = {"causal": True, "window": (window or -1, -1), "split_size": 1024}
    got = {}
    for kernel in ("generic", "cluster"):
        with _schedule.forced(kernel=kernel, tile_rows=16, split_parallel=True), poisoned():
            got[kernel] = attention(q, k, v, **keywords)
    assert_same(got["cluster"], got["generic"], f"key {key} of {Sk}")
    blind = 2 if window else 0
    reached = got["generic"][0].isnan().any(dim=-1)
    assert reached[:, 1].all()
    assert not reached[:, blind].any()


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


@pytest.mark.parametrize("size", [2.0**-120, 2.0**-65, 1.0, 2.0**65], ids=["tiny", "small", "ordinary", "large"])
@pytest.mark.parametrize("step", [0, 9, 15, 40])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_n8_references_and_values_of_any_size(D, step, size):
    """Splits whose references lie up to two steps above or below the first one's."""
    q, k, v = tensors(B=1, Sq=150, Sk=5 * SPLIT, Hq=2, Hk=1, D=D)
    q[..., 0], k[..., 0] = 1, torch.tensor([0.0, 1, -1, 2, -2]).repeat_interleave(SPLIT)[:, None] * step
    q, k, v = (x.to(torch.bfloat16).cuda() for x in (q, k, v * size))
    keywords = {"scale": math.log(2)}  # a step of k[..., 0] is one of the reference
    assert_same_in_every_schedule(q, k, v, **keywords)
    if step == 0:  # otherwise one split may be all that counts
        assert_noticed(q, k, v, **keywords)


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
