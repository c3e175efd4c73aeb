"""Time, memory and accuracy of attention calls, measured the same way for every library."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run the body with ``count`` threads in torch's pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved_medians(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median seconds of each call, taken in turns so that a slow phase of the machine meets all of them alike.

    Runs rounds until ``seconds`` are over, at least 3 and at most 100. A call shorter than a millisecond is repeated
    inside one sample until the sample is long enough for the clock.
    """
    repeats = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        repeats.append(max(1, int(1e-3 / (time.perf_counter() - start))))
    samples: list[list[float]] = [[] for _ in calls]
    deadline = time.perf_counter() + seconds
    while len(samples[0]) < 3 or (time.perf_counter() < deadline and len(samples[0]) < 100):
        for call, repeat, taken in zip(calls, repeats, samples, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            taken.append((time.perf_counter() - start) / repeat)
    return [statistics.median(taken) for taken in samples]


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_extra_bytes(call: Callable[[], object]) -> int | None:
    """Resident bytes that one call adds at its peak, its result included; None where Linux does not let us reset it.

    Counts pages of the process, so that it sees every allocation of every library, whoever made it.
    """
    call()
    reset = Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
    except (OSError, AttributeError):
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def error(result: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference of ``result`` from ``exact``, in float64. NaN stays NaN."""
    difference = result.double() - exact.double()
    return difference.abs().max().item(), difference.square().mean().sqrt().item()
