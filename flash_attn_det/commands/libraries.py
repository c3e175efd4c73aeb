"""The attentions that claims are tried on, under one interface: this library, and torch's own as a control.

Both have ``attend``, which takes q [B, Sq, Hq, D], k, v and options of ``attn``; ``packed``, which takes lists of
[S, H, D]; and ``filler``, what they meet in rows of padding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flash_attn_det as fad


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


@dataclass(frozen=True)
class Ours:
    """This library, with one arithmetic family and split size."""

    arithmetic: str
    split_size: int
    filler: ClassVar[float] = float("nan")

    def _settings(self) -> dict[str, object]:
        return {"arithmetic": self.arithmetic, "split_size": self.split_size}

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> Rows:
        return Rows(*fad.attn(q, k, v, **options, **self._settings(), return_lse=True))

    def packed(
        self, qs: list[torch.Tensor], ks: list[torch.Tensor], vs: list[torch.Tensor], **options: object
    ) -> list[Rows]:
        starts = [torch.tensor([0, *map(len, xs)]).cumsum(0, dtype=torch.int32) for xs in (qs, ks)]
        on_device = (x.to(qs[0].device) for x in starts)
        call = *(torch.cat(xs) for xs in (qs, ks, vs)), *on_device
        out, lse = fad.attn_varlen(*call, **options, **self._settings(), return_lse=True)
        return [Rows(out[None, a:b], lse[None, :, a:b]) for a, b in pairwise(starts[0].tolist())]

    def merged(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> Rows:
        """The partial states of the splits, folded by torch operations."""
        partials = fad.attn_partials(q, k, v, **options, **self._settings())
        return Rows(*fad.merge_partials(partials, return_lse=True))


@dataclass(frozen=True)
class Torch:
    """torch's scaled_dot_product_attention, with the kernel that it chooses among those that are allowed."""

    filler: ClassVar[float] = 0.0

    def attend(
        self,
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
        first = torch.zeros(1, dtype=torch.int32, device=q.device) if leftpad_k is None else leftpad_k
        end = first + seqused_k if seqused_k is not None else torch.full_like(first, Sk)
        key = torch.arange(Sk, device=q.device)
        # Position in the buffer, aligned to the end of the keys.
        query = torch.arange(Sq, device=q.device) + (end[:, None] - Sq)
        visible = ((key >= first[:, None]) & (key < end[:, None]))[:, None, :].expand(-1, Sq, -1)
        if causal:
            visible = visible & (key <= query[:, :, None])
        if window[0] >= 0:
            visible = visible & (key >= query[:, :, None] - window[0])
        out = scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=True)
        return Rows(out.transpose(1, 2), None)

    def packed(
        self, qs: list[torch.Tensor], ks: list[torch.Tensor], vs: list[torch.Tensor], *, causal: bool
    ) -> list[Rows]:
        # Jagged tensors know no grouped heads.
        group = qs[0].shape[1] // ks[0].shape[1]
        lists = qs, [k.repeat_interleave(group, 1) for k in ks], [v.repeat_interleave(group, 1) for v in vs]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype stage")
            q, k, v = (torch.nested.nested_tensor(x, layout=torch.jagged).transpose(1, 2) for x in lists)
            out = scaled_dot_product_attention(q, k, v, is_causal=causal)
        return [Rows(x[None], None) for x in out.transpose(1, 2).unbind()]


Library = Ours | Torch


@contextmanager
def flash_first(device: str) -> Iterator[None]:
    """On a GPU, torch's attention takes its flash kernel where that can run, and never cuDNN's.

    cuDNN's, which torch prefers on some GPUs, is compiled anew for every shape, which takes a second.
    """
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True) if device == "cuda" else nullcontext():
        yield
