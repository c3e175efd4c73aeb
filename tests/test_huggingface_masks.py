"""The mask function that transformers calls: when no mask is needed, what is recognised, what is refused."""

import pytest
import torch
from hf_tools import model, padding, tokens, transformers
from transformers import masking_utils

from flash_attn_det import masks
from flash_attn_det.integrations import huggingface as hf


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


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("size", [None, 4])
def test_packed_rules_of_every_transformers_are_recognised(older, size, monkeypatch):
    """Older ones have no function that also maps positions."""
    mu, segments = masking_utils, torch.tensor([[0, 0, 1], [0, 1, 1]])
    rule = mu.causal_mask_function if size is None else mu.sliding_window_causal_mask_function(size)
    if older:
        monkeypatch.delattr(mu, "packed_sequence_compatibility_function", raising=False)
        packed = mu.and_masks(rule, mu.packed_sequence_mask_function(segments))
    elif hasattr(mu, "packed_sequence_compatibility_function"):
        packed = mu.packed_sequence_compatibility_function(rule, torch.arange(3).expand(2, 3), segments)
    else:
        pytest.skip("this transformers is an older one")
    found, numbers = hf._recognise(packed, size)
    assert found == "causal"
    assert numbers is segments
    assert hf._recognise(mu.and_masks(rule, lambda b, h, q, kv: kv != 2), size) == (None, None)


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
