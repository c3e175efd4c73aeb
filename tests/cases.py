"""The only list of shapes. Tests and benchmarks take their calls from here.

Inputs come from a generator written out below in integers, so that they are the same bits on every machine and under
every version of torch and NumPy: golden hashes depend on them.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np
import torch

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
HEAD_DIMS = (1, 3, 8, 40, 64, 72, 96, 100, 128, 192, 255, 256)

# Every way to cut 10 query rows, or a sequence, that has broken a peer.
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 16, 17, 64, 128)
GRAPH_BUCKET_BATCHES = (991, 992, 993)
LENGTHS = (0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1025)
CHUNK_CUTS = (1, 511, 2048, 4097)
# A neighbour that grows from 9 to 10 query rows changed a decode row of a peer at this shape.
NEIGHBOUR = {"Hq": 14, "Hk": 2, "D": 64, "Sk": 19802}


def uniform_bits(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """uint64 noise: splitmix64 of a counter."""
    count = int(np.prod(shape, dtype=np.int64))
    with np.errstate(over="ignore"):
        z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed) * np.uint64(1 << 32)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).reshape(shape)


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Bell-shaped numbers of unit variance, at most 3.5 in size: a sum of four uniform 16-bit integers, scaled.

    Exact integer arithmetic up to one rounding in float64 and one more to the dtype.
    """
    bits = uniform_bits(shape, seed)
    total = sum(((bits >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64) for i in range(4))
    return torch.from_numpy((total - 2 * 0xFFFF) * (1.7320508075688772 / 65536)).to(dtype)


def integers(count: int, low: int, high: int, seed: int) -> torch.Tensor:
    """int32 numbers in low .. high."""
    return torch.from_numpy((uniform_bits((count,), seed) % np.uint64(high - low + 1)).astype(np.int32)) + low


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call. Switches whose value is a tensor name it here and get it from ``inputs``."""

    name: str
    dtype: str = "fp32"
    B: int = 2
    Sq: int = 11
    Sk: int = 422
    Hq: int = 4
    Hk: int = 2
    D: int = 24
    Dv: int = 16
    options: tuple[tuple[str, Any], ...] = ()  # keywords of attn with plain values
    alibi: str = ""  # "heads": [Hq], "batch": [B, Hq]
    sinks: bool = False
    lengths: str = ""  # which of q, k, pad, pos are given: e.g. "qk", "k pad", "pos"
    gain: float = 1.0  # multiplies q

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    def inputs(self) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, Any]]:
        """(q, k, v) and the keywords of attn."""
        dtype = DTYPES[self.dtype]
        compute = torch.float64 if self.dtype == "fp64" else torch.float32
        q = normal((self.B, self.Sq, self.Hq, self.D), self.seed, torch.float64)
        k = normal((self.B, self.Sk, self.Hk, self.D), self.seed + 1, dtype)
        v = normal((self.B, self.Sk, self.Hk, self.Dv), self.seed + 2, dtype)
        keywords = dict(self.options)
        if self.alibi:
            shape = (self.Hq,) if self.alibi == "heads" else (self.B, self.Hq)
            keywords["alibi_slopes"] = normal(shape, self.seed + 3, compute) / 8
        if self.sinks:
            keywords["sinks"] = 2 * normal((self.Hq,), self.seed + 4, compute)
        wanted = self.lengths.split()
        pad = torch.zeros(self.B, dtype=torch.int32)
        if "pad" in wanted:
            pad = keywords["leftpad_k"] = integers(self.B, 0, self.Sk, self.seed + 5)
        if "k" in wanted:
            part = integers(self.B, 0, 1 << 20, self.seed + 6).long()
            keywords["seqused_k"] = (part % (self.Sk - pad + 1)).to(torch.int32)
        if "q" in wanted:
            keywords["seqused_q"] = integers(self.B, 0, self.Sq, self.seed + 7)
        if "pos" in wanted:
            keywords["k_pos"] = integers(self.B, 0, 1000, self.seed + 8)
        return ((q * self.gain).to(dtype), k, v), keywords


def _variants() -> list[Case]:
    """Every mask and score option by itself and in company, for every dtype."""
    split = ("split_size", 128)
    options: list[dict[str, Any]] = [
        {"name": "plain", "options": (split,)},
        {"name": "one split", "options": (("split_size", 512),)},
        {"name": "causal", "options": (("causal", True), split)},
        {"name": "window left", "options": (("window", (74, -1)), split)},
        {"name": "window right", "options": (("window", (-1, 3)), split)},
        {"name": "window both", "options": (("window", (140, 0)), split)},
        {"name": "window none", "options": (("window", (0, 0)), split)},
        {"name": "causal window", "options": (("causal", True), ("window", (200, 50)), split)},
        {"name": "softcap", "options": (("softcap", 2.5), split), "gain": 4.0},
        {"name": "softcap negative scale", "options": (("softcap", 1.5), ("scale", -0.75), split)},
        {"name": "alibi", "alibi": "heads", "options": (split,)},
        {"name": "alibi per batch causal", "alibi": "batch", "options": (("causal", True), split)},
        {"name": "alibi softcap", "alibi": "batch", "options": (("softcap", 3.0), split)},
        {"name": "sinks", "sinks": True, "options": (split,)},
        {"name": "sinks causal window", "sinks": True, "options": (("causal", True), ("window", (5, -1)), split)},
        {"name": "negative scale", "options": (("scale", -0.3), split)},
        {"name": "zero scale", "options": (("scale", 0.0), split)},
        {"name": "lengths", "B": 5, "lengths": "q k", "options": (split,)},
        {"name": "lengths causal sinks", "B": 5, "lengths": "q k", "sinks": True, "options": (("causal", True), split)},
        {"name": "left padding", "B": 4, "lengths": "pad", "options": (("causal", True), split)},
        {"name": "left padding and lengths", "B": 5, "lengths": "pad q k", "options": (("window", (9, 9)), split)},
        {"name": "first position", "B": 3, "lengths": "pos", "options": (("causal", True), ("split_size", 256))},
        {
            "name": "everything",
            "B": 5,
            "lengths": "pad q k pos",
            "alibi": "batch",
            "sinks": True,
            "options": (("causal", True), ("window", (180, -1)), ("softcap", 4.0), ("scale", 0.5), split),
        },
    ]
    return [Case(**{**o, "name": f"{o['name']} {dtype}", "dtype": dtype}) for o in options for dtype in DTYPES]


def _shapes() -> list[Case]:
    split = (("split_size", 256),)
    causal = (*split, ("causal", True))
    cases = []
    for i, D in enumerate(HEAD_DIMS):
        Dv = HEAD_DIMS[(5 * i + 3) % len(HEAD_DIMS)]
        for dtype in DTYPES:
            cases.append(Case(f"D {D} Dv {Dv} {dtype}", dtype, B=1, Sq=5, Sk=260, D=D, Dv=Dv, options=causal))
    for Sk in LENGTHS:
        for Sq in (0, 1, 3, 70):
            dtype = ("fp32", "bf16", "fp16")[(Sk + Sq) % 3]
            cases.append(Case(f"Sq {Sq} Sk {Sk}", dtype, B=1, Sq=Sq, Sk=Sk, D=20, Dv=20, options=causal))
    for Hq, Hk in ((1, 1), (8, 1), (14, 2), (6, 3), (5, 5)):
        cases.append(Case(f"heads {Hq} {Hk}", B=1, Sq=9, Sk=300, Hq=Hq, Hk=Hk, options=causal))
    cases.append(Case("no batch", B=0))
    cases.append(Case("no rows", Sq=0))
    cases.append(Case("no keys", Sk=0))
    cases.append(Case("no keys but sinks", Sk=0, sinks=True))
    cases.append(Case("many rows", B=1, Sq=300, Sk=600, Hq=2, Hk=1, D=16, Dv=16, options=causal))
    return cases


CASES: tuple[Case, ...] = (*_variants(), *_shapes())


def _large() -> list[Case]:
    calls: list[dict[str, Any]] = [
        {"name": "plain"},
        {"name": "causal", "options": (("causal", True),)},
        {"name": "causal D 64", "B": 1, "Sq": 1300, "Hq": 8, "Hk": 1, "D": 64, "options": (("causal", True),)},
        {"name": "D 96 Dv 80", "D": 96, "Dv": 80},
        {"name": "D 192 Dv 128", "D": 192, "Dv": 128, "options": (("causal", True), ("split_size", 384))},
        {"name": "D 256", "B": 1, "D": 256, "Dv": 256, "options": (("causal", True),)},
        {"name": "D 72 Dv 200", "D": 72, "Dv": 200, "options": (("split_size", 640),)},
        {"name": "group of 7", "B": 1, "Sq": 150, "Hq": 14, "D": 64, "options": (("causal", True),)},
        {"name": "window", "D": 64, "options": (("window", (300, 200)), ("split_size", 384))},
        {"name": "causal window", "options": (("causal", True), ("window", (500, -1)))},
        {"name": "softcap", "options": (("causal", True), ("softcap", 5.0)), "gain": 4.0},
        {"name": "alibi", "D": 64, "alibi": "batch", "options": (("causal", True),)},
        {"name": "sinks", "sinks": True, "options": (("causal", True),)},
        {"name": "lengths", "B": 4, "D": 64, "lengths": "q k", "options": (("causal", True), ("split_size", 256))},
        {"name": "left padding", "B": 4, "D": 64, "lengths": "pad k", "options": (("window", (400, 40)),)},
        {"name": "first position", "B": 3, "D": 64, "lengths": "pos", "options": (("causal", True),)},
        {
            "name": "everything",
            "B": 4,
            "lengths": "pad q k pos",
            "alibi": "batch",
            "sinks": True,
            "options": (("causal", True), ("window", (700, -1)), ("softcap", 4.0), ("scale", 0.1)),
        },
    ]
    cases = []
    for call in calls:
        call = {"B": 2, "Sq": 300, "Sk": 1300, "D": 128, "Dv": call.get("D", 128), "options": (), **call}
        call["options"] = tuple({"split_size": 512, **dict(call["options"])}.items())
        for dtype in ("fp16", "bf16"):
            cases.append(Case(**{**call, "name": f"large {call['name']} {dtype}", "dtype": dtype}))
    return cases


# Several tiles of 128 rows and several splits, for the kernels of a GPU; a CPU would take too long.
LARGE_CASES: tuple[Case, ...] = tuple(_large())
