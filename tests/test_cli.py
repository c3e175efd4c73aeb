"""The command line: every claim that verify makes, and that verify and bench fail when they should."""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import flash_attn_det as fad
from flash_attn_det import cli
from flash_attn_det.commands import bench, invariance, machine, measure, report, verify

SMALL = bench.Case("prefill", "float32", 1, 64, 64, 4, 2, 16, True)
SMALL_DECODE = bench.Case("decode", "bfloat16", 1, 1, 300, 4, 2, 16, False)
ROWS = torch.arange(24, dtype=torch.float32).reshape(1, 2, 3, 4)

WITHOUT_RICH = """
import sys
sys.modules["rich"] = None
from flash_attn_det.cli import main
sys.exit(main(sys.argv[1:]))
"""


def rows(changed: bool = False) -> invariance.Rows:
    out = ROWS.clone()
    if changed:
        out[0, 1, 2, 3] += 1
    return invariance.Rows(out, torch.zeros(1, 3, 2))


def check(*, differs: bool = False, tame: bool = False) -> invariance.Check:
    """A check whose variant differs in one element, or whose other split size gives the same bits."""

    def expected(library: invariance.Library) -> invariance.Rows:
        return rows(changed=library is invariance.OTHER_SPLIT and not tame)

    comparison = invariance.Comparison("a setting", expected, lambda library: [rows(changed=differs)], None)
    return invariance.Check("a claim", lambda: [comparison])


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch):
    """verify and bench with a second's worth of work."""
    monkeypatch.setattr(invariance, "CHECKS", [check()])
    monkeypatch.setattr(verify, "ACCURACY", [verify.Accuracy("short", torch.bfloat16, 40, 40)])
    monkeypatch.setattr(verify, "TIMED", [SMALL_DECODE])
    monkeypatch.setattr(bench, "cases", lambda quick, full: [SMALL, SMALL_DECODE])
    monkeypatch.setattr(machine, "fma_peak", lambda threads: 1e11)


@pytest.mark.parametrize("claim", invariance.CHECKS, ids=lambda claim: claim.title)
def test_n1_every_claim_of_verify_holds(claim: invariance.Check):
    outcome = invariance.evaluate(claim)
    assert outcome.failures == []
    assert outcome.passed
    assert outcome.compared > 1000
    assert outcome.other_split_share > 0


def test_torch_fails_the_claims_that_it_can_be_asked():
    """The inputs have teeth beyond our own control: torch's attention changes bits on them."""
    title = "prefill row = decode = last of 5 speculative rows"
    (claim,) = (claim for claim in invariance.CHECKS if claim.title == title)
    assert invariance.evaluate(claim).torch_share > 0.01


def test_difference_fails_a_check():
    outcome = invariance.evaluate(check(differs=True))
    assert not outcome.passed
    assert (outcome.differ, outcome.compared) == (1, 30)
    assert outcome.failures == ["a setting, variant 0: 1 of 30 elements differ"]


def test_tame_inputs_fail_a_check():
    outcome = invariance.evaluate(check(tame=True))
    assert not outcome.passed
    assert outcome.failures == ["a setting: another split size gives the same bits, nothing is proven"]


def test_difference_of_zeros_counts():
    zeros = invariance.Rows(torch.zeros(1, 1, 1, 2), None)
    negative = invariance.Rows(-torch.zeros(1, 1, 1, 2), None)
    assert invariance.differing(zeros, negative) == (2, 2)


def test_join_undoes_cutting():
    whole = rows()
    assert invariance.differing(
        whole, invariance.join([whole.queries(slice(0, 1)), whole.queries(slice(1, 2))], "queries")
    ) == (0, 30)
    heads = [invariance.Rows(whole.out[:, :, h : h + 1], whole.lse[:, h : h + 1]) for h in range(3)]
    assert invariance.differing(whole, invariance.join(heads, "heads")) == (0, 30)
    assert invariance.join([whole, whole], "sequences").out.shape == (2, 2, 3, 4)


@pytest.mark.parametrize("causal", [False, True])
def test_torch_control_computes_the_same_attention(causal: bool):
    """A control that computed something else would differ for a reason that proves nothing."""
    setting = invariance.Setting("", torch.float64, 20, 70, Hq=8, Hk=2)
    q, k, v = setting.tensors(3)
    lengths = torch.tensor([70, 33, 20], dtype=torch.int32)
    left = 70 - lengths
    for options in ({}, {"window": (9, -1)}, {"seqused_k": lengths}, {"leftpad_k": left}):
        ours = invariance.OURS.attend(q, k, v, causal=causal, **options).out
        torchs = invariance.TORCH.attend(q, k, v, causal=causal, **options).out
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-12)
    parts = [[x[b, : lengths[b]] for b in range(3)] for x in (k.repeat_interleave(4, 2), k, v)]
    for ours, torchs in zip(
        invariance.OURS.packed(*parts, causal=False), invariance.TORCH.packed(*parts, causal=False), strict=True
    ):
        torch.testing.assert_close(ours.out, torchs.out, rtol=0, atol=1e-12)


def test_verify_passes_and_writes_markdown(short, tmp_path: Path, capsys: pytest.CaptureFixture):
    target = tmp_path / "results.md"
    assert cli.main(["verify", "--markdown", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "[ 1/3] a claim: 0 of 30 elements differ, pass" in printed
    assert "Everything passed." in printed
    written = target.read_text()
    assert re.search(r"on \d{4}-\d\d-\d\d \d\d:\d\d UTC\. Everything passed\.", written)
    for fact in ("processor", "torch", "contract", "commit"):
        assert f"- {fact}: " in written
    for heading in ("## Bits", "## Accuracy", "## Time and memory"):
        assert heading in written
    assert "| a claim | 30 | 0 | no such form |" in written


def test_verify_fails_when_bits_differ(short, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setattr(invariance, "CHECKS", [check(), check(differs=True)])
    target = tmp_path / "results.md"
    assert cli.main(["verify", "--markdown", str(target)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED a claim: a setting, variant 0: 1 of 30 elements differ" in printed
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
    assert cli.main(["bench", "--plot", "ratios.png"]) == 2
    printed = capsys.readouterr()
    assert "pip install 'flash-attn-det[bench]'" in printed.err
    assert printed.out == ""


def test_bench_cases_cover_the_grid():
    full = bench.cases(quick=False, full=True)
    assert {case.B for case in full} == {1, 8}
    assert {case.Sk for case in full if case.kind == "prefill"} == {512, 2048, 8192}
    assert {case.Sk for case in full if case.kind == "decode"} == {1024, 4096, 16384, 65536}
    assert {(case.dtype, case.D, case.causal) for case in full if case.kind == "prefill"} == {
        (dtype, D, causal) for dtype in ("float32", "bfloat16") for D in (64, 128) for causal in (False, True)
    }
    default = bench.cases(quick=False, full=False)
    assert set(bench.cases(quick=True, full=False)) < set(default) < set(full)
    assert max(case.flop for case in default) <= bench.LARGEST_FLOP < max(case.flop for case in full)


def test_work_of_a_case():
    assert bench.Case("prefill", "float32", 2, 3, 3, 4, 4, 8, False).flop == 4 * 2 * 4 * 9 * 8
    assert bench.Case("prefill", "float32", 2, 3, 3, 4, 4, 8, True).flop == 4 * 2 * 4 * 6 * 8
    assert bench.Case("decode", "bfloat16", 1, 1, 10, 8, 2, 16, False).kv_bytes == 2 * 10 * 2 * 16 * 2


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
    assert "BLOCK_KV 64" in printed


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
    assert not bench.accurate(largest, 1.0, torch.ones(2), torch.float32)
    assert not bench.accurate(1.0, 1e-7, torch.ones(2), torch.float32)
    assert bench.accurate(3e-7, 1e-7, torch.ones(2), torch.float32)


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
    (subparsers,) = (a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(subparsers.choices) == {"verify", "bench", "info"}
