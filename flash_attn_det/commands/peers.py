"""The attentions that the GPU benchmark runs beside ours: those of torch, and of packages that are installed.

Each gets its inputs in its own natural layout, made before the clock runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

import flash_attn_det as fad
from flash_attn_det.commands import pages
from flash_attn_det.commands.backends import BLOCK
from flash_attn_det.commands.cases import CudaCase
from flash_attn_det.commands.prepared import Prepared


@dataclass(frozen=True)
class Peer:
    """One attention. ``prepare`` takes a case and its q, k, v as CudaCase.tensors() lays them out."""

    name: str
    runs: Callable[[CudaCase], bool]
    prepare: Callable[[CudaCase, torch.Tensor, torch.Tensor, torch.Tensor], Prepared]


def _ours(split_size: Callable[[CudaCase], int | None]) -> Callable[..., Prepared]:
    def prepare(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Prepared:
        if case.page_size:
            return pages.ours(case, q, k, v)
        options = {"causal": case.causal, "split_size": split_size(case)}
        if not case.packed:
            return Prepared(lambda: fad.attn(q, k, v, **options))
        starts = _starts(case)
        return Prepared(lambda: fad.attn_varlen(q, k, v, starts, starts, **options))

    return prepare


def _starts(case: CudaCase) -> torch.Tensor:
    """[B + 1] int32: first row of each packed sequence, or of each of B equal ones laid end to end."""
    starts = case.starts() if case.packed else range(0, (case.B + 1) * case.Sk, case.Sk)
    return torch.tensor(starts, dtype=torch.int32, device="cuda")


def _sdpa(backend: SDPBackend) -> Callable[..., Prepared]:
    """torch's attention with one kernel, on contiguous [B, H, S, D]."""

    def prepare(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Prepared:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        grouped = case.Hq != case.Hk

        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)

        return Prepared(call, lambda out: out.transpose(1, 2))

    return prepare


def _ungrouped(prepare: Callable[..., Prepared]) -> Callable[..., Prepared]:
    """For an attention without grouped heads: k and v get a copy for each query head before the clock runs."""

    def prepare_copies(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Prepared:
        k, v = (x.repeat_interleave(case.Hq // case.Hk, -2) for x in (k, v))
        return prepare(replace(case, Hk=case.Hq), q, k, v)

    return prepare_copies


def _sdpa_padded(backend: SDPBackend) -> Callable[..., Prepared]:
    """Packed sequences padded on the right to the longest: what a causal row sees is the same."""
    dense = _sdpa(backend)

    def prepare(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Prepared:
        def padded(x: torch.Tensor) -> torch.Tensor:
            sequences = zip(x.split(case.packed), case.packed, strict=True)
            return torch.stack([pad(part, (0, 0, 0, 0, 0, case.Sk - n)) for part, n in sequences])

        call, rows = dense(case, *map(padded, (q, k, v)))
        return Prepared(call, lambda out: torch.cat([part[:n] for part, n in zip(rows(out), case.packed, strict=True)]))

    return prepare


def _sdpa_nested(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Prepared:
    """torch's jagged tensors, over the packed buffers as they are."""
    starts = _starts(case)
    jagged = (
        torch.nested.nested_tensor_from_jagged(x, starts.long(), min_seqlen=min(case.packed), max_seqlen=case.Sk)
        for x in (q, k, v)
    )
    q, k, v = (x.transpose(1, 2) for x in jagged)
    return Prepared(
        lambda: scaled_dot_product_attention(q, k, v, is_causal=case.causal), lambda out: out.transpose(1, 2).values()
    )


def _varlen_attn(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Prepared:
    """torch.nn.attention.varlen, where a window of (-1, 0) means causal."""
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    starts, window = _starts(case), (-1, 0 if case.causal else -1)
    return Prepared(lambda: varlen_attn(q, k, v, starts, starts, case.Sk, case.Sk, window_size=window))


def _flex(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Prepared:
    """FlexAttention, compiled for this case."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    mask = None
    if case.causal:
        mask = create_block_mask(lambda b, h, row, key: row >= key, None, None, case.Sq, case.Sk, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = case.Hq != case.Hk
    return Prepared(lambda: compiled(q, k, v, block_mask=mask, enable_gqa=grouped), lambda out: out.transpose(1, 2))


def _flash_attn(module: str) -> Callable[..., Prepared]:
    """The package flash-attn, or its third version, whose functions have the same arguments."""

    def prepare(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Prepared:
        package = importlib.import_module(module)

        def out(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
            return result[0] if isinstance(result, tuple) else result

        if not case.packed:
            return Prepared(lambda: out(package.flash_attn_func(q, k, v, causal=case.causal)))
        starts = _starts(case)
        call = q, k, v, starts, starts, case.Sk, case.Sk
        return Prepared(lambda: out(package.flash_attn_varlen_func(*call, causal=case.causal)))

    return prepare


def _flashinfer(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Prepared:
    """FlashInfer's wrapper for ragged batches, planned before the clock runs."""
    flashinfer = importlib.import_module("flashinfer")
    workspace = torch.empty(pages.FLASHINFER_WORKSPACE, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    keys = _starts(case)
    rows = keys if case.packed else torch.arange(case.B + 1, dtype=torch.int32, device="cuda") * case.Sq
    wrapper.plan(rows, keys, case.Hq, case.Hk, case.D, causal=case.causal, q_data_type=q.dtype)
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (q, k, v)]
    return Prepared(lambda: wrapper.run(*flat), lambda out: out.view(q.shape))


def _paged(case: CudaCase) -> bool:
    return case.page_size > 0


def _dense(case: CudaCase) -> bool:
    return case.kind != "split" and not case.packed and not case.page_size


def _dense16(case: CudaCase) -> bool:
    return _dense(case) and case.dtype != "float32"


def _packed(case: CudaCase) -> bool:
    return bool(case.packed)


def _any16(case: CudaCase) -> bool:
    return case.kind != "split" and case.dtype != "float32" and not case.page_size


FIXED_SPLIT = 1024  # keys, as in ours

OURS = Peer("ours", lambda case: True, _ours(lambda case: None))
_BUILT_IN = [
    Peer("FA2", _dense16, _sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("cuDNN", _dense16, _sdpa(SDPBackend.CUDNN_ATTENTION)),
    Peer(
        "efficient",
        lambda case: _dense(case) and case.dtype == "float32",
        _ungrouped(_sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    ),
    Peer("varlen_attn", _packed, _varlen_attn),
    Peer("nested", _packed, _sdpa_nested),
    Peer("FA2 padded", _packed, _sdpa_padded(SDPBackend.FLASH_ATTENTION)),
    Peer("cuDNN padded", _packed, _sdpa_padded(SDPBackend.CUDNN_ATTENTION)),
    Peer("one split", lambda case: case.kind == "split", _ours(lambda case: -(-case.Sk // BLOCK) * BLOCK)),
    Peer("one buffer", _paged, pages.one_buffer),
]
_FLEX = Peer("FlexAttention", _dense, _flex)
_PACKAGES = [
    ("flash_attn", Peer("flash-attn", _any16, _flash_attn("flash_attn"))),
    ("flash_attn_interface", Peer("flash-attn 3", _any16, _flash_attn("flash_attn_interface"))),
    ("flashinfer", Peer("FlashInfer", _any16, _flashinfer)),
    ("flashinfer", Peer("FlashInfer", _paged, pages.flashinfer(tensor_cores=False))),
    ("flashinfer", Peer("FlashInfer tensor cores", _paged, pages.flashinfer(tensor_cores=True))),
    ("flashinfer", Peer("FlashInfer fixed split", _paged, pages.flashinfer(tensor_cores=True, split_size=FIXED_SPLIT))),
]
LEGEND = (
    "FA2, cuDNN and efficient are torch's scaled_dot_product_attention with that kernel; varlen_attn is torch's for "
    "packed sequences, nested its jagged tensors, padded its dense form on sequences filled up to the longest. "
    "efficient has no grouped heads: it gets a copy of k and v for each query head, made before the clock runs. "
    "one buffer is ours without pages. FlashInfer is as it comes, for decode without tensor cores; tensor cores is its "
    f"decode told to use them, fixed split that told to split at every {FIXED_SPLIT} keys, too; it plans before the "
    "clock runs."
)


def peers(flex: bool) -> list[Peer]:
    """What ours is run beside: what torch brings, FlexAttention if wanted, and the packages that are installed."""
    installed = [peer for module, peer in _PACKAGES if importlib.util.find_spec(module) is not None]
    return [*_BUILT_IN, *([_FLEX] if flex else []), *installed]


def refused(problem: Exception, warned: list[warnings.WarningMessage]) -> str:
    """Why a peer did not run, in one line: its error, and the warnings with which torch explains itself."""
    texts = [str(problem).strip() or type(problem).__name__, *(str(warning.message) for warning in warned)]
    lines = [text.splitlines()[0].partition(" (Triggered internally")[0] for text in texts]
    return "; ".join(dict.fromkeys(lines))
