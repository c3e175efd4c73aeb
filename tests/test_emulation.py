"""The sources of the Hopper tile kernel, run on a CPU: every CUDA thread is a fiber, and copies and matrix instructions
happen as early as they may, as late, or at random times (tests/emulation/machine.h). Bits are those of the CPU's
emulation of compute capability 9.0, whatever the schedule. What ptxas makes of the sources, and how fast it is, only a
GPU can tell."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import flash_attn_det

HERE = Path(__file__).parent / "emulation"
CSRC = HERE.parents[1] / "csrc"
LIBRARY = Path(flash_attn_det.__file__).parent / "lib" / "libflash_attn_det.so"
CONSUMER, OUTPUT = "cuda/hopper_tile_consumer.cuh", "cuda/mma_output.cuh"
PRODUCER, SOFTMAX = "cuda/hopper_tile_producer.cuh", "cuda/mma_softmax.cuh"
PAGES = "cuda/hopper_tile_pages.cuh"
CALLS, SECONDS = 60, 300

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="fibers are switched in x86-64 code"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
]


def built(build: Path, csrc: Path = CSRC) -> Path:
    command = ["make", "-C", HERE, "-j2", f"BUILD={build}", f"CSRC={csrc}", f"LIBRARY={LIBRARY}"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    return build / "fuzz"


def run(fuzz: Path, calls: int, *dims: str) -> subprocess.CompletedProcess:
    return subprocess.run([fuzz, "1", str(calls), *dims], capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The sources as they are: where they are built."""
    return built(tmp_path_factory.mktemp("whole")).parent


def test_n1_every_schedule_gives_the_bits_of_the_cpu(whole):
    done = run(whole / "fuzz", CALLS)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.endswith(f"0 of {CALLS} calls failed\n")
    kinds = re.findall(r"^(64|128|256) (bf16|fp16) (spilled|folded): ", done.stdout, re.MULTILINE)
    assert {len(set(choices)) for choices in zip(*kinds, strict=True)} == {2, 3}


# Mistakes that the emulation must notice: a line of the sources, what is made of it, and a head dim where it matters.
MISTAKES = {
    "keys released while scores are computed": (
        CONSUMER,
        "        if (S::OVERLAP) {\n            wgmma_wait<1>();\n",
        "        if (S::OVERLAP) {\n",
        "64",
    ),
    "a split of one block more": (
        CONSUMER,
        "to_split_end = uniform(item().range.split_blocks);",
        "to_split_end = uniform(item().range.split_blocks) + 1;",
        "128",
    ),
    "no care for values that are not seen": (CONSUMER, "if (partial && values_not_finite())", "if (false)", "64"),
    "values checked before they are there": (PRODUCER, "barrier_wait(sm.full[slot.index], slot.round);", "", "128"),
    "a chain that goes on over the end of a split": (
        CONSUMER,
        "first_values = split_ends;",
        "first_values = false;",
        "64",
    ),
    "quotients always computed the near way": (OUTPUT, "    if (__all_sync(~0u, near))\n", "    if (true)\n", "128"),
    "maxima always compared as integers": (
        SOFTMAX,
        "if (INTEGERS && !__any_sync",
        "if (INTEGERS || !__any_sync",
        "128",
    ),
    "q overwritten while it is used": (
        PRODUCER,
        "barrier_wait(sm.q_empty[buffer.index], buffer.round ^ 1);",
        "",
        "128",
    ),
    "the next item's first keys never copied": (PRODUCER, "first_keys(next_item(next_slot));", "{}", "64"),
    "keys in pages used before they are there": (PAGES, "cp_async_wait<PENDING>();", "", "64"),
    "slots overwritten by keys in pages": (
        PAGES,
        "if (!__all_sync(~0u, barrier_done(empty, round)))",
        "if (false)",
        "128",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(tmp_path, whole, mistake):
    name, line, changed, dims = MISTAKES[mistake]
    # What does not include the kernel need not be built again.
    shutil.copytree(whole, tmp_path / "build", ignore=shutil.ignore_patterns("tile_*", "fuzz"))
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    text = (csrc / name).read_text()
    assert text.count(line) == 1
    (csrc / name).write_text(text.replace(line, changed))
    done = run(built(tmp_path / "build", csrc), CALLS, dims, "1")
    assert done.returncode != 0
    assert re.search(r"^[1-9]\d* of \d+ calls failed$", done.stdout, re.MULTILINE) or done.returncode < 0
