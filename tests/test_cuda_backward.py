"""The backward on a GPU: the CPU's bits (N13), by every kernel, the same for a sequence alone and in any company (N14).
What the backward is, test_backward.py says; here the CPU is the reference.
"""

import functools
import math
import warnings

import pytest
import torch
from cases import CASES, integers, normal
from cuda_gradients import (
    FAMILIES,
    assert_noticed,
    assert_same,
    every_dtype,
    every_family,
    on_the_cpu,
    on_the_gpu,
    tensors,
)
from cuda_tools import int32, moved, needs_gpu, needs_hopper, poisoned
from gradients import upstream

import flash_attn_det as fad
from flash_attn_det import _schedule
from flash_attn_det.testing import assert_bits_equal, bits_differ

pytestmark = needs_gpu

every_case = pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param(f, case, id=f"{name} {case.name}")
        for name, f in FAMILIES.items()
        for case in CASES
        if case.dtype in f.dtypes
    ],
)


# ---- bits ------------------------------------------------------------------------------------------------------------


@functools.cache
def expected(family, case):
    (q, k, v), keywords = case.inputs()
    dlse = normal((case.B, case.Hq, case.Sq), 902)
    return (q, k, v, upstream(q, v), dlse), keywords, on_the_cpu(family, q, k, v, upstream(q, v), dlse, **keywords)


@every_case
def test_n13_bits_of_the_cpu(family, case):
    """Also: every element of a gradient is written, and nothing is read from the workspace before it is."""
    inputs, keywords, want = expected(family, case)
    with poisoned():
        assert_same(on_the_gpu(family, *inputs, **keywords), want)


SHAPES = {
    "whole blocks": {"Sq": 256, "Sk": 384, "D": 64, "Dv": 64},
    "several chunks of dims": {"B": 1, "Sq": 200, "Sk": 330, "Hq": 6, "Hk": 2, "D": 128, "Dv": 80},
    "largest head dims": {"B": 1, "Sq": 130, "Sk": 200, "Hq": 2, "Hk": 1, "D": 256, "Dv": 256},
    "wide values": {"B": 1, "Sq": 70, "Sk": 150, "Hq": 2, "Hk": 2, "D": 40, "Dv": 200},
    "many heads": {"B": 1, "Sq": 65, "Sk": 65, "Hq": 32, "Hk": 1},
    "one row": {"Sq": 1, "Sk": 700, "Hq": 8, "Hk": 2, "D": 64},
    "more heads than take turns": {"B": 3, "Sq": 300, "Sk": 300, "Hq": 6, "Hk": 6, "D": 64, "Dv": 64},
}


@every_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_n13_shapes(family, dtype, causal, shape):
    inputs = tensors(dtype=dtype, **shape)
    assert_same(on_the_gpu(family, *inputs, causal=causal), on_the_cpu(family, *inputs, causal=causal))
    if inputs[0].shape[1] > 1:
        assert_noticed(family, *inputs, causal=causal)


@every_dtype
def test_n13_sinks_over_many_rows_and_sequences(family, dtype):
    """Rows enough for several rounds of the kernel that sums them, and sequences whose sums are added in order."""
    inputs = tensors(B=3, Sq=17000, Sk=20, Hq=2, Hk=1, D=8, Dv=8, dtype=dtype)
    keywords = {"sinks": normal((2,), 11), "seqused_q": int32(17000, 16385, 0)}
    want = on_the_cpu(family, *inputs, **keywords)
    assert_same(on_the_gpu(family, *inputs, **keywords), want)
    q, k, v, dout = inputs
    backwards = q.flip(1), k, v, dout.flip(1)  # the same terms in another order
    sinks = keywords["sinks"]
    assert bits_differ(on_the_gpu(family, *backwards, sinks=sinks)[3], on_the_gpu(family, *inputs, sinks=sinks)[3]) > 0


def test_huge_logits():
    q, k, v, dout = tensors(B=1, Sq=6, Sk=9, Hq=1, Hk=1, D=4, Dv=4)
    fma = FAMILIES["fma"]
    want = on_the_cpu(fma, q * 3e7, k, v, dout, scale=1.0)
    assert_same(on_the_gpu(fma, q * 3e7, k, v, dout, scale=1.0), want)


PACKED = {
    "plain": {},
    "lengths": {"seqused_q": int32(1, 2, 0, 60), "seqused_k": int32(40, 0, 0, 199)},
    "everything": {
        "k_pos": int32(0, 3, 700, 64),
        "seqused_k": int32(50, 1, 0, 199),
        "alibi_slopes": normal((4, 4), 5) / 8,
        "sinks": normal((4,), 6),
        "window": (90, -1),
        "softcap": 3.0,
    },
}


def packed(cu_q, cu_k):
    return lambda *qkv, **keywords: fad.attn_varlen(*qkv, cu_q, cu_k, **keywords)


@every_dtype
@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_n13_packed_sequences(family, dtype, options):
    """One without rows, one without keys, and rows and keys behind the last sequence."""
    inputs = [x[0] for x in tensors(B=1, Sq=180, Sk=270, D=40, dtype=dtype)]
    cu = int32(0, 3, 9, 9, 175), int32(0, 50, 51, 51, 251)
    with poisoned():
        got = on_the_gpu(family, *inputs, function=packed(*moved(cu)), causal=True, **options)
    assert_same(got, on_the_cpu(family, *inputs, function=packed(*cu), causal=True, **options))
    assert not got[0][175:].any()
    assert not got[1][251:].any()
    assert not got[2][251:].any()


@every_family
def test_n13_thousand_packed_sequences(family):
    rows, keys = integers(1000, 0, 3, 1), integers(1000, 0, 200, 2)
    cu = [torch.cat([int32(0), x.cumsum(0, dtype=torch.int32)]) for x in (rows, keys)]
    inputs = [x[0] for x in tensors(B=1, Sq=int(cu[0][-1]) + 5, Sk=int(cu[1][-1]) + 7, Hq=2, Hk=1, dtype=family.dtype)]
    got = on_the_gpu(family, *inputs, function=packed(*moved(cu)), causal=True)
    assert_same(got, on_the_cpu(family, *inputs, function=packed(*cu), causal=True))


# ---- kernels of the mma family ---------------------------------------------------------------------------------------

MMA = FAMILIES["mma"]
every_kernel = pytest.mark.parametrize("kernel", ["generic", "hopper"])  # the second is the first where it cannot run
every_mma_dtype = pytest.mark.parametrize("dtype", MMA.dtypes.values(), ids=MMA.dtypes)


def by_kernel(kernel, *inputs, **keywords):
    """Gradients on the GPU by a forced kernel. Threads of autograd's own would not know of it."""
    with _schedule.forced(kernel=kernel), torch.autograd.set_multithreading_enabled(False):
        return on_the_gpu(MMA, *inputs, **keywords)


def names_of_kernels(kernel, *inputs):
    by_kernel(kernel, *inputs)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler warns of what it lacks on a machine
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            by_kernel(kernel, *inputs)
            torch.cuda.synchronize()
        events = profile.events()
    names = {event.name for event in events if "_backward_" in event.name}
    if not names:
        pytest.skip("needs a profiler that sees kernels (CUPTI)")
    return names


@needs_hopper
@pytest.mark.parametrize("D", [40, 64, 128, 136, 256])
def test_forced_kernels_are_not_the_same(D):
    """Else what follows would compare one kernel with itself. Hopper's are the default."""
    inputs = tensors(Sq=200, Sk=300, D=D, Dv=D, dtype=MMA.dtype)
    generic, hopper, default = (names_of_kernels(kernel, *inputs) for kernel in ("generic", "hopper", None))
    assert len(generic) == len(hopper) == 2
    assert not generic & hopper
    assert default == hopper


@every_kernel
@pytest.mark.parametrize("case", [case for case in CASES if case.dtype in MMA.dtypes], ids=lambda case: case.name)
def test_n13_bits_of_every_kernel(kernel, case):
    inputs, keywords, want = expected(MMA, case)
    with poisoned():
        assert_same(by_kernel(kernel, *inputs, **keywords), want)


WALKS = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window": (200, 100)},
    "softcap": {"causal": True, "softcap": 5.0},
    "alibi": {"causal": True, "alibi_slopes": normal((4,), 5) / 8},
    "lengths": {"causal": True, "seqused_q": int32(300, 450), "seqused_k": int32(600, 333)},
    "left padding": {"seqused_k": int32(333, 400), "leftpad_k": int32(70, 150), "sinks": normal((4,), 6)},
}


@functools.cache
def long_walk(options, D, dtype):
    """Inputs with Inf and NaN in some places, and the CPU's gradients."""
    inputs = tensors(Sq=500, Sk=600, D=D, Dv=D, dtype=dtype)
    for i, x in enumerate(inputs):
        x[0, 211 + 90 * i, 0, 3], x[1, 77 + 90 * i, 1, D - 1] = math.inf, math.nan
    return inputs, on_the_cpu(MMA, *inputs, **WALKS[options])


@every_kernel
@every_mma_dtype
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("options", WALKS)
def test_n11_n13_every_kernel_on_long_walks(kernel, dtype, D, options):
    """More blocks than the pipelines hold, plain ones and others, and values that are not finite among both."""
    inputs, want = long_walk(options, D, dtype)
    with poisoned():
        assert_same(by_kernel(kernel, *inputs, **WALKS[options]), want)


@every_kernel
@every_mma_dtype
@pytest.mark.parametrize("D", [64, 128, 256])
def test_n11_n14_every_kernel_beside_neighbours_of_any_values(kernel, dtype, D):
    """Tiles and blocks that hold rows of two sequences, of which one is NaN and Inf throughout."""
    cu = int32(0, 90, 190, 333), int32(0, 100, 170, 370)
    q, k, v, dout = (x[0] for x in tensors(B=1, Sq=333, Sk=370, D=D, Dv=D, dtype=dtype))
    clean = by_kernel(kernel, q, k, v, dout, function=packed(*moved(cu)), causal=True)
    q[90:190], dout[90:190], k[100:170], v[100:170] = math.nan, math.inf, -math.inf, math.nan
    got = by_kernel(kernel, q, k, v, dout, function=packed(*moved(cu)), causal=True)
    for a, b, at in zip(got, clean, (cu[0], cu[1], cu[1]), strict=True):
        for part in (slice(0, at[1]), slice(at[2], at[3])):
            assert_bits_equal(a[part], b[part])
            assert b[part].isfinite().all()
        assert bits_differ(a, b) > 0


# ---- what must not be seen -------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_n11_n14_poison_reaches_only_what_sees_it(family, dtype, poison, name):
    inputs = dict(zip(("q", "k", "v", "dout"), tensors(Sq=150, Sk=150, dtype=dtype), strict=True))
    options = {"causal": True, "window": (3, -1)}
    clean = on_the_gpu(family, *inputs.values(), **options)
    inputs[name] = inputs[name].clone()
    inputs[name][0, 70] = poison  # row 70 sees keys 67 .. 70; key 70 is seen by rows 70 .. 73
    got = on_the_gpu(family, *inputs.values(), **options)
    assert_same(got, on_the_cpu(family, *inputs.values(), **options))
    near = torch.arange(150)
    far = (near < 67) | (near > 73)
    for a, b in zip(got, clean, strict=True):
        assert_bits_equal(a[1], b[1], "other sequence")
        assert_bits_equal(a[0, far], b[0, far], "far away")
    assert not got[0][0, 70].isfinite().all()


@every_family
def test_n11_unused_rows_may_hold_anything(family):
    q, k, v, dout = tensors(Sq=20, Sk=30, dtype=family.dtype)
    used = {"seqused_q": int32(20, 11), "seqused_k": int32(8, 30), "leftpad_k": int32(7, 0)}
    clean = on_the_gpu(family, q, k, v, dout, causal=True, **used)
    q[1, 11:] = dout[1, 11:] = math.nan
    k[0, :7] = v[0, :7] = k[0, 15:] = v[0, 15:] = math.nan
    got = on_the_gpu(family, q, k, v, dout, causal=True, **used)
    assert_same(got, clean)
    assert not got[0][1, 11:].any()
    assert not got[1][0, :7].any()
    assert not got[2][0, 15:].any()
    assert got[1][0, 7:15].any()


@every_dtype
def test_strides_do_not_matter(family, dtype):
    q, k, v, dout = moved(tensors(D=24, Dv=24, dtype=dtype))
    want = on_the_cpu(family, *moved((q, k, v, dout), "cpu"), causal=True)
    views = {
        "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "rows far apart": lambda x: x.new_full((*x.shape[:-1], 41), math.nan)[..., :24].copy_(x),
        "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
        "dim first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    }
    for name, view in views.items():
        leaves = [view(x).detach().requires_grad_() for x in (q, k, v)]
        out = fad.attn(*leaves, causal=True, arithmetic=family.on_gpu)
        assert_same(torch.autograd.grad(out, leaves, view(dout)), want, name)


# ---- company ---------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "softcap": 3.0}], ids=str)
def test_n14_alone_in_any_batch_in_any_order(family, dtype, options):
    inputs = moved(tensors(B=7, dtype=dtype))
    whole = on_the_gpu(family, *inputs, **options)
    for order in (*([b] for b in range(7)), [6, 5, 4, 3, 2, 1, 0], [3, 3, 0, 6], [1, 4]):
        some = on_the_gpu(family, *(x[order] for x in inputs), **options)
        assert_same(some, [x[order] for x in whole], str(order))
    assert_noticed(family, *inputs, **options)


@every_dtype
def test_n14_packed_is_padded_is_alone(family, dtype):
    rows, keys = (70, 0, 3, 100), (130, 9, 65, 200)
    inputs = moved(tensors(B=4, dtype=dtype))
    used = {"seqused_q": int32(*rows), "seqused_k": int32(*keys)}
    padded = on_the_gpu(family, *inputs, causal=True, **used)
    lengths = (rows, keys, keys, rows)
    cut = [torch.cat([x[b, : n[b]] for b in range(4)]) for x, n in zip(inputs, lengths, strict=True)]
    cu = [torch.cat([int32(0), int32(*n).cumsum(0, dtype=torch.int32)]) for n in (rows, keys)]
    together = on_the_gpu(family, *cut, function=packed(*moved(cu)), causal=True)
    for b in range(4):
        one = on_the_gpu(
            family, *(x[b : b + 1, : n[b]] for x, n in zip(inputs, lengths, strict=True)), causal=True
        )  # fmt: skip
        assert_same([x[b : b + 1, : n[b]] for x, n in zip(padded, lengths)], one, f"padded {b}")
        starts = (cu[0][b], cu[1][b], cu[1][b])
        parts = [x[None, at : at + n[b]] for x, at, n in zip(together, starts, lengths)]
        assert_same(parts, one, f"packed {b}")
    assert_noticed(family, *inputs, causal=True)


@every_family
def test_n14_heads_and_later_rows_do_not_matter(family):
    """Some of the heads give their gradients; and the last rows of a sequence cannot reach dq of the first."""
    q, k, v, dout = moved(tensors(B=1, Sq=300, Sk=300, Hq=6, Hk=3, dtype=family.dtype))
    dq, dk, dv = on_the_gpu(family, q, k, v, dout, causal=True)
    for h in range(3):
        at, of = slice(2 * h, 2 * h + 2), slice(h, h + 1)
        part = on_the_gpu(family, q[:, :, at], k[:, :, of], v[:, :, of], dout[:, :, at], causal=True)
        assert_same(part, (dq[:, :, at], dk[:, :, of], dv[:, :, of]), f"kv head {h}")
    for n in (1, 64, 65, 129, 257):
        first = on_the_gpu(family, *(x[:, :n] for x in (q, k, v, dout)), causal=True)
        assert_bits_equal(first[0], dq[:, :n], f"{n} rows")
        assert bits_differ(first[1], dk[:, :n]) > 0


@every_dtype
def test_n14_fifty_runs_also_beside_other_work(family, dtype):
    inputs = moved(tensors(B=2, Sq=300, Sk=300, D=64, Dv=64, dtype=dtype))
    first = on_the_gpu(family, *inputs, causal=True)
    other, noise = torch.cuda.Stream(), torch.randn(1024, 1024, device="cuda")
    for i in range(50):
        if i % 2:
            with torch.cuda.stream(other):
                noise = noise @ noise
        assert_same(on_the_gpu(family, *inputs, causal=True), first, f"run {i}")
    torch.cuda.synchronize()
    assert_noticed(family, *inputs, causal=True)
