"""flash_attn_det.testing: what it accepts, what it says, and that it fails when it must."""

import math

import pytest
import torch

import flash_attn_det as fad
from flash_attn_det.testing import assert_bits_equal, bits_differ, check_batch_invariance


def test_equal_bits_pass():
    for x in (torch.tensor([1.0, math.nan, -0.0]), torch.empty(0, 3), torch.tensor([True]), torch.tensor(3 + 4j)):
        assert_bits_equal(x, x.clone())
        assert bits_differ(x, x.clone()) == 0
    x = torch.arange(12.0).reshape(3, 4)
    assert_bits_equal(x.t(), x.t().contiguous())


def test_first_difference_is_named():
    a = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    b = a.clone()
    b[1, 0] += 1
    b[1, 2] = -b[1, 2]
    assert bits_differ(a, b) == 2
    with pytest.raises(AssertionError) as error:
        assert_bits_equal(a, b, "lse")
    assert str(error.value) == (
        "lse: 2 of 6 elements (33.3%) differ, first at [1, 0]: 3.0 (0x4040), expected 4.0 (0x4080)"
    )


def test_bits_are_compared_and_not_values():
    with pytest.raises(AssertionError, match=r"0\.0 \(0x00000000\), expected -0\.0 \(0x80000000\)"):
        assert_bits_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    with pytest.raises(AssertionError, match=r"nan \(0x7fc00000\), expected nan \(0x7fc00001\)"):
        assert_bits_equal(nans[0], nans[1])
    with pytest.raises(AssertionError, match="first at \\[0, 1\\]"):
        assert_bits_equal(torch.tensor([1 + 2j]), torch.tensor([1 + 3j]))


def test_different_shapes_and_dtypes_are_not_equal():
    with pytest.raises(AssertionError, match=r"shape \(2,\) is not \(2, 1\)"):
        assert_bits_equal(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(AssertionError, match=r"dtype torch.float32 is not torch.float64"):
        assert_bits_equal(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(TypeError, match="expected is float"):
        assert_bits_equal(torch.zeros(2), 0.0)


class Encoder(torch.nn.Module):
    """Batch-invariant on purpose: one row at a time. Takes and returns what models do."""

    def __init__(self, leak=0.0):
        super().__init__()
        self.leak = leak

    def forward(self, x, mask=None):
        hidden = torch.stack([(row @ row.t()).sin() for row in x]) + self.leak * x.sum()
        if mask is not None:
            hidden = hidden * mask[:, None]
        return {"hidden": hidden, "pooled": (hidden.amax(1), None)}


def batch(n=5):
    torch.manual_seed(0)
    return {"x": torch.randn(n, 4, 6), "mask": torch.ones(n, 4)}


def test_modules_and_mappings():
    report = check_batch_invariance(Encoder().eval(), batch(), control=Encoder(leak=1.0).eval())
    assert [name for name, _ in report.outputs] == ["out.hidden", "out.pooled[0]"]
    assert report.outputs[0][1] == (5, 4, 4)
    names = {check.name for check in report.checks}
    assert {"again", "ones", "one and the rest", "halves", "twos", "reversed"} <= names
    for check in report.checks:
        assert sorted(i for piece in check.pieces for i in piece) == [0, 1, 2, 3, 4]
    assert report.control_differing > 0
    assert "batch of 5, bits equal under" in str(report)
    assert "elements differ" in str(report)


def test_positions_and_shared_keywords():
    q = torch.randn(3, 2, 4, 16)
    k = torch.randn(3, 70, 2, 16)
    report = check_batch_invariance(fad.attn, (q, k, k), causal=True, return_lse=True)
    assert [name for name, _ in report.outputs] == ["out[0]", "out[1]"]
    assert report.control_differing is None
    lengths = torch.tensor([70, 1, 33], dtype=torch.int32)
    check_batch_invariance(fad.attn, {"q": q, "k": k, "v": k, "seqused_k": lengths, "sinks": None}, causal=True)


def test_a_batch_of_one_is_run_again():
    report = check_batch_invariance(Encoder().eval(), batch(1))
    assert [check.name for check in report.checks] == ["again"]


def test_a_leak_between_rows_is_found():
    message = r"cut 'ones', rows \[0\] of 5 is not batch-invariant in row 0: out.hidden: "
    with pytest.raises(AssertionError, match=message):
        check_batch_invariance(Encoder(leak=1.0).eval(), batch())


def test_state_between_calls_is_found():
    calls = []

    def forgetful(x):
        calls.append(0)
        return x + len(calls)

    with pytest.raises(AssertionError, match="cut 'again'"):
        check_batch_invariance(forgetful, (torch.zeros(2, 3),))


def test_a_tame_control_is_refused():
    with pytest.raises(AssertionError, match="the control gave equal bits"):
        check_batch_invariance(Encoder().eval(), batch(), control=Encoder().eval())


def test_gradients_are_off():
    seen = []
    check_batch_invariance(lambda x: seen.append(torch.is_grad_enabled()) or x, (torch.zeros(2, 1),))
    assert seen
    assert not any(seen)


@pytest.mark.parametrize(
    ("fn", "inputs", "error", "message"),
    [
        (Encoder(), batch(), ValueError, "training mode"),
        (Encoder().eval(), {"x": torch.zeros(3, 4, 6), "mask": torch.zeros(2, 4)}, ValueError, "common batch size"),
        (Encoder().eval(), {"x": torch.zeros(0, 4, 6)}, ValueError, "common batch size"),
        (Encoder().eval(), {"x": torch.tensor(1.0)}, ValueError, "x is not a tensor with a batch dimension"),
        (Encoder().eval(), (torch.zeros(3, 4, 6), 7), ValueError, r"inputs\[1\] is not a tensor"),
        (Encoder().eval(), (), ValueError, "common batch size"),
        (lambda x: x.sum(), (torch.zeros(3),), ValueError, "first dimension is not the batch"),
        (lambda x: None, (torch.zeros(3),), TypeError, "returned no tensor"),
        (lambda x: "text", (torch.zeros(3),), TypeError, "out is str"),
    ],
)
def test_bad_input(fn, inputs, error, message):
    with pytest.raises(error, match=message):
        check_batch_invariance(fn, inputs)
