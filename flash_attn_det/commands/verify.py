"""``flash-attn-det verify``: what holds on this machine, as tables. Exit code 1 when anything fails.

Each device is a part of its own: its invariance claims for each arithmetic family, its accuracy, a few timed cases.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console

import flash_attn_det as fad
from flash_attn_det.commands import (
    backends,
    bench_cpu,
    bench_cuda,
    claims,
    claims_cpu,
    claims_cuda,
    claims_gradients,
    contest,
    invariance,
    machine,
    markdown,
    measure,
    report,
    tables,
)
from flash_attn_det.commands.backends import Backend
from flash_attn_det.commands.cases import Case, cuda_cases
from flash_attn_det.commands.figures import reasons
from flash_attn_det.commands.libraries import Torch, flash_first
from flash_attn_det.commands.peers import peers
from flash_attn_det.reference import attn_oracle

INVARIANCE_NOTE = (
    "differ: elements of out and lse, or of the gradients of q, k and v, whose bits differ between the forms that the "
    "line names; must be 0. "
    "torch: the same comparison with scaled_dot_product_attention on the same inputs (without lse; on a GPU its flash "
    "kernel where that takes the call), in the case where the largest share differs; where that is 0 or has no such "
    "form, the next column speaks alone. "
    f"other split size: share that changes when splits of {backends.SPLIT} keys, which the claims are checked with, "
    f"become splits of {backends.BLOCK}, in the case where it is smallest; above 0, or the inputs are too tame to "
    "prove anything."
)
ACCURACY_NOTE = (
    "Largest and root-mean-square error of out against dense attention in float64, on the same inputs. torch: its "
    "flash kernel where that takes the dtype."
)
TIME_NOTE = (
    "ratio: our throughput over torch's, medians of runs in turns. of ceiling: share of the fp32 FMA peak (prefill, "
    "backward) or of the bandwidth of torch's sum over a buffer as large as K and V (decode). A backward is timed "
    "without its forward, if each gradient is at most 1.2 times as far from float64 as torch's. memory: resident "
    "bytes that one call adds at its peak, result included. The full grid: flash-attn-det bench."
)
CUDA_TIME_NOTE = f"{tables.NOTE} All cases: flash-attn-det bench."

BITS_COLUMNS = ["invariance: same bits in", "compared", "differ", "torch", "other split size", "time", "verdict"]
ACCURACY_COLUMNS = ["case", "ours, max", "ours, rms", "torch, max", "torch, rms", "verdict"]

CHECKS = {
    backends.CPU: [*claims.CHECKS, *claims_cpu.CHECKS, *claims_gradients.CPU_CHECKS],
    backends.CUDA_MMA: [*claims.CHECKS, *claims_cuda.MMA_CHECKS, *claims_gradients.MMA_CHECKS],
    backends.CUDA_FMA: [*claims.CHECKS, *claims_cuda.FMA_CHECKS, *claims_gradients.FMA_CHECKS],
}
CPU_TIMED = [
    *(
        Case("prefill", dtype, 1, 2048, 2048, 8, 8, 64, causal)
        for dtype in ("float32", "bfloat16")
        for causal in (False, True)
    ),
    *(Case("decode", dtype, 1, 1, 16384, 32, 8, 128, False) for dtype in ("float32", "bfloat16")),
    *(Case("backward", dtype, 1, 1024, 1024, 8, 8, 64, True) for dtype in ("float32", "bfloat16")),
]
CUDA_TIMED = [case for case in cuda_cases() if case.quick]


@dataclass(frozen=True)
class Accuracy:
    """One line of the accuracy table. ``spread`` multiplies the queries, so that 30 makes logits in the hundreds."""

    label: str
    dtype: torch.dtype
    Sq: int
    Sk: int
    spread: float = 1.0


def accuracy_cases(backend: Backend) -> list[Accuracy]:
    """Every dtype of the backend, with few and with many keys, and with logits that float32 hardly holds."""
    return [
        Accuracy(f"{label}, {backends.dtype_name(dtype)}", dtype, Sq, Sk, spread)
        for label, Sq, Sk, spread in (
            ("prefill, 1000 keys", 1000, 1000, 1.0),
            ("decode, 8192 keys", 1, 8192, 1.0),
            ("huge logits, 1000 keys", 1000, 1000, 30.0),
        )
        for dtype in backend.dtypes
    ]


@dataclass
class Part:
    """What is found on one device: tables with their notes, and what failed. ``say`` gets a line for each step."""

    say: Callable[[str], None]
    sections: list[tuple[report.Grid, str]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def body(self) -> list[str]:
        """Tables and notes as markdown; a note that several tables share follows the last of them."""
        parts = []
        for index, (grid, note) in enumerate(self.sections):
            parts.append(grid.markdown())
            if index + 1 == len(self.sections) or self.sections[index + 1][1] != note:
                parts.append(note)
        return parts


def _verdict(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def check_invariance(check: invariance.Check, backend: Backend) -> tuple[list[str], list[str]]:
    """Table row, and details of the failures, of one check."""
    start = time.perf_counter()
    outcome = invariance.evaluate(check, backend)
    row = [
        outcome.title,
        f"{outcome.compared:,}",
        f"{outcome.differ:,}",
        "no such form" if outcome.torch_share is None else f"{outcome.torch_share:.2%}",
        f"{outcome.other_split_share:.2%}",
        report.seconds(time.perf_counter() - start),
        _verdict(outcome.passed),
    ]
    return row, [f"{check.title}: {failure}" for failure in outcome.failures]


def check_accuracy(case: Accuracy, backend: Backend) -> tuple[list[str], bool]:
    """Table row and verdict of one accuracy case."""
    generator = torch.Generator().manual_seed(3)
    lengths = (case.Sq, case.Sk, case.Sk)
    q, k, v = (torch.randn(1, rows, 4, 64, generator=generator, dtype=torch.float64) for rows in lengths)
    q, k, v = (x.to(backend.device, case.dtype) for x in (q * case.spread, k, v))
    with torch.inference_mode(), flash_first(backend.device):
        # The rows that see the most keys; dense float64 for all of them takes gigabytes.
        last = slice(-bench_cpu.CHECKED_ROWS, None)
        exact = attn_oracle(q[:, last], k, v, causal=True)
        ours = measure.error(fad.attn(q, k, v, causal=True, arithmetic=backend.arithmetic)[:, last], exact)
        torchs = measure.error(Torch().attend(q, k, v, causal=True).out[:, last], exact)
    passed = measure.accurate(ours[0], torchs[0], exact, case.dtype)
    return [case.label, *(f"{value:.2e}" for value in (*ours, *torchs)), _verdict(passed)], passed


def check_bits(part: Part, backend: Backend) -> None:
    """All claims of one backend."""
    grid = report.Grid(f"Bits, {backend.name}", BITS_COLUMNS)
    part.sections.append((grid, INVARIANCE_NOTE))
    checks = [check for check in CHECKS[backend] if check.claimed()]
    for number, check in enumerate(checks, 1):
        row, failures = check_invariance(check, backend)
        grid.rows.append(row)
        part.failures += [f"{backend.name}, {failure}" for failure in failures]
        done = f"[{number:2}/{len(checks)}] {backend.arithmetic}, {row[0]}"
        part.say(f"{done}: {row[2]} of {row[1]} elements differ, {row[-1]}, {row[-2]}")


def check_accuracies(part: Part, backend: Backend) -> None:
    """The accuracy table of one backend."""
    grid = report.Grid(f"Accuracy, {backend.name}", ACCURACY_COLUMNS)
    part.sections.append((grid, ACCURACY_NOTE))
    for case in accuracy_cases(backend):
        row, passed = check_accuracy(case, backend)
        grid.rows.append(row)
        part.failures += [] if passed else [f"{backend.name}, {case.label}: not accurate"]
        part.say(f"{backend.arithmetic}, {row[0]}: largest error {row[1]}, torch's {row[3]}, {row[-1]}")


def time_cpu(part: Part) -> None:
    """Timed cases on the CPU; they fail when they are not accurate, never for being slow."""
    grid = report.Grid("Time and memory", bench_cpu.COLUMNS)
    part.sections.append((grid, TIME_NOTE))
    for case in CPU_TIMED:
        figures = bench_cpu.measure_case(case, torch.get_num_threads(), seconds=1.0)
        if figures is None:
            part.failures.append(f"{case.name}: not accurate")
            continue
        grid.rows.append(bench_cpu.cells(case, figures))
        part.say(f"{case.name}: {grid.rows[-1][2]}, torch {grid.rows[-1][3]}")


def time_cuda(part: Part) -> None:
    """The quick cases of the GPU benchmark."""
    ceilings = tables.measure_ceilings(CUDA_TIMED)
    part.facts |= ceilings.facts()
    for name, value in ceilings.facts().items():
        part.say(f"{name}: {value}")
    results = contest.measure_cases(CUDA_TIMED, peers(flex=False), bench_cuda.QUICK_SECONDS, part.say)
    note = "\n\n".join([CUDA_TIME_NOTE, *reasons(results)])
    part.sections += [(grid, note) for grid in tables.grids(results, ceilings)]
    part.failures += [failure for result in results for failure in result.failures]


def verify(device: str, console: Console) -> Part:
    """Everything that is claimed of one device, printed as it is found."""
    part = Part(console.print, facts=machine.facts(device))
    report.print_facts(console, part.facts)
    with console.status("comparing bits"):
        for backend in backends.BACKENDS[device]:
            check_bits(part, backend)
    with console.status("comparing with float64"):
        for backend in backends.BACKENDS[device]:
            check_accuracies(part, backend)
    with console.status("timing"):
        (time_cuda if device == "cuda" else time_cpu)(part)
    for grid, _ in part.sections:
        console.print()
        grid.print(console)
    for note in dict.fromkeys(note for _, note in part.sections):
        console.print(note)
    for failure in part.failures:
        console.print(f"FAILED {failure}")
    return part


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 when a check failed on any device."""
    console = report.console()
    titles = {"cpu": markdown.CPU, "cuda": markdown.GPU}
    passed = True
    for device in machine.devices(arguments.device):
        console.print(f"flash-attn-det verify: {titles[device]}")
        part = verify(device, console)
        passed &= not part.failures
        if arguments.markdown:
            body = markdown.section("verify", part.facts, part.body, not part.failures)
            markdown.write_section(arguments.markdown, titles[device], body)
            console.print(f"Wrote section '{titles[device]}' of {arguments.markdown}.")
        console.print()
    console.print("Everything passed." if passed else "Something FAILED.")
    return 0 if passed else 1
