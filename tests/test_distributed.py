"""Keys that several ranks hold: the bits of one device, for any number of ranks and any shards.

Most tests compute the shards of all ranks in one process, which is all that a rank's part of the work depends on; the
others run processes of their own, which exchange states through gloo, and through NCCL where there are GPUs.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from cases import normal

import flash_attn_det as fad
from flash_attn_det import distributed
from flash_attn_det.testing import assert_bits_equal, bits_differ

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SPLIT, B, Sk, Hq, Hk, D, Dv = 128, 2, 700, 4, 2, 16, 24
FAMILIES = {
    "fp32": (torch.float32, "auto"),
    "bf16": (torch.bfloat16, "auto"),
    "fp64": (torch.float64, "auto"),
    "fp16 mma_sm90": (torch.float16, "mma_sm90"),
}
ON_GPU = {"fp32": (torch.float32, "auto"), "bf16": (torch.bfloat16, "auto"), "fp16": (torch.float16, "auto")}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (200, 60)},
    "narrow": {"window": (3, 2)},
    "left": {"window": (150, -1)},
    "right": {"window": (-1, 20)},
    "causal window": {"causal": True, "window": (130, -1)},
    "one key": {"causal": True, "window": (0, 0)},
    "softcap": {"softcap": 3.0, "scale": -0.7},
    "sinks": {"sinks": torch.tensor([-3.0, 0.0, 4.0, 90.0]), "causal": True},
}
SHARDS = {
    "1": [Sk],
    "2": [512, 188],
    "3": [128, 384, 188],
    "4": [128, 256, 256, 60],
    "6": [128, 128, 128, 128, 128, 60],
    "empty ones": [0, 384, 0, 316, 0],
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_shards = pytest.mark.parametrize("sizes", SHARDS.values(), ids=SHARDS)


def tensors(Sq, dtype=torch.float32, Sk=Sk, device="cpu"):
    shapes = ((B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv))
    return [normal(shape, 7 + i, dtype).to(device) for i, shape in enumerate(shapes)]


def moved(options, device):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def shards(sizes, k, v):
    """(first_key, k, v) of each rank."""
    for rank, size in enumerate(sizes):
        first = sum(sizes[:rank])
        yield (first if size else 0), k[:, first : first + size], v[:, first : first + size]


def joined(states):
    return fad.Partials(*(torch.cat(parts) for parts in zip(*(state[:3] for state in states))), states[0].dtype)


def states_of_all_ranks(q, k, v, sizes, *, sinks=None, q_end=None, **options):
    """Of every rank, and of the sinks, one after the other."""
    q_end = k.shape[1] if q_end is None else q_end
    options = {"split_size": SPLIT, **options}
    states = [
        distributed.attn_partials_of_shard(q, k_r, v_r, first_key=first, q_end=q_end, **options)
        for first, k_r, v_r in shards(sizes, k, v)
    ]
    if sinks is not None:
        family = {"arithmetic": options.get("arithmetic", "auto"), "split_size": SPLIT}
        states.append(fad.attn_partials(q, k[:, :0], v[:, :0], sinks=sinks, **family))
    return joined(states)


def assert_same(actual, expected):
    for got, want, name in zip(actual, expected, ("out", "lse")):
        assert_bits_equal(got, want, name)


# ---- shards ----------------------------------------------------------------------------------------------------------


@every_option
@pytest.mark.parametrize(
    ("Sq", "family"),
    [(Sq, family) for family in FAMILIES for Sq in ((1, 9) if "mma" in family else (1, 9, 200, 720))],
)
def test_n8_states_of_shards_are_the_states_of_the_whole(Sq, family, options):
    dtype, arithmetic = FAMILIES[family]
    q, k, v = tensors(Sq, dtype)
    options = {**options, "arithmetic": arithmetic}
    whole = fad.attn_partials(q, k, v, split_size=SPLIT, **options)
    want = fad.attn(q, k, v, split_size=SPLIT, return_lse=True, **options)
    for sizes in SHARDS.values():
        states = states_of_all_ranks(q, k, v, sizes, **options)
        for name, got, expected in zip("oml", states, whole):
            assert_bits_equal(got, expected, f"{name} of shards {sizes}")
        assert_same(fad.merge_partials(states, return_lse=True), want)


@every_option
@pytest.mark.parametrize(("first", "end"), [(0, 1), (0, 130), (100, 101), (255, 400), (511, 513), (640, 700)])
def test_n1_rows_anywhere_in_the_sequence(first, end, options):
    """As in a prefill whose rows are spread over the ranks, too."""
    q, k, v = tensors(Sk)
    out, lse = fad.attn(q, k, v, split_size=SPLIT, return_lse=True, **options)
    states = states_of_all_ranks(q[:, first:end], k, v, SHARDS["3"], q_end=end, **options)
    assert_same(fad.merge_partials(states, return_lse=True), (out[:, first:end], lse[:, :, first:end]))


@every_shards
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (-1, 0)}], ids=["plain", "causal", "window"])
def test_n1_lengths_of_their_own(options, sizes):
    q, k, v = tensors(1)
    for lengths in ([700, 1], [0, 130], [384, 385]):
        used = torch.tensor(lengths, dtype=torch.int32)
        want = fad.attn(q, k, v, seqused_k=used, split_size=SPLIT, return_lse=True, **options)
        states = states_of_all_ranks(q, k, v, sizes, seqused_k=used, **options)
        assert_same(fad.merge_partials(states, return_lse=True), want)
    assert bits_differ(want[0], fad.attn(q, k, v, split_size=SPLIT)) > 0


def test_n8_order_of_ranks_and_where_shards_are_cut_would_reach_the_bits():
    """The negative control: the same states in another order, and other splits, are other bits."""
    q, k, v = tensors(300)
    want = fad.attn(q, k, v, split_size=SPLIT)
    states = states_of_all_ranks(q, k, v, SHARDS["2"])
    first, second = (fad.Partials(*(x[part] for x in states[:3]), q.dtype) for part in (slice(4), slice(4, 6)))
    assert bits_differ(fad.merge_partials(joined([second, first])), want) > 0
    cut = [fad.attn_partials(q, k[:, s], v[:, s], split_size=SPLIT) for s in (slice(350), slice(350, 700))]
    assert bits_differ(fad.merge_partials(joined(cut)), want) > 0


def test_keys_that_no_row_sees_are_not_read():
    q, k, v = tensors(9)
    want = fad.attn(q, k, v, split_size=SPLIT, window=(100, 0), return_lse=True)
    for x in (k, v):
        x[:, :500] = math.nan
    states = states_of_all_ranks(q, k, v, SHARDS["4"], window=(100, 0))
    assert_same(fad.merge_partials(states, return_lse=True), want)


@pytest.mark.parametrize(
    ("n_keys", "ranks"), [(0, 3), (1, 1), (1, 4), (128, 2), (700, 1), (700, 3), (700, 9), (5000, 7)]
)
def test_sizes_are_whole_splits_and_even(n_keys, ranks):
    sizes = distributed.shard_sizes(n_keys, ranks, split_size=SPLIT)
    assert (len(sizes), sum(sizes)) == (ranks, n_keys)
    last = max((r for r, size in enumerate(sizes) if size), default=0)
    assert all(size % SPLIT == 0 for size in sizes[:last])
    splits = [-(-size // SPLIT) for size in sizes]
    assert max(splits) - min(splits) <= 1


# ---- process groups --------------------------------------------------------------------------------------------------


CALLS = {
    "decode": (1, {}),
    "causal": (150, {"causal": True}),
    "window": (150, {"window": (200, 60)}),
    "causal window, softcap": (40, {"causal": True, "window": (130, -1), "softcap": 3.0}),
    "sinks": (9, OPTIONS["sinks"]),
    "lengths": (1, {"seqused_k": torch.tensor([650, 100], dtype=torch.int32), "causal": True}),
    "no rows": (0, {}),
}


def check_calls(device, families, group, ranks):
    """Every call on every family: what this rank gets is what attn gives for all keys."""
    rank = dist.get_rank(group)
    for dtype, arithmetic in families.values():
        for rows, options in CALLS.values():
            q, k, v = tensors(rows, dtype, device=device)
            options = {**moved(options, device), "split_size": SPLIT, "arithmetic": arithmetic, "return_lse": True}
            sizes = distributed.shard_sizes(Sk, ranks, split_size=SPLIT)
            _, k_r, v_r = list(shards(sizes, k, v))[rank]
            assert_same(
                distributed.attn_sharded(q, k_r, v_r, sizes=sizes, group=group, **options), fad.attn(q, k, v, **options)
            )


def run_rank(rank, ranks, store, backend):
    """One process. Groups of 1 .. ranks processes, one after the other."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        for size in range(1, ranks + 1):
            group = dist.new_group(range(size))
            if rank < size:
                check_calls(device, ON_GPU if backend == "nccl" else FAMILIES, group, size)
            dist.barrier()
    finally:
        dist.destroy_process_group()


def test_n8_every_number_of_processes_gives_the_bits_of_one(tmp_path):
    torch.multiprocessing.spawn(run_rank, (4, tmp_path / "store", "gloo"), nprocs=4)


@needs_gpu
def test_n8_every_number_of_gpus_gives_the_bits_of_one(tmp_path):
    count = torch.cuda.device_count()
    torch.multiprocessing.spawn(run_rank, (count, tmp_path / "store", "nccl"), nprocs=count)


@pytest.fixture
def alone():
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_n1_rows_may_be_taken_some_at_a_time(alone, monkeypatch):
    q, k, v = tensors(150)
    calls = []
    gathered = distributed._gathered
    monkeypatch.setattr(distributed, "_gathered", lambda *arguments: calls.append(1) or gathered(*arguments))
    for states, expected_calls in ((1 << 28, 1), (1, 150), (4 * 6 * B * Hq * (Dv + 2) * 40, 4)):
        monkeypatch.setattr(distributed, "_STATE_BYTES", states)
        calls.clear()
        for options in ({"causal": True}, {"window": (70, 30), "sinks": OPTIONS["sinks"]["sinks"]}):
            got = distributed.attn_sharded(q, k, v, sizes=[Sk], split_size=SPLIT, return_lse=True, **options)
            assert_same(got, fad.attn(q, k, v, split_size=SPLIT, return_lse=True, **options))
        assert len(calls) == 2 * expected_calls


def test_no_keys_anywhere(alone):
    q, k, v = tensors(3, Sk=0)
    out, lse = distributed.attn_sharded(q, k, v, sizes=[0], return_lse=True)
    assert_same((out, lse), fad.attn(q, k, v, return_lse=True))
    assert (lse == -math.inf).all()


def test_the_default_split_size_is_that_of_the_family(alone):
    q, k, v = tensors(3, Sk=2500, dtype=torch.bfloat16)
    for arithmetic in ("fma", "mma_sm90"):
        got = distributed.attn_sharded(q, k, v, sizes=[2500], arithmetic=arithmetic)
        assert_bits_equal(got, fad.attn(q, k, v, arithmetic=arithmetic))
    with fad.split_size(256):
        got = distributed.attn_sharded(q, k, v, sizes=[2500])
        assert_bits_equal(got, fad.attn(q, k, v))


BAD_SIZES = [
    ("sizes has 2 entries, expected one for each of 1 ranks", [Sk, 0]),
    ("k has 700 keys on rank 0, sizes says 699", [Sk - 1]),
    ("sizes[0] is -1, expected a multiple of the split size, 128", [-1]),
]


@pytest.mark.parametrize(("message", "sizes"), BAD_SIZES, ids=[case[0][:30] for case in BAD_SIZES])
def test_sizes_that_do_not_fit_are_refused(alone, message, sizes):
    q, k, v = tensors(3)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        distributed.attn_sharded(q, k, v, sizes=sizes, split_size=SPLIT)


def test_only_the_last_shard_may_end_inside_a_split():
    with pytest.raises(ValueError, match=r"^sizes\[1\] is 100, expected a multiple of the split size, 128, of all but"):
        distributed._check_sizes([128, 100, 128, 0], 128, SPLIT, ranks=4, rank=0)
    distributed._check_sizes([128, 256, 100, 0], 128, SPLIT, ranks=4, rank=0)


USED = torch.tensor([5, 5], dtype=torch.int32)
BAD = [
    (ValueError, "first_key is 64, expected a multiple of the split size, 128", {"first_key": 64}),
    (ValueError, "first_key is -128, expected a multiple", {"first_key": -128}),
    (ValueError, "window is (-2, 0), expected -1 or more on both sides", {"window": (-2, 0)}),
    (NotImplementedError, "seqused_k is given with 3 query rows and window (-1, -1)", {"seqused_k": USED}),
    (TypeError, "seqused_k has dtype torch.int64, expected int32", {"seqused_k": USED.long(), "rows": 1}),
    (ValueError, "softcap is -1", {"softcap": -1.0}),
    (ValueError, "arithmetic is 'tf32', expected one of", {"arithmetic": "tf32"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), BAD, ids=[case[1][:40] for case in BAD])
def test_wrong_arguments_of_a_shard_are_refused(error, message, changed):
    q, k, v = tensors(changed.pop("rows", 3))
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        distributed.attn_partials_of_shard(q, k, v, **{"first_key": 0, "q_end": Sk, "split_size": SPLIT, **changed})


def test_shard_sizes_refuses():
    with pytest.raises(ValueError, match="n_keys is -1 and ranks is 2"):
        distributed.shard_sizes(-1, 2, split_size=SPLIT)


def test_there_are_no_gradients():
    q, k, v = tensors(3)
    with pytest.raises(NotImplementedError, match="no backward"):
        distributed.attn_partials_of_shard(q.requires_grad_(), k, v, first_key=0, q_end=Sk)


@needs_gpu
@every_option
@pytest.mark.parametrize("family", ON_GPU)
@pytest.mark.parametrize("Sq", [1, 9, 300])
def test_n8_shards_on_one_gpu(Sq, family, options):
    dtype, _ = ON_GPU[family]
    q, k, v = tensors(Sq, dtype, device="cuda")
    options = moved(options, "cuda")
    want = fad.attn(q, k, v, split_size=SPLIT, return_lse=True, **options)
    for sizes in SHARDS.values():
        states = states_of_all_ranks(q, k, v, sizes, **options)
        assert_same(fad.merge_partials(states, return_lse=True), want)
    if not options:  # other splits are other bits, before out is rounded to 16 of them
        others = [fad.attn_partials(q, k, v, split_size=2 * SPLIT), states]
        assert bits_differ(*(fad.merge_partials(x._replace(dtype=torch.float32)) for x in others)) > 0
