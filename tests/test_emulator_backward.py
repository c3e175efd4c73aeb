"""The backward of tensor cores emulated on the CPU: ``arithmetic="mma_sm90"`` and ``"mma_sm80"`` (N13, N14, N11).

Its bits against an oracle written from the contract's text, one row at a time against vectors, close to float64; the
same alone and in any company, for every schedule. Each test shows that its inputs can tell.
"""

import math

import mma_oracle
import numpy as np
import pytest
import torch
from cases import CASES, Case, normal
from gradients import assert_same, differing, gradients, upstream
from test_backward import oracle_gradients
from test_emulator import strange

import flash_attn_det as fad
from flash_attn_det import ops
from flash_attn_det._schedule import forced, isas
from flash_attn_det.testing import assert_bits_equal, bits_differ

NAN, INF = math.nan, math.inf
EMULATED = ("mma_sm90", "mma_sm80")
SMALL = [case for case in CASES if case.dtype in ("fp16", "bf16") and case.Sq <= 70]
BY_OPTION = [case for case in SMALL if not case.name.startswith(("D ", "Sq "))]

emulated = pytest.mark.parametrize("arithmetic", EMULATED)
both = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
every_isa = pytest.mark.parametrize("isa", isas())


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def tensors(B=1, Sq=100, Sk=200, Hq=4, Hk=2, D=24, Dv=40, dtype=torch.bfloat16, seed=4):
    shapes = ((B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv))
    return tuple(normal(shape, 10 * seed + i, dtype) for i, shape in enumerate(shapes))


def sm90(q, k, v, dout=None, dlse=None, sinks=None, **keywords):
    return gradients(q, k, v, dout, dlse, sinks, **{"arithmetic": "mma_sm90", **keywords})


def call_of(case: Case):
    """q, k, v, dout, dlse, sinks, and the other keywords of attn."""
    (q, k, v), keywords = case.inputs()
    sinks = keywords.pop("sinks", None)
    return (q, k, v, upstream(q, v), normal((case.B, case.Hq, case.Sq), 902), sinks), keywords


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ex2(native):
    return lambda x: torch.from_numpy(np.asarray(native.ex2(x.numpy()), np.float32).reshape(x.shape))


def of_oracle(ex2, q, k, v, dout, dlse=None, sinks=None, **keywords):
    out, lse = fad.attn(q, k, v, sinks=sinks, **keywords, arithmetic="mma_sm90", return_lse=True)
    return mma_oracle.attn_backward(q, k, v, out, lse, dout, dlse, exp2=ex2, sinks=sinks, **keywords)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_n13_equals_the_oracle(ex2, case):
    arguments, keywords = call_of(case)
    assert_same(sm90(*arguments, **keywords), of_oracle(ex2, *arguments, **keywords))


def test_n13_oracle_notices_each_rule(ex2, monkeypatch):
    """The control of the test above: each rule taken another way gives other bits."""
    q, k, v = tensors(Sq=70, Sk=100, Hq=8, Hk=4, D=64, Dv=64, dtype=torch.float16)
    dout = upstream(q, v)

    def gradients_with(name, value):
        with monkeypatch.context() as patch:
            if name:
                patch.setattr(mma_oracle, name, value)
            return of_oracle(ex2, q, k, v, dout)

    right = gradients_with(None, None)
    assert_same(sm90(q, k, v, dout), right)

    def one_lane(out, dout, dlse):
        delta = torch.zeros(out.shape[:-1])
        for d in range(out.shape[-1]):
            delta = mma_oracle.steps._fma(dout[..., d], out[..., d], delta)
        return delta

    chain_over, pairs = mma_oracle._chain_over, mma_oracle._pairs

    def from_zero(weights, values, acc, skip, dtype):
        part = chain_over(weights, values, np.zeros_like(acc), skip, dtype)
        return (acc.astype(np.float32) + part.astype(np.float32)).astype(np.float64)

    def moved(weights, values, acc, skip, dtype):
        return chain_over(weights, values, acc, skip + 8, dtype)

    def descending(weights, values, acc, skip, dtype):
        return chain_over(weights.flip(-1), values[:, ::-1], acc, skip, dtype)

    def not_rounded(seq, saved, exp2):
        p, ds, *rest = pairs(seq, saved, exp2)
        return (p, torch.nextafter(ds, 2 * ds), *rest)

    everything = {"dq", "dk", "dv"}
    for name, value, reached in (
        ("delta_of", one_lane, {"dq", "dk"}),
        ("_chain_over", from_zero, {"dk", "dv"}),
        ("_chain_over", moved, everything),
        ("_chain_over", descending, everything),
        ("_pairs", not_rounded, {"dq", "dk"}),
    ):
        wrong = gradients_with(name, value)
        told = {part for part, a, b in zip(("dq", "dk", "dv"), wrong, right) if bits_differ(a, b)}
        assert told == reached, (name, value.__name__)


def under_every_schedule(*arguments, **keywords):
    """Gradients one row at a time, and then of every instruction set and schedule of vectors."""
    with forced(isa="scalar"):
        results = [gradients(*arguments, **keywords)]
    for isa in isas():
        for tile_rows, two_passes in ((None, False), (64, True), (256, True)):
            with forced(isa=isa, tile_rows=tile_rows, split_parallel=two_passes):
                results.append(gradients(*arguments, **keywords))
    return results


@emulated
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_n13_vectors_equal_one_row_at_a_time(case, arithmetic):
    arguments, keywords = call_of(case)
    expected, *others = under_every_schedule(*arguments, **keywords, arithmetic=arithmetic)
    for other in others:
        assert_same(other, expected)


@emulated
@both
@pytest.mark.parametrize("kind", ["any bits", "not finite", "large", "tiny", "small", "huge"])
@pytest.mark.parametrize("where", ["q", "k", "v", "o", "qkvo"])
def test_n11_n13_vectors_equal_one_row_at_a_time_for_strange_numbers(where, kind, dtype, arithmetic):
    """o: the gradient of out."""
    shapes = dict(q=(1, 70, 4, 40), k=(1, 90, 2, 40), v=(1, 90, 2, 24), o=(1, 70, 4, 24))
    arguments = [
        strange(shape, kind, dtype, 100 * i) if key in where else normal(shape, i, dtype)
        for i, (key, shape) in enumerate(shapes.items())
    ]
    options = dict(causal=True, window=(30, -1), sinks=normal((4,), 9), arithmetic=arithmetic)
    expected, *others = under_every_schedule(*arguments, **options)
    for other in others:
        assert_same(other, expected)


@both
def test_n13_families_and_generations_differ(dtype):
    """The control of all comparisons here. Sums that differ in fp32 seldom do in 16 bits: there are many of them."""
    inputs = tensors(Sq=200, Hq=8, Hk=8, D=128, Dv=128, dtype=dtype)
    results = [gradients(*inputs, arithmetic=arithmetic) for arithmetic in ("fma", *EMULATED)]
    for i, a in enumerate(results):
        for b in results[i + 1 :]:
            for part in range(3):
                assert bits_differ(a[part], b[part]) > 0


# ---- accuracy --------------------------------------------------------------------------------------------------------


def rms(x):
    return x.double().square().mean().sqrt()


@emulated
@pytest.mark.parametrize("case", BY_OPTION, ids=lambda case: case.name)
def test_accuracy_against_float64(case, arithmetic):
    """P and dS are rounded to the input type, and so are gradients: errors of a few units in the last place."""
    arguments, keywords = call_of(case)
    got = gradients(*arguments, **keywords, arithmetic=arithmetic)
    q, k, v, dout, dlse, sinks = arguments
    want = oracle_gradients(q, k, v, dout, dlse, sinks, **keywords)
    tolerance = 4 * torch.finfo(q.dtype).eps
    for a, b in zip(got, want, strict=True):
        assert b.isfinite().all()
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


@emulated
@both
@pytest.mark.parametrize("causal", [False, True])
def test_error_is_that_of_rounding_p_and_ds(causal, dtype, arithmetic):
    """At most 1.2 times the root mean square error of float64 gradients with P, dS and out rounded to 16 bits."""
    q, k, v = tensors(Sq=200, Sk=200, D=64, Dv=64, Hq=2, Hk=2, dtype=dtype)
    dout = upstream(q, v)
    want = oracle_gradients(q, k, v, dout, torch.zeros(1, 2, 200), causal=causal)
    wide = [x.double().transpose(1, 2) for x in (q, k, v, dout)]
    s = wide[0] @ wide[1].transpose(2, 3) / 8
    if causal:
        s = s.masked_fill(torch.ones(200, 200).triu(1).bool(), -INF)
    p = s.softmax(-1)
    delta = ((p @ wide[2]).to(dtype).double() * wide[3]).sum(-1, keepdim=True)
    ds = (p * (wide[3] @ wide[2].transpose(2, 3) - delta)).to(dtype).double()
    p = p.to(dtype).double()
    rounded = (ds @ wide[1] / 8, ds.transpose(2, 3) @ wide[0] / 8, p.transpose(2, 3) @ wide[3])
    for a, b, exact in zip(gradients(q, k, v, dout, causal=causal, arithmetic=arithmetic), rounded, want, strict=True):
        b = b.to(dtype).transpose(1, 2)
        assert 0 < rms(a - exact) <= 1.2 * rms(b - exact)


# ---- what must not be seen -------------------------------------------------------------------------------------------


@every_isa
@both
@pytest.mark.parametrize("poison", [NAN, INF])
def test_n11_n14_poison_reaches_only_what_sees_it(dtype, poison, isa):
    """A row's q and dO, and a key's k and v: under a window, each changes its own neighbourhood and nothing else."""
    q, k, v = tensors(B=2, Sq=70, Sk=70, dtype=dtype)
    dout, at, every = upstream(q, v), 37, torch.arange(70)
    options = {"causal": True, "window": (3, -1)}
    with forced(isa=isa):
        clean = sm90(q, k, v, dout, **options)
        for name, target in (("q", q), ("dout", dout), ("k", k), ("v", v)):
            spoiled = target.clone()
            spoiled[0, at] = poison
            got = sm90(**{"q": q, "k": k, "v": v, "dout": dout, name: spoiled}, **options)
            by_row = name in ("q", "dout")
            reached = (every == at) if by_row else (every >= at) & (every <= at + 3)
            keys_reached = (every >= at - 3) & (every <= (at if by_row else at + 3))
            for part, a, b, here in zip("qkv", got, clean, (reached, keys_reached, keys_reached), strict=True):
                assert_bits_equal(a[1], b[1], f"other sequence, d{part}, {name}")
                assert_bits_equal(a[0, ~here], b[0, ~here], f"d{part}, {name}")
            assert not got[0][0, at].isfinite().all()


@every_isa
def test_n10_n11_rows_without_a_term_reach_nothing(isa):
    """Rows that saw no key, by their lse, amid rows that did; and rows and keys that are not in use."""
    q, k, v = tensors(B=2, Sq=40, Sk=30)
    used = {"seqused_q": int32(40, 31), "seqused_k": int32(8, 30), "leftpad_k": int32(7, 0)}
    dout = upstream(q, v)
    with forced(isa=isa):
        clean = sm90(q, k, v, dout, causal=True, **used)
        assert not clean[0][0, :32].any()  # these rows stand before the first key
        q[0, :32] = dout[0, :32] = q[1, 31:] = dout[1, 31:] = NAN
        k[0, :7] = v[0, :7] = k[0, 15:] = v[0, 15:] = NAN
        assert_same(sm90(q, k, v, dout, causal=True, **used), clean)
        q[0, 33] = dout[0, 33] = NAN  # the control: this row sees two keys
        assert sm90(q, k, v, dout, causal=True, **used)[1][0].isnan().any()


@every_isa
@both
def test_n13_saved_lse_of_minus_infinity_is_no_term(dtype, isa):
    """The backward goes by the lse that it is given, also amid rows that see the same keys."""
    q, k, v = tensors(Sq=40, Sk=50, Hq=2, Hk=1, dtype=dtype)
    arguments = [q, k, v, *[torch.empty(0, dtype=torch.int32)] * 8, *[torch.empty(0)] * 2]
    numbers = [0.2, False, -1, -1, 0.0, 1024, 3]
    out, lse = fad.attn(q, k, v, scale=0.2, split_size=1024, arithmetic="mma_sm90", return_lse=True)
    none = lse.clone()
    none[:, :, [5, 17, 18]] = -INF
    spoiled, no_dout, dout = q.clone(), upstream(q, v), upstream(q, v)
    spoiled[:, [5, 17, 18]] = no_dout[:, [5, 17, 18]] = NAN

    def backward(q, dout, lse):
        return ops.bwd(q, *arguments[1:], dout, out, lse, torch.empty(0), *numbers)[:3]

    with forced(isa=isa):
        want = backward(q, dout, none)
        assert not want[0][:, [5, 17, 18]].any()
        assert_same(backward(spoiled, no_dout, none), want)
        for other, same in zip(backward(q, dout, lse), want):
            assert bits_differ(other, same) > 0


# ---- N14 -------------------------------------------------------------------------------------------------------------


def assert_noticed(q, k, v, dout, **keywords):
    """The negative control: dk and dv of the rows in two calls, added, are sums of the same terms in another order; and
    fewer rows of dO make other gradients of the keys."""
    whole = sm90(q, k, v, dout, **keywords)
    first, rest = dout.clone(), dout.clone()
    first[:, dout.shape[1] // 3 :] = 0
    rest[:, : dout.shape[1] // 3] = 0
    halves = [sm90(q, k, v, part, **keywords) for part in (first, rest)]
    assert differing([a + b for a, b in zip(*halves)][1:3], whole[1:3]) > 0
    assert differing(halves[1][1:3], whole[1:3]) > 0


@every_isa
@both
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}], ids=["plain", "causal softcap"])
def test_n14_alone_in_any_batch_in_any_order(options, dtype, isa):
    q, k, v = tensors(B=4, Sq=70, Sk=90, dtype=dtype)
    dout = upstream(q, v)
    with forced(isa=isa):
        whole = sm90(q, k, v, dout, **options)
        for b in range(4):
            alone = sm90(*(x[b : b + 1] for x in (q, k, v, dout)), **options)
            assert_same(alone, [x[b : b + 1] for x in whole], f"sequence {b}")
        for order in ([3, 2, 1, 0], [3, 3, 0]):
            some = sm90(q[order], k[order], v[order], dout[order], **options)
            assert_same(some, [x[order] for x in whole], str(order))
        for lengths in (int32(90, 0, 1, 90), int32(90, 77, 90, 16)):
            assert_same([x[:1] for x in sm90(q, k, v, dout, seqused_k=lengths, **options)], [x[:1] for x in whole])
        assert_noticed(q, k, v, dout, **options)


@every_isa
def test_n14_packed_is_padded_is_alone(isa):
    rows, keys = (37, 0, 3, 70), (90, 9, 65, 75)
    q, k, v = tensors(B=4, Sq=70, Sk=90)
    dout = upstream(q, v)
    cut = [torch.cat([x[b, : n[b]] for b in range(4)]) for x, n in ((q, rows), (k, keys), (v, keys), (dout, rows))]
    cu_q, cu_k = (int32(0, *np.cumsum(n).tolist()) for n in (rows, keys))
    starts = [90 - n for n in keys]
    left_k, left_v = (torch.full_like(x, NAN) for x in (k, v))
    for b, (start, n) in enumerate(zip(starts, keys)):
        left_k[b, start:], left_v[b, start:] = k[b, :n], v[b, :n]
    with forced(isa=isa):
        right = sm90(q, k, v, dout, causal=True, seqused_q=int32(*rows), seqused_k=int32(*keys))
        left = sm90(q, left_k, left_v, dout, causal=True, seqused_q=int32(*rows), leftpad_k=int32(*starts))
        packed = sm90(*cut, function=lambda *qkv, **o: fad.attn_varlen(*qkv, cu_q, cu_k, **o), causal=True)
        for b in range(4):
            n, first = (rows[b], keys[b], keys[b]), [int(cu_q[b]), int(cu_k[b]), int(cu_k[b])]
            one = [x[b : b + 1, :m] for x, m in zip((q, k, v, dout), (*n, rows[b]))]
            one = [x[0] for x in sm90(*one, causal=True)]
            assert_same([x[a : a + m] for x, a, m in zip(packed, first, n)], one, f"packed {b}")
            assert_same([x[b, :m] for x, m in zip(right, n)], one, f"padded right {b}")
            at = (0, starts[b], starts[b])
            assert_same([x[b, a : a + m] for x, a, m in zip(left, at, n)], one, f"padded left {b}")
        assert_noticed(q, k, v, dout, causal=True)


def test_n14_heads_of_the_call_do_not_matter():
    q, k, v = tensors(B=2, Hq=6, Hk=3)
    dout = upstream(q, v)
    dq, dk, dv = sm90(q, k, v, dout, causal=True)
    for h in range(3):
        at = slice(2 * h, 2 * h + 2)
        part = sm90(q[:, :, at], k[:, :, h : h + 1], v[:, :, h : h + 1], dout[:, :, at], causal=True)
        assert_same(part, (dq[:, :, at], dk[:, :, h : h + 1], dv[:, :, h : h + 1]), f"kv head {h}")
    swapped = [1, 0, 2, 3, 4, 5]  # the control: heads of one group in another order make another chain
    other = sm90(q[:, :, swapped], k, v, dout[:, :, swapped], causal=True)
    assert_bits_equal(other[0], dq[:, :, swapped])
    assert bits_differ(other[1][:, :, 0], dk[:, :, 0]) > 0
    assert_bits_equal(other[1][:, :, 1:], dk[:, :, 1:])


def test_n14_dq_of_rows_in_several_calls():
    """A row's dq does not depend on other rows; dk and dv are those of the rows of the call."""
    q, k, v = tensors(Sq=200)
    dout = upstream(q, v)
    whole = sm90(q, k, v, dout, causal=True)
    for cut in (1, 64, 130):
        late = sm90(q[:, cut:], k, v, dout[:, cut:], causal=True)
        early = sm90(q[:, :cut], k[:, :cut], v[:, :cut], dout[:, :cut], causal=True)
        assert_bits_equal(torch.cat([early[0], late[0]], 1), whole[0], f"dq cut at {cut}")
        assert differing(late[1:], whole[1:]) > 0


def test_n2_n13_steps_lie_at_absolute_positions():
    """Keys from a multiple of 16 on make the steps of dq that keys from 0 on make, if out and lse are the same."""
    q, k, v = tensors(Sq=150, Sk=200, Hq=8, D=128, dtype=torch.float16)
    want = sm90(q, k, v, causal=True)
    assert_same(sm90(q, k, v, causal=True, k_pos=int32(128)), want)
    other = sm90(q, k, v, causal=True, k_pos=int32(136))
    assert bits_differ(other[0], want[0]) > 0


def test_n14_sink_gradient_sums_over_sequences_in_order():
    q, k, v = tensors(B=3, Sq=70, Sk=20, Hq=64, D=8, Dv=8)
    sinks, dout = normal((64,), 11), upstream(q, v)
    *_, total = sm90(q, k, v, dout, sinks=sinks)
    each = [sm90(*(x[b : b + 1] for x in (q, k, v, dout)), sinks=sinks)[3] for b in range(3)]
    assert_bits_equal(total, (each[0] + each[1]) + each[2])
    assert bits_differ(each[0] + (each[1] + each[2]), total) > 0


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_isa
@emulated
def test_n14_thread_counts(arithmetic, isa, restored_threads):
    long, many = tensors(Sq=150, Sk=150, Hq=2, Hk=1), tensors(B=5, Sq=20, Sk=40)
    results = []
    with forced(isa=isa):
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(
                [gradients(*x, sinks=normal((x[0].shape[2],), 3), arithmetic=arithmetic) for x in (long, many)]
            )
        assert_noticed(*long, upstream(long[0], long[2]))
    for of_long, of_many in results[1:]:
        assert_same(of_long, results[0][0])
        assert_same(of_many, results[0][1])


def test_n14_flush_to_zero_of_the_caller_does_not_matter():
    q, k, v = tensors(Sq=20, Sk=30)
    dout = upstream(q, v) * 2.0**-126
    expected = sm90(q, k, v, dout)
    assert all(x.float().abs().min() < 2.0**-126 for x in expected)  # there is something to flush
    if not torch.set_flush_denormal(True):
        pytest.skip("needs a CPU whose subnormals can be flushed")
    try:
        actual = sm90(q, k, v, dout)
    finally:
        torch.set_flush_denormal(False)
    assert_same(actual, expected)
