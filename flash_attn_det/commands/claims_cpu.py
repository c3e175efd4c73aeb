"""What may change on a CPU without changing a bit, besides the claims of every device."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn_det import _schedule
from flash_attn_det.commands import measure
from flash_attn_det.commands.backends import SPLIT, Backend, Setting
from flash_attn_det.commands.claims import same, whole_call
from flash_attn_det.commands.invariance import Check, Comparison
from flash_attn_det.commands.libraries import Library, Rows
from flash_attn_det.reference import attn_reference


def kernels(backend: Backend) -> list[Comparison]:
    """The scheduler's choice, and every other. torch's control is its other kernel, which it calls math."""

    def comparison(setting: Setting) -> Comparison:
        call = whole_call(setting, 2)

        def variants(library: Library) -> Iterator[Rows]:
            for layout in ("rows", "keys"):
                for tile_rows in (1, 40, 256):
                    with _schedule.forced(layout=layout, tile_rows=tile_rows):
                        yield call(library)

        def torch_variants(library: Library) -> Iterator[Rows]:
            with sdpa_kernel(SDPBackend.MATH):
                yield call(library)

        return Comparison(setting.label, call, variants, same(setting, torch_variants))

    return [comparison(setting) for setting in backend.all]


def threads(backend: Backend) -> list[Comparison]:
    def comparison(setting: Setting) -> Comparison:
        call = whole_call(setting, 8)

        def expected(library: Library) -> Rows:
            with measure.torch_threads(1):
                return call(library)

        def variants(library: Library) -> Iterator[Rows]:
            for count in (2, 3, 8):
                with measure.torch_threads(count):
                    yield call(library)

        return Comparison(setting.label, expected, variants, same(setting, variants))

    return [comparison(setting) for setting in backend.all]


_CHILD = """
import sys, torch
q, k, v = torch.load(sys.argv[1])
attention = torch.nn.functional.scaled_dot_product_attention
torch.save(attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2), sys.argv[2])
"""


def instruction_sets(backend: Backend) -> list[Comparison]:
    """Every instruction set of this processor. torch chooses once per process, so its control is another process."""

    def comparison(setting: Setting) -> Comparison:
        call = whole_call(setting, 2)

        def variants(library: Library) -> Iterator[Rows]:
            for isa in _schedule.isas():
                with _schedule.forced(isa=isa):
                    yield call(library)

        def torch_variants(library: Library) -> Iterator[Rows]:
            with tempfile.TemporaryDirectory() as folder:
                inputs, result = Path(folder) / "inputs.pt", Path(folder) / "result.pt"
                torch.save(setting.tensors(2), inputs)
                subprocess.run(
                    [sys.executable, "-c", _CHILD, inputs, result],
                    env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
                    check=True,
                )
                yield Rows(torch.load(result), None)

        # One process is enough to see what torch does, and takes seconds.
        return Comparison(setting.label, call, variants, torch_variants if setting is backend.decode[0] else None)

    return [comparison(setting) for setting in backend.all]


def plain_torch(backend: Backend) -> list[Comparison]:
    """The C kernels, and the contract written in plain torch operations."""

    def comparison(setting: Setting) -> Comparison:
        q, k, v = setting.tensors(2)
        q = q[:, -5:]

        def expected(library: Library) -> Rows:
            return library.attend(q, k, v, **setting.options())

        def variants(library: Library) -> Iterator[Rows]:
            yield Rows(*attn_reference(q, k, v, **setting.options(), split_size=SPLIT, return_lse=True))

        return Comparison(setting.label, expected, variants, None)

    return [comparison(setting) for setting in backend.all]


CHECKS = [
    Check("kernel: layouts and tile sizes", kernels),
    Check("threads: 1, 2, 3, 8", threads),
    Check("instruction sets", instruction_sets),
    Check("C kernels = contract in plain torch", plain_torch),
]
