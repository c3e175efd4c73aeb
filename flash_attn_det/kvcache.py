"""apply_rotary, append_kvcache, attn_with_kvcache: attention that reads keys and values from a cache.

Letters as in attention.py. A cache is dense, k_cache [B, Sk, Hk, D] and v_cache [B, Sk, Hk, Dv], or with
cache_batch_idx [Bc, Sk, ...], of which a sequence reads one entry; or it is paged, k_cache [pages, page_size, Hk, D]
and v_cache [pages, page_size, Hk, Dv], and row r of sequence b is row r % page_size of page block_table[b, r //
page_size].
"""

import torch
from torch import Tensor

from . import ops
from .attention import _arguments, _check_same_device, _check_tensor, _lengths, _pages, _rows, _unpadded


def _counts(name: str, n: Tensor | int | None, x: Tensor) -> Tensor | None:
    """int32 [B] from a tensor, or from one number for all sequences."""
    if n is None or isinstance(n, Tensor):
        return n
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"{name} must be an int or an int32 torch.Tensor, got {type(n).__name__}")
    if not 0 <= n < 2**31:
        raise ValueError(f"{name} is {n}, expected 0 to 2^31 - 1")
    return torch.full((x.shape[0],), n, dtype=torch.int32, device=x.device)


def _table(name: str, t: Tensor, x: Tensor, of: str) -> Tensor:
    """cos or sin, contiguous."""
    _check_tensor(name, t)
    if t.dtype not in (x.dtype, ops.compute_dtype(x.dtype)):
        raise TypeError(f"{name} has dtype {t.dtype}, expected {x.dtype} or {ops.compute_dtype(x.dtype)}")
    _check_same_device(name, t, x, of)
    if t.ndim != 2:
        raise ValueError(f"{name} has {t.ndim} dimensions, expected 2: [positions, rotary_dim / 2]")
    return t.contiguous()


def _tables(cos: Tensor | None, sin: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both tables, or two empty tensors of one dimension that stand for None."""
    if (cos is None) != (sin is None):
        raise ValueError("only one of rotary_cos and rotary_sin is given, expected both or none")
    if cos is None:
        return (ops.absent(ops.compute_dtype(x.dtype), x),) * 2
    return _table("rotary_cos", cos, x, "k_cache"), _table("rotary_sin", sin, x, "k_cache")


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    offsets: Tensor | int | None = None,
    advance: bool = True,
    interleaved: bool,
) -> Tensor:
    """Rotary embedding of the first rotary_dim values of each row of x, out of place.

    x [B, S, H, D]: float32, float16, bfloat16 or float64. Any strides.
    cos, sin [positions, rotary_dim / 2]: in x's dtype or its compute dtype (float64 for float64, else float32).
        rotary_dim is even by that and at most D; values behind it are copied.
    offsets: position of the first row of each sequence, int or [B] int32; None is 0.
    advance: row i of a sequence is at position offsets + i; False: all its rows are at offsets.
    interleaved: pairs are values (2 i, 2 i + 1); False: values (i, i + rotary_dim / 2).

    A pair (a, b) becomes (a cos - b sin, a sin + b cos): four products, then a difference and a sum, each rounded in
    the compute dtype, then rounded once to x's dtype (N12). These are the bits of eager torch operations in the compute
    dtype, on every device; NaN comes out as the canonical one.

    Returns [B, S, H, D], contiguous, in x's dtype. Positions that the tables do not have raise ValueError on the CPU;
    on a CUDA device, where they cannot be checked, they count as the tables' last (negative ones as the first).
    Raises TypeError, ValueError, NotImplementedError (an input that requires grad, a device without kernels).
    """
    _check_tensor("x", x)
    if x.device.type not in ops.DEVICES:
        raise NotImplementedError(f"x is on {x.device}: flash_attn_det has kernels for cpu and cuda")
    x = _rows("x", x, x, 4)
    offsets = _lengths("offsets", _counts("offsets", offsets, x), x, ops.absent(torch.int32, x), x.shape[0], "x")
    tables = _table("cos", cos, x, "x"), _table("sin", sin, x, "x")
    return ops.call(ops.rotate, x, *tables, offsets, bool(advance), bool(interleaved))


def append_kvcache(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache_seqlens: Tensor | int,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
) -> None:
    """Write new keys and values behind those of a cache, in place.

    k_cache, v_cache: dense or paged, as the module says; any strides, but a contiguous last dimension.
    k [B, S, Hk, D], v [B, S, Hk, Dv]: row i of sequence b goes to row cache_seqlens[b] + i of the sequence's cache.
    cache_seqlens: rows of the cache in use, left padding among them; int or [B] int32.
    cache_batch_idx [B] int32, block_table [B, columns] int32: as in attn_with_kvcache. Two new rows that go to the same
        place, because sequences share an entry or a page, are the caller's mistake: either may win.
    rotary_cos, rotary_sin, rotary_interleaved: k is rotated as by apply_rotary with offsets=cache_seqlens.

    Values are copied bit by bit but for the rotation. Rows that the cache has no room for, and pages that it does not
    have, raise ValueError on the CPU before anything is written; on a CUDA device, where they cannot be checked, such
    rows are not written. Raises as attn does.
    """
    _check_tensor("k_cache", k_cache)
    if k_cache.device.type not in ops.DEVICES:
        raise NotImplementedError(f"k_cache is on {k_cache.device}: flash_attn_det has kernels for cpu and cuda")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if _rows(name, cache, k_cache, 4, "k_cache") is not cache:
            raise ValueError(f"{name} has stride {cache.stride(-1)} in its last dimension, expected 1")
    k, v = (_rows(name, x, k_cache, 4, "k_cache") for name, x in (("k", k), ("v", v)))
    if cache_batch_idx is not None and k.shape[0] == 0:
        k_cache, v_cache = k_cache[:0], v_cache[:0]  # nothing is written; the op would take the empty tensor for None
    used = _counts("cache_seqlens", cache_seqlens, k)
    if used is None:
        raise ValueError("cache_seqlens is None, expected the rows of the cache in use")
    ops.call(
        ops.append, k, v, k_cache, v_cache,
        _lengths("cache_seqlens", used, k, ops.absent(torch.int32, k), k.shape[0], "k_cache"),
        _lengths("cache_batch_idx", cache_batch_idx, k, ops.absent(torch.int32, k), k.shape[0], "k_cache"),
        _pages(block_table, k, ops.absent(torch.int32, k), "k_cache"),
        *_tables(rotary_cos, rotary_sin, k), bool(rotary_interleaved),
    )  # fmt: skip


def attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    k_pos: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    split_size: int | None = None,
    arithmetic: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q over a cache of keys and values, to which new ones may be appended first.

    The keys of a sequence, old and new, are one range of positions: the bits are those of attn on the same keys laid
    end to end, whatever the cache's capacity, its page size, the order of its pages, what other pages and rows hold,
    and however many rows were appended at a time.

    q [B, Sq, Hq, D]. k_cache, v_cache: as the module says.
    k [B, S, Hk, D], v [B, S, Hk, Dv]: written in place to rows cache_seqlens + 0 .. S - 1, as by append_kvcache, which
        says more. They are keys of this call then. cache_seqlens is needed, and does not count them.
    rotary_cos, rotary_sin [positions, rotary_dim / 2], rotary_interleaved: with k and v, rotate k by position
        cache_seqlens + i, and q: where causal or a window is given, row i by position cache_seqlens + i, else all rows
        by cache_seqlens. The bits are those of apply_rotary before a call without.
    cache_seqlens: rows of the cache in use, left padding among them; int or [B] int32. None: all.
    cache_batch_idx [B] int32: the entry of a dense cache that each sequence reads.
    leftpad_k [B] int32: rows to skip before the first key.
    block_table [B, columns] int32: the cache is paged, with pages of any size from 1 on. Entries behind the last row in
        use are not read.
    k_pos [B] int32: position of the first key in its sequence, for a rolling cache that dropped its oldest keys. Rotate
        before then: rotary_cos with k_pos is refused.
    The other arguments as in attn.

    Returns out [B, Sq, Hq, Dv], contiguous, in q's dtype; with return_lse also lse [B, Hq, Sq] in the compute dtype.
    Raises as attn and append_kvcache do, on the CPU before anything is written, except inside a graph that
    torch.compile made, where the append may have happened. Where a message speaks of seqused_k, that is cache_seqlens -
    leftpad_k. A CUDA call waits for nothing. Wrong lengths, entries and pages are not seen there; they read and write
    nothing outside the cache. With 16-bit tensors there, caches whose rows are no multiples of 16 bytes are copied in
    every call.
    """
    _check_tensor("q", q)
    used = _counts("cache_seqlens", cache_seqlens, q)
    if (k is None) != (v is None):
        raise ValueError("only one of k and v is given, expected both or none")
    if k is not None and used is None:
        raise ValueError("k and v are given without cache_seqlens, expected the rows of the cache in use")
    if rotary_cos is not None and k is None:
        raise ValueError("rotary_cos is given without k and v: use apply_rotary")
    if rotary_cos is not None and k_pos is not None:
        raise NotImplementedError("rotary_cos is given with k_pos: use apply_rotary with positions of your own")

    def arguments(q: Tensor, appended: int) -> tuple:
        keys = used
        if used is not None:
            _lengths("cache_seqlens", used, q, used, q.shape[0])
            keys = used if leftpad_k is None else used - _lengths("leftpad_k", leftpad_k, q, used, q.shape[0])
            keys = keys + appended if appended else keys
        return _arguments(
            q, k_cache, v_cache, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
            sinks=sinks, seqused_k=keys, leftpad_k=leftpad_k, k_pos=k_pos, cache_batch_idx=cache_batch_idx,
            block_table=block_table, split_size=split_size, arithmetic=arithmetic,
        )  # fmt: skip

    call = arguments(q, 0)
    if k is not None:
        if not torch.compiler.is_compiling():
            ops.call(ops.check, *call)
        append_kvcache(
            k_cache, v_cache, _rows("k", k, q, 4), _rows("v", v, q, 4), cache_seqlens=used,
            cache_batch_idx=cache_batch_idx, block_table=block_table, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
        )  # fmt: skip
        if rotary_cos is not None:
            advance = bool(causal) or tuple(window) != (-1, -1)
            q = apply_rotary(q, rotary_cos, rotary_sin, offsets=used, advance=advance, interleaved=rotary_interleaved)
        call = arguments(q, k.shape[1])
    out, lse = ops.call(ops.fwd, *call)
    out = _unpadded(out, v_cache)
    return (out, lse) if return_lse else out
