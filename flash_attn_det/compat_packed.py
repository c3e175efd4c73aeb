"""The packed forms of FlashAttention 2.8: q, k and v, or k and v, side by side in one tensor.

They are views into that tensor: nothing is copied, and the bits are those of the forms in compat.py. The arguments that
these docstrings do not name are those of flash_attn_func; differences from FlashAttention as in compat.py.
"""

from torch import Tensor

from .attention import _check_tensor
from .compat import flash_attn_func, flash_attn_varlen_func


def _unpacked(name: str, packed: Tensor, layout: str) -> tuple[Tensor, ...]:
    """Views of the tensors that lie along dimension -3, whose size the layout gives: "[B, S, 3, H, D]"."""
    _check_tensor(name, packed, has_gradient=True)  # its views are checked again
    dims = layout.strip("[]").split(", ")
    if packed.ndim != len(dims) or packed.shape[-3] != int(dims[-3]):
        raise ValueError(f"{name} has shape {list(packed.shape)}, expected {layout}")
    return packed.unbind(-3)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """flash_attn_func of qkv [B, S, 3, H, D], which holds q, k and v.

    Returns out [B, S, H, D]; with return_attn_probs (out, softmax_lse [B, H, S], S_dmask), S_dmask empty.
    Bits and exceptions as in attn; ValueError for another shape of qkv.
    """
    q, k, v = _unpacked("qkv", qkv, "[B, S, 3, H, D]")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """flash_attn_func of q [B, Sq, Hq, D] and kv [B, Sk, 2, Hk, D], which holds k and v.

    Returns out [B, Sq, Hq, D]; with return_attn_probs (out, softmax_lse [B, Hq, Sq], S_dmask), S_dmask empty.
    Bits and exceptions as in attn; ValueError for another shape of kv.
    """
    k, v = _unpacked("kv", kv, "[B, Sk, 2, Hk, D]")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """flash_attn_varlen_func of qkv [T, 3, H, D], which holds q, k and v of sequences that lie end to end.

    cu_seqlens [B + 1] int32, of rows and of keys; max_seqlen is accepted and not used.
    Returns out [T, H, D]; with return_attn_probs (out, softmax_lse [H, T], S_dmask), S_dmask empty.
    Bits and exceptions as in attn_varlen; ValueError for another shape of qkv.
    """
    q, k, v = _unpacked("qkv", qkv, "[T, 3, H, D]")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
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
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """flash_attn_varlen_func of q [Tq, Hq, D] and kv [Tk, 2, Hk, D], which holds k and v.

    max_seqlen_q and max_seqlen_k are accepted and not used.
    Returns out [Tq, Hq, D]; with return_attn_probs (out, softmax_lse [Hq, Tq], S_dmask), S_dmask empty.
    Bits and exceptions as in attn_varlen; ValueError for another shape of kv.
    """
    k, v = _unpacked("kv", kv, "[Tk, 2, Hk, D]")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip
