"""The names and signatures of FlashAttention 2.8; compat_packed.py has the packed forms.

Differences: any head dim 1 .. 256, float32 and float64 too, CPU tensors; dropout raises
NotImplementedError; a row that sees no key has lse = -inf, where FlashAttention stores +inf; deterministic is accepted
and changes nothing, because everything here is. Gradients as in attn.
"""

from torch import Tensor

from .attention import attn, attn_varlen
from .kvcache import attn_with_kvcache


def _refuse(dropout_p: float) -> None:
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"dropout_p is {dropout_p}: flash_attn_det has no dropout, expected 0. What a random mask drops of a row "
            "depends on what was drawn before it, the other rows of the batch among it"
        )


def _results(out: Tensor, lse: Tensor, return_attn_probs: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    return (out, lse, out.new_empty(0)) if return_attn_probs else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """attn with FlashAttention's argument names.

    q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv]; alibi_slopes [Hq] or [B, Hq].
    Returns out [B, Sq, Hq, Dv]; with return_attn_probs (out, softmax_lse [B, Hq, Sq], S_dmask), S_dmask empty as it is
    in FlashAttention without dropout. Bits and exceptions as in attn.
    """
    _refuse(dropout_p)
    out, lse = attn(
        q, k, v, causal=causal, scale=softmax_scale, window=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        return_lse=True,
    )  # fmt: skip
    return _results(out, lse, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """attn_varlen with FlashAttention's argument names. max_seqlen_q and max_seqlen_k are accepted and not used.

    q [Tq, Hq, D], k [Tk, Hk, D], v [Tk, Hk, Dv]; cu_seqlens_q, cu_seqlens_k [B + 1] int32. With block_table
    [B, columns] k [pages, page_size, Hk, D] and v are paged, and only differences of cu_seqlens_k count, as lengths.
    Returns out [Tq, Hq, Dv]; with return_attn_probs (out, softmax_lse [Hq, Tq], S_dmask), S_dmask empty.
    Bits and exceptions as in attn_varlen.
    """
    _refuse(dropout_p)
    paged = block_table is not None
    out, lse = attn_varlen(
        q, k, v, cu_seqlens_q, None if paged else cu_seqlens_k, causal=causal, scale=softmax_scale, window=window_size,
        softcap=softcap, alibi_slopes=alibi_slopes, seqused_k=cu_seqlens_k.diff() if paged else None,
        block_table=block_table, return_lse=True,
    )  # fmt: skip
    return _results(out, lse, return_attn_probs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """attn_with_kvcache with FlashAttention's argument names.

    num_splits is accepted and not used: a number of splits would move their boundaries with the length of the keys, and
    so change bits; here boundaries are fixed by the split size, and how many run side by side cannot be seen.
    Pages of any size, also with cache_leftpad. Returns out [B, Sq, Hq, Dv]; with return_softmax_lse (out, softmax_lse
    [B, Hq, Sq]). Bits and exceptions as in attn_with_kvcache.
    """
    return attn_with_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved,
        cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, leftpad_k=cache_leftpad, block_table=block_table,
        causal=causal, scale=softmax_scale, window=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        return_lse=return_softmax_lse,
    )  # fmt: skip
