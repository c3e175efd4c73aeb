"""What the tests of the backward share: gradients of a call for upstream gradients that depend on the call alone."""

from __future__ import annotations

import torch
from cases import normal

import flash_attn_det as fad
from flash_attn_det.testing import assert_bits_equal, bits_differ

NAMES = ("dq", "dk", "dv", "d_sinks")


def upstream(q, v, seed=901):
    """A gradient of out for q [..., Hq, D] and v [..., Dv]."""
    return normal((*q.shape[:-1], v.shape[-1]), seed, q.dtype)


def gradients(q, k, v, dout=None, dlse=None, sinks=None, function=fad.attn, **keywords):
    """dq, dk, dv and, with sinks, d_sinks of function(q, k, v, **keywords)."""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    if sinks is not None:
        inputs.append(sinks.detach().clone().requires_grad_())
        keywords["sinks"] = inputs[3]
    out, lse = function(*inputs[:3], **keywords, return_lse=True)
    dout = upstream(q, v) if dout is None else dout
    outputs, given = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
    return torch.autograd.grad(outputs, inputs, given)


def assert_same(actual, expected, name=""):
    for got, want, part in zip(actual, expected, NAMES):
        assert_bits_equal(got, want, f"{part} {name}")


def differing(actual, expected) -> int:
    return sum(bits_differ(a, b) for a, b in zip(actual, expected))
