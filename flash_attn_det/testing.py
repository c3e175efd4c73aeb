"""Bit comparison for your own tests: equal means equal as integers, and a failure says where.

``assert_bits_equal(actual, expected)`` compares two tensors; ``check_batch_invariance(fn, inputs)`` runs an attention
function or a model on a batch and on pieces of it, and demands the same bits for every row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_bits(x: torch.Tensor) -> torch.Tensor:
    """The same elements as integers, on the CPU; a complex number is two of them in one more dimension."""
    x = x.detach().cpu()
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return x.contiguous().view(_BITS[x.element_size()])


def _require_comparable(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    for role, x in (("actual", actual), ("expected", expected)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: {role} is {type(x).__name__}, a torch.Tensor is needed")
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype} is not {expected.dtype}")
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)} is not {tuple(expected.shape)}")


def bits_differ(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """Number of elements whose bit patterns differ.

    Two tensors of one shape and dtype, on any devices. -0.0 and 0.0 differ; two NaNs are equal if their patterns are.
    Raises TypeError for something that is no tensor and AssertionError for different shapes or dtypes.
    """
    _require_comparable(actual, expected, "tensors")
    return int((_as_bits(actual) != _as_bits(expected)).sum())


def assert_bits_equal(actual: torch.Tensor, expected: torch.Tensor, name: str = "out") -> None:
    """Raise AssertionError unless both tensors have the same shape, dtype and bits.

    The message names the number and share of differing elements, and for the first of them (in row-major order) its
    coordinate, both values and both bit patterns. ``name`` heads the message. TypeError for what is no tensor.
    """
    _require_comparable(actual, expected, name)
    actual_bits, expected_bits = _as_bits(actual), _as_bits(expected)
    differ = actual_bits != expected_bits
    count = int(differ.sum())
    if count == 0:
        return
    first = tuple(differ.nonzero()[0].tolist())
    digits = 2 * actual_bits.element_size()
    mask = (1 << 4 * digits) - 1

    def show(bits: torch.Tensor, values: torch.Tensor) -> str:
        value = values.detach().cpu()
        value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        return f"{value[first].item()!r} (0x{int(bits[first]) & mask:0{digits}x})"

    raise AssertionError(
        f"{name}: {count} of {differ.numel()} elements ({100 * count / differ.numel():.3g}%) differ, first at "
        f"{list(first)}: {show(actual_bits, actual)}, expected {show(expected_bits, expected)}"
    )


@dataclasses.dataclass(frozen=True)
class InvarianceCheck:
    """One way of cutting the batch: ``pieces`` are the index lists that were run together."""

    name: str
    pieces: tuple[tuple[int, ...], ...]
    control_differing: int | None  # elements of the control that differ under the same cut; None without a control


@dataclasses.dataclass(frozen=True)
class InvarianceReport:
    """What ``check_batch_invariance`` ran. Every listed check had equal bits, or it would have raised."""

    batch_size: int
    outputs: tuple[tuple[str, tuple[int, ...]], ...]  # name and full-batch shape of each compared output
    checks: tuple[InvarianceCheck, ...]

    @property
    def control_differing(self) -> int | None:
        """Elements of the control that differed over all checks; None without a control."""
        counts = [check.control_differing for check in self.checks]
        return None if None in counts else sum(counts)

    def __str__(self) -> str:
        outputs = ", ".join(f"{name} {list(shape)}" for name, shape in self.outputs)
        lines = [f"batch of {self.batch_size}, bits equal under {len(self.checks)} cuts: {outputs}"]
        for check in self.checks:
            control = "" if check.control_differing is None else f", control: {check.control_differing} elements differ"
            lines.append(f"  {check.name}: {len(check.pieces)} calls{control}")
        return "\n".join(lines)


def _flatten(output: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    """Tensors of a nested output with their names; None is left out, anything else that holds no tensor is refused."""
    if output is None:
        return []
    if isinstance(output, torch.Tensor):
        return [(name, output)]
    if isinstance(output, Mapping):
        return [leaf for key, value in output.items() for leaf in _flatten(value, f"{name}.{key}")]
    if isinstance(output, Sequence) and not isinstance(output, (str, bytes)):
        return [leaf for i, value in enumerate(output) for leaf in _flatten(value, f"{name}[{i}]")]
    raise TypeError(
        f"{name} is {type(output).__name__}; return a tensor, or a tuple, list or mapping of tensors whose first "
        "dimension is the batch"
    )


def _contiguous_groups(n: int, sizes: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    groups, start = [], 0
    for size in sizes:
        groups.append(tuple(range(start, min(start + size, n))))
        start += size
    return tuple(group for group in groups if group)


def _cuts(n: int, permutations: int, seed: int) -> list[tuple[str, tuple[tuple[int, ...], ...]]]:
    """The same call again, ones, (1, n-1), (n-1, 1), halves, twos, and whole batches in other orders."""
    half = (n + 1) // 2
    cuts = [
        ("again", _contiguous_groups(n, [n])),
        ("ones", _contiguous_groups(n, [1] * n)),
        ("one and the rest", _contiguous_groups(n, [1, n - 1])),
        ("the rest and one", _contiguous_groups(n, [n - 1, 1])),
        ("halves", _contiguous_groups(n, [half, n - half])),
        ("twos", _contiguous_groups(n, [2] * half)),
        ("reversed", (tuple(reversed(range(n))),)),
    ]
    generator = torch.Generator().manual_seed(seed)
    for i in range(permutations):
        cuts.append((f"permutation {i}", (tuple(torch.randperm(n, generator=generator).tolist()),)))
    unique: dict[tuple[tuple[int, ...], ...], str] = {}
    for name, pieces in cuts:
        unique.setdefault(pieces, name)
    return [(name, pieces) for pieces, name in unique.items()]


def check_batch_invariance(
    fn: Callable[..., Any],
    inputs: Sequence[torch.Tensor | None] | Mapping[str, torch.Tensor | None],
    *,
    control: Callable[..., Any] | None = None,
    permutations: int = 2,
    seed: int = 0,
    **shared: Any,
) -> InvarianceReport:
    """Run ``fn`` on a batch and on pieces of it, and require the same bits for every row.

    fn       An attention function ``fn(q, k, v, **kw)``, an ``nn.Module`` in eval mode, or any callable. It returns a
             tensor, or a tuple, list or mapping (also nested) of tensors, whose first dimension is the batch.
    inputs   The batched tensors: a sequence, passed by position, or a mapping, passed by keyword. The first dimension
             of each is the batch; None passes through. Anything that is the same for every row goes into ``shared``.
    control  A callable with fn's arguments that is *not* batch-invariant, such as torch's own attention on the same
             inputs. If its bits do not differ under any cut, the inputs are too tame to prove anything and
             AssertionError is raised.
    permutations, seed   How many random orders of the whole batch are tried, and the seed of their generator.

    The pieces are: the whole batch a second time, single rows, one row and the rest (both ways round), halves, twos,
    the reversed batch and random orders. Raises AssertionError with the cut, the row, the output, the first differing
    coordinate inside that row and both bit patterns; ValueError for inputs without a common batch
    dimension or a module in training mode; TypeError for outputs that hold no tensors. Runs without gradients.
    Returns a report that says what was compared.

    Example, in your own pytest::

        import torch, flash_attn_det
        from flash_attn_det.testing import check_batch_invariance

        def sdpa(q, k, v):
            out = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            return out.transpose(1, 2)

        def test_my_attention():
            q = torch.randn(8, 1, 4, 64)
            k, v = torch.randn(2, 8, 2048, 4, 64)
            check_batch_invariance(flash_attn_det.attn, (q, k, v), return_lse=True)

        def test_my_encoder(model, tokenizer):
            batch = tokenizer(["a sentence", "another, longer sentence"], padding=True, return_tensors="pt")
            print(check_batch_invariance(model.eval(), batch))
    """
    for role, candidate in (("fn", fn), ("control", control)):
        if isinstance(candidate, torch.nn.Module) and candidate.training:
            raise ValueError(f"{role} is in training mode, where dropout makes calls differ; call .eval() first")
    keyed = isinstance(inputs, Mapping)
    named = dict(inputs) if keyed else {f"inputs[{i}]": x for i, x in enumerate(inputs)}
    sizes = {}
    for name, x in named.items():
        if x is None:
            continue
        if not isinstance(x, torch.Tensor) or x.ndim == 0:
            raise ValueError(f"{name} is not a tensor with a batch dimension; pass what all rows share as a keyword")
        sizes[name] = x.shape[0]
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"inputs need one common batch size >= 1 in their first dimension, got {sizes}")
    n = next(iter(sizes.values()))

    def call(function: Callable[..., Any], rows: Sequence[int]) -> list[tuple[str, torch.Tensor]]:
        index = torch.tensor(rows, dtype=torch.int64)
        piece = {name: None if x is None else x[index.to(x.device)] for name, x in named.items()}
        with torch.no_grad():
            output = function(**piece, **shared) if keyed else function(*piece.values(), **shared)
        leaves = _flatten(output, "out")
        if not leaves:
            raise TypeError("the function returned no tensor to compare")
        for name, leaf in leaves:
            if leaf.ndim == 0 or leaf.shape[0] != len(rows):
                raise ValueError(
                    f"{name} has shape {list(leaf.shape)} for a batch of {len(rows)}: its first dimension is not the "
                    "batch. Wrap fn so that it returns only batched outputs"
                )
        return leaves

    everything = tuple(range(n))
    expected = call(fn, everything)
    control_expected = [] if control is None else call(control, everything)
    checks = []
    for name, pieces in _cuts(n, permutations, seed):
        control_differing = None if control is None else 0
        for rows in pieces:
            where = f"cut '{name}', rows {list(rows)} of {n}"
            actual = call(fn, rows)
            if [leaf for leaf, _ in actual] != [leaf for leaf, _ in expected]:
                raise AssertionError(f"{where}: outputs {[leaf for leaf, _ in actual]} do not match the full batch's")
            for (leaf, got), (_, want) in zip(actual, expected):
                for position, row in enumerate(rows):
                    try:
                        assert_bits_equal(got[position], want[row], leaf)
                    except AssertionError as error:
                        raise AssertionError(f"{where} is not batch-invariant in row {row}: {error}") from None
            if control is not None:
                for (_, got), (_, want) in zip(call(control, rows), control_expected):
                    control_differing += bits_differ(got, want[torch.tensor(rows, device=want.device)])
        checks.append(InvarianceCheck(name, pieces, control_differing))
    report = InvarianceReport(n, tuple((name, tuple(x.shape)) for name, x in expected), tuple(checks))
    if control is not None and report.control_differing == 0:
        raise AssertionError(
            f"the control gave equal bits under all {len(checks)} cuts, so these inputs prove nothing: use more keys, "
            "fewer query rows, or another control"
        )
    return report
