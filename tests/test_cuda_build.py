"""The CUDA library as a build product, without a GPU: when it is built, what it exports, what its machine code does.

Uses the build directory that csrc/Makefile and setup.py share: what an installation has compiled is not compiled again.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import flash_attn_det
from flash_attn_det import _library

CSRC = Path(__file__).parent.parent / "csrc"
LIBRARY = "libflash_attn_det_cuda.so"
ARCHITECTURES = os.environ.get("FLASH_ATTN_DET_CUDA_ARCHS") or "80 90"
SOURCES = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
# Sources are named after what they hold: mma_* and hopper_* the mma family, the others the fma family, or no kernels.
HOPPER = [name for name in SOURCES if name.startswith("hopper_")]
TENSOR_CORES = [name for name in SOURCES if name.startswith(("mma_", "hopper_"))]


def make(*arguments, check=True, **environment) -> subprocess.CompletedProcess:
    if shutil.which("make") is None or shutil.which("cc") is None:
        pytest.skip("needs make and a C compiler (cc)")
    command = ["make", "--no-print-directory", "-C", str(CSRC), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}"
    return done


def libraries(*arguments, **environment) -> list[Path]:
    return [Path(path) for path in make("--silent", *arguments, "libraries", **environment).stdout.split()]


@pytest.fixture(scope="module")
def build() -> Path:
    """The build directory, with the CUDA library and the PTX of its sources."""
    built = {path.name: path for path in libraries(FLASH_ATTN_DET_CUDA="auto")}
    if LIBRARY not in built:
        pytest.skip("needs nvcc")
    folder = built[LIBRARY].parent
    ptx = [folder / "cuda" / f"{name}.ptx" for name in SOURCES]
    make("-j2", f"BUILD={folder}", "cuda", *ptx, FLASH_ATTN_DET_CUDA="1")
    return folder


# ---- what is compiled ------------------------------------------------------------------------------------------------


def test_library_exports_one_function(build):
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    command = ["nm", "-D", "--defined-only", build / LIBRARY]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in listing.splitlines()] == ["fad_cuda_backend"]


def test_library_needs_neither_torch_nor_a_driver(build):
    """CUDA's runtime is linked in, and finds the driver when it is asked for a device."""
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    listing = subprocess.run(["readelf", "-d", build / LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = {re.match(r"ld-linux|[\w+]+", name)[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", listing)}
    assert "libc" in needed
    assert needed <= {"libc", "libm", "libdl", "librt", "libpthread", "ld-linux", "libstdc++", "libgcc_s"}


def spilled(log: str) -> dict[str, dict[str, int]]:
    """Of each architecture, the bytes that each of its functions spills, stores and loads together."""
    bytes_of, current = {}, {}
    line = re.compile(
        r"Compiling entry function '\w+' for '(\w+)'|"
        r"Function properties for (\w+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    for architecture, function, stores, loads in line.findall(log):
        if architecture:
            current = bytes_of.setdefault(architecture, {})
        else:
            current[function] = int(stores) + int(loads)
    return bytes_of


def read_ptx(build: Path, name: str) -> str:
    return (build / "cuda" / f"{name}.ptx").read_text()


SPILLING = {
    name: pytest.mark.xfail(reason="spills some registers: docs/performance.md", strict=True)
    for kernel in ("hopper_tile", "mma_tile")
    for name in (f"{kernel}_bf16", f"{kernel}_fp16")
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SPILLING.get(name, ())) for name in SOURCES])
def test_kernels_do_not_spill_registers(build, name):
    functions = spilled((build / "cuda" / f"{name}.ptxas").read_text())
    if ".entry" not in read_ptx(build, name):  # a source without kernels
        assert not any(functions.values())
        return
    wanted = {"sm_90a"} if name in HOPPER else {f"sm_{number}" for number in ARCHITECTURES.split()}
    assert set(functions) == wanted
    assert all(functions.values())
    spills = [f"{f} on {arch}: {n} bytes" for arch, of in functions.items() for f, n in of.items() if n > 0]
    assert spills == []


@pytest.mark.parametrize("name", sorted(HOPPER))
def test_matrix_instructions_are_not_serialised(build, name):
    """ptxas says so, in words, where it gives up the pipeline: C7510 to C7518. C7519 is a note."""
    log = (build / "cuda" / f"{name}.ptxas").read_text()
    assert "Potential Performance Loss" not in log
    assert re.search(r"C751[0-8]", log) is None


EX2 = "ex2.approx.ftz.f32"  # the only instruction whose bits are not IEEE's that N7 names besides the matrix step's
# Sums that are only asked whether they are finite: of finished results, two by two (QuotientRange in mma_output.cuh and
# stage_gradients in mma_backward_tile.cuh), and of values times zero (check_values in hopper_tile_producer.cuh).
FINITE = {"bf16": {"fma.rn.bf16x2"}, "fp16": {"add.rn.f16x2"}}
CHECKED = {"hopper_tile_fp16": {"fma.rn.f16x2"}}


def allowed_in(name: str) -> frozenset[str]:
    """What forbidden() lets pass in a source of csrc/cuda."""
    finishes = re.fullmatch(
        r"(?:mma|hopper)_(?:decode|tile|cluster(?:_fold)?|backward(?:_keys|_rows)?)_(bf16|fp16)", name
    )
    finite = FINITE[finishes[1]] | CHECKED.get(name, set()) if finishes else set()
    return frozenset(finite | ({EX2} if name in TENSOR_CORES else set()))


def forbidden(ptx: str, allowed: frozenset[str] = frozenset()) -> set[str]:
    """Instructions whose bits are not IEEE's, that ptxas may contract, or that add in no order.

    Arithmetic is in fp32 or more with its rounding spelled out, 16-bit numbers come from rounding one to nearest, and
    subnormals are kept.
    """
    operations = "add|sub|mul|mad|fma|div|rcp|sqrt"
    arithmetic = re.findall(rf"(?<![.\w])((?:{operations})(?:\.\w+)*\.b?f(?:16|16x2|32|64))\s", ptx)
    wrong = {name for name in arithmetic if not re.search(r"\.rn\.f(?:32|64)$", name)}
    wrong |= set(re.findall(r"\b\w+\.approx(?:\.\w+)*|\bdiv\.full(?:\.\w+)*|\b\w[\w.]*\.ftz[\w.]*", ptx))
    narrowing = set(re.findall(r"\bcvt(?:\.\w+)*\.b?f16(?:x2)?\.f32\b", ptx))
    wrong |= {name for name in narrowing if not re.fullmatch(r"cvt\.rn\.b?f16(?:x2)?\.f32", name)}
    wrong |= set(re.findall(r"\b(?:atom|red|cp\.reduce)\.[\w.:]*\badd\.[\w.:]*\bb?f\d\w*", ptx))
    return wrong - allowed


def matrix_steps(ptx: str) -> set[str]:
    """Instructions of the tensor cores, but for those that only order them."""
    order = r"wgmma\.(?:fence|commit_group|wait_group)\.sync\.aligned"
    names = set(re.findall(r"\b(?:mma|wmma|wgmma)\.[\w.:]+", ptx))
    return {name for name in names if not re.fullmatch(order, name)}


# N7: 16 products of one 16-bit type added to fp32. Other shapes round elsewhere.
MMA_STEP = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32"
WGMMA_STEP = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(b?f16)\.\1"


@pytest.mark.parametrize("name", SOURCES)
def test_n7_ptx_rounds_as_the_contract_says(build, name):
    ptx = read_ptx(build, name)
    assert forbidden(ptx, allowed_in(name)) == set()
    steps = matrix_steps(ptx)
    if name not in TENSOR_CORES:
        assert steps == set()
    for step in steps:
        assert re.fullmatch(MMA_STEP, step) or (name in HOPPER and re.fullmatch(WGMMA_STEP, step)), step


def test_ptx_check_looks_at_what_is_there(build):
    """The patterns are those of instructions that nvcc wrote."""

    def text(names):
        return "".join(read_ptx(build, name) for name in names)

    others = set(SOURCES) - set(TENSOR_CORES)
    for instruction in ("add.rn.f32", "mul.rn.f32", "fma.rn.f32", "div.rn.f32"):
        assert instruction in text(others)
    if TENSOR_CORES:
        ptx = text(TENSOR_CORES)
        for instruction in ("add.rn.f32", "mul.rn.f32", "fma.rn.f32", EX2, "cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32"):
            assert instruction in ptx
        for dtype in ("f16", "bf16"):
            assert f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32" in ptx
    if HOPPER:
        steps = [re.fullmatch(WGMMA_STEP, step) for step in matrix_steps(text(HOPPER))]
        assert {step[1] for step in steps if step} == {"f16", "bf16"}


def test_ptx_check_notices():
    wrong = {
        *("add.f32", "mul.ftz.f32", "add.rn.ftz.f32", "fma.rn.ftz.f32", "fma.rn.sat.f32", "mul.f64", "div.full.f32"),
        *("div.approx.f32", "ex2.approx.f32", "ex2.approx.ftz.bf16x2", "lg2.approx.f32", "rcp.approx.ftz.f32"),
        *("tanh.approx.f32", "max.ftz.f32", "setp.lt.ftz.f32", "cvt.rz.bf16x2.f32", "cvt.rn.satfinite.f16x2.f32"),
        *("atom.global.add.f32", "red.relaxed.gpu.global.add.f64", "atom.global.add.noftz.bf16x2", "mul.bf16x2"),
        *("fma.rn.bf16", "add.rn.f16x2", "add.rz.f32"),
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32",
    }
    for instruction in wrong:
        for allowed in (frozenset(), frozenset({EX2})):
            assert forbidden(f"\t{instruction} \t%f1, %f2, %f3;\n", allowed) == {instruction}
    assert forbidden(f"\t{EX2} \t%f1, %f2;\n") == {EX2}
    right = ("fma.rn.f32", "div.rn.f64", "mul.wide.s32", "atom.global.add.u64", "cvt.rn.bf16x2.f32", "cvt.f32.f16", EX2)
    for instruction in right:
        assert forbidden(f"\t{instruction} \t%f1, %f2, %f3;\n", frozenset({EX2})) == set()


def test_ptx_check_allows_little():
    assert allowed_in("hopper_tile_bf16") == {EX2} | FINITE["bf16"]
    assert allowed_in("hopper_tile_fp16") == {EX2} | FINITE["fp16"] | CHECKED["hopper_tile_fp16"]
    assert allowed_in("mma_decode_fp16") == {EX2} | FINITE["fp16"]
    assert allowed_in("mma_backward_keys_bf16") == {EX2} | FINITE["bf16"]
    assert allowed_in("fma_forward") == set()


def test_matrix_step_check_notices():
    right = [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16",
    ]
    wrong = [
        *("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32", "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16"),
        *("wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32", "wmma.mma.sync.aligned.row.col.m16n16k16.f32.f32"),
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32",
    ]
    order = "\twgmma.fence.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;\n\twgmma.commit_group.sync.aligned;\n"
    assert matrix_steps(order + "".join(f"\t{step} {{%f1, %f2}};\n" for step in right + wrong)) == {*right, *wrong}
    for step in right + wrong:
        assert bool(re.fullmatch(MMA_STEP, step) or re.fullmatch(WGMMA_STEP, step)) == (step in right)


ASK = """
#include "flash_attn_det.h"
#include <stdio.h>
int main(void) {
    const fad_attn_problem p = {.device = FAD_CUDA, .Hq = 1, .Hk = 1, .D = 8, .Dv = 8, .scale = 1, .window_left = -1,
                                .window_right = -1, .split_size = 128};
    printf("%d %s", fad_attn_check(&p), fad_last_error());
    return 0;
}
"""


def test_core_loads_the_library_from_beside_itself(build, tmp_path):
    """No GPU is needed to load it; without it the core says what is missing."""
    core = Path(flash_attn_det.__file__).parent / "lib" / "libflash_attn_det.so"
    shutil.copy(core, tmp_path)
    (tmp_path / "ask.c").write_text(ASK)
    command = ["cc", f"-I{CSRC}", "ask.c", "-o", "ask", "-L.", "-lflash_attn_det", "-Wl,-rpath,$ORIGIN"]
    subprocess.run(command, cwd=tmp_path, check=True)

    def ask():
        return subprocess.run([tmp_path / "ask"], capture_output=True, text=True, check=True).stdout

    assert ask().startswith("2 the tensors are on a CUDA device, but this build has no CUDA kernels (")
    shutil.copy(build / LIBRARY, tmp_path)
    assert ask().startswith("0 ")


HANDSHAKE = """
#include "core/backend.h"
#include <dlfcn.h>
#include <stdio.h>
int main(int argc, char **argv) {
    void *library = dlopen(argv[argc - 1], RTLD_NOW);
    const fad_device_backend *(*entry)(const fad_core_services *);
    const fad_core_services same = {NULL, NULL, FAD_STRUCT_BYTES, FAD_CONTRACT_VERSION};
    *(void **)&entry = dlsym(library, "fad_cuda_backend");
    printf("%d", entry(&same) != NULL);
    for (size_t i = 0; i < sizeof same.bytes / sizeof(size_t); i++) {
        fad_core_services other = same;
        ((size_t *)&other.bytes)[i] += 8;
        printf("%d", entry(&other) != NULL);
    }
    fad_core_services other = same;
    other.contract++;
    printf("%d", entry(&other) != NULL);
    return 0;
}
"""


def test_library_of_another_build_is_refused(build, tmp_path):
    """Any struct of another size, or another contract."""
    (tmp_path / "handshake.c").write_text(HANDSHAKE)
    command = ["cc", f"-I{CSRC}", "handshake.c", "-o", "handshake", "-ldl"]
    subprocess.run(command, cwd=tmp_path, check=True)
    command = [tmp_path / "handshake", build / LIBRARY]
    answers = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"10{10}", answers)  # nine sizes, and the contract


def test_schedule_that_tests_force_is_the_struct_of_the_header():
    """A field that Python does not know would be left automatic, and a test of one kernel would run another."""
    header = (CSRC / "flash_attn_det.h").read_text()
    struct = re.search(r"typedef struct fad_schedule \{(.*?)\} fad_schedule;", header, re.DOTALL)
    declared = re.findall(r"^\s*(?:const char \*|int32_t )(\w+);", struct[1], re.MULTILINE)
    assert declared == [name for name, _ in _library.Schedule._fields_]


# ---- when it is built ------------------------------------------------------------------------------------------------

# A compiler that writes its arguments into what it is asked to make.
PRETENDER = """#!/bin/sh
all="$*"
while [ $# -gt 0 ]; do
    case "$1" in
        -o) echo "$all" > "$2" ;;
        -MF) echo "ignored: " > "$2" ;;
    esac
    shift
done
"""


@pytest.fixture
def pretender(tmp_path) -> dict[str, str]:
    """An environment whose nvcc is quick, and is known to nobody but $NVCC."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(PRETENDER)
    nvcc.chmod(0o755)
    return {"NVCC": str(nvcc), "FLASH_ATTN_DET_CUDA": "", "FLASH_ATTN_DET_CUDA_ARCHS": "", "CUDA_HOME": ""}


NO_NVCC = {"NVCC": "", "CUDA_HOME": "/nonexistent", "FLASH_ATTN_DET_CUDA_ARCHS": ""}


def test_kernels_are_built_if_nvcc_is_found(pretender):
    names = ["libflash_attn_det.so", "libflash_attn_det_torch.so"]
    assert [path.name for path in libraries(**pretender)] == [*names, LIBRARY]
    assert [path.name for path in libraries(**pretender | {"FLASH_ATTN_DET_CUDA": "1"})] == [*names, LIBRARY]
    assert [path.name for path in libraries(**pretender | {"FLASH_ATTN_DET_CUDA": "0"})] == names
    assert [path.name for path in libraries(**NO_NVCC, FLASH_ATTN_DET_CUDA="auto")] == names


def test_cross_builds_have_no_kernels(tmp_path, pretender):
    """nvcc compiles for this machine, and the C compiler decides for which the build is."""
    cross = tmp_path / "cc"
    cross.write_text("#!/bin/sh\necho elsewhere-linux-gnu\n")
    cross.chmod(0o755)
    assert LIBRARY not in [path.name for path in libraries(f"CC={cross}", **pretender)]


def test_missing_nvcc_can_be_an_error():
    done = make("libraries", check=False, FLASH_ATTN_DET_CUDA="1", **NO_NVCC)
    assert done.returncode != 0
    assert (
        "FLASH_ATTN_DET_CUDA is 1, but CUDA kernels: none, there is no nvcc: looked for /nonexistent/bin/nvcc"
        in done.stderr
    )


def test_unknown_choice_is_an_error(pretender):
    done = make("libraries", check=False, **pretender | {"FLASH_ATTN_DET_CUDA": "yes"})
    assert done.returncode != 0
    assert "FLASH_ATTN_DET_CUDA is 'yes', expected auto, 0 or 1" in done.stderr


def compiled_with(folder: Path, name: str = "backend") -> str:
    return (folder / "cuda" / f"{name}.o").read_text()


def test_architectures(tmp_path, pretender):
    folder = tmp_path / "build"
    make(f"BUILD={folder}", "cuda", **pretender)
    targets = re.findall(r"-gencode (\S+)", compiled_with(folder))
    assert targets == [
        f"arch=compute_{n},code={code}" for n, code in ((80, "sm_80"), (90, "sm_90"), (80, "compute_80"))
    ]
    assert "-fmad=false" in compiled_with(folder).split()
    assert "-cudart static" in (folder / LIBRARY).read_text()
    make(f"BUILD={folder}", "cuda", **pretender | {"FLASH_ATTN_DET_CUDA_ARCHS": "90 100"})
    targets = re.findall(r"-gencode (\S+)", compiled_with(folder))
    assert targets == [
        f"arch=compute_{n},code={code}" for n, code in ((90, "sm_90"), (100, "sm_100"), (90, "compute_90"))
    ]


@pytest.mark.skipif(not HOPPER, reason="needs csrc/cuda/hopper_*.cu")
def test_hopper_sources_are_compiled_for_hopper_only(tmp_path, pretender):
    """wgmma exists on sm_90a and nowhere else, also not later."""
    folder = tmp_path / "build"
    make(f"BUILD={folder}", "cuda", **pretender)
    for name in HOPPER:
        assert re.findall(r"-gencode (\S+)", compiled_with(folder, name)) == ["arch=compute_90a,code=sm_90a"]
        assert "-fmad=false" in compiled_with(folder, name).split()


def test_nothing_is_compiled_twice_without_need(tmp_path, pretender):
    folder = tmp_path / "build"
    command = (f"BUILD={folder}", "cuda")
    make(*command, **pretender)
    before = (folder / LIBRARY).stat().st_mtime_ns
    make(*command, **pretender)
    assert (folder / LIBRARY).stat().st_mtime_ns == before
    make(*command, **pretender | {"FLASH_ATTN_DET_CUDA_ARCHS": "90"})
    assert (folder / LIBRARY).stat().st_mtime_ns > before


def test_compiler_errors_are_shown(tmp_path, pretender):
    Path(pretender["NVCC"]).write_text("#!/bin/sh\necho 'error: no such thing' >&2\nexit 1\n")
    done = make(f"BUILD={tmp_path / 'build'}", "cuda", check=False, **pretender)
    assert done.returncode != 0
    assert "error: no such thing" in done.stderr


def test_kernels_of_an_earlier_build_are_removed(tmp_path, pretender):
    """Where none are asked for, none may lie beside the core."""
    folder = tmp_path / "build"
    make(f"BUILD={folder}", "cuda", **pretender)
    assert (folder / LIBRARY).exists()
    others = [f"--assume-old={folder / path.name}" for path in libraries(**pretender) if path.name != LIBRARY]
    done = make(f"BUILD={folder}", *others, "all", **pretender | {"FLASH_ATTN_DET_CUDA": "0"})
    assert not (folder / LIBRARY).exists()
    assert "CUDA kernels: none, FLASH_ATTN_DET_CUDA is 0" in done.stdout


# ---- what needs no GPU to run ----------------------------------------------------------------------------------------


def find_items(folder: Path, change: tuple[str, str, str] | None = None) -> subprocess.CompletedProcess:
    """Compares the two ways to find an item, or a row of the fold, on this machine.

    change: a header, a text of it, another in its place.
    """
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler (c++)")
    shutil.copytree(CSRC, folder / "csrc")
    source = folder / "tests" / "cuda" / "find_items.cpp"
    source.parent.mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "cuda" / source.name, source)
    if change:
        header = folder / "csrc" / "cuda" / change[0]
        text = header.read_text()
        assert text.count(change[1]) == 1
        header.write_text(text.replace(*change[1:]))
    subprocess.run([compiler, "-std=c++17", "-O1", "-w", source, "-o", folder / "find_items"], check=True)
    return subprocess.run([folder / "find_items"], capture_output=True, text=True, check=False)


def test_items_of_dense_calls_are_found_as_others_are(tmp_path):
    done = find_items(tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "change",
    [
        ("work.cuh", "max(whole_hi / FAD_MMA_BLOCK_KV", "max(1 + whole_hi / FAD_MMA_BLOCK_KV"),
        ("work.cuh", "dense.head_tiles - 1 - nth_tile", "dense.head_tiles - nth_tile"),
        ("work.cuh", "last + dense.right + 1, n_k", "last + dense.right, n_k"),
        ("locate.cuh", "nth * (whole ? heads : last_heads)", "nth * heads"),
        ("locate.cuh", "min(heads, n_heads - first)", "heads"),
        ("fold_row.cuh", "(unsigned)keys.hi - 1", "(unsigned)keys.hi"),
        ("fold_row.cuh", "head - b * (unsigned)p.Hq", "head"),
    ],
    ids=[
        "blocks that all rows see",
        "rows",
        "keys",
        "heads of the last turn",
        "the same in general",
        "splits of the fold",
        "heads of the fold",
    ],
)
def test_items_that_are_found_wrong_are_noticed(tmp_path, change):
    assert find_items(tmp_path, change).returncode == 1


@pytest.fixture(scope="module")
def choose_clusters(tmp_path_factory):
    """Answers what clusters a decode has on 132 multiprocessors: tests/cuda/choose_clusters.cu."""
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
    if nvcc is None:
        pytest.skip("needs nvcc")
    source = Path(__file__).parent / "cuda" / "choose_clusters.cu"
    program = tmp_path_factory.mktemp("clusters") / source.stem
    subprocess.run([nvcc, "-std=c++17", "-w", "-DFAD_HOPPER", "-arch=sm_90", source, "-o", program], check=True)

    def answer(B, Hq, Hk, L, D, held=16, page_size=0, states=0, kernel=0, split_parallel=0):
        command = [program, *map(str, (held, states, kernel, split_parallel, B, Hq, Hk, L, D, page_size))]
        return tuple(map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()))

    return answer


@pytest.mark.parametrize(
    ("call", "ranks", "splits"),
    [
        ((1, 32, 8, 383, 128), 0, 1),  # too short
        ((1, 32, 8, 384, 128), 4, 1),
        ((4, 32, 8, 639, 128), 0, 1),
        ((4, 32, 8, 640, 128), 2, 1),
        ((1, 32, 8, 1024, 128), 4, 1),
        ((1, 32, 8, 2048, 128), 4, 2),  # all that a cluster of eight can have
        ((1, 32, 8, 3072, 128), 2, 3),
        ((1, 32, 8, 4096, 128), 2, 4),
        ((1, 32, 8, 5000, 128), 2, 1),  # five splits: spilled
        ((8, 32, 8, 1024, 128), 2, 1),
        ((9, 32, 8, 1024, 128), 0, 1),  # more thread blocks than multiprocessors
        ((2, 32, 8, 4096, 128), 2, 4),
        ((1, 14, 2, 500, 64), 4, 1),
        ((1, 14, 2, 2048, 64), 4, 2),
        ((1, 14, 2, 4096, 64), 2, 4),
        ((1, 16, 8, 1024, 256), 8, 1),
        ((2, 16, 8, 1024, 256), 4, 1),
        ((1, 16, 8, 2048, 256), 4, 2),
    ],
)
def test_clusters_are_chosen_by_how_many_fit(choose_clusters, call, ranks, splits):
    """ranks: thread blocks that share a split; splits: of a cluster. The driver is asked once for every kernel that
    might fold."""
    for page_size in (0, 16):
        *chosen, pages, asked, blocks = choose_clusters(*call, page_size=page_size)
        assert chosen == [ranks, splits]
        assert pages == (page_size > 0 and ranks > 0)
        assert (asked, blocks) == ((1, ranks * splits) if splits > 1 else (0, 0))


def test_clusters_fold_only_if_all_run_at_once_and_no_states_are_wanted(choose_clusters):
    call = (1, 32, 8, 2048, 128)
    assert choose_clusters(*call, held=8) == (4, 2, 0, 1, 8)
    assert choose_clusters(*call, held=7) == (4, 1, 0, 2, 4)  # nor do pairs
    assert choose_clusters(*call, states=1) == choose_clusters(*call, split_parallel=2) == (4, 1, 0, 0, 0)
    assert choose_clusters(*call, held=0, kernel=3) == (4, 2, 0, 0, 0)
    assert choose_clusters(9, 32, 8, 300, 128, kernel=3) == (2, 1, 0, 0, 0)
