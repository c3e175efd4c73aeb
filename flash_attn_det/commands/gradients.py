"""Gradients of attention for the benchmark: of one's own layout, in float64, and how far apart the two are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from flash_attn_det.commands.cases import Case

BAR = 1.2  # errors of ours over those of torch's flash kernel, of each gradient


class Gradients(NamedTuple):
    """Of q [B, Sq, Hq, D], k [B, Sk, Hk, D] and v [B, Sk, Hk, Dv]."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def upstream(case: Case, out_like: torch.Tensor) -> torch.Tensor:
    """A gradient of out [B, Sq, Hq, D], the same on every run on one kind of device."""
    device = out_like.device
    noise = torch.randn(out_like.shape, generator=torch.Generator(device).manual_seed(1), device=device)
    return noise.to(out_like.dtype)


def backward_of(
    attend: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    dout: torch.Tensor,
    heads_first: bool,
    copies: int = 1,
) -> tuple[Callable[[], tuple[torch.Tensor, ...]], Callable[[tuple[torch.Tensor, ...]], Gradients]]:
    """The backward alone, ready to be timed, and what turns its result into our layout; the forward runs here, once.

    heads_first: attend takes and gives contiguous [B, H, S, D].
    copies: of each kv head, for an attend without grouped heads. They are made here, and the gradients of the copies
        are summed in our layout, so neither is timed.
    """

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        return (x.transpose(1, 2) if heads_first else x).detach().contiguous()

    q, *kv = inputs
    leaves = [laid_out(x).requires_grad_() for x in (q, *(x.repeat_interleave(copies, 2) for x in kv))]
    out, dout = attend(*leaves), laid_out(dout)

    def call() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def ours(gradients: tuple[torch.Tensor, ...]) -> Gradients:
        dq, *dkv = (x.transpose(1, 2) if heads_first else x for x in gradients)
        return Gradients(dq, *(x.unflatten(2, (-1, copies)).sum(3) for x in dkv))

    return call, ours


def checked(case: Case) -> list[tuple[int, int]]:
    """Sequence and kv head of what is compared with float64: the first of the first, the last of the last."""
    return [(0, 0), (case.B - 1, case.Hk - 1)]


def _exact_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, causal: bool) -> Gradients:
    """One head in float64: all [S, D], the last row of q at the position of the last key."""
    scale = q.shape[-1] ** -0.5
    scores = q @ k.T * scale
    if causal:
        hidden = torch.ones(scores.shape, dtype=torch.bool, device=q.device).triu_(k.shape[0] - q.shape[0] + 1)
        scores.masked_fill_(hidden, float("-inf"))
    p = scores.softmax(-1)
    ds = dout @ v.T
    ds.sub_((ds * p).sum(-1, keepdim=True)).mul_(p).mul_(scale)
    return Gradients(ds @ k, ds.T @ q, p.T @ dout)


def exact(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> list[Gradients]:
    """Gradients of the checked heads in float64: dq [Sq, G, D] of the G query heads of a kv head, dk and dv [Sk, D]."""
    results, group = [], case.Hq // case.Hk
    for b, head in checked(case):
        k_b, v_b = (x[b, :, head].double() for x in (k, v))
        heads = range(head * group, (head + 1) * group)
        parts = [_exact_head(q[b, :, h].double(), k_b, v_b, dout[b, :, h].double(), case.causal) for h in heads]
        dq, dk, dv = zip(*parts, strict=True)
        results.append(Gradients(torch.stack(dq, 1), torch.stack(dk).sum(0), torch.stack(dv).sum(0)))
    return results


def errors(case: Case, gradients: Gradients, expected: list[Gradients]) -> tuple[float, float, float]:
    """Root mean square of the error of dq, dk and dv over that of the gradient itself, the larger of the heads'."""
    group, worst = case.Hq // case.Hk, [0.0, 0.0, 0.0]
    for (b, head), want in zip(checked(case), expected, strict=True):
        heads = slice(head * group, (head + 1) * group)
        got = gradients.dq[b, :, heads], gradients.dk[b, :, head], gradients.dv[b, :, head]
        for i, (x, exactly) in enumerate(zip(got, want, strict=True)):
            error = ((x.double() - exactly).square().mean() / exactly.square().mean()).sqrt().item()
            worst[i] = error if not error <= worst[i] else worst[i]  # NaN is the worst
    return worst[0], worst[1], worst[2]


def too_far(ours: tuple[float, ...], others: tuple[float, ...], bar: float = BAR) -> str | None:
    """None, or which gradient is further from float64 than the bar allows."""
    for name, error, other in zip(Gradients._fields, ours, others, strict=True):
        if not error <= bar * other:
            return f"{name} has a relative error of {error:.1e}, more than {bar} times {other:.1e}"
    return None
