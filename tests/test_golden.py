"""Recorded bits: hashes of every case, the same for every version of the package.

The fma family has one set for every instruction set and machine, the mma family one for each generation of GPUs, of
which Hopper's is recorded. Gradients of some cases are recorded in both families, of mma as the CPU emulates it. A hash
that changes means that the contract changed: that needs a new CONTRACT_VERSION.
Rewrite the files with ``python tests/test_golden.py`` and, on a Hopper GPU, ``python tests/test_golden.py --cuda``.
"""

import argparse
import hashlib
import json
from pathlib import Path

import pytest
import torch
from cases import CASES, LARGE_CASES, normal
from cuda_tools import ON_HOPPER, moved, needs_hopper
from gradients import gradients, upstream

import flash_attn_det as fad
from flash_attn_det import _schedule
from flash_attn_det.reference import attn_reference
from flash_attn_det.testing import bits_differ

DATA = Path(__file__).parent / "data"
FMA, MMA_SM90 = DATA / "golden_fma.json", DATA / "golden_mma_sm90.json"
GRADIENTS = DATA / "golden_gradients.json"
MMA_CASES = [case for case in (*CASES, *LARGE_CASES) if case.dtype in ("fp16", "bf16")]
WITH_GRADIENTS = ("plain", "causal", "sinks causal window", "everything", "Sq 70 Sk 511", "Sq 70 Sk 513", "many rows")


def digest(*results):
    sha = hashlib.sha256()
    for x in results:
        sha.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:32]


def hashes(cases=CASES, device="cpu", **options):
    result = {}
    for case in cases:
        qkv, keywords = case.inputs()
        parts = fad.attn(*moved(qkv, device), **moved(keywords, device), **options, return_lse=True)
        result[case.name] = digest(*parts)
    return result


def gradient_hashes(device="cpu"):
    """Of dq, dk, dv and d_sinks, by family and case; on a GPU, which has no fp64, with its own tensor cores."""
    result = {}
    for case in CASES:
        if case.name.removesuffix(f" {case.dtype}") not in WITH_GRADIENTS or (
            device == "cuda" and case.dtype == "fp64"
        ):
            continue
        (q, k, v), keywords = case.inputs()
        inputs = moved((q, k, v, upstream(q, v)), device)
        for family in ("fma", "mma_sm90") if case.dtype in ("fp16", "bf16") else ("fma",):
            arithmetic = "mma" if family == "mma_sm90" and device == "cuda" else family
            parts = gradients(*inputs, **moved(keywords, device), arithmetic=arithmetic)
            result[f"{family} {case.name}"] = digest(*parts)
    return result


def golden(path=FMA):
    stored = json.loads(path.read_text())
    assert stored["CONTRACT_VERSION"] == fad.contract()["CONTRACT_VERSION"], "rewrite the file: see above"
    return stored["hashes"]


@pytest.mark.parametrize("isa", _schedule.isas())
def test_n7_golden_hashes_of_every_instruction_set(isa):
    expected = golden()
    with _schedule.forced(isa=isa):
        actual = hashes()
    assert list(actual) == list(expected)
    assert [name for name in expected if actual[name] != expected[name]] == []


def test_n7_golden_hashes_of_the_reference():
    """The file is the contract's and not only what some kernel gave once."""
    expected = golden()
    for case in CASES[::19]:
        qkv, keywords = case.inputs()
        assert digest(*attn_reference(*qkv, **keywords, return_lse=True)) == expected[case.name], case.name


@needs_hopper
def test_n7_golden_hashes_of_hopper():
    expected, actual = golden(MMA_SM90), hashes(MMA_CASES, "cuda")
    assert list(actual) == list(expected)
    assert [name for name in expected if actual[name] != expected[name]] == []


@pytest.mark.parametrize("isa", _schedule.isas())
def test_n7_golden_hashes_of_hopper_by_its_emulation(isa):
    """What a GPU recorded, a CPU computes again; the slow scalar code does some of it. The next test is the control."""
    expected, cases = golden(MMA_SM90), MMA_CASES[:: 12 if isa == "scalar" else 1]
    with _schedule.forced(isa=isa):
        actual = hashes(cases, arithmetic="mma_sm90")
    assert list(actual) == [case.name for case in cases]
    assert [name for name in actual if actual[name] != expected[name]] == []


@pytest.mark.skipif(not MMA_SM90.exists(), reason=f"needs tests/data/{MMA_SM90.name}, which a Hopper GPU writes")
def test_golden_hashes_of_hopper_are_of_this_version():
    """Wherever the tests run: a case or a contract that changed without new hashes is noticed. Its control is fma's."""
    expected, others = golden(MMA_SM90), golden()
    assert list(expected) == [case.name for case in MMA_CASES]
    same = [name for name in expected if expected[name] == others.get(name)]
    assert len(same) < 0.2 * len(expected)


@pytest.mark.parametrize("isa", _schedule.isas())
def test_n13_golden_hashes_of_gradients_of_every_instruction_set(isa):
    """Its control: the families have no hash in common, and all cases are there."""
    expected = golden(GRADIENTS)
    with _schedule.forced(isa=isa):
        actual = gradient_hashes()
    assert list(actual) == list(expected)
    assert [name for name in expected if actual[name] != expected[name]] == []
    assert len(set(expected.values())) == len(expected) > 2 * len(WITH_GRADIENTS)


@needs_hopper
def test_n13_golden_hashes_of_gradients_of_hopper():
    """Of both families: what the CPU recorded, for mma what it emulated."""
    expected, actual = golden(GRADIENTS), gradient_hashes("cuda")
    assert list(actual) == [name for name in expected if not name.endswith("fp64")]
    assert [name for name in actual if actual[name] != expected[name]] == []


def test_golden_hashes_notice_one_bit():
    (q, k, v), keywords = CASES[0].inputs()
    v.view(torch.int32)[0, 0, 0, 0] ^= 1 << 12
    assert digest(*fad.attn(q, k, v, **keywords, return_lse=True)) != golden()[CASES[0].name]


def test_golden_inputs_are_the_same_numbers_everywhere():
    """The generator is exact integer arithmetic: some of its numbers, by hand."""
    x = normal((1000,), 7, torch.float64)
    assert abs(float(x.mean())) < 0.1
    assert abs(float(x.std()) - 1) < 0.05
    assert bits_differ(x, normal((1000,), 7, torch.float64)) == 0
    assert hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16] == "11ca89dc5a140405"


def main():
    parser = argparse.ArgumentParser(description="Record the bits of this version.")
    parser.add_argument("--cuda", action="store_true", help="those of the mma family on a Hopper GPU")
    if parser.parse_args().cuda:
        if not ON_HOPPER:
            parser.error("--cuda needs a Hopper GPU (compute capability 9.0)")
        files = {MMA_SM90: hashes(MMA_CASES, "cuda")}
    else:
        files = {FMA: hashes(), GRADIENTS: gradient_hashes()}
    for path, recorded in files.items():
        stored = {"CONTRACT_VERSION": fad.contract()["CONTRACT_VERSION"], "hashes": recorded}
        path.write_text(json.dumps(stored, indent=1) + "\n")
        print(f"{len(recorded)} hashes in {path}")


if __name__ == "__main__":
    main()
