"""Generation with transformers against eager attention: caches, pieces, beams, packed prompts, continuous batching."""

import pytest
import torch
from hf_tools import DECODERS, TOLERANCE, build, model, padding, tokens, transformers, worst

from flash_attn_det.integrations import huggingface as hf


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
@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
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
@pytest.mark.parametrize("name", DECODERS)
def test_continuous_batching(name, monkeypatch):
    """Requests of different lengths, packed, from a paged cache; layers with windows keep only the last of the keys."""
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
    if getattr(model(name, hf.NAME).config, "sliding_window", None):
        # The last step of the longest request reads positions 23 .. 26: 20 + 8 - 1 tokens, a window of 4.
        assert max(int(p.max()) for p in positions) == 23
    else:
        assert not positions
