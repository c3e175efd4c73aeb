"""The backward on a GPU as torch meets it: streams, graphs, memory, torch.compile, checkpoints, refusals."""

import math

import pytest
import torch
from cases import normal
from cuda_gradients import assert_same, every_dtype, every_family, on_the_cpu, on_the_gpu, tensors
from cuda_tools import busy, int32, moved, needs_gpu
from gradients import gradients
from torch.utils.checkpoint import checkpoint

import flash_attn_det as fad
from flash_attn_det import ops
from flash_attn_det.attention import _arguments
from flash_attn_det.testing import assert_bits_equal

pytestmark = needs_gpu


def backward_arguments(family, q, k, v, dout, **keywords):
    """The arguments of the op bwd, on the GPU."""
    q, k, v, dout = moved((q, k, v, dout))
    options = {"causal": True, "scale": None, "window": (-1, -1), "softcap": 0.0, "alibi_slopes": None, "sinks": None}
    arguments = _arguments(
        q, k, v, **{**options, **moved(keywords)}, split_size=128, arithmetic=family.on_gpu, differentiable=True
    )
    out, lse = ops.fwd(*arguments)
    return [*arguments[:13], dout, out, lse, lse.new_empty(0), *arguments[13:]]


DOUT = 13  # its place among them


@every_dtype
def test_kernels_run_on_the_current_stream(family, dtype):
    """dout is there only behind a delay on a stream of ours. The control uses another stream, and overtakes it."""
    inputs = tensors(dtype=dtype)
    want = on_the_cpu(family, *inputs, causal=True, split_size=128)
    arguments = backward_arguments(family, *inputs)
    dout, late = arguments[DOUT], torch.full_like(arguments[DOUT], math.nan)
    ops.bwd(*arguments)
    arguments[DOUT] = late
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        busy()
        late.copy_(dout)
        ours = ops.bwd(*arguments)
    with torch.cuda.stream(torch.cuda.Stream()):
        control = ops.bwd(*arguments)
    torch.cuda.synchronize()
    assert_same(ours[:3], want)
    assert control[0].isnan().any()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@every_family
def test_call_waits_for_nothing(family):
    arguments = backward_arguments(
        family, *tensors(dtype=family.dtype), sinks=normal((4,), 6), seqused_k=int32(200, 20)
    )
    ops.bwd(*arguments)
    torch.cuda.synchronize()
    finished = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        busy()
        ops.bwd(*arguments)
        finished.record()
        assert not finished.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@every_dtype
def test_graph_of_a_training_step_replays_with_other_values_and_lengths(family, dtype):
    q, k, v, dout = tensors(B=3, Sq=40, Sk=300, dtype=dtype)
    leaves = [x.cuda().requires_grad_() for x in (q, k, v)]
    on_gpu, used = dout.cuda(), int32(300, 300, 300).cuda()

    def step():
        out = fad.attn(*leaves, causal=True, seqused_k=used, arithmetic=family.on_gpu)
        return torch.autograd.grad(out, leaves, on_gpu)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for i, lengths in enumerate(((300, 129, 1), (0, 300, 64), (128, 127, 213))):
        other = normal(dout.shape, 50 + i, dtype)
        used.copy_(int32(*lengths))
        on_gpu.copy_(other)
        for x in results:
            x.fill_(math.nan)
        graph.replay()
        want = on_the_cpu(family, q, k, v, other, causal=True, seqused_k=int32(*lengths))
        assert_same(results, want, f"lengths {lengths}")


@every_family
def test_extra_memory_is_of_the_order_of_the_rows(family):
    """Beside the gradients: the workspace, which does not grow with the number of keys, and goes back."""
    extra = []
    for Sk in (1024, 4096):
        arguments = backward_arguments(family, *tensors(Sq=1024, Sk=Sk, D=64, Dv=64, dtype=family.dtype))
        ops.bwd(*arguments)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = ops.bwd(*arguments)
        after = torch.cuda.memory_allocated()
        extra.append(torch.cuda.max_memory_allocated() - after)
        assert after - before < sum(x.numel() * x.element_size() + 1024 for x in results)
        del results
        assert torch.cuda.memory_allocated() == before
    rows = 2 * 4 * 1024  # batch, heads, rows
    assert 0 < extra[0] == extra[1] < rows * 16


# ---- torch -----------------------------------------------------------------------------------------------------------


@every_family
def test_flash_attn_func_has_the_same_gradients(family):
    for name in family.by_default:
        q, k, v, dout = moved(tensors(D=24, Dv=24, dtype=family.dtypes[name]))
        want = on_the_gpu(family, q, k, v, dout, causal=True, softcap=4.0)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = fad.flash_attn_func(*leaves, causal=True, softcap=4.0)
        assert_same(torch.autograd.grad(out, leaves, dout), want)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@every_dtype
def test_compile_gives_the_same_bits(family, dtype):
    q, k, v, dout = moved(tensors(dtype=dtype))
    sinks = normal((4,), 8).cuda()
    options = {"causal": True, "softcap": 4.0, "arithmetic": family.on_gpu}
    want = gradients(q, k, v, dout, sinks=sinks, **options)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
    compiled = torch.compile(lambda q, k, v, sinks: fad.attn(q, k, v, sinks=sinks, **options), fullgraph=True)
    assert_same(torch.autograd.grad(compiled(*leaves), leaves, dout), want)


@every_family
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_gives_the_same_bits(family, reentrant):
    q, k, v, dout = moved(tensors(dtype=family.dtype))
    want = on_the_gpu(family, q, k, v, dout, causal=True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    function = lambda *qkv: fad.attn(*qkv, causal=True, arithmetic=family.on_gpu)  # noqa: E731
    checkpoint(function, *leaves, use_reentrant=reentrant).backward(dout)
    assert_same([x.grad for x in leaves], want)


@every_dtype
def test_under_use_deterministic_algorithms(family, dtype):
    inputs = tensors(dtype=dtype)
    want = on_the_gpu(family, *inputs, causal=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(on_the_gpu(family, *inputs, causal=True), want)
    finally:
        torch.use_deterministic_algorithms(False)


@every_dtype
def test_opcheck(family, dtype):
    arguments = backward_arguments(family, *tensors(Sq=5, dtype=dtype), sinks=normal((4,), 8), softcap=3.0)
    torch.library.opcheck(ops.bwd, arguments)


@every_family
def test_only_some_inputs_require_grad(family):
    q, k, v, dout = moved(tensors(dtype=family.dtype))
    want = on_the_gpu(family, q, k, v, dout, causal=True)
    leaf = k.clone().requires_grad_()
    out = fad.attn(q, leaf, v, causal=True, arithmetic=family.on_gpu)
    assert_bits_equal(torch.autograd.grad(out, leaf, dout)[0], want[1])
    with torch.no_grad():
        assert not fad.attn(q, leaf, v, arithmetic=family.on_gpu).requires_grad


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@every_family
def test_tensors_choose_the_device(family):
    inputs = tensors(dtype=family.dtype)
    want = on_the_cpu(family, *inputs, causal=True)
    for current, other in ((0, 1), (1, 0)):
        with torch.cuda.device(current):
            got = gradients(*moved(inputs, f"cuda:{other}"), causal=True, arithmetic=family.on_gpu)
            assert torch.cuda.current_device() == current
        assert {x.device.index for x in got} == {other}
        assert_same(got, want)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_has_no_backward_says_so():
    q, k, v, _ = moved(tensors(Sk=160))
    with pytest.raises(NotImplementedError, match=r"^float64 has no CUDA kernel"):
        fad.attn(*(x.double().requires_grad_() for x in (q, k, v)))
    with pytest.raises(NotImplementedError, match="no gradient of alibi_slopes"):
        fad.attn(q, k, v, alibi_slopes=torch.ones(4, device="cuda", requires_grad=True))
    pages = [x.reshape(20, 16, 2, -1) for x in (k, v)]
    table = torch.arange(20, dtype=torch.int32, device="cuda").view(2, 10)
    keywords = {"block_table": table, "seqused_k": int32(160, 160).cuda()}
    with pytest.raises(NotImplementedError, match="flash_attn_det has no backward yet, but k requires grad"):
        fad.attn_varlen(q.flatten(0, 1), pages[0].requires_grad_(), pages[1], int32(0, 100, 200).cuda(), **keywords)
