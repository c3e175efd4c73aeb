"""The attention function that transformers calls: the bits of one sequence, however it arrives."""

import functools
import types

import pytest
import torch

import flash_attn_det
from flash_attn_det.testing import assert_bits_equal, bits_differ

pytest.importorskip(
    "transformers", minversion="5.0", reason="needs transformers >= 5: pip install 'flash-attn-det[hf]'"
)

from flash_attn_det.integrations import huggingface as hf

SPLIT = 256  # short enough that several splits are folded
LENGTHS = (700, 65, 1, 130, 513)  # around block and split boundaries
HQ, HK, D = 4, 2, 24
VARIANTS = {
    "full": {"is_causal": False},
    "causal": {"is_causal": True},
    "causal window": {"is_causal": True, "sliding_window": 100},
    "full window": {"is_causal": False, "sliding_window": 70},
    "softcap": {"is_causal": True, "softcap": 2.0},
    "sinks": {"is_causal": True, "s_aux": torch.linspace(-1, 2, HQ), "sliding_window": 600},
}
MODULE = types.SimpleNamespace()


def attend(q, k, v, mask=None, **options):
    with flash_attn_det.split_size(SPLIT):
        return hf.deterministic_attention(MODULE, q, k, v, mask, scaling=0.5, **options)[0]


@functools.cache
def sequences():
    """q, k, v of every sequence: [1, heads, n, D]."""
    g = torch.Generator().manual_seed(3)
    return [tuple(torch.randn(1, heads, n, D, generator=g) for heads in (HQ, HK, HK)) for n in LENGTHS]


@functools.cache
def alone(variant):
    return [attend(*qkv, **VARIANTS[variant])[0] for qkv in sequences()]


def place(columns, width):
    """All sequences in one NaN-filled batch, token t of sequence b at column columns[b][t]: q, k, v and the mask."""
    batch = [torch.full((len(LENGTHS), heads, width, D), torch.nan) for heads in (HQ, HK, HK)]
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.bool)
    for b, qkv in enumerate(sequences()):
        mask[b, columns[b]] = True
        for whole, part in zip(batch, qkv):
            whole[b, :, columns[b]] = part[0]
    return *batch, mask


def columns_of(way):
    width = max(LENGTHS) + 7
    if way == "holes":
        g = torch.Generator().manual_seed(4)
        return [torch.randperm(width, generator=g)[:n].sort()[0] for n in LENGTHS], width
    first = {"right": lambda n: 0, "left": lambda n: width - n, "both": lambda n: (width - n) // 3}[way]
    return [torch.arange(first(n), first(n) + n) for n in LENGTHS], width


def full_mask(mask, causal):
    """[B, n] -> what a user who builds masks by hand passes: [B, 1, n, n], additive."""
    n = mask.shape[1]
    seen = mask[:, None, None, :].expand(-1, 1, n, n) & mask[:, None, :, None]
    if causal:
        seen = seen & torch.ones(n, n, dtype=torch.bool).tril()
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", ["right", "left", "both", "holes"])
def test_padding_does_not_change_a_bit(way, variant):
    options = VARIANTS[variant]
    columns, width = columns_of(way)
    q, k, v, mask = place(columns, width)
    masks = {"bool [B, n]": mask, "int [B, n]": mask.long(), "bool [B, 1, 1, n]": mask[:, None, None, :]}
    if "sliding_window" not in options:
        additive = full_mask(mask, options["is_causal"])
        masks |= {"additive [B, 1, n, n]": additive, "bool [B, Hq, n, n]": (additive == 0).expand(-1, HQ, -1, -1)}
    for form, representation in masks.items():
        out = attend(q, k, v, representation, **options)
        for b, expected in enumerate(alone(variant)):
            assert_bits_equal(out[b, columns[b]], expected, f"{form}, sequence {b}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_packing_does_not_change_a_bit(variant):
    options = VARIANTS[variant]
    q, k, v = (torch.cat(parts, 2) for parts in zip(*sequences()))
    expected = torch.cat(alone(variant))[None]
    cu = torch.tensor((0, *LENGTHS)).cumsum(0)
    out = attend(q, k, v, cu_seq_lens_q=cu, cu_seq_lens_k=cu, **options)
    assert_bits_equal(out, expected, "cu_seq_lens")
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None] + 2  # RoBERTa counts from 2
    assert_bits_equal(attend(q, k, v, position_ids=positions, **options), expected, "position_ids")
    numbers = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(LENGTHS)])[None]
    # Two batch rows; the second begins with the number that the first ends with.
    two_rows = torch.cat([numbers, len(LENGTHS) + 1 - numbers])
    out = attend(*(x.expand(2, -1, -1, -1) for x in (q, k, v)), two_rows, **options)
    assert_bits_equal(out, expected.expand(2, -1, -1, -1), "segment numbers")
    without_second = torch.where(numbers == 2, 0, numbers)
    out = attend(q, k, v, without_second, **options)
    assert_bits_equal(out[0, cu[2] :], expected[0, cu[2] :], "segment numbers with padding")
    assert not out[0, cu[1] : cu[2]].any()


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "full" and name != "full window"])
@pytest.mark.parametrize("rows", [1, 37])
def test_decode_rows_have_the_bits_of_prefill(rows, variant):
    """The last rows of a sequence against its whole cache: left-padded, static, and behind a rolling window."""
    options = VARIANTS[variant]
    usable = [b for b, n in enumerate(LENGTHS) if n >= rows]
    columns, width = columns_of("left")
    q, k, v, mask = place(columns, width)
    q = q[:, :, -rows:]

    def check(out, name):
        for b in usable:
            assert_bits_equal(out[b], alone(variant)[b][-rows:], f"{name}, sequence {b}")

    check(attend(q, k, v, mask, **options), "dynamic cache")
    unused = [torch.cat([x, torch.full_like(x[:, :, :50], torch.nan)], 2) for x in (k, v)]
    check(attend(q, *unused, mask, **options), "static cache")
    for b in usable:
        qkv = sequences()[b]
        out = attend(qkv[0][:, :, -rows:], *qkv[1:], **options)
        assert_bits_equal(out[0], alone(variant)[b][-rows:], f"no padding, sequence {b}")
    if "sliding_window" in options:
        kept = options["sliding_window"] + rows - 1
        rolled = attend(q, k[:, :, -kept:], v[:, :, -kept:], mask, **options)
        check(rolled, "rolling cache")
        # Without the dropped slots in the mask the first kept key would count as position 0, and the blocks move.
        rebased = attend(q, k[:, :, -kept:], v[:, :, -kept:], mask[:, -kept:], **options)
        assert bits_differ(rebased, rolled) > 0, "too tame to notice that positions moved"


def test_torch_attention_depends_on_the_batch():
    """The negative control of the tests above: the same sequences through torch's own attention."""
    columns, width = columns_of("right")
    q, k, v, mask = place(columns, width)
    sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=0.5, enable_gqa=True)
    batched = sdpa(*(x.nan_to_num() for x in (q, k, v)), attn_mask=mask[:, None, None, :])
    differing = sum(
        bits_differ(batched[b, :, :n], sdpa(*qkv)[0]) for b, (n, qkv) in enumerate(zip(LENGTHS, sequences()))
    )
    assert differing > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    columns, width = columns_of("left")
    q, k, v, mask = place(columns, width)
    out = attend(*(x.to(dtype) for x in (q, k, v)), mask, is_causal=True)
    assert out.dtype == dtype
    for b, qkv in enumerate(sequences()):
        expected = attend(*(x.to(dtype) for x in qkv), is_causal=True)[0]
        assert_bits_equal(out[b, columns[b]], expected, f"sequence {b}")
