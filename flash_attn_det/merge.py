"""The fold of split states (clauses N8, N9, N10) in elementwise torch ops: its readable definition.

Every rescale factor is a power of two, so a product with one is exact, and whether a compiler fuses it into the sum
cannot be seen in the result. The same bits as the C kernels, which fold inside attn.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_LOG2_SERIES = float.fromhex("0x1.71547652b82fep+1")  # 2 / ln 2
_LN2 = float.fromhex("0x1.62e42fefa39efp-1")


class _Format(NamedTuple):
    """What the bit tricks need to know of a float format."""

    integer: torch.dtype
    mantissa_bits: int
    min_exponent: int
    sqrt_half: int  # bits of sqrt(1/2), rounded
    log2_degree: int

    @property
    def empty_m(self) -> float:
        """m of the state of no key."""
        return -(2.0**-self.min_exponent)


_FORMATS = {
    torch.float32: _Format(torch.int32, 23, -126, 0x3F3504F3, 4),
    torch.float64: _Format(torch.int64, 52, -1022, 0x3FE6A09E667F3BCD, 10),
}


class Partials(NamedTuple):
    """Unfinished states of C splits, ascending, as attn_partials returns them.

    o [C, B, Sq, Hq, Dv], m and l [C, B, Hq, Sq] in the compute dtype: split c holds sum(p v) = o * 2^m and
    sum(p) = l * 2^m for p = exp(score), m an integer. Without a visible key m = -2^126 (-2^1022 in float64), o = l = 0.
    dtype: what merge_partials rounds out to.
    """

    o: Tensor
    m: Tensor
    l: Tensor
    dtype: torch.dtype


def _pow2(d: Tensor) -> Tensor:
    """2^d, exact, for integers d <= 0: 0 for d < min_exponent, and 1 for NaN (infinity - infinity)."""
    f = _FORMATS[d.dtype]
    biased = d.nan_to_num(nan=0.0, neginf=-math.inf).clamp(min=f.min_exponent - 1).to(f.integer) - (f.min_exponent - 1)
    return (biased << f.mantissa_bits).view(d.dtype)


def _log2(x: Tensor) -> Tensor:
    """log2 of the contract, for x > 0 and NaN: the exponent, and a series in s = (m - 1) / (m + 1), 0.7 < m < 1.42."""
    f = _FORMATS[x.dtype]
    bits = x.view(f.integer)
    exponent = (bits - f.sqrt_half) >> f.mantissa_bits
    m = (bits - (exponent << f.mantissa_bits)).view(x.dtype)
    s = (m - 1.0) / (m + 1.0)
    u = s * s
    q = torch.full_like(u, _LOG2_SERIES / (2 * f.log2_degree + 1))
    for k in reversed(range(f.log2_degree)):
        q = q * u + _LOG2_SERIES / (2 * k + 1)
    return torch.where(x.isnan(), x, exponent.to(x.dtype) + s * q)


def merge_partials(partials: Partials, *, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Fold split states in ascending order and finish: merge_partials(attn_partials(...)) == attn(...), bit for bit.

    partials: as attn_partials returns it. States that were computed apart (other calls, other devices) may be
    concatenated along their first dimension before, in ascending order of position. The bits are those of eager torch
    operations with their default handling of subnormals: torch.set_flush_denormal and compilers that fuse can change
    them, which attn itself never notices.

    Returns out [B, Sq, Hq, Dv] in partials.dtype; with return_lse also lse [B, Hq, Sq] in the compute dtype.
    Raises TypeError if the states are not float32 or float64, ValueError if their shapes do not belong together.
    """
    states_o, states_m, states_l, dtype = partials
    if states_m.dtype not in _FORMATS or not states_o.dtype == states_m.dtype == states_l.dtype:
        dtypes = f"{states_o.dtype}, {states_m.dtype}, {states_l.dtype}"
        raise TypeError(f"partials have dtypes {dtypes}: expected float32 or float64 for all")
    count, batch, rows, heads, value_dim = states_o.shape
    if not states_m.shape == states_l.shape == (count, batch, heads, rows):
        raise ValueError(
            f"partials have o {tuple(states_o.shape)}, m {tuple(states_m.shape)}, l {tuple(states_l.shape)}: expected "
            "o [C, B, Sq, Hq, Dv], m and l [C, B, Hq, Sq]"
        )
    o = states_o.new_zeros(batch, rows, heads, value_dim)
    m = states_m.new_full((batch, heads, rows), _FORMATS[states_m.dtype].empty_m)
    l = states_l.new_zeros(batch, heads, rows)
    for o_c, m_c, l_c in zip(states_o, states_m, states_l, strict=True):  # N8
        m_new = torch.maximum(m, m_c)
        a, b = _pow2(m - m_new), _pow2(m_c - m_new)
        o = o * _per_row(a) + o_c * _per_row(b)
        l = l * a + l_c * b
        m = m_new
    empty = l == 0  # N10
    out = o / _per_row(l) + 0.0  # N9: + 0 turns -0 into +0
    out = out.masked_fill(_per_row(empty), 0.0).to(dtype)
    out = out.masked_fill(out.isnan(), math.nan)  # the canonical quiet NaN
    if not return_lse:
        return out
    lse = ((m + _log2(l)) * _LN2).masked_fill(empty, -math.inf)
    return out, lse.masked_fill(lse.isnan(), math.nan)


def _per_row(x: Tensor) -> Tensor:
    """[B, Hq, Sq] -> [B, Sq, Hq, 1]"""
    return x.transpose(1, 2).unsqueeze(-1)
