"""The invariance table: what may change in a call without changing a bit of a row, each claim as a runnable check.

A check is a list of comparisons. A comparison computes rows in one way (``expected``) and in other ways (``variants``),
and counts the elements of out and lse whose bits differ. Two controls run on the same inputs: torch's attention through
the same comparison, and our own attention with another split size, which must differ, or the inputs are too tame to
prove anything.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flash_attn_det as fad
from flash_attn_det import _schedule
from flash_attn_det.commands import measure
from flash_attn_det.reference import attn_reference
from flash_attn_det.testing import bits_differ

BLOCK = fad.contract()["BLOCK_KV"]
SPLIT = fad.contract()["DEFAULT_SPLIT_SIZE"]
KEYS = 3 * SPLIT + 241  # three splits and a ragged rest
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Rows(NamedTuple):
    """out [B, S, H, Dv], and lse [B, H, S] where the library returns it."""

    out: torch.Tensor
    lse: torch.Tensor | None

    def sequences(self, index: object) -> Rows:
        return Rows(self.out[index], None if self.lse is None else self.lse[index])

    def queries(self, index: object) -> Rows:
        return Rows(self.out[:, index], None if self.lse is None else self.lse[:, :, index])


def join(parts: Iterable[Rows], dim: str) -> Rows:
    """Concatenate results along "sequences", "queries" or "heads"."""
    out_dim, lse_dim = {"sequences": (0, 0), "queries": (1, 2), "heads": (2, 1)}[dim]
    outs, lses = zip(*parts, strict=True)
    return Rows(torch.cat(outs, out_dim), None if lses[0] is None else torch.cat(lses, lse_dim))


def differing(a: Rows, b: Rows) -> tuple[int, int]:
    """Elements of out and lse whose bits differ, and elements compared."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None]
    return sum(bits_differ(x, y) for x, y in pairs), sum(x.numel() for x, _ in pairs)


@dataclass(frozen=True)
class Library:
    """One attention under test. ``attend`` takes q [B, Sq, Hq, D], k, v and the options of ``attn``; ``packed`` takes
    lists of [S, H, D]. ``filler`` is what it meets in rows of padding."""

    attend: Callable[..., Rows]
    packed: Callable[..., list[Rows]]
    filler: float


def _ours(split_size: int | None = None) -> Library:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> Rows:
        return Rows(*fad.attn(q, k, v, **options, split_size=split_size, return_lse=True))

    def packed(qs: list[torch.Tensor], ks: list[torch.Tensor], vs: list[torch.Tensor], **options: object) -> list[Rows]:
        starts = [torch.tensor([0, *map(len, xs)]).cumsum(0, dtype=torch.int32) for xs in (qs, ks)]
        out, lse = fad.attn_varlen(
            torch.cat(qs), torch.cat(ks), torch.cat(vs), *starts, **options, split_size=split_size, return_lse=True
        )
        return [Rows(out[None, a:b], lse[None, :, a:b]) for a, b in pairwise(starts[0].tolist())]

    return Library(attend, packed, float("nan"))


def _torch() -> Library:
    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        seqused_k: torch.Tensor | None = None,
        leftpad_k: torch.Tensor | None = None,
        k_pos: torch.Tensor | None = None,
    ) -> Rows:
        # k_pos only says where the splits lie; causal masks and windows are relative, so torch needs no counterpart.
        Sq, Sk = q.shape[1], k.shape[1]
        padded = seqused_k is not None or leftpad_k is not None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if not padded and window == (-1, -1) and (not causal or Sq in (1, Sk)):
            out = scaled_dot_product_attention(q, k, v, is_causal=causal and Sq > 1, enable_gqa=True)
            return Rows(out.transpose(1, 2), None)
        first = torch.zeros(1, dtype=torch.int32) if leftpad_k is None else leftpad_k
        end = first + seqused_k if seqused_k is not None else torch.full_like(first, Sk)
        key = torch.arange(Sk)
        query = torch.arange(Sq) + (end[:, None] - Sq)  # position in the buffer, aligned to the end of the keys
        visible = ((key >= first[:, None]) & (key < end[:, None]))[:, None, :].expand(-1, Sq, -1)
        if causal:
            visible = visible & (key <= query[:, :, None])
        if window[0] >= 0:
            visible = visible & (key >= query[:, :, None] - window[0])
        out = scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=True)
        return Rows(out.transpose(1, 2), None)

    def packed(qs: list[torch.Tensor], ks: list[torch.Tensor], vs: list[torch.Tensor], *, causal: bool) -> list[Rows]:
        # Jagged tensors know no grouped heads.
        group = qs[0].shape[1] // ks[0].shape[1]
        lists = qs, [k.repeat_interleave(group, 1) for k in ks], [v.repeat_interleave(group, 1) for v in vs]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype stage")
            q, k, v = (torch.nested.nested_tensor(x, layout=torch.jagged).transpose(1, 2) for x in lists)
            out = scaled_dot_product_attention(q, k, v, is_causal=causal)
        return [Rows(x[None], None) for x in out.transpose(1, 2).unbind()]

    return Library(attend, packed, 0.0)


OURS, OTHER_SPLIT, TORCH = _ours(), _ours(BLOCK), _torch()


@dataclass(frozen=True)
class Comparison:
    """Rows computed in one way and in others that must not differ. ``torch_variants`` is None where torch's attention
    has no such form."""

    label: str
    expected: Callable[[Library], Rows]
    variants: Callable[[Library], Iterable[Rows]]
    torch_variants: Callable[[Library], Iterable[Rows]] | None


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    title: str
    comparisons: Callable[[], list[Comparison]]


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


def evaluate(check: Check) -> Outcome:
    """Run a check with its two controls."""
    outcome = Outcome(check.title)
    with torch.inference_mode():
        for comparison in check.comparisons():
            expected = comparison.expected(OURS)
            for number, variant in enumerate(comparison.variants(OURS)):
                differ, compared = differing(expected, variant)
                outcome.differ += differ
                outcome.compared += compared
                if differ:
                    detail = f"{differ:,} of {compared:,} elements differ"
                    outcome.failures.append(f"{comparison.label}, variant {number}: {detail}")
            control = _share(differing(expected, comparison.expected(OTHER_SPLIT)))
            outcome.other_split_share = min(outcome.other_split_share, control)
            if control == 0:
                outcome.failures.append(
                    f"{comparison.label}: another split size gives the same bits, nothing is proven"
                )
            if comparison.torch_variants is not None:
                expected = comparison.expected(TORCH)
                shares = [_share(differing(expected, variant)) for variant in comparison.torch_variants(TORCH)]
                outcome.torch_share = max(outcome.torch_share or 0.0, *shares)
    return outcome


@dataclass(frozen=True)
class Setting:
    """Shapes and options that checks run on. ``plain`` ones have a form in torch's attention."""

    label: str
    dtype: torch.dtype
    Sq: int
    Sk: int
    Hq: int = 2
    Hk: int = 2
    D: int = 64
    Dv: int = 64
    plain: bool = True

    def tensors(self, B: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        shapes = [(B, self.Sq, self.Hq, self.D), (B, self.Sk, self.Hk, self.D), (B, self.Sk, self.Hk, self.Dv)]
        q, k, v = (torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes)
        return q, k, v

    def options(self) -> dict[str, object]:
        """Arguments of ``attn``: causal always, and every feature at once where the setting is not plain."""
        if self.plain:
            return {"causal": True}
        compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        return {
            "causal": True,
            "window": (SPLIT + 100, -1),
            "softcap": 20.0,
            "alibi_slopes": torch.linspace(0.001, 0.01, self.Hq, dtype=compute),
            "sinks": torch.linspace(-1.0, 1.0, self.Hq, dtype=compute),
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


DECODE = [Setting(f"decode, {_name(dtype)}", dtype, 1, KEYS, Hq=16, Hk=4) for dtype in FLOATS]
PREFILL = [Setting(f"prefill, {_name(dtype)}", dtype, SPLIT + 101, SPLIT + 101) for dtype in FLOATS]
EVERYTHING = [
    Setting(f"window, softcap, ALiBi, sinks, {_name(dtype)}", dtype, Sq, SPLIT + 300, 6, 3, 40, 24, plain=False)
    for dtype, Sq in ((torch.float32, 1), (torch.bfloat16, 100), (torch.float64, 100))
]
ALL = DECODE + PREFILL + EVERYTHING


def _same(setting: Setting, variants: Callable[[Library], Iterable[Rows]]) -> Callable | None:
    """torch runs the same comparison, where it has the setting's options."""
    return variants if setting.plain else None


def batches() -> list[Comparison]:
    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(8)

        def call(library: Library, start: int, end: int) -> Rows:
            return library.attend(q[start:end], k[start:end], v[start:end], **setting.options())

        def variants(library: Library) -> Iterator[Rows]:
            for cuts in ((0, 4, 8), range(9), (0, 1, 8)):
                yield join((call(library, a, b) for a, b in pairwise(cuts)), "sequences")

        return Comparison(setting.label, lambda library: call(library, 0, 8), variants, _same(setting, variants))

    return [comparison(setting) for setting in ALL]


def permutations() -> list[Comparison]:
    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(8)
        generator = torch.Generator().manual_seed(2)
        orders = [torch.randperm(8, generator=generator) for _ in range(3)]

        def variants(library: Library) -> Iterator[Rows]:
            for order in orders:
                permuted = library.attend(q[order], k[order], v[order], **setting.options())
                yield permuted.sequences(order.argsort())

        def expected(library: Library) -> Rows:
            return library.attend(q, k, v, **setting.options())

        return Comparison(setting.label, expected, variants, _same(setting, variants))

    return [comparison(setting) for setting in ALL]


def heads() -> list[Comparison]:
    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(2)
        group = setting.Hq // setting.Hk

        def variants(library: Library) -> Iterator[Rows]:
            groups = zip(q.split(group, 2), k.split(1, 2), v.split(1, 2), strict=True)
            yield join((library.attend(*one, causal=True) for one in groups), "heads")

        return Comparison(setting.label, lambda library: library.attend(q, k, v, causal=True), variants, variants)

    return [comparison(setting) for setting in DECODE + PREFILL]


def neighbours() -> list[Comparison]:
    """The first sequence alone, and in padded batches whose other sequences are longer."""

    def comparison(setting: Setting) -> Comparison:
        capacity = setting.Sk + SPLIT
        q, _, _ = setting.tensors(4)
        _, k, v = Setting("", setting.dtype, 0, capacity, setting.Hq, setting.Hk, setting.D, setting.Dv).tensors(4)

        def expected(library: Library) -> Rows:
            return library.attend(q[:1], k[:1, : setting.Sk], v[:1, : setting.Sk], **setting.options())

        def variants(library: Library) -> Iterator[Rows]:
            # The neighbour of 9 keys that grows to 10 once moved a row elsewhere.
            for lengths in ((9, capacity), (10, capacity), (capacity, 9, 1), (capacity - 1, capacity, BLOCK)):
                lengths = torch.tensor([setting.Sk, *lengths], dtype=torch.int32)
                padding = (torch.arange(capacity) >= lengths[:, None])[:, :, None, None]
                batch = len(lengths)
                yield library.attend(
                    q[:batch],
                    k[:batch].masked_fill(padding, library.filler),
                    v[:batch].masked_fill(padding, library.filler),
                    seqused_k=lengths,
                    **setting.options(),
                ).sequences(slice(0, 1))

        return Comparison(setting.label, expected, variants, _same(setting, variants))

    return [comparison(setting) for setting in ALL]


def packing() -> list[Comparison]:
    """Sequences one by one; packed, and padded on the left. Padding on the right is what neighbours() compares."""

    def comparison(setting: Setting, causal: bool) -> Comparison:
        tensors = setting.tensors(4)
        lengths = torch.tensor([setting.Sk, setting.Sk - 1, BLOCK + 1, 1], dtype=torch.int32)
        left = setting.Sk - lengths
        own = [[row[:length] for row, length in zip(x, lengths.tolist(), strict=True)] for x in tensors]

        def pad_left(parts: list[torch.Tensor], filler: float) -> torch.Tensor:
            padded = parts[0].new_full((len(parts), setting.Sk, *parts[0].shape[1:]), filler)
            for row, part in zip(padded, parts, strict=True):
                row[len(row) - len(part) :] = part
            return padded

        def expected(library: Library) -> Rows:
            alone = (library.attend(q[None], k[None], v[None], causal=causal) for q, k, v in zip(*own, strict=True))
            return join(alone, "queries")

        def variants(library: Library) -> Iterator[Rows]:
            yield join(library.packed(*own, causal=causal), "queries")
            fillers = (0.0, library.filler, library.filler)
            padded = (pad_left(parts, filler) for parts, filler in zip(own, fillers, strict=True))
            rows = library.attend(*padded, leftpad_k=left, causal=causal)
            starts = enumerate(left.tolist())
            yield join((rows.sequences(slice(b, b + 1)).queries(slice(start, None)) for b, start in starts), "queries")

        # torch's jagged tensors have no causal form on the CPU.
        label = f"{setting.label}{', causal' if causal else ''}"
        return Comparison(label, expected, variants, None if causal else variants)

    return [comparison(setting, causal) for setting in PREFILL for causal in (False, True)]


def rolling_window() -> list[Comparison]:
    """A full cache, and one that has dropped the keys that no row sees any more."""

    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(2)
        window = (SPLIT // 2, -1)

        def expected(library: Library) -> Rows:
            return library.attend(q, k, v, causal=True, window=window)

        def variants(library: Library) -> Iterator[Rows]:
            for dropped in (1, BLOCK + 3, setting.Sk - SPLIT // 2 - 1):
                first = torch.full((2,), dropped, dtype=torch.int32)
                yield library.attend(q, k[:, dropped:], v[:, dropped:], causal=True, window=window, k_pos=first)

        return Comparison(setting.label, expected, variants, variants)

    return [comparison(setting) for setting in DECODE]


def chunks() -> list[Comparison]:
    """A prefill in one call, and cut into chunks that each see the keys so far."""

    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(2)

        def expected(library: Library) -> Rows:
            return library.attend(q, k, v, causal=True)

        def variants(library: Library) -> Iterator[Rows]:
            for cuts in ((1,), (37,), (SPLIT - 1,), (3, 100, SPLIT + 1)):
                pieces = pairwise((0, *cuts, setting.Sk))
                yield join((library.attend(q[:, a:b], k[:, :b], v[:, :b], causal=True) for a, b in pieces), "queries")

        return Comparison(setting.label, expected, variants, variants)

    return [comparison(setting) for setting in PREFILL]


def prefill_and_decode() -> list[Comparison]:
    """Rows of a prefill, the same rows decoded one by one, and as the last of a few speculative rows."""

    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(2)
        rows = [0, 1, BLOCK - 1, BLOCK, 300, SPLIT - 1, SPLIT, setting.Sk - 1]

        def expected(library: Library) -> Rows:
            return library.attend(q, k, v, causal=True).queries(rows)

        def variants(library: Library) -> Iterator[Rows]:
            for speculative in (1, 5):
                yield join(
                    (
                        library.attend(
                            q[:, max(0, i + 1 - speculative) : i + 1], k[:, : i + 1], v[:, : i + 1], causal=True
                        ).queries(slice(-1, None))
                        for i in rows
                    ),
                    "queries",
                )

        return Comparison(setting.label, expected, variants, variants)

    return [comparison(setting) for setting in PREFILL]


def strides() -> list[Comparison]:
    """Contiguous inputs; views of [B, H, S, D] buffers, and of a fused qkv buffer."""

    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(2)

        def expected(library: Library) -> Rows:
            return library.attend(q, k, v, causal=True)

        def variants(library: Library) -> Iterator[Rows]:
            yield library.attend(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), causal=True)
            fused = q.new_zeros(2, setting.Sk, setting.Hq + 2 * setting.Hk, setting.D)
            parts = fused.split((setting.Hq, setting.Hk, setting.Hk), 2)
            views = [part[:, : x.shape[1]].copy_(x) for part, x in zip(parts, (q, k, v), strict=True)]
            yield library.attend(*views, causal=True)

        return Comparison(setting.label, expected, variants, variants)

    return [comparison(setting) for setting in DECODE + PREFILL]


def kernels() -> list[Comparison]:
    """The scheduler's choice, and every other. torch's control is its other kernel, which it calls math."""

    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(2)

        def expected(library: Library) -> Rows:
            return library.attend(q, k, v, **setting.options())

        def variants(library: Library) -> Iterator[Rows]:
            for layout in ("rows", "keys"):
                for tile_rows in (1, 40, 256):
                    with _schedule.forced(layout=layout, tile_rows=tile_rows):
                        yield expected(library)

        def torch_variants(library: Library) -> Iterator[Rows]:
            with sdpa_kernel(SDPBackend.MATH):
                yield expected(library)

        return Comparison(setting.label, expected, variants, _same(setting, torch_variants))

    return [comparison(setting) for setting in ALL]


def split_parallelism() -> list[Comparison]:
    """Splits folded in place, and computed apart and folded afterwards."""

    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(2)

        def call(library: Library, split_parallel: bool) -> Rows:
            with _schedule.forced(split_parallel=split_parallel):
                return library.attend(q, k, v, **setting.options())

        return Comparison(
            setting.label, lambda library: call(library, False), lambda library: [call(library, True)], None
        )

    return [comparison(setting) for setting in ALL]


def threads() -> list[Comparison]:
    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(8)

        def expected(library: Library) -> Rows:
            with measure.torch_threads(1):
                return library.attend(q, k, v, **setting.options())

        def variants(library: Library) -> Iterator[Rows]:
            for count in (2, 3, 8):
                with measure.torch_threads(count):
                    yield library.attend(q, k, v, **setting.options())

        return Comparison(setting.label, expected, variants, _same(setting, variants))

    return [comparison(setting) for setting in ALL]


_CHILD = """
import sys, torch
q, k, v = torch.load(sys.argv[1])
attention = torch.nn.functional.scaled_dot_product_attention
torch.save(attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2), sys.argv[2])
"""


def instruction_sets() -> list[Comparison]:
    """Every instruction set of this processor. torch chooses once per process, so its control is another process."""

    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(2)

        def expected(library: Library) -> Rows:
            return library.attend(q, k, v, **setting.options())

        def variants(library: Library) -> Iterator[Rows]:
            for isa in _schedule.isas():
                with _schedule.forced(isa=isa):
                    yield expected(library)

        def torch_variants(library: Library) -> Iterator[Rows]:
            with tempfile.TemporaryDirectory() as folder:
                inputs, result = Path(folder) / "inputs.pt", Path(folder) / "result.pt"
                torch.save((q, k, v), inputs)
                subprocess.run(
                    [sys.executable, "-c", _CHILD, inputs, result],
                    env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
                    check=True,
                )
                yield Rows(torch.load(result), None)

        # One process is enough to see what torch does, and takes seconds.
        return Comparison(setting.label, expected, variants, torch_variants if setting is DECODE[0] else None)

    return [comparison(setting) for setting in ALL]


def torch_merge() -> list[Comparison]:
    """The fused kernel, and its partial states folded by torch operations in a Python loop."""

    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(2)

        def expected(library: Library) -> Rows:
            return library.attend(q, k, v, **setting.options())

        def variants(library: Library) -> Iterator[Rows]:
            yield Rows(*fad.merge_partials(fad.attn_partials(q, k, v, **setting.options()), return_lse=True))

        return Comparison(setting.label, expected, variants, None)

    return [comparison(setting) for setting in ALL]


def plain_torch() -> list[Comparison]:
    """The C kernels, and the contract written in plain torch operations."""

    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(2)
        q = q[:, -5:]

        def expected(library: Library) -> Rows:
            return library.attend(q, k, v, **setting.options())

        def variants(library: Library) -> Iterator[Rows]:
            yield Rows(*attn_reference(q, k, v, **setting.options(), return_lse=True))

        return Comparison(setting.label, expected, variants, None)

    return [comparison(setting) for setting in ALL]


def runs() -> list[Comparison]:
    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(8)

        def expected(library: Library) -> Rows:
            return library.attend(q, k, v, **setting.options())

        def variants(library: Library) -> Iterator[Rows]:
            for _ in range(3):
                yield expected(library)

        return Comparison(setting.label, expected, variants, _same(setting, variants))

    return [comparison(setting) for setting in ALL]


CHECKS = [
    Check("batch of 8 = 4 + 4 = 1 + 7 = eight calls", batches),
    Check("ragged neighbours, padding of NaN", neighbours),
    Check("order of the batch", permutations),
    Check("heads together or apart", heads),
    Check("prefill in chunks at odd cuts", chunks),
    Check("prefill row = decode = last of 5 speculative rows", prefill_and_decode),
    Check("packed = padded left = alone", packing),
    Check("window over a full or a rolling cache", rolling_window),
    Check("strides and buffers", strides),
    Check("kernel: layouts and tile sizes", kernels),
    Check("splits in place or in parallel", split_parallelism),
    Check("threads: 1, 2, 3, 8", threads),
    Check("instruction sets", instruction_sets),
    Check("fused = partial states merged by torch", torch_merge),
    Check("C kernels = contract in plain torch", plain_torch),
    Check("run to run", runs),
]
