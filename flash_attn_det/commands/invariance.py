"""How a claim about bits is checked.

A check is a list of comparisons. A comparison computes rows in one way (``expected``) and in other ways (``variants``),
and counts the elements of out and lse, or of gradients, whose bits differ. Two controls run on the same inputs: torch's
attention through the same comparison, and our own attention with another split size, which must differ, or the inputs
are too tame to prove anything. The claims themselves are in claims.py, claims_cpu.py, claims_cuda.py and
claims_gradients.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from flash_attn_det.commands.backends import BLOCK, SPLIT, Backend
from flash_attn_det.commands.gradients import Gradients
from flash_attn_det.commands.libraries import Library, Ours, Rows, Torch, flash_first
from flash_attn_det.testing import bits_differ

Results = Rows | Gradients


def differing(a: Results, b: Results) -> tuple[int, int]:
    """Elements of out and lse, or of gradients, whose bits differ, and elements compared."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None]
    return sum(bits_differ(x, y) for x, y in pairs), sum(x.numel() for x, _ in pairs)


@dataclass(frozen=True)
class Comparison:
    """Rows computed in one way and in others that must not differ. ``torch_variants`` is None where torch's attention
    has no such form."""

    label: str
    expected: Callable[[Library], Results]
    variants: Callable[[Library], Iterable[Results]]
    torch_variants: Callable[[Library], Iterable[Results]] | None


@dataclass(frozen=True)
class Check:
    """One line of the table. claimed: whether it is claimed of this machine."""

    title: str
    comparisons: Callable[[Backend], list[Comparison]]
    claimed: Callable[[], bool] = lambda: True


@dataclass
class Outcome:
    """What one check found: elements over all comparisons, and shares of the controls in single comparisons.

    ``torch_share`` is the largest, None where torch has no such form; ``other_split_share`` is the smallest.
    """

    title: str
    differ: int = 0
    compared: int = 0
    torch_share: float | None = None
    other_split_share: float = 1.0
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Nothing of ours differed, and all inputs were able to show a difference."""
        return self.compared > 0 and not self.failures


def _share(counts: tuple[int, int]) -> float:
    return counts[0] / counts[1]


def evaluate(check: Check, backend: Backend) -> Outcome:
    """Run a check with its two controls."""
    outcome = Outcome(check.title)
    ours, other_split = (Ours(backend.arithmetic, split_size) for split_size in (SPLIT, BLOCK))
    with torch.inference_mode(), flash_first(backend.device):
        for comparison in check.comparisons(backend):
            expected = comparison.expected(ours)
            for number, variant in enumerate(comparison.variants(ours)):
                differ, compared = differing(expected, variant)
                outcome.differ += differ
                outcome.compared += compared
                if differ:
                    detail = f"{differ:,} of {compared:,} elements differ"
                    outcome.failures.append(f"{comparison.label}, variant {number}: {detail}")
            control = _share(differing(expected, comparison.expected(other_split)))
            outcome.other_split_share = min(outcome.other_split_share, control)
            if control == 0:
                outcome.failures.append(
                    f"{comparison.label}: another split size gives the same bits, nothing is proven"
                )
            if comparison.torch_variants is not None:
                expected = comparison.expected(Torch())
                shares = [_share(differing(expected, variant)) for variant in comparison.torch_variants(Torch())]
                outcome.torch_share = max(outcome.torch_share or 0.0, *shares)
    return outcome
