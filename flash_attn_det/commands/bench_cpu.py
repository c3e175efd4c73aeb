"""``bench`` on the CPU: time and memory beside torch's scaled_dot_product_attention, in the same run.

Each library gets its inputs in its own natural layout: [B, S, H, D] here, contiguous [B, H, S, D] for torch. The two
are timed in turns, so that a slow phase of the machine meets both. A case whose accuracy is not that of its dtype is
reported and not timed.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

import flash_attn_det as fad
from flash_attn_det.commands import gradients, machine, markdown, measure, report
from flash_attn_det.commands.cases import Case
from flash_attn_det.reference import attn_oracle

# Rows, of the last head of the last sequence, that are compared with float64 before a case is timed.
CHECKED_ROWS = 32


@dataclass(frozen=True)
class Figures:
    """What was measured of one case. Seconds are medians; bytes are resident at the peak, the result included."""

    threads: int
    ours_seconds: float
    torch_seconds: float
    ours_error: float
    torch_error: float
    ours_extra_bytes: int | None
    torch_extra_bytes: int | None
    ceiling: float  # bytes/s of reads for a decode, FLOP/s of FMAs otherwise

    @property
    def ratio(self) -> float:
        """Our throughput over torch's."""
        return self.torch_seconds / self.ours_seconds


class _Contest(NamedTuple):
    """Ours and torch's, ready to be timed, their errors, and whether ours has the accuracy of its dtype."""

    ours: Callable[[], object]
    torchs: Callable[[], object]
    ours_error: float
    torch_error: float
    accurate: bool


def _torchs(case: Case) -> Callable[..., torch.Tensor]:
    grouped = case.Hq != case.Hk
    return lambda *qkv: scaled_dot_product_attention(*qkv, is_causal=case.causal, enable_gqa=grouped)


def _forward(case: Case) -> _Contest:
    """Largest errors of the last rows of the last head."""
    q, k, v = case.tensors()
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]

    def ours() -> torch.Tensor:
        return fad.attn(q, k, v, causal=case.causal)

    def torchs() -> torch.Tensor:
        return _torchs(case)(*heads_first)

    last = slice(-CHECKED_ROWS, None)
    exact = attn_oracle(q[-1:, last, -1:], k[-1:, :, -1:], v[-1:, :, -1:], causal=case.causal)
    ours_error, _ = measure.error(ours()[-1:, last, -1:], exact)
    torch_error, _ = measure.error(torchs().transpose(1, 2)[-1:, last, -1:], exact)
    accurate = measure.accurate(ours_error, torch_error, exact, q.dtype)
    return _Contest(ours, torchs, ours_error, torch_error, accurate)


def _backward(case: Case) -> _Contest:
    """Relative errors of the gradients of two heads, the largest of the three."""
    inputs = case.tensors()
    dout = gradients.upstream(case, inputs[0])
    exact = gradients.exact(case, *inputs, dout)
    ours, as_it_is = gradients.backward_of(lambda *qkv: fad.attn(*qkv, causal=case.causal), inputs, dout, False)
    torchs, rows_first = gradients.backward_of(_torchs(case), inputs, dout, True)
    ours_errors = gradients.errors(case, as_it_is(ours()), exact)
    torch_errors = gradients.errors(case, rows_first(torchs()), exact)
    accurate = gradients.too_far(ours_errors, torch_errors) is None
    return _Contest(ours, torchs, max(ours_errors), max(torch_errors), accurate)


def measure_case(case: Case, threads: int, seconds: float) -> Figures | None:
    """Check, then time one case with ``threads`` threads for about ``seconds``; None when it is not accurate."""
    backward = case.kind == "backward"
    with torch.inference_mode(not backward), measure.torch_threads(threads):
        contest = (_backward if backward else _forward)(case)
        if not contest.accurate:
            return None
        ours_seconds, torch_seconds = measure.interleaved_medians([contest.ours, contest.torchs], seconds)
        return Figures(
            threads=threads,
            ours_seconds=ours_seconds,
            torch_seconds=torch_seconds,
            ours_error=contest.ours_error,
            torch_error=contest.torch_error,
            ours_extra_bytes=measure.peak_extra_bytes(contest.ours),
            torch_extra_bytes=measure.peak_extra_bytes(contest.torchs),
            ceiling=machine.read_bandwidth(case.kv_bytes) if case.kind == "decode" else machine.fma_peak(threads),
        )


COLUMNS = ["case", "threads", "ours", "torch", "ratio", "our rate", "of ceiling", "torch's", "our memory", "torch's"]


def cells(case: Case, figures: Figures) -> list[str]:
    """One row of the table with COLUMNS."""
    work, unit = (case.kv_bytes, "GB/s") if case.kind == "decode" else (case.flop, "GFLOP/s")

    def share(seconds: float) -> str:
        return f"{work / seconds / figures.ceiling:.0%}"

    return [
        case.name,
        str(figures.threads),
        report.seconds(figures.ours_seconds),
        report.seconds(figures.torch_seconds),
        f"{figures.ratio:.2f}",
        f"{work / figures.ours_seconds / 1e9:.1f} {unit}",
        share(figures.ours_seconds),
        share(figures.torch_seconds),
        report.mebibytes(figures.ours_extra_bytes),
        report.mebibytes(figures.torch_extra_bytes),
    ]


def write_csv(path: Path, results: list[tuple[Case, Figures]]) -> None:
    """Every figure, one line per case and thread count."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*asdict(results[0][0]), *asdict(results[0][1]), "ratio"])
        writer.writeheader()
        for case, figures in results:
            writer.writerow({**asdict(case), **asdict(figures), "ratio": figures.ratio})


def draw(path: Path, results: list[tuple[Case, Figures]]) -> None:
    """The throughput ratios over the number of keys, one panel per kind."""
    from matplotlib.figure import Figure

    kinds = sorted({case.kind for case, _ in results}, reverse=True)
    figure = Figure(figsize=(6 * len(kinds), 4.5), layout="constrained")
    for panel, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for dtype, marker in (("float32", "o"), ("bfloat16", "x")):
            for threads in sorted({figures.threads for _, figures in results}):
                points = [
                    (case.Sk, figures.ratio)
                    for case, figures in results
                    if (case.kind, case.dtype, figures.threads) == (kind, dtype, threads)
                ]
                if points:
                    panel.plot(*zip(*points, strict=True), marker, label=f"{dtype}, {threads} threads", alpha=0.7)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set(title=kind, xlabel="keys", ylabel="throughput over torch's", xscale="log", ylim=(0, None))
        panel.legend()
    figure.savefig(path, dpi=150)


NOTE = (
    "ratio: our throughput over torch's. ceiling: fp32 FMA peak of as many cores (prefill, backward), or torch's sum "
    "over a buffer as large as K and V (decode). backward: alone, its forward kept; its rate counts five products. "
    "memory: resident bytes that one call adds at its peak, result included."
)


def measure_all(chosen: list[Case], arguments: argparse.Namespace, console: Console) -> list[tuple[Case, Figures]]:
    """Figures of all cases with all thread counts, as far as they were accurate; says how far it got."""
    results = []
    start = time.perf_counter()
    runs = [(case, threads) for threads in arguments.threads for case in chosen]
    for number, (case, threads) in enumerate(runs, 1):
        figures = measure_case(case, threads, 0.3 if arguments.quick else 1.0)
        done = f"[{number}/{len(runs)}, {time.perf_counter() - start:.0f} s] {case.name}, {threads} threads"
        if figures is None:
            console.print(f"{done}: NOT ACCURATE, not timed")
            continue
        results.append((case, figures))
        console.print(f"{done}: ratio {figures.ratio:.2f}")
    return results


def run(arguments: argparse.Namespace, chosen: list[Case]) -> int:
    """The command on these cases. Returns 1 when a case was not accurate."""
    console = report.console()
    facts = machine.facts("cpu")
    for threads in arguments.threads:
        facts[f"FMA peak, fp32, {threads} threads"] = f"{machine.fma_peak(threads) / 1e9:.0f} GFLOP/s"
    report.print_facts(console, facts)
    results = measure_all(chosen, arguments, console)
    passed = len(results) == len(chosen) * len(arguments.threads)

    rows = [cells(*result) for result in results]
    grid = report.Grid("Time and memory beside torch's scaled_dot_product_attention", COLUMNS, rows=rows)
    grid.print(console)
    console.print(NOTE)
    if results and arguments.csv:
        write_csv(arguments.csv, results)
    if results and arguments.plot:
        draw(arguments.plot, results)
    if arguments.markdown:
        body = markdown.section("bench", facts, [grid.markdown(), NOTE], passed)
        markdown.write_section(arguments.markdown, markdown.CPU_BENCHMARK, body)
    return 0 if passed else 1
