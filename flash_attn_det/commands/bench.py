"""``flash-attn-det bench``: time, accuracy and memory beside other attentions, on the CPU or an NVIDIA GPU."""

from __future__ import annotations

import argparse
import importlib.util

from flash_attn_det.commands import CannotRun, bench_cpu, bench_cuda, machine
from flash_attn_det.commands.cases import Case, cpu_cases, cuda_cases

NO_MATPLOTLIB = "--plot needs matplotlib: pip install 'flash-attn-det[bench]'"
# Options that only one device knows.
CPU_OPTIONS, CUDA_OPTIONS = ("full", "threads"), ("flex",)
DEFAULT_THREADS = [1, 2]


def chosen_cases(device: str, arguments: argparse.Namespace) -> list[Case]:
    """The device's cases that the options leave; CannotRun for the other device's options, or if none is left."""
    for option in CUDA_OPTIONS if device == "cpu" else CPU_OPTIONS:
        if getattr(arguments, option):
            raise CannotRun(f"--{option} says nothing about --device {device}")
    cases = cpu_cases(arguments.quick, arguments.full) if device == "cpu" else cuda_cases()
    if device == "cuda" and arguments.quick:
        cases = [case for case in cases if case.quick]
    kinds = dict.fromkeys(case.kind for case in cases)
    left = [
        case
        for case in cases
        if (arguments.only is None or case.kind in arguments.only) and arguments.dtype in (None, case.dtype)
    ]
    if not left:
        raise CannotRun(
            f"no case is left: --device {device} has the groups {', '.join(kinds)} "
            f"in {', '.join(sorted({case.dtype for case in cases}))}"
        )
    return left


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 when a case was not accurate; raises CannotRun before anything is measured."""
    device = machine.devices(arguments.device)[-1]
    chosen = chosen_cases(device, arguments)
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise CannotRun(NO_MATPLOTLIB)
    if device == "cuda":
        return bench_cuda.run(arguments, chosen)
    arguments.threads = arguments.threads or DEFAULT_THREADS
    return bench_cpu.run(arguments, chosen)
