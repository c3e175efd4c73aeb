"""The ``mma`` family on a Hopper GPU, from the text of the contract alone: slow, and independent of the kernels.

A matrix step is done in integers, as it was measured; exp2 of a probability is handed in, because only a GPU has the
contract's (``gpu_exp2``). What the families share is not written again: where sequences lie, what a row sees, tanh, the
running reference and a sink come from flash_attn_det.reference, the fold and the finish are merge_partials.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from flash_attn_det import Partials, contract, merge_partials, reference

STEP = 16  # products of one matrix instruction
BLOCK = contract()["MMA_BLOCK_KV"]  # N3
FRACTION = 25  # bits that a step keeps below its largest exponent
LOWEST_EXPONENT = {torch.float16: -14, torch.bfloat16: -126, torch.float32: -126}
_FP32 = reference._FP32

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
    fraction bits, they are added, and the sum is cut to fp32. Zeros take no part: a sum of nothing is +0.
    """
    (a, a_exponent), (b, b_exponent) = (_parts(x, LOWEST_EXPONENT[dtype]) for x in (a, b))
    c, c_exponent = _parts(acc[..., None], LOWEST_EXPONENT[torch.float32])
    terms = np.concatenate([(a >> 12) * (b >> 12), c], -1)  # 12 bits hold a factor of either format
    exponents = np.concatenate([a_exponent + b_exponent, c_exponent], -1)
    exponents = np.where(terms == 0, -1000, exponents)
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


def _scores(seq: reference._Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """N5: x [Hq, n_q, n_k] and c."""
    q, k, _ = (x.numpy() for x in seq.heads_first(torch.float64))
    x = _fp32(chain(q[:, :, None], k[:, None], np.zeros((*q.shape[:2], k.shape[1])), seq.q.dtype))
    c = _FP32.number(seq.scale * reference._LOG2E, x)
    if c > 0 and seq.softcap == 0 and seq.slopes is None:
        return x, c
    if seq.softcap > 0:
        x = _FP32.number(seq.softcap, x) * reference._tanh(x * _FP32.number(seq.scale / seq.softcap, x), _FP32)
    else:
        x = x * _FP32.number(seq.scale, x)
    if seq.slopes is not None:
        query, key = seq.positions()
        x = reference._fma(-seq.slopes[:, None, None], (query[:, None] - key).abs().float(), x)
    return x, _FP32.number(reference._LOG2E, x)


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


def _split(seq: reference._Sequence, x: torch.Tensor, c: torch.Tensor, first: int, exp2: Exp2) -> tuple:
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
        m = reference._reference(m, torch.where(counted, x_block, -torch.inf).amax(-1), c, _FP32)
        moved, at = reference._power_of_two(m_old - m, _FP32)[..., None], m[..., None]
        argument = torch.where(at.abs() > _FP32.limit, x_block * c - at, reference._fma(x_block, c, -at))
        p = torch.where(seen, exp2(argument), 0.0)
        p = p.to(seq.q.dtype).float()
        lanes = lanes * moved + lane_sums(p)
        rounded = p.double().numpy()
        values = _in_block(v, keys, block).numpy()
        o = _fp32(chain(rounded[:, :, None], values[:, None], (o * moved).double().numpy(), seq.q.dtype))
    return o, m, (lanes[..., 0] + lanes[..., 1]) + (lanes[..., 2] + lanes[..., 3])


def _sequence(seq: reference._Sequence, exp2: Exp2) -> tuple[torch.Tensor, torch.Tensor]:
    """out [n_q, Hq, Dv] in the input dtype and lse [Hq, n_q] of one sequence."""
    x, c = _scores(seq)
    first, end = seq.first_key // seq.split_size * seq.split_size, seq.first_key + len(seq.k)
    states = [_split(seq, x, c, split, exp2) for split in range(first, end, seq.split_size)]
    nothing, no_reference = torch.zeros(*x.shape[:2], seq.v.shape[2]), torch.full(x.shape[:2], _FP32.sentinel)
    if seq.sinks is not None:  # N8: one more state, without values
        z, log2e = seq.sinks[:, None].expand(x.shape[:2]), _FP32.number(reference._LOG2E, x)
        m = reference._reference(no_reference, z, log2e, _FP32)
        states.append((nothing, m, reference._probability(z, log2e, m, _FP32)))
    if not states:
        states.append((nothing, no_reference, torch.zeros(x.shape[:2])))
    o, m, l = (torch.stack(parts) for parts in zip(*states))
    partials = Partials(o.transpose(1, 2)[:, None], m[:, None], l[:, None], seq.q.dtype)
    out, lse = merge_partials(partials, return_lse=True)
    return out[0], lse[0]


def attn(q, k, v, *, exp2: Exp2 = gpu_exp2, leftpad_k=None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of ``attn`` in the mma family on Hopper. Tensors on the CPU; keywords of ``attn``."""
    return reference._dense(functools.partial(_sequence, exp2=exp2), q, k, v, leftpad_k, True, options)
