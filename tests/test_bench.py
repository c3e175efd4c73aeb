"""flash-attn-det bench on the CPU: its cases, what it measures and writes, and that it times nothing inaccurate."""

from __future__ import annotations

import csv
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_tools import (
    SMALL,
    SMALL_BACKWARD,
    SMALL_DECODE,
)

import flash_attn_det as fad
from flash_attn_det import cli
from flash_attn_det.commands import (
    bench,
    cases,
    gradients,
    machine,
    measure,
    report,
)
from flash_attn_det.reference import attn_oracle
from flash_attn_det.testing import assert_bits_equal


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch):
    """bench with a second's worth of work, on the CPU also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "cpu_cases", lambda quick, full: [SMALL, SMALL_DECODE, SMALL_BACKWARD])
    monkeypatch.setattr(machine, "fma_peak", lambda threads: 1e11)


def test_bench_prints_and_writes_every_figure(short, tmp_path: Path, capsys):
    target = tmp_path / "figures.csv"
    assert cli.main(["bench", "--threads", "1", "2", "--csv", str(target)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(SMALL.name) >= 4  # a line of progress and a line of the table, for each number of threads
    with target.open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["kind"], line["threads"]) for line in lines] == [
        ("prefill", "1"),
        ("decode", "1"),
        ("backward", "1"),
        ("prefill", "2"),
        ("decode", "2"),
        ("backward", "2"),
    ]
    for line in lines:
        assert float(line["ratio"]) == float(line["torch_seconds"]) / float(line["ours_seconds"])
        assert float(line["ceiling"]) > 0


def test_bench_does_not_time_what_is_not_accurate(short, monkeypatch: pytest.MonkeyPatch, capsys):
    attn = fad.attn
    monkeypatch.setattr(fad, "attn", lambda *args, **kwargs: attn(*args, **kwargs) * float("nan"))
    assert cli.main(["bench", "--threads", "1"]) == 1
    printed = capsys.readouterr().out
    for case in (SMALL, SMALL_BACKWARD):
        assert f"{case.name}, 1 threads: NOT ACCURATE, not timed" in printed


class Shrunk(torch.autograd.Function):
    """Its input, with a gradient that is too small."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 0.99


def test_bench_does_not_time_a_backward_that_is_not_accurate(short, monkeypatch: pytest.MonkeyPatch, capsys):
    attn = fad.attn
    monkeypatch.setattr(fad, "attn", lambda *args, **kwargs: Shrunk.apply(attn(*args, **kwargs)))
    assert cli.main(["bench", "--threads", "1"]) == 1
    printed = capsys.readouterr().out
    assert f"{SMALL_BACKWARD.name}, 1 threads: NOT ACCURATE, not timed" in printed
    assert f"{SMALL.name}, 1 threads: ratio" in printed


@pytest.mark.parametrize("causal", [False, True])
def test_exact_gradients_are_those_of_autograd(causal: bool):
    case = replace(SMALL_BACKWARD, causal=causal)
    inputs = case.tensors()
    dout = gradients.upstream(case, inputs[0])
    leaves = [x.double().requires_grad_() for x in inputs]
    out = attn_oracle(*leaves, causal=causal)
    whole = gradients.Gradients(*torch.autograd.grad(out, leaves, dout.double()))
    expected = gradients.exact(case, *inputs, dout)
    assert max(gradients.errors(case, whole, expected)) < 1e-14
    changed = whole._replace(dk=whole.dk * 1.01)
    assert gradients.errors(case, changed, expected) == pytest.approx((0, 0.01, 0), abs=1e-8)
    nothing = whole._replace(dv=whole.dv * float("nan"))
    assert gradients.errors(case, nothing, expected)[2] != gradients.errors(case, nothing, expected)[2]


def test_bar_of_gradients():
    assert gradients.too_far((1.2, 1.0, 0.5), (1.0, 1.0, 1.0)) is None
    assert gradients.too_far((1.0, 1.3, 0.5), (1.0, 1.0, 1.0)).startswith("dk has a relative error of 1.3e+00")
    assert gradients.too_far((1.0, 1.0, float("nan")), (1.0, 1.0, 1.0)).startswith("dv has")


def test_backward_is_timed_without_its_forward():
    calls = []

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        calls.append(qkv)
        return fad.attn(*qkv)

    q, k, v = SMALL_BACKWARD.tensors()
    dout = gradients.upstream(SMALL_BACKWARD, q)
    backward, ours = gradients.backward_of(attend, (q, k, v), dout, False)
    first, second = ours(backward()), ours(backward())
    assert len(calls) == 1
    assert not q.requires_grad
    for a, b in zip(first, second, strict=True):
        assert_bits_equal(a, b)


@pytest.mark.parametrize("heads_first", [False, True])
def test_backward_without_grouped_heads_gets_copies_of_keys(heads_first: bool):
    case = replace(SMALL_BACKWARD, dtype="float32")
    shapes = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shapes.append((q.shape, k.shape, v.shape))
        q, k, v = (x.transpose(1, 2) if heads_first else x for x in (q, k, v))
        out = fad.attn(q, k, v, causal=case.causal)
        return out.transpose(1, 2) if heads_first else out

    inputs = case.tensors()
    dout = gradients.upstream(case, inputs[0])
    call, ours = gradients.backward_of(attend, inputs, dout, heads_first, copies=case.Hq // case.Hk)
    (shape,) = {shape for call_shapes in shapes for shape in call_shapes}
    assert shape == ((case.B, case.Hq, case.Sk, case.D) if heads_first else (case.B, case.Sk, case.Hq, case.D))
    assert [x.shape for x in call()] == [shape] * 3
    found = ours(call())
    assert [x.shape for x in found] == [x.shape for x in inputs]
    assert max(gradients.errors(case, found, gradients.exact(case, *inputs, dout))) < 1e-6


def test_bench_draws(short, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    target = tmp_path / "ratios.png"
    assert cli.main(["bench", "--threads", "1", "--plot", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")


def test_bench_without_matplotlib_says_so_before_measuring(short, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "--plot", "figures.png"]) == 2
    printed = capsys.readouterr()
    assert "pip install 'flash-attn-det[bench]'" in printed.err
    assert printed.out == ""


def test_bench_cases_cover_the_grid():
    full = cases.cpu_cases(quick=False, full=True)
    assert {case.B for case in full} == {1, 8}
    assert {case.Sk for case in full if case.kind == "prefill"} == {512, 2048, 8192}
    assert {case.Sk for case in full if case.kind == "decode"} == {1024, 4096, 16384, 65536}
    assert {(case.dtype, case.D, case.causal) for case in full if case.kind == "prefill"} == {
        (dtype, D, causal) for dtype in ("float32", "bfloat16") for D in (64, 128) for causal in (False, True)
    }
    assert {(case.dtype, case.D, case.causal) for case in full if case.kind == "backward"} == {
        (dtype, D, causal) for dtype in ("float32", "bfloat16") for D in (64, 128) for causal in (False, True)
    }
    default = cases.cpu_cases(quick=False, full=False)
    assert set(cases.cpu_cases(quick=True, full=False)) < set(default) < set(full)
    assert max(case.flop for case in default) <= cases.LARGEST_FLOP < max(case.flop for case in full)


def test_work_of_a_case():
    assert cases.Case("prefill", "float32", 2, 3, 3, 4, 4, 8, False).flop == 4 * 2 * 4 * 9 * 8
    assert cases.Case("prefill", "float32", 2, 3, 3, 4, 4, 8, True).flop == 4 * 2 * 4 * 6 * 8
    assert cases.Case("backward", "float32", 2, 3, 3, 4, 4, 8, True).flop == 10 * 2 * 4 * 6 * 8
    assert cases.Case("decode", "bfloat16", 1, 1, 10, 8, 2, 16, False).kv_bytes == 2 * 10 * 2 * 16 * 2


def test_error_does_not_hide_nan():
    result = torch.tensor([1.0, float("nan")])
    largest, _ = measure.error(result, torch.ones(2))
    assert largest != largest
    assert not measure.accurate(largest, 1.0, torch.ones(2), torch.float32)
    assert not measure.accurate(1.0, 1e-7, torch.ones(2), torch.float32)
    assert measure.accurate(3e-7, 1e-7, torch.ones(2), torch.float32)


def test_peak_extra_bytes_sees_an_allocation():
    size, slack = 64 << 20, 1 << 20  # the kernel counts pages in batches
    peak = measure.peak_extra_bytes(lambda: torch.ones(size, dtype=torch.uint8))
    if peak is None:
        pytest.skip("needs a writable /proc/self/clear_refs (Linux)")
    assert size - slack <= peak < size + 16 * slack


def test_interleaved_medians_take_turns_and_repeat_short_calls():
    calls = []
    slow, fast = measure.interleaved_medians(
        [lambda: (calls.append("slow"), time.sleep(0.01)), lambda: calls.append("fast")], 0.1
    )
    assert 0 < fast < slow
    assert slow >= 0.01
    assert calls.count("slow") >= 5
    assert calls.count("fast") > 10 * calls.count("slow")


def test_torch_threads_puts_the_count_back():
    before = torch.get_num_threads()
    with measure.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_read_bandwidth_and_peak_are_plausible():
    assert 1e8 < machine.read_bandwidth(1 << 24) < 1e13
    assert 1e8 < machine.fma_peak(1) < 1e13


def test_markdown_table():
    grid = report.Grid("Title", ["a", "b"], rows=[["x", "1"]])
    assert grid.markdown() == "## Title\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n"


@pytest.mark.parametrize(("value", "text"), [(2.5e-6, "2.5 us"), (2.5e-3, "2.50 ms"), (2.5, "2.50 s")])
def test_seconds(value: float, text: str):
    assert report.seconds(value) == text
