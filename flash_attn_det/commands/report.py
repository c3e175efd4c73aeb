"""One table, printed by rich and written as markdown."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass
class Grid:
    """A titled table of strings. ``text_columns`` counts the leading columns that are aligned left."""

    title: str
    columns: list[str]
    text_columns: int = 1
    rows: list[list[str]] = field(default_factory=list)

    def print(self, console: Console) -> None:
        """Print the table to a terminal or a file."""
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index < self.text_columns else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        """The table as GitHub markdown under a heading of level 2."""
        ruler = ["---" if index < self.text_columns else "---:" for index in range(len(self.columns))]
        lines = [f"## {self.title}", ""]
        lines += ["| " + " | ".join(cells) + " |" for cells in [self.columns, ruler, *self.rows]]
        return "\n".join(lines) + "\n"


def console() -> Console:
    """Standard output; as wide as the terminal, or wide enough for every table where there is none."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 240)


def print_facts(console: Console, facts: dict[str, str]) -> None:
    """One fact a line."""
    for name, value in facts.items():
        console.print(f"  {name}: {value}")


def seconds(value: float) -> str:
    """A duration with a unit that suits it."""
    if value < 1e-3:
        return f"{value * 1e6:.1f} us"
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def mebibytes(value: int | None) -> str:
    """A size in MiB, or a dash where it could not be measured."""
    return "-" if value is None else f"{value / 2**20:.1f} MiB"
