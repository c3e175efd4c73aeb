"""The sources of the Hopper kernels of the forward, run on a CPU: every CUDA thread is a fiber, also of all thread
blocks of a cluster, and copies, matrix instructions and stores to other thread blocks happen as early as they may,
as late, or at random times (tests/emulation/machine.h). Bits are those of the CPU's emulation of compute
capability 9.0, whatever the schedule. What ptxas makes of the sources, and how fast it is, only a GPU can tell."""

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
PAGES, BOXES = "cuda/hopper_tile_pages.cuh", "cuda/hopper_copy.cuh"
CLUSTER, MEMORY = "cuda/hopper_cluster.cuh", "cuda/mma_memory.cuh"
FOLD = "cuda/hopper_cluster_fold.cuh"
DECODE = "cuda/mma_decode_producer.cuh"
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


def run(fuzz: Path, kernels: str, calls: int, *dims: str) -> subprocess.CompletedProcess:
    """kernels: "tile" or "decode"."""
    return subprocess.run([fuzz, kernels, "1", str(calls), *dims], capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The sources as they are: where they are built."""
    return built(tmp_path_factory.mktemp("whole")).parent


@pytest.mark.parametrize("kernels", ["tile", "decode"])
def test_n1_every_schedule_gives_the_bits_of_the_cpu(whole, kernels):
    done = run(whole / "fuzz", kernels, CALLS)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.endswith(f"0 of {CALLS} calls failed\n")
    served = re.findall(r"^(?:by|large|small|folding) \w+: (\d+) calls$", done.stdout, re.MULTILINE)
    assert len(served) == (5 if kernels == "decode" else 0)
    assert all(int(calls) > 3 for calls in served)
    kinds = re.findall(r"^(64|128|256) (bf16|fp16) (spilled|folded): ", done.stdout, re.MULTILINE)
    assert {len(set(choices)) for choices in zip(*kinds, strict=True)} == {2, 3}


# Mistakes that the emulation must notice: a line of the sources, what is made of it, and a head dim where it matters.
TILE_MISTAKES = {
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
    "no care for values that are not seen": (
        CONSUMER,
        "if (!values_not_finite())\n            return;",
        "return;",
        "64",
    ),
    "values checked before they are there": (PRODUCER, "barrier_wait(sm.full[slot.index], slot.round);", "", "128"),
    "a chain that goes on over the end of a split": (
        CONSUMER,
        "first_values = split_ends || block < 0;",
        "first_values = block < 0;",
        "64",
    ),
    "a chain that goes on from what the first step finds": (
        CONSUMER,
        "first_values = split_ends || block < 0;",
        "first_values = split_ends;",
        "128",
    ),
    "the last split not folded": (CONSUMER, "            fold_last(part);\n", "", "256"),
    "rows staged where values are overwritten": (
        CONSUMER,
        "staged = !S::REST_IN_SHARED && !spills;",
        "staged = false;",
        "256",
    ),
    "the next keys guarded instead of the last values": (
        CONSUMER,
        "S::OVERLAP && block < last ? S::PARTS",
        "S::OVERLAP ? S::PARTS",
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
    "nothing in the place of the values that the first step has not": (PRODUCER, "skip();", ";", "64"),
    "keys in pages used before they are there": (PAGES, "cp_async_wait<PENDING>();", "", "64"),
    "slots overwritten by keys in pages": (
        PAGES,
        "if (!__all_sync(~0u, barrier_done(empty, round)))",
        "if (false)",
        "128",
    ),
}


DECODE_MISTAKES = {
    "a cluster's K overwritten while it is used": (
        CLUSTER,
        "        __syncthreads(); /* this thread block's K may be overwritten */\n",
        "",
        "128",
    ),
    "P sent before all references are there": (CLUSTER, "barrier_wait_cluster(sm.references_there, 0);", "", "64"),
    "P read before it is there": (CLUSTER, "barrier_wait_cluster(sm.p_there, 0); /* P may be read */", "", "128"),
    "sent before all thread blocks have begun": (
        CLUSTER,
        "load(second);\n        cluster_wait();",
        "load(second);",
        "128",
    ),
    "less of P than is waited for": (CLUSTER, "if (lane / 4 < n_rows)", "if (lane / 4 < n_rows - 1)", "128"),
    "the second half of V before it is there": (
        CLUSTER,
        "            if (b + 1 == CLUSTER_KEY_BLOCKS / 2)\n                barrier_wait(sm.second_there, 0);\n",
        "",
        "128",
    ),
    "the first half of V before it is there": (
        CLUSTER,
        "        cp_async_wait<1>();\n        __sync",
        "        __sync",
        "128",
    ),
    "ends while copies are on their way": (
        CLUSTER,
        "        cp_async_wait<0>(); /* of few",
        "        /* of few",
        "128",
    ),
    "the factors of other blocks": (CLUSTER, "from = b == warp ? m : from;", "from = b == warp ? to : from;", "128"),
    "splits folded before they are there": (
        CLUSTER,
        "            barrier_wait_cluster(sm.sent_there, 0);\n",
        "",
        "128",
    ),
    "sent for an empty split before all have begun": (
        CLUSTER,
        "            __syncwarp();\n            cluster_wait();",
        "            __syncwarp();",
        "64",
    ),
    "states sent to the thread block of other dims": (CLUSTER, ".send_to(rank,", ".send_to(0,", "128"),
    "a split folded onto the references of another": (FOLD, "        m = now;\n", "", "64"),
    "no care for values in clusters": (CLUSTER, "warp < S::VALUE_WARPS && need_care()", "false", "64"),
    "keys of pages at other places": (MEMORY, "(c ^ i / LINE) % ROW_CHUNKS", "c % ROW_CHUNKS", "128"),
    "slots overwritten while they are used": (
        DECODE,
        "                barrier_wait(sm.empty[ring.index], ring.round ^ 1);\n",
        "",
        "64",
    ),
    "the first boxes again instead of those after": (
        DECODE,
        "keys.find(p, row + FOUND_BOXES * rows)",
        "keys.find(p, row)",
        "128",
    ),
    "boxes from the pages before": (BOXES, "cache.before = cache.here;", "", "128"),
}
MISTAKES = {"tile": TILE_MISTAKES, "decode": DECODE_MISTAKES}


@pytest.mark.parametrize(("kernels", "mistake"), [(k, mistake) for k in MISTAKES for mistake in MISTAKES[k]])
def test_mistakes_are_noticed(tmp_path, whole, kernels, mistake):
    name, line, changed, dims = MISTAKES[kernels][mistake]
    # What does not include the kernel need not be built again.
    shutil.copytree(whole, tmp_path / "build", ignore=shutil.ignore_patterns(f"{kernels}_*", "fuzz"))
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    text = (csrc / name).read_text()
    assert text.count(line) == 1
    (csrc / name).write_text(text.replace(line, changed))
    done = run(built(tmp_path / "build", csrc), kernels, 4 * CALLS if kernels == "decode" else CALLS, dims, "1")
    assert done.returncode != 0
    assert re.search(r"^[1-9]\d* of \d+ calls failed$", done.stdout, re.MULTILINE) or done.returncode < 0
