"""Decode from a paged cache, for the GPU benchmark: ours, and FlashInfer where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

import flash_attn_det as fad
from flash_attn_det.commands.cases import CudaCase
from flash_attn_det.commands.prepared import Prepared

FLASHINFER_WORKSPACE = 256 << 20  # bytes


class Pool(NamedTuple):
    """k and v [pages, page_size, Hk, D] in an order without order, block_table [B, columns] int32."""

    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor


def pool(case: CudaCase, k: torch.Tensor, v: torch.Tensor) -> Pool:
    """The case's keys and values in pages, all of them full but for the last of a sequence."""
    columns = -(-case.Sk // case.page_size)
    generator = torch.Generator(k.device).manual_seed(2)
    place = torch.randperm(case.B * columns, generator=generator, device=k.device)
    pages = []
    for x in (k, v):
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, columns * case.page_size - case.Sk))
        out = torch.empty_like(padded).view(-1, case.page_size, *x.shape[2:])
        out[place] = padded.view(out.shape)
        pages.append(out)
    return Pool(*pages, place.int().view(case.B, columns))


def ours(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Prepared:
    """attn_with_kvcache over pages."""
    pages = pool(case, k, v)
    used = torch.full((case.B,), case.Sk, dtype=torch.int32, device=q.device)
    return Prepared(lambda: fad.attn_with_kvcache(q, *pages[:2], cache_seqlens=used, block_table=pages.block_table))


def one_buffer(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Prepared:
    """Ours over the same keys without pages."""
    return Prepared(lambda: fad.attn(q, k, v))


def flashinfer(tensor_cores: bool, split_size: int | None = None) -> Callable[..., Prepared]:
    """FlashInfer's decode over pages, planned before the clock runs. split_size: keys; None: what it plans itself."""

    def prepare(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Prepared:
        package, pages = importlib.import_module("flashinfer"), pool(case, k, v)
        workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=q.device)
        wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
        columns = pages.block_table.shape[1]
        starts = torch.arange(case.B + 1, dtype=torch.int32, device=q.device) * columns
        last = torch.full((case.B,), case.Sk - (columns - 1) * case.page_size, dtype=torch.int32, device=q.device)
        fixed = {} if split_size is None else {"fixed_split_size": split_size // case.page_size}  # in pages
        wrapper.plan(
            starts, pages.block_table.flatten(), last, case.Hq, case.Hk, case.D, case.page_size,
            q_data_type=q.dtype, kv_data_type=k.dtype, **fixed,
        )  # fmt: skip
        rows, caches = q[:, 0], (pages.k, pages.v)
        return Prepared(lambda: wrapper.run(rows, caches), lambda out: out.view(q.shape))

    return prepare
