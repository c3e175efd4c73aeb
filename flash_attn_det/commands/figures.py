"""What the GPU benchmark finds out about a case: figures of each library, and why one has none."""

from __future__ import annotations

from dataclasses import dataclass, field

from flash_attn_det.commands.cases import GROUPS, CudaCase
from flash_attn_det.commands.peers import OURS


@dataclass(frozen=True)
class Figures:
    """What was measured of one library: median seconds, largest error, and bytes that a call adds at its peak."""

    seconds: float
    error: float
    extra_bytes: int


@dataclass
class Result:
    """A case with the figures of each library, ours first, and why a library has none."""

    case: CudaCase
    libraries: list[str]
    figures: dict[str, Figures] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """What is wrong with ours; being slow is not."""
        if OURS.name in self.missing:
            return [f"{self.case.name}: {self.missing[OURS.name]}"]
        added, limit = self.figures[OURS.name].extra_bytes, self.case.memory_limit
        if limit is not None and added > limit:
            return [f"{self.case.name}: adds {added / 2**20:.1f} MiB, expected at most {limit / 2**20:.1f} MiB"]
        return []


def summary(result: Result) -> str:
    """Time and largest error of each library."""
    shown = (
        f"{name} {figures.seconds * 1e6:.1f} us, error {figures.error:.1e}" for name, figures in result.figures.items()
    )
    return "; ".join([*shown, *(f"{name} -" for name in result.missing)])


def groups(results: list[Result]) -> dict[str, list[Result]]:
    """Results by what is shown together, under its title: cases of one group and dtype, which have the same peers."""
    together: dict[str, list[Result]] = {}
    for result in results:
        case = result.case
        title = f"{GROUPS[case.kind]}, {case.dtype}{', packed' if case.packed else ''}"
        together.setdefault(title, []).append(result)
    return together


def reasons(results: list[Result]) -> list[str]:
    """Why other libraries have no figures, each reason once, with the first case that it was given for."""
    first: dict[tuple[str, str], str] = {}
    for result in results:
        for name, reason in result.missing.items():
            if name != OURS.name:  # a failure, which is told apart
                first.setdefault((name, reason), result.case.name)
    return [f"{name} has no figures for {case}: {reason}" for (name, reason), case in first.items()]
