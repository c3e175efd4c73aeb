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
from flash_attn_det.commands import CannotRun, measure


def cpu_model() -> str:
    """The processor's own name, or the architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """The commit of the checkout in the working directory, marked when files other than the report differ from it.

    Of a copy of a checkout, whose history is not that of the source, FLASH_ATTN_DET_COMMIT tells it.
    """
    told = os.environ.get("FLASH_ATTN_DET_COMMIT")
    if told:
        return f"{told}, as FLASH_ATTN_DET_COMMIT says"
    if not Path("csrc/flash_attn_det.h").exists() or shutil.which("git") is None:
        return "not run from a checkout"
    described = _git("describe", "--always", "--abbrev=12", "--exclude=*")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!VERIFIED_RESULTS.md")
    return "not run from a checkout" if described is None else described + (", with local changes" if changes else "")


def devices(asked: str | None) -> list[str]:
    """The device that was asked for, or all that torch can use here. Raises CannotRun for a GPU that is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise CannotRun("--device cuda needs a CUDA GPU that torch can use: torch.cuda.is_available() is False")
    return [asked] if asked else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def driver() -> str:
    """Version of the NVIDIA driver, as its own tool tells it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown: nvidia-smi is not on the PATH"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown: nvidia-smi failed"


def l2_bytes() -> int:
    """Size of the current GPU's L2 cache."""
    return torch.cuda.get_device_properties().L2_cache_size


def _processor_facts() -> dict[str, str]:
    return {
        "processor": f"{cpu_model()}, {os.cpu_count()} logical cores",
        "instruction sets": f"{', '.join(_schedule.isas())} (best first)",
        "FLASH_ATTN_DET_ISA": os.environ.get("FLASH_ATTN_DET_ISA", "not set"),
    }


def _gpu_facts() -> dict[str, str]:
    gpu = torch.cuda.get_device_properties()
    memory, l2 = f"{gpu.total_memory / 2**30:.0f} GiB", f"{l2_bytes() / 2**20:.0f} MiB"
    return {
        "GPU": f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
        f"{memory}, L2 cache {l2}",
        "driver": driver(),
        "CUDA": f"{torch.version.cuda} (torch's), cuDNN {torch.backends.cudnn.version()}",
        "processor": f"{cpu_model()}, {os.cpu_count()} logical cores",
    }


def facts(device: str) -> dict[str, str]:
    """Machine, software and settings, in the order in which they are printed."""
    contract = fad.contract()
    return {
        **(_gpu_facts() if device == "cuda" else _processor_facts()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "load": f"{os.getloadavg()[0]:.1f} processes in the last minute, before this one",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "flash_attn_det": fad.__version__,
        "contract": ", ".join(f"{name} {value}" for name, value in contract.items()),
        "split size": f"{fad.get_split_size()} (fma), {fad.get_split_size('mma')} (mma)",
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


# The matrix product and the copy that a GPU's ceilings are taken from.
MATMUL_SIDE = 8192
COPY_BYTES = 1 << 32


@functools.cache
def matmul_flops(dtype: torch.dtype) -> float:
    """FLOP per second of torch's square matrix product on the GPU; float32 without TF32."""
    a, b = (torch.randn(MATMUL_SIDE, MATMUL_SIDE, device="cuda", dtype=dtype) for _ in range(2))
    (seconds,) = measure.cuda_medians([lambda: a @ b], 0.03)  # short, as clocks fall when it lasts
    return 2 * MATMUL_SIDE**3 / seconds


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy inside the GPU's memory."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    (seconds,) = measure.cuda_medians([lambda: target.copy_(source)], 0.05)
    return 2 * COPY_BYTES / seconds
