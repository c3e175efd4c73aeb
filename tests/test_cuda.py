"""The fma family on a GPU: the CPU's bits, and the manners of a CUDA op (streams, devices, graphs, memory).

It has one set of bits, so the CPU is the reference for every test here. The mma family is in test_cuda_mma.py, what can
be checked without a GPU in test_cuda_build.py.
"""

import functools
import math
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import cuda_tools
import pytest
import torch
from cases import CASES, GRAPH_BUCKET_BATCHES, NEIGHBOUR, integers, normal
from cuda_tools import assert_same, busy, int32, moved, needs_gpu, poisoned, tensors

import flash_attn_det as fad
from flash_attn_det import _schedule, ops
from flash_attn_det.attention import _arguments
from flash_attn_det.testing import assert_bits_equal, bits_differ

pytestmark = needs_gpu

GPU_CASES = [case for case in CASES if case.dtype != "fp64"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCHEDULES = {"auto": {}} | {
    f"{rows} rows {name}": {"tile_rows": rows, "split_parallel": split_parallel}
    for rows in (4, 16, 64)
    for name, split_parallel in (("folded", False), ("spilled", True))
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "fp16", "bf16"))
every_case = pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)


def attention(*qkv, **keywords):
    """out and lse of the fma family, whose splits of 128 keys have two blocks."""
    return cuda_tools.attention(*qkv, **{"arithmetic": "fma", "split_size": 128, **keywords})


def packed(*arguments, **keywords):
    return cuda_tools.packed(*arguments, **{"arithmetic": "fma", "split_size": 128, **keywords})


@functools.cache
def on_the_cpu(case):
    qkv, keywords = case.inputs()
    return attention(*qkv, **keywords)


def on_the_gpu(case):
    qkv, keywords = case.inputs()
    return moved(qkv), moved(keywords)


# ---- bits ------------------------------------------------------------------------------------------------------------


def test_poison_reaches_new_memory():
    with poisoned():
        assert torch.empty(1000, device="cuda").isnan().all()
        assert torch.empty_strided((9, 3), (3, 1), dtype=torch.bfloat16, device="cuda").isnan().all()
        assert (torch.empty(1000, dtype=torch.uint8, device="cuda") == 255).all()


@every_schedule
@every_case
def test_n7_bits_of_the_cpu(case, schedule):
    """Also: every element of out and lse is written, and nothing is read from the workspace before it is."""
    qkv, keywords = on_the_gpu(case)
    with _schedule.forced(**schedule), poisoned():
        actual = attention(*qkv, **keywords)
    assert_same(actual, on_the_cpu(case))


@pytest.mark.parametrize("case", [c for c in GPU_CASES if "pos" not in c.lengths.split()], ids=lambda case: case.name)
def test_n8_partials_are_those_of_the_cpu_and_merge_to_the_fused_result(case):
    qkv, keywords = case.inputs()
    keywords["arithmetic"] = "fma"
    want = fad.attn_partials(*qkv, **keywords)
    for rows in (4, 16, 64):
        with _schedule.forced(tile_rows=rows), poisoned():
            partials = fad.attn_partials(*moved(qkv), **moved(keywords))
        for name, got, expected in zip("oml", partials, want):
            assert_bits_equal(got, expected, f"{name} with {rows} rows")
        assert partials.dtype == want.dtype
    assert_same(fad.merge_partials(partials, return_lse=True), on_the_cpu(case))


def test_fp32_defaults_to_the_portable_family():
    qkv = tensors()
    assert_same(attention(*moved(qkv), arithmetic="auto"), attention(*qkv))


@every_schedule
@every_dtype
def test_n1_decode_with_many_splits(dtype, schedule):
    Hq, Hk, D, Sk = (NEIGHBOUR[name] for name in ("Hq", "Hk", "D", "Sk"))
    qkv = tensors(Sq=1, Sk=Sk, Hq=Hq, Hk=Hk, D=D, dtype=dtype)
    with _schedule.forced(**schedule):
        actual = attention(*moved(qkv), causal=True)
    assert_same(actual, attention(*qkv, causal=True))
    assert bits_differ(actual[0], attention(*qkv, causal=True, split_size=256)[0]) > 0


@every_dtype
def test_n1_prefill_row_is_the_decode_row(dtype):
    q, k, v = moved(tensors(B=1, Sq=700, Sk=700, Hq=4, Hk=1, dtype=dtype))
    out, lse = attention(q, k, v, causal=True)
    for row in (0, 1, 63, 64, 127, 128, 500, 699):
        end = row + 1
        alone = attention(q[:, row:end], k[:, :end], v[:, :end], causal=True)
        assert_same(alone, (out[:, row:end], lse[:, :, row:end]), f"row {row}")
    assert bits_differ(attention(q, k, v, causal=True, split_size=256)[0], out) > 0


def test_n1_batch_thresholds_of_graph_buckets():
    qkv = tensors(B=max(GRAPH_BUCKET_BATCHES), Sq=1, Sk=140, Hq=2, Hk=1, D=8)
    everything = attention(*qkv)
    for B in GRAPH_BUCKET_BATCHES:
        assert_same(attention(*moved([x[:B] for x in qkv])), [x[:B] for x in everything], f"batch {B}")
    for b in (0, 500, 992):
        assert_same(attention(*moved([x[b : b + 1] for x in qkv])), [x[b : b + 1] for x in everything], f"alone {b}")


PACKED = {
    "plain": {},
    "lengths": {"seqused_q": int32(1, 2, 0, 60), "seqused_k": int32(40, 0, 0, 200)},
    "everything": {
        "k_pos": int32(0, 3, 700, 64),
        "seqused_k": int32(50, 1, 0, 199),
        "alibi_slopes": normal((4, 4), 5) / 8,
        "sinks": normal((4,), 6),
        "window": (90, -1),
        "softcap": 3.0,
    },
}


@every_schedule
@every_dtype
@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_packed_sequences(dtype, options, schedule):
    """One without rows, one without keys, and rows behind the last sequence."""
    q, k, v = (x[0] for x in tensors(B=1, Sq=80, Sk=270, D=40, dtype=dtype))
    call = [q, k, v, int32(0, 3, 9, 9, 75), int32(0, 50, 51, 51, 251)]
    with _schedule.forced(**schedule), poisoned():
        actual = packed(*moved(call), causal=True, **moved(options))
    assert_same(actual, packed(*call, causal=True, **options))


def test_packed_thousand_sequences():
    rows, keys = integers(1000, 0, 3, 1), integers(1000, 0, 200, 2)
    cu_q, cu_k = (torch.cat([int32(0), x.cumsum(0, dtype=torch.int32)]) for x in (rows, keys))
    q, k, v = (x[0] for x in tensors(B=1, Sq=int(cu_q[-1]) + 5, Sk=int(cu_k[-1]) + 7, Hq=2, Hk=1, D=16))
    call = [q, k, v, cu_q, cu_k]
    assert_same(packed(*moved(call), causal=True), packed(*call, causal=True))


SPECIAL = {
    "NaN in q": lambda q, k, v: q[0, 1].fill_(math.nan),
    "NaN in k": lambda q, k, v: k[0, 200].fill_(math.nan),
    "infinity in k": lambda q, k, v: k[:, 150].fill_(math.inf),
    "infinity in v": lambda q, k, v: v[:, 100:299:30].fill_(-math.inf),
    "NaN in v of a late key": lambda q, k, v: v[:, 298:].fill_(math.nan),
    "negative zeros in v": lambda q, k, v: v.fill_(-0.0),
    "huge scores": lambda q, k, v: q.mul_(300),
    "subnormal values": lambda q, k, v: v.mul_(1e-42 if v.dtype == torch.float32 else 1e-7),
}


@every_schedule
@every_dtype
@pytest.mark.parametrize("change", SPECIAL.values(), ids=SPECIAL)
def test_n11_special_values(dtype, change, schedule):
    q, k, v = tensors(Sq=9, dtype=dtype)
    change(q, k, v)
    with _schedule.forced(**schedule):
        actual = attention(q.cuda(), k.cuda(), v.cuda(), causal=True)
    assert_same(actual, attention(q, k, v, causal=True))


@every_schedule
@every_dtype
def test_strides_do_not_matter(dtype, schedule):
    q, k, v = moved(tensors(Sq=9, D=24, dtype=dtype))
    want = attention(*moved((q, k, v), "cpu"), causal=True)
    views = {
        "heads first": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        "rows far apart": [x.new_full((*x.shape[:-1], 41), math.nan)[..., :24].copy_(x) for x in (q, k, v)],
        "misaligned": [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v)],
        "dim first": [x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0) for x in (q, k, v)],
    }
    with _schedule.forced(**schedule):
        for name, view in views.items():
            assert_same(attention(*view, causal=True), want, name)
        one_key = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
        assert_same(attention(q, *one_key), attention(*moved((q, *one_key), "cpu")), "one key")


# ---- streams, devices, graphs ----------------------------------------------------------------------------------------


def warm_up(*qkv, **keywords):
    """The first launch of a kernel may load it, which waits for the device."""
    for split_parallel in (False, True):
        with _schedule.forced(split_parallel=split_parallel):
            attention(*qkv, **keywords)
    torch.cuda.synchronize()


@pytest.mark.parametrize("split_parallel", [False, True], ids=["folded", "spilled"])
def test_kernels_run_on_the_current_stream(split_parallel):
    """q is there only behind a delay on a stream of ours. The control uses another stream, and overtakes it."""
    qkv = tensors()
    q, k, v = moved(qkv)
    late_q = torch.full_like(q, math.nan)
    warm_up(q, k, v)
    with _schedule.forced(split_parallel=split_parallel):
        with torch.cuda.stream(torch.cuda.Stream()):
            busy()
            late_q.copy_(q)
            ours = attention(late_q, k, v)
        with torch.cuda.stream(torch.cuda.Stream()):
            control = attention(late_q, k, v)
    torch.cuda.synchronize()
    assert_same(ours, attention(*qkv))
    assert control[0].isnan().all()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_call_waits_for_nothing():
    q, k, v = moved(tensors())
    used = int32(300, 20).cuda()
    warm_up(q, k, v, seqused_k=used)
    finished = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        busy()
        for split_parallel in (False, True):
            with _schedule.forced(split_parallel=split_parallel):
                attention(q, k, v, seqused_k=used)
        finished.record()
        assert not finished.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_threads_with_streams_of_their_own():
    inputs = [tensors(Sq=20 + i, Sk=500) for i in range(4)]
    want = [attention(*qkv, causal=True) for qkv in inputs]
    got = [[] for _ in inputs]

    def worker(i):
        qkv = moved(inputs[i])
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()), _schedule.forced(split_parallel=i % 2 == 0):
            for _ in range(20):
                got[i].append(attention(*qkv, causal=True))
            torch.cuda.current_stream().synchronize()  # before the inputs, of another stream, are given back

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for i, results in enumerate(got):
        assert len(results) == 20
        for result in results:
            assert_same(result, want[i], f"thread {i}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_tensors_choose_the_device():
    qkv = tensors(Sq=9)
    want = attention(*qkv, causal=True)
    for current, other in ((0, 1), (1, 0)):
        with torch.cuda.device(current):
            for split_parallel in (False, True):
                with _schedule.forced(split_parallel=split_parallel):
                    out, lse = attention(*moved(qkv, f"cuda:{other}"), causal=True)
                assert out.device == lse.device == torch.device("cuda", other)
                assert torch.cuda.current_device() == current
                assert_same((out, lse), want, f"device {other}, current {current}")
            with pytest.raises(ValueError, match=f"k is on cuda:{current}, q is on cuda:{other}: expected one device"):
                attention(qkv[0].to(f"cuda:{other}"), *moved(qkv[1:], f"cuda:{current}"))
            assert torch.cuda.current_device() == current


@every_dtype
@pytest.mark.parametrize("Sq", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("split_parallel", [None, False, True], ids=["auto", "folded", "spilled"])
def test_graph_replays_with_other_lengths(dtype, Sq, split_parallel):
    qkv = tensors(B=3, Sq=Sq, Sk=700, dtype=dtype)
    q, k, v = moved(qkv)
    used = int32(700, 700, 700).cuda()

    def call():
        with _schedule.forced(split_parallel=split_parallel):
            return attention(q, k, v, causal=True, seqused_k=used)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for lengths in ((700, 129, 1), (0, 700, 64), (128, 127, 513)):
        used.copy_(int32(*lengths))
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        assert_same((out, lse), attention(*qkv, causal=True, seqused_k=int32(*lengths)), f"lengths {lengths}")


def test_graph_of_packed_sequences_replays_with_other_lengths():
    q, k, v = (x[0] for x in tensors(B=1, Sq=40, Sk=300))
    call = moved([q, k, v, int32(0, 40, 40), int32(0, 300, 300)])
    packed(*call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = packed(*call, causal=True)
    for rows, keys in ((int32(0, 1, 30), int32(0, 10, 290)), (int32(0, 0, 40), int32(0, 0, 300))):
        call[3].copy_(rows)
        call[4].copy_(keys)
        graph.replay()
        assert_same((out, lse), packed(q, k, v, rows, keys, causal=True))


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@every_dtype
def test_compile_gives_the_same_bits(dtype):
    qkv = tensors(Sq=9, dtype=dtype)
    keywords = dict(causal=True, window=(70, 5), softcap=9.0, sinks=torch.ones(4), seqused_k=int32(300, 17))
    on_gpu = moved(keywords)
    compiled = torch.compile(lambda *qkv: attention(*qkv, **on_gpu), fullgraph=True)
    assert_same(compiled(*moved(qkv)), attention(*qkv, **keywords))


@every_dtype
@pytest.mark.parametrize("op", [ops.fwd, ops.fwd_partials], ids=["fwd", "fwd_partials"])
def test_opcheck(op, dtype):
    options = dict(causal=True, scale=None, window=(40, 3), softcap=5.0, split_size=128, arithmetic="fma")
    arrays = dict(alibi_slopes=torch.linspace(0.1, 0.4, 4), sinks=torch.ones(4), seqused_k=int32(0, 100))
    torch.library.opcheck(op, _arguments(*moved(tensors(dtype=dtype)), **options, **moved(arrays)))


def test_opcheck_packed():
    q, k, v = (x[0] for x in moved(tensors()))
    options = dict(causal=True, scale=None, window=(-1, -1), softcap=0.0, split_size=128, arithmetic="fma")
    cu_seqlens = moved((int32(0, 2, 5), int32(0, 100, 300)))
    arguments = _arguments(q, k, v, alibi_slopes=None, sinks=None, cu_seqlens=cu_seqlens, **options)
    torch.library.opcheck(ops.fwd, arguments)


def test_memory_is_torchs_and_goes_back():
    """The spilled splits are the workspace, and show in torch's own count; afterwards only the results remain."""
    q, k, v = moved(tensors(Sq=1, Sk=4096, D=128))
    attention(q, k, v)
    before = torch.cuda.memory_allocated()
    peak = {}
    for split_parallel in (False, True):
        torch.cuda.reset_peak_memory_stats()
        with _schedule.forced(split_parallel=split_parallel):
            result = attention(q, k, v)
        peak[split_parallel] = torch.cuda.max_memory_allocated() - before
        del result
        assert torch.cuda.memory_allocated() == before
    states = 2 * 32 * 4 * 128 * 4  # batch, splits, heads, values, bytes
    assert peak[False] < states <= peak[True] < 2 * states


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(exception, message, *qkv, **keywords):
    """Refused with the message, without a tensor left behind or an error left in CUDA."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for function in (fad.attn, fad.attn_partials):
        with pytest.raises(exception, match=message):
            function(*qkv, **keywords)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_float64_is_for_the_cpu():
    refused(NotImplementedError, "^float64 has no CUDA kernel", *moved(tensors(dtype=torch.float64)))


def test_shapes_are_refused_as_on_the_cpu():
    q, k, v = moved(tensors())
    refused(ValueError, "^k has head dim 32, q has 64$", q, k[..., :32], v)
    refused(ValueError, "^left window is -2, expected -1", q, k, v, window=(-2, 0))
    refused(ValueError, "^seqused_k has 3 elements, expected 2$", q, k, v, seqused_k=int32(1, 2, 3).cuda())
    assert_same(attention(q, k, v), attention(*tensors()))


def test_tensors_of_two_devices():
    q, k, v = tensors()
    refused(ValueError, "^v is on cpu, q is on cuda:0: expected one device$", q.cuda(), k.cuda(), v)
    refused(ValueError, "^k is on cuda:0, q is on cpu: expected one device$", q, k.cuda(), v)
    options = dict(causal=True, scale=None, window=(-1, -1), softcap=0.0, split_size=128, arithmetic="fma")
    arguments = list(_arguments(q.cuda(), k.cuda(), v.cuda(), alibi_slopes=None, sinks=None, **options))
    for index, on_cpu in ((0, "k"), (1, "k"), (2, "v")):
        mixed = [x.cpu() if i == index else x for i, x in enumerate(arguments)]
        with pytest.raises(RuntimeError, match=f"{on_cpu} is on another device than q"):
            ops.fwd(*mixed)


WITHOUT_KERNELS = """
import torch, flash_attn_det as fad
q = torch.zeros(1, 1, 1, 8)
fad.attn(q, q, q)
for function in (fad.attn, fad.attn_partials):
    try:
        function(q.cuda(), q.cuda(), q.cuda())
    except NotImplementedError as error:
        print(error)
"""


def test_a_build_without_cuda_kernels_says_so(tmp_path):
    package = Path(fad.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("*_cuda.so", "__pycache__"))
    command = [sys.executable, "-c", WITHOUT_KERNELS]  # imports from its working directory first
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("the tensors are on a CUDA device, but this build has no CUDA kernels (")
