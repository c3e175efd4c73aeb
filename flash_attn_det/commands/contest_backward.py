"""One backward of the GPU benchmark: ours and its peers are checked against float64, then timed in turns."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flash_attn_det as fad
from flash_attn_det.commands import gradients, measure
from flash_attn_det.commands.cases import CudaCase
from flash_attn_det.commands.figures import Figures, Result
from flash_attn_det.commands.gradients import Gradients
from flash_attn_det.commands.peers import refused

LOOSE_BAR = 4.0  # of what is no flash kernel of torch beside ours
ALONE = 1e-2  # the largest relative error where nothing else runs
FA2 = "FA2"


@dataclass(frozen=True)
class BackwardPeer:
    """One attention with a backward.

    attend takes a case and q, k, v, heads_first as [B, H, S, D]. deterministic: told so for its backward.
    grouped: knows grouped heads; what does not gets a copy of k and v for each query head.
    """

    name: str
    runs: Callable[[CudaCase], bool]
    attend: Callable[..., torch.Tensor]
    heads_first: bool = True
    deterministic: bool = False
    grouped: bool = True

    def copies(self, case: CudaCase) -> int:
        """Of each kv head."""
        return 1 if self.grouped else case.Hq // case.Hk


def _sdpa(backend: SDPBackend) -> Callable[..., torch.Tensor]:
    def attend(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def _flash_attn(module: str) -> Callable[..., torch.Tensor]:
    def attend(case: CudaCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result = importlib.import_module(module).flash_attn_func(q, k, v, causal=case.causal)
        return result[0] if isinstance(result, tuple) else result

    return attend


def _half(case: CudaCase) -> bool:
    return case.dtype != "float32"


OURS = BackwardPeer("ours", lambda case: True, lambda case, *qkv: fad.attn(*qkv, causal=case.causal), heads_first=False)
_BUILT_IN = [
    BackwardPeer(FA2, _half, _sdpa(SDPBackend.FLASH_ATTENTION)),
    BackwardPeer("FA2 deterministic", _half, _sdpa(SDPBackend.FLASH_ATTENTION), deterministic=True),
    BackwardPeer("cuDNN", _half, _sdpa(SDPBackend.CUDNN_ATTENTION)),
    BackwardPeer("efficient", lambda case: not _half(case), _sdpa(SDPBackend.EFFICIENT_ATTENTION), grouped=False),
]
_PACKAGES = [
    ("flash_attn", BackwardPeer("flash-attn", _half, _flash_attn("flash_attn"), heads_first=False)),
    ("flash_attn_interface", BackwardPeer("flash-attn 3", _half, _flash_attn("flash_attn_interface"), False)),
]


def peers() -> list[BackwardPeer]:
    """What ours is run beside: what torch brings, and the packages that are installed."""
    return [*_BUILT_IN, *(peer for module, peer in _PACKAGES if importlib.util.find_spec(module) is not None)]


def _told_to_be_deterministic(call: Callable[[], object]) -> Callable[[], object]:
    """The call with torch's deterministic algorithms, and without the filling of memory that comes with them."""

    def deterministic() -> object:
        filled = torch.utils.deterministic.fill_uninitialized_memory
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = filled

    return deterministic


def _enter(
    result: Result, peer: BackwardPeer, inputs: tuple[torch.Tensor, ...], dout: torch.Tensor, expected: list[Gradients]
) -> tuple[Callable[[], object], tuple[float, ...]] | None:
    """The backward of one library and its errors; None when it raises, which the result then explains."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            call, ours = gradients.backward_of(
                lambda *qkv: peer.attend(result.case, *qkv), inputs, dout, peer.heads_first, peer.copies(result.case)
            )
            call = _told_to_be_deterministic(call) if peer.deterministic else call
            errors = gradients.errors(result.case, ours(call()), expected)
            added = measure.cuda_peak_extra_bytes(call)
        except Exception as problem:  # of any library, so of any kind; it is shown
            result.missing[peer.name] = refused(problem, warned)
            return None
    result.figures[peer.name] = Figures(float("nan"), max(errors, key=lambda e: (e != e, e)), added)
    return call, errors


def drop_inaccurate(result: Result, errors: dict[str, tuple[float, ...]]) -> None:
    """Ours must be as near to float64 as torch's flash kernel; anything else within a few times of the nearest."""
    numbers = {name: found for name, found in errors.items() if all(e == e for e in found)}
    for name in list(result.figures):
        others = [found for key, found in numbers.items() if key != name]
        if name == OURS.name and FA2 in numbers:
            problem = gradients.too_far(errors[name], numbers[FA2])
        elif others:
            problem = gradients.too_far(errors[name], tuple(map(min, *others, others[0])), LOOSE_BAR)
        else:
            problem = None if all(e < ALONE for e in errors[name]) else f"relative errors of {errors[name]}"
        if problem is not None:
            del result.figures[name]
            result.missing[name] = f"not accurate, not timed: {problem}"


def measure_case(case: CudaCase, others: list[BackwardPeer], seconds: float) -> Result:
    """Check ours and the peers that run this case, then time the backwards that are accurate for about ``seconds``."""
    contenders = [OURS, *(peer for peer in others if peer.runs(case))]
    result = Result(case, [peer.name for peer in contenders])
    inputs = case.tensors()
    dout = gradients.upstream(case, inputs[0])
    expected = gradients.exact(case, *inputs, dout)
    entered = {peer.name: _enter(result, peer, inputs, dout, expected) for peer in contenders}
    drop_inaccurate(result, {name: entry[1] for name, entry in entered.items() if entry is not None})
    names = list(result.figures)
    taken = measure.cuda_medians([entered[name][0] for name in names], seconds) if names else []
    for name, median in zip(names, taken, strict=True):
        result.figures[name] = replace(result.figures[name], seconds=median)
    return result
