"""One case of the GPU benchmark: ours and its peers are checked against float64, then timed in turns."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from flash_attn_det.commands import contest_backward, measure
from flash_attn_det.commands.cases import CudaCase
from flash_attn_det.commands.figures import Figures, Result, summary
from flash_attn_det.commands.peers import OURS, Peer, refused
from flash_attn_det.commands.prepared import Prepared
from flash_attn_det.reference import attn_oracle

# Rows of one head that are compared with float64: the last ones, and as many from the middle.
CHECKED_ROWS = 32


def _sequence(case: CudaCase, x: torch.Tensor, b: int) -> torch.Tensor:
    """Rows [S, H, D] of sequence b."""
    return x[slice(*case.starts()[b : b + 2])] if case.packed else x[b]


def checked(case: CudaCase) -> list[tuple[int, int, slice]]:
    """Sequence, head and rows of what is compared with float64: the first head of the first, the last of the last."""
    parts = []
    for b, h in ((0, 0), (len(case.lengths) - 1, case.Hq - 1)):
        n, _ = case.lengths[b]
        for end in sorted({n, max(n // 2, 1)}):
            parts.append((b, h, slice(max(0, end - CHECKED_ROWS), end)))
    return parts


def exact(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention in float64 of the checked rows, one after the other: [rows, D]."""
    results = []
    for b, h, rows in checked(case):
        n, keys = case.lengths[b]
        visible = keys - n + rows.stop if case.causal else keys
        group = h // (case.Hq // case.Hk)
        q_b = _sequence(case, q, b)[None, rows, h : h + 1]
        k_b, v_b = (_sequence(case, x, b)[None, :visible, group : group + 1] for x in (k, v))
        results.append(attn_oracle(q_b, k_b, v_b, causal=case.causal)[0, :, 0])
    return torch.cat(results)


def error(case: CudaCase, out: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error of out, in the layout of ours, over the checked rows."""
    return measure.error(torch.cat([_sequence(case, out, b)[rows, h] for b, h, rows in checked(case)]), expected)[0]


def _enter(result: Result, peer: Peer, inputs: tuple[torch.Tensor, ...], expected: torch.Tensor) -> Prepared | None:
    """Prepare and run one library once, and keep its error; None when it raises, which the result then explains."""
    case = result.case
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            prepared = peer.prepare(case, *inputs)
            largest = error(case, prepared.rows(prepared.call()), expected)
            if case.replay:
                measure.capture(prepared.call)
            added = measure.cuda_peak_extra_bytes(prepared.call)
        except Exception as problem:  # of any library, so of any kind; it is shown
            result.missing[peer.name] = refused(problem, warned)
            return None
    result.figures[peer.name] = Figures(float("nan"), largest, added)
    return prepared


def _drop_inaccurate(result: Result, expected: torch.Tensor) -> None:
    errors = {name: figures.error for name, figures in result.figures.items()}
    for name, largest in errors.items():
        others = [other for key, other in errors.items() if key != name and other == other]
        dtype = getattr(torch, result.case.dtype)
        if not measure.accurate(largest, min(others, default=0.0), expected, dtype):
            del result.figures[name]
            result.missing[name] = f"not accurate, not timed: largest error {largest:.1e} against float64"


def measure_case(case: CudaCase, peers: list[Peer], seconds: float) -> Result:
    """Check ours and the peers that run this case, then time those that are accurate for about ``seconds``."""
    contenders = [OURS, *(peer for peer in peers if peer.runs(case))]
    result = Result(case, [peer.name for peer in contenders])
    with torch.inference_mode():
        inputs = case.tensors()
        expected = exact(case, *inputs)
        prepared = {peer.name: _enter(result, peer, inputs, expected) for peer in contenders}
        _drop_inaccurate(result, expected)
        names = list(result.figures)
        medians = measure.replay_medians if case.replay else measure.cuda_medians
        taken = medians([prepared[name].call for name in names], seconds) if names else []
    for name, median in zip(names, taken, strict=True):
        result.figures[name] = replace(result.figures[name], seconds=median)
    return result


def measure_cases(
    cases: list[CudaCase], peers: list[Peer], seconds: float, progress: Callable[[str], None]
) -> list[Result]:
    """All cases, each of which gives its memory back before the next; ``progress`` gets a line for each."""
    results = []
    start = time.perf_counter()
    for number, case in enumerate(cases, 1):
        if case.kind == "backward":
            results.append(contest_backward.measure_case(case, contest_backward.peers(), seconds / 2))
        else:
            results.append(measure_case(case, peers, seconds))
        torch.cuda.empty_cache()
        done = f"[{number}/{len(cases)}, {time.perf_counter() - start:.0f} s] {case.name}"
        progress(f"{done}: {summary(results[-1])}")
    return results
