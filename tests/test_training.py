"""A small character model learns the README: two runs, also under another schedule of attention, are the same bits."""

from pathlib import Path

import pytest
import torch
from torch import nn

import flash_attn_det as fad
from flash_attn_det import _schedule
from flash_attn_det.testing import assert_bits_equal, bits_differ

TEXT = (Path(__file__).resolve().parents[1] / "README.md").read_text()
LETTERS = sorted(set(TEXT))
LENGTH, BATCH, WIDTH, HEADS = 96, 8, 32, 4
STEPS = 120


class Block(nn.Module):
    """Pre-norm attention with a window, grouped heads and a sink, then a perceptron."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.sinks = nn.Parameter(torch.zeros(HEADS))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        h = self.norms[0](x)
        q = self.q(h).unflatten(-1, (HEADS, -1))
        k, v = self.kv(h).unflatten(-1, (HEADS, -1)).chunk(2, -2)  # half as many heads
        x = x + self.attention(q, k, v, self.sinks).flatten(-2)
        return x + self.mlp(self.norms[1](x))


def ours(q, k, v, sinks):
    return fad.attn(q, k, v, causal=True, window=(70, -1), sinks=sinks)


def train(attention=ours, steps=STEPS):
    """Losses of all steps, and the weights after the last."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "letters": nn.Embedding(len(LETTERS), WIDTH),
            "places": nn.Embedding(LENGTH, WIDTH),
            "blocks": nn.Sequential(Block(attention), Block(attention)),
            "head": nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(LETTERS))),
        }
    )
    text = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1)) + torch.arange(LENGTH + 1)
        window = text[starts]
        x = model["letters"](window[:, :-1]) + model["places"].weight
        logits = model["head"](model["blocks"](x))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), [p.detach() for p in model.parameters()]


@pytest.fixture(scope="module")
def first_run():
    return train()


def test_it_learns(first_run):
    losses, weights = first_run
    assert losses[-10:].mean() < 0.75 * losses[:3].mean()
    assert all(w.isfinite().all() for w in weights)


def test_n14_a_second_run_is_the_same_bits(first_run):
    losses, weights = train()
    assert_bits_equal(losses, first_run[0], "losses")
    for got, want in zip(weights, first_run[1], strict=True):
        assert_bits_equal(got, want, "weights")


def test_n14_schedules_of_attention_do_not_reach_the_weights():
    """Another instruction set and tile for attention alone: linear layers keep theirs."""
    with _schedule.forced(isa=_schedule.isas()[-1], tile_rows=64, split_parallel=True):
        losses, weights = train(steps=20)
    want_losses, want_weights = train(steps=20)
    assert_bits_equal(losses, want_losses, "losses")
    for got, want in zip(weights, want_weights, strict=True):
        assert_bits_equal(got, want, "weights")


def test_the_bits_of_the_attention_reach_the_weights():
    """The control: the same model with attention that rounds otherwise, because a split ends amid its keys."""

    def in_two_splits(q, k, v, sinks):
        moved = torch.full((q.shape[0],), 80, dtype=torch.int32)
        return fad.attn(q, k, v, causal=True, window=(70, -1), sinks=sinks, k_pos=moved, split_size=128)

    losses, weights = train(steps=20)
    other_losses, other_weights = train(in_two_splits, steps=20)
    assert sum(bits_differ(one, other) for one, other in zip(weights, other_weights, strict=True)) > 0
    assert (losses - other_losses).abs().max() < 1e-2
