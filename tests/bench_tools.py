"""Small cases of the benchmark, and figures that are made up."""

from __future__ import annotations

from dataclasses import replace

from flash_attn_det.commands import cases, tables
from flash_attn_det.commands.figures import Figures, Result

SMALL = cases.Case("prefill", "float32", 1, 64, 64, 4, 2, 16, True)
SMALL_DECODE = cases.Case("decode", "bfloat16", 1, 1, 300, 4, 2, 16, False)
SMALL_BACKWARD = cases.Case("backward", "bfloat16", 2, 64, 64, 4, 2, 16, True)
CUDA_SMALL = cases.CudaCase("prefill", "bfloat16", 2, 40, 40, 4, 2, 16, True)
CUDA_DECODE = cases.CudaCase("decode", "bfloat16", 2, 1, 300, 4, 2, 16, False, replay=True)
CUDA_PAGED = replace(CUDA_DECODE, kind="paged", page_size=16)
CUDA_PACKED = cases.CudaCase("short", "float32", 3, 70, 70, 2, 2, 16, True, packed=(70, 1, 33))
CEILINGS = tables.Ceilings({"bfloat16": 800e12, "float32": 50e12}, bandwidth=3e12, l2_bytes=50 << 20)
CUDA_BACKWARD = cases.CudaCase("backward", "bfloat16", 2, 300, 300, 4, 2, 64, True)


def figures(microseconds: float, error: float = 1e-3, extra_bytes: int = 1 << 20) -> Figures:
    return Figures(microseconds * 1e-6, error, extra_bytes)


def results() -> list[Result]:
    limited = replace(CUDA_SMALL, kind="fork", memory_limit=1 << 20)
    return [
        Result(CUDA_SMALL, ["ours", "FA2", "cuDNN"], {"ours": figures(3), "FA2": figures(2, 2e-3)}, {"cuDNN": "no"}),
        Result(CUDA_DECODE, ["ours", "FA2"], {"FA2": figures(20)}, {"ours": "not today"}),
        Result(
            replace(CUDA_DECODE, Sk=301), ["ours", "FA2", "cuDNN"], {"ours": figures(5)}, {"FA2": "a", "cuDNN": "no"}
        ),
        Result(limited, ["ours", "FA2"], {"ours": figures(1, 0.0, 2 << 20), "FA2": figures(1)}),
    ]
