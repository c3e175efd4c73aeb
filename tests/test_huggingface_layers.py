"""Every attention layer of whole models: a sequence's outputs have the bits that it has alone, in one piece, unpadded.

A model runs a padded batch, through a cache or without; what each layer was given and returned is kept. Then each
sequence's own q, k and v, without the padding, go through attention alone and at once.
"""

import contextlib
import functools
import types

import pytest
import torch
from hf_tools import CONFIGS, DECODERS, ENCODERS, build, tokens, transformers
from transformers.modeling_utils import AttentionInterface

from flash_attn_det.integrations import huggingface as hf
from flash_attn_det.testing import assert_bits_equal, bits_differ

# What an attention layer computes, of the keywords that it is called with.
OPTIONS = ("scaling", "sliding_window", "softcap", "is_causal", "s_aux", "sinks")
PROMPT = 140  # more than one block of keys
WINDOW = 40  # across the boundary of blocks for some rows
PADDING = {"none": (0, 0, 0), "left": (90, 11, 0), "right": (90, 11, 0)}


@functools.cache
def model(name):
    config = CONFIGS[name]()
    if getattr(config, "sliding_window", None):
        config.sliding_window = WINDOW
    return build(name, hf.NAME, config)


def prompts():
    return tokens(3, PROMPT)


def tokens_in_use(kind, new=0):
    """bool [B, PROMPT + new]: the tokens of each sequence, new ones behind the prompt."""
    mask = torch.ones(3, PROMPT, dtype=torch.bool)
    for row, missing in zip(mask, PADDING[kind]):
        row[: missing if kind == "left" else 0] = False
        row[PROMPT - missing if kind == "right" else PROMPT :] = False
    return torch.cat([mask, torch.ones(3, new, dtype=torch.bool)], 1)


@contextlib.contextmanager
def recorded_calls():
    """Every call of the attention function within the block: module, q, k, v, out and the options."""
    calls = []

    def recording(module, query, key, value, attention_mask, **kwargs):
        out, weights = hf.deterministic_attention(module, query, key, value, attention_mask, **kwargs)
        options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
        calls.append(types.SimpleNamespace(module=module, q=query, k=key, v=value, out=out, options=options))
        return out, weights

    AttentionInterface.register(hf.NAME, recording)
    try:
        yield calls
    finally:
        AttentionInterface.register(hf.NAME, hf.deterministic_attention)


@contextlib.contextmanager
def recorded_keys(cache):
    """The keys and values that each layer adds to the cache within the block: [(layer, k, v)], in order."""
    added, update = [], cache.update

    def recording(key_states, value_states, layer_idx, *args, **kwargs):
        added.append((layer_idx, key_states, value_states))
        return update(key_states, value_states, layer_idx, *args, **kwargs)

    cache.update = recording
    try:
        yield added
    finally:
        del cache.update


def by_layer(calls, added):
    """One record per layer: q, k, v [B, heads, n, D] and out [B, n, heads, D] of all rows, in order of the steps."""
    layers = {}
    for call in calls:
        layers.setdefault(id(call.module), []).append(call)
    records = []
    for index, steps in enumerate(layers.values()):
        keys = [(k, v) for layer, k, v in added if layer == index] or [(steps[0].k, steps[0].v)]
        record = types.SimpleNamespace(module=steps[0].module, options=steps[0].options)
        record.q, record.out = torch.cat([s.q for s in steps], 2), torch.cat([s.out for s in steps], 1)
        record.k, record.v = (torch.cat(parts, 2) for parts in zip(*keys))
        records.append(record)
    return records


def assert_bits_alone(records, mask):
    """mask [B, n] bool: the tokens of each sequence."""
    for index, layer in enumerate(records):
        for b, kept in enumerate(mask):
            qkv = (x[b : b + 1, :, kept] for x in (layer.q, layer.k, layer.v))
            alone, _ = hf.deterministic_attention(layer.module, *qkv, None, **layer.options)
            assert_bits_equal(layer.out[b, kept], alone[0], f"layer {index}, sequence {b}")


def torch_differs(records, mask):
    """The control: elements of torch's attention, of the same inputs, that differ between the batch and alone."""
    differing = 0
    for layer in records:
        sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
        batched = sdpa(layer.q, layer.k, layer.v, attn_mask=mask[:, None, None, :])
        for b, kept in enumerate(mask):
            alone = sdpa(*(x[b : b + 1, :, kept] for x in (layer.q, layer.k, layer.v)))
            differing += bits_differ(batched[b, :, kept], alone[0])
    return differing


@torch.no_grad()
@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("name", CONFIGS)
def test_forward(name, kind):
    mask = tokens_in_use(kind)
    with recorded_calls() as calls:
        model(name)(prompts(), attention_mask=None if kind == "none" else mask.long())
    records = by_layer(calls, [])
    assert len(records) == model(name).config.num_hidden_layers
    assert_bits_alone(records, mask)
    assert kind == "none" or torch_differs(records, mask) > 0, "these inputs prove nothing"


CACHES = {
    "dynamic": lambda config: transformers.DynamicCache(config=config),
    "dynamic without windows": lambda config: transformers.DynamicCache(),
    "static": lambda config: transformers.StaticCache(config=config, max_cache_len=PROMPT + 20),
}


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("name", DECODERS)
def test_prefill_in_pieces(name, kind, cache):
    """100 tokens, one, then the rest at once. Layers with windows get caches that keep the last keys, and roll."""
    mask = tokens_in_use(kind)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past = CACHES[cache](model(name).config)
    with recorded_calls() as calls, recorded_keys(past) as added:
        for start, end in ((0, 100), (100, 101), (101, PROMPT)):
            model(name)(
                prompts()[:, start:end],
                attention_mask=None if kind == "none" else mask[:, :end].long(),
                position_ids=positions[:, start:end],
                past_key_values=past,
            )
    records = by_layer(calls, added)
    assert all(layer.q.shape[2] == layer.k.shape[2] == PROMPT for layer in records)
    assert_bits_alone(records, mask)
    assert kind == "none" or torch_differs(records, mask) > 0, "these inputs prove nothing"


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name, kind, cache):
    """A prefill and 6 decode steps: every row has the bits of the same row in one prefill of the whole text."""
    past = CACHES[cache](model(name).config)
    arguments = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    with recorded_calls() as calls, recorded_keys(past) as added:
        mask = tokens_in_use(kind).long()
        model(name).generate(prompts(), attention_mask=mask, past_key_values=past, **arguments)
    records = by_layer(calls, added)
    assert all(layer.q.shape[2] == layer.k.shape[2] == PROMPT + 6 for layer in records)
    assert_bits_alone(records, tokens_in_use(kind, new=6))


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_continuous_batching(name, monkeypatch):
    """Every sequence of every packed step, from the paged cache, has the bits that it has in a call of its own."""
    packed = []

    def recording(*arguments, **options):
        out = original(*arguments, **options)
        # Its buffers are used again in the next step.
        options["k_pos"] = None if options["k_pos"] is None else options["k_pos"].clone()
        packed.append(([x.clone() for x in arguments], options, out))
        return out

    original = hf.attn_varlen
    monkeypatch.setattr(hf, "attn_varlen", recording)
    ids = prompts()
    requests = [ids[0].tolist(), ids[1, :3].tolist(), ids[2, :77].tolist()]
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=160)
    model(name).generate_batch(requests, generation_config=config, continuous_batching_config=small, progress_bar=False)
    sequences = 0
    for (q, k, v, cu_q, cu_k), options, out in packed:
        k_pos = options.pop("k_pos")
        for b, (row, end, key, key_end) in enumerate(zip(cu_q, cu_q[1:], cu_k, cu_k[1:])):
            if row < end:
                sequences += 1
                position = None if k_pos is None else k_pos[b : b + 1]
                parts = (q[None, row:end], k[None, key:key_end], v[None, key:key_end])
                assert_bits_equal(out[row:end], hf.attn(*parts, k_pos=position, **options)[0], f"sequence {b}")
    assert sequences >= 3 * 4 * model(name).config.num_hidden_layers


# ---------------------------------------------------------------------------------------------------------------------
# every form of a mask


def full_mask(mask, causal):
    """[B, n] -> [B, 1, n, n] bool, as a user who builds masks by hand passes it."""
    seen = mask[:, None, None, :] & mask[:, None, :, None]
    return seen & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril() if causal else seen


@torch.no_grad()
@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("name", ["bert", "llama", "qwen3"])  # windows cannot be read off a 4-D mask, and are refused
def test_every_form_of_a_mask_gives_the_same_bits(name, kind):
    mask = tokens_in_use(kind)
    whole = full_mask(mask, name not in ENCODERS)
    forms = {
        "2-D": mask.long(),
        "4-D bool": whole,
        "4-D float": torch.where(whole, 0.0, torch.finfo(torch.float32).min),
        "4-D float, -inf": torch.where(whole, 0.0, -torch.inf),
    }
    if kind == "none":
        forms["None"] = None
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    outputs = {
        form: model(name)(prompts(), attention_mask=representation, position_ids=positions)[0][mask]
        for form, representation in forms.items()
    }
    for form, out in outputs.items():
        assert_bits_equal(out, outputs["2-D"], form)
    if kind == "left" or (kind == "right" and name in ENCODERS):
        ignored = model(name)(prompts(), position_ids=positions)[0][mask]
        assert bits_differ(ignored, outputs["2-D"]) > 0
