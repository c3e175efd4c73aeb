"""Masks that say which keys there are, turned into what the contract wants to know: starts, lengths, or rows to gather.

A *key mask* [B, n] says which slots of a key buffer hold a key. bool: one sequence per batch row; int64: 0 is no key,
equal positive values are one packed sequence. A sequence's keys are numbered from its first, whatever stands before it,
so padding cannot reach the bits. Where its keys lie side by side nothing is copied: ``Plan.lengths`` go to ``attn``.
Otherwise the rows in use are gathered for ``attn_varlen``.
"""

import dataclasses

import torch

from .attention import attn, attn_varlen

NOT_EXPRESSIBLE = (
    "flash_attn_det: this mask is not {} attention with padding. Pass the padding mask of the keys alone, or packed "
    "sequences (attn_varlen; transformers: position_ids, or cu_seq_lens_q and cu_seq_lens_k). Other patterns need "
    'torch\'s scaled_dot_product_attention (transformers: attn_implementation="sdpa").'
)


# ---------------------------------------------------------------------------------------------------------------------
# from any mask to a key mask


def as_bool(mask, lowest):
    """A bool or additive mask -> bool. Additive: 0 keeps a key, numbers up to `lowest` drop it, others are refused."""
    if not mask.is_floating_point():
        return mask.bool()
    keep, drop = mask == 0, mask <= lowest
    if not bool((keep | drop).all()):
        raise NotImplementedError(
            f"flash_attn_det: an additive mask may hold only 0 and {lowest:g} or lower, no other biases"
        )
    return keep


def without_heads(mask):
    """[B, H, Sq, n] -> [B, Sq, n], if the mask is the same for all heads; else NotImplementedError."""
    if mask.shape[1] > 1 and not bool((mask == mask[:, :1]).all()):
        raise NotImplementedError("flash_attn_det: the mask must be the same for all heads")
    return mask[:, 0]


def full_pattern(mask):
    """[B, Sq, n] bool -> the key mask [B, n] if all rows see the same keys, else None.

    A row that sees nothing matches anything, here and in causal_pattern.
    """
    keys = mask.any(1)
    return keys if torch.equal(mask, keys[:, None, :] & mask.any(2, keepdim=True)) else None


def causal_pattern(mask):
    """[B, Sq, n] bool -> (key mask, slot of the first row) if row i sees the keys up to slot first + i, else None.

    The key mask ends with the last row's slot, if there are that many.
    """
    q_length = mask.shape[1]
    rows_seen = mask.any(2)
    keys = mask.any(1)
    slot = torch.arange(mask.shape[2], device=mask.device)
    row = torch.arange(q_length, device=mask.device)
    last = torch.where(mask, slot, -1).amax(2)
    # No row sees past its own slot, and some row sees its own.
    first = int(torch.where(rows_seen, last - row, -q_length).max())
    expected = keys[:, None, :] & (slot <= first + row[:, None])
    if not torch.equal(mask, expected & rows_seen[:, :, None]):
        return None
    return keys[:, : max(first + q_length, 0)], first


# ---------------------------------------------------------------------------------------------------------------------
# from a key mask to a call


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a key mask is expressed: either keyword arguments of attn, or rows to gather for attn_varlen."""

    n_slots: int = 0  # slots of the key buffer that may hold keys
    lengths: dict = dataclasses.field(default_factory=dict)  # leftpad_k, seqused_q, seqused_k, k_pos: [B] int32
    q_rows: torch.Tensor | None = None  # [Tq] rows of the flattened query
    k_rows: torch.Tensor | None = None  # [Tk] rows of the flattened key buffer
    cu_seqlens_q: torch.Tensor | None = None  # [sequences + 1] int32
    cu_seqlens_k: torch.Tensor | None = None


def attend(q, k, v, plan, options):
    """attn of q [B, Sq, Hq, D] and a key buffer [B, Sk, Hk, D], [B, Sk, Hk, Dv] as planned: out [B, Sq, Hq, Dv]."""
    if plan.q_rows is None:
        return attn(q, k[:, : plan.n_slots], v[:, : plan.n_slots], **plan.lengths, **options)
    # Copy the rows in use into packed form and the results back; rows not in use give 0.
    flat_q, flat_k, flat_v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    rows = attn_varlen(
        flat_q[plan.q_rows], flat_k[plan.k_rows], flat_v[plan.k_rows], plan.cu_seqlens_q, plan.cu_seqlens_k, **options
    )
    out = rows.new_zeros(flat_q.shape[0], *rows.shape[1:])
    out[plan.q_rows] = rows
    return out.view(*q.shape[:2], *out.shape[1:])


def plan_keys(mask, q_length, k_length, causal, windowed):
    """Plan for a key mask [B, n]; if causal or windowed, its last columns are the query rows' slots.

    n may exceed k_length (a rolling cache dropped the first n - k_length slots) or fall short of it (a static cache has
    unused slots).
    """
    plan = _plan_segments if mask.dtype == torch.int64 else _plan_padding
    return plan(mask, q_length, k_length, causal, windowed)


def extents(mask):
    """[B, n] bool -> first column of each row that is True, how many are, and whether they lie side by side in all."""
    slot, n = torch.arange(mask.shape[1], device=mask.device), mask.shape[1]
    count = mask.sum(-1)
    start = torch.where(mask, slot, n).amin(-1)
    start = torch.where(count > 0, start, 0)
    end = torch.where(mask, slot + 1, 0).amax(-1)
    return start, count, (end - start == count).all()


def _plan_padding(mask, q_length, k_length, causal, windowed):
    """Plan for mask [B, n] bool: sequence b's keys are its True columns."""
    dropped = max(mask.shape[1] - k_length, 0)
    # One query row with nothing after it sees every key, wherever its own slot is (a static cache has more slots);
    # full attention does not ask for the rows' slots at all, and cross-attention has none.
    aligned = (causal or windowed) and q_length > 1
    held = mask[:, dropped:]
    start, count, contiguous = extents(held)
    if torch.compiler.is_compiling():
        torch._assert_async(contiguous, "flash_attn_det: under torch.compile the padding must be on one side")
    elif not bool(contiguous):
        return plan_holes(mask, q_length, k_length, aligned)

    lengths = {"leftpad_k": start.int(), "seqused_k": count.int()}
    if aligned:
        # Row i's slot is n - q_length + i. Rows past the last key are padding; those before the first see nothing.
        lengths["seqused_q"] = (start + count - (held.shape[1] - q_length)).clamp(0, q_length).int()
    if dropped:
        lengths["k_pos"] = mask[:, :dropped].sum(-1).int()
    return Plan(n_slots=held.shape[1], lengths=lengths)


def plan_holes(mask, q_length, k_length, aligned):
    """Plan for mask [B, n] bool with padding between the keys: the keys close ranks."""
    batch, n = mask.shape
    if n > k_length:
        raise NotImplementedError(
            "flash_attn_det: the mask has padding between keys, and a sliding-window cache has dropped keys by "
            "counting that padding; pad on the left"
        )
    rows = mask[:, n - q_length :] if aligned else mask.new_ones(batch, q_length)
    return Plan(
        q_rows=_rows(rows, q_length),
        k_rows=_rows(mask, k_length),
        cu_seqlens_q=_cumulative(rows.sum(-1)),
        cu_seqlens_k=_cumulative(mask.sum(-1)),
    )


def _plan_segments(mask, q_length, k_length, causal, windowed):
    """Plan for mask [B, n] int64: every run of one positive number in a batch row is a sequence of its own."""
    values = mask.unique_consecutive()
    if values.numel() == 0 or int(values.max()) <= 1:
        return _plan_padding(mask == 1, q_length, k_length, causal, windowed)
    if not (mask.shape[1] == q_length == k_length):
        raise NotImplementedError(
            f"flash_attn_det: packed sequences need as many query rows as keys, got {q_length} rows, {k_length} keys "
            f"and a mask of {mask.shape[1]}; with a cache, transformers takes cu_seq_lens_q and cu_seq_lens_k"
        )
    used = mask > 0
    # Segment numbers repeat in other batch rows: make them unique before counting runs.
    row = torch.arange(mask.shape[0], device=mask.device)[:, None] * (mask.max() + 1)
    _, counts = (mask + row)[used].unique_consecutive(return_counts=True)
    rows, cu_seqlens = _rows(used, k_length), _cumulative(counts)
    return Plan(q_rows=rows, k_rows=rows, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)


def _rows(used, stride):
    """[B, n] bool -> [T] indices of its True entries in a flattened [B, stride] buffer."""
    b, slot = used.nonzero(as_tuple=True)
    return b * stride + slot


def _cumulative(counts):
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
