"""The names and signatures of FlashAttention 2.8; compat_packed.py has the packed forms.

Differences: any head dim 1 .. 256, float32 and float64 too, CPU tensors; dropout and block_table raise
NotImplementedError; a row that sees no key has lse = -inf, where FlashAttention stores +inf; deterministic is accepted
and changes nothing, because everything here is.
"""

from torch import Tensor

from .attention import attn, attn_varlen


def _refuse(dropout_p: float, block_table: Tensor | None = None) -> None:
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"dropout_p is {dropout_p}: flash_attn_det has no dropout, expected 0. What a random mask drops of a row "
            "depends on what was drawn before it, the other rows of the batch among it"
        )
    if block_table is not None:
        raise NotImplementedError("block_table is given: flash_attn_det has no paged keys and values yet")


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

    q [Tq, Hq, D], k [Tk, Hk, D], v [Tk, Hk, Dv]; cu_seqlens_q, cu_seqlens_k [B + 1] int32.
    Returns out [Tq, Hq, Dv]; with return_attn_probs (out, softmax_lse [Hq, Tq], S_dmask), S_dmask empty.
    Bits and exceptions as in attn_varlen.
    """
    _refuse(dropout_p, block_table)
    out, lse = attn_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, scale=softmax_scale, window=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, return_lse=True,
    )  # fmt: skip
    return _results(out, lse, return_attn_probs)
