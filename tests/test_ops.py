"""The torch ops as torch sees them: opcheck, fake tensors, torch.compile, inference mode, ownership, threads."""

import gc
import subprocess
import sys
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import flash_attn_det as fad
from flash_attn_det import ops
from flash_attn_det.attention import _arguments, _unpadded
from flash_attn_det.testing import assert_bits_equal, bits_differ

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def dense(dtype=torch.float32, *, batch=2, rows=5, keys=300, heads=4, kv_heads=2, dim=16, value_dim=24):
    torch.manual_seed(7)
    q = torch.randn(batch, rows, heads, dim, dtype=torch.float64).to(dtype)
    k = torch.randn(batch, keys, kv_heads, dim, dtype=torch.float64).to(dtype)
    v = torch.randn(batch, keys, kv_heads, value_dim, dtype=torch.float64).to(dtype)
    return q, k, v


def packed(dtype=torch.float32):
    q, k, v = (x[0] for x in dense(dtype, rows=7, keys=90))
    return q, k, v, torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([0, 50, 60, 90], dtype=torch.int32)


def options(**changed) -> dict:
    masks = dict(causal=True, window=(-1, -1))
    scores = dict(scale=None, softcap=0.0, alibi_slopes=None, sinks=None)
    return {**masks, **scores, "split_size": 128, "arithmetic": "auto", **changed}


DENSE_CASES = {
    "plain": {},
    "options": dict(
        window=(40, 3), softcap=5.0, scale=-0.3, alibi_slopes=torch.linspace(0.1, 0.4, 4), sinks=torch.ones(4)
    ),
    "lengths": dict(
        seqused_q=torch.tensor([5, 2], dtype=torch.int32),
        seqused_k=torch.tensor([0, 100], dtype=torch.int32),
        leftpad_k=torch.tensor([3, 200], dtype=torch.int32),
    ),
    "batched slopes": dict(alibi_slopes=torch.linspace(0.1, 0.8, 8).view(2, 4)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DENSE_CASES)
def test_opcheck_dense(dtype, case):
    q, k, v = dense(dtype)
    torch.library.opcheck(ops.fwd, _arguments(q, k, v, **options(**DENSE_CASES[case])))
    torch.library.opcheck(ops.fwd_partials, _arguments(q, k, v, **options(**DENSE_CASES[case])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_packed(dtype):
    q, k, v, cu_q, cu_k = packed(dtype)
    torch.library.opcheck(ops.fwd, _arguments(q, k, v, cu_seqlens=(cu_q, cu_k), **options()))


EMPTY_SHAPES = {
    "batch": dict(batch=0),
    "rows": dict(rows=0),
    "keys": dict(keys=0),
}


@pytest.mark.parametrize("empty", EMPTY_SHAPES)
@pytest.mark.parametrize("op", [ops.fwd, ops.fwd_partials], ids=["fwd", "fwd_partials"])
def test_opcheck_empty(op, empty):
    torch.library.opcheck(op, _arguments(*dense(**EMPTY_SHAPES[empty]), **options()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["meta", "fake"])
def test_fake_results_have_the_real_shape_strides_and_dtype(dtype, device):
    """Inputs whose strides are unusual: results must be contiguous all the same."""
    q, k, v = dense(dtype)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        fq, fk, fv = (torch.empty_strided(x.shape, x.stride(), dtype=dtype) for x in (q, k, v))
        fp, fpk, fpv = (torch.empty_strided(x.shape, x.stride(), dtype=dtype) for x in packed(dtype)[:3])
        cu = torch.empty(4, dtype=torch.int32)
        fake = (
            *fad.attn(fq, fk, fv, return_lse=True),
            *fad.attn_partials(fq, fk, fv, split_size=128)[:3],
            *fad.attn_varlen(fp, fpk, fpv, cu, cu, return_lse=True),
        )
    real = (
        *fad.attn(q, k, v, return_lse=True),
        *fad.attn_partials(q, k, v, split_size=128)[:3],
        *fad.attn_varlen(*packed(dtype), return_lse=True),
    )
    for f, r in zip(fake, real, strict=True):
        assert (f.shape, f.stride(), f.dtype) == (r.shape, r.stride(), r.dtype)
        assert r.is_contiguous()


def test_compile_gives_the_same_bits():
    q, k, v = dense(torch.bfloat16)
    keywords = dict(causal=True, window=(70, 5), softcap=9.0, sinks=torch.ones(4), return_lse=True)
    compiled = torch.compile(lambda *qkv: fad.attn(*qkv, **keywords), fullgraph=True)
    for got, want in zip(compiled(q, k, v), fad.attn(q, k, v, **keywords), strict=True):
        assert_bits_equal(got, want)


def test_compile_packed_gives_the_same_bits():
    compiled = torch.compile(lambda *args: fad.attn_varlen(*args, causal=True), fullgraph=True)
    assert_bits_equal(compiled(*packed()), fad.attn_varlen(*packed(), causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_merge_gives_the_same_bits(dtype):
    """The fold's products are exact, so a compiler's fusions cannot be seen. With sums of -0, and rows without keys."""
    q, k, v = dense(dtype)
    v[..., 0] = -0.0
    used = torch.tensor([3, 300], dtype=torch.int32)
    partials = fad.attn_partials(q, k, v, causal=True, seqused_k=used, split_size=128)
    compiled = torch.compile(lambda p: fad.merge_partials(p, return_lse=True), fullgraph=True)
    for got, want in zip(compiled(partials), fad.merge_partials(partials, return_lse=True), strict=True):
        assert_bits_equal(got, want)


def test_compile_with_dynamic_shapes():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *qkv: fad.attn(*qkv, causal=True), fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for batch, keys in ((3, 65), (6, 130), (7, 401), (9, 999)):
        q, k, v = dense(batch=batch, keys=keys)
        assert_bits_equal(compiled(q, k, v), fad.attn(q, k, v, causal=True))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 4, "a new batch and length compiled again"


def test_compiled_function_follows_the_split_size():
    """A compiled function uses the split size of the moment: process value, block, block of a thread."""
    q, k, v = dense(keys=1200)
    want = {n: fad.attn(q, k, v, split_size=n) for n in (128, 256, 384, 512, 1024)}
    for n in (128, 256, 384, 512):
        assert bits_differ(want[n], want[1024]) > 0
    compiled = torch.compile(fad.attn, fullgraph=True)
    in_thread = {}

    def thread():
        in_thread["process"] = compiled(q, k, v)
        with fad.split_size(384):
            in_thread["block"] = compiled(q, k, v)

    try:
        fad.set_split_size(1024)
        assert_bits_equal(compiled(q, k, v), want[1024])
        with fad.split_size(128):
            assert_bits_equal(compiled(q, k, v), want[128])
        assert_bits_equal(compiled(q, k, v), want[1024])
        fad.set_split_size(256)
        assert_bits_equal(compiled(q, k, v), want[256])
        with fad.split_size(512):
            worker = threading.Thread(target=thread)
            worker.start()
            worker.join()
            assert_bits_equal(compiled(q, k, v), want[512])
        assert_bits_equal(in_thread["process"], want[256])
        assert_bits_equal(in_thread["block"], want[384])
    finally:
        fad.set_split_size(None)


def test_split_size_block_inside_a_compiled_function():
    q, k, v = dense(keys=600)

    @torch.compile(fullgraph=True)
    def both(q, k, v):
        with fad.split_size(128):
            inner = fad.attn(q, k, v)
        return inner, fad.attn(q, k, v)

    inner, outer = both(q, k, v)
    assert_bits_equal(inner, fad.attn(q, k, v, split_size=128))
    assert_bits_equal(outer, fad.attn(q, k, v))
    assert bits_differ(inner, outer) > 0


def test_export():
    q, k, v = dense()

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return fad.attn(q, k, v, causal=True)

    program = torch.export.export(Module(), (q, k, v))
    assert_bits_equal(program.module()(q, k, v), fad.attn(q, k, v, causal=True))


def test_errors_inside_a_compiled_graph_keep_their_message():
    q, k, v = dense()
    compiled = torch.compile(fad.attn, fullgraph=True)
    with pytest.raises(RuntimeError, match="left window is -2"):
        compiled(q, k, v, window=(-2, 0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(mode):
    q, k, v = dense()
    want = fad.attn(q, k, v)
    with mode():
        got = fad.attn(q, k, v)
        assert not got.requires_grad
        assert got.is_inference() == (mode is torch.inference_mode)
        merged = fad.merge_partials(fad.attn_partials(q, k, v))
    assert_bits_equal(got, want)
    assert_bits_equal(merged, want)


def test_inference_tensors_work_outside_inference_mode():
    with torch.inference_mode():
        q, k, v = dense()
    assert_bits_equal(fad.attn(q, k, v), fad.attn(q.clone(), k.clone(), v.clone()))


def test_parameters_work_without_grad():
    q, k, v = dense()
    with torch.no_grad():
        got = fad.attn(torch.nn.Parameter(q), k, v)
    assert not got.requires_grad
    assert_bits_equal(got, fad.attn(q, k, v))


def test_gradients_reach_what_a_transform_wraps():
    """The short way past torch.library's autograd is not for tensors that hide one that requires grad."""
    q, k, v = dense()
    q, slices = (torch.stack([q, q + 1]).requires_grad_() for _ in range(2))
    torch.vmap(lambda x: fad.attn(x, k, v, causal=True))(q).square().sum().backward()
    for x in slices:
        fad.attn(x, k, v, causal=True).square().sum().backward()
    assert_bits_equal(q.grad, slices.grad)
    assert q.grad.any()


def test_gradients_reach_what_a_function_mode_puts_in_place():
    class Replaced(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            if function is ops.fwd:
                arguments = (other, *arguments[1:])
            return function(*arguments, **(keywords or {}))

    q, k, v = dense()
    other = (q + 1).requires_grad_()
    with Replaced():
        out = fad.attn(q, k, v)
    out.sum().backward()
    assert other.grad.any()


def test_a_call_under_a_mode_leaves_nothing_behind():
    """Tensors that stand for None are kept: those that a mode has made must not be."""
    q, k, v = dense()
    want = fad.attn(q, k, v)
    ops._kept_absent.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fad.attn(q, k, v)
    assert_bits_equal(fad.attn(q, k, v), want)


def test_partials_say_that_they_have_no_backward():
    q, k, v = dense()
    _, *rest = _arguments(q, k, v, **options())
    o, _, _ = ops.fwd_partials(q.requires_grad_(), *rest)
    with pytest.raises(NotImplementedError, match="flash_attn_det has no backward yet"):
        o.sum().backward()


def test_inputs_are_not_changed():
    tensors = [*dense(), torch.linspace(0.1, 0.4, 4), torch.ones(4), torch.tensor([4, 5], dtype=torch.int32)]
    before = [t.clone() for t in tensors]
    q, k, v, slopes, sinks, used = tensors
    fad.attn(q, k, v, alibi_slopes=slopes, sinks=sinks, seqused_q=used, causal=True)
    fad.attn_partials(q, k, v, alibi_slopes=slopes, sinks=sinks, seqused_q=used, causal=True)
    for now, then in zip(tensors, before, strict=True):
        assert_bits_equal(now, then)


def storage_references(tensors) -> list[int]:
    gc.collect()
    return [torch._C._storage_Use_Count(t.untyped_storage()._cdata) for t in tensors]


def test_no_tensor_leaks_on_any_path():
    """The shim owns its arguments on success, on a refusal by the shim, and on a refusal by the C library."""
    q, k, v = dense()
    slopes = torch.ones(4)
    tensors = [q, k, v, slopes]
    before = storage_references(tensors)
    arguments = _arguments(q, k, v, **options(alibi_slopes=slopes))
    by_shim = _arguments(q, k[:, :, :, :8], v, **options(alibi_slopes=slopes))
    by_core = _arguments(q, k, v, **options(alibi_slopes=slopes, window=(-2, 0)))
    for _ in range(10):
        for op in (ops.fwd, ops.fwd_partials):
            op(*arguments)
            for bad, message in ((by_shim, "head dim"), (by_core, "left window")):
                with pytest.raises(RuntimeError, match=message):
                    op(*bad)
    del arguments, by_shim, by_core
    assert storage_references(tensors) == before


def test_results_own_their_memory():
    q, k, v = dense()
    out, lse = fad.attn(q, k, v, return_lse=True)
    assert storage_references([out, lse]) == storage_references([torch.empty(1), torch.empty(1)])
    del q, k, v
    gc.collect()
    assert out.isfinite().all()
    assert lse.isfinite().all()


MEMORY_PROBE = """
import resource, torch, flash_attn_det as fad
q, k, v = (torch.randn(1, 256, 8, 64) for _ in range(3))
def rounds(n):
    for _ in range(n):
        fad.attn(q, k, v, causal=True)
        try:
            fad.attn(q, k[..., :32], v)
        except ValueError:
            continue
        raise AssertionError("a wrong head dim was accepted")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
settled = rounds(50)
print(rounds(300) - settled)
"""


def test_memory_does_not_grow():
    """300 calls and 300 refusals; one leaked q, k, v or out per call would be 150 MiB."""
    result = subprocess.run([sys.executable, "-c", MEMORY_PROBE], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 16 * 1024, "KiB"


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
def test_thread_counts_of_torch(n_threads):
    q, k, v = dense(rows=200, keys=700)
    before = torch.get_num_threads()
    want = fad.attn(q, k, v, causal=True)
    try:
        torch.set_num_threads(n_threads)
        assert_bits_equal(fad.attn(q, k, v, causal=True), want)
        assert_bits_equal(fad.attn(q[:, -1:], k, v, causal=True), want[:, -1:])
    finally:
        torch.set_num_threads(before)


def test_concurrent_calls():
    inputs = [dense(rows=20 + i, keys=500) for i in range(4)]
    want = [fad.attn(*x, causal=True) for x in inputs]
    got = [[] for _ in inputs]

    def worker(i):
        for _ in range(20):
            got[i].append(fad.attn(*inputs[i], causal=True))

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, results in enumerate(got):
        assert len(results) == 20
        for out in results:
            assert_bits_equal(out, want[i])


def test_strides_do_not_matter():
    q, k, v = dense(rows=9)
    want = fad.attn(q, k, v, causal=True)
    head_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert_bits_equal(fad.attn(*head_first, causal=True), want)
    spread = [torch.full((*x.shape[:-1], 40), torch.nan)[..., : x.shape[-1]].copy_(x) for x in (q, k, v)]
    assert_bits_equal(fad.attn(*spread, causal=True), want)
    offset = [torch.cat([torch.full((1,), torch.nan), x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
    assert_bits_equal(fad.attn(*offset, causal=True), want)
    one_key = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    assert one_key[0].stride(1) == 0
    assert_bits_equal(fad.attn(q, *one_key), fad.attn(q, *(x.contiguous() for x in one_key)))
    dim_first = [x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0) for x in (q, k, v)]
    assert dim_first[0].stride(-1) != 1
    assert_bits_equal(fad.attn(*dim_first, causal=True), want)


def test_slopes_and_lengths_of_any_stride_and_dtype():
    q, k, v = dense()
    slopes, used = torch.linspace(0.1, 0.4, 4), torch.tensor([100, 30], dtype=torch.int32)
    want = fad.attn(q, k, v, alibi_slopes=slopes, seqused_k=used)
    spread = torch.stack([used, used + 1], dim=1)[:, 0]
    assert spread.stride(0) == 2
    assert_bits_equal(fad.attn(q, k, v, alibi_slopes=slopes.double().expand(2, 4), seqused_k=spread), want)


def test_rows_for_tensor_cores_are_padded_only_where_they_must_be():
    x = torch.randn(2, 3, 4, 24).half()
    one_row = torch.randn(1, 1, 1, 40).half()[..., :8]
    for fits in (x, x.transpose(1, 2), x[:, 1:], one_row):
        assert ops.for_tensor_cores(fits) is fits
    for wide in (x[..., :20], x[..., 4:20], torch.randn(2, 3, 4, 9).half(), torch.randn(2, 3, 4, 41).half()[..., :8]):
        padded = ops.for_tensor_cores(wide)
        assert padded.is_contiguous()
        assert padded.shape[-1] == -(-wide.shape[-1] // 8) * 8
        assert torch.equal(padded[..., : wide.shape[-1]], wide)
        assert not padded[..., wide.shape[-1] :].any()
        assert torch.equal(_unpadded(padded, wide), wide)


def test_backward_on_tensor_cores_gets_rows_that_it_can_read(monkeypatch):
    """The CPU's emulation, which reads any, stands in for the kernels of a GPU."""
    q, k, v = (x.half().requires_grad_() for x in dense(dim=24))
    dout = torch.randn(*q.shape[:-1], v.shape[-1]).half()
    misaligned = torch.cat([dout.new_zeros(1), dout.flatten()])[1:].view(dout.shape)
    want = torch.autograd.grad(fad.attn(q, k, v, causal=True, arithmetic="mma_sm90"), (q, k, v), dout)
    call, given = ops.call, []

    def observed(op, *arguments):
        given.extend(arguments[:3] + arguments[ops.N_TENSORS : ops.N_TENSORS + 2] if op is ops.bwd else ())
        return call(op, *arguments)

    monkeypatch.setattr(ops, "call", observed)
    for on_tensor_cores in (True, False):
        given.clear()
        monkeypatch.setattr(ops, "on_tensor_cores", lambda q, arithmetic, answer=on_tensor_cores: answer)
        got = torch.autograd.grad(fad.attn(q, k, v, causal=True, arithmetic="mma_sm90"), (q, k, v), misaligned)
        for a, b in zip(got, want, strict=True):
            assert_bits_equal(a, b)
        assert len(given) == 5
        assert all(x.data_ptr() % 16 == 0 for x in given) == on_tensor_cores
