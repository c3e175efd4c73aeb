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


def _event_pair(call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    return start, end


def _event_samples(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each call in each round, the calls in turns; the host runs ahead and waits at the end."""
    pairs = [[_event_pair(call) for call in calls] for _ in range(rounds)]
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) / 1e3 for start, end in taken] for taken in zip(*pairs, strict=True)]


def cuda_medians(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median seconds of each call between two CUDA events, in turns, in about ``seconds``; at least 5 rounds.

    The time of a call that the GPU finishes before the host has prepared the next one includes that wait.
    """
    _event_samples(calls, 2)  # warms up
    estimate = sum(map(statistics.median, _event_samples(calls, 3)))
    rounds = max(5, min(100, int(seconds / estimate)))
    return [statistics.median(taken) for taken in _event_samples(calls, rounds)]


def capture(call: Callable[[], object], count: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph that holds a call ``count`` times.

    The call must have run before: what happens only once cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return graph


def replay_medians(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median seconds of each call inside a CUDA graph, in turns, in about ``seconds``: no host work in between.

    A graph holds the call as often as fits into some milliseconds, at most 50 times, so that its launch does not count.
    """
    _event_samples(calls, 2)
    counts = [max(1, min(50, int(5e-3 / statistics.median(taken)))) for taken in _event_samples(calls, 3)]
    graphs = [capture(call, count) for call, count in zip(calls, counts, strict=True)]
    medians = cuda_medians([graph.replay for graph in graphs], seconds)
    return [taken / count for taken, count in zip(medians, counts, strict=True)]


def cuda_peak_extra_bytes(call: Callable[[], object]) -> int:
    """Bytes that one call adds to torch's CUDA memory at its peak, its result included."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def error(result: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference of ``result`` from ``exact``, in float64. NaN stays NaN."""
    difference = result.double() - exact.double()
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def accurate(largest: float, others: float, exact: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a largest error is that of the dtype: at most four times another's, or a few roundings of the output."""
    return largest <= max(4 * others, 4 * torch.finfo(dtype).eps * exact.abs().max().item())
