"""VERIFIED_RESULTS.md: one section for each device and command, so that no machine overwrites another's.

A section is a heading of level 1 and what follows it up to the next one. It is replaced as a whole.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path

TITLE = "Verified results"
INTRODUCTION = (
    "Only ever written by `flash-attn-det verify --markdown` and `flash-attn-det bench --markdown`. Each rewrites the "
    "section of the device that it ran on and leaves the others, which may be of other machines, commits and dates."
)
# The order of the sections in the file.
CPU, CPU_BENCHMARK, GPU, GPU_BENCHMARK = "CPU", "CPU benchmark", "NVIDIA GPU", "NVIDIA GPU benchmark"
SECTIONS = (CPU, CPU_BENCHMARK, GPU, GPU_BENCHMARK)


def refusal(path: Path) -> str | None:
    """Why a report cannot go into this file, or None: its folder is missing, or it is a file of another kind."""
    if not path.parent.is_dir():
        return f"{path.parent} is not a folder"
    if path.exists() and path.read_text().partition("\n")[0] not in ("", f"# {TITLE}"):
        return f"{path} exists and is no report: its first line is not '# {TITLE}'"
    return None


def with_section(text: str, title: str, body: str) -> str:
    """The file's text with one section put in or replaced; sections that are not known here stay, at the end."""
    pieces = re.split(r"^# (.*)$", text, flags=re.MULTILINE)  # what precedes the first heading, then title, body, ...
    sections = {**dict(zip(pieces[1::2], pieces[2::2])), TITLE: INTRODUCTION, title: body}
    order = {name: place for place, name in enumerate((TITLE, *SECTIONS))}
    names = sorted(sections, key=lambda name: order.get(name, len(order)))
    return "\n".join(f"# {name}\n\n{sections[name].strip()}\n" for name in names)


def write_section(path: Path, title: str, body: str) -> None:
    """Put one section into the file, which need not exist."""
    path.write_text(with_section(path.read_text() if path.exists() else "", title, body))


def section(command: str, facts: dict[str, str], parts: list[str], passed: bool) -> str:
    """The body of a section: who wrote it when and where, then the tables and notes."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    verdict = "Everything passed." if passed else "**Something failed.**"
    head = [f"Written by `flash-attn-det {command} --markdown` on {date}. {verdict}", ""]
    head += [f"- {name}: {value}" for name, value in facts.items()]
    return "\n\n".join(["\n".join(head), *(part.strip() for part in parts)]) + "\n"
