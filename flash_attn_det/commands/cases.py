"""What the benchmark runs: attention calls, how much work each is, and their inputs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

# Floating-point operations that a case may cost on a CPU without --full: a second or two of one core.
LARGEST_FLOP = 6e11


@dataclass(frozen=True)
class Case:
    """One attention call: B sequences, Sq queries on Sk keys, Hq query heads on Hk key heads, head dim D."""

    kind: str
    dtype: str
    B: int
    Sq: int
    Sk: int
    Hq: int
    Hk: int
    D: int
    causal: bool

    @property
    def shape(self) -> str:
        """Lengths, heads and mask in one short line."""
        rows = "" if self.Sq in (1, self.Sk) else f"Lq {self.Sq}, "
        heads = f"H {self.Hq}" if self.Hq == self.Hk else f"H {self.Hq}/{self.Hk}"
        return f"B {self.B}, {rows}L {self.Sk}, {heads}, D {self.D}{', causal' if self.causal else ''}"

    @property
    def name(self) -> str:
        """The case in one short line."""
        return f"{self.kind} {self.dtype}, {self.shape}"

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """Queries and keys of each sequence."""
        return ((self.Sq, self.Sk),) * self.B

    @property
    def flop(self) -> int:
        """Operations of both products over the visible pairs, of a backward's five; an FMA counts as two."""
        pairs = sum(n * (n + 1) // 2 if self.causal else n * keys for n, keys in self.lengths)
        return (10 if self.kind == "backward" else 4) * self.Hq * pairs * self.D

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V, each read once."""
        return 2 * sum(keys for _, keys in self.lengths) * self.Hk * self.D * getattr(torch, self.dtype).itemsize

    def tensors(self, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, Sq, Hq, D], k and v [B, Sk, Hk, D] of normal noise, the same on every run on one kind of device."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(self.B, self.Sq, self.Hq), (self.B, self.Sk, self.Hk), (self.B, self.Sk, self.Hk)]
        q, k, v = (
            torch.randn(*s, self.D, generator=generator, device=device).to(getattr(torch, self.dtype)) for s in shapes
        )
        return q, k, v


def cpu_cases(quick: bool, full: bool) -> list[Case]:
    """The CPU's grid: prefill, decode, backward. Without ``full``, the cases beyond LARGEST_FLOP are left out."""
    batches, lengths, heads = ((1,), (512, 2048), (8,)) if quick else ((1, 8), (512, 2048, 8192), (8, 32))
    head_dims = (64, 128)
    grid = [
        Case("prefill", dtype, B, L, L, H, H, D, causal)
        for dtype in ("float32", "bfloat16")
        for D in head_dims
        for H in heads
        for B in batches
        for L in lengths
        for causal in (False, True)
    ]
    grid += [
        Case("decode", dtype, 1, 1, L, 32, 8, D, False)
        for dtype in ("float32", "bfloat16")
        for D in head_dims
        for L in ((1024, 16384) if quick else (1024, 4096, 16384, 65536))
    ]
    grid += [
        Case("backward", dtype, 1, L, L, 8, 8, D, causal)
        for dtype in ("float32", "bfloat16")
        for D in (head_dims[:1] if quick else head_dims)
        for L in ((512,) if quick else (512, 2048))
        for causal in (False, True)
    ]
    return [case for case in grid if full or case.flop <= LARGEST_FLOP]


@dataclass(frozen=True)
class CudaCase(Case):
    """A case on a GPU.

    replay: timed inside a CUDA graph. packed: lengths of sequences that lie end to end instead of B equal ones.
    page_size: of the cache that keys and values lie in, 0 for one buffer. memory_limit: bytes that our call may add at
    its peak. quick: part of the short run.
    """

    replay: bool = False
    packed: tuple[int, ...] = ()
    page_size: int = 0
    memory_limit: int | None = None
    quick: bool = False

    @property
    def shape(self) -> str:
        if self.page_size:
            return f"{super().shape}, pages of {self.page_size}"
        if not self.packed:
            return super().shape
        lengths = f"{min(self.packed)} to {max(self.packed)}"
        return f"B {self.B}, L {lengths}, H {self.Hq}, D {self.D}{', causal' if self.causal else ''}"

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        return tuple((n, n) for n in self.packed) if self.packed else super().lengths

    def starts(self) -> list[int]:
        """First row of each packed sequence, and the end of the last."""
        return [sum(self.packed[:b]) for b in range(len(self.packed) + 1)]

    def tensors(self, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As in Case; packed sequences lie in q [T, Hq, D], k and v [T, Hk, D]."""
        q, k, v = super().tensors(device)
        if not self.packed:
            return q, k, v
        used = torch.arange(self.Sk, device=device) < torch.tensor(self.packed, device=device)[:, None]
        return q[used], k[used], v[used]


GROUPS = {
    "prefill": "Prefill",
    "decode": "Decode: one query per sequence",
    "paged": "Decode from a paged cache: one query per sequence",
    "few": "Few queries against a long cache",
    "short": "Short sequences",
    "fork": "The cases that an earlier deterministic fork of FlashAttention published",
    "split": "What splits cost: the default split size, and one split for the whole sequence",
    "backward": "Backward alone",
}


def _square(kind: str, dtype: str, B: int, L: int, H: int, D: int, causal: bool, **more: object) -> CudaCase:
    return CudaCase(kind, dtype, B, L, L, H, H, D, causal, **more)


def _prefill() -> Iterator[CudaCase]:
    quick = ((2, 8192, 16, 128, True), (4, 4096, 16, 128, True), (8, 4096, 32, 64, False))
    for shape in (
        (8, 4096, 32, 64, False),
        (4, 2048, 32, 64, False),
        (2, 8192, 16, 128, True),
        (2, 8192, 16, 128, False),
        (1, 16384, 16, 128, True),
        (2, 8192, 8, 256, True),
        (4, 4096, 16, 128, True),
        (16, 1024, 16, 128, True),
    ):
        yield _square("prefill", "bfloat16", *shape, quick=shape in quick)
    for D, causal in product((64, 128, 256), (False, True)):
        yield _square("prefill", "float32", 1, 4096, 16, D, causal, quick=(D, causal) == (128, True))


def _decode() -> Iterator[CudaCase]:
    quick = ((1, 32, 8, 4096, 128), (1, 32, 8, 32768, 128), (32, 32, 8, 8192, 128))
    for shape in (
        (1, 32, 8, 512, 128),
        (1, 32, 8, 1024, 128),
        (1, 32, 8, 2048, 128),
        (1, 32, 8, 4096, 128),
        (1, 32, 8, 16384, 128),
        (1, 32, 8, 32768, 128),
        (1, 32, 8, 131072, 128),
        (8, 32, 8, 1024, 128),
        (8, 32, 8, 8192, 128),
        (32, 32, 8, 8192, 128),
        (128, 32, 8, 4096, 128),
        (64, 32, 8, 2048, 128),
        (1, 32, 32, 8192, 128),
        (8, 14, 2, 19802, 64),
    ):
        B, Hq, Hk, L, D = shape
        yield CudaCase("decode", "bfloat16", B, 1, L, Hq, Hk, D, False, replay=True, quick=shape in quick)


def _paged() -> Iterator[CudaCase]:
    for (B, L), page_size in product(((1, 1024), (1, 4096), (8, 8192), (64, 2048), (1, 32768)), (1, 16, 64)):
        quick = (B, page_size) == (8, 16)
        yield CudaCase("paged", "bfloat16", B, 1, L, 32, 8, 128, False, replay=True, page_size=page_size, quick=quick)


def _few() -> Iterator[CudaCase]:
    for L, Lq in product((16384, 32768), (4, 16, 64, 128, 512, 2048)):
        quick = (L, Lq) in ((16384, 16), (32768, 512))
        yield CudaCase("few", "bfloat16", 1, Lq, L, 32, 8, 128, False, replay=True, quick=quick)


def _short() -> Iterator[CudaCase]:
    yield _square("short", "bfloat16", 16, 1024, 16, 128, True)
    ragged = random.Random(0)
    packed = tuple(ragged.randint(128, 4096) for _ in range(64))
    yield _square("short", "bfloat16", len(packed), max(packed), 16, 128, True, packed=packed, quick=True)


def _backward() -> Iterator[CudaCase]:
    for shape in (
        (8, 4096, 32, 64, False),
        (4, 2048, 32, 64, False),
        (2, 8192, 16, 128, True),
        (2, 8192, 16, 128, False),
        (2, 8192, 8, 256, True),
        (4, 4096, 16, 128, True),
        (16, 1024, 16, 128, True),
    ):
        yield _square("backward", "bfloat16", *shape, quick=shape == (4, 4096, 16, 128, True))
    yield _square("backward", "float32", 1, 4096, 16, 128, True, quick=True)


def cuda_cases() -> list[CudaCase]:
    """Every case of the GPU benchmark, by group in the order of GROUPS."""
    return [
        *_prefill(),
        *_decode(),
        *_paged(),
        *_few(),
        *_short(),
        _square("fork", "float16", 8, 4096, 32, 64, False),
        _square("fork", "float16", 4, 2048, 32, 64, False, memory_limit=34 << 20, quick=True),
        *(_square("split", "bfloat16", 2, 8192, 16, D, False, quick=D == 128) for D in (64, 128, 256)),
        *_backward(),
    ]
