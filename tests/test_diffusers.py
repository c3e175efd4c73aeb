"""docs/diffusers.md: the recipe, run as written, reaches a model's attention, masks included, and nothing else."""

import re
from pathlib import Path

import pytest
import torch

import flash_attn_det as fad
from flash_attn_det.testing import assert_bits_equal, bits_differ

pytest.importorskip("diffusers", minversion="0.42", reason="needs diffusers: pip install 'diffusers>=0.42'")

from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "diffusers.md"
RECIPE = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]


@pytest.fixture(scope="module")
def recipe():
    """(names that the page's code defines, calls of attn while it ran); diffusers is restored afterwards."""
    active, registry = _AttentionBackendRegistry._active_backend, _AttentionBackendRegistry
    tables = {name: dict(getattr(registry, name)) for name in ("_backends", "_constraints", "_supported_arg_names")}
    namespace, calls = {}, []
    with fad.ops.observed_by(lambda arguments, results: calls.append(arguments)):
        exec(compile(RECIPE, str(PAGE), "exec"), namespace)
    others = {name: f for name, f in registry._backends.items() if f is not namespace["deterministic"]}
    assert others == {name: f for name, f in tables["_backends"].items() if name != AttentionBackendName._NATIVE_MATH}
    yield namespace, calls
    for name, table in tables.items():
        getattr(registry, name).update(table)
    registry.set_active_backend(active)


def inputs():
    g = torch.Generator().manual_seed(9)
    return [torch.randn(3, n, 4, 24, generator=g) for n in (70, 300, 300)]


def dispatch(*qkv, **options):
    return dispatch_attention_fn(*qkv, backend=AttentionBackendName._NATIVE_MATH, **options)


def test_the_model_of_the_page_calls_attn_in_every_block(recipe):
    namespace, calls = recipe
    model = namespace["model"]
    assert len(calls) == len(model.transformer_blocks) + len(model.single_transformer_blocks) == 2


@torch.no_grad()
def test_bits_of_attn_alone_and_in_a_batch(recipe):
    q, k, v = inputs()
    together = dispatch(q, k, v)
    assert_bits_equal(together, fad.attn(q, k, v))
    for b in range(3):
        assert_bits_equal(dispatch(q[b : b + 1], k[b : b + 1], v[b : b + 1]), together[b : b + 1])
    assert bits_differ(dispatch_attention_fn(q, k, v, backend=AttentionBackendName.NATIVE), together) > 0


@torch.no_grad()
def test_padding(recipe):
    q, k, v = inputs()
    mask = torch.ones(3, 300, dtype=torch.bool)
    mask[0, 65:] = mask[1, 129:] = False
    out = dispatch(q, k, v, attn_mask=mask)
    native = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=AttentionBackendName.NATIVE)
    assert (out - native).abs().max() < 2e-6
    differing = 0
    for b, kept in enumerate(mask):
        alone = [q[b : b + 1], k[b : b + 1, kept], v[b : b + 1, kept]]
        assert_bits_equal(out[b : b + 1], dispatch(*alone), f"sequence {b}")
        differing += bits_differ(native[b : b + 1], dispatch_attention_fn(*alone, backend=AttentionBackendName.NATIVE))
    assert differing > 0, "diffusers' own attention did not differ either: these inputs prove nothing"
