"""``flash-attn-det verify``: what holds on this machine, as a table. Exit code 1 when anything fails."""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from dataclasses import dataclass

import torch

import flash_attn_det as fad
from flash_attn_det.commands import bench, invariance, machine, measure, report
from flash_attn_det.reference import attn_oracle

INVARIANCE_NOTE = (
    "differ: elements of out and lse whose bits differ between the forms that the line names; must be 0. "
    "torch: the same comparison with scaled_dot_product_attention on the same inputs (out only), in the case where the "
    "largest share differs; where that is 0 or has no such form, the next column speaks alone. "
    "other split size: share that changes when only the split size does, in the case where it is smallest; above 0, or "
    "the inputs are too tame to prove anything."
)
ACCURACY_NOTE = "Largest and root-mean-square error of out against dense attention in float64, on the same inputs."
TIME_NOTE = (
    "ratio: our throughput over torch's, medians of runs in turns. of ceiling: share of the fp32 FMA peak (prefill) or "
    "of the bandwidth of torch's sum over a buffer as large as K and V (decode). memory: resident bytes that one call "
    "adds at its peak, result included. The full grid: flash-attn-det bench."
)


@dataclass(frozen=True)
class Accuracy:
    """One line of the accuracy table. ``spread`` multiplies the queries, so that 30 makes logits in the hundreds."""

    label: str
    dtype: torch.dtype
    Sq: int
    Sk: int
    spread: float = 1.0


ACCURACY = [
    Accuracy(f"{label}, {str(dtype).removeprefix('torch.')}", dtype, Sq, Sk, spread)
    for label, Sq, Sk, spread in (
        ("prefill, 1000 keys", 1000, 1000, 1.0),
        ("decode, 8192 keys", 1, 8192, 1.0),
        ("huge logits, 1000 keys", 1000, 1000, 30.0),
    )
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
]

TIMED = [
    bench.Case("prefill", dtype, 1, 2048, 2048, 8, 8, 64, causal)
    for dtype in ("float32", "bfloat16")
    for causal in (False, True)
] + [bench.Case("decode", dtype, 1, 1, 16384, 32, 8, 128, False) for dtype in ("float32", "bfloat16")]


def _verdict(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def check_invariance(check: invariance.Check) -> tuple[list[str], bool, list[str]]:
    """Table row, verdict and details of the failures of one check."""
    start = time.perf_counter()
    outcome = invariance.evaluate(check)
    row = [
        outcome.title,
        f"{outcome.compared:,}",
        f"{outcome.differ:,}",
        "no such form" if outcome.torch_share is None else f"{outcome.torch_share:.2%}",
        f"{outcome.other_split_share:.2%}",
        report.seconds(time.perf_counter() - start),
        _verdict(outcome.passed),
    ]
    return row, outcome.passed, outcome.failures


def check_accuracy(case: Accuracy) -> tuple[list[str], bool]:
    """Table row and verdict of one accuracy case."""
    generator = torch.Generator().manual_seed(3)
    lengths = (case.Sq, case.Sk, case.Sk)
    q, k, v = (torch.randn(1, rows, 4, 64, generator=generator, dtype=torch.float64) for rows in lengths)
    q, k, v = (x.to(case.dtype) for x in (q * case.spread, k, v))
    with torch.inference_mode():
        # The rows that see the most keys; dense float64 for all of them takes gigabytes.
        last = slice(-bench.CHECKED_ROWS, None)
        exact = attn_oracle(q[:, last], k, v, causal=True)
        ours = measure.error(fad.attn(q, k, v, causal=True)[:, last], exact)
        torchs = measure.error(invariance.TORCH.attend(q, k, v, causal=True).out[:, last], exact)
    passed = bench.accurate(ours[0], torchs[0], exact, case.dtype)
    return [case.label, *(f"{value:.2e}" for value in (*ours, *torchs)), _verdict(passed)], passed


def check_time(case: bench.Case) -> tuple[list[str], bool]:
    """Table row of one timed case; it fails when it is not accurate, never for being slow."""
    figures = bench.measure_case(case, torch.get_num_threads(), seconds=1.0)
    if figures is None:
        return [case.name, *[""] * (len(bench.COLUMNS) - 2), "not accurate"], False
    return bench.cells(case, figures), True


def markdown(facts: dict[str, str], sections: list[tuple[report.Grid, str]], passed: bool) -> str:
    """The whole report."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    verdict = "Everything passed." if passed else "**Something failed.**"
    lines = ["# Verified results", "", f"Written by `flash-attn-det verify --markdown` on {date}. {verdict}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for grid, note in sections:
        lines += ["", grid.markdown(), note]
    return "\n".join(lines) + "\n"


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 when a check failed."""
    console = report.console()
    facts = machine.facts()
    console.print(f"flash-attn-det verify on {platform.node() or 'this machine'}")
    for name, value in facts.items():
        console.print(f"  {name}: {value}")
    console.print()

    titles = ["invariance: same bits in", "compared", "differ", "torch", "other split size", "time", "verdict"]
    bits = report.Grid("Bits", titles)
    accuracy = report.Grid("Accuracy", ["case", "ours, max", "ours, rms", "torch, max", "torch, rms", "verdict"])
    times = report.Grid("Time and memory", bench.COLUMNS)
    passed = True
    failures: list[str] = []
    total = len(invariance.CHECKS) + len(ACCURACY) + len(TIMED)

    def progress(grid: report.Grid, row: list[str], summary: str) -> None:
        grid.rows.append(row)
        done = len(bits.rows) + len(accuracy.rows) + len(times.rows)
        console.print(f"[{done:2}/{total}] {row[0]}: {summary}")

    with console.status("comparing bits"):
        for check in invariance.CHECKS:
            row, ok, details = check_invariance(check)
            passed &= ok
            failures += [f"{check.title}: {detail}" for detail in details]
            progress(bits, row, f"{row[2]} of {row[1]} elements differ, {row[-1]}, {row[-2]}")
    with console.status("comparing with float64"):
        for case in ACCURACY:
            row, ok = check_accuracy(case)
            passed &= ok
            progress(accuracy, row, f"largest error {row[1]}, torch's {row[3]}, {row[-1]}")
    with console.status("timing"):
        for case in TIMED:
            row, ok = check_time(case)
            passed &= ok
            progress(times, row, f"{row[2]}, torch {row[3]}" if ok else row[-1])

    sections = [(bits, INVARIANCE_NOTE), (accuracy, ACCURACY_NOTE), (times, TIME_NOTE)]
    for grid, note in sections:
        console.print()
        grid.print(console)
        console.print(note)
    console.print()
    for failure in failures:
        console.print(f"FAILED {failure}")
    console.print("Everything passed." if passed else "Something FAILED.")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(facts, sections, passed))
        console.print(f"Wrote {arguments.markdown}.")
    return 0 if passed else 1
