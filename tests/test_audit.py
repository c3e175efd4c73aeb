"""Audits: rows of a result computed again, alone, in any layout, with the same bits; and what differs is found."""

from __future__ import annotations

import importlib
import math
import threading

import pytest
import torch
from cases import CASES, DTYPES, LARGE_CASES, integers, normal
from cuda_tools import moved, needs_hopper

import flash_attn_det as fad
from flash_attn_det import _schedule, cli
from flash_attn_det.commands import audit as audit_command
from flash_attn_det.commands import backends
from flash_attn_det.testing import bits_differ

HALF = ("fp16", "bf16")
EMULATED = ("mma_sm90", "mma_sm80")
ALL = 10**9  # rows: every one

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def families(case) -> tuple[str, ...]:
    return ("fma", *EMULATED) if case.dtype in HALF else ("fma",)


def computed(qkv, options, **keywords):
    """The arguments of an audit, after a call that gave out and lse."""
    out, lse = fad.attn(*qkv, **options, **keywords, return_lse=True)
    return (*qkv, out, lse), options | keywords


# ---- a right result is found right -----------------------------------------------------------------------------------


@by_name
def test_n1_a_row_is_computed_from_what_it_sees(case):
    """Every mask, option, length and shape, every row of out and lse, in each family that the dtype has."""
    for arithmetic in families(case):
        arguments, options = computed(*case.inputs(), arithmetic=arithmetic)
        report = fad.audit(*arguments, **options, rows=ALL)
        assert report.ok, report
        q, out = arguments[0], arguments[3]
        assert report.rows == report.rows_of_call == q[..., 0].numel()
        assert report.elements == out.numel() + report.rows
        assert report.arithmetic == arithmetic
        assert report.verified == (arithmetic != "mma_sm80")


def packed(lengths_q, lengths_k, dtype, unused=0):
    """q, k, v and both cu_seqlens; ``unused`` rows lie behind the last sequence."""
    cu_q, cu_k = (torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    shapes = (int(cu_q[-1]) + unused, 4, 40), (int(cu_k[-1]) + unused, 2, 40), (int(cu_k[-1]) + unused, 2, 24)
    return [normal(shape, i, DTYPES[dtype]) for i, shape in enumerate(shapes)], (cu_q, cu_k)


@pytest.mark.parametrize("dtype", ["fp32", *HALF])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (30, 7)},
        {"causal": True, "alibi_slopes": normal((4, 4), 5) / 8, "sinks": normal((4,), 6)},
        {"seqused_q": integers(4, 0, 1, 7), "seqused_k": integers(4, 0, 2, 8), "k_pos": integers(4, 0, 300, 9)},
    ],
    ids=["causal", "window", "alibi sinks", "lengths"],
)
def test_n1_packed_rows_are_computed_from_what_they_see(options, dtype):
    for arithmetic in ("fma",) if dtype == "fp32" else ("fma", *EMULATED):
        qkv, cu_seqlens = packed((5, 0, 70, 1), (260, 2, 140, 400), dtype, unused=3)
        keywords = dict(options, split_size=128, arithmetic=arithmetic)
        out, lse = fad.attn_varlen(*qkv, *cu_seqlens, **keywords, return_lse=True)
        places = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens))
        report = fad.audit(*qkv, out, lse, **places, **keywords, rows=ALL)
        assert report.ok, report
        assert report.rows == 79 * 4


@pytest.mark.parametrize("dtype", HALF)
def test_n1_other_batches_and_schedules_pass(dtype):
    """The result comes from one call a sequence, cut and scheduled otherwise; the audit is of the batch."""
    q, k, v = (
        normal((5, rows, heads, 32), i, DTYPES[dtype]) for i, (rows, heads) in enumerate([(9, 4), (600, 2), (600, 2)])
    )
    options = {"causal": True, "split_size": 256, "arithmetic": "mma_sm90"}
    for tile_rows, split_parallel in ((1, True), (7, False)):
        with _schedule.forced(tile_rows=tile_rows, split_parallel=split_parallel):
            parts = [fad.attn(q[b : b + 1], k[b : b + 1], v[b : b + 1], return_lse=True, **options) for b in range(5)]
        out, lse = (torch.cat(x) for x in zip(*parts))
        assert fad.audit(q, k, v, out, lse, rows=ALL, **options).ok


def test_strides_and_gradients_are_no_matter():
    q, k, v = (normal((2, 4, 60, 16), i).transpose(1, 2) for i in range(3))
    options = {"causal": True, "sinks": normal((4,), 4), "alibi_slopes": normal((4,), 5)}
    out, lse = fad.attn(q, k, v, **options, return_lse=True)
    for x in (q, k, v, options["sinks"], options["alibi_slopes"]):
        x.requires_grad_()
    report = fad.audit(q, k, v, out.transpose(1, 2).clone().transpose(1, 2), lse.requires_grad_(), **options)
    assert report.ok
    assert report.rows == 2 * 60 * 4


def test_inference_tensors_are_no_matter():
    with torch.inference_mode(), fad.audited(1) as summary:
        q = normal((2, 5, 2, 16), 1).clone()
        out = fad.attn(q, q, q, sinks=q[0, 0, :, 0])
        assert fad.audit(q, q, q, out, sinks=q[0, 0, :, 0]).ok
    assert fad.audit(q, q, q, out, sinks=q[0, 0, :, 0]).ok
    assert (summary.audits, summary.ok) == (1, True)


def test_out_alone_can_be_audited():
    q, k, v = (normal((1, 9, 2, 16), i) for i in range(3))
    report = fad.audit(q, k, v, fad.attn(q, k, v))
    assert report.ok
    assert report.elements == 9 * 2 * 16


# ---- a wrong one is found wrong --------------------------------------------------------------------------------------


def flipped(x, index, bit=0):
    """A copy with one bit of an element, or of several, flipped."""
    bits = x.clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    bits[index] ^= 1 << bit
    return bits.view(x.dtype)


@pytest.fixture(scope="module", params=[("bf16", "mma_sm90"), ("fp16", "mma_sm80"), ("fp32", "fma")], ids=str)
def call(request):
    dtype, arithmetic = request.param
    qkv = [
        normal((2, rows, heads, 24), i, DTYPES[dtype]) for i, (rows, heads) in enumerate([(20, 4), (300, 2), (300, 2)])
    ]
    return computed(qkv, dict(causal=True, split_size=128, arithmetic=arithmetic))


@pytest.mark.parametrize(
    ("which", "index", "text"),
    [(3, (1, 7, 2, 5), r"out\[1, 7, 2, 5\]"), (4, (1, 2, 7), r"lse\[1, 2, 7\]")],
    ids=["out", "lse"],
)
def test_a_flipped_bit_is_named(call, which, index, text):
    arguments, options = list(call[0]), call[1]
    right = arguments[which]
    arguments[which] = flipped(right, index)
    report = fad.audit(*arguments, **options, rows=ALL)
    assert (report.ok, report.differing, report.differing_rows) == (False, 1, 1)
    first = report.first
    assert (first.tensor, first.coordinate) == ("out" if which == 3 else "lse", index)
    assert first.bits == first.expected_bits ^ 1
    assert (first.value, first.expected) == (arguments[which][index].item(), right[index].item())
    with pytest.raises(
        fad.AuditError, match=rf"1 elements in 1 rows differ, first {text} is .* \(0x[0-9a-f]+\), expected"
    ):
        report.check()


@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
def test_a_flipped_bit_of_the_inputs_is_found(call, which):
    """As if a GPU had read something else. What notices of k and v: causal rows from the key on, of one group."""
    arguments, options = list(call[0]), call[1]
    index = (1, 7, 2, 5) if which == 0 else (1, 290, 1, 5)
    arguments[which] = flipped(arguments[which], index, 8 * arguments[which].element_size() - 1)  # the sign
    report = fad.audit(*arguments, **options, rows=ALL)
    assert not report.ok
    assert report.first.coordinate[0] == 1
    noticing = 1 if which == 0 else 2 * sum(280 + i >= 290 for i in range(20))
    assert 0.8 * noticing <= report.differing_rows <= noticing


@pytest.mark.parametrize(("state", "index"), [(0, (1, 1, 7, 2, 5)), (1, (1, 1, 2, 7)), (2, (1, 1, 2, 7))], ids="oml")
def test_a_flipped_bit_of_a_partial_state_is_found(call, state, index):
    """As if it went wrong on its way from one kernel to the next: the second split's, which every row sees."""
    (q, k, v, *_), options = call
    partials = fad.attn_partials(q, k, v, **options)
    result = fad.merge_partials(partials, return_lse=True)
    assert fad.audit(q, k, v, *result, **options, rows=ALL).ok
    partials = partials._replace(**{partials._fields[state]: flipped(partials[state], index, 23)})
    report = fad.audit(q, k, v, *fad.merge_partials(partials, return_lse=True), **options, rows=ALL)
    assert (report.ok, report.differing_rows) == (False, 1)
    assert report.first.coordinate[:3] == (1, 7, 2)


def test_a_flipped_bit_is_found_at_the_rate_of_the_sample(call):
    """16 of 160 rows a time find one wrong row in one audit of ten: in 200, a binomial of mean 20 and deviation 4.2."""
    arguments, options = list(call[0]), call[1]
    arguments[4] = flipped(arguments[4], (0, 3, 19))
    found = sum(not fad.audit(*arguments, **options, rows=16, seed=seed).ok for seed in range(200))
    assert abs(found - 20) < 4 * 4.25


def test_another_arithmetic_differs(call):
    """The control of all that passes: what is computed here depends on the family and on the splits."""
    arguments, options = call
    other = {"fma": {"split_size": 256}}.get(options["arithmetic"], {"arithmetic": "fma"})
    assert not fad.audit(*arguments, **options | other).ok


def test_a_sample_depends_on_the_seed_alone(call):
    arguments, options = list(call[0]), call[1]
    arguments[3] = torch.zeros_like(arguments[3])
    firsts = [fad.audit(*arguments, **options, rows=3, seed=seed).first for seed in (0, 0, 1, 2, 3)]
    assert firsts[0] == firsts[1]
    assert len(set(firsts)) > 2


# ---- refusals --------------------------------------------------------------------------------------------------------

X = torch.ones(1, 3, 2, 8, dtype=torch.float16)
OUT = fad.attn(X, X, X)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "out must be a torch.Tensor, got NoneType", {"out": None}),
        (TypeError, "out has dtype torch.float32, expected torch.float16", {"out": OUT.float()}),
        (ValueError, r"out has shape \[1, 3, 2, 4\], expected \[1, 3, 2, 8\]", {"out": OUT[..., :4]}),
        (TypeError, "lse has dtype torch.float16, expected torch.float32", {"lse": OUT}),
        (ValueError, r"lse has shape \[1, 3, 2\], expected \[1, 2, 3\]", {"lse": torch.zeros(1, 3, 2)}),
        (ValueError, "rows is 0, expected at least 1", {"rows": 0}),
        (TypeError, "rows must be an int, got float", {"rows": 0.5}),
        (ValueError, "arithmetic is 'mma' but out is on the CPU: name the GPU's, 'mma_sm90'", {"arithmetic": "mma"}),
        (ValueError, "arithmetic is 'sm_90', expected one of 'auto', 'fma'", {"arithmetic": "sm_90"}),
        (ValueError, r"v \[1, 3, 2, 8\] are not those of one call", {"k": X.expand(2, -1, -1, -1)}),
        (ValueError, r"sinks has shape \[3\], expected \[2\]", {"sinks": torch.ones(3)}),
        (ValueError, "only one of cu_seqlens_q and cu_seqlens_k", {"cu_seqlens_q": torch.zeros(2, dtype=torch.int32)}),
        (ValueError, "split_size is 129, expected a positive multiple of 128", {"split_size": 129}),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(error, message, change):
    with pytest.raises(error, match=message):
        fad.audit(**{"q": X, "k": X, "v": X, "out": OUT, **change})


@pytest.mark.parametrize(
    ("capability", "dtype", "name", "expected"),
    [
        ((9, 0), torch.float16, "auto", "mma_sm90"),
        ((9, 0), torch.bfloat16, "mma", "mma_sm90"),
        ((8, 9), torch.float16, "auto", "mma_sm80"),
        ((9, 0), torch.float32, "auto", "fma"),
        ((9, 0), torch.float16, "fma", "fma"),
        ((10, 0), torch.float32, "auto", "fma"),
        ((10, 0), torch.float16, "auto", NotImplementedError),
    ],
)
def test_the_device_says_which_arithmetic(monkeypatch, capability, dtype, name, expected):
    class Result:
        device = torch.device("cuda")

    Result.dtype = dtype
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    arithmetic_of = importlib.import_module("flash_attn_det.audit")._arithmetic_of  # the name is the function's, too
    if isinstance(expected, str):
        assert arithmetic_of(name, Result) == expected
    else:
        with pytest.raises(expected, match=r"compute capability 10\.0, expected 9\.0 or 8\.x"):
            arithmetic_of(name, Result)


# ---- audited ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch):
    """While ["broken"] is true, calls of several rows give a wrong bit in each. Audits compute single rows."""

    def fwd(*arguments):
        out, lse = right(*arguments)
        return (flipped(out, (..., 0)), lse) if switch["broken"] and arguments[0].shape[1] > 1 else (out, lse)

    right, switch = fad.ops.fwd, {"broken": False}
    monkeypatch.setattr(fad.ops, "fwd", fwd)
    return switch


def attend(batch=2):
    q, k, v = (normal((batch, 5, 2, 16), i, torch.bfloat16) for i in range(3))
    return fad.attn(q, k, v, arithmetic="mma_sm90")


def test_audited_looks_at_a_share_of_the_calls():
    with fad.audited(0.25, seed=1) as report:
        for _ in range(200):
            attend()
    attend()
    assert report.ok
    assert report.calls == 200
    assert abs(report.audits - 50) < 4 * math.sqrt(200 * 0.25 * 0.75)
    assert report.rows == report.audits * 20
    assert str(report).startswith(f"audited {report.audits} of 200 calls: all bits equal (")


def test_audited_sees_every_form_of_call():
    q, k, v = (normal((2, 5, 2, 16), i, torch.bfloat16) for i in range(3))
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    with fad.audited(1) as report:
        fad.attn(q, k, v, causal=True)
        fad.attn_varlen(q[0], k[0], v[0], offsets, offsets)
        fad.flash_attn_func(q, k, v, causal=True)
        fad.attn_partials(q, k, v)  # has no out
    assert (report.calls, report.audits, report.ok) == (3, 3, True)


def test_audited_raises_or_warns(broken):
    with fad.audited(1) as report:
        attend()
        broken["broken"] = True
        with pytest.raises(fad.AuditError, match=r"first out\[0, 0, 0, 0\]"):
            attend()
    assert (report.calls, report.audits, report.differing, report.ok) == (2, 2, 20, False)
    with (
        fad.audited(1, on_difference="warn") as report,
        pytest.warns(RuntimeWarning, match="20 elements in 20 rows") as seen,
    ):
        attend()
    assert seen[0].filename.endswith("test_audit.py")
    assert "20 elements in 1 calls differ" in str(report)
    attend()  # outside, nothing is looked at


def test_audited_blocks_nest_and_end():
    with fad.audited(1) as outer:
        with fad.audited(1) as inner:
            attend()
        attend()
        q = normal((1, 3, 1, 8), 1)
        assert fad.audit(q, q, q, fad.attn(q, q, q)).ok  # its own calls are not counted
    assert (inner.calls, outer.calls) == (1, 3)
    with pytest.raises(KeyError), fad.audited(1):
        raise KeyError
    assert fad.ops.observers() == ()


def test_audited_is_of_one_thread():
    with fad.audited(1) as report:
        thread = threading.Thread(target=attend)
        thread.start()
        thread.join()
    assert report.calls == 0


def test_audited_does_not_see_compiled_calls():
    compiled = torch.compile(lambda q: fad.attn(q, q, q), backend="eager", fullgraph=True)
    q = normal((1, 3, 1, 8), 1)
    with fad.audited(1) as report:
        out = compiled(q)
    assert bits_differ(out, fad.attn(q, q, q)) == 0
    assert report.calls == 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"share": 1.5}, "share is 1.5, expected 0 to 1"),
        ({"on_difference": "log"}, "on_difference is 'log', expected 'raise' or 'warn'"),
        ({"rows": 0}, "rows is 0, expected at least 1"),
    ],
)
def test_audited_refuses(keywords, message):
    with pytest.raises(ValueError, match=message), fad.audited(**keywords):
        pass


# ---- flash-attn-det audit --------------------------------------------------------------------------------------------


def test_command_passes(capsys):
    assert cli.main(["audit", "--device", "cpu", "--rows", "20", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" pass ") == 14
    assert "20 of 4,904" in printed
    assert printed.endswith("Everything passed.\n")


def test_command_fails_where_bits_differ(broken, capsys):
    broken["broken"] = True
    assert cli.main(["audit", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED decode" not in printed  # only calls of several rows are broken
    assert "FAILED prefill, float32, fma: audit: 1000 elements in 1000 rows differ, first out[0, " in printed
    assert printed.endswith("Something FAILED.\n")


def test_command_fails_where_the_inputs_prove_nothing(monkeypatch, capsys):
    same = backends.Setting("one split", torch.float32, 1, 64)
    monkeypatch.setattr(audit_command, "workload", lambda device: [(same, "fma")])
    assert cli.main(["audit", "--device", "cpu"]) == 1
    assert "FAILED one split, fma: other roundings give the same bits" in capsys.readouterr().out


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@needs_hopper
@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES], ids=lambda case: case.name)
def test_n1_n7_the_cpu_repeats_the_gpu(case):
    if case.dtype == "fp64":
        pytest.skip("needs kernels for float64, which GPUs do not have here")
    qkv, options = case.inputs()
    options = moved(options)
    for arithmetic in ("auto", "fma") if case.dtype in HALF else ("auto",):
        arguments, keywords = computed(moved(qkv), options, arithmetic=arithmetic)
        report = fad.audit(*arguments, **keywords, rows=200)
        assert report.ok, report
        assert report.arithmetic == ("mma_sm90" if arithmetic == "auto" and case.dtype in HALF else "fma")
        on_cpu = moved(arguments, "cpu")
        assert fad.audit(*on_cpu, **moved(keywords, "cpu") | {"arithmetic": report.arithmetic}, rows=20).ok


@needs_hopper
def test_audited_leaves_captured_calls_alone():
    q = normal((1, 70, 2, 64), 1, torch.bfloat16).cuda()
    fad.attn(q, q, q)
    graph = torch.cuda.CUDAGraph()
    with fad.audited(1) as report, torch.cuda.graph(graph):
        fad.attn(q, q, q)
    assert (report.calls, report.captured, report.audits) == (1, 1, 0)
