"""``bench`` on an NVIDIA GPU: time, rate, accuracy and memory beside every attention that is installed, in one run."""

from __future__ import annotations

import argparse
import csv
from dataclasses import asdict
from pathlib import Path

from flash_attn_det.commands import contest, machine, markdown, plot, report, tables
from flash_attn_det.commands.cases import CudaCase
from flash_attn_det.commands.figures import Result, reasons
from flash_attn_det.commands.peers import OURS, peers

# Timed seconds of a case, all libraries together.
SECONDS, QUICK_SECONDS = 1.0, 0.3


def csv_rows(results: list[Result]) -> list[dict[str, object]]:
    """One row for each case and library; empty figures and a reason where there are none."""
    rows = []
    for result in results:
        case, ours = result.case, result.figures.get(OURS.name)
        shape = {name: getattr(case, name) for name in ("kind", "dtype", "B", "Sq", "Sk", "Hq", "Hk", "D", "causal")}
        shape |= {"packed": " ".join(map(str, case.packed)), "page_size": case.page_size}
        shape |= {"flop": case.flop, "kv_bytes": case.kv_bytes}
        for name in result.libraries:
            figures = result.figures.get(name)
            taken = {"seconds": "", "error": "", "extra_bytes": ""} if figures is None else asdict(figures)
            ratio = "" if ours is None or figures is None else ours.seconds / figures.seconds
            row = {**shape, "library": name, **taken, "ours_over_this": ratio, "missing": result.missing.get(name, "")}
            rows.append(row)
    return rows


def write_csv(path: Path, results: list[Result]) -> None:
    """Every figure, one line for each case and library."""
    rows = csv_rows(results)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run(arguments: argparse.Namespace, chosen: list[CudaCase]) -> int:
    """The command on these cases. Returns 1 when ours was not accurate, raised, or took more memory than allowed."""
    console = report.console()
    ceilings = tables.measure_ceilings(chosen)
    facts = {**machine.facts("cuda"), **ceilings.facts()}
    report.print_facts(console, facts)
    seconds = QUICK_SECONDS if arguments.quick else SECONDS
    results = contest.measure_cases(chosen, peers(arguments.flex), seconds, console.print)

    grids = tables.grids(results, ceilings)
    for grid in grids:
        grid.print(console)
    remarks = [tables.NOTE, *reasons(results)]
    failures = [failure for result in results for failure in result.failures]
    for line in (*remarks, *(f"FAILED {failure}" for failure in failures)):
        console.print(line)
    if arguments.csv:
        write_csv(arguments.csv, results)
    if arguments.plot and any(result.figures for result in results):
        plot.draw(arguments.plot, results)
    if arguments.markdown:
        body = markdown.section("bench", facts, [*(grid.markdown() for grid in grids), *remarks], not failures)
        markdown.write_section(arguments.markdown, markdown.GPU_BENCHMARK, body)
    return 1 if failures else 0
