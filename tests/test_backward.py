"""The backward: every bit as clause N13 says, close to float64, zero where nothing is seen, and clear refusals."""

import gc
import math
import re

import pytest
import torch
from cases import CASES, DTYPES, Case, normal
from gradients import assert_same, gradients, upstream
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import flash_attn_det as fad
from flash_attn_det import ops, reference_backward
from flash_attn_det.attention import _arguments
from flash_attn_det.reference import attn_backward_reference, attn_oracle
from flash_attn_det.testing import assert_bits_equal

NAN, INF = math.nan, math.inf
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# The reference walks every pair: the few cases with hundreds of rows and keys are for the invariance tests.
SMALL = [case for case in CASES if case.Sq <= 70]
BY_OPTION = [case for case in SMALL if case.name.endswith((" fp32", " bf16")) and not case.name.startswith("D ")]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def tensors(B=2, Sq=70, Sk=150, Hq=4, Hk=2, D=16, Dv=24, dtype=torch.float32, seed=3):
    shapes = ((B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv))
    return tuple(normal(shape, 10 * seed + i, dtype) for i, shape in enumerate(shapes))


def call_of(case: Case):
    """q, k, v, the keywords of attn, and gradients of out and lse."""
    (q, k, v), keywords = case.inputs()
    compute = ops.compute_dtype(q.dtype)
    return q, k, v, keywords, upstream(q, v), normal((case.B, case.Hq, case.Sq), 902, compute)


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_n13_kernels_equal_the_reference(case):
    q, k, v, keywords, dout, dlse = call_of(case)
    out, lse = fad.attn(q, k, v, **keywords, return_lse=True)
    want = attn_backward_reference(q, k, v, out, lse, dout, dlse, **keywords)
    sinks = keywords.pop("sinks", None)
    assert_same(gradients(q, k, v, dout, dlse, sinks, **keywords), want)


def test_n13_reference_notices_the_order_of_a_sum(monkeypatch):
    """The control of the test above: the same terms in one chain instead of blocks give other bits."""
    q, k, v = tensors(Sq=140)
    out, lse = fad.attn(q, k, v, return_lse=True)
    blocked = attn_backward_reference(q, k, v, out, lse, upstream(q, v))
    in_blocks = reference_backward._block_sums
    one_chain = lambda start, blocks, *rest: in_blocks(start, [[i for b in blocks for i in b]], *rest)  # noqa: E731
    monkeypatch.setattr(reference_backward, "_block_sums", one_chain)
    chained = attn_backward_reference(q, k, v, out, lse, upstream(q, v))
    for a, b in zip(blocked[:3], chained):
        assert not torch.equal(a, b)


# ---- accuracy --------------------------------------------------------------------------------------------------------


def oracle_gradients(q, k, v, dout, dlse, sinks=None, **keywords):
    """Torch's own gradients of dense float64 attention. lse = -inf has none."""
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    if sinks is not None:
        inputs.append(sinks.double().requires_grad_())
        keywords["sinks"] = inputs[3]
    out, lse = attn_oracle(*inputs[:3], **keywords, return_lse=True)
    total = (out * dout.double()).sum() + torch.where(lse > -INF, lse, 0).mul(dlse.double()).sum()
    return torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("case", BY_OPTION, ids=lambda case: case.name)
def test_accuracy_against_float64(case):
    q, k, v, keywords, dout, dlse = call_of(case)
    sinks = keywords.pop("sinks", None)
    got = gradients(q, k, v, dout, dlse, sinks, **keywords)
    want = oracle_gradients(q, k, v, dout, dlse, sinks, **keywords)
    tolerance = 2e-2 if q.dtype == torch.bfloat16 else 1e-5
    for a, b in zip(got, want, strict=True):
        assert b.isfinite().all()
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("S", "D"), [(512, 64), (700, 128)])
def test_error_is_that_of_torch_or_less(S, D, causal):
    """fp32 against float64: at most 1.2 times the root mean square error of torch's own backward."""
    q, k, v = tensors(B=1, Sq=S, Sk=S, Hq=4, Hk=4, D=D, Dv=D)
    dout = upstream(q, v)
    want = oracle_gradients(q, k, v, dout, torch.zeros(1, 4, S), causal=causal)
    heads_first = [x.transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal)
    theirs = [x.transpose(1, 2) for x in torch.autograd.grad(out, heads_first, dout.transpose(1, 2))]
    for a, b, exact in zip(gradients(q, k, v, dout, causal=causal), theirs, want, strict=True):
        errors = [(x.double() - exact).square().mean().sqrt() for x in (a, b)]
        assert errors[0] <= 1.2 * errors[1]


def test_huge_logits():
    """Probabilities are normalised again, so an lse that fp32 rounds to a multiple of 8 does not spoil them."""
    q, k, v = tensors(B=1, Sq=6, Sk=9, Hq=1, Hk=1, D=4, Dv=4)
    q = q * 3e7
    dout = upstream(q, v)
    got = gradients(q, k, v, dout, scale=1.0)
    want = oracle_gradients(q, k, v, dout, torch.zeros(1, 1, 6), scale=1.0)
    assert (got[2].double() - want[2]).abs().max() < 1e-5


OPTIONS = {
    "plain": {},
    "causal window": {"causal": True, "window": (5, -1)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.3], dtype=torch.float64), "causal": True},
    "lengths": {"seqused_q": int32(3, 0), "seqused_k": int32(4, 7), "leftpad_k": int32(2, 0)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    q, k, v = tensors(Sq=5, Sk=9, Hq=2, Hk=1, D=3, Dv=4, dtype=torch.float64)
    sinks = normal((2,), 5, torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, sinks)]

    def out_and_lse(q, k, v, sinks):
        out, lse = fad.attn(q, k, v, sinks=sinks, **options, return_lse=True)
        return out, torch.where(lse > -INF, lse, 0)

    assert gradcheck(out_and_lse, inputs)


def test_gradcheck_packed():
    q, k, v = (x[0].requires_grad_() for x in tensors(Sq=7, Sk=12, Hq=2, Hk=1, D=3, Dv=2, dtype=torch.float64))
    cu_q, cu_k = int32(0, 3, 3, 6), int32(0, 5, 7, 11)
    assert gradcheck(lambda *qkv: fad.attn_varlen(*qkv, cu_q, cu_k, causal=True), (q, k, v))


# ---- nothing seen, and what must not be seen -------------------------------------------------------------------------


@every_dtype
def test_n10_rows_and_keys_without_a_partner_have_zero_gradients(dtype):
    q, k, v = tensors(B=3, Sq=9, Sk=20, dtype=dtype)
    used = {"seqused_q": int32(9, 4, 9), "seqused_k": int32(3, 7, 0), "leftpad_k": int32(2, 5, 0)}
    dq, dk, dv = gradients(q, k, v, causal=True, **used)
    assert not dq[0, :6].any()  # these rows stand before the first key
    assert dq[0, 7:].any()  # row 6 sees one key, whose probability is 1 whatever q is
    assert not dq[1, 4:].any()
    assert not dq[2].any()
    for x in (dk, dv):
        assert not x[0, :2].any()
        assert not x[0, 5:].any()
        assert x[0, 2:5].any()
        assert not x[1, 12:].any()
        assert not x[2].any()


@pytest.mark.parametrize("empty", [{"B": 0}, {"Sq": 0}, {"Sk": 0}], ids=["batch", "rows", "keys"])
def test_empty_shapes(empty):
    q, k, v = tensors(**empty)
    sinks = normal((4,), 6)
    for x, like in zip(gradients(q, k, v, sinks=sinks), (q, k, v, sinks), strict=True):
        assert x.shape == like.shape
        assert not x.any()


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_n11_n14_poison_reaches_only_what_sees_it(dtype, poison):
    """A row's q and dO, and a key's k and v: under a window, each changes its own neighbourhood and nothing else."""
    q, k, v = tensors(Sq=150, Sk=150, dtype=dtype)
    dout = upstream(q, v)
    options = {"causal": True, "window": (3, -1)}
    clean = gradients(q, k, v, dout, **options)
    at = 70  # row 70 sees keys 67 .. 70; key 70 is seen by rows 70 .. 73
    rows_and_keys = torch.arange(150)
    for name, target in (("q", q), ("dout", dout), ("k", k), ("v", v)):
        spoiled = target.clone()
        spoiled[0, at] = poison
        changed = {"q": q, "k": k, "v": v, "dout": dout, name: spoiled}
        got = gradients(**changed, **options)
        by_row = name in ("q", "dout")
        reached = (rows_and_keys == at) if by_row else (rows_and_keys >= at) & (rows_and_keys <= at + 3)
        keys_reached = (rows_and_keys >= at - 3) & (rows_and_keys <= (at if by_row else at + 3))
        for part, a, b, here in zip("qkv", got, clean, (reached, keys_reached, keys_reached), strict=True):
            assert_bits_equal(a[1], b[1], f"other sequence, d{part}, {name}")
            assert_bits_equal(a[0, ~here], b[0, ~here], f"d{part}, {name}")
        assert not got[0][0, at].isfinite().all()


def test_n11_unused_rows_may_hold_anything():
    q, k, v = tensors(Sq=20, Sk=30)
    used = {"seqused_q": int32(20, 11), "seqused_k": int32(8, 30), "leftpad_k": int32(7, 0)}
    dout = upstream(q, v)
    clean = gradients(q, k, v, dout, causal=True, **used)
    q[1, 11:] = dout[1, 11:] = NAN
    k[0, :7] = v[0, :7] = k[0, 15:] = v[0, 15:] = NAN
    assert_same(gradients(q, k, v, dout, causal=True, **used), clean)


# ---- autograd --------------------------------------------------------------------------------------------------------


@every_dtype
def test_opcheck(dtype):
    q, k, v = (x.requires_grad_() for x in tensors(Sq=5, dtype=dtype))
    sinks = normal((4,), 8, ops.compute_dtype(dtype)).requires_grad_()
    keywords = dict(causal=True, scale=None, window=(-1, -1), softcap=3.0, alibi_slopes=None, sinks=sinks)
    arguments = _arguments(q, k, v, **keywords, split_size=128, arithmetic="auto", differentiable=True)
    torch.library.opcheck(ops.fwd, arguments)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    out, lse = ops.fwd(*arguments)
    torch.library.opcheck(ops.bwd, (*arguments[:13], torch.ones_like(out), out, lse, lse, *arguments[13:]))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "sinks", "qv"])
def test_only_some_inputs_require_grad(wanted):
    q, k, v = tensors()
    inputs = {"q": q, "k": k, "v": v, "sinks": normal((4,), 8)}
    want = dict(zip(inputs, gradients(**inputs, causal=True), strict=True))
    names = [name for name in inputs if name in wanted or name == wanted]
    for name in names:
        inputs[name] = inputs[name].clone().requires_grad_()
    out = fad.attn(**inputs, causal=True)
    got = torch.autograd.grad(out, [inputs[name] for name in names], upstream(q, v))
    for name, gradient in zip(names, got, strict=True):
        assert_bits_equal(gradient, want[name])


def test_gradient_of_lse_alone():
    q, k, v = (x.requires_grad_() for x in tensors(Sq=8))
    _, lse = fad.attn(q, k, v, return_lse=True)
    got = torch.autograd.grad(lse.sum(), (q, k))
    want = oracle_gradients(*(x.detach() for x in (q, k, v)), torch.zeros(2, 8, 4, 24), torch.ones_like(lse))
    for a, b in zip(got, want):
        assert (a.double() - b).abs().max() < 1e-5


def test_upstream_gradients_of_any_strides():
    q, k, v = tensors()
    dout = upstream(q, v)
    spread = torch.full((*dout.shape, 2), NAN)[..., 0].copy_(dout)
    head_first = dout.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (spread, head_first):
        assert_same(gradients(q, k, v, other), gradients(q, k, v, dout))
    ones = torch.ones(1).expand_as(dout)  # what out.sum() hands back
    assert_same(gradients(q, k, v, ones), gradients(q, k, v, ones.contiguous()))


def test_strides_of_the_inputs_do_not_matter():
    q, k, v = tensors()
    want = gradients(q, k, v, causal=True)
    leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    out = fad.attn(*(x.transpose(1, 2) for x in leaves), causal=True)
    got = torch.autograd.grad(out, leaves, upstream(q, v))
    assert_same([x.transpose(1, 2) for x in got], want)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_gives_the_same_bits(dynamic):
    q, k, v = tensors()
    want = gradients(q, k, v, causal=True, softcap=4.0)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(
        lambda *qkv: fad.attn(*qkv, causal=True, softcap=4.0), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    assert_same(torch.autograd.grad(compiled(*leaves), leaves, upstream(q, v)), want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_gives_the_same_bits(reentrant):
    q, k, v = tensors()
    want = gradients(q, k, v, causal=True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = checkpoint(lambda *qkv: fad.attn(*qkv, causal=True), *leaves, use_reentrant=reentrant)
    out.backward(upstream(q, v))
    assert_same([x.grad for x in leaves], want)


def test_under_use_deterministic_algorithms():
    q, k, v = tensors()
    want = gradients(q, k, v)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(gradients(q, k, v), want)
    finally:
        torch.use_deterministic_algorithms(False)


def test_results_do_not_require_grad_without_need():
    q, k, v = tensors()
    with torch.no_grad():
        assert not fad.attn(q.clone().requires_grad_(), k, v).requires_grad
    assert not fad.attn(q, k, v).requires_grad
    assert fad.attn(q, k.clone().requires_grad_(), v).requires_grad


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_no_second_derivatives():
    small = tensors(B=1, Sq=2, Sk=2, Hq=1, Hk=1, D=2, Dv=2, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in small)
    with pytest.raises(NotImplementedError, match=re.escape(ops.NO_SECOND_BACKWARD)):
        gradgradcheck(fad.attn, (q, k, v))


def test_slopes_have_no_gradient():
    q, k, v = tensors()
    with pytest.raises(NotImplementedError, match="no gradient of alibi_slopes"):
        fad.attn(q, k, v, alibi_slopes=torch.ones(4, requires_grad=True))
    assert_same(
        gradients(q, k, v, alibi_slopes=torch.ones(4, requires_grad=True).detach()),
        gradients(q, k, v, alibi_slopes=torch.ones(4)),
    )


def test_a_cpu_without_tensor_cores_has_no_backward_of_them():
    """Only of their emulation: tests/test_emulator_backward.py."""
    q, k, v = tensors(dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="flash_attn_det has no backward yet, but q requires grad"):
        fad.attn(q.requires_grad_(), k, v, arithmetic="mma")


def test_caches_have_no_backward():
    q, k, v = tensors(Sk=160)
    pages = [x.reshape(20, 16, 2, -1) for x in (k, v)]
    table = torch.arange(20, dtype=torch.int32).view(2, 10)
    keywords = dict(block_table=table, seqused_k=int32(160, 160))
    with pytest.raises(NotImplementedError, match="flash_attn_det has no backward yet, but k requires grad"):
        fad.attn_varlen(q.flatten(0, 1), pages[0].requires_grad_(), pages[1], int32(0, 70, 140), **keywords)


def backward_arguments(**changed):
    q, k, v = tensors(Sq=5)
    keywords = dict(causal=True, scale=None, window=(-1, -1), softcap=0.0, alibi_slopes=None, sinks=None)
    arguments = _arguments(q, k, v, **keywords, split_size=128, arithmetic="auto")
    out, lse = ops.fwd(*arguments)
    saved = {"dout": out, "out": out, "lse": lse, "dlse": lse, **changed}
    return (*arguments[:13], *saved.values(), *arguments[13:])


BAD_SAVED = [
    ("dout has another dtype than q", {"dout": torch.zeros(2, 5, 4, 24, dtype=torch.float64)}),
    ("dout has 3 dimensions, expected 4", {"dout": torch.zeros(5, 4, 24)}),
    ("dout has 5 rows, 4 heads and head dim 23, expected the shape of out", {"dout": torch.zeros(2, 5, 4, 23)}),
    ("out has 4 rows, 4 heads and head dim 24, expected the shape of out", {"out": torch.zeros(2, 4, 4, 24)}),
    ("lse has the wrong dtype", {"lse": torch.zeros(2, 4, 5, dtype=torch.float64)}),
    ("lse has 2 dimensions, expected 3", {"lse": torch.zeros(4, 5)}),
    ("dlse has 4 heads and 6 rows, expected the shape of lse: 4 and 5", {"dlse": torch.zeros(2, 4, 6)}),
]


@pytest.mark.parametrize(("message", "changed"), BAD_SAVED, ids=[message[:40] for message, _ in BAD_SAVED])
def test_what_the_op_itself_refuses(message, changed):
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.call(ops.bwd, *backward_arguments(**changed))
    ops.call(ops.bwd, *backward_arguments())


def test_no_tensor_leaks():
    """The shim owns its arguments, on success and on a refusal."""
    arguments, bad = backward_arguments(), backward_arguments(dlse=torch.zeros(2, 4, 6))
    tensors = [x for x in (*arguments, *bad) if isinstance(x, torch.Tensor)]

    def references():
        gc.collect()
        return [torch._C._storage_Use_Count(x.untyped_storage()._cdata) for x in tensors]

    before = references()
    for _ in range(5):
        ops.bwd(*arguments)
        with pytest.raises(RuntimeError, match="dlse has"):
            ops.bwd(*bad)
    assert references() == before
