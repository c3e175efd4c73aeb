"""The ``mma`` family on a Hopper GPU, from the text of the contract alone: slow, and independent of the kernels.

A matrix step is done in integers, as it was measured; exp2 of a probability is handed in, because only a GPU has the
contract's (``gpu_exp2``). What the families share is not written again: where sequences lie, what a row sees, tanh, the
running reference, a sink and sums in blocks come from flash_attn_det.reference, the fold and the finish are
merge_partials.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from flash_attn_det import Partials, contract, merge_partials, reference, reference_backward
from flash_attn_det import reference_steps as steps

STEP = 16  # products of one matrix instruction
BLOCK = contract()["MMA_BLOCK_KV"]  # N3
FRACTION = 25  # bits that a step keeps below its largest exponent
ZERO_EXPONENT = -133  # of an accumulator
LOWEST_EXPONENT = {torch.float16: -14, torch.bfloat16: -126, torch.float32: -126}
_FP32 = steps._FP32

Exp2 = Callable[[torch.Tensor], torch.Tensor]


def gpu_exp2(x: torch.Tensor) -> torch.Tensor:
    """ex2.approx.ftz.f32 of fp32 arguments <= 1, on the CPU.

    torch's own exp2 is that instruction for |x| <= 126; below, it halves, squares and keeps what is subnormal, which
    .ftz makes 0.
    """
    y = torch.exp2(x.cuda()).cpu()
    return torch.where(y < 2.0**-126, 0.0, y)


# ---- one matrix step -------------------------------------------------------------------------------------------------


def _parts(x: np.ndarray, lowest: int) -> tuple[np.ndarray, np.ndarray]:
    """(integer significand, exponent of its bit 23): x = significand * 2^(exponent - 23), at least the lowest one."""
    exponent = np.maximum(np.frexp(x)[1].astype(np.int64) - 1, lowest)
    return np.ldexp(x, 23 - exponent).astype(np.int64), exponent


def _shifted(significand: np.ndarray, left: np.ndarray) -> np.ndarray:
    """significand * 2^left, cut towards zero."""
    size = np.abs(significand)
    size = np.where(left >= 0, size << np.clip(left, 0, 32), size >> np.clip(-left, 0, 63))
    return np.sign(significand) * size


def matrix_step(acc: np.ndarray, a: np.ndarray, b: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """acc + sum(a * b) over the last dimension, of 16 products, as a Hopper tensor core rounds it.

    acc [...] and the result: values of fp32; a, b [..., 16]: values of the 16-bit dtype; all held in float64, all
    finite. The exact products and acc are aligned to the largest exponent among them, where that of a product is the
    sum of its factors' (it may lie in [2, 4)) and a subnormal number has its format's smallest; each is cut to 25
    fraction bits, they are added, and the sum is cut to fp32. Products that are zero take no part; acc = 0 does, with
    an exponent of its own. A sum of nothing is +0.
    """
    (a, a_exponent), (b, b_exponent) = (_parts(x, LOWEST_EXPONENT[dtype]) for x in (a, b))
    c, c_exponent = _parts(acc[..., None], LOWEST_EXPONENT[torch.float32])
    terms = np.concatenate([(a >> 12) * (b >> 12), c], -1)  # 12 bits hold a factor of either format
    exponents = np.concatenate([a_exponent + b_exponent, c_exponent], -1)
    exponents = np.where(terms == 0, -1000, exponents)
    exponents[..., -1:] = np.where(c == 0, ZERO_EXPONENT, c_exponent)
    largest = exponents.max(-1, keepdims=True)
    fraction = np.where(np.arange(terms.shape[-1]) < a.shape[-1], 22, 23)  # bits below its exponent
    total = _shifted(terms, exponents - largest + FRACTION - fraction).sum(-1)
    # To fp32: 24 significant bits, none below 2^-149.
    bits = np.frexp(np.abs(total).astype(np.float64))[1].astype(np.int64)
    unit = largest[..., 0] - FRACTION
    cut = np.maximum(np.maximum(bits - 24, -149 - unit), 0)
    return np.ldexp(_shifted(_shifted(total, -cut), cut).astype(np.float64), unit)


def chain(a: np.ndarray, b: np.ndarray, acc: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """N7: acc and the products over the last dimension of a and b, ascending, 16 at a time, padded with zeros."""
    padding = [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % STEP)]
    a, b = np.pad(a, padding), np.pad(b, padding)
    for first in range(0, a.shape[-1], STEP):
        acc = matrix_step(acc, a[..., first : first + STEP], b[..., first : first + STEP], dtype)
    return acc


# ---- the online softmax ----------------------------------------------------------------------------------------------


def _fp32(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).float()


def _scores(seq: steps._Sequence) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """N5: x [Hq, n_q, n_k], c, and tanh if there is softcap."""
    q, k, _ = (x.numpy() for x in seq.heads_first(torch.float64))
    x = _fp32(chain(q[:, :, None], k[:, None], np.zeros((*q.shape[:2], k.shape[1])), seq.q.dtype))
    c = _FP32.number(seq.scale * steps._LOG2E, x)
    if c > 0 and seq.softcap == 0 and seq.slopes is None:
        return x, c, None
    tanh = None
    if seq.softcap > 0:
        tanh = steps._tanh(x * _FP32.number(seq.scale / seq.softcap, x), _FP32)
        x = _FP32.number(seq.softcap, x) * tanh
    else:
        x = x * _FP32.number(seq.scale, x)
    if seq.slopes is not None:
        query, key = seq.positions()
        x = steps._fma(-seq.slopes[:, None, None], (query[:, None] - key).abs().float(), x)
    return x, _FP32.number(steps._LOG2E, x), tanh


def lane_sums(p: torch.Tensor) -> torch.Tensor:
    """N7: b_t of one block. p [..., 128] in fp32, of rounded values -> [..., 4]."""
    pairs = p.unflatten(-1, (16, 4, 2))  # key 8 i + 2 t + e
    b = torch.zeros_like(pairs[..., 0, :, 0])
    for i in range(16):
        b = b + (pairs[..., i, :, 0] + pairs[..., i, :, 1])
    return b


def _in_block(x: torch.Tensor, keys: range, block: int) -> torch.Tensor:
    """Positions block .. block + 127 of x [..., n_k], zero where there is no such key; keys: positions of all keys."""
    first, end = max(block, keys.start), min(block + BLOCK, keys.stop)
    part = x[..., first - keys.start : end - keys.start]
    return torch.nn.functional.pad(part, (first - block, block + BLOCK - end))


def _split(seq: steps._Sequence, x: torch.Tensor, c: torch.Tensor, first: int, exp2: Exp2) -> tuple:
    """N3, N6, N7: the state (o [Hq, n_q, Dv], m, l [Hq, n_q]) of the split that begins at position first."""
    visible = seq.visible()
    v = seq.heads_first(torch.float64)[2].transpose(1, 2)  # [Hq, Dv, n_k]
    keys = range(seq.first_key, seq.first_key + len(seq.k))
    m = torch.full(x.shape[:2], _FP32.sentinel)
    o, lanes = torch.zeros(*x.shape[:2], v.shape[1]), torch.zeros(*x.shape[:2], 4)
    for block in range(first, min(first + seq.split_size, keys.stop), BLOCK):
        if block + BLOCK <= keys.start:
            continue
        x_block = _in_block(x, keys, block)
        seen = _in_block(visible, keys, block)
        m_old, counted = m, seen & ~x_block.isnan()
        m = steps._reference(m, torch.where(counted, x_block, -torch.inf).amax(-1), c, _FP32)
        moved, at = steps._power_of_two(m_old - m, _FP32)[..., None], m[..., None]
        argument = torch.where(at.abs() > _FP32.limit, x_block * c - at, steps._fma(x_block, c, -at))
        p = torch.where(seen, exp2(argument), 0.0)
        p = p.to(seq.q.dtype).float()
        lanes = lanes * moved + lane_sums(p)
        rounded = p.double().numpy()
        values = _in_block(v, keys, block).numpy()
        o = _fp32(chain(rounded[:, :, None], values[:, None], (o * moved).double().numpy(), seq.q.dtype))
    return o, m, (lanes[..., 0] + lanes[..., 1]) + (lanes[..., 2] + lanes[..., 3])


def _sequence(seq: steps._Sequence, exp2: Exp2) -> tuple[torch.Tensor, torch.Tensor]:
    """out [n_q, Hq, Dv] in the input dtype and lse [Hq, n_q] of one sequence."""
    x, c, _ = _scores(seq)
    first, end = seq.first_key // seq.split_size * seq.split_size, seq.first_key + len(seq.k)
    states = [_split(seq, x, c, split, exp2) for split in range(first, end, seq.split_size)]
    nothing, no_reference = torch.zeros(*x.shape[:2], seq.v.shape[2]), torch.full(x.shape[:2], _FP32.sentinel)
    if seq.sinks is not None:  # N8: one more state, without values
        z, log2e = seq.sinks[:, None].expand(x.shape[:2]), _FP32.number(steps._LOG2E, x)
        m = steps._reference(no_reference, z, log2e, _FP32)
        states.append((nothing, m, steps._probability(z, log2e, m, _FP32)))
    if not states:
        states.append((nothing, no_reference, torch.zeros(x.shape[:2])))
    o, m, l = (torch.stack(parts) for parts in zip(*states))
    partials = Partials(o.transpose(1, 2)[:, None], m[:, None], l[:, None], seq.q.dtype)
    out, lse = merge_partials(partials, return_lse=True)
    return out[0], lse[0]


def attn(q, k, v, *, exp2: Exp2 = gpu_exp2, leftpad_k=None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of ``attn`` in the mma family on Hopper. Tensors on the CPU; keywords of ``attn``."""
    return reference._dense(functools.partial(_sequence, exp2=exp2), q, k, v, leftpad_k, True, options)


# ---- the backward (N13) ----------------------------------------------------------------------------------------------


def _float64(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


def delta_of(out: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None) -> torch.Tensor:
    """delta [..., n_q] of out and dout [..., n_q, Dv] in fp32: eight lanes, in turn eight dims each."""
    lanes = [torch.zeros(out.shape[:-1]) for _ in range(8)]
    for d in range(out.shape[-1]):
        lane = d // 8 % 8
        lanes[lane] = steps._fma(dout[..., d], out[..., d], lanes[lane])
    low = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])
    delta = low + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))
    return delta if dlse is None else delta - dlse


def _chain_over(
    weights: torch.Tensor, values: np.ndarray, acc: np.ndarray, skip: int, dtype: torch.dtype
) -> np.ndarray:
    """acc [H, m, d] + a chain of steps of weights [H, m, n] and values [H, n, d]; the first step lacks skip terms."""
    a = np.pad(_float64(weights), [(0, 0), (0, 0), (skip, 0)])
    b = np.pad(values, [(0, 0), (skip, 0), (0, 0)]).swapaxes(1, 2)
    return chain(a[:, :, None], b[:, None], acc, dtype)


def _pairs(seq: steps._Sequence, saved: reference_backward._Saved, exp2: Exp2) -> tuple[torch.Tensor, ...]:
    """P and dS [Hq, n_q, n_k], rounded and 0 where there is no term; L, delta and what is a term's row [Hq, n_q]."""
    x, c, tanh = _scores(seq)
    v = seq.heads_first(torch.float64)[2].numpy()
    out, dout = (y.float().transpose(0, 1) for y in (saved.out, saved.dout))
    some = saved.lse != -torch.inf
    terms = seq.visible() & some[..., None]
    logarithm = torch.where(some, saved.lse * _FP32.number(steps._LOG2E, x), 0)
    delta = delta_of(out, dout, saved.dlse)
    p = exp2(steps._fma(x, c, -logarithm[..., None]))
    dp = _fp32(chain(_float64(dout)[:, :, None], v[:, None], np.zeros(x.shape), seq.q.dtype))
    ds = p * (dp - delta[..., None])
    if tanh is not None:
        ds = ds * steps._fma(-tanh, tanh, torch.tensor(1.0))
    p, ds = (torch.where(terms, y, 0).to(seq.q.dtype).float() for y in (p, ds))
    return p, ds, logarithm, delta, some


def _backward(seq: steps._Sequence, saved: reference_backward._Saved, exp2: Exp2) -> tuple[torch.Tensor | None, ...]:
    """N13 of one sequence: dq [n_q, Hq, D], dk [n_k, Hk, D], dv [n_k, Hk, Dv] in the input dtype, dz [Hq] or None."""
    dtype = seq.q.dtype
    p, ds, logarithm, delta, some = _pairs(seq, saved, exp2)
    q, k, v = (x.numpy() for x in seq.heads_first(torch.float64))
    dout = _float64(saved.dout.transpose(0, 1))
    (heads, n_q, _), n_k, kv_heads = q.shape, k.shape[1], seq.k.shape[1]
    dq = _chain_over(ds, k, np.zeros(q.shape), seq.first_key % STEP, dtype)
    dk, dv = (np.zeros((kv_heads, n_k, y.shape[2])) for y in (k, v))
    for g in range(heads // kv_heads):  # one chain, that goes on from head to head
        of_group = slice(g, None, heads // kv_heads)
        dk = _chain_over(ds[of_group].transpose(1, 2), q[of_group], dk, 0, dtype)
        dv = _chain_over(p[of_group].transpose(1, 2), dout[of_group], dv, 0, dtype)
    scale = _FP32.number(seq.scale, p)
    dq, dk, dv = (_fp32(y) for y in (dq, dk, dv))
    dq, dk, dv = (
        steps._round(steps._canonical(y + 0.0, _FP32), dtype).transpose(0, 1) for y in (dq * scale, dk * scale, dv)
    )
    if seq.sinks is None:
        return dq, dk, dv, None
    e = steps._exp2(steps._fma(seq.sinks[:, None], _FP32.number(steps._LOG2E, p), -logarithm), _FP32)
    blocks = [range(i, min(i + 64, n_q)) for i in range(0, n_q, 64)]
    term = lambda i, total: steps._fma(-e[:, i], delta[:, i], total)  # noqa: E731
    return dq, dk, dv, reference_backward._block_sums(torch.zeros(heads), blocks, term, lambda i: some[:, i])


def attn_backward(q, k, v, out, lse, dout, dlse=None, *, exp2: Exp2 = gpu_exp2, leftpad_k=None, **options):
    """dq, dk, dv and d_sinks (None without sinks) of ``attn`` in the mma family on Hopper, all numbers finite."""
    compute = functools.partial(_backward, exp2=exp2)
    return reference_backward._dense_backward(compute, q, k, v, out, lse, dout, dlse, leftpad_k, options)
