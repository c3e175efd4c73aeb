"""HuggingFace models on the CPU: the gradients of every weight, against eager attention; twice the same bits."""

import pytest
import torch
from hf_tools import CONFIGS, build, padding, tokens

import flash_attn_det.integrations.huggingface as hf
from flash_attn_det.testing import assert_bits_equal


def weight_gradients(name, implementation, mask):
    """Gradients of a loss over the tokens that are not padding, by the weight's name."""
    model = build(name, implementation)
    out = model(tokens(), attention_mask=mask)[0]
    kept = torch.ones(out.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    out[kept].square().mean().backward()
    return {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_the_weights(name, side):
    mask = None if side is None else padding(side)
    ours, eager = weight_gradients(name, hf.NAME, mask), weight_gradients(name, "eager", mask)
    assert ours.keys() == eager.keys()
    for key, want in eager.items():
        assert (ours[key] - want).abs().max() <= 1e-3 * want.abs().max() + 1e-5, key
    again = weight_gradients(name, hf.NAME, mask)
    for key, want in ours.items():
        assert_bits_equal(again[key], want, key)
