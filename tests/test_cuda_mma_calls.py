"""The mma family on a GPU as torch meets it: streams, graphs, torch.compile, memory."""

import math

import pytest
import torch
from cuda_schedules import SCHEDULES
from cuda_tools import (
    assert_same,
    attention,
    busy,
    differing,
    every_16_bit_dtype,
    int32,
    moved,
    needs_gpu,
    packed,
    tensors,
)

import flash_attn_det as fad
from flash_attn_det import _schedule, ops
from flash_attn_det.attention import _arguments

pytestmark = needs_gpu

FEW = {name: SCHEDULES[name] for name in ("generic 16 spilled", "generic 64 folded", "hopper auto folded")}
few_schedules = pytest.mark.parametrize("schedule", FEW.values(), ids=FEW)


@few_schedules
def test_kernels_run_on_the_current_stream(schedule):
    """q is there only behind a delay on a stream of ours. The control uses another stream, and overtakes it."""
    q, k, v = moved(tensors(dtype=torch.bfloat16))
    want = attention(q, k, v)
    late_q = torch.full_like(q, math.nan)
    with _schedule.forced(**schedule):
        attention(q, k, v)  # the first launch of a kernel may load it, which waits for the device
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            busy()
            late_q.copy_(q)
            ours = attention(late_q, k, v)
        with torch.cuda.stream(torch.cuda.Stream()):
            control = attention(late_q, k, v)
    torch.cuda.synchronize()
    assert_same(ours, want)
    assert control[0].isnan().all()


@few_schedules
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_call_waits_for_nothing(schedule):
    q, k, v = moved(tensors(dtype=torch.float16))
    used = int32(300, 20).cuda()
    finished = torch.cuda.Event()
    with _schedule.forced(**schedule):
        attention(q, k, v, seqused_k=used)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            busy()
            attention(q, k, v, seqused_k=used)
            finished.record()
            assert not finished.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@every_16_bit_dtype
@pytest.mark.parametrize("Sq", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("schedule", [{}, *FEW.values()], ids=["auto", *FEW])
def test_graph_replays_with_growing_lengths(dtype, Sq, schedule):
    """A graph that lengthens its own sequences by one key, as generation does."""
    q, k, v = moved(tensors(B=3, Sq=Sq, Sk=700, Hq=8, dtype=dtype))
    used = int32(0, 0, 0).cuda()

    def call():
        used.add_(1)
        with _schedule.forced(**schedule):
            return attention(q, k, v, causal=True, seqused_k=used)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    previous = None
    for first in (int32(0, 62, 697), int32(511, 127, 300)):
        used.copy_(first)
        for step in range(1, 4):
            out.fill_(math.nan)
            lse.fill_(math.nan)
            graph.replay()
            expected = attention(q, k, v, causal=True, seqused_k=(first + step).cuda())
            assert_same((out, lse), expected, f"lengths {(first + step).tolist()}")
            assert previous is None or differing((out, lse), previous) > 0
            previous = out.clone(), lse.clone()


def test_graph_of_clusters_that_fold_replays_with_growing_lengths():
    """Chosen, not forced: the driver may be asked how many clusters the device holds while a graph is captured. The
    second split is empty at first."""
    q, k, v = moved(tensors(B=1, Sq=1, Sk=2048, Hq=8, Hk=2, D=128, dtype=torch.float16))
    used = int32(0).cuda()

    def call(**keywords):
        return attention(q, k, v, split_size=1024, **keywords)

    with _schedule.forced(kernel="cluster"):
        call(seqused_k=used)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        used.add_(1)
        out, lse = call(seqused_k=used)
    previous = None
    for length in (1, 2, 1024, 1025, 2048):
        used.fill_(length - 1)
        graph.replay()
        with _schedule.forced(kernel="generic"):
            expected = call(seqused_k=used)
        assert_same((out, lse), expected, f"{length} keys")
        assert previous is None or differing((out, lse), previous) > 0
        previous = out.clone(), lse.clone()


def test_graph_of_packed_sequences_replays_with_other_lengths():
    q, k, v = (x[0] for x in moved(tensors(B=1, Sq=80, Sk=700, dtype=torch.bfloat16)))
    starts = moved([int32(0, 80, 80), int32(0, 700, 700)])
    packed(q, k, v, *starts, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = packed(q, k, v, *starts, causal=True)
    for lengths in ((int32(0, 1, 70), int32(0, 10, 690)), (int32(0, 0, 80), int32(0, 0, 700))):
        for start, length in zip(starts, lengths):
            start.copy_(length)
        graph.replay()
        assert_same((out, lse), packed(q, k, v, *moved(lengths), causal=True))


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@every_16_bit_dtype
def test_compile_gives_the_same_bits(dtype):
    qkv = moved(tensors(Sq=9, Hq=8, dtype=dtype))
    keywords = moved(dict(causal=True, window=(70, 5), softcap=9.0, sinks=torch.ones(8), seqused_k=int32(300, 17)))
    compiled = torch.compile(lambda *qkv: attention(*qkv, **keywords), fullgraph=True)
    assert_same(compiled(*qkv), attention(*qkv, **keywords))


@every_16_bit_dtype
@pytest.mark.parametrize("op", [ops.fwd, ops.fwd_partials], ids=["fwd", "fwd_partials"])
def test_opcheck(op, dtype):
    options = dict(causal=True, scale=None, window=(40, 3), softcap=5.0, split_size=128, arithmetic="mma")
    arrays = dict(alibi_slopes=torch.linspace(0.1, 0.4, 4), sinks=torch.ones(4), seqused_k=int32(0, 100))
    torch.library.opcheck(op, _arguments(*moved(tensors(dtype=dtype)), **options, **moved(arrays)))


def test_memory_is_torchs_and_goes_back():
    q, k, v = moved(tensors(Sq=1, Sk=4096, D=128, dtype=torch.bfloat16))
    attention(q, k, v)
    before = torch.cuda.memory_allocated()
    for schedule in SCHEDULES.values():
        with _schedule.forced(**schedule):
            result = attention(q, k, v)
        del result
        assert torch.cuda.memory_allocated() == before


def test_float32_has_no_matrix_step():
    qkv = moved(tensors())
    message = "^arithmetic 'mma' is for float16 and bfloat16"
    for function in (fad.attn, fad.attn_partials):
        with pytest.raises(NotImplementedError, match=message):
            function(*qkv, arithmetic="mma")
    assert_same(attention(*qkv), attention(*qkv, arithmetic="fma"))
