"""Audits: rows of a result, wherever it was computed, against the same rows computed by this machine's CPU, bit by bit.

A row depends on its own query, on the keys and values that it sees, and on where those stand (clause N1). So one row
needs no more of a call than that, and a CPU that repeats the arithmetic of a GPU (clause N7) can repeat that row alone.
"""

from __future__ import annotations

import bisect
import dataclasses
import random
import time
import warnings
from collections import defaultdict, namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from . import _schedule, attention, ops
from .testing import _as_bits

_ARITHMETIC = {number: name for name, number in attention._ARITHMETIC.items()}  # as the op numbers it
_Call = namedtuple("_Call", [argument.name for argument in ops.fwd._schema.arguments])  # of fwd; empty tensors: None

_TILE_ROWS = 256  # of one work item, at most


class AuditError(RuntimeError):
    """Bits of a result are not those of the contract."""


class Difference(NamedTuple):
    """One element whose bits differ. ``str`` shows all of it."""

    tensor: str  # "out" or "lse"
    coordinate: tuple[int, ...]  # in that tensor
    value: float
    bits: int
    expected: float
    expected_bits: int
    digits: int  # hexadecimal ones of a bit pattern

    def __str__(self) -> str:
        actual, expected = (f"{bits:#0{self.digits + 2}x}" for bits in (self.bits, self.expected_bits))
        place = f"{self.tensor}[{', '.join(map(str, self.coordinate))}]"
        return f"{place} is {self.value!r} ({actual}), expected {self.expected!r} ({expected})"


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """What one audit compared. ``ok``: no bit differs. ``check()`` raises AuditError otherwise."""

    arithmetic: str  # what the CPU computed with: "fma", "mma_sm90" or "mma_sm80"
    verified: bool  # whether that is known to be the GPU's arithmetic from measurements; false for "mma_sm80"
    rows: int
    rows_of_call: int  # from which they were drawn
    elements: int  # of out and lse
    differing_rows: int
    differing: int  # elements
    first: Difference | None  # in ascending order of rows
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every compared bit is equal."""
        return self.differing == 0

    def check(self) -> AuditReport:
        """This report, or AuditError if bits differ."""
        if not self.ok:
            raise AuditError(str(self))
        return self

    def __str__(self) -> str:
        what = f"{self.rows} of {self.rows_of_call} rows, {self.elements} elements, {self.seconds:.2f} s"
        family = self.arithmetic if self.verified else f"{self.arithmetic}, which was not compared with a GPU"
        if self.ok:
            return f"audit: all bits equal ({what}; {family})"
        return (
            f"audit: {self.differing} elements in {self.differing_rows} rows differ, first {self.first} "
            f"({what}; {family})"
        )


# ---- what to compute with --------------------------------------------------------------------------------------------


def _arithmetic_of(name: str, out: Tensor) -> str:
    """The CPU's name for the arithmetic that gave out where it lies, under the name that the call had."""
    half = out.dtype in (torch.float16, torch.bfloat16)
    if out.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"out is on {out.device}, expected cpu or cuda")
    if name not in ("auto", "mma"):
        return name
    if name == "auto" and (out.device.type == "cpu" or not half):
        return "fma"
    if out.device.type == "cpu":
        raise ValueError("arithmetic is 'mma' but out is on the CPU: name the GPU's, 'mma_sm90' or 'mma_sm80'")
    major, minor = torch.cuda.get_device_capability(out.device)
    if (major, minor) == (9, 0):
        return "mma_sm90"
    if major == 8:
        return "mma_sm80"
    raise NotImplementedError(
        f"out was computed by tensor cores of compute capability {major}.{minor}, expected 9.0 or 8.x: how others "
        "round is not known"
    )


# ---- where rows lie, and what they see -------------------------------------------------------------------------------


class _Sequence(NamedTuple):
    """csrc/core/sequence.h for one sequence, lengths clamped as there. Rows are counted in the buffers."""

    index: int
    q_row: int
    k_row: int
    n_q: int
    n_k: int
    k_pos: int


class _Row(NamedTuple):
    """One row of one head. Keys lo .. hi - 1 are those that it sees, by their position (N2, N4)."""

    sequence: _Sequence
    i: int  # within the sequence
    head: int
    lo: int
    hi: int
    ahead: int  # visible keys behind the row's own position; counts for ALiBi only

    @property
    def is_used(self) -> bool:
        return self.i < self.sequence.n_q


def _clamp(x: int, low: int, high: int) -> int:
    return min(max(x, low), high)


class _Layout:
    """The sequences of a call, read on the host once."""

    def __init__(self, call: _Call):
        self.call = call
        self.packed = call.cu_seqlens_q.numel() > 0
        self.paged = call.block_table.ndim == 2
        self.rows_q, self.rows_k = call.q.shape[-3], call.k.shape[-3]
        if self.paged:
            self.rows_k *= call.block_table.shape[1]
        self._values = {name: x.tolist() for name, x in call._asdict().items() if getattr(x, "dtype", 0) == torch.int32}
        self.batch = len(self._values["cu_seqlens_q"]) - 1 if self.packed else call.q.shape[0]
        self.count = self.rows_q if self.packed else self.batch * self.rows_q  # rows of one head

    def _length(self, name: str, b: int, absent: int, largest: int) -> int:
        values = self._values[name]
        return _clamp(values[b], 0, largest) if values else absent

    def _owned(self, name: str, b: int, rows: int) -> tuple[int, int]:
        """First row and number of rows of sequence b."""
        offsets = self._values[name]
        if not offsets:
            return 0, rows
        first = _clamp(offsets[b], 0, rows)
        end = rows if b == self.batch else _clamp(offsets[b + 1], first, rows)
        return first, end - first

    def sequence(self, b: int) -> _Sequence:
        q_row, q_rows = self._owned("cu_seqlens_q", b, self.rows_q)
        k_row, k_rows = self._owned("cu_seqlens_k", b, self.rows_k)
        if b == self.batch:  # rows of a packed buffer behind the last sequence
            return _Sequence(b, q_row, k_row, 0, 0, 0)
        pad = self._length("leftpad_k", b, 0, k_rows)
        n_q = self._length("seqused_q", b, q_rows, q_rows)
        n_k = self._length("seqused_k", b, k_rows - pad, k_rows - pad)
        return _Sequence(b, q_row, k_row + pad, n_q, n_k, self._length("k_pos", b, 0, 2**31 - 1))

    def row(self, number: int) -> _Row:
        """Row number of all rows of all heads, in ascending order of sequence, row, head."""
        place, head = divmod(number, self.call.q.shape[-2])
        b, i = divmod(place, self.rows_q)
        if self.packed:
            b = bisect.bisect_right(self._values["cu_seqlens_q"], place, lo=1) - 1
            i = place - self._owned("cu_seqlens_q", b, self.rows_q)[0]
        s = self.sequence(b)
        end, position = s.k_pos + s.n_k, s.k_pos + s.n_k - s.n_q + i
        right = 0 if self.call.causal else self.call.window_right
        lo = s.k_pos if self.call.window_left < 0 else max(s.k_pos, position - self.call.window_left)
        hi = end if right < 0 else min(end, position + right + 1)
        if hi <= lo:
            return _Row(s, i, head, s.k_pos, s.k_pos, 0)
        return _Row(s, i, head, lo, hi, hi - 1 - position if self.call.alibi_slopes.numel() else 0)

    def keys(self, x: Tensor, s: _Sequence, head: int, first: int, end: int) -> Tensor:
        """Rows first .. end - 1 of a sequence's keys or values [rows, D], counted as k_row is."""
        if self.paged:
            row = torch.arange(first, end, device=x.device)
            page = self.call.block_table[s.index][row // x.shape[1]].clamp(0, x.shape[0] - 1)
            return x[page, row % x.shape[1], head]
        if self.packed:
            return x[first:end, head]
        return x[self._length("cache_batch_idx", s.index, s.index, x.shape[0] - 1), first:end, head]

    def index(self, row: _Row) -> tuple[int, ...]:
        """Of the row in q and out: (b, i, h) or (t, h)."""
        if self.packed:
            return row.sequence.q_row + row.i, row.head
        return row.sequence.index, row.i, row.head


# ---- the same rows, computed here ------------------------------------------------------------------------------------


def _taken(x: Tensor, indices: list[tuple[int, ...]]) -> Tensor:
    """x[index] of each index, copied to the CPU."""
    return x[tuple(torch.tensor(list(index), device=x.device) for index in zip(*indices))].cpu()


def _keys(layout: _Layout, x: Tensor, rows: list[_Row]) -> tuple[Tensor, int]:
    """Keys or values [n, D] that rows of one sequence and kv head see, on the CPU, and the position of the first."""
    s, group = rows[0].sequence, layout.call.q.shape[-2] // layout.call.k.shape[-2]
    lo, hi = min(row.lo for row in rows), max(row.hi for row in rows)
    return layout.keys(x, s, rows[0].head // group, s.k_row + lo - s.k_pos, s.k_row + hi - s.k_pos).cpu(), lo


def _per_row(x: Tensor, rows: list[_Row]) -> Tensor | None:
    """Slopes or sinks of the rows, from those of the heads; None if there are none."""
    if x.numel() == 0:
        return None
    return _taken(x, [(row.sequence.index, row.head)[-x.ndim :] for row in rows])


def _attention_of(call: _Call, q: Tensor, k: Tensor, v: Tensor, rows: list[_Row], arithmetic: str) -> tuple:
    """Arguments and keywords of attn, all on the CPU, that give the rows, which see the same keys.

    A row becomes a head of one query row, which has its own slope and sink; it needs no mask, for it gets the keys that
    it sees and no others, at their positions. Its own position is that of the last key; where keys follow it, and ALiBi
    makes that count, so do as many rows of no interest.
    """
    tensors = q[None, None].expand(1, rows[0].ahead + 1, -1, -1), k[None, :, None], v[None, :, None]
    return tensors, {
        "scale": call.scale,
        "softcap": call.softcap,
        "alibi_slopes": _per_row(call.alibi_slopes, rows),
        "sinks": _per_row(call.sinks, rows),
        "k_pos": torch.tensor([rows[0].lo], dtype=torch.int32),
        "split_size": call.split_size,
        "arithmetic": arithmetic,
        "return_lse": True,
    }


def _attend(tensors: tuple, keywords: dict) -> tuple[Tensor, Tensor]:
    """out [n, Dv] and lse [n] of the first row of each head, on this thread alone."""
    with _schedule.forced(tile_rows=_TILE_ROWS, split_parallel=False):
        out, lse = attention.attn(*tensors, **keywords)
    return out[0, 0], lse[0, :, 0]


def _grouped(numbers, key) -> list[list[int]]:
    """Numbers of one key together."""
    groups = defaultdict(list)
    for number in numbers:
        groups[key(number)].append(number)
    return list(groups.values())


def _calls(layout: _Layout, q: Tensor, rows: list[_Row], together: list[int], arithmetic: str) -> Iterator[tuple]:
    """(numbers, what to compute) of rows of one sequence and kv head, whose keys are copied here."""
    (k, first), (v, _) = (_keys(layout, x, [rows[n] for n in together]) for x in (layout.call.k, layout.call.v))
    for same in _grouped(together, lambda n: (rows[n].lo, rows[n].hi, rows[n].ahead)):
        seen = slice(rows[same[0]].lo - first, rows[same[0]].hi - first)
        for some in (same[at : at + _TILE_ROWS] for at in range(0, len(same), _TILE_ROWS)):
            these = [rows[n] for n in some]
            yield some, _attention_of(layout.call, q[some], k[seen], v[seen], these, arithmetic)


def _compute(layout: _Layout, q: Tensor, rows: list[_Row], arithmetic: str) -> tuple[Tensor, Tensor]:
    """out [n, Dv] and lse [n] of the rows, whose queries are q [n, D].

    The calls are too small to be worth sharing one among threads, so each thread has its own. All that touches the
    caller's tensors is done by the caller's thread, in its order.
    """
    call, threads = layout.call, torch.get_num_threads()
    group = call.q.shape[-2] // call.k.shape[-2]
    out = torch.zeros(len(rows), call.v.shape[-1], dtype=q.dtype)  # N10: also of rows that are not in use
    lse = torch.full((len(rows),), -torch.inf, dtype=ops.compute_dtype(q.dtype))
    used = [n for n, row in enumerate(rows) if row.is_used]
    heads = _grouped(used, lambda n: (rows[n].sequence.index, rows[n].head // group))
    with ThreadPoolExecutor(threads) as pool:
        for at in range(0, len(heads), threads):  # so the keys of no more heads are copied at a time
            tasks = [task for part in heads[at : at + threads] for task in _calls(layout, q, rows, part, arithmetic)]
            results = pool.map(lambda task: _attend(*task[1]), tasks)
            for (numbers, _), result in zip(tasks, results):
                out[numbers], lse[numbers] = result
    return out, lse


# ---- the audit -------------------------------------------------------------------------------------------------------


def _difference(name: str, coordinate: tuple[int, ...], value: Tensor, expected: Tensor) -> Difference:
    digits = 2 * value.element_size()
    bits, expected_bits = (int(_as_bits(x)) & (1 << 4 * digits) - 1 for x in (value, expected))
    return Difference(name, coordinate, value.item(), bits, expected.item(), expected_bits, digits)


@torch.no_grad()
def _audit(call: _Call, out: Tensor, lse: Tensor | None, arithmetic: str, rows: int, seed: int) -> AuditReport:
    start = time.perf_counter()
    layout = _Layout(call)
    total = layout.count * call.q.shape[-2]
    sample = [layout.row(n) for n in sorted(random.Random(seed).sample(range(total), min(rows, total)))]
    index = [layout.index(row) for row in sample]
    lse_index = [(*at[:-2], at[-1], at[-2]) for at in index]  # [B, Hq, Sq] or [Hq, Tq]
    results = []
    if sample:
        expected = _compute(layout, _taken(call.q, index), sample, arithmetic)
        results.append(("out", index, _taken(out, index), expected[0]))
        if lse is not None:
            results.append(("lse", lse_index, _taken(lse, lse_index)[:, None], expected[1][:, None]))
    differ = [(_as_bits(actual) != _as_bits(wanted)) for _, _, actual, wanted in results]
    bad = torch.cat(differ, -1).any(-1) if differ else torch.zeros(0, dtype=torch.bool)
    first = None
    if bad.any():
        row = int(bad.nonzero()[0])
        name, at, actual, wanted, differs = next((*r, d) for r, d in zip(results, differ) if d[row].any())
        column = int(differs[row].nonzero()[0])
        coordinate = (*at[row], column) if name == "out" else at[row]
        first = _difference(name, coordinate, actual[row, column], wanted[row, column])
    return AuditReport(
        arithmetic=arithmetic,
        verified=arithmetic != "mma_sm80",
        rows=len(sample),
        rows_of_call=total,
        elements=sum(d.numel() for d in differ),
        differing_rows=int(bad.sum()),
        differing=sum(int(d.sum()) for d in differ),
        first=first,
        seconds=time.perf_counter() - start,
    )


def _check_result(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    attention._check_tensor(name, x)
    if x.dtype != dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected {list(shape)}")


def _check_call(call: _Call) -> None:
    """What the C library would have refused, as far as rows could not be found without it."""
    q, k, v = call.q.shape, call.k.shape, call.v.shape
    packed = call.cu_seqlens_q.numel() > 0
    own_entries = not packed and call.block_table.ndim == 1 and call.cache_batch_idx.numel() == 0
    if k[-1] != q[-1] or k[:-1] != v[:-1] or q[-2] % max(k[-2], 1) != 0 or (own_entries and k[0] != q[0]):
        raise ValueError(f"q {list(q)}, k {list(k)} and v {list(v)} are not those of one call")
    batch = call.cu_seqlens_q.numel() - 1 if packed else q[0]
    shapes = dict.fromkeys(("seqused_q", "seqused_k", "leftpad_k", "k_pos", "cache_batch_idx"), (batch,))
    shapes |= {"block_table": (batch, *call.block_table.shape[1:])}
    shapes |= {"alibi_slopes": (batch, q[-2])[-call.alibi_slopes.ndim :], "sinks": (q[-2],)}
    shapes |= {"cu_seqlens_k": call.cu_seqlens_q.shape}
    for name, shape in shapes.items():
        x = getattr(call, name)
        if x.numel() > 0 and x.shape != shape:
            raise ValueError(f"{name} has shape {list(x.shape)}, expected {list(shape)}")


def _check_count(name: str, x: int) -> None:
    if not isinstance(x, int) or isinstance(x, bool):
        raise TypeError(f"{name} must be an int, got {type(x).__name__}")
    if x < 1:
        raise ValueError(f"{name} is {x}, expected at least 1")


@torch.no_grad()
def audit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None = None,
    *,
    rows: int = 1000,
    seed: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    k_pos: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    split_size: int | None = None,
    arithmetic: str = "auto",
) -> AuditReport:
    """Compute a sample of the rows of a result again, on the CPU, and compare the bits of out and lse.

    q, k, v and the keywords: those of the call of attn that gave out; of attn_varlen with its cu_seqlens and
        block_table; of attn_with_kvcache the caches, q as rotated, and as seqused_k the rows in use with those that
        were appended, less leftpad_k. They must hold what they held then, and the default split size must be what it
        was. On any device; only the queries of the sampled rows and the keys and values that these see are copied to
        the CPU.
    out, lse: what the call returned; without lse only out is compared.
    rows: how many rows, each of one head, are drawn; all if there are no more. One wrong row among n is found with
        probability rows / n.
    seed: of the draw.
    arithmetic: as in the call, with which out was computed where it lies now: "auto" and "mma" ask its device for its
        compute capability. For results of a GPU that were moved to the CPU name it: "fma", "mma_sm90" or "mma_sm80".

    Returns an AuditReport, and never raises for a difference: report.check() does.
    Raises what attn raises for its arguments; NotImplementedError for tensor cores whose arithmetic is not known.
    ALiBi without causal costs more, in proportion to the visible keys behind a row.
    """
    _check_count("rows", rows)
    if block_table is None and (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("only one of cu_seqlens_q and cu_seqlens_k is given, expected both or none")
    packed = None if cu_seqlens_q is None else (cu_seqlens_q, cu_seqlens_k)
    attention._check_tensor("out", out)
    arithmetic = _arithmetic_of(arithmetic, out)
    call = _Call(
        *attention._arguments(
            q, k, v, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            cu_seqlens=packed, seqused_q=seqused_q, seqused_k=seqused_k, leftpad_k=leftpad_k, k_pos=k_pos,
            cache_batch_idx=cache_batch_idx, block_table=block_table, split_size=split_size, arithmetic=arithmetic,
        )
    )  # fmt: skip
    _check_call(call)
    _check_result("out", out, (*call.q.shape[:-1], call.v.shape[-1]), q.dtype)
    if lse is not None:
        _check_result("lse", lse, (*q.shape[:-3], q.shape[-2], q.shape[-3]), ops.compute_dtype(q.dtype))
    return _audit(call, out, lse, arithmetic, rows, seed)


@dataclasses.dataclass
class AuditSummary:
    """What an ``audited`` block has found so far. ``ok``: no bit differs in what was compared."""

    calls: int = 0  # of attn and attn_varlen, seen in the block
    captured: int = 0  # of them into a CUDA graph, where nothing can be compared
    audits: int = 0
    rows: int = 0
    elements: int = 0
    differing: int = 0
    seconds: float = 0.0
    failures: list[AuditReport] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every compared bit is equal; also where nothing was compared, see ``audits``."""
        return not self.failures

    def add(self, report: AuditReport) -> None:
        """Count one more audit."""
        self.audits += 1
        self.rows += report.rows
        self.elements += report.elements
        self.differing += report.differing
        self.seconds += report.seconds
        self.failures += [] if report.ok else [report]

    def __str__(self) -> str:
        found = "all bits equal" if self.ok else f"{self.differing} elements in {len(self.failures)} calls differ"
        captured = f", {self.captured} captured in CUDA graphs" if self.captured else ""
        return (
            f"audited {self.audits} of {self.calls} calls{captured}: {found} "
            f"({self.rows} rows, {self.elements} elements, {self.seconds:.2f} s)"
        )


@contextmanager
def audited(
    share: float = 0.01, *, rows: int = 64, seed: int = 0, on_difference: str = "raise"
) -> Iterator[AuditSummary]:
    """Within the block, audit a share of this thread's calls of attn and attn_varlen, each right after it was made.

    share: the probability, 0 to 1, with which a call is audited.
    rows: of each audited call.
    seed: of the choice of calls and rows.
    on_difference: "raise" AuditError out of the call, or "warn" with a RuntimeWarning; both also count it.

    Yields an AuditSummary, which grows with every audit. An audit waits for the GPU. Calls that are captured in a CUDA
    graph are counted and not audited; those that torch.compile put into a graph, and those of other threads, are not
    seen: what the summary's ``calls`` says is what was looked at. Raises ValueError, and in the first call
    NotImplementedError for tensor cores whose arithmetic is not known.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, expected 0 to 1")
    if on_difference not in ("raise", "warn"):
        raise ValueError(f"on_difference is {on_difference!r}, expected 'raise' or 'warn'")
    _check_count("rows", rows)
    summary, generator = AuditSummary(), random.Random(seed)

    def observe(arguments, results) -> None:
        call = _Call(*arguments)
        arithmetic = _arithmetic_of(_ARITHMETIC[call.arithmetic], results[0])
        summary.calls += 1
        if results[0].is_cuda and torch.cuda.is_current_stream_capturing():
            summary.captured += 1
        elif generator.random() < share:
            report = _audit(call, *results, arithmetic, rows, generator.getrandbits(32))
            summary.add(report)
            if not report.ok and on_difference == "warn":
                warnings.warn(str(report), RuntimeWarning, stacklevel=4)  # where attn was called
            elif not report.ok:
                report.check()

    with ops.observed_by(*ops.observers(), observe):
        yield summary
