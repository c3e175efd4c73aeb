"""What may change in a call, and on which processor it runs, without changing a bit of the gradients of q, k and v."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch

import flash_attn_det as fad
from flash_attn_det import _schedule
from flash_attn_det.commands import measure
from flash_attn_det.commands.backends import BLOCK, Backend, Setting
from flash_attn_det.commands.claims import same
from flash_attn_det.commands.claims_cuda import is_emulated, on_the_cpu
from flash_attn_det.commands.gradients import Gradients
from flash_attn_det.commands.invariance import Check, Comparison
from flash_attn_det.commands.libraries import Library


def settings(backend: Backend) -> tuple[Setting, ...]:
    """Those with rows enough that a control can tell; float64, which is no faster than it must be, takes seconds."""
    rest = (setting for setting in backend.everything if setting.Sq > 1 and setting.dtype != torch.float64)
    return (*backend.prefill, *rest)


def differentiate(attend: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Gradients:
    """Gradients of attend(q, k, v) for q, k, v and a gradient of its result, within inference mode as well."""
    with torch.inference_mode(False), torch.enable_grad():
        *leaves, dout = (x.clone() for x in inputs)
        out = attend(*(leaf.requires_grad_() for leaf in leaves))
        return Gradients(*torch.autograd.grad(out, leaves, dout))


def of_call(library: Library, inputs: tuple[torch.Tensor, ...], **options: object) -> Gradients:
    """Gradients of one dense call of q, k, v and dout."""

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        kept = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        return library.attend(*qkv, **kept).out

    return differentiate(attend, *inputs)


def inputs_of(setting: Setting, B: int) -> tuple[torch.Tensor, ...]:
    """q, k, v and a gradient of out, the same numbers on every device."""
    q, k, v = setting.tensors(B)
    dout = torch.randn((B, setting.Sq, setting.Hq, setting.Dv), generator=torch.Generator().manual_seed(6))
    return q, k, v, dout.to(setting.device, setting.dtype)


def _joined(parts: Iterator[Gradients], dim: int) -> Gradients:
    return Gradients(*(torch.cat(x, dim) for x in zip(*parts, strict=True)))


def batches(backend: Backend) -> list[Comparison]:
    def comparison(setting: Setting) -> Comparison:
        inputs, options = inputs_of(setting, 8), setting.options()
        generator = torch.Generator().manual_seed(2)
        orders = [torch.randperm(8, generator=generator).to(setting.device) for _ in range(2)]

        def call(library: Library, rows: slice | torch.Tensor) -> Gradients:
            return of_call(library, tuple(x[rows] for x in inputs), **options)

        def variants(library: Library) -> Iterator[Gradients]:
            for cuts in ((0, 4, 8), range(9), (0, 1, 8)):
                yield _joined((call(library, slice(a, b)) for a, b in pairwise(cuts)), 0)
            for order in orders:
                yield Gradients(*(x[order.argsort()] for x in call(library, order)))

        return Comparison(setting.label, lambda library: call(library, slice(None)), variants, same(setting, variants))

    return [comparison(setting) for setting in settings(backend)]


def packing(backend: Backend) -> list[Comparison]:
    """Sequences one by one; packed; keys padded on the left and rows on the right, with NaN."""

    def comparison(setting: Setting, causal: bool) -> Comparison:
        inputs = inputs_of(setting, 4)
        lengths = [setting.Sk, setting.Sk - 1, BLOCK + 1, 1]
        own = [[x[b : b + 1, :n] for x in inputs] for b, n in enumerate(lengths)]

        def expected(library: Library) -> Gradients:
            return _joined((of_call(library, tuple(one), causal=causal) for one in own), 1)

        def packed(library: Library) -> Gradients:
            starts = setting.int32([0, *torch.tensor(lengths).cumsum(0).tolist()])

            def attend(*qkv: torch.Tensor) -> torch.Tensor:
                kept = starts.clone()
                keywords = {"arithmetic": library.arithmetic, "split_size": library.split_size}
                return fad.attn_varlen(*qkv, kept, kept, causal=causal, **keywords)

            flat = (torch.cat([x[0] for x in parts]) for parts in zip(*own, strict=True))
            return Gradients(*(x[None] for x in differentiate(attend, *flat)))

        def padded(library: Library) -> Gradients:
            used = setting.int32(lengths)
            q, k, v, dout = (torch.full_like(x, float("nan")) for x in inputs)
            for b, (n, one) in enumerate(zip(lengths, own, strict=True)):
                q[b, :n], dout[b, :n] = one[0][0], one[3][0]
                k[b, setting.Sk - n :], v[b, setting.Sk - n :] = one[1][0], one[2][0]
            lengths_of = {"seqused_q": used, "leftpad_k": setting.Sk - used}
            dq, dk, dv = of_call(library, (q, k, v, dout), causal=causal, **lengths_of)
            behind = (slice(setting.Sk - n, None) for n in lengths)
            parts = ((dq[b : b + 1, :n], dk[b : b + 1, at], dv[b : b + 1, at])
                     for b, (n, at) in enumerate(zip(lengths, behind, strict=True)))  # fmt: skip
            return _joined((Gradients(*part) for part in parts), 1)

        def variants(library: Library) -> Iterator[Gradients]:
            yield packed(library)
            yield padded(library)

        return Comparison(f"{setting.label}{', causal' if causal else ''}", expected, variants, None)

    return [comparison(setting, causal) for setting in backend.prefill for causal in (False, True)]


def whole(setting: Setting, B: int) -> Callable[[Library], Gradients]:
    """Gradients of one call of B sequences with the setting's options."""
    inputs = inputs_of(setting, B)
    return lambda library: of_call(library, inputs, **setting.options())


def runs(backend: Backend) -> list[Comparison]:
    def comparison(setting: Setting) -> Comparison:
        call = whole(setting, 8)

        def variants(library: Library) -> Iterator[Gradients]:
            for _ in range(3):
                yield call(library)

        return Comparison(setting.label, call, variants, same(setting, variants))

    return [comparison(setting) for setting in settings(backend)]


def cpu_schedules(backend: Backend) -> list[Comparison]:
    """Every instruction set of this processor, tiles, one pass or two, and numbers of threads."""

    def comparison(setting: Setting) -> Comparison:
        call = whole(setting, 8)

        def variants(library: Library) -> Iterator[Gradients]:
            for isa in _schedule.isas():
                with _schedule.forced(isa=isa):
                    yield call(library)
            for tile_rows, split_parallel in ((64, False), (64, True), (256, True)):
                with _schedule.forced(tile_rows=tile_rows, split_parallel=split_parallel):
                    yield call(library)
            for threads in (1, 3, 8):
                with measure.torch_threads(threads):
                    yield call(library)

        return Comparison(setting.label, call, variants, None)

    return [comparison(setting) for setting in settings(backend)]


def processor(backend: Backend) -> list[Comparison]:
    """The GPU, and this machine's CPU: as it is, or emulating the GPU."""

    def comparison(setting: Setting) -> Comparison:
        there = whole(replace(setting, device="cpu"), 2)

        def variants(library: Library) -> Iterator[Gradients]:
            yield there(on_the_cpu(library))

        return Comparison(setting.label, whole(setting, 2), variants, same(setting, variants))

    return [comparison(setting) for setting in settings(backend)]


CHECKS = [
    Check("gradients: batch of 8 = 4 + 4 = 1 + 7 = eight calls = any order", batches),
    Check("gradients: packed = padded = alone", packing),
    Check("gradients: run to run", runs),
]
CPU_CHECKS = [*CHECKS, Check("gradients: instruction sets, tiles, passes, threads", cpu_schedules)]
FMA_CHECKS = [*CHECKS, Check("gradients: GPU = CPU", processor)]
MMA_CHECKS = [*CHECKS, Check("gradients: GPU = its emulation on a CPU", processor, is_emulated)]
