"""Whole transformers models with our attention against eager attention."""

import copy
import functools

import pytest
import torch
from hf_tools import (
    CONFIGS,
    ENCODERS,
    TOLERANCE,
    VOCABULARY,
    build,
    decoder,
    model,
    padding,
    tokens,
    transformers,
    worst,
)

from flash_attn_det.integrations import huggingface as hf
from flash_attn_det.testing import assert_bits_equal


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


def test_vision_tower_without_packing():
    """Siglip: a batch of images, no mask."""
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=4
    )
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    outputs = {}
    for implementation in ("eager", hf.NAME):
        torch.manual_seed(0)
        tower = transformers.SiglipVisionModel._from_config(copy.deepcopy(config), attn_implementation=implementation)
        with torch.no_grad():
            outputs[implementation] = tower.eval()(pixels).last_hidden_state
    assert worst(outputs[hf.NAME], outputs["eager"]) <= TOLERANCE


@functools.cache
def llava(implementation):
    """A CLIP tower in front of a Llama decoder: 9 image tokens of 12 x 12 pixels."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=12,
        patch_size=4,
        projection_dim=32,
    )
    text = transformers.LlamaConfig(**decoder())
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=1, image_seq_length=9)
    return transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()


def llava_of_parts():
    m = copy.deepcopy(llava("eager"))
    m.set_attn_implementation({"vision_config": "sdpa", "text_config": hf.NAME})
    return m


@torch.no_grad()
@pytest.mark.parametrize("implementation", [hf.NAME, "parts"])
def test_vision_language_model(implementation):
    """Both parts, or the decoder alone; the second prompt is padded on the left."""
    ids = torch.cat([torch.ones(2, 9, dtype=torch.long), tokens(2, 6)], 1)
    ids = torch.cat([tokens(2, 3), ids], 1)
    mask = torch.ones_like(ids)
    ids[1, :3] = mask[1, :3] = 0
    pixels = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    m = llava_of_parts() if implementation == "parts" else llava(hf.NAME)
    assert m.config.text_config._attn_implementation == hf.NAME
    assert m.config.vision_config._attn_implementation == (hf.NAME if implementation == hf.NAME else "sdpa")
    expected = llava("eager")(**inputs).logits
    assert worst(m(**inputs).logits, expected, mask) <= TOLERANCE
    assert worst(llava("eager")(**{**inputs, "pixel_values": -pixels}).logits, expected, mask) > 1e-2
    arguments = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(m.generate(**inputs, **arguments), llava("eager").generate(**inputs, **arguments))


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
