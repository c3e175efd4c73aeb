"""flash-attn-det verify: every claim that it makes holds, and it fails when it should."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_tools import (
    CEILINGS,
    CUDA_DECODE,
    SMALL_DECODE,
    results,
)

import flash_attn_det as fad
from flash_attn_det import cli
from flash_attn_det.commands import (
    backends,
    claims_cuda,
    claims_gradients,
    contest,
    invariance,
    machine,
    tables,
    verify,
)
from flash_attn_det.commands.libraries import Library, Ours, Rows, Torch, join
from flash_attn_det.testing import assert_bits_equal

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ROWS = torch.arange(24, dtype=torch.float32).reshape(1, 2, 3, 4)


def rows(changed: bool = False) -> Rows:
    out = ROWS.clone()
    if changed:
        out[0, 1, 2, 3] += 1
    return Rows(out, torch.zeros(1, 3, 2))


def check(*, differs: bool = False, tame: bool = False) -> invariance.Check:
    """A check whose variant differs in one element, or whose other split size gives the same bits."""

    def expected(library: Library) -> Rows:
        return rows(changed=library.split_size == backends.BLOCK and not tame)

    comparison = invariance.Comparison("a setting", expected, lambda library: [rows(changed=differs)], None)
    return invariance.Check("a claim", lambda backend: [comparison])


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch):
    """verify with a second's worth of work, on the CPU also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(verify.CHECKS, backends.CPU, [check()])
    monkeypatch.setattr(verify, "accuracy_cases", lambda backend: [verify.Accuracy("short", torch.bfloat16, 40, 40)])
    monkeypatch.setattr(verify, "CPU_TIMED", [SMALL_DECODE])
    monkeypatch.setattr(machine, "fma_peak", lambda threads: 1e11)


CLAIMS = [pytest.param(backends.CPU, claim, id=claim.title) for claim in verify.CHECKS[backends.CPU]] + [
    pytest.param(backend, claim, id=f"cuda {backend.arithmetic}: {claim.title}", marks=needs_gpu)
    for backend in backends.BACKENDS["cuda"]
    for claim in verify.CHECKS[backend]
]


@pytest.mark.parametrize(("backend", "claim"), CLAIMS)
def test_n1_every_claim_of_verify_holds(backend: backends.Backend, claim: invariance.Check):
    if not claim.claimed():
        pytest.skip("needs a GPU of compute capability 9.0")
    outcome = invariance.evaluate(claim, backend)
    assert outcome.failures == []
    assert outcome.passed
    assert outcome.compared > 1000
    assert outcome.other_split_share > 0


@pytest.mark.parametrize(
    "backend", [backends.CPU, pytest.param(backends.CUDA_MMA, marks=needs_gpu)], ids=lambda backend: backend.device
)
def test_torch_fails_the_claims_that_it_can_be_asked(backend: backends.Backend):
    """The inputs have teeth beyond our own control: torch's attention changes bits on them."""
    title = "prefill row = decode = last of 5 speculative rows"
    (claim,) = (claim for claim in verify.CHECKS[backend] if claim.title == title)
    assert invariance.evaluate(claim, backend).torch_share > 0.01


def test_every_backend_has_the_common_claims_and_its_own():
    titles = {backend: [claim.title for claim in claims] for backend, claims in verify.CHECKS.items()}
    assert set(titles) == {backend for group in backends.BACKENDS.values() for backend in group}
    for names in titles.values():
        assert len(set(names)) == len(names)
        assert "batch of 8 = 4 + 4 = 1 + 7 = eight calls" in names
    assert "instruction sets" in titles[backends.CPU]
    assert "CUDA graph replays" in titles[backends.CUDA_MMA]
    assert set(titles[backends.CUDA_FMA]) - set(titles[backends.CUDA_MMA]) == {"GPU = CPU", "gradients: GPU = CPU"}
    for names in titles.values():
        assert "gradients: run to run" in names


@needs_gpu
def test_settings_have_the_same_numbers_on_every_device():
    for setting in backends.CUDA_FMA.all:
        for here, there in zip(replace(setting, device="cpu").tensors(1), setting.tensors(1), strict=True):
            assert there.device.type == "cuda"
            assert torch.equal(here, there.cpu())


def test_difference_fails_a_check():
    outcome = invariance.evaluate(check(differs=True), backends.CPU)
    assert not outcome.passed
    assert (outcome.differ, outcome.compared) == (1, 30)
    assert outcome.failures == ["a setting, variant 0: 1 of 30 elements differ"]


def test_tame_inputs_fail_a_check():
    outcome = invariance.evaluate(check(tame=True), backends.CPU)
    assert not outcome.passed
    assert outcome.failures == ["a setting: another split size gives the same bits, nothing is proven"]


def moved_to_the_cpu(backend: backends.Backend, arithmetic: str) -> backends.Backend:
    """Its settings, with an arithmetic that the CPU has."""
    groups = {
        name: tuple(replace(setting, device="cpu") for setting in getattr(backend, name))
        for name in ("decode", "prefill", "everything")
    }
    return replace(backend, device="cpu", arithmetic=arithmetic, **groups)


@pytest.mark.parametrize("claim", claims_gradients.CHECKS, ids=lambda claim: claim.title)
def test_n14_claims_on_gradients_hold_of_the_emulated_gpu(claim: invariance.Check):
    """Also: their inputs have teeth, so that a GPU can fail them."""
    backend = moved_to_the_cpu(backends.CUDA_MMA, "mma_sm90")
    outcome = invariance.evaluate(claim, replace(backend, prefill=backend.prefill[:2]))  # others take a minute
    assert outcome.failures == []
    assert outcome.other_split_share > 0


def test_difference_of_gradients_fails_a_check(monkeypatch: pytest.MonkeyPatch):
    """dk that depends on the number of sequences in the call, by its last bit in one element."""
    differentiate = claims_gradients.differentiate

    def wrong(attend, *inputs):
        found = differentiate(attend, *inputs)
        if len(inputs[0]) == 7:
            found.dk.view(torch.int16 if found.dk.element_size() == 2 else torch.int32)[0, 0, 0, 0] ^= 1
        return found

    monkeypatch.setattr(claims_gradients, "differentiate", wrong)
    outcome = invariance.evaluate(claims_gradients.CHECKS[0], backends.CPU)
    assert outcome.differ == len(claims_gradients.settings(backends.CPU))
    assert not outcome.passed


def test_gradients_of_a_claim_are_those_of_autograd():
    setting = backends.CPU.prefill[0]
    q, k, v, dout = claims_gradients.inputs_of(setting, 2)
    with torch.inference_mode():
        found = claims_gradients.whole(setting, 2)(Ours("fma", backends.SPLIT))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = fad.attn(*leaves, causal=True, split_size=backends.SPLIT)
    for got, want in zip(found, torch.autograd.grad(out, leaves, dout), strict=True):
        assert_bits_equal(got, want)


def test_a_cpu_is_told_to_emulate():
    assert claims_cuda.on_the_cpu(Ours("mma", 128)) == Ours("mma_sm90", 128)
    assert claims_cuda.on_the_cpu(Ours("fma", 128)) == Ours("fma", 128)
    assert claims_cuda.on_the_cpu(Torch()) == Torch()


def test_what_is_not_claimed_is_not_checked(short, monkeypatch: pytest.MonkeyPatch, capsys):
    unclaimed = replace(check(differs=True), claimed=lambda: False)
    monkeypatch.setitem(verify.CHECKS, backends.CPU, [check(), unclaimed])
    assert cli.main(["verify"]) == 0
    assert "[ 1/1] fma, a claim" in capsys.readouterr().out


def test_difference_of_zeros_counts():
    zeros = Rows(torch.zeros(1, 1, 1, 2), None)
    negative = Rows(-torch.zeros(1, 1, 1, 2), None)
    assert invariance.differing(zeros, negative) == (2, 2)


def test_join_undoes_cutting():
    whole = rows()
    assert invariance.differing(whole, join([whole.queries(slice(0, 1)), whole.queries(slice(1, 2))], "queries")) == (
        0,
        30,
    )
    heads = [Rows(whole.out[:, :, h : h + 1], whole.lse[:, h : h + 1]) for h in range(3)]
    assert invariance.differing(whole, join(heads, "heads")) == (0, 30)
    assert join([whole, whole], "sequences").out.shape == (2, 2, 3, 4)


@pytest.mark.parametrize("causal", [False, True])
def test_torch_control_computes_the_same_attention(causal: bool):
    """A control that computed something else would differ for a reason that proves nothing."""
    setting = backends.Setting("", torch.float64, 20, 70, Hq=8, Hk=2)
    q, k, v = setting.tensors(3)
    lengths = torch.tensor([70, 33, 20], dtype=torch.int32)
    left = 70 - lengths
    for options in ({}, {"window": (9, -1)}, {"seqused_k": lengths}, {"leftpad_k": left}):
        ours = Ours("fma", backends.SPLIT).attend(q, k, v, causal=causal, **options).out
        torchs = Torch().attend(q, k, v, causal=causal, **options).out
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-12)
    parts = [[x[b, : lengths[b]] for b in range(3)] for x in (k.repeat_interleave(4, 2), k, v)]
    for ours, torchs in zip(
        Ours("fma", backends.SPLIT).packed(*parts, causal=False), Torch().packed(*parts, causal=False), strict=True
    ):
        torch.testing.assert_close(ours.out, torchs.out, rtol=0, atol=1e-12)


def test_verify_passes_and_writes_markdown(short, tmp_path: Path, capsys: pytest.CaptureFixture):
    target = tmp_path / "results.md"
    assert cli.main(["verify", "--markdown", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "[ 1/1] fma, a claim: 0 of 30 elements differ, pass" in printed
    assert "Everything passed." in printed
    written = target.read_text()
    assert re.search(r"on \d{4}-\d\d-\d\d \d\d:\d\d UTC\. Everything passed\.", written)
    for fact in ("processor", "torch", "contract", "commit"):
        assert f"- {fact}: " in written
    for heading in ("# Verified results", "# CPU", "## Bits, fma", "## Accuracy, fma", "## Time and memory"):
        assert f"\n{heading}" in f"\n{written}"
    assert "| a claim | 30 | 0 | no such form |" in written


def test_verify_fails_when_bits_differ(short, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setitem(verify.CHECKS, backends.CPU, [check(), check(differs=True)])
    target = tmp_path / "results.md"
    assert cli.main(["verify", "--markdown", str(target)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"FAILED fma family \(.*\), a claim: a setting, variant 0: 1 of 30 elements differ", printed)
    assert "Something FAILED." in printed
    assert "**Something failed.**" in target.read_text()


def test_verify_fails_when_not_accurate(short, monkeypatch: pytest.MonkeyPatch, capsys):
    attn = fad.attn
    monkeypatch.setattr(fad, "attn", lambda *args, **kwargs: attn(*args, **kwargs) * 1.1)
    assert cli.main(["verify"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"short: largest error .*FAIL", printed)
    assert "not accurate" in printed


def test_gpu_part_of_verify_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    """A machine with both devices: each gets its own section, and one failure fails the command."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "facts", lambda device: {"processor or GPU": device})
    monkeypatch.setattr(verify, "check_bits", lambda part, backend: None)
    monkeypatch.setattr(verify, "check_accuracies", lambda part, backend: None)
    monkeypatch.setattr(verify, "CPU_TIMED", [])
    monkeypatch.setattr(tables, "measure_ceilings", lambda chosen: CEILINGS)
    monkeypatch.setattr(contest, "measure_cases", lambda chosen, peers, seconds, progress: results())
    target = tmp_path / "results.md"
    assert cli.main(["verify", "--markdown", str(target)]) == 1
    written = target.read_text()
    assert re.findall(r"^# (.*)$", written, re.MULTILINE) == ["Verified results", "CPU", "NVIDIA GPU"]
    assert written.count("Everything passed.") == written.count("**Something failed.**") == 1
    assert written.count(tables.NOTE) == 1  # once, after the last of the tables that it explains
    assert "bfloat16 8192^3 matrix product: 800.0 TFLOP/s" in written
    assert f"FAILED {CUDA_DECODE.name}: not today" in capsys.readouterr().out
