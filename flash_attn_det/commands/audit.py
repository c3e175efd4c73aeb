"""``flash-attn-det audit``: rows of calls of many kinds, computed again on the CPU. Exit code 1 when a bit differs.

On a GPU the calls are those of its two families. Without one the CPU audits itself: calls of a whole batch, against
single rows.
"""

from __future__ import annotations

import argparse

import torch

import flash_attn_det as fad
from flash_attn_det.commands import backends, machine, report
from flash_attn_det.commands.backends import Setting

BATCH = 4
CONTROL_ROWS = 1000  # at least: few elements of 16 bits notice
COLUMNS = ["case", "call", "audited as", "rows", "elements", "differ", "other roundings", "time", "verdict"]
NOTE = (
    "differ: elements of out and lse whose bits differ from those of the same row, computed alone on the CPU; must be "
    "0. other roundings: share that differs when the CPU is told another split size and, for mma, the fma family; "
    "above 0, or the inputs are too tame to prove anything. time: of the audit."
)


def workload(device: str) -> list[tuple[Setting, str]]:
    """Settings of verify, and the arithmetic of their calls; on the CPU also what emulates a GPU."""
    calls = [(setting, b.arithmetic) for b in backends.BACKENDS[device] for setting in b.all]
    if device == "cpu":
        half = (torch.float16, torch.bfloat16)
        calls += [(setting, "mma_sm90") for setting, _ in calls if setting.dtype in half]
    return calls


def audit(setting: Setting, arithmetic: str, rows: int, seed: int) -> tuple[list[str], str | None]:
    """Table row, and what is wrong, of one call."""
    q, k, v = setting.tensors(BATCH)
    options = {**setting.options(), "arithmetic": arithmetic, "split_size": backends.SPLIT}
    result = fad.attn(q, k, v, **options, return_lse=True)
    found = fad.audit(q, k, v, *result, **options, rows=rows, seed=seed)
    control = {**options, "arithmetic": "fma", "split_size": backends.BLOCK, "rows": max(rows, CONTROL_ROWS)}
    other = fad.audit(q, k, v, *result, **control, seed=seed)
    failure = None if found.ok else str(found)
    if found.ok and other.ok:
        failure = "other roundings give the same bits: the inputs prove nothing"
    family = found.arithmetic if found.verified else f"{found.arithmetic} (not measured)"
    row = [
        setting.label,
        f"{setting.device}, {arithmetic}",
        family,
        f"{found.rows:,} of {found.rows_of_call:,}",
        f"{found.elements:,}",
        f"{found.differing:,}",
        f"{other.differing / other.elements:.2%}",
        report.seconds(found.seconds),
        "pass" if failure is None else "FAIL",
    ]
    return row, failure


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 when a bit differs."""
    device = machine.devices(arguments.device)[-1]
    console = report.console()
    report.print_facts(console, machine.facts(device))
    grid, failures = report.Grid("Audit", COLUMNS, text_columns=3), []
    with console.status("computing rows again"):
        for setting, arithmetic in workload(device):
            row, failure = audit(setting, arithmetic, arguments.rows, arguments.seed)
            grid.rows.append(row)
            if failure is not None:
                failures.append(f"{setting.label}, {arithmetic}: {failure}")
    grid.print(console)
    console.print(NOTE)
    for failure in failures:
        console.print(f"FAILED {failure}")
    console.print("Everything passed." if not failures else "Something FAILED.")
    return 1 if failures else 0
