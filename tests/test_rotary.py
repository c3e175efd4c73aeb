"""N12: the rotary embedding. Its definition is eager torch operations in the compute dtype, for every dtype."""

import math
import re

import numpy as np
import pytest
import torch
from cases import normal
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_attn_det as fad
from flash_attn_det import ops
from flash_attn_det.testing import assert_bits_equal, bits_differ

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_pairings = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def tables(positions=40, dim=16, dtype=torch.float32):
    """cos and sin as models make them."""
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def eager(x, cos, sin, positions, interleaved):
    """The clause in torch: products, then one difference and one sum, in the compute dtype. positions [B, S]."""
    compute, half = ops.compute_dtype(x.dtype), cos.shape[1]
    c, s = (table.to(compute)[positions.long()][:, :, None] for table in (cos, sin))
    a = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    b = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    out, wide = x.clone(), x.to(compute)
    out[..., a] = (wide[..., a] * c - wide[..., b] * s).to(x.dtype)
    out[..., b] = (wide[..., a] * s + wide[..., b] * c).to(x.dtype)
    return out


def counted(offsets, rows, advance=True):
    """Positions [B, S]."""
    return offsets[:, None] + (torch.arange(rows) if advance else torch.zeros(rows, dtype=torch.int32))


@both_pairings
@every_dtype
@pytest.mark.parametrize(("D", "dim"), [(16, 16), (16, 8), (40, 2), (7, 6), (128, 128), (256, 64)])
def test_n12_bits_of_eager_torch(D, dim, dtype, interleaved):
    x, offsets = normal((3, 9, 2, D), 5, dtype), int32(0, 7, 31)
    for table_dtype in {dtype, ops.compute_dtype(dtype)}:
        cos, sin = tables(dim=dim, dtype=table_dtype)
        for advance in (True, False):
            got = fad.apply_rotary(x, cos, sin, offsets=offsets, advance=advance, interleaved=interleaved)
            assert_bits_equal(got, eager(x, cos, sin, counted(offsets, 9, advance), interleaved))
        assert bits_differ(got, fad.apply_rotary(x, cos, sin, offsets=offsets, interleaved=interleaved)) > 0
    assert bits_differ(got[..., :dim], x[..., :dim]) > 0
    assert_bits_equal(got[..., dim:], x[..., dim:])


@both_pairings
def test_n12_products_are_not_fused(interleaved):
    """An fma would round once less: on these numbers that is seen."""
    x, (cos, sin) = normal((2, 40, 4, 64), 6), tables(dim=64)
    got = fad.apply_rotary(x, cos, sin, interleaved=interleaved)
    fused = eager(x.double(), cos.double(), sin.double(), counted(int32(0, 0), 40), interleaved).float()
    assert bits_differ(got, fused) > 100
    assert (got - fused).abs().max() < 1e-6


@both_pairings
@every_dtype
def test_n1_a_row_depends_on_itself_alone(dtype, interleaved):
    """Batch, neighbours, heads, and how many rows are rotated at once."""
    x, (cos, sin), offsets = normal((4, 12, 3, 32), 8, dtype), tables(dim=24, dtype=dtype), int32(3, 0, 28, 9)
    whole = fad.apply_rotary(x, cos, sin, offsets=offsets, interleaved=interleaved)
    for b in range(4):
        alone = fad.apply_rotary(x[b : b + 1], cos, sin, offsets=int(offsets[b]), interleaved=interleaved)
        assert_bits_equal(alone, whole[b : b + 1])
    for i in (0, 5, 11):
        row = fad.apply_rotary(x[:, i : i + 1], cos, sin, offsets=offsets + i, interleaved=interleaved)
        assert_bits_equal(row, whole[:, i : i + 1])
    assert bits_differ(fad.apply_rotary(x, cos, sin, offsets=offsets.flip(0), interleaved=interleaved), whole) > 0


def test_strides_and_threads_do_not_matter():
    x, (cos, sin) = normal((2, 30, 4, 16), 9), tables()
    expected = fad.apply_rotary(x, cos, sin, interleaved=True)
    for layout in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.full((2, 60, 4, 16), math.nan)[:, ::2].copy_(x),
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert_bits_equal(fad.apply_rotary(layout, cos, sin, interleaved=True), expected)
    spread = torch.stack([cos, sin], -1)
    assert_bits_equal(fad.apply_rotary(x, spread[..., 0], spread[..., 1], interleaved=True), expected)
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            assert_bits_equal(fad.apply_rotary(x, cos, sin, interleaved=True), expected)
    finally:
        torch.set_num_threads(before)
    assert bits_differ(fad.apply_rotary(x, cos, sin, interleaved=False), expected) > 0


@every_dtype
def test_n9_nan_is_canonical_where_it_is_computed_and_kept_where_it_is_copied(dtype):
    x, (cos, sin) = torch.zeros(1, 1, 1, 6, dtype=dtype), tables(dim=4, dtype=dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    x.view(integer)[...] = -1  # a NaN with every bit set
    got = fad.apply_rotary(x, cos, sin, interleaved=True)
    assert_bits_equal(got[..., :4], torch.full((1, 1, 1, 4), math.nan, dtype=dtype))
    assert_bits_equal(got[..., 4:].view(integer), x[..., 4:].view(integer))
    assert bits_differ(got[..., :2].view(integer), x[..., :2].view(integer)) > 0


def test_empty_tensors():
    cos, sin = tables()
    for shape in ((0, 3, 2, 16), (2, 0, 2, 16)):
        assert fad.apply_rotary(torch.zeros(shape), cos, sin, offsets=10**9, interleaved=True).shape == shape


@every_dtype
def test_opcheck_and_fake_tensors(dtype):
    x, (cos, sin) = normal((2, 5, 3, 16), 4, dtype).transpose(1, 2), tables(dim=8, dtype=dtype)
    torch.library.opcheck(ops.rotate, (x, cos, sin, int32(1, 2), True, False))
    real = fad.apply_rotary(x, cos, sin, interleaved=True)
    with FakeTensorMode():
        tensors = [torch.empty_strided(t.shape, t.stride(), dtype=dtype) for t in (x, cos, sin)]
        fake = fad.apply_rotary(*tensors, interleaved=True)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_compile_gives_the_same_bits():
    x, (cos, sin) = normal((2, 5, 3, 16), 4), tables(dim=8)
    compiled = torch.compile(lambda *a: fad.apply_rotary(*a, offsets=3, interleaved=False), fullgraph=True)
    assert_bits_equal(compiled(x, cos, sin), fad.apply_rotary(x, cos, sin, offsets=3, interleaved=False))


COS, SIN = tables()
BAD = [
    (TypeError, "x must be a torch.Tensor, got ndarray", dict(x=np.ones((1, 1, 1, 16)))),
    (TypeError, "x has dtype torch.int64, expected float32", dict(x=torch.ones(1, 1, 1, 16).long())),
    (ValueError, "x has 3 dimensions, expected 4", dict(x=torch.ones(1, 1, 16))),
    (ValueError, "head dim of x is 257, expected 1 to 256", dict(x=torch.ones(2, 3, 1, 257))),
    (ValueError, "x has 0 heads, expected at least 1", dict(x=torch.ones(2, 3, 0, 16))),
    (TypeError, "cos must be a torch.Tensor, got NoneType", dict(cos=None)),
    (TypeError, "sin has dtype torch.float16, expected torch.float32 or torch.float32", dict(sin=SIN.half())),
    (ValueError, "cos has 1 dimensions, expected 2: [positions, rotary_dim / 2]", dict(cos=COS[0])),
    (ValueError, "sin is on meta, x is on cpu: expected one device", dict(sin=SIN.to("meta"))),
    (ValueError, "cos is [40, 8], sin is [40, 4]: expected one shape", dict(sin=SIN[:, :4])),
    (ValueError, "cos is [40, 0], expected at least one row and column", dict(cos=COS[:, :0], sin=SIN[:, :0])),
    (ValueError, "cos and sin are for 16 dims of a row, expected an even number", dict(x=torch.ones(2, 3, 1, 14))),
    (TypeError, "offsets must be an int or an int32 torch.Tensor, got float", dict(offsets=1.0)),
    (TypeError, "offsets has dtype torch.int64, expected int32", dict(offsets=torch.zeros(2, dtype=torch.int64))),
    (ValueError, "offsets is -1, expected 0 to 2^31 - 1", dict(offsets=-1)),
    (ValueError, "offsets has 3 elements, expected 2", dict(offsets=int32(0, 0, 0))),
    (ValueError, "offsets[1] is -4, expected 0 or more", dict(offsets=int32(0, -4))),
    (ValueError, "offsets[1] is 38 and 3 positions follow: cos and sin have 40 rows", dict(offsets=int32(0, 38))),
    (ValueError, "offsets[0] is 40 and 1 positions follow", dict(offsets=40, advance=False)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), BAD, ids=[case[1][:50] for case in BAD])
def test_bad_input(error, message, changed):
    good = dict(x=torch.ones(2, 3, 1, 16), cos=COS, sin=SIN, interleaved=True)
    with pytest.raises(error, match=f"^{re.escape(message)}") as caught:
        fad.apply_rotary(**{**good, **changed})
    assert caught.type is error
    fad.apply_rotary(**good, offsets=int32(0, 37))
    fad.apply_rotary(**good, offsets=39, advance=False)


def test_grad_is_refused():
    x = torch.ones(2, 3, 1, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="flash_attn_det has no backward yet, but x requires grad"):
        fad.apply_rotary(x, COS, SIN, interleaved=True)
