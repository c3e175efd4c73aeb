"""torch.compile(fullgraph=True) of transformers models: attention in the graph has the bits of attention outside it."""

import shutil
import types

import pytest
import torch
from hf_tools import model, padding, tokens
from transformers.modeling_utils import AttentionInterface

from flash_attn_det.integrations import huggingface as hf
from flash_attn_det.testing import assert_bits_equal, bits_differ


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_model_has_the_bits_of_the_eager_one(name, kind):
    torch._dynamo.reset()
    m, mask = model(name, hf.NAME), padding(kind)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    assert_bits_equal(compiled(tokens(), attention_mask=mask).logits, m(tokens(), attention_mask=mask).logits)
    if kind == "left":
        with pytest.raises(RuntimeError, match="padding must be on one side"):
            compiled(tokens(), attention_mask=padding("holes"))


@pytest.fixture
def recorded():
    """What attention was given and what it returned, also from inside a graph."""
    calls = []

    def recording(module, query, key, value, attention_mask, scaling=None, **kwargs):
        out, weights = hf.deterministic_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        calls.append((query, key, value, scaling, out))
        return out, weights

    AttentionInterface.register(hf.NAME, recording)
    yield calls
    AttentionInterface.register(hf.NAME, hf.deterministic_attention)


def block():
    """A Llama decoder block (norms, projections, rotary embedding, attention, MLP), and its arguments."""
    m = model("llama", hf.NAME).model
    hidden = torch.randn(2, 200, 32, generator=torch.Generator().manual_seed(8))
    positions = torch.arange(200)[None]
    return m.layers[0], (hidden,), {"position_embeddings": m.rotary_emb(hidden, positions)}


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_decoder_block(backend, recorded):
    """Inductor fuses the other operations and may change their bits, so attention is compared given what it was given;
    the other two backends run the same operations as eager mode, so the whole block has the same bits.
    """
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("needs g++, with which torch's inductor compiles")
    torch._dynamo.reset()
    layer, arguments, options = block()
    expected = layer(*arguments, **options)
    out = torch.compile(layer, backend=backend, fullgraph=True)(*arguments, **options)
    (_, (q, k, v, scaling, attended)) = recorded
    module = types.SimpleNamespace(is_causal=True)
    alone, _ = hf.deterministic_attention(module, q, k, v, None, scaling=scaling)
    assert_bits_equal(attended, alone, "attention")
    if backend == "inductor":
        assert (out - expected).abs().max() < 1e-4
    else:
        assert_bits_equal(out, expected, "block")
    nearby, _ = hf.deterministic_attention(module, q, k, v, None, scaling=scaling * 1.000001)
    assert bits_differ(nearby, attended) > 0, "these inputs would not notice other arithmetic"
