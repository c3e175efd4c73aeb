"""attn, attn_varlen, attn_partials: what users call.

Checked here: types, dtypes, devices, ranks, all that C cannot see. Shapes, ranges and lengths are checked by the C
library, whose message names the argument, its value and what was expected; see ops.call for what torch.compile changes.

Letters: B sequences, Sq and Sk rows, Hq query heads, Hk key/value heads (Hq a multiple of Hk; query head h reads kv
head h // (Hq // Hk)), D head dim of q and k, Dv head dim of v; 1 <= D, Dv <= 256.
"""

import math

import torch
from torch import Tensor

from . import ops
from .determinism import resolve_split_size
from .merge import Partials

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LAYOUTS = {3: "[rows, heads, head_dim]", 4: "[batch, rows, heads, head_dim]"}
_ARITHMETIC = {"auto": 0, "fma": 1, "mma": 2, "mma_sm90": 3, "mma_sm80": 4}


def _check_tensor(name: str, t: Tensor, has_gradient: bool = False) -> None:
    """has_gradient: whether the call has a backward that reaches this tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.layout != torch.strided:
        raise TypeError(f"{name} has layout {t.layout}, expected torch.strided")
    if not has_gradient and t.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(ops.NO_BACKWARD.format(name))


def _check_same_device(name: str, t: Tensor, q: Tensor, first: str = "q") -> None:
    if t.device != q.device:
        raise ValueError(f"{name} is on {t.device}, {first} is on {q.device}: expected one device")


def _rows(name: str, t: Tensor, q: Tensor, rank: int, first: str = "q", has_gradient: bool = False) -> Tensor:
    """q, k or v, with a contiguous last dimension. first: the name of the tensor that it is compared with."""
    _check_tensor(name, t, has_gradient)
    if t.dtype not in _DTYPES:
        raise TypeError(f"{name} has dtype {t.dtype}, expected float32, float16, bfloat16 or float64")
    if t.dtype != q.dtype:
        raise TypeError(f"{name} has dtype {t.dtype}, {first} has {q.dtype}: expected one dtype")
    _check_same_device(name, t, q, first)
    if t.ndim != rank:
        raise ValueError(f"{name} has {t.ndim} dimensions, expected {rank}: {_LAYOUTS[rank]}")
    return t if t.stride(-1) == 1 else t.contiguous()


def _lengths(name: str, t: Tensor | None, q: Tensor, absent: Tensor, n: int, first: str = "q") -> Tensor:
    """An int32 tensor of n entries, or the empty one that stands for None."""
    if t is None:
        return absent
    _check_tensor(name, t)
    if t.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {t.dtype}, expected int32")
    _check_same_device(name, t, q, first)
    if t.ndim != 1:
        raise ValueError(f"{name} has {t.ndim} dimensions, expected 1")
    if t.shape[0] == 0 and n > 0:  # the ops would take it for None
        raise ValueError(f"{name} has 0 elements, expected {n}")
    return t.contiguous()


def _pages(t: Tensor | None, q: Tensor, absent: Tensor, first: str = "q") -> Tensor:
    """block_table with contiguous rows, or the empty tensor of one dimension that stands for None."""
    if t is None:
        return absent
    _check_tensor("block_table", t)
    if t.dtype != torch.int32:
        raise TypeError(f"block_table has dtype {t.dtype}, expected int32")
    _check_same_device("block_table", t, q, first)
    if t.ndim != 2:
        raise ValueError(f"block_table has {t.ndim} dimensions, expected 2: [batch, columns]")
    return t if t.stride(-1) == 1 else t.contiguous()


def _per_head(
    name: str, t: Tensor | None, q: Tensor, absent: Tensor, max_rank: int, has_gradient: bool = False
) -> Tensor:
    """A floating-point tensor in the compute dtype, or the empty one that stands for None."""
    if t is None:
        return absent
    _check_tensor(name, t, has_gradient)
    if not t.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {t.dtype}, expected a floating-point dtype")
    _check_same_device(name, t, q)
    if not 1 <= t.ndim <= max_rank:
        raise ValueError(f"{name} has {t.ndim} dimensions, expected 1{' or 2' if max_rank == 2 else ''}")
    if t.numel() == 0 and q.numel() > 0:  # the ops would take it for None
        raise ValueError(f"{name} has 0 elements, expected one per query head ({q.shape[-2]})")
    return t.to(absent.dtype).contiguous()


def _number(name: str, x: float) -> float:
    if not isinstance(x, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    return float(x)


def _window(window: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be a pair of ints (left, right), got {window!r}")
    for side in window:
        if not isinstance(side, int):
            raise TypeError(f"window must be a pair of ints (left, right), got {window!r}")
    return window[0], window[1]


def _unpadded(values: Tensor, v: Tensor) -> Tensor:
    """The value dims that the caller's v has."""
    return values if values.shape[-1] == v.shape[-1] else values[..., : v.shape[-1]].contiguous()


def _family(q: Tensor, arithmetic: str) -> str:
    """Of a call: "fma" or "mma"."""
    if arithmetic not in _ARITHMETIC:
        raise ValueError(f"arithmetic is {arithmetic!r}, expected one of {', '.join(map(repr, _ARITHMETIC))}")
    on_tensor_cores = ops.on_tensor_cores(q, _ARITHMETIC[arithmetic])
    return "mma" if arithmetic.startswith("mma") or on_tensor_cores else "fma"


def _arguments(
    q, k, v, *, causal, scale, window, softcap, alibi_slopes, sinks, split_size, arithmetic,
    cu_seqlens=None, seqused_q=None, seqused_k=None, leftpad_k=None, k_pos=None, cache_batch_idx=None, block_table=None,
    differentiable=False,
) -> tuple:  # fmt: skip
    """The arguments of the ops, in their order. differentiable: of an op that has a backward, for some families."""
    _check_tensor("q", q, has_gradient=True)  # again below: the family decides
    if q.device.type not in ops.DEVICES:
        raise NotImplementedError(f"q is on {q.device}: flash_attn_det has kernels for cpu and cuda")
    rank = 4 if cu_seqlens is None else 3
    has_gradient = (
        differentiable
        and arithmetic in ("auto", "fma", *(("mma",) if q.device.type == "cuda" else ("mma_sm90", "mma_sm80")))
        and block_table is None and cache_batch_idx is None
    )  # fmt: skip
    q = _rows("q", q, q, rank, has_gradient=has_gradient)
    k, v = (
        _rows(name, t, q, rank if block_table is None else 4, has_gradient=has_gradient)
        for name, t in (("k", k), ("v", v))
    )
    if cache_batch_idx is not None and cu_seqlens is None and q.shape[0] == 0:
        k, v = k[:0], v[:0]  # nobody reads an entry; the ops would take the empty tensor for None
    if has_gradient and alibi_slopes is not None and torch.is_grad_enabled() and alibi_slopes.requires_grad:
        raise NotImplementedError(ops.NO_SLOPE_GRADIENT)
    no_lengths, per_head = ops.absent(torch.int32, q), ops.absent(ops.compute_dtype(q.dtype), q)
    if cu_seqlens is None:
        batch = q.shape[0]
        cu_seqlens_q = cu_seqlens_k = no_lengths
    else:
        _check_tensor("cu_seqlens_q", cu_seqlens[0])
        if block_table is None:
            _check_tensor("cu_seqlens_k", cu_seqlens[1])
        cu_seqlens_q = _lengths("cu_seqlens_q", cu_seqlens[0], q, no_lengths, 1)
        cu_seqlens_k = _lengths("cu_seqlens_k", cu_seqlens[1], q, no_lengths, 1)
        batch = cu_seqlens_q.shape[0] - 1
    family, head_dim = _family(q, arithmetic), q.shape[-1]
    if ops.on_tensor_cores(q, _ARITHMETIC[arithmetic]):
        q, k, v = map(ops.for_tensor_cores, (q, k, v))
    return (
        q, k, v, cu_seqlens_q, cu_seqlens_k,
        _lengths("seqused_q", seqused_q, q, no_lengths, batch),
        _lengths("seqused_k", seqused_k, q, no_lengths, batch),
        _lengths("leftpad_k", leftpad_k, q, no_lengths, batch),
        _lengths("k_pos", k_pos, q, no_lengths, batch),
        _lengths("cache_batch_idx", cache_batch_idx, q, no_lengths, batch),
        _pages(block_table, q, no_lengths),
        _per_head("alibi_slopes", alibi_slopes, q, per_head, 2),
        _per_head("sinks", sinks, q, per_head, 1, has_gradient),
        1.0 / math.sqrt(max(head_dim, 1)) if scale is None else _number("scale", scale),
        bool(causal), *_window(window), _number("softcap", softcap),
        resolve_split_size(split_size, family), _ARITHMETIC[arithmetic],
    )  # fmt: skip


def attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    k_pos: Tensor | None = None,
    split_size: int | None = None,
    arithmetic: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of dense sequences, softmax(q k^T * scale) v, whose bits do not depend on the rest of the call.

    A row of out depends on that row of q, the keys and values it sees, their positions, and static configuration
    (dtype, head dims, scale, softcap, mask kind, split_size, arithmetic): not on batch, neighbours, padding, the number
    of query rows in the call, strides, threads or instruction set.

    q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv]: float32, float16, bfloat16 or float64, one dtype, one device.
        Any strides; a tensor whose last dimension is not contiguous is copied first. NaN and infinity in keys that a
        row does not see cannot reach it.
    causal: row i sees keys up to its own position. Rows are aligned to the end of the keys: the last row is at the
        position of the last key.
    scale: finite; default 1 / sqrt(D).
    window (left, right): row at position p sees positions p - left .. p + right; -1 is unbounded.
    softcap: > 0 turns scores into softcap * tanh(score / softcap); 0 is off.
    alibi_slopes [Hq] or [B, Hq]: adds -slope * |distance| to the score. Converted to the compute dtype.
    sinks [Hq]: one more logit per head, with no value. Converted to the compute dtype.
    seqused_q, seqused_k [B] int32: rows and keys in use, from the first (for keys: from leftpad_k). Rows past
        seqused_q get out = 0 and lse = -inf.
    leftpad_k [B] int32: rows of k and v to skip before the first key.
    k_pos [B] int32: position of the first key in its sequence, for a cache that dropped its oldest keys.
    split_size: keys per split, a positive multiple of 128; default determinism.get_split_size(), which is 512 in the
        fma family and 1024 in mma unless it has been set. Changes bits.
    arithmetic: "fma" is the portable family with the same bits on every CPU and GPU; "mma" is that of tensor cores;
        "auto" is "mma" for float16 and bfloat16 on a CUDA device and "fma" otherwise. Changes bits.
        "mma" wants rows of a multiple of 16 bytes: others are copied and padded with zeros, which no bit depends on.
        "mma_sm90" computes on the CPU, for float16 and bfloat16, what "mma" gives on a GPU of compute capability 9.0:
        for audits, about 20 times slower than "fma". "mma_sm80" does so for 8.0, after what others have published; this
        project has not compared it with a GPU.

    Returns out [B, Sq, Hq, Dv], contiguous, in q's dtype; with return_lse also the log-sum-exp of the scores, lse
    [B, Hq, Sq] in the compute dtype (float64 for float64 inputs, else float32). A row that sees no key has out = 0 and
    lse = -inf.

    On a CUDA device the call is queued on torch's current stream, waits for nothing, and can be captured in a graph
    whose replays read the lengths anew. So the values of seqused_q, seqused_k, leftpad_k, k_pos and cu_seqlens, which
    are checked on the CPU, are not checked there. float64 is for the CPU.

    q, k, v, sinks and lse have gradients, whose bits for one sequence do not depend on the rest of the call either
    (contract clauses N13 and N14); that of sinks sums over all sequences. In the fma family a CPU and a GPU give the
    same bits. There are no second derivatives.

    Raises TypeError (types, dtypes), ValueError (shapes, ranges, devices), NotImplementedError (an input that requires
    grad where there is no backward: alibi_slopes, caches; a device or arithmetic without kernels),
    RuntimeError (the device refuses a launch).
    """
    arguments = _arguments(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        seqused_q=seqused_q, seqused_k=seqused_k, leftpad_k=leftpad_k, k_pos=k_pos, split_size=split_size,
        arithmetic=arithmetic, differentiable=True,
    )  # fmt: skip
    out, lse = ops.call(ops.fwd, *arguments)
    out = _unpadded(out, v)
    return (out, lse) if return_lse else out


def attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    k_pos: Tensor | None = None,
    block_table: Tensor | None = None,
    split_size: int | None = None,
    arithmetic: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of sequences that lie end to end in one buffer. The bits of a row are those of attn.

    q [Tq, Hq, D], k [Tk, Hk, D], v [Tk, Hk, Dv].
    cu_seqlens_q, cu_seqlens_k [B + 1] int32, ascending from 0: sequence b owns rows cu_seqlens[b] up to
        cu_seqlens[b + 1] - 1. Rows of q behind the last sequence get out = 0 and lse = -inf.
    seqused_q, seqused_k [B] int32: rows and keys in use of those that the sequence owns.
    block_table [B, columns] int32: k and v are a pool of pages, k [pages, page_size, Hk, D], v [pages, page_size, Hk,
        Dv], and row r of sequence b is row r % page_size of page block_table[b, r // page_size]. Any page_size from 1
        on. cu_seqlens_k is None then, seqused_k says how many keys each sequence has, and leftpad_k [B] int32 how many
        rows to skip before them. Pages may repeat; entries behind the last key are not read. On a CUDA device entries
        cannot be checked: wrong ones read another page of the pool.
    The other arguments, gradients, and what is raised, as in attn; with block_table there are no gradients.

    Returns out [Tq, Hq, Dv], contiguous, in q's dtype; with return_lse also lse [Hq, Tq] in the compute dtype.
    """
    arguments = _arguments(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        cu_seqlens=(cu_seqlens_q, cu_seqlens_k), seqused_q=seqused_q, seqused_k=seqused_k, leftpad_k=leftpad_k,
        k_pos=k_pos, block_table=block_table, split_size=split_size, arithmetic=arithmetic, differentiable=True,
    )  # fmt: skip
    out, lse = ops.call(ops.fwd, *arguments)
    out = _unpadded(out, v)
    return (out, lse) if return_lse else out


def attn_partials(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    split_size: int | None = None,
    arithmetic: str = "auto",
) -> Partials:
    """The unfinished state of every split of the keys, before the fold: split-KV made visible.

    merge_partials(attn_partials(...)) equals attn(...) bit for bit. Arguments, and what is raised, as in attn.

    Returns Partials: o [C, B, Sq, Hq, Dv], m and l [C, B, Hq, Sq] in the compute dtype: C = ceil(Sk / split_size)
    states in ascending order of position; with sinks one more, whose o is 0, at the end.
    """
    arguments = _arguments(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        seqused_q=seqused_q, seqused_k=seqused_k, leftpad_k=leftpad_k, split_size=split_size, arithmetic=arithmetic,
    )  # fmt: skip
    o, m, l = ops.call(ops.fwd_partials, *arguments)
    return Partials(_unpadded(o, v), m, l, q.dtype)
