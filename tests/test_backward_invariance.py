"""N14: the gradients of a sequence are the same bits alone and in any company, for every schedule.

Each test also shows that its inputs can tell: the same sums in another order, or torch's own backward, differ.
"""

import pytest
import torch
from cases import normal
from gradients import assert_same, differing, gradients, upstream

import flash_attn_det as fad
from flash_attn_det import _schedule
from flash_attn_det.testing import assert_bits_equal, bits_differ

fp32_and_bf16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def tensors(B=1, Sq=100, Sk=200, Hq=4, Hk=2, D=16, Dv=24, dtype=torch.float32, seed=4):
    shapes = ((B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv))
    return tuple(normal(shape, 10 * seed + i, dtype) for i, shape in enumerate(shapes))


def assert_noticed(q, k, v, dout=None, **keywords):
    """The negative control: dk and dv of the rows in two calls, added, are sums of the same terms in another order; and
    one row fewer of dO makes other gradients of the keys."""
    dout = upstream(q, v) if dout is None else dout
    whole = gradients(q, k, v, dout, **keywords)
    first, rest = dout.clone(), dout.clone()
    first[:, dout.shape[1] // 3 :] = 0
    rest[:, : dout.shape[1] // 3] = 0
    halves = [gradients(q, k, v, part, **keywords) for part in (first, rest)]
    assert differing([a + b for a, b in zip(*halves)][1:3], whole[1:3]) > 0
    assert differing(halves[1][1:3], whole[1:3]) > 0


def alone(b, q, k, v, dout, **keywords):
    return gradients(*(x[b : b + 1] for x in (q, k, v, dout)), **keywords)


# ---- company ---------------------------------------------------------------------------------------------------------


@fp32_and_bf16
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "softcap": 3.0}], ids=str)
def test_n14_alone_in_any_batch_in_any_order(dtype, options):
    q, k, v = tensors(B=7, dtype=dtype)
    dout = upstream(q, v)
    whole = gradients(q, k, v, dout, **options)
    for b in range(7):
        assert_same(alone(b, q, k, v, dout, **options), [x[b : b + 1] for x in whole], f"sequence {b}")
    for order in ([6, 5, 4, 3, 2, 1, 0], [3, 3, 0, 6], [1, 4]):
        some = gradients(q[order], k[order], v[order], dout[order], **options)
        assert_same(some, [x[order] for x in whole], str(order))
    assert_noticed(q, k, v, dout, **options)


def test_n14_neighbours_of_any_values_and_lengths():
    q, k, v = tensors(B=3)
    dout = upstream(q, v)
    want = alone(0, q, k, v, dout, causal=True)
    for lengths in (int32(200, 0, 1), int32(200, 200, 77)):
        got = gradients(
            q * torch.tensor([1.0, 30.0, -4.0]).view(3, 1, 1, 1), k, v, dout, causal=True, seqused_k=lengths
        )
        assert_same([x[:1] for x in got], want)
    assert_noticed(q, k, v, dout, causal=True)


@fp32_and_bf16
def test_n14_packed_is_padded_is_alone(dtype):
    rows, keys = (70, 0, 3, 100), (130, 9, 65, 200)
    q, k, v = tensors(B=4, dtype=dtype)
    dout = upstream(q, v)
    starts = [keys_max - n for keys_max, n in zip((200,) * 4, keys)]
    dense_right = gradients(q, k, v, dout, causal=True, seqused_q=int32(*rows), seqused_k=int32(*keys))
    cut = [torch.cat([x[b, : n[b]] for b in range(4)]) for x, n in ((q, rows), (k, keys), (v, keys), (dout, rows))]
    cu_q, cu_k = (int32(0, *torch.tensor(n).cumsum(0).tolist()) for n in (rows, keys))
    packed = gradients(*cut, function=lambda *qkv, **options: fad.attn_varlen(*qkv, cu_q, cu_k, **options), causal=True)
    left_k, left_v = (torch.full_like(x, torch.nan) for x in (k, v))
    for b, (start, n) in enumerate(zip(starts, keys)):
        left_k[b, start:], left_v[b, start:] = k[b, :n], v[b, :n]
    dense_left = gradients(q, left_k, left_v, dout, causal=True, seqused_q=int32(*rows), leftpad_k=int32(*starts))
    for b in range(4):
        one = gradients(q[b : b + 1, : rows[b]], k[b : b + 1, : keys[b]], v[b : b + 1, : keys[b]],
                        dout[b : b + 1, : rows[b]], causal=True)  # fmt: skip
        one = [x[0] for x in one]
        n = (rows[b], keys[b], keys[b])
        from_q, from_k = int(cu_q[b]), int(cu_k[b])
        assert_same([x[a : a + m] for x, a, m in zip(packed, (from_q, from_k, from_k), n)], one, f"packed {b}")
        assert_same([x[b, :m] for x, m in zip(dense_right, n)], one, f"padded right {b}")
        at = (0, starts[b], starts[b])
        assert_same([x[b, a : a + m] for x, a, m in zip(dense_left, at, n)], one, f"padded left {b}")
    assert_noticed(q, k, v, dout, causal=True)


def test_n14_heads_of_the_call_do_not_matter():
    q, k, v = tensors(B=2, Hq=6, Hk=3)
    dout = upstream(q, v)
    dq, dk, dv = gradients(q, k, v, dout, causal=True)
    for h in range(3):
        at = slice(2 * h, 2 * h + 2)
        part = gradients(q[:, :, at], k[:, :, h : h + 1], v[:, :, h : h + 1], dout[:, :, at], causal=True)
        assert_same(part, (dq[:, :, at], dk[:, :, h : h + 1], dv[:, :, h : h + 1]), f"kv head {h}")
    assert_noticed(q, k, v, dout, causal=True)


def test_n14_dq_of_rows_in_several_calls():
    """A row's dq does not depend on other rows; dk and dv are those of the rows of the call."""
    q, k, v = tensors(Sq=200)
    dout = upstream(q, v)
    whole = gradients(q, k, v, dout, causal=True)
    for cut in (1, 64, 130):
        late = gradients(q[:, cut:], k, v, dout[:, cut:], causal=True)
        early = gradients(q[:, :cut], k[:, :cut], v[:, :cut], dout[:, :cut], causal=True)
        assert_bits_equal(torch.cat([early[0], late[0]], 1), whole[0], f"dq cut at {cut}")
        assert bits_differ(late[1], whole[1]) > 0


def test_n2_n14_first_position_moves_blocks_and_nothing_else():
    """The blocks of N3 lie at absolute positions: keys from position 64 on are summed as those from 0 on."""
    q, k, v = tensors(Sk=150)
    want = gradients(q, k, v, causal=True)
    assert_same(gradients(q, k, v, causal=True, k_pos=int32(64)), want)
    assert differing(gradients(q, k, v, causal=True, k_pos=int32(30)), want) > 0


def test_n14_sink_gradient_sums_over_sequences_in_order():
    q, k, v = tensors(B=3, Hq=64, D=8, Dv=8)
    sinks, dout = normal((64,), 11), upstream(q, v)
    *_, total = gradients(q, k, v, dout, sinks=sinks)
    each = [gradients(q[b : b + 1], k[b : b + 1], v[b : b + 1], dout[b : b + 1], sinks=sinks)[3] for b in range(3)]
    assert_bits_equal(total, (each[0] + each[1]) + each[2])
    assert bits_differ(each[0] + (each[1] + each[2]), total) > 0


# ---- scheduling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_n14_forced_schedules(dtype):
    """Instruction sets; one pass or two; blocks that are packed together."""
    q, k, v = tensors(Sq=150, Sk=330, Hq=6, D=20, Dv=28, dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    keywords = {"causal": True, "window": (250, -1), "sinks": normal((6,), 3, compute), "softcap": 6.0}
    expected = gradients(q, k, v, **keywords)
    for isa in _schedule.isas() if dtype != torch.float64 else [None]:
        for tile_rows in (1, 65, 130, 256):
            for two_passes in (False, True):
                choice = {"isa": isa, "tile_rows": tile_rows, "split_parallel": two_passes}
                with _schedule.forced(**choice):
                    assert_same(gradients(q, k, v, **keywords), expected, str(choice))
    assert_noticed(q, k, v, **keywords)


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@fp32_and_bf16
def test_n14_thread_counts(dtype, restored_threads):
    long = tensors(Sq=300, Sk=300, Hq=2, Hk=1, dtype=dtype)
    many = tensors(B=9, Sq=30, dtype=dtype)
    results = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        results.append((gradients(*long, causal=True), gradients(*many)))
    for of_long, of_many in results[1:]:
        assert_same(of_long, results[0][0])
        assert_same(of_many, results[0][1])
    assert_noticed(*long, causal=True)


def test_n14_run_to_run():
    q, k, v = tensors(B=2, Sq=300, Sk=300)
    first = gradients(q, k, v, causal=True)
    for _ in range(10):
        assert_same(gradients(q, k, v, causal=True), first)
    assert_noticed(q, k, v, causal=True)


def test_n14_flush_to_zero_of_the_caller_does_not_matter():
    q, k, v = tensors(Sq=20)
    dout = upstream(q, v) * 2.0**-126
    expected = gradients(q, k, v, dout)
    assert all(x.abs().min() < 2.0**-126 for x in expected)  # there is something to flush
    if not torch.set_flush_denormal(True):
        pytest.skip("needs a CPU whose subnormals can be flushed")
    try:
        actual = gradients(q, k, v, dout)
    finally:
        torch.set_flush_denormal(False)
    assert_same(actual, expected)


def test_n14_torch_fails_the_same_comparison():
    """Under a causal mask the last rows cannot reach dq of the first ones. In torch's backward they do."""
    q, k, v = tensors(Sq=300, Sk=300, Hq=2, Hk=2, D=64, Dv=64)
    dout = upstream(q, v)

    def theirs(n):
        leaves = [x[:, :n].transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
        return torch.autograd.grad(out, leaves, dout[:, :n].transpose(1, 2))[0].transpose(1, 2)

    whole = gradients(q, k, v, dout, causal=True)[0], theirs(300)
    torch_differs = 0
    for n in (65, 129, 257):
        assert_bits_equal(gradients(*(x[:, :n] for x in (q, k, v, dout)), causal=True)[0], whole[0][:, :n])
        torch_differs += bits_differ(theirs(n), whole[1][:, :n])
    assert torch_differs > 0
