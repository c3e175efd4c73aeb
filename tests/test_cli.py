"""The command line: every claim that verify makes, and that verify and bench fail when they should."""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flash_attn_det as fad
from flash_attn_det import cli
from flash_attn_det.commands import (
    backends,
    bench,
    bench_cuda,
    cases,
    contest,
    invariance,
    machine,
    markdown,
    measure,
    peers,
    plot,
    report,
    tables,
    verify,
)
from flash_attn_det.commands.libraries import Library, Ours, Rows, Torch, join

SMALL = cases.Case("prefill", "float32", 1, 64, 64, 4, 2, 16, True)
SMALL_DECODE = cases.Case("decode", "bfloat16", 1, 1, 300, 4, 2, 16, False)
ROWS = torch.arange(24, dtype=torch.float32).reshape(1, 2, 3, 4)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

WITHOUT_RICH = """
import sys
sys.modules["rich"] = None
from flash_attn_det.cli import main
sys.exit(main(sys.argv[1:]))
"""


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (parsers,) = (a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return parsers.choices


def rows(changed: bool = False) -> Rows:
    out = ROWS.clone()
    if changed:
        out[0, 1, 2, 3] += 1
    return Rows(out, torch.zeros(1, 3, 2))


def check(*, differs: bool = False, tame: bool = False) -> invariance.Check:
    """A check whose variant differs in one element, or whose other split size gives the same bits."""

    def expected(library: Library) -> Rows:
        return rows(changed=library.split_size == backends.BLOCK and not tame)

    comparison = invariance.Comparison("a setting", expected, lambda library: [rows(changed=differs)], None)
    return invariance.Check("a claim", lambda backend: [comparison])


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch):
    """verify and bench with a second's worth of work, on the CPU also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(verify.CHECKS, backends.CPU, [check()])
    monkeypatch.setattr(verify, "accuracy_cases", lambda backend: [verify.Accuracy("short", torch.bfloat16, 40, 40)])
    monkeypatch.setattr(verify, "CPU_TIMED", [SMALL_DECODE])
    monkeypatch.setattr(bench, "cpu_cases", lambda quick, full: [SMALL, SMALL_DECODE])
    monkeypatch.setattr(machine, "fma_peak", lambda threads: 1e11)


CLAIMS = [pytest.param(backends.CPU, claim, id=claim.title) for claim in verify.CHECKS[backends.CPU]] + [
    pytest.param(backend, claim, id=f"cuda {backend.arithmetic}: {claim.title}", marks=needs_gpu)
    for backend in backends.BACKENDS["cuda"]
    for claim in verify.CHECKS[backend]
]


@pytest.mark.parametrize(("backend", "claim"), CLAIMS)
def test_n1_every_claim_of_verify_holds(backend: backends.Backend, claim: invariance.Check):
    outcome = invariance.evaluate(claim, backend)
    assert outcome.failures == []
    assert outcome.passed
    assert outcome.compared > 1000
    assert outcome.other_split_share > 0


@pytest.mark.parametrize(
    "backend", [backends.CPU, pytest.param(backends.CUDA_MMA, marks=needs_gpu)], ids=lambda backend: backend.device
)
def test_torch_fails_the_claims_that_it_can_be_asked(backend: backends.Backend):
    """The inputs have teeth beyond our own control: torch's attention changes bits on them."""
    title = "prefill row = decode = last of 5 speculative rows"
    (claim,) = (claim for claim in verify.CHECKS[backend] if claim.title == title)
    assert invariance.evaluate(claim, backend).torch_share > 0.01


def test_every_backend_has_the_common_claims_and_its_own():
    titles = {backend: [claim.title for claim in claims] for backend, claims in verify.CHECKS.items()}
    assert set(titles) == {backend for group in backends.BACKENDS.values() for backend in group}
    for names in titles.values():
        assert len(set(names)) == len(names)
        assert "batch of 8 = 4 + 4 = 1 + 7 = eight calls" in names
    assert "instruction sets" in titles[backends.CPU]
    assert "CUDA graph replays" in titles[backends.CUDA_MMA]
    assert set(titles[backends.CUDA_FMA]) - set(titles[backends.CUDA_MMA]) == {"GPU = CPU"}


@needs_gpu
def test_settings_have_the_same_numbers_on_every_device():
    for setting in backends.CUDA_FMA.all:
        for here, there in zip(replace(setting, device="cpu").tensors(1), setting.tensors(1), strict=True):
            assert there.device.type == "cuda"
            assert torch.equal(here, there.cpu())


def test_difference_fails_a_check():
    outcome = invariance.evaluate(check(differs=True), backends.CPU)
    assert not outcome.passed
    assert (outcome.differ, outcome.compared) == (1, 30)
    assert outcome.failures == ["a setting, variant 0: 1 of 30 elements differ"]


def test_tame_inputs_fail_a_check():
    outcome = invariance.evaluate(check(tame=True), backends.CPU)
    assert not outcome.passed
    assert outcome.failures == ["a setting: another split size gives the same bits, nothing is proven"]


def test_difference_of_zeros_counts():
    zeros = Rows(torch.zeros(1, 1, 1, 2), None)
    negative = Rows(-torch.zeros(1, 1, 1, 2), None)
    assert invariance.differing(zeros, negative) == (2, 2)


def test_join_undoes_cutting():
    whole = rows()
    assert invariance.differing(whole, join([whole.queries(slice(0, 1)), whole.queries(slice(1, 2))], "queries")) == (
        0,
        30,
    )
    heads = [Rows(whole.out[:, :, h : h + 1], whole.lse[:, h : h + 1]) for h in range(3)]
    assert invariance.differing(whole, join(heads, "heads")) == (0, 30)
    assert join([whole, whole], "sequences").out.shape == (2, 2, 3, 4)


@pytest.mark.parametrize("causal", [False, True])
def test_torch_control_computes_the_same_attention(causal: bool):
    """A control that computed something else would differ for a reason that proves nothing."""
    setting = backends.Setting("", torch.float64, 20, 70, Hq=8, Hk=2)
    q, k, v = setting.tensors(3)
    lengths = torch.tensor([70, 33, 20], dtype=torch.int32)
    left = 70 - lengths
    for options in ({}, {"window": (9, -1)}, {"seqused_k": lengths}, {"leftpad_k": left}):
        ours = Ours("fma", backends.SPLIT).attend(q, k, v, causal=causal, **options).out
        torchs = Torch().attend(q, k, v, causal=causal, **options).out
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-12)
    parts = [[x[b, : lengths[b]] for b in range(3)] for x in (k.repeat_interleave(4, 2), k, v)]
    for ours, torchs in zip(
        Ours("fma", backends.SPLIT).packed(*parts, causal=False), Torch().packed(*parts, causal=False), strict=True
    ):
        torch.testing.assert_close(ours.out, torchs.out, rtol=0, atol=1e-12)


def test_verify_passes_and_writes_markdown(short, tmp_path: Path, capsys: pytest.CaptureFixture):
    target = tmp_path / "results.md"
    assert cli.main(["verify", "--markdown", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "[ 1/1] fma, a claim: 0 of 30 elements differ, pass" in printed
    assert "Everything passed." in printed
    written = target.read_text()
    assert re.search(r"on \d{4}-\d\d-\d\d \d\d:\d\d UTC\. Everything passed\.", written)
    for fact in ("processor", "torch", "contract", "commit"):
        assert f"- {fact}: " in written
    for heading in ("# Verified results", "# CPU", "## Bits, fma", "## Accuracy, fma", "## Time and memory"):
        assert f"\n{heading}" in f"\n{written}"
    assert "| a claim | 30 | 0 | no such form |" in written


def test_verify_fails_when_bits_differ(short, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setitem(verify.CHECKS, backends.CPU, [check(), check(differs=True)])
    target = tmp_path / "results.md"
    assert cli.main(["verify", "--markdown", str(target)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"FAILED fma family \(.*\), a claim: a setting, variant 0: 1 of 30 elements differ", printed)
    assert "Something FAILED." in printed
    assert "**Something failed.**" in target.read_text()


def test_verify_fails_when_not_accurate(short, monkeypatch: pytest.MonkeyPatch, capsys):
    attn = fad.attn
    monkeypatch.setattr(fad, "attn", lambda *args, **kwargs: attn(*args, **kwargs) * 1.1)
    assert cli.main(["verify"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"short: largest error .*FAIL", printed)
    assert "not accurate" in printed


def test_markdown_default_file():
    assert cli.build_parser().parse_args(["verify", "--markdown"]).markdown == Path("VERIFIED_RESULTS.md")
    assert cli.build_parser().parse_args(["verify"]).markdown is None


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
        ("prefill", "2"),
        ("decode", "2"),
    ]
    for line in lines:
        assert float(line["ratio"]) == float(line["torch_seconds"]) / float(line["ours_seconds"])
        assert float(line["ceiling"]) > 0


def test_bench_does_not_time_what_is_not_accurate(short, monkeypatch: pytest.MonkeyPatch, capsys):
    attn = fad.attn
    monkeypatch.setattr(fad, "attn", lambda *args, **kwargs: attn(*args, **kwargs) * float("nan"))
    assert cli.main(["bench", "--threads", "1"]) == 1
    assert f"{SMALL.name}, 1 threads: NOT ACCURATE, not timed" in capsys.readouterr().out


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
    default = cases.cpu_cases(quick=False, full=False)
    assert set(cases.cpu_cases(quick=True, full=False)) < set(default) < set(full)
    assert max(case.flop for case in default) <= cases.LARGEST_FLOP < max(case.flop for case in full)


def test_work_of_a_case():
    assert cases.Case("prefill", "float32", 2, 3, 3, 4, 4, 8, False).flop == 4 * 2 * 4 * 9 * 8
    assert cases.Case("prefill", "float32", 2, 3, 3, 4, 4, 8, True).flop == 4 * 2 * 4 * 6 * 8
    assert cases.Case("decode", "bfloat16", 1, 1, 10, 8, 2, 16, False).kv_bytes == 2 * 10 * 2 * 16 * 2


# ---- the GPU benchmark, as far as it needs no GPU --------------------------------------------------------------------

CUDA_SMALL = cases.CudaCase("prefill", "bfloat16", 2, 40, 40, 4, 2, 16, True)
CUDA_DECODE = cases.CudaCase("decode", "bfloat16", 2, 1, 300, 4, 2, 16, False, replay=True)
CUDA_PACKED = cases.CudaCase("short", "float32", 3, 70, 70, 2, 2, 16, True, packed=(70, 1, 33))
CEILINGS = tables.Ceilings({"bfloat16": 800e12, "float32": 50e12}, bandwidth=3e12, l2_bytes=50 << 20)


def figures(microseconds: float, error: float = 1e-3, extra_bytes: int = 1 << 20) -> contest.Figures:
    return contest.Figures(microseconds * 1e-6, error, extra_bytes)


def results() -> list[contest.Result]:
    limited = replace(CUDA_SMALL, kind="fork", memory_limit=1 << 20)
    return [
        contest.Result(
            CUDA_SMALL, ["ours", "FA2", "cuDNN"], {"ours": figures(3), "FA2": figures(2, 2e-3)}, {"cuDNN": "no"}
        ),
        contest.Result(CUDA_DECODE, ["ours", "FA2"], {"FA2": figures(20)}, {"ours": "not today"}),
        contest.Result(
            replace(CUDA_DECODE, Sk=301), ["ours", "FA2", "cuDNN"], {"ours": figures(5)}, {"FA2": "a", "cuDNN": "no"}
        ),
        contest.Result(limited, ["ours", "FA2"], {"ours": figures(1, 0.0, 2 << 20), "FA2": figures(1)}),
    ]


def test_cuda_cases_cover_every_group():
    everything = cases.cuda_cases()
    assert list(dict.fromkeys(case.kind for case in everything)) == list(cases.GROUPS)
    assert len(set(everything)) == len(everything)
    assert all(case.replay == (case.kind in ("decode", "few")) for case in everything)
    assert {case.kind for case in everything if case.quick} == set(cases.GROUPS)
    by_kind = {kind: [case for case in everything if case.kind == kind] for kind in cases.GROUPS}
    assert {(c.D, c.causal) for c in by_kind["prefill"] if c.dtype == "float32"} == {
        (D, causal) for D in (64, 128, 256) for causal in (False, True)
    }
    assert {(c.Sq, c.Sk) for c in by_kind["few"]} == {
        (Sq, Sk) for Sq in (4, 16, 64, 128, 512, 2048) for Sk in (16384, 32768)
    }
    assert all(case.Sq == 1 for case in by_kind["decode"])
    (packed,) = (case for case in everything if case.packed)
    assert len(packed.packed) == packed.B == 64
    assert min(packed.packed) >= 128
    assert max(packed.packed) == packed.Sk <= 4096
    (limited,) = (case for case in everything if case.memory_limit)
    assert (limited.B, limited.Sq, limited.Hq, limited.D, limited.dtype) == (4, 2048, 32, 64, "float16")
    assert limited.memory_limit == 34 << 20


def test_work_of_a_packed_case():
    pairs = sum(n * (n + 1) // 2 for n in (70, 1, 33))
    assert CUDA_PACKED.flop == 4 * 2 * pairs * 16
    assert CUDA_PACKED.kv_bytes == 2 * (70 + 1 + 33) * 2 * 16 * 4
    assert CUDA_PACKED.starts() == [0, 70, 71, 104]
    assert CUDA_PACKED.shape == "B 3, L 1 to 70, H 2, D 16, causal"
    assert [x.shape for x in CUDA_PACKED.tensors("cpu")] == [(104, 2, 16)] * 3


@pytest.mark.parametrize("case", [CUDA_SMALL, CUDA_DECODE, CUDA_PACKED], ids=lambda case: case.kind)
def test_contest_compares_the_rows_that_it_names_with_float64(case: cases.CudaCase):
    q, k, v = case.tensors("cpu")
    starts = torch.tensor(case.starts(), dtype=torch.int32)
    call = (
        (lambda q: fad.attn_varlen(q, k, v, starts, starts, causal=True))
        if case.packed
        else (lambda q: fad.attn(q, k, v, causal=case.causal))
    )
    expected = contest.exact(case, q, k, v)
    rows = sum(part.stop - part.start for _, _, part in contest.checked(case))
    assert expected.shape == (rows, case.D)
    assert contest.error(case, call(q), expected) < 0.01
    assert contest.error(case, call(-q), expected) > 0.01
    assert contest.error(case, call(q) * float("nan"), expected) != 0.0


def test_contest_drops_what_is_not_accurate():
    result = contest.Result(CUDA_SMALL, ["ours", "FA2", "TF32"])
    result.figures = {"ours": figures(1, 1e-3), "FA2": figures(1, 2e-3), "TF32": figures(1, float("nan"))}
    contest._drop_inaccurate(result, torch.full((4, 16), 0.01))
    assert list(result.figures) == ["ours", "FA2"]
    assert result.missing["TF32"].startswith("not accurate, not timed: largest error nan")
    result.figures = {"ours": figures(1, 0.5), "FA2": figures(1, 2e-3)}
    contest._drop_inaccurate(result, torch.full((4, 16), 0.01))
    assert list(result.figures) == ["FA2"]
    assert result.failures == [f"{CUDA_SMALL.name}: not accurate, not timed: largest error 5.0e-01 against float64"]


def test_tables_of_the_gpu_benchmark():
    prefill, decode, fork, memory = tables.grids(results(), CEILINGS)
    assert prefill.title == "Prefill, bfloat16"
    peers_columns = ["FA2", "ours/FA2", "cuDNN", "ours/cuDNN"]
    assert prefill.columns == ["case", "ours", "our rate", "of ceiling", *peers_columns, "our error", "others' error"]
    (row,) = prefill.rows
    rate = CUDA_SMALL.kv_bytes / 3e-6 / 1e9  # so small a case is bound by reading K and V
    share = CUDA_SMALL.kv_bytes / 3e12 / 3e-6
    assert row[:4] == [CUDA_SMALL.shape, "3.0 us", f"{rate:.0f} GB/s", f"{share:.0%}"]
    assert row[5:] == ["1.50", "-", "-", "1.0e-03", "2.0e-03"]
    assert decode.rows[0][1:5] == ["0.1 MiB, in L2", "-", "-", "-"]
    assert decode.rows[0][6] == "-"
    assert decode.rows[1][-4:] == ["-", "-", "1.0e-03", "-"]
    assert fork.rows[0][0] == CUDA_SMALL.shape
    assert memory.rows == [[f"{CUDA_SMALL.shape}, bfloat16", "2.0 MiB", "1.0 MiB", "1.0 MiB"]]
    for grid in (prefill, decode, fork, memory):
        assert all(len(row) == len(grid.columns) for row in grid.rows)


def test_rate_has_the_unit_of_the_longer_floor():
    prefill, decode = cases.cuda_cases()[0], replace(CUDA_DECODE, Sk=100_000)
    assert CEILINGS.rate(prefill, 1e-3) == (prefill.flop / 1e9, "TFLOP/s")
    assert CEILINGS.rate(decode, 1e-3) == (decode.kv_bytes / 1e6, "GB/s")
    assert CEILINGS.floor(prefill) == prefill.flop / 800e12
    assert CEILINGS.floor(replace(prefill, dtype="float32")) == prefill.flop / 50e12


def test_reasons_are_told_once_and_failures_apart():
    assert contest.reasons(results()) == [
        f"cuDNN has no figures for {CUDA_SMALL.name}: no",
        f"FA2 has no figures for {replace(CUDA_DECODE, Sk=301).name}: a",
    ]
    failures = [failure for result in results() for failure in result.failures]
    assert failures == [
        f"{CUDA_DECODE.name}: not today",
        f"{replace(CUDA_SMALL, kind='fork').name}: adds 2.0 MiB, expected at most 1.0 MiB",
    ]


def test_gpu_figures_as_csv(tmp_path: Path):
    bench_cuda.write_csv(tmp_path / "figures.csv", results())
    with (tmp_path / "figures.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["library"] for line in lines] == [
        "ours",
        "FA2",
        "cuDNN",
        "ours",
        "FA2",
        "ours",
        "FA2",
        "cuDNN",
        "ours",
        "FA2",
    ]
    assert float(lines[1]["ours_over_this"]) == pytest.approx(1.5)
    assert (lines[2]["seconds"], lines[2]["missing"]) == ("", "no")


def test_gpu_figures_as_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    plot.draw(tmp_path / "figures.png", results())
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_gpu_benchmark_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    """The whole command with figures that are made up: tables, reasons, failures, files, exit code."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "facts", lambda device: {"GPU": device})
    monkeypatch.setattr(tables, "measure_ceilings", lambda chosen: CEILINGS)
    monkeypatch.setattr(contest, "measure_cases", lambda chosen, peers, seconds, progress: results())
    target = tmp_path / "results.md"
    assert cli.main(["bench", "--csv", str(tmp_path / "figures.csv"), "--markdown", str(target)]) == 1
    printed, written = capsys.readouterr().out, target.read_text()
    for text in (printed, written):
        assert "Prefill, bfloat16" in text
        assert "device copy: 3.00 TB/s" in text
        assert f"cuDNN has no figures for {CUDA_SMALL.name}: no" in text
    assert f"FAILED {CUDA_DECODE.name}: not today" in printed
    assert "# NVIDIA GPU benchmark\n\nWritten by `flash-attn-det bench --markdown` on" in written
    assert "**Something failed.**" in written
    assert (tmp_path / "figures.csv").exists()


def test_gpu_part_of_verify_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    """A machine with both devices: each gets its own section, and one failure fails the command."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "facts", lambda device: {"processor or GPU": device})
    monkeypatch.setattr(verify, "check_bits", lambda part, backend: None)
    monkeypatch.setattr(verify, "check_accuracies", lambda part, backend: None)
    monkeypatch.setattr(verify, "CPU_TIMED", [])
    monkeypatch.setattr(tables, "measure_ceilings", lambda chosen: CEILINGS)
    monkeypatch.setattr(contest, "measure_cases", lambda chosen, peers, seconds, progress: results())
    target = tmp_path / "results.md"
    assert cli.main(["verify", "--markdown", str(target)]) == 1
    written = target.read_text()
    assert re.findall(r"^# (.*)$", written, re.MULTILINE) == ["Verified results", "CPU", "NVIDIA GPU"]
    assert written.count("Everything passed.") == written.count("**Something failed.**") == 1
    assert written.count(tables.NOTE) == 1  # once, after the last of the tables that it explains
    assert "bfloat16 8192^3 matrix product: 800.0 TFLOP/s" in written
    assert f"FAILED {CUDA_DECODE.name}: not today" in capsys.readouterr().out


def test_peers_are_those_that_run_the_case():
    for case in cases.cuda_cases():
        names = [peer.name for peer in peers.peers(flex=True) if peer.runs(case)]
        assert names, case.name
        assert ("FA2" in names) == (case.dtype != "float32" and case.kind != "split" and not case.packed)
        assert ("efficient" in names) == (case.dtype == "float32")
        assert ("one split" in names) == (case.kind == "split")
        assert ("varlen_attn" in names) == bool(case.packed)
    assert "FlexAttention" not in [peer.name for peer in peers.peers(flex=False)]


def test_packages_are_peers_where_they_are_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object() if name == "flashinfer" else None)
    assert [peer.name for peer in peers.peers(flex=False)][-1] == "FlashInfer"


def test_refusal_is_one_line_with_the_warnings_that_explain_it():
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for text in ("Too wide. (Triggered internally at a.cpp:1.)", "Too wide. (Triggered internally at b.cpp:2.)"):
            warnings.warn(text, UserWarning, stacklevel=1)
    assert peers.refused(RuntimeError("No kernel.\nMore."), warned) == "No kernel.; Too wide."
    assert peers.refused(NotImplementedError(), []) == "NotImplementedError"


# ---- the report ------------------------------------------------------------------------------------------------------


def test_sections_are_replaced_and_leave_each_other_alone(tmp_path: Path):
    target = tmp_path / "results.md"
    for title, body in (("NVIDIA GPU", "old\n## Bits\n"), ("CPU", "## Bits\n\n| a |\n"), ("NVIDIA GPU", "new\n")):
        markdown.write_section(target, title, body)
    introduction = f"# Verified results\n\n{markdown.INTRODUCTION}\n"
    assert target.read_text() == f"{introduction}\n# CPU\n\n## Bits\n\n| a |\n\n# NVIDIA GPU\n\nnew\n"


def test_sections_of_others_stay():
    text = markdown.with_section("# Verified results\n\nold\n\n# Something else\n\nkept\n", "CPU", "new")
    assert text.endswith("# CPU\n\nnew\n\n# Something else\n\nkept\n")
    assert "old" not in text
    assert markdown.with_section(text, "CPU", "new") == text


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_markdown_refuses_files_of_another_kind(command: str, tmp_path: Path, capsys):
    (tmp_path / "README.md").write_text("# flash_attn_det\n")
    for target, message in (
        (tmp_path / "README.md", "exists and is no report"),
        (tmp_path / "missing" / "results.md", "is not a folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--markdown", str(target)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# flash_attn_det\n"


@pytest.mark.parametrize("command", ["verify", "audit", "bench"])
def test_gpu_that_is_not_there(command: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([command, "--device", "cuda"]) == 2
    printed = capsys.readouterr()
    assert printed.err == (
        f"flash-attn-det {command}: --device cuda needs a CUDA GPU that torch can use: "
        "torch.cuda.is_available() is False\n"
    )
    assert printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--flex"], "--flex says nothing about --device cpu"),
        (["--device", "cuda", "--threads", "1"], "--threads says nothing about --device cuda"),
        (["--device", "cuda", "--full"], "--full says nothing about --device cuda"),
        (
            ["--device", "cpu", "--only", "few", "split"],
            "no case is left: --device cpu has the groups prefill, decode",
        ),
        (["--device", "cuda", "--only", "fork", "--dtype", "float32"], "no case is left: --device cuda has the groups"),
    ],
)
def test_bench_refuses_what_the_device_does_not_have(arguments, message, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_groups_of_the_command_line_are_those_of_the_cases():
    (action,) = (action for action in subcommands()["bench"]._actions if action.dest == "only")
    assert list(action.choices) == list(cases.GROUPS)


# ---- with a GPU ------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize(
    "case", [CUDA_SMALL, CUDA_DECODE, replace(CUDA_PACKED, dtype="bfloat16")], ids=lambda c: c.kind
)
def test_gpu_case_is_timed_and_gives_its_memory_back(case: cases.CudaCase):
    contest.measure_case(case, peers.peers(flex=False), 0.01)  # what libraries keep for good
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    result = contest.measure_case(case, peers.peers(flex=False), 0.01)
    assert torch.cuda.memory_allocated() == before
    assert result.failures == []
    assert len(result.figures) >= 2
    for figure in result.figures.values():
        assert 1e-7 < figure.seconds < 1
        assert figure.extra_bytes > 0


@needs_gpu
def test_gpu_peer_that_raises_is_explained():
    def prepare(case, q, k, v):
        raise RuntimeError("not for this case")

    broken = peers.Peer("broken", lambda case: True, prepare)
    result = contest.measure_case(replace(CUDA_SMALL, dtype="float32"), [broken], 0.01)
    assert result.missing == {"broken": "not for this case"}
    assert list(result.figures) == ["ours"]


@needs_gpu
def test_gpu_times_and_memory():
    x = torch.zeros(1 << 26, device="cuda")
    long, short = measure.cuda_medians([lambda: x.add(1), lambda: x[: 1 << 20].add(1)], 0.05)
    replayed, _ = measure.replay_medians([lambda: x.add(1), lambda: x[: 1 << 20].add(1)], 0.05)
    assert 0 < short < long
    assert replayed == pytest.approx(long, rel=0.5)
    assert measure.cuda_peak_extra_bytes(lambda: x.add(1)) == x.nbytes


@needs_gpu
def test_gpu_facts_and_ceilings():
    facts = machine.facts("cuda")
    assert torch.cuda.get_device_name() in facts["GPU"]
    assert "multiprocessors" in facts["GPU"]
    assert re.match(r"\d+\.\d+|unknown", facts["driver"])
    assert machine.copy_bandwidth() > 1e10
    assert machine.matmul_flops(torch.bfloat16) > machine.matmul_flops(torch.float32) > 1e11


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--quick", "--full"], ["--only", "training"]])
def test_bench_refuses(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_info_names_versions_and_constants(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"flash_attn_det: {fad.__version__}" in printed
    assert f"torch: {torch.__version__}" in printed
    assert "MMA_BLOCK_KV 128" in printed


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_without_rich_says_what_to_install(command: str):
    result = subprocess.run([sys.executable, "-c", WITHOUT_RICH, command], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "pip install 'flash-attn-det[cli]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_info_needs_no_rich():
    code = (
        "import sys; sys.modules['rich'] = None; from flash_attn_det.cli import main; raise SystemExit(main(['info']))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_other_missing_modules_are_not_blamed_on_rich(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flash_attn_det.commands.info", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["info"])


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


def test_commands_take_the_parser_s_result():
    """cli finds commands by name, so each must exist and have run()."""
    assert set(subcommands()) == {"verify", "audit", "bench", "info"}
