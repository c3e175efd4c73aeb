"""sdpa: torch's signature and answers, attn's bits, and which masks it takes."""

import inspect

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import flash_attn_det as fad
from flash_attn_det.testing import assert_bits_equal, bits_differ

B, HQ, HK, D, DV = 3, 4, 2, 24, 40
SPLIT = 128  # short enough that several splits are folded
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-14}


def inputs(Sq=300, Sk=300, dtype=torch.float32):
    """query, key, value as a projection leaves them: [B, H, S, D] views of [B, S, H, D]."""
    g = torch.Generator().manual_seed(11)
    shapes = ((B, Sq, HQ, D), (B, Sk, HK, D), (B, Sk, HK, DV))
    return [torch.randn(shape, generator=g).to(dtype).transpose(1, 2) for shape in shapes]


def ours(q, k, v, *args, **options):
    return fad.sdpa(q, k, v, *args, enable_gqa=True, split_size=SPLIT, **options)


def attn(q, k, v, **options):
    out = fad.attn(*(x.transpose(1, 2) for x in (q, k, v)), split_size=SPLIT, **options)
    return out.transpose(1, 2)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_signature_is_that_of_torch():
    """torch's is built in: its documented signature, and ours behind it by keyword only."""
    documented = torch_sdpa.__doc__.split("scaled_dot_product_attention(")[1].split(")")[0]
    theirs = [word.split("=")[0].strip() for word in documented.split(",")]
    parameters = inspect.signature(fad.sdpa).parameters
    positional = [name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == theirs
    assert {name: parameters[name].default for name in positional[3:]} == {
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    }


# ---------------------------------------------------------------------------------------------------------------------
# without a mask


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_no_mask(dtype):
    qkv = inputs(70, 300, dtype)
    out = ours(*qkv, scale=0.3)
    assert_bits_equal(out, attn(*qkv, scale=0.3))
    want = torch_sdpa(*(x.double() for x in qkv), scale=0.3, enable_gqa=True)
    assert (out.double() - want).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize(("Sq", "Sk"), [(300, 300), (70, 300), (300, 70), (1, 300), (300, 1), (129, 128)])
def test_is_causal_is_aligned_to_the_first_key(Sq, Sk):
    qkv = inputs(Sq, Sk)
    out = ours(*qkv, is_causal=True)
    assert (out - torch_sdpa(*qkv, is_causal=True, enable_gqa=True)).abs().max() < TOLERANCE[torch.float32]
    n = min(Sq, Sk)
    q, k, v = qkv
    assert_bits_equal(out[:, :, :n], attn(q[:, :, :n], k[:, :, :n], v[:, :, :n], causal=True))
    assert_bits_equal(out[:, :, n:], attn(q[:, :, n:], k, v))
    if Sq != Sk and (Sq, Sk) != (300, 1):
        assert bits_differ(attn(*qkv, causal=True), out) > 0, "these shapes would not notice the alignment"
    mask = torch.ones(Sq, Sk, dtype=torch.bool).tril()
    assert_bits_equal(ours(*qkv, mask), out, "the same mask, written out")


@pytest.mark.parametrize("layout", ["heads last", "contiguous", "qkv in one tensor"])
def test_nothing_is_copied(layout):
    query, key, value = inputs(Sk=300)
    if layout == "contiguous":
        query, key, value = (x.contiguous() for x in (query, key, value))
    if layout == "qkv in one tensor":
        query, key, value = torch.randn(B, 300, 3, HQ, D).permute(2, 0, 3, 1, 4)
    seen = []
    with fad.ops.observed_by(lambda arguments, results: seen.extend(arguments[:3])):
        mask = torch.ones(B, 1, 1, 300, dtype=torch.bool)
        mask[0, :, :, :17] = False
        ours(query, key, value)
        ours(query, key, value, is_causal=True)
        ours(query, key, value, mask)
    pointers = [x.data_ptr() for x in (query, key, value)]
    assert [x.data_ptr() for x in seen] == 3 * pointers


# ---------------------------------------------------------------------------------------------------------------------
# masks: n keys of each sequence, after `pad` slots that hold none

COUNTS = (300, 65, 129)
PADS = {"right": (0, 0, 0), "left": (0, 235, 171), "both": (0, 100, 40)}


def key_padding(side, Sk=300):
    mask = torch.zeros(B, Sk, dtype=torch.bool)
    for b, (pad, n) in enumerate(zip(PADS[side], COUNTS)):
        mask[b, pad : pad + n] = True
    return mask


def poisoned(x, mask):
    """Keys or values whose padding is NaN."""
    return x.masked_fill(~mask[:, None, :, None], torch.nan)


@pytest.mark.parametrize("side", PADS)
def test_key_padding(side):
    q, k, v = inputs(70, 300)
    mask = key_padding(side)
    pad, count = ints(*PADS[side]), ints(*COUNTS)
    want = attn(q, k, v, leftpad_k=pad, seqused_k=count)
    expected = torch_sdpa(q, k, v, mask[:, None, None, :], enable_gqa=True)
    assert (want - expected).abs().max() < TOLERANCE[torch.float32]
    additive = torch.where(mask, 0.0, -torch.inf)[:, None, None, :]
    forms = {
        "[B, 1, 1, Sk]": mask[:, None, None, :],
        "[B, 1, Sq, Sk]": mask[:, None, None, :].repeat(1, 1, 70, 1),
        "[B, Hq, Sq, Sk]": mask[:, None, None, :].repeat(1, HQ, 70, 1),
        "additive": additive,
        "additive, expanded": additive.expand(-1, HQ, 70, -1),
    }
    for name, form in forms.items():
        assert_bits_equal(ours(q, k, v, form), want, name)
        assert_bits_equal(ours(q, poisoned(k, mask), poisoned(v, mask), form), want, f"{name}, NaN in the padding")
    assert bits_differ(ours(q, k, v), want) > 0, "these inputs would not notice a mask that is ignored"


def test_keys_left_out_anywhere():
    q, k, v = inputs(70, 300)
    mask = torch.rand(B, 300, generator=torch.Generator().manual_seed(12)) < 0.4
    out = ours(q, k, v, mask[:, None, None, :])
    for b in range(B):
        kept = [x[b : b + 1, :, mask[b]] for x in (k, v)]
        assert_bits_equal(out[b : b + 1], attn(q[b : b + 1], *kept), f"sequence {b}, the keys left out not there")
    assert (out - torch_sdpa(q, k, v, mask[:, None, None, :], enable_gqa=True)).abs().max() < 2e-6


@pytest.mark.parametrize("rows", ["all", "those that are no padding"])
@pytest.mark.parametrize("first", [0, 40])
@pytest.mark.parametrize("side", PADS)
def test_causal_with_padding(side, first, rows):
    """Rows stand at slots first .. first + Sq - 1 of a buffer of 300. Behind the last key they see all keys."""
    n_rows = 300 - first - 20
    q, k, v = inputs(n_rows, 300)
    keys = key_padding(side)
    slot = torch.arange(first, first + n_rows)
    mask = (torch.arange(300) <= slot[:, None]) & keys[:, None, :]
    if rows != "all":
        mask &= keys[:, slot, None]
    out = ours(q, poisoned(k, keys), poisoned(v, keys), mask[:, None])
    expected = torch_sdpa(q, k, v, mask[:, None], enable_gqa=True)
    assert (out - expected).abs().max() < TOLERANCE[torch.float32]
    for b in range(B):
        for i in (0, 1, n_rows // 3, n_rows // 2, n_rows - 2, n_rows - 1):
            row = q[b : b + 1, :, i : i + 1]
            alone = attn(row, *(x[b : b + 1, :, mask[b, i]] for x in (k, v)), causal=True)
            assert_bits_equal(out[b : b + 1, :, i : i + 1], alone, f"sequence {b}, row {i} alone")
    assert bits_differ(out, ours(q, k, v)) > 0


def test_a_row_of_padding_gives_zero():
    q, k, v = inputs(9, 9)
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[3] = False
    out = ours(q, k, v, mask)
    assert not out[:, :, 3].any()
    assert_bits_equal(out[:, :, 4:], attn(q[:, :, 4:], k, v))


@pytest.mark.parametrize(("Sq", "Sk"), [(0, 9), (9, 0), (0, 0)])
def test_no_rows_or_no_keys(Sq, Sk):
    out = ours(*inputs(Sq, Sk), torch.ones(Sq, Sk, dtype=torch.bool))
    assert out.shape == (B, HQ, Sq, DV)
    assert not out.any()
    assert_bits_equal(ours(*inputs(Sq, Sk), is_causal=True), out)


def test_a_sequence_alone_has_the_bits_it_has_in_a_batch():
    q, k, v = inputs()
    mask = ((torch.arange(300) <= torch.arange(300)[:, None]) & key_padding("both")[:, None, :])[:, None]
    together, control_differing = ours(q, k, v, mask), 0
    for b, (pad, n) in enumerate(zip(PADS["both"], COUNTS)):
        there = slice(pad, pad + n)
        alone = [x[b : b + 1, :, there] for x in (q, k, v)]
        assert_bits_equal(together[b : b + 1, :, there], ours(*alone, is_causal=True), f"sequence {b}")
        others = fad.sdpa(*alone, is_causal=True, enable_gqa=True, split_size=2 * SPLIT)
        control_differing += bits_differ(together[b : b + 1, :, there], others)
    assert control_differing > 0, "other splits did not differ either: these inputs prove nothing"


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


def causal_with_a_hole():
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[:, 4] = False
    return mask


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_p": 0.1}, NotImplementedError, r"dropout_p is 0\.1: flash_attn_det has no dropout"),
        ({"attn_mask": torch.ones(9, 9).bool(), "is_causal": True}, ValueError, "expected one of them"),
        ({"attn_mask": [1]}, TypeError, "attn_mask must be a .*Tensor or None, got list"),
        ({"attn_mask": torch.ones(9, 9, device="meta").bool()}, ValueError, "attn_mask is on meta, query is on cpu"),
        ({"attn_mask": torch.ones(9, 9, dtype=torch.int32)}, TypeError, "attn_mask has dtype torch.int32"),
        ({"attn_mask": torch.ones(B, 9).bool()}, ValueError, r"shape \[3, 9\], expected one that expands"),
        ({"attn_mask": torch.eye(9).bool()}, NotImplementedError, "not full or causal attention with padding"),
        ({"attn_mask": torch.ones(9, 9).triu().bool()}, NotImplementedError, "not full or causal"),
        ({"attn_mask": torch.full((9, 9), -0.5)}, NotImplementedError, "no other biases"),
        ({"attn_mask": torch.full((9, 9), -1e9)}, NotImplementedError, "only 0 and -inf"),
        ({"attn_mask": causal_with_a_hole()}, NotImplementedError, "leaves out keys between others"),
        (
            {"attn_mask": torch.rand(B, HQ, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.5},
            NotImplementedError,
            "same for all heads",
        ),
        ({"enable_gqa": False}, ValueError, "query has 4 heads, key has 2: pass enable_gqa=True"),
    ],
)
def test_refused(options, error, message):
    with pytest.raises(error, match=message):
        fad.sdpa(*inputs(9, 9), **{"enable_gqa": True, **options})


def test_other_ranks_are_refused():
    with pytest.raises(ValueError, match=r"query has 3 dimensions, expected 4: \[batch, heads, rows, head_dim\]"):
        fad.sdpa(*(torch.zeros(2, 9, 8) for _ in range(3)))
    with pytest.raises(TypeError, match=r"key must be a torch\.Tensor, got list"):
        fad.sdpa(torch.zeros(1, 1, 9, 8), [1], torch.zeros(1, 1, 9, 8))


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


def test_compiled():
    torch._dynamo.reset()
    q, k, v = inputs(70, 300)
    mask = key_padding("left")[:, None, None, :]
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_bits_equal(compiled(q, k, v), ours(q, k, v))
    assert_bits_equal(compiled(q, k, v, is_causal=True), ours(q, k, v, is_causal=True))
    assert_bits_equal(compiled(q, k, v, mask), ours(q, k, v, mask))


# ---------------------------------------------------------------------------------------------------------------------
# gradients

KEPT = torch.arange(300) < torch.tensor([300, 120, 7])[:, None]  # keys of each sequence, [B, Sk]
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "key padding": {"attn_mask": KEPT[:, None, None, :].expand(B, 1, 300, 300)},
    "causal with padding": {"attn_mask": KEPT[:, None, None, :] & torch.ones(300, 300, dtype=torch.bool).tril()},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_gradients_are_those_of_torch(options):
    """Causal with padding takes two calls of attn for one result."""
    dout = inputs()[0].new_ones(B, HQ, 300, DV).cumsum(-1) / DV
    results = []
    for function in (fad.sdpa, torch_sdpa):
        leaves = [x.clone().requires_grad_() for x in inputs()]
        out = function(*leaves, **options, enable_gqa=True)
        results.append(torch.autograd.grad(out, leaves, dout))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 3e-6 * b.abs().max()
