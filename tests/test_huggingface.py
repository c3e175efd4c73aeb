"""transformers: how our names are registered, what they leave alone, and what they refuse."""

import os
import pathlib
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from hf_tools import TOLERANCE, VOCABULARY, build, model, padding, tokens, transformers, worst
from transformers import modeling_utils

import flash_attn_det
from flash_attn_det import integrations
from flash_attn_det.integrations import huggingface as hf
from flash_attn_det.testing import assert_bits_equal

PACKAGE_PARENT = pathlib.Path(flash_attn_det.__file__).parent.parent
HQ, HK, D = 4, 2, 24
MODULE = types.SimpleNamespace()


def attend(q, k, v, mask=None, **options):
    return hf.deterministic_attention(MODULE, q, k, v, mask, scaling=0.5, **options)[0]


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


def test_dropout_is_refused():
    m = build("llama", hf.NAME)
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
