"""The backward by clause N13 in plain torch; ``reference.attn_backward_reference`` is how it is called."""

from __future__ import annotations

import dataclasses
import math

import torch

from .determinism import contract
from .reference_steps import (
    _FP32,
    _FP64,
    _LOG2E,
    _canonical,
    _dot,
    _exp2,
    _fma,
    _round,
    _scores,
    _Sequence,
    _sequences,
)


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
