"""Random attention calls for ``flash-attn-det fuzz``: shapes, masks, options and numbers of every size.

A call is drawn from a seed and its number alone, so that any of them can be repeated without those before it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (8, 16, 24, 32, 40, 64, 64, 64, 96, 128, 128, 128, 192, 256)
LONGEST = 700  # keys: several splits of the smallest size
MOST_ROWS = 1 << 14
MOST_KEY_ELEMENTS = 1 << 22  # of k and v: drawing many takes longer than attending to them
LARGEST_EXPONENT = 118  # of a product of q and k: sums of many stay below fp32's overflow


@dataclass(frozen=True)
class Call:
    """q, k, v and gradients of out and lse on the CPU; keywords of ``attn``, or of ``attn_varlen`` if it is packed."""

    label: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor  # of one dimension and empty: none
    options: dict[str, object] = field(default_factory=dict)
    packed: tuple[torch.Tensor, torch.Tensor] | None = None  # cu_seqlens_q, cu_seqlens_k

    @property
    def rows(self) -> int:
        """Query rows of all heads."""
        return self.q.numel() // self.q.shape[-1]

    def to(self, device: str) -> Call:
        """The same call with its tensors there."""

        def moved(x: object) -> object:
            return x.to(device) if isinstance(x, torch.Tensor) else x

        options = {name: moved(value) for name, value in self.options.items()}
        packed = None if self.packed is None else (moved(self.packed[0]), moved(self.packed[1]))
        return Call(self.label, *map(moved, (self.q, self.k, self.v, self.dout, self.dlse)), options, packed)


def int32(values: list[int]) -> torch.Tensor:
    """Lengths or positions."""
    return torch.tensor(values, dtype=torch.int32)


class _Draw:
    """The random numbers of one call."""

    def __init__(self, seed: int, number: int):
        self.random = random.Random(f"{seed} {number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(63))

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def log_uniform(self, low: int, high: int) -> int:
        return round(math.exp(self.random.uniform(math.log(low), math.log(high))))

    def power(self, low: float, high: float) -> float:
        """2^x, x uniform."""
        return 2.0 ** self.random.uniform(low, high)

    def lengths(self, count: int, most: list[int]) -> list[int]:
        return [self.random.randint(0, n) for n in most[:count]]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def numbers(self, shape: tuple[int, ...], dtype: torch.dtype, exponent: int) -> tuple[torch.Tensor, str]:
        """About 2^exponent in size, by one of several laws, and the law's name. All finite."""
        law = self.random.choice(("normal", "normal", "octaves", "wide", "integers", "sparse"))
        x = self.normal(*shape)
        if law == "octaves":  # each row has a size of its own
            x *= 2.0 ** torch.randint(-8, 9, (*shape[:-1], 1), generator=self.generator)
        elif law == "wide":  # each element has
            x = x.sign() * torch.exp2(self.random.randint(1, 40) * (torch.rand(shape, generator=self.generator) - 0.5))
        elif law == "integers":  # ties, and sums that cancel
            x = torch.randint(-4, 5, shape, generator=self.generator).float()
        elif law == "sparse":
            x = torch.where(torch.rand(shape, generator=self.generator) < 0.9, x * 0.0, x)  # zeros of both signs
        largest = torch.finfo(dtype).max
        return (x * 2.0**exponent).clamp(-largest, largest).to(dtype), f"{law} 2^{exponent}"


def _poison(draw: _Draw, tensors: list[torch.Tensor]) -> str:
    """Inf and NaN in a few places, one call in eight: what does not see them must not notice."""
    if not draw.chance(1 / 8):
        return ""
    for _ in range(draw.random.randint(1, 4)):
        x = draw.random.choice(tensors).view(-1)
        if x.numel():
            x[draw.random.randrange(x.numel())] = draw.random.choice((math.inf, -math.inf, math.nan))
    return "; Inf or NaN"


def _exponents(draw: _Draw, dtype: torch.dtype) -> tuple[int, int, int]:
    """Sizes of q, k, v: anything from subnormal to the largest; one time in 16 also where q k^T overflows."""
    low, high = (-22, 14) if dtype == torch.float16 else (-131, 126)
    # Half of the calls have ordinary numbers, which a uniform exponent of bfloat16 would hardly ever give.
    if draw.chance(0.5):
        return draw.random.randint(-3, 3), draw.random.randint(-3, 3), draw.random.randint(-3, 3)
    q = draw.random.randint(low, high)
    most = high if draw.chance(1 / 16) else max(low, min(high, LARGEST_EXPONENT - q))
    return q, draw.random.randint(low, most), draw.random.randint(low, high)


def _scale(draw: _Draw, q: torch.Tensor, k: torch.Tensor) -> float | None:
    """Most often one that makes scores of a size worth having, whatever the sizes of q and k."""
    if draw.chance(1 / 8):
        return None
    largest = q.abs().max().double().item() * k.abs().max().double().item()
    wanted = draw.power(-12, 8) if draw.chance(0.75) else draw.power(-40, 27)
    scale = min(max(wanted / largest, 1e-37), 1e37) if largest > 0 else 1.0
    return -scale if draw.chance(1 / 8) else scale


def _options(draw: _Draw, B: int, Hq: int, Sk: int) -> dict[str, object]:
    """What changes scores and masks, and where keys stand."""
    options: dict[str, object] = {"causal": draw.chance(0.5), "split_size": draw.random.choice((128, 256, 512, 1024))}
    if draw.chance(1 / 3):
        options["window"] = tuple(draw.random.choice((-1, 0, draw.random.randint(0, Sk))) for _ in range(2))
    if draw.chance(1 / 6):
        options["softcap"] = draw.power(-3, 6)
    if draw.chance(1 / 6):
        options["alibi_slopes"] = draw.normal(*((B, Hq) if draw.chance(0.5) else (Hq,))).abs() * draw.power(-10, 0)
    if draw.chance(1 / 6):
        options["sinks"] = draw.normal(Hq) * draw.power(0, 7)
        options["sinks"][draw.random.randrange(Hq)] = draw.random.choice((-math.inf, 0.0))
    if draw.chance(1 / 4):
        options["k_pos"] = int32([draw.random.randint(0, 5000) for _ in range(B)])
    return options


def _padding(draw: _Draw, B: int, Sq: int, Sk: int) -> dict[str, object]:
    """Of dense calls."""
    options: dict[str, object] = {}
    left = draw.lengths(B, [Sk] * B) if draw.chance(1 / 4) else [0] * B
    if any(left):
        options["leftpad_k"] = int32(left)
    if draw.chance(1 / 4):
        options["seqused_k"] = int32(draw.lengths(B, [Sk - n for n in left]))
    if draw.chance(1 / 6):
        options["seqused_q"] = int32(draw.lengths(B, [Sq] * B))
    return options


def _starts(draw: _Draw, B: int, rows: int) -> torch.Tensor:
    """cu_seqlens of B sequences, some of them empty, which need not fill the buffer."""
    return int32([0, *sorted(draw.random.randint(0, rows) for _ in range(B))])


def draw_call(seed: int, number: int, cost: int) -> Call:
    """Call ``number`` of a seed. cost: elements of keys and values that its rows read, about."""
    draw = _Draw(seed, number)
    dtype = draw.random.choice(DTYPES)
    D = draw.random.choice(HEAD_DIMS) if draw.chance(7 / 8) else draw.random.randint(1, 256)
    Dv = D if draw.chance(0.7) else draw.random.choice(HEAD_DIMS)
    Hk, group = draw.random.choice((1, 1, 2, 3)), draw.random.choice((1, 1, 2, 4, 7, 8))
    Sk, is_decode = draw.log_uniform(1, LONGEST), draw.chance(0.5)
    Sq = draw.random.randint(1, 4) if is_decode else draw.log_uniform(5, 300)
    Sq = min(Sq, Sk) if draw.chance(7 / 8) else Sq  # else some rows stand before the first key
    of_a_sequence = Sq * Hk * group
    rows = min(cost // (Sk * (D + Dv)), MOST_ROWS)
    B = max(1, min(rows // of_a_sequence, MOST_KEY_ELEMENTS // (Sk * Hk * (D + Dv))))
    options, packed = _options(draw, B, Hk * group, Sk), None
    shapes = [(B, Sq, Hk * group, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv), (B, Sq, Hk * group, Dv)]
    if draw.chance(1 / 4):
        packed = _starts(draw, B, B * Sq), _starts(draw, B, B * Sk)
        shapes = [(n * rows, *rest) for n, rows, *rest in shapes]
    else:
        options |= _padding(draw, B, Sq, Sk)
    exponents = *_exponents(draw, dtype), draw.random.randint(-3, 3)
    drawn = [draw.numbers(shape, dtype, e) for shape, e in zip(shapes, exponents, strict=True)]
    (q, k, v, dout), laws = zip(*drawn, strict=True)
    options["scale"] = _scale(draw, q, k)
    lse_shape = (Hk * group, B * Sq) if packed else (B, Hk * group, Sq)
    dlse = draw.normal(*lse_shape) if draw.chance(0.5) else torch.empty(0)
    poison = _poison(draw, [q, k, v, dout])
    numbers = ", ".join(f"{name} {law}" for name, law in zip("qkv", laws)) + poison
    given = ", ".join(sorted(name for name, value in options.items() if value is not None and value is not False))
    label = f"{'packed ' if packed else ''}q {list(q.shape)}, k {list(k.shape)}, Dv {Dv}, {dtype}; {numbers}; {given}"
    return Call(label, q, k, v, dout, dlse, options, packed)
