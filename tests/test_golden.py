"""The fma family has one set of bits: hashes of every case, the same for every instruction set, machine and version.

A hash that changes means that the contract changed: that needs a new CONTRACT_VERSION. Rewrite the file with
``python tests/test_golden.py``.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from cases import CASES, normal

import flash_attn_det as fad
from flash_attn_det import _schedule
from flash_attn_det.reference import attn_reference
from flash_attn_det.testing import bits_differ

PATH = Path(__file__).parent / "data" / "golden_fma.json"


def digest(out, lse):
    sha = hashlib.sha256()
    for x in (out, lse):
        sha.update(x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:32]


def hashes():
    result = {}
    for case in CASES:
        qkv, keywords = case.inputs()
        result[case.name] = digest(*fad.attn(*qkv, **keywords, return_lse=True))
    return result


def golden():
    stored = json.loads(PATH.read_text())
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
    stored = {"CONTRACT_VERSION": fad.contract()["CONTRACT_VERSION"], "hashes": hashes()}
    PATH.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"{len(stored['hashes'])} hashes in {PATH}")


if __name__ == "__main__":
    main()
