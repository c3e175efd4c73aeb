"""``flash-attn-det bench``: time and memory beside torch's scaled_dot_product_attention, in the same run.

Each library gets its inputs in its own natural layout: [B, S, H, D] here, contiguous [B, H, S, D] for torch. The two
are timed in turns, so that a slow phase of the machine meets both. A case whose accuracy is not that of its dtype is
reported and not timed.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import flash_attn_det as fad
from flash_attn_det.commands import machine, measure, report
from flash_attn_det.reference import attn_oracle

# Floating-point operations that a case may cost without --full: a second or two of one core.
LARGEST_FLOP = 6e11
# Rows, of the last head of the last sequence, that are compared with float64 before a case is timed.
CHECKED_ROWS = 32


@dataclass(frozen=True)
class Case:
    """One attention call: B sequences, Sq queries on Sk keys, Hq query heads on Hk key heads, head dim D."""

    kind: str
    dtype: str
    B: int
    Sq: int
    Sk: int
    Hq: int
    Hk: int
    D: int
    causal: bool

    @property
    def name(self) -> str:
        """The case in one short line."""
        heads = f"H {self.Hq}" if self.Hq == self.Hk else f"H {self.Hq}/{self.Hk}"
        mask = ", causal" if self.causal else ""
        return f"{self.kind} {self.dtype}, B {self.B}, L {self.Sk}, {heads}, D {self.D}{mask}"

    @property
    def flop(self) -> int:
        """Operations of both products over the visible pairs; an FMA counts as two."""
        pairs = self.Sq * (self.Sq + 1) // 2 if self.causal else self.Sq * self.Sk
        return 4 * self.B * self.Hq * pairs * self.D

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V, each read once."""
        return 2 * self.B * self.Sk * self.Hk * self.D * getattr(torch, self.dtype).itemsize

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, Sq, Hq, D], k and v [B, Sk, Hk, D] of normal noise, the same on every run."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(self.B, self.Sq, self.Hq), (self.B, self.Sk, self.Hk), (self.B, self.Sk, self.Hk)]
        q, k, v = (torch.randn(*s, self.D, generator=generator).to(getattr(torch, self.dtype)) for s in shapes)
        return q, k, v


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
    ceiling: float  # FLOP/s of FMAs for a prefill, bytes/s of reads for a decode

    @property
    def ratio(self) -> float:
        """Our throughput over torch's."""
        return self.torch_seconds / self.ours_seconds


def cases(quick: bool, full: bool) -> list[Case]:
    """The grid, decode after prefill. Without ``full``, the cases beyond LARGEST_FLOP are left out."""
    batches, lengths, heads = ((1,), (512, 2048), (8,)) if quick else ((1, 8), (512, 2048, 8192), (8, 32))
    head_dims = (64, 128)
    grid = [
        Case("prefill", dtype, B, L, L, H, H, D, causal)
        for dtype in ("float32", "bfloat16")
        for D in head_dims
        for H in heads
        for B in batches
        for L in lengths
        for causal in (False, True)
    ]
    grid += [
        Case("decode", dtype, 1, 1, L, 32, 8, D, False)
        for dtype in ("float32", "bfloat16")
        for D in head_dims
        for L in ((1024, 16384) if quick else (1024, 4096, 16384, 65536))
    ]
    return [case for case in grid if full or case.flop <= LARGEST_FLOP]


def accurate(ours: float, torchs: float, exact: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether our largest error is that of the dtype: at most four times torch's, or a few roundings of the output."""
    return ours <= max(4 * torchs, 4 * torch.finfo(dtype).eps * exact.abs().max().item())


def measure_case(case: Case, threads: int, seconds: float) -> Figures | None:
    """Check, then time one case with ``threads`` threads for about ``seconds``; None when it is not accurate."""
    q, k, v = case.tensors()
    q_t, k_t, v_t = (x.transpose(1, 2).contiguous() for x in (q, k, v))

    def ours() -> torch.Tensor:
        return fad.attn(q, k, v, causal=case.causal)

    def torchs() -> torch.Tensor:
        return scaled_dot_product_attention(q_t, k_t, v_t, is_causal=case.causal, enable_gqa=case.Hq != case.Hk)

    with torch.inference_mode(), measure.torch_threads(threads):
        last = slice(-CHECKED_ROWS, None)
        exact = attn_oracle(q[-1:, last, -1:], k[-1:, :, -1:], v[-1:, :, -1:], causal=case.causal)
        ours_error, _ = measure.error(ours()[-1:, last, -1:], exact)
        torch_error, _ = measure.error(torchs().transpose(1, 2)[-1:, last, -1:], exact)
        if not accurate(ours_error, torch_error, exact, q.dtype):
            return None
        ours_seconds, torch_seconds = measure.interleaved_medians([ours, torchs], seconds)
        prefill = case.kind == "prefill"
        return Figures(
            threads=threads,
            ours_seconds=ours_seconds,
            torch_seconds=torch_seconds,
            ours_error=ours_error,
            torch_error=torch_error,
            ours_extra_bytes=measure.peak_extra_bytes(ours),
            torch_extra_bytes=measure.peak_extra_bytes(torchs),
            ceiling=machine.fma_peak(threads) if prefill else machine.read_bandwidth(case.kv_bytes),
        )


COLUMNS = ["case", "threads", "ours", "torch", "ratio", "our rate", "of ceiling", "torch's", "our memory", "torch's"]


def cells(case: Case, figures: Figures) -> list[str]:
    """One row of the table with COLUMNS."""
    work, unit = (case.flop, "GFLOP/s") if case.kind == "prefill" else (case.kv_bytes, "GB/s")

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


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 when a case was not accurate, 2 when a plot is asked for without matplotlib."""
    console = report.console()
    if arguments.plot:
        try:
            import matplotlib  # noqa: F401  (before the measurements, not after)
        except ModuleNotFoundError:
            print("flash-attn-det bench --plot needs matplotlib: pip install 'flash-attn-det[bench]'", file=sys.stderr)
            return 2
    chosen = [
        case
        for case in cases(arguments.quick, arguments.full)
        if arguments.only in (None, case.kind) and arguments.dtype in (None, case.dtype)
    ]
    for name, value in machine.facts().items():
        console.print(f"{name}: {value}")
    for threads in arguments.threads:
        console.print(f"FMA peak, fp32, {threads} threads: {machine.fma_peak(threads) / 1e9:.0f} GFLOP/s")

    grid = report.Grid("Time and memory beside torch's scaled_dot_product_attention", COLUMNS)
    results, inaccurate = [], []
    start = time.perf_counter()
    total = len(chosen) * len(arguments.threads)
    for threads in arguments.threads:
        for case in chosen:
            figures = measure_case(case, threads, 0.3 if arguments.quick else 1.0)
            done = f"[{len(results) + len(inaccurate) + 1}/{total}, {time.perf_counter() - start:.0f} s]"
            if figures is None:
                inaccurate.append(case)
                console.print(f"{done} {case.name}, {threads} threads: NOT ACCURATE, not timed")
                continue
            results.append((case, figures))
            grid.rows.append(cells(case, figures))
            console.print(f"{done} {case.name}, {threads} threads: ratio {figures.ratio:.2f}")

    grid.print(console)
    console.print(
        "ratio: our throughput over torch's. ceiling: fp32 FMA peak of as many cores (prefill), or torch's sum over a "
        "buffer as large as K and V (decode). memory: resident bytes that one call adds at its peak, result included."
    )
    if results and arguments.csv:
        write_csv(arguments.csv, results)
    if results and arguments.plot:
        draw(arguments.plot, results)
    return 1 if inaccurate else 0
