"""Every kernel equals the contract as written in torch, on every case; and the contract is attention."""

import zlib

import pytest
import torch
from cases import CASES, DTYPES, Case, normal

import flash_attn_det as fad
from flash_attn_det import _schedule
from flash_attn_det.reference import attn_oracle, attn_reference, attn_varlen_oracle, attn_varlen_reference
from flash_attn_det.testing import assert_bits_equal, bits_differ

# Machine epsilon of the output dtype, and what the rounding of scores adds where they are of ordinary size.
TOLERANCE = {"fp32": 4e-6, "fp16": 2e-3, "bf16": 1.6e-2, "fp64": 1e-14}


def schedules(case: Case):
    """Each instruction set with both layouts, with the other choices drawn from the case's name."""
    draw = zlib.crc32(case.name.encode())
    for isa in _schedule.isas() if case.dtype != "fp64" else _schedule.isas()[:1]:
        for layout in ("rows", "keys"):
            tile_rows = (1, 5, 16, 64, 100, 256)[draw % 6]
            yield {"isa": isa, "layout": layout, "tile_rows": tile_rows, "split_parallel": draw % 2 == 0}
            draw = draw * 5 // 3 + 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_n7_kernels_equal_the_reference(case):
    qkv, keywords = case.inputs()
    out, lse = attn_reference(*qkv, **keywords, return_lse=True)
    actual_out, actual_lse = fad.attn(*qkv, **keywords, return_lse=True)
    assert_bits_equal(actual_out, out, "out")
    assert_bits_equal(actual_lse, lse, "lse")
    for schedule in schedules(case):
        with _schedule.forced(**schedule):
            actual_out, actual_lse = fad.attn(*qkv, **keywords, return_lse=True)
        assert_bits_equal(actual_out, out, f"out {schedule}")
        assert_bits_equal(actual_lse, lse, f"lse {schedule}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_are_close_to_the_oracle(case):
    qkv, keywords = case.inputs()
    out, lse = fad.attn(*qkv, **keywords, return_lse=True)
    exact_out, exact_lse = attn_oracle(*qkv, **keywords, return_lse=True)
    assert out.shape == exact_out.shape
    assert lse.shape == exact_lse.shape
    assert torch.equal(lse.isinf(), exact_lse.isinf())
    torch.testing.assert_close(out.double(), exact_out, atol=TOLERANCE[case.dtype], rtol=TOLERANCE[case.dtype])
    tolerance = TOLERANCE["fp64" if case.dtype == "fp64" else "fp32"]
    torch.testing.assert_close(lse.double(), exact_lse, atol=tolerance, rtol=tolerance)


def packed_inputs(dtype):
    q, k, v = (normal((rows, heads, 20), seed, dtype) for rows, heads, seed in ((40, 6, 1), (400, 2, 2), (400, 2, 3)))
    cu_q = torch.tensor([0, 3, 3, 20, 36], dtype=torch.int32)  # four rows behind the last sequence
    cu_k = torch.tensor([0, 150, 151, 151, 399], dtype=torch.int32)
    return q, k, v, cu_q, cu_k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"causal": True, "window": (100, -1), "sinks": True},
        {"alibi_slopes": True, "softcap": 3.0, "k_pos": True, "seqused_q": True, "seqused_k": True, "causal": True},
    ],
    ids=["plain", "causal window sinks", "everything"],
)
def test_n7_packed_kernels_equal_the_reference(dtype, keywords):
    q, k, v, cu_q, cu_k = packed_inputs(DTYPES[dtype])
    compute = torch.float64 if dtype == "fp64" else torch.float32
    tensors = {
        "sinks": normal((6,), 4, compute),
        "alibi_slopes": normal((4, 6), 5, compute) / 8,
        "k_pos": torch.tensor([7, 0, 300, 64], dtype=torch.int32),
        "seqused_q": torch.tensor([2, 0, 17, 5], dtype=torch.int32),
        "seqused_k": torch.tensor([150, 1, 0, 200], dtype=torch.int32),
    }
    keywords = {name: tensors.get(name, value) for name, value in keywords.items()}
    arguments = (q, k, v, cu_q, cu_k)
    out, lse = attn_varlen_reference(*arguments, **keywords, split_size=128, return_lse=True)
    for schedule in ({}, {"layout": "rows", "tile_rows": 7}, {"layout": "keys", "split_parallel": True}):
        with _schedule.forced(**schedule):
            actual_out, actual_lse = fad.attn_varlen(*arguments, **keywords, split_size=128, return_lse=True)
        assert_bits_equal(actual_out, out, f"out {schedule}")
        assert_bits_equal(actual_lse, lse, f"lse {schedule}")
    exact_out, exact_lse = attn_varlen_oracle(*arguments, **keywords, return_lse=True)
    torch.testing.assert_close(out.double(), exact_out, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), exact_lse, atol=4e-6, rtol=4e-6)
    _, different_lse = attn_varlen_reference(*arguments, **keywords, split_size=256, return_lse=True)
    assert bits_differ(lse, different_lse) > 0  # fp16 and bf16 may hide it in out


def test_n3_reference_notices_the_split_size():
    q, k, v = (normal((1, 3, 2, 16), 1), *(normal((1, 300, 2, 16), seed) for seed in (2, 3)))
    outs = [attn_reference(q, k, v, split_size=size) for size in (128, 256, 512)]
    assert bits_differ(outs[0], outs[1]) > 0
    assert bits_differ(outs[1], outs[2]) > 0
    with fad.split_size(256):
        assert_bits_equal(attn_reference(q, k, v), outs[1])


def test_reference_has_no_tensor_core_family():
    x = normal((1, 1, 1, 8), 1)
    with pytest.raises(NotImplementedError, match="fma family"):
        attn_reference(x, x, x, arithmetic="mma")


def test_oracle_agrees_with_torch():
    q, k, v = (normal((2, 50, 3, 16), seed, torch.float64) for seed in (1, 2, 3))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    for causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)
        torch.testing.assert_close(attn_oracle(q, k, v, causal=causal), expected)
    _, lse = attn_oracle(q, k, v, return_lse=True, sinks=torch.zeros(3))
    scores = heads_first[0] @ heads_first[1].transpose(2, 3) / 4
    torch.testing.assert_close(lse, torch.cat([scores, torch.zeros_like(scores[..., :1])], 3).logsumexp(3))
