"""What may change on an NVIDIA GPU without changing a bit, besides the claims of every device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn_det import _schedule
from flash_attn_det.commands import measure
from flash_attn_det.commands.backends import Backend, Setting
from flash_attn_det.commands.claims import same, whole_call
from flash_attn_det.commands.invariance import Check, Comparison
from flash_attn_det.commands.libraries import Library, Ours, Rows

# Every choice of the scheduler. The fma family has one kernel, of which the third says nothing.
TILE_ROWS = {"mma": (16, 64, 128), "fma": (4, 16, 64)}
KERNELS = {"mma": ("generic", "hopper", "cluster"), "fma": (None,)}
STREAMS = 4


def kernels(backend: Backend) -> list[Comparison]:
    """The scheduler's choice, and every other. torch's control is its other kernel, which it calls math."""

    def comparison(setting: Setting) -> Comparison:
        call = whole_call(setting, 2)

        def variants(library: Library) -> Iterator[Rows]:
            for tile_rows, split_parallel, kernel in product(
                TILE_ROWS[backend.arithmetic], (False, True), KERNELS[backend.arithmetic]
            ):
                with _schedule.forced(tile_rows=tile_rows, split_parallel=split_parallel, kernel=kernel):
                    yield call(library)

        def torch_variants(library: Library) -> Iterator[Rows]:
            with sdpa_kernel(SDPBackend.MATH):
                yield call(library)

        return Comparison(setting.label, call, variants, same(setting, torch_variants))

    return [comparison(setting) for setting in backend.all]


def streams(backend: Backend) -> list[Comparison]:
    """torch's current stream, and several others at once."""

    def comparison(setting: Setting) -> Comparison:
        call = whole_call(setting, 2)

        def variants(library: Library) -> Iterator[Rows]:
            current = torch.cuda.current_stream()
            others = [torch.cuda.Stream() for _ in range(STREAMS)]
            results = []
            for stream in others:
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    results.append(call(library))
            for stream in others:
                current.wait_stream(stream)
            yield from results

        return Comparison(setting.label, call, variants, same(setting, variants))

    return [comparison(setting) for setting in backend.all]


def graphs(backend: Backend) -> list[Comparison]:
    """A call, and replays of its CUDA graph into poisoned memory."""

    def comparison(setting: Setting) -> Comparison:
        call = whole_call(setting, 2)

        def variants(library: Library) -> Iterator[Rows]:
            call(library)
            written = []
            graph = measure.capture(lambda: written.append(call(library)))
            (rows,) = written
            for _ in range(2):
                for tensor in rows:
                    if tensor is not None:
                        tensor.fill_(float("nan"))
                graph.replay()
                yield rows

        return Comparison(setting.label, call, variants, same(setting, variants))

    return [comparison(setting) for setting in backend.all]


def is_emulated() -> bool:
    """Whether what this GPU's tensor cores compute is known from measurements."""
    return torch.cuda.get_device_capability() == (9, 0)


def on_the_cpu(library: Library) -> Library:
    """The library as it has to be told to give a GPU's bits on the CPU."""
    emulate = isinstance(library, Ours) and library.arithmetic == "mma"
    return replace(library, arithmetic="mma_sm90") if emulate else library


def processor(backend: Backend) -> list[Comparison]:
    """The GPU, and this machine's CPU: as it is, or emulating the GPU."""

    def comparison(setting: Setting) -> Comparison:
        there = whole_call(replace(setting, device="cpu"), 2)

        def variants(library: Library) -> Iterator[Rows]:
            yield there(on_the_cpu(library))

        return Comparison(setting.label, whole_call(setting, 2), variants, same(setting, variants))

    return [comparison(setting) for setting in backend.all]


_CHECKS = [
    Check("kernel: all kernels, tiles and ways to fold", kernels),
    Check(f"streams: the current one, {STREAMS} others at once", streams),
    Check("CUDA graph replays", graphs),
]
MMA_CHECKS = [*_CHECKS, Check("GPU = its emulation on a CPU", processor, is_emulated)]
# The fma family has one set of bits for all machines.
FMA_CHECKS = [*_CHECKS, Check("GPU = CPU", processor)]
