"""transformers: attn_implementation="flash_attn_det" against eager, and the bits of one sequence however it arrives."""

import copy
import functools
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import types

import pytest
import torch

import flash_attn_det
from flash_attn_det.testing import assert_bits_equal, bits_differ

transformers = pytest.importorskip(
    "transformers", minversion="5.0", reason="needs transformers >= 5: pip install 'flash-attn-det[hf]'"
)

from transformers import masking_utils, modeling_utils  # noqa: E402

from flash_attn_det import integrations, masks  # noqa: E402
from flash_attn_det.integrations import huggingface as hf  # noqa: E402

PACKAGE_PARENT = pathlib.Path(flash_attn_det.__file__).parent.parent
ROOT = pathlib.Path(__file__).parent.parent
VOCABULARY = 99
TOLERANCE = 3e-5  # logits here reach 9, computed in fp32 through two to four layers


def common(**kwargs):
    # initializer_range: with the usual 0.02 the scores are so flat that a wrong mask would pass unseen
    return {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "vocab_size": VOCABULARY,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        **kwargs,
    }


def decoder(**kwargs):
    # untied: a random model with tied embeddings repeats its last token for ever
    fixed = {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": None}
    return common(**fixed, tie_word_embeddings=False, **kwargs)


CONFIGS = {
    "bert": lambda: transformers.BertConfig(**common()),
    "modernbert": lambda: transformers.ModernBertConfig(
        **common(num_hidden_layers=4, local_attention=6, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
    ),
    "llama": lambda: transformers.LlamaConfig(**decoder()),
    "qwen3": lambda: transformers.Qwen3Config(**decoder()),
    "mistral": lambda: transformers.MistralConfig(**decoder(sliding_window=4)),
    "gemma2": lambda: transformers.Gemma2Config(
        **decoder(sliding_window=4, attn_logit_softcapping=5.0, query_pre_attn_scalar=8)
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**decoder(sliding_window=4, query_pre_attn_scalar=8)),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **decoder(sliding_window=4, num_local_experts=4, num_experts_per_tok=2)
    ),
}
ENCODERS = ["bert", "modernbert"]
DECODERS = [name for name in CONFIGS if name not in ENCODERS]


def build(name, implementation, config=None):
    torch.manual_seed(0)
    model_class = transformers.AutoModel if name in ENCODERS else transformers.AutoModelForCausalLM
    config = copy.deepcopy(config or CONFIGS[name]())
    return model_class.from_config(config, attn_implementation=implementation).eval()


# Tests share models and do not change them.
model = functools.cache(build)


def tokens(batch=3, length=9):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(kind, batch=3, length=9):
    """A 2-D mask: the first sequence misses 5 tokens, the second 2, the third none."""
    if kind == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    if kind == "holes":
        mask[:, 3] = 0
        mask[1, 0] = 0
        mask[2, 7:] = 0
        return mask
    mask[0, :5] = 0
    mask[1, :2] = 0
    return mask if kind == "left" else mask.flip(1)


def worst(a, b, mask=None):
    difference = (a - b).abs()
    return (difference if mask is None else difference[mask.bool()]).max().item()


# ---------------------------------------------------------------------------------------------------------------------
# whole models against eager


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_agrees_with_eager(name, kind):
    mask = padding(kind)
    expected = model(name, "eager")(tokens(), attention_mask=mask)[0]
    for implementation in (hf.NAME, hf.ALIAS):
        out = model(name, implementation)(tokens(), attention_mask=mask)[0]
        assert worst(out, expected, mask) <= TOLERANCE
    if kind == "left" or (kind == "right" and name in ENCODERS):
        ignored = model(name, "eager")(tokens())[0]
        assert worst(ignored, expected, mask) > 1e-2, "these inputs would not notice a mask that is ignored"


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_between_tokens_is_as_if_not_there(name):
    """Against eager without the padding: eager with it counts the padding as part of a window."""
    mask = padding("holes")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(name, hf.NAME)(tokens(), attention_mask=mask, position_ids=positions)[0]
    for row, kept in enumerate(mask.bool()):
        expected = model(name, "eager")(tokens()[row : row + 1, kept])[0]
        assert worst(out[row, kept], expected[0]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_gives_the_tokens_of_eager(name, kind, cache):
    arguments = {
        "attention_mask": torch.ones(3, 9, dtype=torch.long) if kind == "none" else padding(kind),
        "max_new_tokens": 12,
        "do_sample": False,
        "cache_implementation": cache,
    }
    expected = model(name, "eager").generate(tokens(), **arguments)
    assert torch.equal(model(name, hf.NAME).generate(tokens(), **arguments), expected)
    assert torch.equal(model(name, hf.ALIAS).generate(tokens(), **arguments), expected)
    assert expected[:, 9:].unique().numel() > 3, "a constant output would prove nothing"


@torch.no_grad()
def test_beam_search_reorders_the_cache():
    arguments = {"attention_mask": padding("left"), "max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    expected = model("llama", "eager").generate(tokens(), **arguments)
    assert torch.equal(model("llama", hf.NAME).generate(tokens(), **arguments), expected)


CACHES = {
    "dynamic": lambda config: transformers.DynamicCache(config=config),
    "dynamic without windows": lambda config: transformers.DynamicCache(),
    "static": lambda config: transformers.StaticCache(config=config, max_cache_len=16),
}


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_prefill_in_pieces(name, kind, cache):
    """A prefill of 5, one token, then 3 at once: Sq < Sk, with static slots unused and rolling slots dropped."""
    ids, mask = tokens(), padding(kind)
    positions = torch.arange(9).expand(3, -1) if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    logits = {}
    for implementation in ("eager", hf.NAME):
        m = model(name, implementation)
        past = CACHES[cache](m.config)
        pieces = [
            m(
                ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=past,
            ).logits
            for start, end in ((0, 5), (5, 6), (6, 9))
        ]
        logits[implementation] = torch.cat(pieces, 1)
    assert worst(logits[hf.NAME], logits["eager"], mask) <= TOLERANCE


@torch.no_grad()
def test_decode_after_right_padding():
    """The cache then holds padding between a sequence's keys."""
    ids, mask = tokens(), padding("right")
    full = torch.cat([mask, torch.ones(3, 2, dtype=torch.long)], 1)
    positions = (full.cumsum(-1) - 1).clamp(min=0)
    logits = {}
    for implementation in ("eager", hf.NAME):
        m = model("llama", implementation)
        past = transformers.DynamicCache()
        m(ids, attention_mask=mask, position_ids=positions[:, :9], past_key_values=past)
        steps = [
            m(
                ids[:, :1],
                attention_mask=full[:, : 10 + step],
                position_ids=positions[:, 9 + step : 10 + step],
                past_key_values=past,
            ).logits
            for step in range(2)
        ]
        logits[implementation] = torch.cat(steps, 1)
    assert worst(logits[hf.NAME], logits["eager"]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences_by_position_ids(name):
    """Several sequences in one batch row, as a data collator packs them; each equals its own forward."""
    ids = tokens()
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2]]).expand(3, -1)
    m = model(name, hf.NAME)
    packed = m(ids, position_ids=positions, use_cache=False).logits
    assert worst(packed, model(name, "eager")(ids, position_ids=positions, use_cache=False).logits) <= TOLERANCE
    apart = torch.cat([m(ids[:, :6]).logits, m(ids[:, 6:]).logits], 1)
    assert worst(packed, apart) <= TOLERANCE

    # With a cache, transformers leaves the detection to the attention function, for a batch of one.
    assert worst(m(ids[:1], position_ids=positions[:1], use_cache=True).logits, apart[:1]) <= TOLERANCE
    cu = torch.tensor([0, 6, 9])
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 6, "max_length_k": 6}
    assert worst(m(ids[:1], position_ids=positions[:1], use_cache=False, **lengths).logits, apart[:1]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_continuous_batching(name, monkeypatch):
    """Requests of different lengths, packed, from a paged cache; mistral's keeps only the last window of keys."""
    positions = []
    rolled = hf._rolled_positions
    monkeypatch.setattr(
        hf, "_rolled_positions", lambda *arguments: positions.append(rolled(*arguments)) or positions[-1]
    )
    ids = tokens(3, 20)
    prompts = [ids[0].tolist(), ids[1, :3].tolist(), ids[2, :11].tolist()]
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=64)
    outputs = build(name, hf.NAME).generate_batch(
        prompts, generation_config=config, continuous_batching_config=small, progress_bar=False
    )
    for prompt, output in zip(prompts, outputs.values()):
        expected = model(name, "eager").generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert output.generated_tokens == expected[0, len(prompt) :].tolist()
    if name == "mistral":
        # The last step of the longest request reads positions 23 .. 26: 20 + 8 - 1 tokens, a window of 4.
        assert max(int(p.max()) for p in positions) == 23
    else:
        assert not positions


@torch.no_grad()
def test_cross_attention_with_padding():
    """As many decoder as encoder tokens, encoder padded: the padding must not be taken for the decoder's."""
    config = transformers.BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=VOCABULARY,
        init_std=0.3,
    )
    outputs = {}
    for implementation in ("eager", hf.NAME):
        torch.manual_seed(0)
        m = transformers.BartForConditionalGeneration._from_config(
            copy.deepcopy(config), attn_implementation=implementation
        ).eval()
        outputs[implementation] = m(
            tokens(),
            attention_mask=padding("right"),
            decoder_input_ids=tokens(),
            decoder_attention_mask=torch.ones(3, 9, dtype=torch.long),
        ).logits
    assert worst(outputs[hf.NAME], outputs["eager"]) <= TOLERANCE


@torch.no_grad()
def test_vision_tower_with_several_images():
    """The images are packed sequences: transformers passes cu_seq_lens because the name says flash."""
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl, modeling_qwen2_5_vl

    config = configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=32,
        num_heads=4,
        intermediate_size=64,
        out_hidden_size=32,
        patch_size=4,
        window_size=16,
        fullatt_block_indexes=[1],
        initializer_range=0.3,
    )
    grid = torch.tensor([[1, 8, 8], [1, 4, 6]])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 16, generator=torch.Generator().manual_seed(2))
    outputs = []
    for implementation in ("eager", hf.NAME, hf.ALIAS):
        torch.manual_seed(0)
        tower = modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel._from_config(
            copy.deepcopy(config), attn_implementation=implementation
        ).eval()
        outputs.append(tower(pixels, grid_thw=grid).last_hidden_state)
    assert worst(outputs[1], outputs[0]) <= TOLERANCE
    assert_bits_equal(outputs[2], outputs[1], "the two names")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "right"])
def test_decoders_that_look_both_ways(kind):
    """Two ways in which a configuration turns causality off: the mask and the attention module must agree."""
    mask = padding(kind)
    for name, config in (
        ("llama", transformers.LlamaConfig(**decoder(is_causal=False))),
        ("gemma3", transformers.Gemma3TextConfig(**decoder(sliding_window=4, use_bidirectional_attention=True))),
    ):
        out, expected = (
            build(name, implementation, config)(tokens(), attention_mask=mask, use_cache=False).logits
            for implementation in (hf.NAME, "eager")
        )
        assert worst(out, expected, mask) <= TOLERANCE
        causal = model(name, "eager")(tokens(), attention_mask=mask, use_cache=False).logits
        assert worst(causal, expected, mask) > 1e-2, "these inputs would not notice causality"


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


# ---------------------------------------------------------------------------------------------------------------------
# bits: one sequence, however it arrives


SPLIT = 256  # short enough that several splits are folded
LENGTHS = (700, 65, 1, 130, 513)  # around block and split boundaries
HQ, HK, D = 4, 2, 24
VARIANTS = {
    "full": {"is_causal": False},
    "causal": {"is_causal": True},
    "causal window": {"is_causal": True, "sliding_window": 100},
    "full window": {"is_causal": False, "sliding_window": 70},
    "softcap": {"is_causal": True, "softcap": 2.0},
    "sinks": {"is_causal": True, "s_aux": torch.linspace(-1, 2, HQ), "sliding_window": 600},
}
MODULE = types.SimpleNamespace()


def attend(q, k, v, mask=None, **options):
    with flash_attn_det.split_size(SPLIT):
        return hf.deterministic_attention(MODULE, q, k, v, mask, scaling=0.5, **options)[0]


@functools.cache
def sequences():
    """q, k, v of every sequence: [1, heads, n, D]."""
    g = torch.Generator().manual_seed(3)
    return [tuple(torch.randn(1, heads, n, D, generator=g) for heads in (HQ, HK, HK)) for n in LENGTHS]


@functools.cache
def alone(variant):
    return [attend(*qkv, **VARIANTS[variant])[0] for qkv in sequences()]


def place(columns, width):
    """All sequences in one NaN-filled batch, token t of sequence b at column columns[b][t]: q, k, v and the mask."""
    batch = [torch.full((len(LENGTHS), heads, width, D), torch.nan) for heads in (HQ, HK, HK)]
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.bool)
    for b, qkv in enumerate(sequences()):
        mask[b, columns[b]] = True
        for whole, part in zip(batch, qkv):
            whole[b, :, columns[b]] = part[0]
    return *batch, mask


def columns_of(way):
    width = max(LENGTHS) + 7
    if way == "holes":
        g = torch.Generator().manual_seed(4)
        return [torch.randperm(width, generator=g)[:n].sort()[0] for n in LENGTHS], width
    first = {"right": lambda n: 0, "left": lambda n: width - n, "both": lambda n: (width - n) // 3}[way]
    return [torch.arange(first(n), first(n) + n) for n in LENGTHS], width


def full_mask(mask, causal):
    """[B, n] -> what a user who builds masks by hand passes: [B, 1, n, n], additive."""
    n = mask.shape[1]
    seen = mask[:, None, None, :].expand(-1, 1, n, n) & mask[:, None, :, None]
    if causal:
        seen = seen & torch.ones(n, n, dtype=torch.bool).tril()
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", ["right", "left", "both", "holes"])
def test_padding_does_not_change_a_bit(way, variant):
    options = VARIANTS[variant]
    columns, width = columns_of(way)
    q, k, v, mask = place(columns, width)
    masks = {"bool [B, n]": mask, "int [B, n]": mask.long(), "bool [B, 1, 1, n]": mask[:, None, None, :]}
    if "sliding_window" not in options:
        additive = full_mask(mask, options["is_causal"])
        masks |= {"additive [B, 1, n, n]": additive, "bool [B, Hq, n, n]": (additive == 0).expand(-1, HQ, -1, -1)}
    for form, representation in masks.items():
        out = attend(q, k, v, representation, **options)
        for b, expected in enumerate(alone(variant)):
            assert_bits_equal(out[b, columns[b]], expected, f"{form}, sequence {b}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_packing_does_not_change_a_bit(variant):
    options = VARIANTS[variant]
    q, k, v = (torch.cat(parts, 2) for parts in zip(*sequences()))
    expected = torch.cat(alone(variant))[None]
    cu = torch.tensor((0, *LENGTHS)).cumsum(0)
    out = attend(q, k, v, cu_seq_lens_q=cu, cu_seq_lens_k=cu, **options)
    assert_bits_equal(out, expected, "cu_seq_lens")
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None] + 2  # RoBERTa counts from 2
    assert_bits_equal(attend(q, k, v, position_ids=positions, **options), expected, "position_ids")
    numbers = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(LENGTHS)])[None]
    # Two batch rows; the second begins with the number that the first ends with.
    two_rows = torch.cat([numbers, len(LENGTHS) + 1 - numbers])
    out = attend(*(x.expand(2, -1, -1, -1) for x in (q, k, v)), two_rows, **options)
    assert_bits_equal(out, expected.expand(2, -1, -1, -1), "segment numbers")
    without_second = torch.where(numbers == 2, 0, numbers)
    out = attend(q, k, v, without_second, **options)
    assert_bits_equal(out[0, cu[2] :], expected[0, cu[2] :], "segment numbers with padding")
    assert not out[0, cu[1] : cu[2]].any()


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "full" and name != "full window"])
@pytest.mark.parametrize("rows", [1, 37])
def test_decode_rows_have_the_bits_of_prefill(rows, variant):
    """The last rows of a sequence against its whole cache: left-padded, static, and behind a rolling window."""
    options = VARIANTS[variant]
    usable = [b for b, n in enumerate(LENGTHS) if n >= rows]
    columns, width = columns_of("left")
    q, k, v, mask = place(columns, width)
    q = q[:, :, -rows:]

    def check(out, name):
        for b in usable:
            assert_bits_equal(out[b], alone(variant)[b][-rows:], f"{name}, sequence {b}")

    check(attend(q, k, v, mask, **options), "dynamic cache")
    unused = [torch.cat([x, torch.full_like(x[:, :, :50], torch.nan)], 2) for x in (k, v)]
    check(attend(q, *unused, mask, **options), "static cache")
    for b in usable:
        qkv = sequences()[b]
        out = attend(qkv[0][:, :, -rows:], *qkv[1:], **options)
        assert_bits_equal(out[0], alone(variant)[b][-rows:], f"no padding, sequence {b}")
    if "sliding_window" in options:
        kept = options["sliding_window"] + rows - 1
        rolled = attend(q, k[:, :, -kept:], v[:, :, -kept:], mask, **options)
        check(rolled, "rolling cache")
        # Without the dropped slots in the mask the first kept key would count as position 0, and the blocks move.
        rebased = attend(q, k[:, :, -kept:], v[:, :, -kept:], mask[:, -kept:], **options)
        assert bits_differ(rebased, rolled) > 0, "too tame to notice that positions moved"


def test_torch_attention_depends_on_the_batch():
    """The negative control of the tests above: the same sequences through torch's own attention."""
    columns, width = columns_of("right")
    q, k, v, mask = place(columns, width)
    sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=0.5, enable_gqa=True)
    batched = sdpa(*(x.nan_to_num() for x in (q, k, v)), attn_mask=mask[:, None, None, :])
    differing = sum(
        bits_differ(batched[b, :, :n], sdpa(*qkv)[0]) for b, (n, qkv) in enumerate(zip(LENGTHS, sequences()))
    )
    assert differing > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    columns, width = columns_of("left")
    q, k, v, mask = place(columns, width)
    out = attend(*(x.to(dtype) for x in (q, k, v)), mask, is_causal=True)
    assert out.dtype == dtype
    for b, qkv in enumerate(sequences()):
        expected = attend(*(x.to(dtype) for x in qkv), is_causal=True)[0]
        assert_bits_equal(out[b, columns[b]], expected, f"sequence {b}")


# ---------------------------------------------------------------------------------------------------------------------
# the mask function


def masks_of(create, **kwargs):
    """(what we make, what eager makes) for one call of a transformers mask factory."""
    made = []
    for implementation in (hf.NAME, "eager"):
        config = transformers.LlamaConfig(sliding_window=4, attention_chunk_size=4)
        config._attn_implementation = implementation
        arguments = {"attention_mask": None, "past_key_values": None, "inputs_embeds": torch.zeros(3, 9, 8), **kwargs}
        made.append(create(config=config, **arguments))
    return made


def test_no_mask_is_made_when_none_is_needed():
    for create in (
        masking_utils.create_causal_mask,
        masking_utils.create_sliding_window_causal_mask,
        masking_utils.create_bidirectional_mask,
        masking_utils.create_bidirectional_sliding_window_mask,
    ):
        for attention_mask in (None, torch.ones(3, 9, dtype=torch.long)):
            ours, _ = masks_of(create, attention_mask=attention_mask)
            assert ours is None


def test_a_prepared_mask_passes_the_factories_unchanged():
    """generate() prepares masks for static caches, and the model asks its factories again with the result."""
    ours, _ = masks_of(masking_utils.create_causal_mask, attention_mask=padding("left"))
    assert ours.shape == (3, 1, 1, 9)
    again, _ = masks_of(masking_utils.create_causal_mask, attention_mask=ours)
    assert again is ours


def test_rules_that_amount_to_an_expressible_one_are_accepted():
    causal = masking_utils.create_causal_mask
    ours, _ = masks_of(causal, or_mask_function=lambda b, h, q, kv: kv < q)
    assert ours is None
    ours, _ = masks_of(causal, block_sequence_ids=torch.full((3, 9), -1))
    assert ours is None


@pytest.mark.parametrize(
    "kwargs",
    [
        {"or_mask_function": lambda b, h, q, kv: kv <= q + 1},
        {"and_mask_function": lambda b, h, q, kv: kv != 2},
        {"block_sequence_ids": torch.tensor([[-1, -1, 0, 0, 0, -1, -1, 1, 1]]).expand(3, -1)},
        # The rule would show only in a padded column, where it does not matter, and in one more.
        {"or_mask_function": lambda b, h, q, kv: kv >= 7, "attention_mask": padding("right")},
    ],
)
@pytest.mark.parametrize("create", ["create_causal_mask", "create_sliding_window_causal_mask"])
def test_rules_that_cannot_be_expressed_are_refused(create, kwargs):
    with pytest.raises(NotImplementedError, match="asks for another pattern"):
        masks_of(getattr(masking_utils, create), **kwargs)


def test_chunked_attention():
    """Chunks that no key falls out of are plain causal attention; others are refused, by transformers itself."""
    ours, _ = masks_of(masking_utils.create_chunked_causal_mask, inputs_embeds=torch.zeros(3, 4, 8))
    assert ours is None
    with pytest.raises(ValueError, match="chunked"):
        masks_of(masking_utils.create_chunked_causal_mask)


def test_every_layer_shares_one_plan(monkeypatch):
    calls = []
    planned = masks.plan_keys
    monkeypatch.setattr(masks, "plan_keys", lambda *arguments: calls.append(1) or planned(*arguments))
    with torch.no_grad():
        model("modernbert", hf.NAME)(tokens(), attention_mask=padding("left"))
    assert len(calls) == 2  # one for the full and one for the window layers, of four


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


def qkv(length=9):
    g = torch.Generator().manual_seed(5)
    return [torch.randn(2, heads, length, D, generator=g) for heads in (HQ, HK, HK)]


def checkerboard(n=9):
    index = torch.arange(n)
    return ((index[:, None] + index) % 2 == 0)[None, None]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": 0.1}, NotImplementedError, "dropout"),
        ({"output_attentions": True}, NotImplementedError, "eager"),
        ({"position_bias": torch.zeros(1, HQ, 9, 9)}, NotImplementedError, "position_bias"),
        ({"s_aux": torch.zeros(2, HQ, 9, 1)}, NotImplementedError, "one logit per query head"),
        ({"mask": checkerboard()}, NotImplementedError, "not causal attention with padding"),
        ({"mask": checkerboard(), "is_causal": False}, NotImplementedError, "not full attention with padding"),
        ({"mask": torch.full((2, 1, 9, 9), -0.5)}, NotImplementedError, "other biases"),
        ({"mask": torch.full((2, 1, 9, 9), torch.nan)}, NotImplementedError, "other biases"),
        ({"mask": torch.rand(2, HQ, 9, 9) < 0.5}, NotImplementedError, "same for all heads"),
        ({"mask": torch.ones(2, 9, 9, dtype=torch.bool)}, NotImplementedError, "2 or 4 dimensions"),
        (
            {"mask": torch.ones(1, 1, 9, 9, dtype=torch.bool).tril(), "sliding_window": 4},
            NotImplementedError,
            "padding mask of the keys alone",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 18])}, ValueError, "together"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 18]), "cu_seq_lens_k": torch.tensor([0, 18]), "mask": torch.ones(2, 9)},
            ValueError,
            "not both",
        ),
        (
            {"mask": torch.tensor([[1, 0, 1] * 5] * 2).bool(), "sliding_window": 4},
            NotImplementedError,
            "dropped keys by counting",
        ),
        ({"mask": torch.tensor([[1] * 3 + [2] * 3] * 2)}, NotImplementedError, "as many query rows as keys"),
    ],
)
def test_refused(options, error, message):
    with pytest.raises(error, match=message):
        attend(*qkv(), **{"is_causal": True, **options})


def test_training_is_refused():
    m = build("llama", hf.NAME)
    with pytest.raises(NotImplementedError, match="no_grad"):
        m(tokens())
    m.config.attention_dropout = 0.1
    for layer in m.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with torch.no_grad(), pytest.raises(NotImplementedError, match="dropout"):
        m.train()(tokens())


@pytest.mark.parametrize("name", [hf.NAME, hf.ALIAS])
def test_models_that_do_not_say_what_they_compute_are_refused(name):
    config = transformers.T5Config(d_model=32, d_kv=8, num_heads=4, num_layers=1, d_ff=32, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match=f'T5Model cannot use attn_implementation="{name}"'):
        transformers.T5Model._from_config(config, attn_implementation=name)


# ---------------------------------------------------------------------------------------------------------------------
# registration


def test_both_names_are_one_implementation():
    ours, alias = model("llama", hf.NAME), model("llama", hf.ALIAS)
    assert ours.config._attn_implementation == alias.config._attn_implementation == "flash_attn_det"
    with torch.no_grad():
        for mask in (None, padding("left")):
            first, second = (m(tokens(), attention_mask=mask).logits for m in (ours, alias))
            assert_bits_equal(first, second)
    assert "flash" not in hf.ALIAS


def test_set_attn_implementation_goes_there_and_back():
    m = build("llama", "sdpa")
    with torch.no_grad():
        before = m(tokens(), attention_mask=padding("left")).logits
        m.set_attn_implementation(hf.ALIAS)
        assert m.config._attn_implementation == hf.NAME
        ours = m(tokens(), attention_mask=padding("left")).logits
        m.set_attn_implementation("sdpa")
        assert m.config._attn_implementation == "sdpa"
        assert_bits_equal(m(tokens(), attention_mask=padding("left")).logits, before)
    assert worst(ours, before, padding("left")) <= TOLERANCE


def test_the_flash_trap():
    """What transformers does to a name with "flash" in it, and that ours gets by."""
    m = model("llama", "eager")
    original = modeling_utils.PreTrainedModel._check_and_adjust_attn_implementation.__wrapped__
    with pytest.raises(ValueError, match="Could not find the currently requested flash attention implementation"):
        original(m, hf.NAME)
    assert m._check_and_adjust_attn_implementation(hf.NAME) == hf.NAME
    # gpt-oss lists compatible hub kernels, by which any other flash implementation is replaced.
    assert hf.NAME not in transformers.GptOssForCausalLM._compatible_flash_implementations
    assert model("gpt_oss", hf.NAME).config._attn_implementation == hf.NAME


def test_registration_is_idempotent():
    check = modeling_utils.PreTrainedModel.get_correct_attn_implementation
    finders = list(sys.meta_path)
    integrations.install()
    hf.register()
    assert modeling_utils.PreTrainedModel.get_correct_attn_implementation is check
    assert sys.meta_path == finders
    assert sum(isinstance(finder, integrations._PostImportFinder) for finder in finders) == 1


def test_an_older_transformers_is_left_alone(monkeypatch):
    older = types.SimpleNamespace(AttentionInterface=modeling_utils.AttentionInterface)
    assert "transformers 5.x is needed" in hf.unsupported_reason(older)
    monkeypatch.setattr(hf, "register", lambda: pytest.fail("registered"))
    integrations._register_transformers(older)
    monkeypatch.undo()
    monkeypatch.delattr(modeling_utils.PreTrainedModel, "get_correct_attn_implementation")
    with pytest.raises(ImportError, match=r"transformers 5\.x is needed"):
        hf.register()


def run_python(code):
    path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=PACKAGE_PARENT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


USE = """
def use(name):
    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64, vocab_size=9)
    model = transformers.BertModel._from_config(config, attn_implementation=name).eval()
    with torch.no_grad():
        return model(torch.ones(1, 3, dtype=torch.long)).last_hidden_state
"""


def test_imported_before_transformers():
    result = run_python(
        USE
        + """
import sys
import flash_attn_det
assert "transformers" not in sys.modules, "import flash_attn_det must not import transformers"
import importlib, inspect, torch, transformers
for name in ("flash_attn_det", "deterministic_attention", "sdpa"):
    use(name)
module = sys.modules["transformers.modeling_utils"]
# Nothing of the hook stays behind on the module.
assert type(module.__loader__) is importlib.machinery.SourceFileLoader
assert module.__spec__.loader is module.__loader__
assert "class PreTrainedModel" in inspect.getsource(module)
importlib.reload(module)
assert "flash_attn_det" in module.ALL_ATTENTION_FUNCTIONS
"""
    )
    assert result.returncode == 0, result.stderr


def test_imported_after_transformers_and_nothing_else_changes():
    result = run_python(
        USE
        + """
import sys, torch, transformers
from transformers import masking_utils, modeling_utils

def message(name):
    try:
        use(name)
    except Exception as error:
        return type(error), str(error)

def state():
    torch.manual_seed(0)
    outputs = []
    for name in ("eager", "sdpa", None):
        torch.manual_seed(0)
        outputs.append(use(name).view(torch.int32).tolist())
    ours = {"flash_attn_det", "deterministic_attention"}
    registries = [{k: v for k, v in registry._global_mapping.items() if k not in ours} for registry in (
        modeling_utils.AttentionInterface, masking_utils.AttentionMaskInterface)]
    refused = [message(name) for name in ("flash_attention_2", "flash_attn_other", "no such name", "kernels-x/y")]
    assert None not in refused
    return outputs, registries, refused

before = state()
assert message("flash_attn_det") is not None
import flash_attn_det
assert state() == before
use("flash_attn_det")
use("deterministic_attention")
"""
    )
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# documentation


def test_code_in_the_documentation_runs():
    text = (ROOT / "docs" / "huggingface.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "docs/huggingface.md", "exec"), namespace)
