"""torch.ops.flash_attn_det: schemas, fake tensors, autograd, and the way from a C status to a Python exception.

The kernels are C (csrc/torch/). An absent optional tensor is an empty one of one dimension: the ABI that reaches back
to torch 2.10 cannot pass None. Users call attention.py; the ops are what graphs contain.
"""

import functools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor

from . import _library

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor seqused_q, Tensor seqused_k, "
    "Tensor leftpad_k, Tensor k_pos, Tensor cache_batch_idx, Tensor block_table, Tensor alibi_slopes, Tensor sinks"
)
_NUMBERS = "float scale, bool causal, int window_left, int window_right, float softcap, int split_size, int arithmetic"
N_TENSORS, _N_NUMBERS = _TENSORS.count("Tensor"), _NUMBERS.count(",") + 1
_ARGUMENTS = f"{_TENSORS}, {_NUMBERS}"
_BACKWARD_ARGUMENTS = f"{_TENSORS}, Tensor dout, Tensor out, Tensor lse, Tensor dlse, {_NUMBERS}"
_APPEND_ARGUMENTS = (
    "Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor cache_batch_idx, "
    "Tensor block_table, Tensor rotary_cos, Tensor rotary_sin, bool rotary_interleaved"
)
_ROTATE_ARGUMENTS = "Tensor x, Tensor cos, Tensor sin, Tensor offsets, bool advance, bool interleaved"
_AUTO_AND_MMA = (0, 2)  # of FAD_ARITHMETIC_* in csrc/flash_attn_det.h
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

# Kept for the life of the process: torch forgets what was defined through a Library that is collected.
_library_handle = torch.library.Library("flash_attn_det", "DEF")
_library_handle.define(f"fwd({_ARGUMENTS}) -> (Tensor out, Tensor lse)", tags=_TAGS)
_library_handle.define(f"fwd_partials({_ARGUMENTS}) -> (Tensor o, Tensor m, Tensor l)", tags=_TAGS)
_library_handle.define(f"bwd({_BACKWARD_ARGUMENTS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_sinks)", tags=_TAGS)
_library_handle.define(f"check({_ARGUMENTS}) -> ()", tags=_TAGS)
_library_handle.define(f"append({_APPEND_ARGUMENTS}) -> ()", tags=_TAGS)
_library_handle.define(f"rotate({_ROTATE_ARGUMENTS}) -> Tensor", tags=_TAGS)
_library.register_kernels()

DEVICES = ("cpu", "cuda", "meta")  # with kernels (CUDA's may not be in the build: C says so); meta only infers shapes
_ERROR = re.compile(r"flash_attn_det\[(\d)\]: ([^\n]*)")
_EXCEPTIONS = {"1": ValueError, "2": NotImplementedError, "3": RuntimeError}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores, lse, partial states, slopes and sinks: float64 for float64 inputs, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_tensor_cores(q: Tensor, arithmetic: int) -> bool:
    """Whether an op with this q and arithmetic, as it is numbered, runs the kernels of the mma family on a GPU."""
    return q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and arithmetic in _AUTO_AND_MMA


def _is_ordinary(*tensors: Tensor) -> bool:
    """Whether nothing but autograd stands between a call with these and the kernels: no mode, transform, tracer or
    subclass, of which some take other tensors for these, or hide behind them that one requires grad."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._len_torch_dispatch_stack()
    ) and all(type(t) in _ORDINARY for t in tensors)


_ORDINARY = (Tensor, torch.nn.Parameter)


def absent(dtype: torch.dtype, q: Tensor) -> Tensor:
    """The empty tensor on q's device that stands for None."""
    if _is_ordinary(q):
        return _kept_absent(dtype, q.device)
    return torch.empty(0, dtype=dtype, device=q.device)


@functools.cache  # a call has two of them, which would take it a tenth of its time
def _kept_absent(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be saved for a backward
        return torch.empty(0, dtype=dtype, device=device)


def for_tensor_cores(t: Tensor) -> Tensor:
    """t with rows that can be read 16 bytes at a time: a copy, its last dimension padded with zeros, unless it has."""
    offset = 0 if torch.compiler.is_compiling() else t.storage_offset()
    rows = zip(t.stride()[:-1], t.shape[:-1], strict=True)
    if t.shape[-1] % 8 == 0 and offset % 8 == 0 and all(stride % 8 == 0 or size <= 1 for stride, size in rows):
        return t
    return torch.nn.functional.pad(t, (0, -t.shape[-1] % 8)).clone(memory_format=torch.contiguous_format)


@torch.library.register_fake("flash_attn_det::fwd", lib=_library_handle)
def _fwd_fake(q, k, v, cu_seqlens_q, *_):
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    if cu_seqlens_q.numel() > 0:
        rows, heads, _ = q.shape
        lse = q.new_empty((heads, rows), dtype=compute_dtype(q.dtype))
    else:
        batch, rows, heads, _ = q.shape
        lse = q.new_empty((batch, heads, rows), dtype=compute_dtype(q.dtype))
    return out, lse


@torch.library.register_fake("flash_attn_det::fwd_partials", lib=_library_handle)
def _fwd_partials_fake(
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, k_pos, cache_batch_idx, block_table,
    alibi_slopes, sinks, scale, causal, window_left, window_right, softcap, split_size, arithmetic,
):  # fmt: skip
    batch, rows, heads, _ = q.shape
    keys = k.shape[1] * (block_table.shape[1] if block_table.ndim == 2 else 1)
    count = (keys + split_size - 1) // split_size + (1 if sinks.numel() > 0 else 0)
    dtype = compute_dtype(q.dtype)
    o = q.new_empty((count, batch, rows, heads, v.shape[-1]), dtype=dtype)
    m, l = (q.new_empty((count, batch, heads, rows), dtype=dtype) for _ in range(2))
    return o, m, l


@torch.library.register_fake("flash_attn_det::check", lib=_library_handle)
@torch.library.register_fake("flash_attn_det::append", lib=_library_handle)
def _nothing_fake(*_) -> None:
    return None


@torch.library.register_fake("flash_attn_det::rotate", lib=_library_handle)
def _rotate_fake(x, *_):
    return x.new_empty(x.shape)


@torch.library.register_fake("flash_attn_det::bwd", lib=_library_handle)
def _bwd_fake(q, k, v, *rest):
    sinks = rest[N_TENSORS - 4]  # three stand before
    return (*(x.new_empty(x.shape) for x in (q, k, v)), sinks.new_empty(sinks.shape))


NO_BACKWARD = (
    "flash_attn_det has no backward yet, but {} requires grad: call it under torch.no_grad() or "
    "torch.inference_mode(), or pass .detach()ed tensors"
)
NO_SLOPE_GRADIENT = (
    "flash_attn_det has no gradient of alibi_slopes, which require grad: pass alibi_slopes.detach(); those of q, k, v "
    "and sinks are there"
)
NO_SECOND_BACKWARD = "flash_attn_det has no second derivatives: call the first backward without create_graph=True"


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no gradient of lse is none, and not a tensor of zeros
    ctx.save_for_backward(*inputs[:N_TENSORS], *output)
    ctx.numbers = inputs[N_TENSORS:]


def _fwd_backward(ctx, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    needed = ctx.needs_input_grad
    if needed[N_TENSORS - 2]:
        raise NotImplementedError(NO_SLOPE_GRADIENT)
    gradients: list[Tensor | None] = [None] * (N_TENSORS + _N_NUMBERS)
    if dout is not None or dlse is not None:
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dlse = absent(lse.dtype, lse) if dlse is None else dlse
        if on_tensor_cores(out, ctx.numbers[-1]):  # hooks of saved tensors may have moved them
            if torch.compiler.is_compiling():
                dout = dout.clone()  # the only one that may start anywhere: its offset is not seen there
            dout, out, *tensors[:3] = map(for_tensor_cores, (dout, out, *tensors[:3]))
        results = call(bwd, *tensors, dout, out, lse, dlse, *ctx.numbers)
        for i, gradient in zip((0, 1, 2, N_TENSORS - 1), results, strict=True):
            gradients[i] = gradient if needed[i] else None
    return tuple(gradients)


def _bwd_backward(ctx, *_) -> NoReturn:
    raise NotImplementedError(NO_SECOND_BACKWARD)


def _no_backward(ctx, *_) -> NoReturn:
    raise NotImplementedError(NO_BACKWARD.format("an input"))


class _Forward(torch.autograd.Function):
    """What register_autograd makes of fwd, for calls outside of graphs: they would wait 160 microseconds for it."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _below_autograd(fwd, inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    backward = staticmethod(_fwd_backward)


def _below_autograd(op, arguments: tuple):
    """op, without what register_autograd puts before it: 10 microseconds, and nothing if no gradient is needed."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _run(op, arguments: tuple):
    """op(*arguments), by the short way where there is one."""
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    if op not in (fwd, bwd) or not _is_ordinary(*tensors):
        return op(*arguments)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return _below_autograd(op, arguments)
    return _Forward.apply(*arguments) if op is fwd else op(*arguments)


torch.library.register_autograd(
    "flash_attn_det::fwd", _fwd_backward, setup_context=_save_for_backward, lib=_library_handle
)
torch.library.register_autograd("flash_attn_det::bwd", _bwd_backward, lib=_library_handle)
torch.library.register_autograd("flash_attn_det::fwd_partials", _no_backward, lib=_library_handle)
torch.library.register_autograd("flash_attn_det::rotate", _no_backward, lib=_library_handle)


class _Observers(threading.local):
    def __init__(self):  # runs once in every thread; torch.compile guards instance attributes, so no class attribute
        self.value = ()


_observers = _Observers()


def observers() -> tuple[Callable, ...]:
    """What sees the calls of this thread."""
    return _observers.value


@contextmanager
def observed_by(*observers: Callable) -> Iterator[None]:
    """Within the block, observer(arguments, results) follows every fwd of this thread, for these observers alone.

    Not those inside a graph that torch.compile made, which do not pass here.
    """
    outer = _observers.value
    _observers.value = observers
    try:
        yield
    finally:
        _observers.value = outer


def call(op, *arguments) -> Tensor | tuple[Tensor, ...] | None:
    """Run one of the ops; a failure of the C library becomes ValueError, NotImplementedError or RuntimeError.

    Inside a graph that torch.compile made, the op is called by the graph and not from here, so there the same message
    arrives as a RuntimeError.
    """
    if torch.compiler.is_compiling():
        return op(*arguments)
    try:
        results = _run(op, arguments)
    except RuntimeError as error:
        match = _ERROR.search(str(error))
        if match is None:
            raise
        status, detail = match.groups()
        raise _EXCEPTIONS[status](detail) from None
    if op is fwd:
        for observer in _observers.value:
            observer(arguments, results)
    return results


fwd = torch.ops.flash_attn_det.fwd.default
fwd_partials = torch.ops.flash_attn_det.fwd_partials.default
bwd = torch.ops.flash_attn_det.bwd.default
check = torch.ops.flash_attn_det.check.default  # raises what fwd would, and does nothing else
append = torch.ops.flash_attn_det.append.default
rotate = torch.ops.flash_attn_det.rotate.default
