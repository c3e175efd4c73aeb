"""The contract's ``fma`` family in plain torch, slow and obvious, and a float64 oracle beside it.

``attn_reference`` repeats every rounding that ``csrc/numerics/contract.h`` prescribes, so its bits equal the kernels'
(comments cite the clauses). ``attn_oracle`` is a dense float64 softmax: what the answer should be, for accuracy. Both
take the keywords of ``attn``; the ``varlen`` forms take those of ``attn_varlen``. ``attn_backward_reference`` is the
backward in the same manner; the oracle's is torch's own.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import torch

from .determinism import contract, get_split_size

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


def _reference_sequence(seq: _Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """out [n_q, Hq, Dv] in the input dtype and lse [Hq, n_q] in the compute type of one sequence."""
    t = _FP64 if seq.q.dtype == torch.float64 else _FP32
    q, k, v = seq.heads_first(t.dtype)
    visible = seq.visible()
    block_kv = contract()["BLOCK_KV"]
    x, c, _ = _scores(seq, q, k, t)

    def empty_state() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # N3
        m = torch.full(x.shape[:2], t.sentinel, dtype=t.dtype, device=q.device)
        return torch.zeros(*x.shape[:2], v.shape[2], dtype=t.dtype, device=q.device), m, torch.zeros_like(m)

    total = empty_state()
    # N3: splits and blocks lie at absolute multiples of their size, whatever the length and wherever the keys begin.
    end = seq.first_key + k.shape[1]
    for split in range(seq.first_key // seq.split_size * seq.split_size, end, seq.split_size):
        o, m, l = empty_state()
        for block in range(split, min(split + seq.split_size, end), block_kv):
            keys = range(max(block, seq.first_key) - seq.first_key, min(block + block_kv, end) - seq.first_key)
            if len(keys) == 0:
                continue
            here = slice(keys.start, keys.stop)
            # N6: the reference moves here and only here, and what was summed so far moves with it.
            x_max = torch.full_like(m, -math.inf)
            for j in keys:
                x_max = torch.where(visible[:, j], _maximum(x[:, :, j], x_max), x_max)
            m_new = _reference(m, x_max, c, t)
            rescale = _power_of_two(m - m_new, t)
            o, m, l = o * rescale[..., None], m_new, l * rescale
            p = _probability(x[:, :, here], c, m[..., None], t)
            for j in keys:  # N7: ascending keys; N4: an invisible key is no term at all
                p_j = p[:, :, j - keys.start]
                l = torch.where(visible[:, j], l + p_j, l)
                o = torch.where(visible[:, j, None], _fma(p_j[..., None], v[:, None, j], o), o)
        total = _fold(total, (o, m, l), t)  # N8: ascending splits
    if seq.sinks is not None:  # N8: the sink is one more logit without a value
        log2e = t.number(_LOG2E, q)
        z = seq.sinks.to(t.dtype)[:, None].expand(x.shape[:2])
        o, m, l = empty_state()
        m = _reference(m, z, log2e, t)
        total = _fold(total, (o, m, _probability(z, log2e, m, t)), t)

    # N9, N10
    o, m, l = total
    empty = l == 0
    out = torch.where(empty[..., None], 0, _canonical(o / l[..., None] + 0.0, t))
    log2_l = _log2(torch.where(empty, 1, l), t)
    lse = torch.where(empty, -math.inf, _canonical((m + log2_l) * t.number(_LN2, q), t))
    return _round(out, seq.q.dtype).transpose(0, 1), lse


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What the backward of one sequence is given besides its inputs."""

    out: torch.Tensor  # [n_q, Hq, Dv]
    lse: torch.Tensor  # [Hq, n_q]
    dout: torch.Tensor  # [n_q, Hq, Dv]
    dlse: torch.Tensor | None  # [Hq, n_q]


def _block_sums(start, blocks, term, keep):
    """N13: a chain from 0 for each block, the chains added onto start. term(i, s) goes on from s, where keep(i)."""
    total = start
    for block in blocks:
        chain = torch.zeros_like(total)
        for i in block:
            chain = torch.where(keep(i), term(i, chain), chain)
        total = total + chain
    return total


def _add_head(dk, dv, row_blocks, p, ds, q, dout, seen):
    """N13: dk and dv with the sums of one query head for each kv head. p, ds, seen [Hk, n_q, n_k]."""

    def keep(i):
        return seen[:, i, :, None]

    dk = _block_sums(dk, row_blocks, lambda i, s: _fma(ds[:, i, :, None], q[:, None, i], s), keep)
    return dk, _block_sums(dv, row_blocks, lambda i, s: _fma(p[:, i, :, None], dout[:, None, i], s), keep)


def _reference_backward(seq: _Sequence, saved: _Saved) -> tuple[torch.Tensor, ...]:
    """N13 of one sequence: dq [n_q, Hq, D], dk [n_k, Hk, D], dv [n_k, Hk, Dv] in the input dtype, dz [Hq] or None."""
    t = _FP64 if seq.q.dtype == torch.float64 else _FP32
    q, k, v = seq.heads_first(t.dtype)
    out, dout = (x.to(t.dtype).transpose(0, 1) for x in (saved.out, saved.dout))
    (heads, n_q, _), n_k, size = q.shape, k.shape[1], contract()["BLOCK_KV"]
    x, c, tanh = _scores(seq, q, k, t)
    some = saved.lse != -math.inf
    seen = seq.visible() & some[..., None]  # [Hq, n_q, n_k]
    row_blocks = [range(i, min(i + size, n_q)) for i in range(0, n_q, size)]
    end = seq.first_key + n_k
    key_blocks = [
        range(max(b, seq.first_key) - seq.first_key, min(b + size, end) - seq.first_key)
        for b in range(seq.first_key // size * size, end, size)
    ]
    log2e = t.number(_LOG2E, q)

    def exponential(x, c, m):
        a = _fma(x, c, -m)
        return _exp2(torch.where(a > 64, 64, a), t)

    m = torch.where(some, (saved.lse * log2e).round(), 0)
    e = exponential(x, c, m[..., None])
    l = _block_sums(torch.zeros_like(m), key_blocks, lambda j, s: s + e[..., j], lambda j: seen[..., j])
    sink = None
    if seq.sinks is not None:
        sink = exponential(seq.sinks.to(t.dtype)[:, None], log2e, m)
        l = l + sink
    weight = torch.where(l > 0, 1 / l, l)
    p = e * weight[..., None]

    delta = torch.zeros_like(m)
    for d in range(out.shape[2]):
        delta = _fma(dout[..., d], out[..., d], delta)
    if saved.dlse is not None:
        delta = delta - saved.dlse
    ds = p * (_dot(dout, v) - delta[..., None])
    if tanh is not None:
        ds = ds * _fma(-tanh, tanh, t.number(1.0, q))

    dq = _block_sums(
        torch.zeros_like(q), key_blocks,
        lambda j, s: _fma(ds[..., j, None], k[:, None, j], s), lambda j: seen[..., j, None],
    )  # fmt: skip
    # All kv heads at once, [Hk, G, ...]; the query heads of each ascending.
    by_group = [y.unflatten(0, (seq.k.shape[1], -1)) for y in (p, ds, q, dout, seen)]
    dk, dv = (torch.zeros(seq.k.shape[1], n_k, y.shape[2], dtype=t.dtype, device=q.device) for y in (k, v))
    for g in range(heads // seq.k.shape[1]):
        dk, dv = _add_head(dk, dv, row_blocks, *(y[:, g] for y in by_group))
    dz = None
    if sink is not None:
        dz = _block_sums(
            torch.zeros(heads, dtype=t.dtype, device=q.device), row_blocks,
            lambda i, s: _fma(-(sink[:, i] * weight[:, i]), delta[:, i], s), lambda i: some[:, i],
        )  # fmt: skip
    scale = t.number(seq.scale, q)
    dq, dk, dv = (_round(_canonical(y + 0.0, t), seq.q.dtype).transpose(0, 1) for y in (dq * scale, dk * scale, dv))
    return dq, dk, dv, dz


def _oracle_sequence(seq: _Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """out [n_q, Hq, Dv] and lse [Hq, n_q] of one sequence, both float64."""
    q, k, v = seq.heads_first(torch.float64)
    query, key = seq.positions()
    visible = seq.visible()
    x = q @ k.transpose(1, 2) * seq.scale
    if seq.softcap > 0:
        x = seq.softcap * torch.tanh(x / seq.softcap)
    if seq.slopes is not None:
        x = x - seq.slopes.double()[:, None, None] * (query[:, None] - key).abs()
    x = torch.where(visible, x, -math.inf)
    # One more column holds the sink, or nothing.
    sink = x.new_full((*x.shape[:2], 1), -math.inf)
    if seq.sinks is not None:
        sink = seq.sinks.double()[:, None, None].expand_as(sink)
    x = torch.cat([x, sink], 2)
    x_max = x.amax(2, keepdim=True)
    p = torch.exp(x - torch.where(x_max == -math.inf, 0, x_max))
    l = p.sum(2, keepdim=True)
    p = (p / torch.where(l == 0, 1, l))[:, :, :-1]
    if v.isfinite().all():
        out = p @ v
    else:  # a key that is not seen must not make a NaN: it is left out, not multiplied by 0
        out = (p[..., None] * torch.where(visible[..., None], v[:, None], 0)).sum(2)
    return out.transpose(0, 1), (x_max + torch.log(l))[:, :, 0]


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


def _each_sequence(compute, q, k, v, rows, keys, **options):
    """out [Tq, Hq, Dv] and lse [Hq, Tq] of packed sequences; arguments as in _sequences."""
    fp64 = torch.float64
    oracle = compute is _oracle_sequence
    out_dtype, lse_dtype = (fp64, fp64) if oracle else (q.dtype, fp64 if q.dtype == fp64 else torch.float32)
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=out_dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=lse_dtype, device=q.device)
    for here, _, sequence in _sequences(q, k, v, rows, keys, **options):
        out[here], lse[:, here] = compute(sequence)  # N10: rows past n_q stay 0 and -inf
    return out, lse


def _dense(compute, q, k, v, leftpad_k, return_lse, options):
    (B, Sq), Sk = q.shape[:2], k.shape[1]
    skip = [0] * B if leftpad_k is None else leftpad_k.tolist()
    rows = [range(b * Sq, (b + 1) * Sq) for b in range(B)]
    keys = [range(b * Sk + skip[b], (b + 1) * Sk) for b in range(B)]
    out, lse = _each_sequence(compute, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), rows, keys, **options)
    out, lse = out.unflatten(0, (B, Sq)), lse.unflatten(1, (B, Sq)).transpose(0, 1).contiguous()
    return (out, lse) if return_lse else out


def _varlen(compute, q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse, options):
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    rows = [range(a, z) for a, z in zip(ends_q, ends_q[1:])]
    keys = [range(a, z) for a, z in zip(ends_k, ends_k[1:])]
    out, lse = _each_sequence(compute, q, k, v, rows, keys, **options)
    return (out, lse) if return_lse else out


def _dense_backward(compute, q, k, v, out, lse, dout, dlse, leftpad_k, options):
    """dq, dk, dv, d_sinks, where compute(sequence, saved) is the backward of one sequence."""
    (B, Sq), Sk = q.shape[:2], k.shape[1]
    skip = [0] * B if leftpad_k is None else leftpad_k.tolist()
    rows = [range(b * Sq, (b + 1) * Sq) for b in range(B)]
    keys = [range(b * Sk + skip[b], (b + 1) * Sk) for b in range(B)]
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out, dout = out.flatten(0, 1), dout.flatten(0, 1)
    lse, dlse = (None if x is None else x.transpose(0, 1).flatten(1, 2) for x in (lse, dlse))
    dq, dk, dv = (torch.zeros_like(x) for x in flat)
    d_sinks = None
    for here, there, sequence in _sequences(*flat, rows, keys, **options):
        saved = _Saved(out[here], lse[:, here], dout[here], None if dlse is None else dlse[:, here])
        dq[here], dk[there], dv[there], dz = compute(sequence, saved)
        d_sinks = dz if d_sinks is None else d_sinks + dz  # N13: sequences ascending
    if options.get("sinks") is not None:
        t = _FP64 if q.dtype == torch.float64 else _FP32
        d_sinks = torch.zeros(q.shape[2], dtype=t.dtype) if d_sinks is None else _canonical(d_sinks + 0.0, t)
    return dq.view_as(q), dk.view_as(k), dv.view_as(v), d_sinks


def attn_reference(q, k, v, *, leftpad_k=None, return_lse=False, **options):
    """``attn`` by the contract, in plain torch: the same bits, on any device, thousands of times slower.

    q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv], and every keyword of ``attn`` with its default; fp32, fp16,
    bf16 or fp64. Returns out [B, Sq, Hq, Dv] in q's dtype and, with ``return_lse``, lse [B, Hq, Sq] in fp32 (fp64 for
    fp64 inputs): the bits that ``attn`` gives in the ``fma`` family. Raises NotImplementedError for
    ``arithmetic="mma"``; other arguments are not checked, that is the business of ``attn``. Memory grows with Sq * Sk.
    """
    return _dense(_reference_sequence, q, k, v, leftpad_k, return_lse, options)


def attn_varlen_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, *, return_lse=False, **options):
    """``attn_varlen`` by the contract; see ``attn_reference``. q [Tq, Hq, D] -> out [Tq, Hq, Dv], lse [Hq, Tq]."""
    return _varlen(_reference_sequence, q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse, options)


def attn_backward_reference(q, k, v, out, lse, dout, dlse=None, *, leftpad_k=None, **options):
    """The backward of ``attn`` by clause N13, in plain torch: the bits that autograd gives, thousands of times slower.

    q, k, v and the keywords as in ``attn_reference``; out [B, Sq, Hq, Dv] and lse [B, Hq, Sq] as ``attn`` returned
    them, dout and dlse their gradients, dlse None if lse has none. Returns dq, dk, dv in the shapes and dtype of q, k,
    v, and d_sinks [Hq] in the compute type, None without sinks. Raises what ``attn_reference`` does.
    """
    return _dense_backward(_reference_backward, q, k, v, out, lse, dout, dlse, leftpad_k, options)


def attn_oracle(q, k, v, *, leftpad_k=None, return_lse=False, **options):
    """Dense softmax attention in float64: what the answer should be, to measure errors against.

    Shapes and keywords of ``attn``; ``split_size`` and ``arithmetic`` mean nothing here. Returns float64 whatever the
    input dtype: out [B, Sq, Hq, Dv] and, with ``return_lse``, lse [B, Hq, Sq] (sinks included). Rows that see no key
    give 0 and, without a sink, -inf. Memory grows with Sq * Sk.
    """
    return _dense(_oracle_sequence, q, k, v, leftpad_k, return_lse, options)


def attn_varlen_oracle(q, k, v, cu_seqlens_q, cu_seqlens_k, *, return_lse=False, **options):
    """Float64 oracle in the form of ``attn_varlen``; see ``attn_oracle``. q [Tq, Hq, D] -> out [Tq, Hq, Dv]."""
    return _varlen(_oracle_sequence, q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse, options)
