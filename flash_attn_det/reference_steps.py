"""What the forward and the backward of the reference share: the steps that the contract prescribes, in plain torch.

Each function is one clause or a part of one (comments cite them); a sequence is a value of its own, ``_Sequence``.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import torch

from .determinism import get_split_size

_LOG2E = float.fromhex("0x1.71547652b82fep+0")
_LN2 = float.fromhex("0x1.62e42fefa39efp-1")
_TANH_SMALL = float.fromhex("0x1.62e42fefa39efp-3")
_LOG2_SCALE = float.fromhex("0x1.71547652b82fep+1")


def _hex(*digits: str) -> tuple[float, ...]:
    return tuple(float.fromhex(digit) for digit in digits)


@dataclasses.dataclass(frozen=True)
class _Compute:
    """The compute type of a call and its constants: fp64 for fp64 inputs, fp32 otherwise."""

    dtype: torch.dtype
    bits: torch.dtype  # integer type of the same width
    mantissa: int  # stored significand bits
    limit: float  # LIMIT of N6
    sentinel: float  # reference of the empty state, N3
    min_exponent: int  # MIN_EXP of N6
    split_root: int  # bits of sqrt(1/2), where log2 cuts off the exponent
    exp2_polynomial: tuple[float, ...]
    tanh_polynomial: tuple[tuple[int, int], ...]  # fractions, divided in the compute type
    log2_terms: int
    canonical_nan: int

    @property
    def magic(self) -> float:
        return 1.5 * 2.0**self.mantissa

    def number(self, x: float, like: torch.Tensor) -> torch.Tensor:
        """x, rounded once, as a scalar tensor beside ``like``."""
        return torch.tensor(x, dtype=torch.float64, device=like.device).to(self.dtype)


_TANH = (
    *((1, 1), (-1, 3), (2, 15), (-17, 315), (62, 2835), (-1382, 155925), (21844, 6081075), (-929569, 638512875)),
    *((6404582, 10854718875), (-443861162, 1856156927625), (18888466084, 194896477400625)),
)
_FP32 = _Compute(
    dtype=torch.float32,
    bits=torch.int32,
    mantissa=23,
    limit=2.0**22,
    sentinel=-(2.0**126),
    min_exponent=-126,
    split_root=0x3F3504F3,
    exp2_polynomial=_hex(
        *("0x1p+0", "0x1.62e432p-1", "0x1.ebfbe2p-3", "0x1.c6ae72p-5", "0x1.3b270ep-7", "0x1.5f7276p-10"),
        "0x1.470b4ap-13",
    ),
    tanh_polynomial=_TANH[:6],
    log2_terms=5,
    canonical_nan=0x7FC00000,
)
_FP64 = _Compute(
    dtype=torch.float64,
    bits=torch.int64,
    mantissa=52,
    limit=2.0**51,
    sentinel=-(2.0**1022),
    min_exponent=-1022,
    split_root=0x3FE6A09E667F3BCD,
    exp2_polynomial=_hex(
        *("0x1p+0", "0x1.62e42fefa39f3p-1", "0x1.ebfbdff82c598p-3", "0x1.c6b08d7048f31p-5", "0x1.3b2ab6fba1e1cp-7"),
        *("0x1.5d87fe7bbbe07p-10", "0x1.4309130961163p-13", "0x1.ffcbee3b0af8cp-17", "0x1.62bfd49ed0adfp-20"),
        *("0x1.b54167a0b9061p-24", "0x1.e605f979c7a5dp-28", "0x1.c0638527edf34p-32"),
    ),
    tanh_polynomial=_TANH,
    log2_terms=11,
    canonical_nan=0x7FF8000000000000,
)


# ---- one rounding per operation: torch's own + - * / are IEEE operations, a fused multiply-add has to be built -------


def _two_sum(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded a + b, and what the rounding lost, exactly (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _to_odd(total: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """fp64 total + lost rounded to odd: the last bit remembers that something was lost, so that a second is safe."""
    bits = total.view(torch.int64)
    step = torch.where((lost > 0) == (total > 0), 1, -1)
    inexact = torch.isfinite(total) & (lost != 0) & (bits % 2 == 0)
    return torch.where(inexact, bits + step, bits).view(torch.float64)


def _two_product(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded a * b in fp64, and what the rounding lost, exactly where nothing overflows or underflows (Dekker)."""

    def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x * (2.0**27 + 1)
        high = wide - (wide - x)
        return high, x - high

    product = a * b
    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _fraction_fma(a: float, b: float, c: float) -> float:
    """a * b + c of finite numbers, rounded once, by exact rational arithmetic."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c if a == 0 or b == 0 else 0.0  # only exact zeros have a sign to choose
    try:
        return exact.numerator / exact.denominator
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def _fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c rounded once, for fp32 or fp64 tensors that broadcast."""
    a, b, c = torch.broadcast_tensors(a, b, c)
    if a.dtype == torch.float32:
        # The product of two fp32 is exact in fp64. Rounded to odd at 53 bits, the sum rounds correctly to 24 or fewer.
        return _to_odd(*_two_sum(a.double() * b.double(), c.double())).float()
    product, product_lost = _two_product(a, b)
    low_sum, low_lost = _two_sum(c, product_lost)
    total, total_lost = _two_sum(product, low_sum)
    result = total + _to_odd(*_two_sum(total_lost, low_lost))  # Boldo and Melquiond 2008
    # Their proof needs room for the lost parts; zeros are exact, and what is not finite needs no fma.
    biggest, smallest = 2.0**900, 2.0**-900
    finite = torch.isfinite(a) & torch.isfinite(b)
    simple = ~finite | ~torch.isfinite(c) | (a == 0) | (b == 0)
    result = torch.where(simple, torch.where(finite & ~torch.isfinite(c), c, a * b + c), result)
    size = product.abs()
    extreme = ~simple & ~((size > smallest) & (size < biggest) & (a.abs() < biggest) & (b.abs() < biggest))
    extreme |= ~simple & (c.abs() >= biggest)
    for at in extreme.nonzero().tolist():
        at = tuple(at)
        result[at] = _fraction_fma(a[at].item(), b[at].item(), c[at].item())
    return result


def _power_of_two(n: torch.Tensor, t: _Compute) -> torch.Tensor:
    """2^n for integers -MIN_EXP <= n <= 1, by writing the exponent's bits; 0 below that (N6)."""
    normal = n >= t.min_exponent
    exponent = torch.where(normal, n, 0).to(torch.int64) + (1 - t.min_exponent)
    power = (exponent << t.mantissa).to(t.bits).view(t.dtype)
    return torch.where(normal, power, 0)


def _maximum(candidate: torch.Tensor, running: torch.Tensor) -> torch.Tensor:
    """N6: a NaN candidate leaves the running maximum alone."""
    return torch.where(candidate > running, candidate, running)


# ---- elementary functions (N7) ---------------------------------------------------------------------------------------


def _exp2(a: torch.Tensor, t: _Compute) -> torch.Tensor:
    """2^a for a <= 1/2 (and a little): nearest integer, polynomial of the rest, exact power of two. 0 below MIN_EXP."""
    n = (a + t.magic) - t.magic
    f = a - n
    y = t.number(t.exp2_polynomial[-1], a)
    for coefficient in reversed(t.exp2_polynomial[:-1]):
        y = _fma(y, f, t.number(coefficient, a))
    y = y * torch.where(a >= t.min_exponent, _power_of_two(n, t), 1)
    return torch.where(a < t.min_exponent, 0, y)


def _tanh(y: torch.Tensor, t: _Compute) -> torch.Tensor:
    """Odd; a polynomial where |y| < ln(2) / 4, (1 - e) / (1 + e) with e = 2^(-2 log2(e) |y|) beyond."""
    a = y.abs()
    e = _exp2(a * t.number(-2 * _LOG2E, y), t)
    large = (1 - e) / (1 + e)
    u = a * a
    coefficients = [torch.tensor(p, dtype=t.dtype, device=y.device) / q for p, q in t.tanh_polynomial]
    q = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        q = _fma(q, u, coefficient)
    return torch.where(a < t.number(_TANH_SMALL, y), a * q, large).copysign(y)


def _log2(x: torch.Tensor, t: _Compute) -> torch.Tensor:
    """log2 of a positive normal number or NaN: exponent plus series of 2 atanh((m - 1) / (m + 1)) / ln 2. No fma."""
    bits = x.view(t.bits)
    exponent = (bits - t.split_root) >> t.mantissa
    m = (bits - (exponent << t.mantissa)).view(t.dtype)
    s = (m - 1) / (m + 1)
    u = s * s
    coefficients = [t.number(_LOG2_SCALE / (2 * k + 1), x) for k in range(t.log2_terms)]
    q = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        q = q * u + coefficient
    return torch.where(x.isnan(), x, exponent.to(t.dtype) + s * q)


# ---- steps of the online softmax -------------------------------------------------------------------------------------


def _dot(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """N7: ascending chains of fma over d. q [H, n_q, D], k [H, n_k, D] -> [H, n_q, n_k]."""
    s = torch.zeros(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    for d in range(q.shape[2]):
        s = _fma(q[:, :, None, d], k[:, None, :, d], s)
    return s


def _reference(m: torch.Tensor, x_max: torch.Tensor, c: torch.Tensor, t: _Compute) -> torch.Tensor:
    """N6: the running integer reference after a block whose largest score is x_max."""
    magic = t.number(t.magic, m)
    product = x_max * c
    near = _fma(x_max, c, magic) - magic
    return _maximum(torch.where(product.abs() > t.limit, product.round(), near), m)


def _probability(x: torch.Tensor, c: torch.Tensor, m: torch.Tensor, t: _Compute) -> torch.Tensor:
    """N6: 2^(x * c - m), the argument rounded once, or twice where m itself is a rounded product."""
    return _exp2(torch.where(m.abs() > t.limit, x * c - m, _fma(x, c, -m)), t)


def _fold(state: tuple[torch.Tensor, ...], part: tuple[torch.Tensor, ...], t: _Compute) -> tuple[torch.Tensor, ...]:
    """N8: one more split, (O [H, n_q, Dv], m [H, n_q], l [H, n_q]), into the running state."""
    (o, m, l), (o_c, m_c, l_c) = state, part
    m_new = _maximum(m_c, m)
    a, b = _power_of_two(m - m_new, t), _power_of_two(m_c - m_new, t)
    return o * a[..., None] + o_c * b[..., None], m_new, l * a + l_c * b


def _canonical(x: torch.Tensor, t: _Compute) -> torch.Tensor:
    """N9: every NaN is the same quiet NaN."""
    nan = torch.tensor(t.canonical_nan, dtype=t.bits, device=x.device)
    return torch.where(x.isnan(), nan, x.view(t.bits)).view(t.dtype)


def _round(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """N9: one rounding to the output dtype, which keeps the canonical NaN."""
    narrow = x.to(dtype)
    if dtype in (torch.float16, torch.bfloat16):
        nan = torch.tensor(0x7E00 if dtype == torch.float16 else 0x7FC0, dtype=torch.int16, device=x.device)
        narrow = torch.where(x.isnan(), nan, narrow.view(torch.int16)).view(dtype)
    return narrow


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """One sequence of a call: its rows and keys in use, its place, and the options that its rows share."""

    q: torch.Tensor  # [n_q, Hq, D]
    k: torch.Tensor  # [n_k, Hk, D]
    v: torch.Tensor  # [n_k, Hk, Dv]
    first_key: int  # position of k[0]
    slopes: torch.Tensor | None  # [Hq]
    sinks: torch.Tensor | None  # [Hq]
    scale: float
    left: int
    right: int
    softcap: float
    split_size: int

    def heads_first(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [Hq, n_q, D], k [Hq, n_k, D], v [Hq, n_k, Dv], widened exactly (N7); query head h reads kv head h // G."""
        group = self.q.shape[1] // self.k.shape[1]
        k, v = (x.to(dtype).transpose(0, 1).repeat_interleave(group, 0) for x in (self.k, self.v))
        return self.q.to(dtype).transpose(0, 1), k, v

    def positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """N2: positions of the query rows [n_q], aligned to the end of the keys, and of the keys [n_k]."""
        n_q, n_k = self.q.shape[0], self.k.shape[0]
        key = self.first_key + torch.arange(n_k, device=self.q.device)
        return self.first_key + n_k - n_q + torch.arange(n_q, device=self.q.device), key

    def visible(self) -> torch.Tensor:
        """N4: which keys each row sees, [n_q, n_k]."""
        query, key = self.positions()
        mask = torch.ones(len(query), len(key), dtype=torch.bool, device=self.q.device)
        if self.left >= 0:
            mask &= key >= query[:, None] - self.left
        if self.right >= 0:
            mask &= key <= query[:, None] + self.right
        return mask


def _scores(seq: _Sequence, q: torch.Tensor, k: torch.Tensor, t: _Compute) -> tuple[torch.Tensor, ...]:
    """N5: x [Hq, n_q, n_k], the base-2 factor c that makes exponents of two of it, and tanh if there is softcap."""
    query, key = seq.positions()
    x, tanh = _dot(q, k), None
    c = t.number(seq.scale * _LOG2E, q)
    if not (c > 0 and seq.softcap == 0 and seq.slopes is None):
        c = t.number(_LOG2E, q)
        if seq.softcap > 0:
            tanh = _tanh(x * t.number(seq.scale / seq.softcap, q), t)
            x = t.number(seq.softcap, q) * tanh
        else:
            x = x * t.number(seq.scale, q)
    if seq.slopes is not None:
        distance = (query[:, None] - key).abs().to(t.dtype)
        x = _fma(-seq.slopes.to(t.dtype)[:, None, None], distance, x)
    return x, c, tanh


# ---- batches: every sequence by itself -------------------------------------------------------------------------------


def _sequences(
    q,
    k,
    v,
    rows,
    keys,
    *,
    causal=False,
    scale=None,
    window=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    seqused_q=None,
    seqused_k=None,
    k_pos=None,
    split_size=None,
    arithmetic="auto",
):
    """Packed q, k, v [T, H, D]; sequence b owns the ranges rows[b] and keys[b]. Yields its slices in use and itself."""
    if arithmetic not in ("auto", "fma"):
        raise NotImplementedError(f"the reference is the fma family, not arithmetic={arithmetic!r}")
    left, right = window
    if causal:
        right = 0
    for b in range(len(rows)):
        n_q = len(rows[b]) if seqused_q is None else int(seqused_q[b])
        n_k = len(keys[b]) if seqused_k is None else int(seqused_k[b])
        here = slice(rows[b].start, rows[b].start + n_q)
        there = slice(keys[b].start, keys[b].start + n_k)
        yield (
            here,
            there,
            _Sequence(
                q=q[here],
                k=k[there],
                v=v[there],
                first_key=0 if k_pos is None else int(k_pos[b]),
                slopes=alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[b],
                sinks=sinks,
                scale=1 / math.sqrt(q.shape[2]) if scale is None else float(scale),
                left=left,
                right=right,
                softcap=float(softcap),
                split_size=get_split_size() if split_size is None else split_size,
            ),
        )
