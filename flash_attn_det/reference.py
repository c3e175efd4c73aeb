"""The contract's ``fma`` family in plain torch, slow and obvious, and a float64 oracle beside it.

``attn_reference`` repeats every rounding that ``csrc/numerics/contract.h`` prescribes, so its bits equal the kernels'
(comments cite the clauses). ``attn_oracle`` is a dense float64 softmax: what the answer should be, for accuracy. Both
take the keywords of ``attn``; the ``varlen`` forms take those of ``attn_varlen``. ``attn_backward_reference`` is the
backward in the same manner; the oracle's is torch's own.
"""

from __future__ import annotations

import math

import torch

from .determinism import contract
from .reference_backward import _dense_backward, _reference_backward
from .reference_steps import (
    _FP32,
    _FP64,
    _LN2,
    _LOG2E,
    _canonical,
    _fma,
    _fold,
    _log2,
    _maximum,
    _power_of_two,
    _probability,
    _reference,
    _round,
    _scores,
    _Sequence,
    _sequences,
)


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
