"""flash-attn-det fuzz: its calls are varied and can be repeated, and it finds a difference that was planted."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

from flash_attn_det import _schedule, cli
from flash_attn_det.commands import CannotRun, fuzz
from flash_attn_det.commands.fuzz_calls import draw_call
from flash_attn_det.testing import assert_bits_equal, bits_differ

COST = 1 << 18
CALLS = [draw_call(5, number, COST) for number in range(200)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_vectors = pytest.mark.skipif(len(_schedule.isas()) < 2, reason="needs a second instruction set")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """Calls of milliseconds, on the CPU also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(fuzz.COST, "cpu", COST)


def plant(monkeypatch: pytest.MonkeyPatch, name: str, victim: int):
    """The last bit of one element of a result is flipped in call ``victim``, on every instruction set but the first."""
    compute, place = fuzz.compute, []

    def planted(call, arithmetic, backward):
        results = compute(call, arithmetic, backward)
        if schedules and call.label == draw_call(7, victim, COST).label:
            bits = results[name].contiguous().view(torch.int16).flatten()
            bits[len(bits) // 2] ^= 1
            results[name] = bits.view(results[name].dtype).view(results[name].shape)
            place.append(len(bits) // 2)
        return results

    schedules = []
    forced = _schedule.forced

    def watched(**schedule):
        schedules.append(schedule)
        return forced(**schedule)

    monkeypatch.setattr(fuzz._schedule, "forced", watched)
    monkeypatch.setattr(fuzz, "compute", planted)
    monkeypatch.setattr(fuzz, "emulated", lambda *arguments: undisturbed(compute, *arguments))


def undisturbed(compute, seed, first, cost, arithmetic, backward, threads):
    number = first
    while True:
        call = draw_call(seed, number, cost)
        yield number, call, compute(call, arithmetic, backward)
        number += 1


@needs_vectors
@pytest.mark.parametrize("options", [[], ["--backward"]], ids=["forward", "backward"])
def test_scalar_emulation_is_the_one_with_vectors(small, options, capsys):
    assert cli.main(["fuzz", "--rows", "3e3", "--threads", "2", *options]) == 0
    printed = capsys.readouterr().out
    rows, calls = (int(text.replace(",", "")) for text in re.findall(r"([\d,]+) rows of ([\d,]+) calls", printed)[-1])
    assert rows >= 3000
    assert calls > 1
    assert int(re.search(r"Rows that are finite and not zero: (\d+)%", printed)[1]) > 20


@pytest.mark.parametrize(("name", "options"), [("out", []), ("dk", ["--backward"])], ids=["forward", "backward"])
def test_planted_difference_is_found_and_can_be_repeated(small, name, options, monkeypatch, capsys):
    plant(monkeypatch, name, victim=2)
    assert cli.main(["fuzz", "--rows", "1e6", "--seed", "7", *options]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"FAILED after [\d,]+ rows of 2 calls.*; then call 2, .*\n.*{name}: 1 of \d+ elements", printed)
    (again,) = re.findall(r"repeat with: flash-attn-det (.*)", printed)
    assert again.split()[:7] == ["fuzz", "--device", "cpu", "--seed", "7", "--first", "2"]
    assert cli.main(again.split()) == 1
    assert "FAILED after 0 rows of 0 calls" in capsys.readouterr().out


def test_inputs_that_prove_nothing_fail(small, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "bits_differ", lambda a, b: 0)
    assert cli.main(["fuzz", "--rows", "1"]) == 1
    assert "the inputs prove nothing" in capsys.readouterr().out


def test_a_call_depends_on_seed_and_number_alone():
    for number in (0, 7, 150):
        again = draw_call(5, number, COST)
        assert again.label == CALLS[number].label
        for a, b in zip((again.q, again.k, again.v), (CALLS[number].q, CALLS[number].k, CALLS[number].v), strict=True):
            assert_bits_equal(a, b)
    assert draw_call(6, 7, COST).label != CALLS[7].label


def test_calls_are_of_every_kind():
    options = [name for call in CALLS for name, value in call.options.items() if value is not None]
    assert set(options) == {
        "causal", "split_size", "window", "softcap", "alibi_slopes", "sinks", "k_pos", "leftpad_k", "seqused_k",
        "seqused_q", "scale",
    }  # fmt: skip
    assert {call.q.dtype for call in CALLS} == {torch.float16, torch.bfloat16}
    assert {call.packed is None for call in CALLS} == {True, False}
    groups = {call.q.shape[-2] // call.k.shape[-2] for call in CALLS}
    assert {1, 4, 7} <= groups
    assert any(call.options.get("scale") is None for call in CALLS)
    assert any((call.options.get("scale") or 0) < 0 for call in CALLS)
    dims = {call.q.shape[-1] for call in CALLS}
    assert {64, 128, 256} <= dims
    assert any(dim % 8 for dim in dims)
    assert {call.dlse.ndim > 1 for call in CALLS} == {True, False}
    wild = [not all(x.isfinite().all() for x in (call.q, call.k, call.v, call.dout)) for call in CALLS]
    assert wild == ["Inf or NaN" in call.label for call in CALLS]
    assert 0 < sum(wild) < len(CALLS) / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_numbers_reach_both_ends_and_are_finite(dtype):
    tame = [call for call in CALLS if "Inf or NaN" not in call.label]
    tensors = [x for call in tame for x in (call.q, call.k, call.v) if x.dtype == dtype]
    assert all(x.isfinite().all() for x in tensors)
    finfo = torch.finfo(dtype)
    assert any((x.abs().amax() > finfo.max / 8).item() for x in tensors)
    assert any(((x != 0) & (x.abs() < finfo.tiny)).any().item() for x in tensors)


def test_results_without_the_padding_of_head_dims(monkeypatch):
    """As on a GPU, where a head dim of 24 + 4 becomes 32."""
    call = next(call for call in CALLS if call.q.shape[-1] % 8 and call.packed is None)
    want = fuzz.compute(call, "mma_sm90", True)
    monkeypatch.setattr(fuzz.ops, "on_tensor_cores", lambda q, arithmetic: True)
    got = fuzz.compute(call, "mma_sm90", True)
    for name in want:
        assert_bits_equal(got[name], want[name], name)
    assert bits_differ(want["lse"], fuzz.compute(call, "fma", False)["lse"]) > 0


@pytest.mark.parametrize(("capability", "here"), [((9, 0), "mma_sm90"), ((8, 6), "mma_sm80")])
def test_a_gpu_is_compared_with_the_emulation_of_its_own_tensor_cores(monkeypatch, capability, here):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        assert fuzz.arithmetics("cuda") == ("mma", here)


def test_a_gpu_whose_tensor_cores_are_not_known_cannot_be_fuzzed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    with FakeTensorMode(), pytest.raises(CannotRun, match=r"compute capability 10\.0, expected 9\.0 or 8\.x"):
        fuzz.arithmetics("cuda")


@needs_gpu
@pytest.mark.parametrize("options", [[], ["--backward"]], ids=["forward", "backward"])
def test_gpu_gives_the_bits_of_its_emulation(options, capsys):
    assert cli.main(["fuzz", "--device", "cuda", "--rows", "2e5", "--seed", "1", *options]) == 0
    assert "all bits equal" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0", "-5", "many", "inf"])
def test_rows_must_be_a_positive_number(text, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fuzz", "--rows", text])
    assert stop.value.code == 2
    assert "--rows" in capsys.readouterr().err
