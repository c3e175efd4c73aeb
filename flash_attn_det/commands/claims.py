"""What may change in a call without changing a bit of a row, on every device and in every arithmetic family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch

from flash_attn_det import _schedule
from flash_attn_det.commands.backends import BLOCK, SPLIT, Backend, Setting
from flash_attn_det.commands.invariance import Check, Comparison
from flash_attn_det.commands.libraries import Library, Rows, join


def same(setting: Setting, variants: Callable[[Library], Iterable[Rows]]) -> Callable | None:
    """torch runs the same comparison, where it has the setting's options."""
    return variants if setting.plain else None


def whole_call(setting: Setting, B: int) -> Callable[[Library], Rows]:
    """One call of B sequences with the setting's options."""
    q, k, v = setting.tensors(B)
    return lambda library: library.attend(q, k, v, **setting.options())


def batches(backend: Backend) -> list[Comparison]:
    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(8)

        def call(library: Library, start: int, end: int) -> Rows:
            return library.attend(q[start:end], k[start:end], v[start:end], **setting.options())

        def variants(library: Library) -> Iterator[Rows]:
            for cuts in ((0, 4, 8), range(9), (0, 1, 8)):
                yield join((call(library, a, b) for a, b in pairwise(cuts)), "sequences")

        return Comparison(setting.label, lambda library: call(library, 0, 8), variants, same(setting, variants))

    return [comparison(setting) for setting in backend.all]


def permutations(backend: Backend) -> list[Comparison]:
    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(8)
        generator = torch.Generator().manual_seed(2)
        orders = [torch.randperm(8, generator=generator).to(q.device) for _ in range(3)]

        def variants(library: Library) -> Iterator[Rows]:
            for order in orders:
                permuted = library.attend(q[order], k[order], v[order], **setting.options())
                yield permuted.sequences(order.argsort())

        def expected(library: Library) -> Rows:
            return library.attend(q, k, v, **setting.options())

        return Comparison(setting.label, expected, variants, same(setting, variants))

    return [comparison(setting) for setting in backend.all]


def heads(backend: Backend) -> list[Comparison]:
    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(2)
        group = setting.Hq // setting.Hk

        def variants(library: Library) -> Iterator[Rows]:
            groups = zip(q.split(group, 2), k.split(1, 2), v.split(1, 2), strict=True)
            yield join((library.attend(*one, causal=True) for one in groups), "heads")

        return Comparison(setting.label, lambda library: library.attend(q, k, v, causal=True), variants, variants)

    return [comparison(setting) for setting in backend.decode + backend.prefill]


def neighbours(backend: Backend) -> list[Comparison]:
    """The first sequence alone, and in padded batches whose other sequences are longer."""

    def comparison(setting: Setting) -> Comparison:
        capacity = setting.Sk + SPLIT
        q, k, v = replace(setting, Sk=capacity).tensors(4)

        def expected(library: Library) -> Rows:
            return library.attend(q[:1], k[:1, : setting.Sk], v[:1, : setting.Sk], **setting.options())

        def variants(library: Library) -> Iterator[Rows]:
            # The neighbour of 9 keys that grows to 10 once moved a row elsewhere.
            for lengths in ((9, capacity), (10, capacity), (capacity, 9, 1), (capacity - 1, capacity, BLOCK)):
                batch = 1 + len(lengths)
                used = setting.int32([setting.Sk, *lengths])
                padding = (torch.arange(capacity, device=used.device) >= used[:, None])[:, :, None, None]
                yield library.attend(
                    q[:batch],
                    k[:batch].masked_fill(padding, library.filler),
                    v[:batch].masked_fill(padding, library.filler),
                    seqused_k=used,
                    **setting.options(),
                ).sequences(slice(0, 1))

        return Comparison(setting.label, expected, variants, same(setting, variants))

    return [comparison(setting) for setting in backend.all]


def packing(backend: Backend) -> list[Comparison]:
    """Sequences one by one; packed, and padded on the left. Padding on the right is what neighbours() compares."""

    def comparison(setting: Setting, causal: bool) -> Comparison:
        tensors = setting.tensors(4)
        lengths = setting.int32([setting.Sk, setting.Sk - 1, BLOCK + 1, 1])
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

    return [comparison(setting, causal) for setting in backend.prefill for causal in (False, True)]


def rolling_window(backend: Backend) -> list[Comparison]:
    """A full cache, and one that has dropped the keys that no row sees any more."""

    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(8)  # as many as the control needs
        window = (SPLIT // 2, -1)

        def expected(library: Library) -> Rows:
            return library.attend(q, k, v, causal=True, window=window)

        def variants(library: Library) -> Iterator[Rows]:
            for dropped in (1, BLOCK + 3, setting.Sk - SPLIT // 2 - 1):
                first = setting.int32([dropped] * 8)
                yield library.attend(q, k[:, dropped:], v[:, dropped:], causal=True, window=window, k_pos=first)

        return Comparison(setting.label, expected, variants, variants)

    return [comparison(setting) for setting in backend.decode]


def chunks(backend: Backend) -> list[Comparison]:
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

    return [comparison(setting) for setting in backend.prefill]


def prefill_and_decode(backend: Backend) -> list[Comparison]:
    """Rows of a prefill, the same rows decoded one by one, and as the last of a few speculative rows."""

    def comparison(setting: Setting) -> Comparison:
        # As many sequences and rows as the control needs: in 16 bits another split size moves few elements.
        q, k, v = setting.tensors(8)
        rows = [0, 1, BLOCK - 1, BLOCK, *range(200, 500, 60), SPLIT - 1, SPLIT, setting.Sk - 1]

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

    return [comparison(setting) for setting in backend.prefill]


def strides(backend: Backend) -> list[Comparison]:
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

    return [comparison(setting) for setting in backend.decode + backend.prefill]


def split_parallelism(backend: Backend) -> list[Comparison]:
    """Splits folded in place, and computed apart and folded afterwards."""

    def comparison(setting: Setting) -> Comparison:
        call = whole_call(setting, 2)

        def forced(library: Library, split_parallel: bool) -> Rows:
            with _schedule.forced(split_parallel=split_parallel):
                return call(library)

        return Comparison(
            setting.label, lambda library: forced(library, False), lambda library: [forced(library, True)], None
        )

    return [comparison(setting) for setting in backend.all]


def torch_merge(backend: Backend) -> list[Comparison]:
    """The fused kernel, and its partial states folded by torch operations in a Python loop."""

    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(2)
        return Comparison(
            setting.label,
            lambda library: library.attend(q, k, v, **setting.options()),
            lambda library: [library.merged(q, k, v, **setting.options())],
            None,
        )

    return [comparison(setting) for setting in backend.all]


def runs(backend: Backend) -> list[Comparison]:
    def comparison(setting: Setting) -> Comparison:
        call = whole_call(setting, 8)

        def variants(library: Library) -> Iterator[Rows]:
            for _ in range(3):
                yield call(library)

        return Comparison(setting.label, call, variants, same(setting, variants))

    return [comparison(setting) for setting in backend.all]


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
    Check("splits in place or in parallel", split_parallelism),
    Check("fused = partial states merged by torch", torch_merge),
    Check("run to run", runs),
]
