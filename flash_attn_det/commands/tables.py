"""Tables of the GPU benchmark, and the ceilings that its figures are held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flash_attn_det.commands import machine, report
from flash_attn_det.commands.cases import CudaCase
from flash_attn_det.commands.figures import Result, groups
from flash_attn_det.commands.peers import LEGEND, OURS

NOTE = (
    "Medians of runs in turns, after the last and the middle rows of two heads were compared with float64. "
    "ours/X: our time over X's, below 1 is faster. In parentheses: X's rate, in the unit of ours. Rates: both products "
    "over the visible pairs, a backward's five, or K and V read once. of ceiling: the time that the matrix product or "
    "the copy above needs for as many operations or bytes, whichever is longer, over ours. error: largest against "
    "float64; that of the other libraries is the largest of theirs. A backward is timed alone, its forward kept: "
    "torch's autograd calls it. Its error is the root mean square of what dq, dk and dv of two heads differ from "
    "float64 by, over that of the gradient, the largest of the three; each of ours is at most 1.2 times FA2's, or not "
    "timed. FA2 deterministic: under torch.use_deterministic_algorithms. "
    "Prefills are timed by CUDA events, one call after the other; what the L2 cache keeps of one is nothing against "
    "them. Decode (also from pages) and few queries are timed inside CUDA graphs that repeat the call on the same "
    "inputs: K and V come from the L2 cache where the table says so, and from memory otherwise. " + LEGEND
)


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of the matrix product by dtype (bfloat16 also stands for float16), bytes/s of the copy, bytes of L2."""

    flops: dict[str, float]
    bandwidth: float
    l2_bytes: int

    def _floors(self, case: CudaCase) -> tuple[float, float]:
        dtype = "float32" if case.dtype == "float32" else "bfloat16"
        return case.flop / self.flops[dtype], case.kv_bytes / self.bandwidth

    def floor(self, case: CudaCase) -> float:
        """Seconds that the operations, or reading K and V from memory, take at the ceiling, whichever is longer."""
        return max(self._floors(case))

    def rate(self, case: CudaCase, seconds: float) -> tuple[float, str]:
        """TFLOP/s, or GB/s of K and V, whichever the ceiling is of."""
        operations, reading = self._floors(case)
        if operations >= reading:
            return case.flop / seconds / 1e12, "TFLOP/s"
        return case.kv_bytes / seconds / 1e9, "GB/s"

    def facts(self) -> dict[str, str]:
        """Lines for the head of a report."""
        side = machine.MATMUL_SIDE
        lines = {f"{dtype} {side}^3 matrix product": f"{rate / 1e12:.1f} TFLOP/s" for dtype, rate in self.flops.items()}
        return {**lines, "device copy": f"{self.bandwidth / 1e12:.2f} TB/s (bytes read and written)"}


def measure_ceilings(cases: list[CudaCase]) -> Ceilings:
    """Measured now, for the dtypes of these cases."""
    dtypes = ["bfloat16", *(["float32"] if any(case.dtype == "float32" for case in cases) else [])]
    flops = {dtype: machine.matmul_flops(getattr(torch, dtype)) for dtype in dtypes}
    return Ceilings(flops, machine.copy_bandwidth(), machine.l2_bytes())


def _where(case: CudaCase, ceilings: Ceilings) -> str:
    size = report.mebibytes(case.kv_bytes)
    return f"{size}, in L2" if case.kv_bytes <= ceilings.l2_bytes else size


def _peer_cells(result: Result, name: str, ceilings: Ceilings) -> list[str]:
    ours, figures = result.figures.get(OURS.name), result.figures.get(name)
    if figures is None:
        return ["-", "-"]
    rate, _ = ceilings.rate(result.case, figures.seconds)
    ratio = "-" if ours is None else f"{ours.seconds / figures.seconds:.2f}"
    return [f"{report.seconds(figures.seconds)} ({rate:.0f})", ratio]


def _row(result: Result, peers: list[str], ceilings: Ceilings) -> list[str]:
    case, ours = result.case, result.figures.get(OURS.name)
    cells = [case.shape, *([_where(case, ceilings)] if case.replay else [])]
    if ours is None:
        cells += ["-"] * 3
    else:
        rate, unit = ceilings.rate(case, ours.seconds)
        cells += [report.seconds(ours.seconds), f"{rate:.0f} {unit}", f"{ceilings.floor(case) / ours.seconds:.0%}"]
    for name in peers:
        cells += _peer_cells(result, name, ceilings)
    errors = [result.figures[name].error for name in peers if name in result.figures]
    return [*cells, "-" if ours is None else f"{ours.error:.1e}", f"{max(errors):.1e}" if errors else "-"]


def _time_grid(title: str, group: list[Result], ceilings: Ceilings) -> report.Grid:
    peers = list(dict.fromkeys(name for result in group for name in result.libraries if name != OURS.name))
    columns = ["case", *(["K and V"] if group[0].case.replay else []), "ours", "our rate", "of ceiling"]
    columns += [column for name in peers for column in (name, f"ours/{name}")]
    columns += ["our error", "others' error"]
    return report.Grid(title, columns, rows=[_row(result, peers, ceilings) for result in group])


def _memory_grid(results: list[Result]) -> report.Grid:
    peers = list(dict.fromkeys(name for result in results for name in result.libraries))
    rows = []
    for result in results:
        added = (result.figures.get(name) for name in peers)
        sizes = (report.mebibytes(None if figures is None else figures.extra_bytes) for figures in added)
        kind = "backward, " if result.case.kind == "backward" else ""
        rows.append(
            [f"{kind}{result.case.shape}, {result.case.dtype}", *sizes, report.mebibytes(result.case.memory_limit)]
        )
    return report.Grid(
        "Memory that a call adds at its peak, its result included", ["case", *peers, "allowed"], rows=rows
    )


def grids(results: list[Result], ceilings: Ceilings) -> list[report.Grid]:
    """One table for each group and dtype, and one of memory of backwards and where a case has a limit."""
    weighed = [result for result in results if result.case.memory_limit is not None or result.case.kind == "backward"]
    times = [_time_grid(title, group, ceilings) for title, group in groups(results).items()]
    return [*times, *([_memory_grid(weighed)] if weighed else [])]
