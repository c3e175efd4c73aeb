"""On a GPU: what is built on attn keeps its bits there too: sdpa, the FlashAttention names, HuggingFace models."""

import copy

import pytest
import torch
from cuda_tools import assert_same, differing, every_16_bit_dtype, int32, needs_gpu, tensors

import flash_attn_det as fad
from flash_attn_det.testing import assert_bits_equal

pytestmark = needs_gpu


def on_gpu(dtype, **shape):
    return [x.cuda() for x in tensors(Hq=8, D=64, dtype=dtype, **shape)]


@every_16_bit_dtype
@pytest.mark.parametrize("side", ["left", "right"])
def test_sdpa_with_padding_is_attn_alone(dtype, side):
    q, k, v = on_gpu(dtype, B=3, Sq=300, Sk=300)
    used = (300, 170, 1)
    mask = torch.zeros(3, 1, 1, 300, dtype=torch.bool, device="cuda")
    parts = [slice(300 - n, 300) if side == "left" else slice(0, n) for n in used]
    for row, part in zip(mask, parts):
        row[..., part] = True
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = fad.sdpa(*heads_first, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    for b, part in enumerate(parts):
        assert_bits_equal(out[b : b + 1], fad.attn(q[b : b + 1], k[b : b + 1, part], v[b : b + 1, part]), f"{b}")


@every_16_bit_dtype
def test_the_names_of_flash_attention(dtype):
    q, k, v = on_gpu(dtype, B=2, Sq=70, Sk=300)
    options = {"causal": True, "softcap": 5.0}
    want = fad.attn(q, k, v, window=(100, 0), return_lse=True, **options)
    dense = fad.flash_attn_func(q, k, v, window_size=(100, 0), return_attn_probs=True, **options)
    assert_same(dense[:2], want)
    starts = [int32(0, n, 2 * n).cuda() for n in (70, 300)]
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out = fad.flash_attn_varlen_func(*flat, *starts, 70, 300, window_size=(100, 0), **options)
    assert_bits_equal(out.view(want[0].shape), want[0])
    caches = [torch.full_like(x, float("nan")) for x in (k, v)]
    for cache, x in zip(caches, (k, v)):
        cache[:, :230] = x[:, :230]
    used = int32(230, 230).cuda()
    got = fad.flash_attn_with_kvcache(
        q, *caches, k[:, 230:], v[:, 230:], cache_seqlens=used, window_size=(100, 0), return_softmax_lse=True, **options
    )
    assert_same(got, want)
    assert differing(fad.flash_attn_func(q, k, v, return_attn_probs=True, **options)[:2], want) > 0


HF_MODELS = ["bert", "llama", "gemma2", "gemma3", "gpt_oss", "mistral"]


@pytest.fixture
def layers():
    """The tools of the same tests on the CPU."""
    pytest.importorskip("transformers", minversion="5.0", reason="needs transformers >= 5")
    import test_huggingface_layers

    return test_huggingface_layers


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize("name", HF_MODELS)
def test_models_forward(layers, name, kind):
    model = copy.deepcopy(layers.model(name)).to("cuda", torch.bfloat16)
    mask = layers.tokens_in_use(kind).cuda()
    with layers.recorded_calls() as calls:
        model(layers.prompts().cuda(), attention_mask=None if kind == "none" else mask.long())
    records = layers.by_layer(calls, [])
    assert len(records) == model.config.num_hidden_layers
    assert records[0].out.is_cuda
    layers.assert_bits_alone(records, mask)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [name for name in HF_MODELS if name != "bert"])
def test_models_generate(layers, name, cache):
    """A padded prefill and decode steps: every row has the bits of the same row in one prefill of the whole text."""
    model = copy.deepcopy(layers.model(name)).to("cuda", torch.bfloat16)
    past = layers.CACHES[cache](model.config)
    mask = layers.tokens_in_use("left").long().cuda()
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    with layers.recorded_calls() as calls, layers.recorded_keys(past) as added:
        model.generate(layers.prompts().cuda(), attention_mask=mask, past_key_values=past, **arguments)
    records = layers.by_layer(calls, added)
    assert all(layer.q.shape[2] == layer.k.shape[2] == layers.PROMPT + 4 for layer in records)
    layers.assert_bits_alone(records, layers.tokens_in_use("left", new=4).cuda())
