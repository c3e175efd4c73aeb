"""What this machine is and what it can reach: facts for the reports, ceilings for the benchmark."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import flash_attn_det as fad
from flash_attn_det import _library, _schedule


def cpu_model() -> str:
    """The processor's own name, or the architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """The commit of the checkout in the working directory, marked when files differ from it."""
    if not Path("csrc/flash_attn_det.h").exists() or shutil.which("git") is None:
        return "not run from a checkout"
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=, with local changes", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() if described.returncode == 0 else "not run from a checkout"


def facts() -> dict[str, str]:
    """Machine, software and settings, in the order in which they are printed."""
    contract = fad.contract()
    return {
        "processor": f"{cpu_model()}, {os.cpu_count()} logical cores",
        "instruction sets": f"{', '.join(_schedule.isas())} (best first)",
        "FLASH_ATTN_DET_ISA": os.environ.get("FLASH_ATTN_DET_ISA", "not set"),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "load": f"{os.getloadavg()[0]:.1f} processes in the last minute, before this one",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "flash_attn_det": fad.__version__,
        "contract": ", ".join(f"{name} {value}" for name, value in contract.items()),
        "split size": str(fad.get_split_size()),
        "commit": commit(),
    }


def read_bandwidth(size_bytes: int) -> float:
    """Bytes per second that torch's own sum reads from a buffer of ``size_bytes``, with torch's current threads.

    The same size as the case that it is the ceiling of, because a small buffer stays in the caches.
    """
    buffer = torch.ones(max(size_bytes // 4, 1), dtype=torch.float32)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return buffer.numel() * 4 / best


@functools.cache
def fma_peak(threads: int) -> float:
    """fp32 FLOP per second of independent FMAs from registers, on ``threads`` cores at once."""
    iterations = (
        5_000_000  # milliseconds: starting a thread is nothing against them, and other work rarely hits them all
    )
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(40):
            start = time.perf_counter()
            flops = sum(pool.map(_library.fma_flops, [iterations] * threads))
            best = max(best, flops / (time.perf_counter() - start))
    return best
