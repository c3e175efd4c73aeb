"""Tiny random transformers models, and what the tests of the HuggingFace integration share."""

import copy
import functools
import importlib

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", minversion="5.0", reason="needs transformers >= 5: pip install 'flash-attn-det[hf]'"
)

importlib.import_module("transformers.modeling_utils")  # as every model does: it registers flash_attn_det

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
