"""transformers 5.x: ``attn_implementation="flash_attn_det"`` (or ``"deterministic_attention"``).

``import flash_attn_det`` registers both names, before or after ``import transformers``. They are one implementation:
a model that asks for either gets ``config._attn_implementation == "flash_attn_det"``.

What transformers hands over is a query block, a key buffer and a mask. What the contract wants to know is, per
sequence, which keys there are, in order, and which of them are the query rows. This file is that translation:

    deterministic_mask       once per forward: the mask that transformers describes -> None or a "key mask"
    deterministic_attention  in every layer: key mask, cu_seq_lens or position_ids -> attn or attn_varlen

A *key mask* is a tensor [B, 1, 1, n] here: which key slots hold a key, or which packed sequence's. masks.py says what
it means, and how it is expressed. So attention gives a sequence the same bits alone, padded on either side, packed, or
out of a cache.
"""

import functools
import types

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .. import masks
from ..attention import attn, attn_varlen

NAME = "flash_attn_det"
# A name without "flash", which transformers treats as "a FlashAttention hub kernel" wherever it finds it.
ALIAS = "deterministic_attention"

# Keyword arguments that change what attention computes and that attn has no equivalent for.
_REFUSED = ("position_bias", "head_mask", "indices", "block_indices", "block_table")


# ---------------------------------------------------------------------------------------------------------------------
# registration


def unsupported_reason(modeling_utils):
    """Why this transformers cannot be registered with, or None. modeling_utils: the module of that name."""
    needed = {
        "AttentionInterface": ("register",),
        "PreTrainedModel": ("_check_and_adjust_attn_implementation", "get_correct_attn_implementation"),
    }
    for name, methods in needed.items():
        for method in methods:
            if not hasattr(getattr(modeling_utils, name, None), method):
                return f"transformers 5.x is needed: transformers.modeling_utils.{name}.{method} does not exist"
    return None


def register():
    """Register both names with transformers; ``import flash_attn_det`` calls this by itself. Idempotent.

    Raises ImportError if transformers is missing or older than 5.
    """
    from transformers import masking_utils, modeling_utils

    reason = unsupported_reason(modeling_utils)
    if reason is not None:
        raise ImportError(reason)
    for name in (NAME, ALIAS):
        modeling_utils.AttentionInterface.register(name, deterministic_attention)
        masking_utils.AttentionMaskInterface.register(name, deterministic_mask)
    _pass_by_hub_kernels(modeling_utils.PreTrainedModel)


def _pass_by_hub_kernels(model_class):
    """Keep our names, and only ours, out of the two checks that every requested implementation goes through.

    For a name with "flash" in it the first check replaces it by a kernel that the model's author listed
    (gpt-oss, ...), or downloads a kernel of that name and fails. Other names go to the original methods untouched.
    """
    if hasattr(model_class.get_correct_attn_implementation, "_flash_attn_det"):
        return
    check_and_adjust = model_class._check_and_adjust_attn_implementation
    get_correct = model_class.get_correct_attn_implementation

    @functools.wraps(check_and_adjust)
    def check_and_adjust_or_ours(self, attn_implementation, *args, **kwargs):
        if attn_implementation in (NAME, ALIAS):
            return self.get_correct_attn_implementation(attn_implementation)
        return check_and_adjust(self, attn_implementation, *args, **kwargs)

    @functools.wraps(get_correct)
    def get_correct_or_ours(self, requested_attention, *args, **kwargs):
        if requested_attention not in (NAME, ALIAS):
            return get_correct(self, requested_attention, *args, **kwargs)
        if not self._supports_flash_attn:
            raise ValueError(
                f'{type(self).__name__} cannot use attn_implementation="{requested_attention}": it does not pass its '
                "causality, windows and biases to the attention function (its _supports_flash_attn is False). "
                'For one part of a composite model, ask per part: attn_implementation={"text_config": '
                f'"{requested_attention}", "vision_config": "sdpa"}}.'
            )
        return NAME

    get_correct_or_ours._flash_attn_det = True
    model_class._check_and_adjust_attn_implementation = check_and_adjust_or_ours
    model_class.get_correct_attn_implementation = get_correct_or_ours


# ---------------------------------------------------------------------------------------------------------------------
# the mask, once per forward

_NOT_EXPRESSIBLE = (
    f"{NAME} computes full and causal attention with padding, windows and packed sequences. This model asks for "
    "another pattern (or_mask_function, and_mask_function, block_sequence_ids or chunks); load it, or that part of it, "
    'with attn_implementation="sdpa".'
)

# Key masks made here, each with the plans derived from it so far: every layer of a forward shares them. Only masks
# made here are kept, because nobody else holds them and can change them in place.
_plans = WeakIdKeyDictionary()


def _own(mask_2d):
    mask = mask_2d[:, None, None, :]
    if not torch.compiler.is_compiling():
        _plans[mask] = {}
    return mask


def deterministic_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    local_size=None,
    use_vmap=False,
    device="cpu",
    **kwargs,
):
    """The mask function that transformers calls: returns None (every key slot holds a key) or a key mask.

    batch_size, q_length, kv_length: int. q_offset: position of the first query row, int or int tensor of a static
    cache. kv_offset: slots that a rolling cache has dropped. mask_function: the rule that transformers would evaluate
    per (query, key); attention_mask: [batch_size, >= 1] bool padding mask over all slots so far, or None.

    Raises NotImplementedError for a rule that is neither full nor causal attention, with or without a window, nor
    packed sequences of it.
    """
    rule, segments = _recognise(mask_function, local_size)
    if segments is not None:
        return _own(segments.expand(batch_size, -1) + 1)
    causal = _is_causal(rule, kwargs)
    if rule is None:
        area = {
            "batch_size": 1 if attention_mask is None else batch_size,
            "q_length": q_length,
            "kv_length": kv_length,
            "q_offset": q_offset,
            "kv_offset": kv_offset,
            "attention_mask": attention_mask,
            "device": device,
        }
        _require_expressible(mask_function, causal, local_size, use_vmap, area)

    # Slots up to `end` are in use; a static cache has more. Full attention reads every slot that it is given.
    end = q_offset + q_length if causal else kv_offset + kv_length
    if isinstance(end, torch.Tensor):
        if q_length == 1:
            # Decode with a static cache: the shape must not depend on the position, nor the host wait for it.
            end = kv_offset + kv_length
            used = (torch.arange(end, device=device) <= q_offset)[None, :]
            if attention_mask is not None:
                used = used & _pad_right(attention_mask, end)
            return _own(used.expand(batch_size, -1))
        end = int(end)

    if attention_mask is None:
        if kv_offset == 0 and end == kv_length:
            return None
        return _own(torch.ones(1, 1, dtype=torch.bool, device=device).expand(batch_size, end))
    mask = _pad_right(attention_mask, end).to(torch.bool)
    if kv_offset == 0 and end == kv_length and not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return _own(mask)


def _pad_right(mask, length):
    """[B, n] -> [B, length]; slots that the mask does not mention hold no key, as in transformers."""
    if mask.shape[1] < length:
        return torch.nn.functional.pad(mask, (0, length - mask.shape[1]))
    return mask[:, :length]


class _Any:
    """Stands for any tensor in a pattern; `found` is the tensor that stood there."""

    found = None


def _matches(value, pattern):
    """Whether two mask rules are the same function with the same captured values."""
    if isinstance(pattern, _Any):
        pattern.found = value
        return isinstance(value, torch.Tensor)
    if isinstance(pattern, types.FunctionType) and isinstance(value, types.FunctionType):
        if value is pattern:
            return True
        cells, pattern_cells = value.__closure__ or (), pattern.__closure__ or ()
        return (
            value.__code__ is pattern.__code__
            and len(cells) == len(pattern_cells)
            and all(_matches(a.cell_contents, b.cell_contents) for a, b in zip(cells, pattern_cells))
        )
    if isinstance(pattern, tuple) and isinstance(value, tuple):
        return len(value) == len(pattern) and all(map(_matches, value, pattern))
    return type(value) is type(pattern) and bool(value == pattern)


def _packed_rule(function, segments):
    """A rule within packed sequences, as the installed transformers builds it."""
    from transformers import masking_utils as mu

    if hasattr(mu, "packed_sequence_compatibility_function"):  # newer ones also map positions
        return mu.packed_sequence_compatibility_function(function, _Any(), segments)
    return mu.and_masks(function, mu.packed_sequence_mask_function(segments))


def _recognise(mask_function, local_size):
    """(rule, segments): "causal", "full" or None for unknown; the numbers [B, n] of packed sequences or None.

    A rule is recognised by building the same one with transformers' own functions and comparing structure, so a
    change there makes a rule unknown (and then checked by evaluation), never misread.
    """
    from transformers import masking_utils as mu

    rules = [("causal", mu.causal_mask_function), ("full", mu.bidirectional_mask_function)]
    for rule, function in rules:
        if mask_function is function:
            return rule, None
    if torch.compiler.is_compiling():
        return None, None  # dynamo cannot look into closures
    if local_size is not None:
        rules += [
            ("causal", mu.sliding_window_causal_mask_function(local_size)),
            ("full", mu.sliding_window_bidirectional_mask_function(local_size)),
        ]
    for rule, function in rules:
        if _matches(mask_function, function):
            return rule, None
        segments = _Any()
        if _matches(mask_function, _packed_rule(function, segments)):
            return rule, segments.found
    return None, None


def _is_causal(rule, kwargs):
    """Whether the model's attention modules will say is_causal; raises if the mask says something else."""
    config = kwargs.get("config")
    # Only the bidirectional mask factories pass this; a decoder can be told to look both ways by its config.
    causal = "allow_is_bidirectional_skip" not in kwargs and not getattr(config, "use_bidirectional_attention", False)
    if rule is not None and causal != (rule == "causal"):
        raise NotImplementedError(
            f"{NAME}: the model asks for a {rule} mask, but its configuration makes attention "
            f"{'causal' if causal else 'bidirectional'} (is_causal, use_bidirectional_attention)"
        )
    return causal


def _require_expressible(mask_function, causal, local_size, use_vmap, area):
    """Raise unless a mask rule of unknown form equals one that can be expressed, by evaluating both over the area."""
    from transformers import masking_utils as mu

    if causal:
        candidates = [mu.causal_mask_function]
        if local_size is not None:
            candidates = [mu.sliding_window_causal_mask_function(local_size)]
    else:
        candidates = [mu.bidirectional_mask_function]
        if local_size is not None:
            # transformers' encoders count the window's end inside, the attention functions' argument outside.
            inclusive = mu.sliding_window_bidirectional_mask_function
            candidates = [inclusive(local_size), inclusive(local_size - 1)]

    compiling = torch.compiler.is_compiling()
    q_length, q_offset = area["q_length"], area["q_offset"]
    rows = q_length if compiling else 512  # evaluated in blocks: the whole mask is q_length x kv_length
    for start in range(0, q_length, rows):
        block = {**area, "q_length": min(rows, q_length - start), "q_offset": q_offset + start}
        block.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        wanted = mu.sdpa_mask(mask_function=mask_function, use_vmap=use_vmap, **block)
        if compiling:
            # The host must not wait for the answer, and packed sequences have no fixed shape to compile for.
            same = [(wanted == mu.sdpa_mask(mask_function=f, **block)).all() for f in candidates]
            torch._assert_async(torch.stack(same).any(), _NOT_EXPRESSIBLE + " Packed sequences: pass cu_seq_lens.")
            return
        candidates = [f for f in candidates if torch.equal(wanted, mu.sdpa_mask(mask_function=f, **block))]
        if not candidates:
            raise NotImplementedError(_NOT_EXPRESSIBLE)


# ---------------------------------------------------------------------------------------------------------------------
# attention, in every layer


def deterministic_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    softcap=None,
    is_causal=None,
    s_aux=None,
    sinks=None,
    cache=None,
    **kwargs,
):
    """The attention function that transformers calls in every layer.

    query [B, Hq, Sq, D], key [B, Hk, Sk, D], value [B, Hk, Sk, Dv]; fp32, fp16, bf16 or fp64. attention_mask: None, a
    key mask (see the top of this file), a padding mask [B, n], or a 4-D mask [B, 1, Sq, n], bool or additive.
    s_aux, sinks: [Hq], one extra logit per head. Returns (out [B, Sq, Hq, Dv], None). Rows that are padding give 0, or,
    without causality and windows, what the row attends to.

    A sequence's rows have the same bits for every batch, padding side, packing and cache that it comes from.

    Raises NotImplementedError for dropout, biases and masks that cannot be expressed; ValueError for arguments that
    contradict each other.
    """
    _refuse(dropout, kwargs)
    if sinks is None:
        sinks = s_aux
    if sinks is not None and sinks.ndim != 1:
        raise NotImplementedError(f"{NAME}: sinks must be one logit per query head, got shape {tuple(sinks.shape)}")
    if cache is not None:
        # Continuous batching: the paged cache stores the new keys and returns all of them, packed; it also picks
        # this layer's cu_seq_lens_k, in place.
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        attention_mask = None

    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    windowed = sliding_window is not None
    # transformers counts the row itself as part of the window, on both sides where both exist.
    window = (sliding_window - 1, 0 if causal else sliding_window - 1) if windowed else (-1, -1)
    options = {"causal": causal, "scale": scaling, "window": window, "softcap": softcap or 0.0, "sinks": sinks}

    # [B, H, S, D] -> [B, S, H, D], as views
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    cu_seq_lens = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if any(cu is not None for cu in cu_seq_lens):
        # An int64 mask was made above from position_ids that mark the same packed sequences.
        if attention_mask is not None and attention_mask.dtype != torch.int64:
            raise ValueError(f"{NAME}: pass attention_mask or cu_seq_lens_q and cu_seq_lens_k, not both")
        k_pos = _rolled_positions(cu_seq_lens, kwargs.get("position_ids")) if cache is not None and windowed else None
        return _attend_packed(q, k, v, *cu_seq_lens, k_pos, options), None

    if attention_mask is None:
        attention_mask = _packed_by_positions(q, k, kwargs.get("position_ids"))
    if attention_mask is None:
        return attn(q, k, v, **options), None

    plan = _plan(attention_mask, *q.shape[:2], k.shape[1], causal, windowed)
    return masks.attend(q, k, v, plan, options), None


def _refuse(dropout, kwargs):
    if dropout:
        raise NotImplementedError(
            f"{NAME} has no attention dropout (got {dropout}); call model.eval() or set attention_dropout to 0"
        )
    if kwargs.get("output_attentions"):
        raise NotImplementedError(f'{NAME} does not materialise attention weights; use attn_implementation="eager"')
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f'{NAME} has no equivalent of {name}; use attn_implementation="sdpa" or "eager"')


def _attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, k_pos, options):
    """[B, Sq, Hq, D] whose rows, flattened, are the packed sequences of cu_seqlens."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise ValueError(f"{NAME}: cu_seq_lens_q and cu_seq_lens_k must be passed together")
    out = attn_varlen(
        q.reshape(-1, *q.shape[2:]),
        k.reshape(-1, *k.shape[2:]),
        v.reshape(-1, *v.shape[2:]),
        cu_seqlens_q.to(torch.int32),
        cu_seqlens_k.to(torch.int32),
        k_pos=k_pos,
        **options,
    )
    return out.view(*q.shape[:2], *out.shape[1:])


def _packed_by_positions(q, k, position_ids):
    """A key mask if position_ids [1, S] restart, the sign by which flash models mark packed sequences; else None."""
    if position_ids is None or position_ids.ndim != 2 or torch.compiler.is_compiling():
        return None
    if q.shape[0] != 1 or q.shape[1] == 1 or q.shape[1] != k.shape[1] or position_ids.shape != q.shape[:2]:
        return None
    starts = position_ids == position_ids.min()
    if int(starts.sum()) <= 1:
        return None
    return starts.cumsum(-1)[:, None, None, :]


def _rolled_positions(cu_seq_lens, position_ids):
    """[B] int32 position of each sequence's first key, out of a paged cache that keeps only the last window of keys."""
    cu_q, cu_k = cu_seq_lens
    n_k = cu_k.diff()
    last = position_ids.reshape(-1)[(cu_q[1:] - 1).clamp(min=0).long()]
    return (last + 1 - n_k).clamp(min=0).to(torch.int32)


# ---------------------------------------------------------------------------------------------------------------------
# from a mask to a plan


def _plan(attention_mask, batch, q_length, k_length, causal, windowed):
    plans = None if torch.compiler.is_compiling() else _plans.get(attention_mask)
    key = q_length, k_length, causal, windowed
    if plans is None or key not in plans:
        plan = masks.plan_keys(_key_mask(attention_mask, q_length, causal, windowed).expand(batch, -1), *key)
        if plans is None:
            return plan
        plans[key] = plan
    return plans[key]


def _key_mask(mask, q_length, causal, windowed):
    """Any mask -> [B, n], bool or int64 segments; if causal or windowed, its last columns are the query rows' slots."""
    if mask.ndim not in (2, 4):
        raise NotImplementedError(f"{NAME}: attention_mask must have 2 or 4 dimensions, got shape {tuple(mask.shape)}")
    if mask.is_floating_point():
        # The most negative number of whatever dtype the mask was made in drops a key.
        mask = masks.as_bool(mask, torch.finfo(torch.float16).min)
    mask = masks.without_heads(mask[:, None, None, :] if mask.ndim == 2 else mask)
    if mask.shape[1] > 1:
        return _reduce_full_mask(mask.bool(), q_length, causal, windowed)
    mask = mask[:, 0]
    return mask if mask.dtype == torch.bool else mask.long()


def _reduce_full_mask(mask, q_length, causal, windowed):
    """[B, Sq, n] bool -> [B, n], if it is causal or full attention with padding; else NotImplementedError."""
    found = None
    # Keys before every row's window are invisible in the mask, yet they count for the positions of the others.
    if mask.shape[1] == q_length and not windowed:
        found = masks.causal_pattern(mask) if causal else masks.full_pattern(mask)
    if found is None:
        raise NotImplementedError(masks.NOT_EXPRESSIBLE.format("causal" if causal else "full"))
    return found[0] if causal else found
