"""Context parallelism: attention over keys that are spread over several devices, with the bits of one device.

A split's state depends on its own keys alone (N3), and states are folded in ascending order of position (N8),
whoever computed them. So a rank computes the states of the splits that it holds, all ranks exchange states, and each
folds all of them: the same additions in the same order, however many ranks there are. Letters as in attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .attention import _check_tensor, _family, _lengths, _window, attn_partials
from .determinism import resolve_split_size
from .merge import _FORMATS, Partials, merge_partials
from .ops import compute_dtype

_STATE_BYTES = 1 << 28  # of all states of the query rows that are exchanged at a time


def shard_sizes(n_keys: int, ranks: int, *, split_size: int) -> list[int]:
    """How many of n_keys keys each rank holds: consecutive ranges, whole splits but for the last, as even as can be."""
    if n_keys < 0 or ranks < 1:
        raise ValueError(f"n_keys is {n_keys} and ranks is {ranks}, expected at least 0 and 1")
    splits = -(-n_keys // split_size)
    ends = [min(n_keys, splits * r // ranks * split_size) for r in range(ranks + 1)]
    return [end - first for first, end in zip(ends, ends[1:])]


def _visible(
    rows: int, q_end: int, first: int, end: int, window: tuple[int, int]
) -> tuple[slice, int, tuple[int, int]]:
    """What of a shard with keys first .. end - 1 is seen by rows at positions up to q_end - 1.

    Returns the rows that see any of it, how many of its keys, from the first, are seen by any of them, and the window
    that says the same to a call of these rows and keys alone, whose last row is at the position of the last key.
    """
    left, right = window
    start = q_end - rows
    lo = 0 if right < 0 else max(0, first - right - start)
    hi = rows if left < 0 else min(rows, end + left - start)
    if hi <= lo or first == end:
        return slice(0, 0), 0, (-1, -1)
    last = start + hi - 1
    stop = end if right < 0 else min(end, last + right + 1)
    ahead = last - (stop - 1)  # of the last row before the last key; -right .. left
    return slice(lo, hi), stop - first, (left if left < 0 else left - ahead, right if right < 0 else right + ahead)


def _placed(partials: Partials, count: int, rows: int, first_row: int) -> Partials:
    """The first states and some rows of count states of all rows; the others are of no key (N10)."""
    if partials.o.shape[0] == count and partials.o.shape[2] == rows:
        return partials
    C, B, n, Hq, Dv = partials.o.shape
    o = partials.o.new_zeros(count, B, rows, Hq, Dv)
    m = partials.m.new_full((count, B, Hq, rows), _FORMATS[partials.m.dtype].empty_m)
    l = partials.l.new_zeros(count, B, Hq, rows)
    here = slice(first_row, first_row + n)
    o[:C, :, here], m[:C, :, :, here], l[:C, :, :, here] = partials[:3]
    return Partials(o, m, l, partials.dtype)


def attn_partials_of_shard(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    first_key: int,
    q_end: int,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    seqused_k: Tensor | None = None,
    split_size: int | None = None,
    arithmetic: str = "auto",
) -> Partials:
    """The states of those splits of a sequence that one rank holds, for query rows anywhere in the sequence.

    Concatenated along their first dimension in ascending order of first_key, with the state of the sinks at the end if
    there are any, the states of all ranks are those of attn_partials, bit for bit. No communication.

    q [B, Sq, Hq, D]: row i is at position q_end - Sq + i.
    k [B, Sk, Hk, D], v [B, Sk, Hk, Dv]: the keys at positions first_key .. first_key + Sk - 1. Unless they are the last
        of the sequence, Sk is a multiple of the split size.
    first_key: a multiple of the split size.
    q_end: the number of keys of the whole sequence puts the rows where attn puts them, at its end.
    seqused_k [B] int32: keys of each whole sequence, at whose end its query row is then; for Sq = 1 without a window.
    The other arguments as in attn, without sinks, which no rank owns, and ALiBi.

    Returns Partials of ceil(Sk / split_size) states. Raises as attn_partials does; ValueError for a first_key that is
    no multiple of the split size, NotImplementedError for seqused_k with several rows or a window.
    """
    _check_tensor("q", q)
    _check_tensor("k", k)
    split_size = resolve_split_size(split_size, _family(q, arithmetic))
    if first_key < 0 or first_key % split_size != 0:
        raise ValueError(f"first_key is {first_key}, expected a multiple of the split size, {split_size}")
    left, right = _window(window)
    if min(left, right) < -1:
        raise ValueError(f"window is ({left}, {right}), expected -1 or more on both sides")
    right = 0 if causal else right
    rows, keys = q.shape[1], k.shape[1]
    used = None
    if seqused_k is not None:
        if rows != 1 or (left, right) not in ((-1, -1), (-1, 0)):
            raise NotImplementedError(
                f"seqused_k is given with {rows} query rows and window ({left}, {right}), expected one row and no "
                "window: call once for each sequence"
            )
        right = -1  # the row is at the end of its keys
        used = (_lengths("seqused_k", seqused_k, q, seqused_k, q.shape[0]) - first_key).clamp(0, keys)
    seen, n, window = _visible(rows, q_end, first_key, first_key + keys, (left, right))
    partials = attn_partials(
        q[:, seen], k[:, :n], v[:, :n], scale=scale, window=window, softcap=softcap, seqused_k=used,
        split_size=split_size, arithmetic=arithmetic,
    )  # fmt: skip
    return _placed(partials, -(-keys // split_size), rows, seen.start)


def _check_sizes(sizes: Sequence[int], keys: int, split_size: int, ranks: int, rank: int) -> None:
    if len(sizes) != ranks:
        raise ValueError(f"sizes has {len(sizes)} entries, expected one for each of {ranks} ranks")
    last = max((r for r, size in enumerate(sizes) if size > 0), default=0)
    for r, size in enumerate(sizes):
        if size < 0 or (r < last and size % split_size != 0):
            raise ValueError(
                f"sizes[{r}] is {size}, expected a multiple of the split size, {split_size}, of all but the last rank"
            )
    if keys != sizes[rank]:
        raise ValueError(f"k has {keys} keys on rank {rank}, sizes says {sizes[rank]}")


def _gathered(mine: Partials, counts: list[int], group: dist.ProcessGroup | None) -> Partials:
    """The states of all ranks, counts[r] of rank r, in ascending order."""
    largest, (_, B, rows, Hq, Dv) = max(counts), mine.o.shape
    per_row = [x.transpose(2, 3).unsqueeze(-1) for x in (mine.m, mine.l)]
    sent = mine.o.new_zeros(largest, B, rows, Hq, Dv + 2)
    sent[: len(mine.o)] = torch.cat([mine.o, *per_row], -1)
    received = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(received, sent, group=group)
    states = torch.cat([x[:count] for x, count in zip(received, counts)])
    m, l = (states[..., Dv + i].transpose(2, 3) for i in range(2))
    return Partials(states[..., :Dv], m, l, mine.dtype)


def attn_sharded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sizes: Sequence[int],
    group: dist.ProcessGroup | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    split_size: int | None = None,
    arithmetic: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """attn over keys that the ranks of a process group hold, with the bits of attn over all of them on one device.

    Every rank calls it with the same q and options, and gets the same result.

    q [B, Sq, Hq, D]: the same on every rank. Rows are aligned to the end of all keys, as in attn.
    k [B, sizes[rank], Hk, D], v [B, sizes[rank], Hk, Dv]: rank r holds the keys behind those of the ranks before it.
    sizes: keys of each rank, in the order of ranks; multiples of the split size, but for the last that is not 0.
        shard_sizes gives such a list.
    group: of torch.distributed, of any backend that can gather tensors of q's device; None: all ranks.
    seqused_k [B] int32: keys of each sequence, over all ranks; for Sq = 1 without a window.
    The other arguments as in attn; there are no alibi_slopes.

    Each rank sends (Dv + 2) numbers of the compute dtype for each of its splits, query rows and heads. Many query rows
    are taken some at a time: those whose states, of all ranks, fit into 256 MiB.

    Returns out [B, Sq, Hq, Dv] in q's dtype; with return_lse also lse [B, Hq, Sq] in the compute dtype. Raises as
    attn_partials does (it has no gradients); ValueError for sizes that do not fit the ranks, k, or the split size.
    """
    _check_tensor("q", q)
    _check_tensor("k", k)
    split_size = resolve_split_size(split_size, _family(q, arithmetic))
    rank = dist.get_rank(group)
    _check_sizes(sizes, k.shape[1], split_size, dist.get_world_size(group), rank)
    first_key, n_keys, rows = sum(sizes[:rank]), sum(sizes), q.shape[1]
    counts = [-(-size // split_size) for size in sizes]
    options = {"scale": scale, "softcap": softcap, "split_size": split_size, "arithmetic": arithmetic}

    def states(first: int, end: int) -> Partials:
        """Of all splits, for rows first .. end - 1."""
        mine = attn_partials_of_shard(
            q[:, first:end], k, v, first_key=first_key if k.shape[1] else 0, q_end=n_keys - rows + end, causal=causal,
            window=window, seqused_k=seqused_k, **options,
        )  # fmt: skip
        every = _gathered(mine, counts, group)
        if sinks is None:
            return every
        sink = attn_partials(q[:, first:end], k[:, :0], v[:, :0], sinks=sinks, **options)
        return Partials(*(torch.cat(pair) for pair in zip(every[:3], sink[:3])), every.dtype)

    numbers = len(sizes) * max(counts) * q.shape[0] * q.shape[2] * (v.shape[-1] + 2)  # of a query row
    block = max(1, _STATE_BYTES // max(1, numbers * compute_dtype(q.dtype).itemsize))
    parts = [
        merge_partials(states(first, min(rows, first + block)), return_lse=True)
        for first in range(0, max(rows, 1), block)
    ]
    outs, lses = zip(*parts)
    out, lse = torch.cat(outs, 1), torch.cat(lses, 2)
    return (out, lse) if return_lse else out
