"""The settings that change bits: who sees them, when, and what is refused."""

import asyncio
import os
import subprocess
import sys
import threading

import pytest
import torch

import flash_attn_det as fad
from flash_attn_det.testing import assert_bits_equal, bits_differ

BLOCK = fad.contract()["MMA_BLOCK_KV"]  # the smallest split
DEFAULT = fad.contract()["DEFAULT_SPLIT_SIZE"]


@pytest.fixture(autouse=True)
def _restore():
    yield
    fad.set_split_size(None)


def run_python(code: str, **environment) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name != "FLASH_ATTN_DET_SPLIT_SIZE"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**inherited, **environment}
    )


def test_contract_constants():
    contract = fad.contract()
    assert {"CONTRACT_VERSION", "BLOCK_KV", "MMA_BLOCK_KV", "DEFAULT_SPLIT_SIZE", "MAX_HEAD_DIM"} <= contract.keys()
    assert contract["PACKAGE_VERSION"] == fad.__version__
    assert contract["DEFAULT_SPLIT_SIZE"] % BLOCK == BLOCK % contract["BLOCK_KV"] == 0
    contract["MMA_BLOCK_KV"] = 1
    assert fad.contract()["MMA_BLOCK_KV"] == BLOCK, "callers get a copy"


def test_default():
    assert run_python("import flash_attn_det as f; print(f.get_split_size())").stdout.strip() == str(DEFAULT)


def test_environment():
    code = "import flash_attn_det as f; print(f.get_split_size())"
    assert run_python(code, FLASH_ATTN_DET_SPLIT_SIZE="256").stdout.strip() == "256"


@pytest.mark.parametrize("text", ["", "many", "0", "-128", "64", "128.0"])
def test_wrong_environment(text):
    result = run_python("import flash_attn_det", FLASH_ATTN_DET_SPLIT_SIZE=text)
    assert result.returncode != 0
    assert "ValueError: FLASH_ATTN_DET_SPLIT_SIZE is" in result.stderr
    assert f"expected a positive multiple of {BLOCK}" in result.stderr


def test_set_and_get():
    fad.set_split_size(3 * BLOCK)
    assert fad.get_split_size() == 3 * BLOCK


def test_blocks_nest_and_end_with_exceptions():
    fad.set_split_size(BLOCK)
    with fad.split_size(2 * BLOCK) as outer:
        assert fad.get_split_size() == outer == 2 * BLOCK
        with pytest.raises(KeyError), fad.split_size(3 * BLOCK):
            raise KeyError(fad.get_split_size() == 3 * BLOCK)
        assert fad.get_split_size() == 2 * BLOCK
        fad.set_split_size(4 * BLOCK)
        assert fad.get_split_size() == 2 * BLOCK, "the block wins over the process's value"
    assert fad.get_split_size() == 4 * BLOCK


def test_one_block_object_can_be_entered_inside_itself():
    block = fad.split_size(2 * BLOCK)
    fad.set_split_size(BLOCK)
    with block:
        with fad.split_size(3 * BLOCK), block:
            assert fad.get_split_size() == 2 * BLOCK
        assert fad.get_split_size() == 2 * BLOCK
    assert fad.get_split_size() == BLOCK


@pytest.mark.parametrize(
    "setter",
    [fad.set_split_size, fad.split_size, lambda n: fad.set_deterministic_mode(True, split_size=n)],
    ids=["set_split_size", "split_size", "set_deterministic_mode"],
)
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "split_size is 0, expected a positive multiple of 128"),
        (-128, ValueError, "split_size is -128, expected a positive multiple of 128"),
        (64, ValueError, "split_size is 64, expected a positive multiple of 128"),
        (128.0, TypeError, "split_size must be an int, got float"),
        ("128", TypeError, "split_size must be an int, got str"),
        (True, TypeError, "split_size must be an int, got bool"),
    ],
)
def test_wrong_values(setter, value, error, message):
    before = fad.get_split_size()
    with pytest.raises(error, match=message):
        setter(value)
    assert fad.get_split_size() == before


def test_threads_see_the_process_value_but_not_another_threads_block():
    fad.set_split_size(3 * BLOCK)
    seen = {}
    inside, done = threading.Event(), threading.Event()

    def holder():
        with fad.split_size(5 * BLOCK):
            inside.set()
            done.wait()
            seen["holder"] = fad.get_split_size()

    thread = threading.Thread(target=holder)
    thread.start()
    inside.wait()
    seen["main"] = fad.get_split_size()
    fad.set_split_size(7 * BLOCK)
    done.set()
    thread.join()
    assert seen == {"main": 3 * BLOCK, "holder": 5 * BLOCK}


def test_racing_threads_compute_with_their_own_block():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16) for n in (1, 700, 700))
    sizes = [BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK]
    want = {n: fad.attn(q, k, v, split_size=n) for n in sizes}
    for n in sizes[1:]:
        assert bits_differ(want[n], want[BLOCK]) > 0
    got = {n: [] for n in sizes}
    start = threading.Barrier(len(sizes))

    def worker(n):
        start.wait()
        for _ in range(50):
            with fad.split_size(n):
                got[n].append(fad.attn(q, k, v))

    threads = [threading.Thread(target=worker, args=(n,)) for n in sizes]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for n in sizes:
        assert len(got[n]) == 50
        for out in got[n]:
            assert_bits_equal(out, want[n])


def test_split_size_changes_bits_and_the_argument_wins():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16) for n in (3, 700, 700))
    with fad.split_size(BLOCK):
        small = fad.attn(q, k, v)
        large = fad.attn(q, k, v, split_size=4 * BLOCK)
    assert bits_differ(small, large) > 0
    assert_bits_equal(small, fad.attn(q, k, v, split_size=BLOCK))
    with fad.split_size(4 * BLOCK):
        assert_bits_equal(large, fad.attn(q, k, v))
    fad.set_split_size(BLOCK)
    assert_bits_equal(small, fad.attn(q, k, v))


def test_every_split_size_beyond_the_keys_is_one_split():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16) for n in (3, 250, 250))
    one = fad.attn(q, k, v, split_size=2 * BLOCK)
    assert_bits_equal(one, fad.attn(q, k, v, split_size=1 << 30))
    assert bits_differ(one, fad.attn(q, k, v, split_size=BLOCK)) > 0


def test_deterministic_mode():
    fad.set_split_size(BLOCK)
    fad.set_deterministic_mode(True)
    assert fad.get_deterministic_mode() == (True, BLOCK)
    fad.set_deterministic_mode(enabled=True, split_size=5 * BLOCK)
    mode = fad.get_deterministic_mode()
    assert mode.enabled is True
    assert mode.split_size == 5 * BLOCK == fad.get_split_size()
    with pytest.raises(ValueError, match="no non-deterministic mode"):
        fad.set_deterministic_mode(False)


def test_a_block_around_a_coroutine():
    fad.set_split_size(BLOCK)

    async def inside():
        with fad.split_size(2 * BLOCK):
            return fad.get_split_size()

    assert asyncio.run(inside()) == 2 * BLOCK
    assert fad.get_split_size() == BLOCK


def test_each_family_has_a_default_and_a_setting_is_for_both():
    contract = fad.contract()
    code = "import flash_attn_det as f; print(f.get_split_size(), f.get_split_size('mma'))"
    defaults = f"{contract['DEFAULT_SPLIT_SIZE']} {contract['MMA_DEFAULT_SPLIT_SIZE']}"
    assert run_python(code).stdout.strip() == defaults
    with fad.split_size(3 * BLOCK):
        assert fad.get_split_size("fma") == fad.get_split_size("mma") == 3 * BLOCK
    with pytest.raises(ValueError, match="family is 'tensor', expected 'fma' or 'mma'"):
        fad.get_split_size("tensor")


def test_n3_default_split_is_that_of_the_family_of_the_call():
    contract = fad.contract()
    q, k, v = (torch.randn(1, n, 2, 16, generator=torch.Generator().manual_seed(n)).half() for n in (2, 3000, 3000))
    for arithmetic, name in (("fma", "DEFAULT_SPLIT_SIZE"), ("mma_sm90", "MMA_DEFAULT_SPLIT_SIZE")):
        partials = fad.attn_partials(q, k, v, arithmetic=arithmetic)
        assert partials.o.shape[0] == -(-3000 // contract[name])
