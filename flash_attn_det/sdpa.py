"""attn under the signature of torch.nn.functional.scaled_dot_product_attention, for what can be expressed exactly."""

import math

import torch
from torch import Tensor

from . import masks
from .attention import attn


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    split_size: int | None = None,
    arithmetic: str = "auto",
) -> Tensor:
    """torch's scaled_dot_product_attention with the bits of attn: those of a row do not depend on the rest of the call.

    query [B, Hq, Sq, D], key [B, Hk, Sk, D], value [B, Hk, Sk, Dv]: float32, float16, bfloat16 or float64. Any strides;
        nothing is copied if the last dimension is contiguous, wherever the heads lie.
    attn_mask: bool (True: the key is seen) or additive with 0 and -inf alone, of a shape that expands to
        [B, Hq, Sq, Sk], the same for all heads. Two patterns are recognised: all rows of a sequence see the same keys
        (padding on either side, or keys left out anywhere), and row i sees the keys up to slot i + n, the same n for
        the whole batch, out of those that are there (causal, with padding on either side or unused slots). Padding
        does not reach the bits. Reading the mask makes a GPU's host wait.
    is_causal: row i sees keys 0 .. i, also if Sq and Sk differ: rows are aligned to the first key, as in torch. attn
        aligns them to the last.
    enable_gqa: must be True if Hq and Hk differ; query head h reads kv head h // (Hq // Hk).
    scale, split_size, arithmetic: as in attn.

    Returns out [B, Hq, Sq, Dv] in query's dtype, its heads transposed (contiguous as [B, Sq, Hq, Dv]). A row that sees
    no key gives 0.

    torch.compile: without a mask, or with a bool one that is the same for all rows ([B, 1, 1, Sk]) and leaves out keys
    on the left and right only.

    Raises NotImplementedError for dropout_p other than 0 and masks of another pattern, ValueError if attn_mask and
    is_causal are both given or shapes do not belong together, and what attn raises.
    """
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"dropout_p is {dropout_p}: flash_attn_det has no dropout, expected 0; for training with dropout use "
            "torch.nn.functional.scaled_dot_product_attention"
        )
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.ndim != 4:
            raise ValueError(f"{name} has {t.ndim} dimensions, expected 4: [batch, heads, rows, head_dim]")
    heads = query.shape[1], key.shape[1]
    if not enable_gqa and heads[0] != heads[1]:
        raise ValueError(f"query has {heads[0]} heads, key has {heads[1]}: pass enable_gqa=True to share key heads")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask is given and is_causal is True: expected one of them")
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    options = {"scale": scale, "split_size": split_size, "arithmetic": arithmetic}
    if attn_mask is not None:
        out = _masked(q, k, v, _rows_and_keys(attn_mask, query, key), options)
    elif is_causal:
        out = _causal_from_the_first_key(q, k, v, options)
    else:
        out = attn(q, k, v, **options)
    return out.transpose(1, 2)


def _causal_from_the_first_key(q, k, v, options):
    """Row i sees keys 0 .. i: as many rows as keys are attn's causal, and the rows behind them see all keys."""
    n = min(q.shape[1], k.shape[1])
    out = attn(q[:, :n], k[:, :n], v[:, :n], causal=True, **options)
    if n == q.shape[1]:
        return out
    return torch.cat([out, attn(q[:, n:], k, v, **options)], 1)


def _rows_and_keys(mask, query, key):
    """What torch takes for a mask -> bool [B, 1, Sk] if it is the same for all rows, else bool [B, Sq, Sk]."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor or None, got {type(mask).__name__}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask is on {mask.device}, query is on {query.device}: expected one device")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attn_mask has dtype {mask.dtype}, expected bool or a floating-point dtype")
    whole = (*query.shape[:3], key.shape[2])
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if mask.ndim > 4 or any(size not in (1, full) for size, full in zip(shape, whole, strict=True)):
        raise ValueError(f"attn_mask has shape {list(mask.shape)}, expected one that expands to {list(whole)}")
    mask = masks.without_heads(masks.as_bool(mask.view(shape), -math.inf))
    return mask.expand(whole[0], -1, whole[3])


def _masked(q, k, v, mask, options):
    """attn of the rows and keys that the mask [B, 1 or Sq, Sk] leaves, 0 for rows that it leaves no key."""
    if mask.numel() == 0:  # no sequence, no row, or no key
        return attn(q, k, v, **options)
    if mask.shape[1] == 1:
        return _full(q, k, v, mask[:, 0], options)
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "flash_attn_det: under torch.compile an attn_mask must be the same for all rows, of shape [B, 1, 1, Sk]"
        )
    keys = masks.full_pattern(mask)
    out = _causal_with_padding(q, k, v, mask, options) if keys is None else _full(q, k, v, keys, options)
    unseen = ~mask.any(2)
    return out.masked_fill_(unseen[:, :, None, None], 0.0) if bool(unseen.any()) else out


def _full(q, k, v, keys, options):
    """All rows see the keys [B, Sk] of their sequence."""
    return masks.attend(q, k, v, masks.plan_keys(keys, q.shape[1], k.shape[1], False, False), options)


def _causal_with_padding(q, k, v, mask, options):
    """Rows up to that of the last key see the keys up to their own slot; later ones, padding mostly, see all keys."""
    found = masks.causal_pattern(mask)
    if found is None:
        raise NotImplementedError(masks.NOT_EXPRESSIBLE.format("full or causal"))
    keys, first = found
    start, count, contiguous = masks.extents(keys)
    if not bool(contiguous):
        raise NotImplementedError(
            "flash_attn_det: this attn_mask is causal and leaves out keys between others. Pass packed sequences "
            "(attn_varlen), or use torch.nn.functional.scaled_dot_product_attention"
        )
    n_rows = q.shape[1]
    causal_rows = (start + count - first).clamp(0, n_rows)
    lengths = {"leftpad_k": start.int(), "seqused_k": count.int()}
    out = attn(q, k, v, causal=True, seqused_q=causal_rows.int(), **lengths, **options)

    row = torch.arange(n_rows, device=q.device)
    last_seen = torch.where(mask.any(2), row + 1, 0).amax(1)
    n_later = int((last_seen - causal_rows).max())
    if n_later > 0:
        later = causal_rows[:, None] + row[:n_later]
        b, i = (later < n_rows).nonzero(as_tuple=True)
        sequence = torch.arange(q.shape[0], device=q.device)[:, None]
        rows = attn(q[sequence, later.clamp(max=n_rows - 1)], k, v, **lengths, **options)
        out = out.index_put((b, later[b, i]), rows[b, i])  # not in place: the backward needs what the first call gave
    return out
