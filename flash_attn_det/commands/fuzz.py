"""``flash-attn-det fuzz``: random calls on a GPU against their emulation on the CPU, bit by bit, until one differs.

Without a GPU the CPU fuzzes itself: the emulation with vectors against that of every other instruction set, among them
the scalar one, which is the definition. Exit code 1 at the first difference, with the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count, product

import torch

from flash_attn_det import _schedule, ops
from flash_attn_det.attention import _arguments
from flash_attn_det.audit import _arithmetic_of
from flash_attn_det.commands import CannotRun, machine, measure, report
from flash_attn_det.commands.fuzz_calls import Call, draw_call
from flash_attn_det.testing import assert_bits_equal, bits_differ

# Elements that the rows of a call read: a tenth of a second of the emulation with vectors; the scalar one gets less.
COST = {"cuda": 1 << 26, "cpu": 1 << 20}
REPORT_SECONDS = 5.0
_NO_OPTIONS = {"window": (-1, -1), "softcap": 0.0, "alibi_slopes": None, "sinks": None}

Results = dict[str, torch.Tensor]


def compute(call: Call, arithmetic: str, backward: bool) -> Results:
    """out and lse and, with backward, the gradients of q, k, v and sinks, without padding of head dims."""
    arguments = _arguments(
        call.q, call.k, call.v, **{**_NO_OPTIONS, **call.options}, cu_seqlens=call.packed, arithmetic=arithmetic,
        differentiable=True,
    )  # fmt: skip
    out, lse = ops.call(ops.fwd, *arguments)
    results = {"out": out[..., : call.v.shape[-1]], "lse": lse}
    if backward:
        dout = call.dout if out.shape == call.dout.shape else ops.for_tensor_cores(call.dout)
        given = (*arguments[: ops.N_TENSORS], dout, out, lse, call.dlse, *arguments[ops.N_TENSORS :])
        dq, dk, dv, results["d_sinks"] = ops.call(ops.bwd, *given)
        for name, gradient, x in (("dq", dq, call.q), ("dk", dk, call.k), ("dv", dv, call.v)):
            results[name] = gradient[..., : x.shape[-1]]
    return results


def schedules(device: str) -> dict[str, dict[str, object]]:
    """What the device can be told to run a call with: all of it must give the same bits."""
    if device == "cpu":
        return {isa: {"isa": isa} for isa in _schedule.isas()[1:]} or {"again": {}}
    kernels = [("generic", 16), ("generic", 64), ("generic", 128), ("hopper", 16), ("hopper", 128), ("cluster", 16)]
    forced = {
        f"{kernel} {rows} {'spilled' if split else 'folded'}": {
            "kernel": kernel,
            "tile_rows": rows,
            "split_parallel": split,
        }
        for (kernel, rows), split in product(kernels, (False, True))
    }
    return {"its own choice": {}, **forced}


def first_difference(actual: Results, expected: Results) -> str | None:
    """The first element whose bits differ, in words."""
    for name, want in expected.items():
        got = actual[name]
        if got.numel() and torch.equal(*(x.contiguous().view(torch.uint8) for x in (got, want))):
            continue
        try:
            assert_bits_equal(got, want, name)
        except AssertionError as error:
            return str(error)
    return None


@dataclass
class Tally:
    """What was compared so far. control: elements of out and lse that differ where the fma family computes the
    same call."""

    calls: int = 0
    rows: int = 0
    finite: int = 0  # rows of numbers that are finite and not all zero
    control: int = 0

    def add(self, call: Call, expected: Results, other: Results) -> None:
        """A call whose bits were equal."""
        out = expected["out"]
        self.calls += 1
        self.rows += call.rows
        self.finite += int((out.isfinite().all(-1) & (out != 0).any(-1)).sum())
        self.control += sum(bits_differ(expected[name], result) for name, result in other.items())

    def __str__(self) -> str:
        return f"{self.rows:,} rows of {self.calls:,} calls: all bits equal"


def emulated(seed: int, first: int, cost: int, arithmetic: str, backward: bool, threads: int) -> Iterator[tuple]:
    """(number, call, results) of call after call, computed ahead by as many threads of one core each."""

    def work(number: int) -> tuple[int, Call, Results]:
        call = draw_call(seed, number, cost)
        return number, call, compute(call, arithmetic, backward)

    waiting: deque[Future] = deque()
    with measure.torch_threads(1), ThreadPoolExecutor(threads) as pool:
        try:
            for number in count(first):
                waiting.append(pool.submit(work, number))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def compare(call: Call, expected: Results, device: str, arithmetic: str, backward: bool) -> str | None:
    """None, or the schedule of the device and the element that differ first."""
    call, expected = call.to(device), {name: want.to(device) for name, want in expected.items()}
    for name, schedule in schedules(device).items():
        again = bool(schedule.get("split_parallel"))  # has no meaning for the backward on a GPU
        with _schedule.forced(**schedule):
            results = compute(call, arithmetic, backward and not again)
        difference = first_difference(results, {of: expected[of] for of in results})
        if difference is not None:
            return f"{name}: {difference}"
    return None


def arithmetics(device: str) -> tuple[str, str]:
    """What the device is told to compute, and what the CPU's name for that is."""
    if device == "cpu":
        return "mma_sm90", "mma_sm90"
    try:
        return "mma", _arithmetic_of("mma", torch.empty(0, dtype=torch.float16, device=device))
    except NotImplementedError as error:
        raise CannotRun(str(error)) from None


def fuzz(arguments: argparse.Namespace, device: str, say: Callable[[str], None]) -> tuple[Tally, str | None]:
    """Compare until there are enough rows, or until one differs, which is told with how to repeat it."""
    there, here = arithmetics(device)
    tally, start, said = Tally(), time.perf_counter(), 0.0
    stream = emulated(arguments.seed, arguments.first, COST[device], here, arguments.backward, arguments.threads)
    with closing(stream):
        for number, call, expected in stream:
            difference = compare(call, expected, device, there, arguments.backward)
            if difference is not None:
                again = f"flash-attn-det fuzz --device {device} --seed {arguments.seed} --first {number} --rows 1"
                again += " --backward" if arguments.backward else ""
                return tally, f"call {number}, {call.label}\n{difference}\nrepeat with: {again}"
            tally.add(call, expected, compute(call.to(device), "fma", False))
            seconds = time.perf_counter() - start
            if tally.rows >= arguments.rows or seconds - said >= REPORT_SECONDS:
                said = seconds
                say(f"{tally}, {tally.rows / seconds:,.0f} rows a second")
            if tally.rows >= arguments.rows:
                return tally, None
    raise AssertionError("the stream of calls has no end")


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 when a bit differs, or when nothing could have."""
    device = machine.devices(arguments.device)[-1]
    console = report.console()
    arguments.threads = arguments.threads or len(os.sched_getaffinity(0))
    report.print_facts(console, machine.facts(device))
    console.print(f"Compared on {device}: {', '.join(schedules(device))}; {arguments.threads} threads emulate.")
    tally, difference = fuzz(arguments, device, console.print)
    if difference is not None:
        console.print(f"FAILED after {tally}; then {difference}")
        return 1
    console.print(f"Rows that are finite and not zero: {tally.finite / tally.rows:.0%}.")
    console.print(f"Elements of out and lse that differ in the fma family, as some must: {tally.control:,}.")
    if tally.control == 0:
        console.print("FAILED: other roundings give the same bits, so the inputs prove nothing")
        return 1
    return 0
